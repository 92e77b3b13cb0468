"""Commands that need no running node."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from mesh.cli.output import print_json
from mesh.cli.view import make_view
from mesh.engine.cache import entry_dir, find_engine
from mesh.engine.pin import SOURCE, engine_pin, patch_queue
from mesh.errors import StateError
from mesh.node.backend import build_for

_LOG_FILES = ("mesh.log", "llama-server.log", "rpc-server.log")


def engine_build(backend: str, as_json: bool) -> None:
    """Build it, or say that it is there."""
    view = make_view(plain=False, json_lines=False, stream=sys.stderr)
    try:
        engine = build_for(backend, view)
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
