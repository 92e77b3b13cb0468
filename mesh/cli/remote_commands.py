"""Commands that ask the node running on this machine."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
import httpx
import psutil

from mesh.cli.output import print_json, print_layout, print_table, printable
from mesh.cli.remote import call, get_status
from mesh.config import format_size
from mesh.errors import EngineError, StateError
from mesh.identity.pairing import read_code
from mesh.node.departure import SHOW_AFTER_S, waiting_line
from mesh.node.record import forget_record, load_record
from mesh.node.statedir import Running, StateDir, command_for, find_process, find_running, is_alive

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
    running = find_running(state_dir)
    found = get_status(running)
    if as_json:
        print_json(found)
        return
    node, mesh, layout, requests = found["node"], found["mesh"], found["layout"], found["requests"]
    click.echo(f"{printable(node['name'])}  {node['role']}  mesh {mesh['id'][:8]}  epoch {mesh['epoch']}  ", nl=False)
    click.secho(mesh["state"], fg="green" if mesh["state"] == "serving" else "yellow", bold=True, nl=False)
    click.echo(f"\n{printable(mesh['reason'])}\n" if mesh["reason"] else "\n")
    if layout is not None:
        print_layout(layout)
    if found["peers"]:
        rows = [
            [
                peer["name"], peer["role"], peer["state"], peer["path"] or "-", peer["address"] or "-",
                "-" if peer["rtt_ms"] is None else f"{peer['rtt_ms']:.1f} ms", peer["excluded"] or "",
            ]
            for peer in found["peers"]
        ]  # fmt: skip
        click.echo()
        print_table(["peer", "role", "state", "path", "address", "rtt>", ""], rows)
    _show_devices(call(running, "devices", {})["devices"])
    for asking in call(running, "requests", {})["requests"]:
        click.echo(
            f"\n{printable(asking['name'])} at {asking['host']} asks to be let in as a {asking['role']}; "
            f"if it is yours, type the code that it shows:\n{command_for(state_dir, 'approve CODE')}"
        )
    click.echo(
        f"\nrequests: {requests['active']} active, {requests['held']} held, {requests['completed']} completed, "
        f"{requests['resumed']} resumed, {requests['failed']} failed"
    )


def _show_devices(devices: list[dict[str, Any]]) -> None:
    if not devices:
        return  # a lite client's
    click.echo("\nthis machine")
    for device in devices:
        speeds = ", ".join(f"{speed / 1e9:.3g} GB/s {weights}" for weights, speed in device["speeds"].items())
        click.echo(
            f"  {device['name']}  {format_size(device['free_bytes'])} free of {format_size(device['total_bytes'])}, "
            f"{speeds or 'its speed is not measured yet'}"
        )


def approve(state_dir: Path, code: str, as_json: bool) -> None:
    """Let in the machine that shows ``code``.

    Raises:
        UsageError: it is no code, or has a typo.
        MeshError: nobody asks, or nobody with that code.
    """
    running = find_running(state_dir)
    answer = call(running, "approve", {"code": read_code(code)}, timeout_s=30.0)
    if as_json:
        print_json(answer)
    else:
        role = "worker" if answer["role"] == "worker" else "lite client"
        click.echo(f"let in {printable(answer['name'])} ({answer['id']}) as a {role}")


def revoke(state_dir: Path, node: str, as_json: bool) -> None:
    """Throw a member out."""
    answer = call(find_running(state_dir), "revoke", {"node": node})
    if as_json:
        print_json(answer)
    else:
        click.echo(f"{printable(answer['name'])} ({answer['id']}) is out; its connections are closed")


def down(state_dir: Path) -> None:
    """Stop the node, also one that is still starting or does not answer any more."""
    running = find_process(state_dir) or find_running(state_dir)  # which says that there is none
    _end(running, "down", state_dir)
    click.echo("stopped")


def leave(state_dir: Path) -> None:
    """Stop the node if one runs, and forget the mesh.

    Raises:
        StateError: this directory is of no mesh.
    """
    running = find_process(state_dir)
    if running is not None:
        _end(running, "leave", state_dir)
    elif load_record(state_dir) is None:
        raise StateError(f"{state_dir} belongs to no mesh", remedy="name the node's directory: --state-dir DIR")
    with StateDir(state_dir):
        forget_record(state_dir)
    click.echo("left the mesh" if running is None else "left the mesh and stopped")


def _end(running: Running, how: str, state_dir: Path) -> None:
    """Ask the node to end, or its process when it does not listen, and wait until it is gone.

    Raises:
        StateError: it does not end within :data:`STOP_WITHIN_S`.
    """
    drain_s = 0.0
    try:
        if not running.api_url:
            raise StateError("it answers nobody yet")
        drain_s = float(call(running, how, {}).get("drain_s", 0.0))
    except StateError:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(running.pid).terminate()
    began = time.monotonic()
    deadline = began + STOP_WITHIN_S + drain_s
    told = drain_s <= 0
    while is_alive(running):
        if not told and time.monotonic() > began + SHOW_AFTER_S:
            told = True
            click.echo(waiting_line(drain_s), err=True)
        if time.monotonic() > deadline:
            raise StateError(
                f"the node (pid {running.pid}) is still stopping after {time.monotonic() - began:.0f} s",
                remedy=f"look at its log: {command_for(state_dir, 'logs')}",
            )
        time.sleep(0.05)


_SHOWN = (
    ("time_to_first_token_ms", "time to first token", "ms", 0),
    ("prompt_tok_per_s", "prompt", "tok/s", 1),
    ("generation_tok_per_s", "generation", "tok/s", 1),
)
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
    ring = found["layout"]["ring"]
    click.echo(f"{' > '.join(printable(m['name']) for m in ring)}, {tokens} tokens, median of {runs} runs\n")
    print_table(["", ">", ""], [[name, f"{medians[key]:.{digits}f}", unit] for key, name, unit, digits in _SHOWN])


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
