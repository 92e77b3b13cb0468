"""Commands that ask the node running on this machine."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
import httpx

from mesh.cli.output import print_json, print_table
from mesh.cli.remote import call, get_status
from mesh.config import format_size
from mesh.errors import EngineError, MeshError, StateError
from mesh.node.statedir import Running, find_running, is_alive

STOP_WITHIN_S = 30.0


def invite(state_dir: Path, uses: int, expires_s: float, role: str, as_json: bool) -> None:
    """Make a token and show the line to paste."""
    answer = call(find_running(state_dir), "invite", {"uses": uses, "expires_s": expires_s, "role": role})
    if as_json:
        print_json(answer)
        return
    command = "mesh up --join" if role == "worker" else "mesh client --join"
    until = time.strftime("%H:%M on %d %B", time.localtime(answer["expires_at"]))
    times = "once" if uses == 1 else f"{uses} times"
    click.echo(f"works {times}, until {until}; on the other machine:\n", err=True)
    click.echo(f"{command} {answer['token']}")


def status(state_dir: Path, as_json: bool) -> None:
    """The contract's status, for people or as it is."""
    found = get_status(find_running(state_dir))
    if as_json:
        print_json(found)
        return
    node, mesh, layout, requests = found["node"], found["mesh"], found["layout"], found["requests"]
    click.echo(f"{node['name']}  {node['role']}  mesh {mesh['id'][:8]}  epoch {mesh['epoch']}  ", nl=False)
    click.secho(mesh["state"], fg="green" if mesh["state"] == "serving" else "yellow", bold=True, nl=False)
    click.echo(f"  {mesh['reason']}" if mesh["reason"] else "")
    if layout is not None:
        model = layout["model"]
        click.echo(
            f"{model['name']}  {format_size(model['size_bytes'])}, {model['n_layers']} layers, {layout['mode']}, "
            f"predicted {layout['predicted_ms_per_token']:.0f} ms/token\n"
        )
        rows = [
            [
                m["name"],
                _layers(m["layers"]),
                format_size(m["bytes"]),
                m["device"],
                "host" if m["id"] == layout["host"] else "",
            ]
            for m in layout["ring"]
        ]
        print_table(None, ["ring", "layers", "memory>", "device", ""], rows)
    if found["peers"]:
        rows = [
            [
                peer["name"], peer["role"], peer["state"], peer["path"] or "-", peer["address"] or "-",
                "-" if peer["rtt_ms"] is None else f"{peer['rtt_ms']:.1f} ms", peer["excluded"] or "",
            ]
            for peer in found["peers"]
        ]  # fmt: skip
        click.echo()
        print_table(None, ["peer", "role", "state", "path", "address", "rtt>", ""], rows)
    click.echo(
        f"\nrequests: {requests['active']} active, {requests['held']} held, {requests['completed']} completed, "
        f"{requests['resumed']} resumed, {requests['failed']} failed"
    )


def _layers(layers: list[int] | None) -> str:
    return "-" if layers is None else f"{layers[0]}-{layers[1]}"


def approve(state_dir: Path, code: str) -> None:
    """Pairing by code is not built yet: say so rather than pretend."""
    find_running(state_dir)
    raise MeshError(
        f"pairing by code is not built yet; {code!r} was not used", remedy="make a token instead: mesh invite"
    )


def revoke(state_dir: Path, node: str) -> None:
    """Throw a member out."""
    answer = call(find_running(state_dir), "revoke", {"node": node})
    click.echo(f"{answer['name']} ({answer['id']}) is out; its connections are closed")


def stop(state_dir: Path, how: str) -> None:
    """``down`` or ``leave``, and wait until the process is gone.

    Raises:
        StateError: it does not end within 30 seconds.
    """
    running = find_running(state_dir)
    call(running, how, {})
    deadline = time.monotonic() + STOP_WITHIN_S
    while is_alive(running):
        if time.monotonic() > deadline:
            raise StateError(
                f"the node (pid {running.pid}) is still stopping after {STOP_WITHIN_S:.0f} s",
                remedy="look at its log: mesh logs",
            )
        time.sleep(0.05)
    click.echo("stopped" if how == "down" else "left the mesh and stopped")


_PROMPT = "The machines on the desk, in the attic and under the stairs agreed to share the work. " * 12


def bench(state_dir: Path, tokens: int, runs: int, as_json: bool) -> None:
    """Median of ``runs`` streamed completions through this machine's own API."""
    running = find_running(state_dir)
    found = get_status(running)
    if found["mesh"]["state"] != "serving":
        raise EngineError(f"the mesh is {found['mesh']['state']}: {found['mesh']['reason']}", remedy="mesh status")
    results = [_measure(running, tokens, run) for run in range(runs)]
    medians = {key: statistics.median(result[key] for result in results) for key in results[0]}
    if as_json:
        print_json({"runs": runs, "tokens": tokens, "layout": found["layout"], **medians})
        return
    rows = [[key.replace("_", " "), f"{value:.1f}"] for key, value in medians.items()]
    print_table(f"median of {runs} runs, {len(found['layout']['ring'])} machine(s)", ["", ">"], rows)


def _measure(running: Running, tokens: int, run: int) -> dict[str, float]:
    # A different first word each run, so that no prompt cache answers for the engine.
    body = {
        "prompt": f"{run} {_PROMPT}", "n_predict": tokens, "stream": True, "temperature": 0, "ignore_eos": True,
        "cache_prompt": False,
    }  # fmt: skip
    began = time.monotonic()
    first = None
    timings: dict[str, Any] = {}
    try:
        with (
            httpx.Client(base_url=running.api_url, timeout=600, trust_env=False) as client,
            client.stream(
                "POST", "/completion", json=body, headers={"Authorization": f"Bearer {running.token}"}
            ) as answer,
        ):
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    first = first or time.monotonic()
                    timings = json.loads(line[6:]).get("timings", timings)
    except (httpx.HTTPError, ValueError) as error:
        raise EngineError(f"the request broke: {error}", remedy="mesh status") from error
    if first is None or not timings:
        raise EngineError("the mesh answered without a token", remedy="mesh logs")
    return {
        "time_to_first_token_ms": (first - began) * 1000,
        "prompt_tok_per_s": timings["prompt_per_second"],
        "generation_tok_per_s": timings["predicted_per_second"],
    }
