"""Commands that need no running node."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click
import msgspec

from mesh.cli.output import print_json, print_layout, printable
from mesh.cli.remote import call
from mesh.cli.view import make_view
from mesh.clock import SystemClock
from mesh.config import Settings, load_settings
from mesh.election.events import NeedPlan
from mesh.engine.cache import entry_dir, find_engine
from mesh.engine.pin import SOURCE, engine_pin, patch_queue
from mesh.errors import MeshError, StateError, UsageError
from mesh.identity.key import NodeKey
from mesh.models.inventory import Inventory
from mesh.node.facts import OwnFacts
from mesh.node.planning import answer_plan
from mesh.node.prepare import LocalModel, measure, prepare_engine, prepare_model
from mesh.node.statedir import find_running

_LOG_FILES = ("mesh.log", "llama-server.log", "rpc-server.log")


def engine_build(backend: str, as_json: bool) -> None:
    """Build it, or say that it is there."""
    view = make_view(plain=False, json_lines=False, stream=sys.stderr)
    try:
        engine = prepare_engine(backend, view)
    finally:
        view.close()
    if as_json:
        print_json({"pin": engine.pin, "backend": engine.backend, "directory": str(engine.dir)})
    else:
        click.echo(f"engine {engine.pin} ({engine.backend}) is in {engine.dir}")


def engine_info(as_json: bool) -> None:
    """The pin, the patches, and which backends are built for this machine."""
    built = {
        name: engine.dir for name in ("cpu", "cuda", "metal", "vulkan", "rocm", "sycl") if (engine := find_engine(name))
    }
    info = {
        "pin": engine_pin(),
        "source": SOURCE,
        "patches": [patch.name for patch in patch_queue()],
        "built": {name: str(path) for name, path in built.items()},
    }
    if as_json:
        print_json(info)
        return
    click.echo(f"engine {engine_pin()}: {SOURCE}")
    for patch in patch_queue():
        click.echo(f"  + {patch.name}")
    for name, path in built.items():
        click.echo(f"built for {name}: {path}")
    if not built:
        click.echo(f"not built yet; `mesh engine build` puts it in {entry_dir('cpu')}")


def plan(state_dir: Path, as_json: bool, flags: dict[str, Any]) -> None:
    """The plan of the running mesh, or over this machine alone."""
    try:
        running = find_running(state_dir)
    except StateError:
        answer = _plan_alone(load_settings(flags, None))
    else:
        answer = call(running, "plan", _trial(flags))
    if as_json:
        print_json(answer)
    else:
        _show_plan(answer)
    if answer["layout"] is None:
        raise SystemExit(1)


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


def _plan_alone(settings: Settings) -> dict[str, Any]:
    view = make_view(plain=False, json_lines=False, stream=sys.stderr)
    try:
        engine = prepare_engine(settings.backend, view)
        model = prepare_model(settings, engine, view)
    finally:
        view.close()
    if model is None:
        raise MeshError("there is no model to plan for", remedy="mesh plan --model FILE|NAME   (see: mesh models list)")
    me = NodeKey.generate().id
    own = OwnFacts(settings, me, engine, (), model, SystemClock())
    own.measure()
    request = NeedPlan(0, (own.facts((model.cost,)),), None, {}, frozenset())
    planned = answer_plan(request, me, ())
    layout = None if planned.layout is None else msgspec.to_builtins(planned.layout)
    return {"layout": layout, "reason": planned.reason, "excluded": planned.excluded}


def _show_plan(answer: dict[str, Any]) -> None:
    if answer["layout"] is not None:
        layout = answer["layout"]
        print_layout(layout, f"context {layout['ctx_size']} x {layout['parallel']}, ")
    if answer["reason"]:
        click.echo(f"\n{printable(answer['reason'])}")
    for node, why in answer["excluded"].items():
        click.echo(f"without {node[:8]}: {printable(why)}")


def logs(state_dir: Path, follow: bool) -> None:
    """Print what the log files hold, oldest file first; with ``follow`` also what comes, until Ctrl-C.

    Raises:
        StateError: there are none.
    """
    places = {name: state_dir / "logs" / name for name in _LOG_FILES}
    if not any(path.exists() for path in places.values()):
        raise StateError(f"there are no logs in {state_dir}", remedy="name the node's directory: --state-dir DIR")
    read = dict.fromkeys(places, 0)
    while True:
        for name, path in places.items():
            read[name] = _print_from(path, name, read[name])
        if not follow:
            return
        time.sleep(0.3)


def _print_from(path: Path, name: str, position: int) -> int:
    """Print the lines after ``position`` bytes; returns how far the file was read."""
    try:
        size = path.stat().st_size
        if size < position:
            position = 0  # rotated
        with path.open("rb") as file:
            file.seek(position)
            lines = file.read(size - position).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return 0
    for line in lines:
        click.echo(f"{name.removesuffix('.log'):13}{line}")
    return size
