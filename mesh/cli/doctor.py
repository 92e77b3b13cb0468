"""What could be wrong on this machine, each finding with its remedy."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click

from mesh import hardware
from mesh.cli.output import print_json
from mesh.cli.remote import get_status
from mesh.config import API_PORT, BIND_PORT, format_size
from mesh.engine import cache_root, engine_pin, find_engine, find_toolchain
from mesh.errors import MeshError
from mesh.models.inventory import Inventory, models_directory
from mesh.node.statedir import find_running

_LITTLE_DISK = 2 * 10**9


@dataclass(frozen=True, slots=True)
class Finding:
    """One check. ``remedy`` is empty when nothing needs doing."""

    check: str
    level: Literal["ok", "warning", "problem"]
    text: str
    remedy: str = ""


def run(state_dir: Path, as_json: bool) -> None:
    """Print every finding; exit 1 when one is a problem."""
    findings = [finding for check in _CHECKS for finding in _safely(check, state_dir)]
    if as_json:
        print_json(
            {
                "findings": [
                    {"check": f.check, "level": f.level, "text": f.text, "remedy": f.remedy or None} for f in findings
                ]
            }
        )
    else:
        for finding in findings:
            colour = {"ok": "green", "warning": "yellow", "problem": "red"}[finding.level]
            click.secho(f"{finding.level:8}", fg=colour, nl=False)
            click.echo(f"{finding.check:10}{finding.text}")
            if finding.remedy:
                click.echo("".join(f"{'':18}{line}\n" for line in finding.remedy.splitlines()), nl=False)
    if any(finding.level == "problem" for finding in findings):
        raise SystemExit(1)


def _safely(check: Callable[[Path], Iterator[Finding]], state_dir: Path) -> Iterator[Finding]:
    try:
        yield from check(state_dir)
    except MeshError as error:
        yield Finding(check.__name__.strip("_"), "problem", error.message, error.remedy or "")


def _engine(_: Path) -> Iterator[Finding]:
    engine = find_engine("cpu")
    if engine is not None:
        yield Finding("engine", "ok", f"built, {engine.pin}, in {engine.dir}")
        return
    yield Finding("engine", "warning", f"version {engine_pin()} is not built yet", "mesh engine build")
    tools = find_toolchain("cpu")
    yield Finding("toolchain", "ok", f"{tools.cmake}, {tools.ninja}")


def _devices(_: Path) -> Iterator[Finding]:
    for device in hardware.devices():
        level: Literal["ok", "warning"] = "ok" if device.free_bytes > 10**9 else "warning"
        text = f"{device.name} {device.description}: {format_size(device.free_bytes)} free"
        yield Finding(
            "memory",
            level,
            f"{text} of {format_size(device.total_bytes)}",
            "" if level == "ok" else "close something: under 1 GB hardly holds a layer",
        )
    yield Finding("threads", "ok", f"{hardware.threads()} usable")


def _disk(_: Path) -> Iterator[Finding]:
    place = next(parent for parent in (cache_root(), *cache_root().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < _LITTLE_DISK:
        yield Finding(
            "disk", "warning", f"{format_size(free)} free at {place}; building the engine takes 2 GB", "free some space"
        )
    else:
        yield Finding("disk", "ok", f"{format_size(free)} free at {place}")


def _models(_: Path) -> Iterator[Finding]:
    found = Inventory().list_models()
    folder = models_directory()
    if found:
        yield Finding("models", "ok", f"{len(found)} in {folder}: {', '.join(model.name for model in found[:5])}")
    else:
        yield Finding("models", "ok", f"none in {folder}: give one with --model, or try mesh up --demo")


def _node(state_dir: Path) -> Iterator[Finding]:
    try:
        running = find_running(state_dir)
    except MeshError:
        yield from _ports()
        return
    status = get_status(running)
    mesh = status["mesh"]
    level: Literal["ok", "warning"] = "ok" if mesh["state"] == "serving" else "warning"
    yield Finding("node", level, f"running (pid {running.pid}), {mesh['state']} {mesh['reason']}".rstrip())
    for peer in status["peers"]:
        if peer["excluded"] and peer["state"] != "left":
            yield Finding("peer", "warning", f"{peer['name']}: {peer['excluded']}")


def _ports() -> Iterator[Finding]:
    for flag, kind, port in (
        ("--bind-port, UDP", socket.SOCK_DGRAM, BIND_PORT),
        ("--bind-port, TCP", socket.SOCK_STREAM, BIND_PORT),
        ("--api-port", socket.SOCK_STREAM, API_PORT),
    ):
        with socket.socket(socket.AF_INET, kind) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                yield Finding(
                    "ports",
                    "warning",
                    f"port {port} is taken by another program",
                    f"mesh up {flag.partition(',')[0]} N",
                )
            else:
                yield Finding("ports", "ok", f"{port} ({flag}) is free")


_CHECKS: tuple[Callable[[Path], Iterator[Finding]], ...] = (_engine, _devices, _disk, _models, _node)
