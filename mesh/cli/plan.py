"""``mesh plan``: who would carry what, what a token would take, and what would change that."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from mesh.cli.output import print_json, print_table, printable
from mesh.cli.preflight import check_gpu_layers
from mesh.cli.remote import call
from mesh.cli.view import make_view
from mesh.clock import SystemClock
from mesh.config import Settings, format_size, load_settings, parse_size
from mesh.election.events import NeedPlan
from mesh.engine.cache import Engine
from mesh.errors import MeshError, StateError, UsageError
from mesh.identity.key import NodeKey
from mesh.models.inventory import Inventory
from mesh.node.backend import prepare_engine
from mesh.node.facts import OwnFacts
from mesh.node.pacing import Pacing
from mesh.node.planning import Imagined, Trial, describe_plan, tried
from mesh.node.prepare import LocalModel, measure, prepare_model
from mesh.node.statedir import find_running

BAR = 16
"""Characters of a bar."""
_WHAT_IF = "node=NAME,memory=SIZE[,speed=RATE][,rtt=TIME]"


def plan(state_dir: Path, as_json: bool, flags: dict[str, Any], what_if: tuple[str, ...]) -> None:
    """The plan of the running mesh, or over this machine alone.

    Raises:
        UsageError: a machine is described in a way that is not understood.
        MeshError: there is no model to plan for.
    """
    imagined = [read_what_if(text) for text in what_if]
    try:
        running = find_running(state_dir)
    except StateError:
        answer = _plan_alone(load_settings(flags, None), imagined)
    else:
        trial = _trial(flags) | ({"what_if": msgspec.to_builtins(imagined)} if imagined else {})
        answer = call(running, "plan", trial)
    if as_json:
        print_json(answer)
    else:
        _show(answer)
    if answer["layout"] is None:
        raise SystemExit(1)


def read_what_if(text: str) -> Imagined:
    """``node=attic,memory=16GB,speed=20GB/s,rtt=5ms`` as a machine.

    Raises:
        UsageError: it is none.
    """
    given: dict[str, str] = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        key, value = key.strip(), value.strip()
        if key not in ("node", "memory", "speed", "rtt") or not value or key in given:
            raise UsageError(f'--what-if does not understand "{part.strip()}"', remedy=f"write {_WHAT_IF}")
        given[key] = value
    if "node" not in given or "memory" not in given:
        raise UsageError("--what-if needs a name and a size at least", remedy=f"write {_WHAT_IF}")
    try:
        sizes = {name: parse_size(given[name].removesuffix("/s")) for name in ("memory", "speed") if name in given}
    except UsageError as error:
        raise UsageError(f"--what-if: {error.message}", remedy=error.remedy) from error
    try:
        rtt_ms = float(given.get("rtt", "1ms").removesuffix("ms"))
        return msgspec.convert(
            {"name": given["node"], "memory_bytes": sizes["memory"], "bytes_per_second": float(sizes.get("speed", 0)),
             "rtt_ms": rtt_ms},
            Imagined,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(f'--what-if: "{given["rtt"]}" is no time', remedy="give milliseconds, e.g. rtt=5ms") from error
    except msgspec.ValidationError as error:
        raise UsageError(f"--what-if {text}: {error}", remedy=f"write {_WHAT_IF}") from error


def _trial(flags: dict[str, Any]) -> dict[str, Any]:
    """What to try out on the running node."""
    for name in ("backend", "gpu_layers"):
        if name in flags:
            raise UsageError(
                f"--{name.replace('_', '-')} belongs to the node that runs, and cannot be tried out on it",
                remedy="leave it out, or stop the node first: mesh down",
            )
    trial = dict(flags)
    if "model" in trial:
        trial["model"] = msgspec.to_builtins(_measured(trial["model"]).cost)
    return trial


def _measured(name: str) -> LocalModel:
    view = make_view(plain=False, json_lines=False, stream=sys.stderr)
    try:
        return measure(Inventory().find(name), view)
    finally:
        view.close()


def _plan_alone(settings: Settings, imagined: list[Imagined]) -> dict[str, Any]:
    view = make_view(plain=False, json_lines=False, stream=sys.stderr)
    try:
        engine = prepare_engine(settings.backend, view)
        check_gpu_layers(settings, engine.backend)
        model = prepare_model(settings, engine, view)
    finally:
        view.close()
    if model is None:
        raise MeshError("there is no model to plan for", remedy="mesh plan --model FILE|NAME   (see: mesh models list)")
    me = NodeKey.generate().id
    own = OwnFacts(settings, me, engine, (), model, SystemClock())
    own.list_devices()
    own.measure()
    _find_speed(engine, model, own)
    members = tried((own.facts((model.cost,)),), me, Trial(what_if=tuple(imagined)))
    return describe_plan(NeedPlan(0, members, None, {}, frozenset()), me, ())


def _find_speed(engine: Engine, model: LocalModel, own: OwnFacts) -> None:
    """What an earlier run found, or half a second of measuring."""
    pacing = Pacing(engine, model.cost.weights, own.paced, SystemClock().wall)
    pacing.recall()
    asyncio.run(pacing.measure(families=1))


def _show(answer: dict[str, Any]) -> None:
    layout = answer["layout"]
    if layout is not None:
        model = layout["model"]
        click.echo(
            f"{printable(model['name'])}  {format_size(model['size_bytes'])}, {model['n_layers']} layers, "
            f"context {layout['ctx_size']} x {layout['parallel']}\n"
        )
        print_table(["ring", "layers", "memory>", "of>", "", "ms>", "speed>"], _rows(layout, answer["shares"]))
        _show_time(layout["predicted_ms_per_token"], answer["parts"])
    if answer["reason"]:
        click.echo(f"\n{printable(answer['reason'])}")
    for node, why in answer["excluded"].items():
        click.echo(f"without {printable(answer['names'].get(node, node[:8]))}: {printable(why)}")
    if answer["alternatives"]:
        click.echo("\nnext best")
        rows = [
            [" > ".join(other["ring"]), f"{other['ms_per_token']:.1f}", other["why"]]
            for other in answer["alternatives"]
        ]
        print_table(["", ">", ""], rows)
    if answer["more"]:
        click.echo("\nwhat would change it")
        for line in answer["more"]:
            click.echo(f"  {printable(line)}")


def _rows(layout: dict[str, Any], shares: list[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for member, share in zip(layout["ring"], shares, strict=True):
        layers = "ends" if member["layers"] is None else "{}-{}".format(*member["layers"])
        part = min(member["bytes"] / share["usable_bytes"], 1.0) if share["usable_bytes"] else 1.0
        full = round(part * BAR)
        host = ", host" if member["id"] == layout["host"] else ""
        speed = f"{share['bytes_per_second'] / 1e9:.3g} GB/s"
        rows.append([
            f"{member['name']} ({member['device']}{host})", layers, format_size(member["bytes"]),
            format_size(share["usable_bytes"]), "#" * full + "." * (BAR - full), f"{share['compute_ms']:.1f}",
            speed if share["measured"] else f"{speed}?",
        ])  # fmt: skip
    return rows


def _show_time(total: float, parts: dict[str, float]) -> None:
    network = f", {parts['hops_ms']:.1f} hops, {parts['bytes_ms']:.1f} bytes, {parts['members_ms']:.1f} tunnels"
    alone = parts["hops_ms"] + parts["members_ms"] == 0
    click.echo(f"\npredicted {total:.1f} ms/token: {parts['compute_ms']:.1f} compute{'' if alone else network}")
