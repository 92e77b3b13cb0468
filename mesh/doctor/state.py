"""What lies on disk: the state directory and who holds it, keys, room to write."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock
import psutil

from mesh.config import format_size
from mesh.doctor.finding import Finding, ok, problem, warning
from mesh.doctor.patient import Patient
from mesh.engine.cache import cache_root
from mesh.errors import MeshError
from mesh.identity.store import read_private
from mesh.models.inventory import models_directory
from mesh.node.record import load_record
from mesh.node.statedir import RUNNING_FILE
from mesh.proxy.keys import read_api_keys
from mesh.supervise.registry import ProcessRegistry, process_mark

CHECK = "state"
DISK = "disk"
BUILD_BYTES = 2 * 10**9
LITTLE_BYTES = 100 * 10**6
_PRIVATE = ("node.key", "invites.json", RUNNING_FILE)


def check(patient: Patient) -> Iterator[Finding]:
    """The state directory's permissions, contents and holder."""
    place = patient.state_dir
    if not place.exists():
        yield ok(CHECK, f"{place} is made by the first `mesh up`")
        return
    if os.name == "posix" and place.is_dir():
        yield from judge_mode(place, place.stat().st_mode)
    try:
        for name in _PRIVATE:
            read_private(place / name)
        record = load_record(place)
    except MeshError as error:
        yield problem(CHECK, "state-unreadable", error.message, error.remedy or f"look into {place}")
        return
    if record is not None and record.expelled:
        yield problem(
            CHECK,
            "expelled",
            f'this machine was thrown out of "{record.name}"',
            "mesh up --join TOKEN   (a new invite)",
        )
    elif record is not None:
        yield ok(CHECK, f'{place} belongs to the mesh "{record.name}"')
    else:
        yield ok(CHECK, f"{place} belongs to no mesh yet")
    if patient.running is None:
        yield from _left_behind(place, patient)


def judge_mode(place: Path, mode: int) -> Iterator[Finding]:
    """May others on this machine look into it, and is there something to see?"""
    if mode & 0o077 and (place / "node.key").exists():
        yield warning(
            CHECK,
            "open-state",
            f"{place} is open to other users of this machine (mode {mode & 0o777:o}), and holds this node's key",
            f"chmod 700 {place}",
        )


def _left_behind(place: Path, patient: Patient) -> Iterator[Finding]:
    """Nobody says that it runs here: does somebody hold the directory all the same, or has a run crashed?"""
    lock = place / "lock"
    if lock.exists():
        try:
            with filelock.FileLock(lock, timeout=0):
                pass
        except filelock.Timeout:
            pid = holder(lock)
            who = f"process {pid}" if pid else "another process"
            yield problem(
                CHECK,
                "locked",
                f"{who} holds {place} and answers no command: a node that hangs or was copied",
                f"kill {pid}" if pid else f"find it and end it:  fuser {lock}",
            )
            return
        except OSError as error:
            yield problem(CHECK, "state-unreadable", f"cannot lock {lock}: {error.strerror}", f"rm {lock}")
            return
    alive = [e.pid for e in ProcessRegistry(place).left_over() if process_mark(e.pid) == e.mark]
    if alive:
        yield warning(
            CHECK,
            "left-over",
            f"an earlier run left engine processes behind ({', '.join(map(str, alive))}), which hold memory",
            f"{patient.command('up')}   (ends them; or: kill {' '.join(map(str, alive))})",
        )


def holder(lock: Path) -> int | None:
    """The process that has this file open, if it may be known."""
    for process in psutil.process_iter():
        try:
            if any(Path(file.path) == lock for file in process.open_files()):
                return int(process.pid)
        except (psutil.Error, OSError):
            continue
    return None


def check_keys(patient: Patient) -> Iterator[Finding]:
    """The file with the API's keys, if there is one."""
    named = patient.checkup["settings"]["api_key_file"] if patient.checkup else patient.settings.api_key_file
    if named is None:
        return
    path = Path(named)
    try:
        keys = read_api_keys(path)
    except MeshError as error:
        yield problem("keys", "api-keys", error.message, error.remedy or f"look into {path}")
        return
    mode = path.stat().st_mode
    if os.name == "posix" and mode & 0o077:
        yield warning(
            "keys",
            "open-api-keys",
            f"{path} can be read by other users of this machine (mode {mode & 0o777:o}): so can they use the API",
            f"chmod 600 {path}",
        )
    else:
        yield ok("keys", f"{len(keys)} in {path}, for this user only")


def check_disk(patient: Patient) -> Iterator[Finding]:
    """Room for what is written: state, engines, models."""
    built = patient.outfit is None or patient.outfit.engine is not None
    places = [("state", patient.state_dir, LITTLE_BYTES)]
    if patient.computes:
        places += [("engines", cache_root(), LITTLE_BYTES if built else BUILD_BYTES)]
        places += [("models", models_directory(), LITTLE_BYTES)]
    for what, place, least in places:
        yield from _room(what, place, least)


def _room(what: str, place: Path, least: int) -> Iterator[Finding]:
    there = next((parent for parent in (place, *place.parents) if parent.exists()), Path("/"))
    try:
        free = shutil.disk_usage(there).free
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield problem(
            DISK, "unwritable", f"{what}: cannot write in {there}: {error.strerror or error}", _free(what, there)
        )
        return
    yield from judge_room(what, there, free, least)


def judge_room(what: str, place: Path, free: int, least: int) -> Iterator[Finding]:
    """Is ``free`` enough for what is written there?"""
    text = f"{what}: {format_size(free)} free in {place}"
    if free >= least:
        yield ok(DISK, text)
    else:
        need = "building the engine takes 2 GB" if least == BUILD_BYTES else "that is little"
        yield warning(DISK, "little-disk", f"{text}; {need}", _free(what, place))


def _free(what: str, place: Path) -> str:
    instead = {
        "state": "or keep it elsewhere:  mesh up --state-dir DIR",
        "engines": "or keep engines elsewhere:  MESH_CACHE_DIR=DIR mesh up",
        "models": "or keep models elsewhere:  MESH_MODELS_DIR=DIR mesh up",
    }[what]
    return f"see what takes the room:  du -xh -d 1 {place}\n{instead}"
