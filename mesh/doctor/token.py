"""One token from each device: the smallest proof that this engine computes here.

A small model goes through ``llama-server`` on each device in turn, on a loopback port of its own, and what it prints
says whether the device was used.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

from mesh import hardware
from mesh.doctor.finding import Finding, ok, problem
from mesh.doctor.outfit import Outfit
from mesh.doctor.patient import Patient
from mesh.engine.cache import Engine
from mesh.engine.placement import CPU, Placement
from mesh.errors import MeshError, ModelError
from mesh.models.demo import DEMO_VERSION, write_demo
from mesh.models.gguf import inspect
from mesh.node.prepare import demo_path
from mesh.supervise.launch import Child, child_environment, system_launcher
from mesh.supervise.output import Output, RotatingLog
from mesh.supervise.ports import EarlyExitError, start_on_free_port
from mesh.supervise.probe import first_token
from mesh.supervise.reasons import ProcessKind, exit_reason

CHECK = "token"
WITHIN_S = 30.0
"""For one device; a GPU's kernels may be compiled for it the first time."""


async def check(patient: Patient) -> list[Finding]:
    """A token from main memory's processor, and from each device that the engine lists."""
    outfit = patient.outfit
    if outfit is None or outfit.engine is None or outfit.broken is not None:
        return []
    with tempfile.TemporaryDirectory(prefix="mesh-doctor-", ignore_cleanup_errors=True) as scratch:
        try:
            model = await asyncio.to_thread(_small_model, outfit.engine, Path(scratch))
        except (MeshError, OSError) as error:
            return [problem(CHECK, "no-model", f"no small model could be written to try: {error}", "df -h /tmp")]
        return [
            found
            for device in (CPU, *(listed.name for listed in outfit.listed))
            for found in await _try(outfit, outfit.engine, device, model, Path(scratch))
        ]


def _small_model(engine: Engine, scratch: Path) -> Path:
    """The demo model where it is already, or a copy that goes away again: looking changes nothing."""
    there = demo_path()
    with contextlib.suppress(ModelError):
        if there.exists() and inspect(there).demo_version == DEMO_VERSION:
            return there
    write_demo(scratch / "small.gguf", engine.vocab("llama-spm"))
    return scratch / "small.gguf"


async def _try(outfit: Outfit, engine: Engine, device: str, model: Path, scratch: Path) -> list[Finding]:
    placement = Placement()
    began = time.monotonic()
    try:
        async with asyncio.timeout(WITHIN_S):
            async with _serving(engine, device, model, scratch / f"{device}.log", placement) as (port, key):
                await first_token(port, key)
    except TimeoutError:
        return list(judge(outfit, device, f"none within {WITHIN_S:.0f} s", placement, WITHIN_S))
    except EarlyExitError as early:
        why = exit_reason(ProcessKind.SERVER, early.code, early.tail)
        return list(judge(outfit, device, why, placement, 0.0))
    except MeshError as error:
        return list(judge(outfit, device, error.message, placement, 0.0))
    return list(judge(outfit, device, "", placement, time.monotonic() - began))


def judge(outfit: Outfit, device: str, failure: str, placement: Placement, seconds: float) -> Iterator[Finding]:
    """Pure.

    Args:
        failure: why no token came; empty: one did, in so many seconds from the start of the engine.
    """
    if failure:
        again = f"rm -r {outfit.entry} && mesh engine build --backend {outfit.backend}"
        instead = "" if device == CPU else "\nor compute without it:  mesh up --backend cpu"
        yield problem(CHECK, "no-token", f"{device} computed no token: {failure}", f"{again}{instead}")
        return
    really = placement.instead_of(device)
    if really:
        yield problem(
            CHECK,
            "misplaced",
            f"asked for {device}, the engine computed on {really}",
            "see what it says:  mesh logs\nor compute without it:  mesh up --backend cpu",
        )
        return
    yield ok(CHECK, f"{device} computes: a token {seconds:.1f} s after the engine was started")


@asynccontextmanager
async def _serving(
    engine: Engine, device: str, model: Path, log: Path, placement: Placement
) -> AsyncIterator[tuple[int, str]]:
    key = secrets.token_hex(16)
    on = ["-dev", "none", "-ngl", "0"] if device == CPU else ["-dev", device, "-ngl", "all"]
    argv = [str(engine.llama_server), "--model", str(model), "--host", "127.0.0.1", "--no-ui", "--offline", *on]
    argv += [
        "-t",
        str(hardware.threads()),
        "-c",
        "256",
        "-np",
        "1",
        "-fit",
        "off",
        "--no-warmup",
        "-cram",
        "0",
        "-lv",
        "4",
    ]
    environment = child_environment(os.environ, {"LLAMA_API_KEY": key})
    started: list[Child] = []
    file = RotatingLog(log)

    async def launch(port: int) -> Child:
        output = Output(file, on_line=placement.read)
        child = await system_launcher().launch([*argv, "--port", str(port)], environment, output, lambda pid: None)
        started.append(child)
        return child

    try:
        _, port = await start_on_free_port(launch)
        yield port, key
    finally:
        for child in started:
            child.kill()
        await asyncio.gather(*(child.wait() for child in started))
        file.close()
