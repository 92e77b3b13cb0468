"""Builds the engine, once per user and content: fetch, unpack, patch, configure, compile, and only then rename.

One build runs at a time in a cache; whoever comes second waits, and finds the first one's result. Everything happens in
a directory named ``building-...`` beside the entries, so whatever bears that name while nobody builds is debris.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import filelock
import psutil

from mesh.config import format_size
from mesh.engine.cache import (
    BINARIES,
    RECORD,
    VOCABULARIES,
    Engine,
    cache_root,
    describe,
    entry_dir,
    executable,
    find_engine,
)
from mesh.engine.patching import apply_patch
from mesh.engine.pin import patch_queue
from mesh.engine.prune import UNFINISHED, prune
from mesh.engine.source import BuildProgress, fetch_source, unpack_source
from mesh.engine.toolchain import Toolchain, build_flags, find_toolchain
from mesh.errors import EngineError

_ERROR = re.compile(r"CMake Error|\berror:|FAILED:")
_NINJA_STEP = re.compile(r"^\[(\d+)/(\d+)\] ")
_BYTES_PER_JOB = 1 << 30
"""What one compiler of the larger sources needs at its worst."""


@dataclass(frozen=True, slots=True)
class Product:
    """Something that is made of the patched source, and kept in the cache.

    Args:
        entry: where it belongs, named after everything that goes into it.
        flags: CMake's.
        targets: what is compiled.
        gather: copies what is kept from the source's tree and the build's into the last directory.
        describe: the record of that directory, given when it was built and how many seconds that took.
    """

    entry: Path
    flags: tuple[str, ...]
    targets: tuple[str, ...]
    gather: Callable[[Path, Path, Path], None]
    describe: Callable[[Path, int, float], str]


@dataclass(frozen=True, slots=True)
class _Workshop:
    """The places of one build."""

    tree: Path
    objects: Path
    result: Path
    log: Path


def build_engine(progress: BuildProgress, backend: str = "cpu") -> Engine:
    """The engine for ``backend``: at once when it is built already, in minutes otherwise.

    Blocks; call it from a thread of its own in an event loop. Safe to interrupt and to kill.

    Raises:
        EngineError: a tool is missing, the source cannot be had, or it does not compile.
    """
    if engine := find_engine(backend):
        return engine

    def record(directory: Path, built_at: int, seconds: float) -> str:
        return describe(directory, backend, build_flags(backend), built_at=built_at, seconds=seconds)

    product = Product(entry_dir(backend), build_flags(backend), BINARIES, _gather, record)
    build_product(product, lambda: find_engine(backend) is not None, find_toolchain(backend), progress)
    engine = find_engine(backend)
    if engine is None:
        raise EngineError(f"the engine was built in {entry_dir(backend)}, but is not whole", remedy="mesh engine build")
    progress.phase("the engine is built")
    return engine


def build_product(
    product: Product, is_built: Callable[[], bool], toolchain: Toolchain, progress: BuildProgress
) -> None:
    """Make ``product`` unless somebody else has in the meantime, which ``is_built`` says.

    Raises:
        EngineError: the source cannot be had, or it does not compile.
    """
    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _sole_builder(root, progress):
            if is_built():
                return
            _sweep(root)
            _build(root, toolchain, product, progress)
            _prune(root, progress)
    except OSError as error:
        raise EngineError(
            f"the engine cannot be built in {root}: {error}",
            remedy="free some disk space (2 GB), or point MESH_CACHE_DIR elsewhere",
        ) from error


@contextmanager
def _sole_builder(root: Path, progress: BuildProgress) -> Iterator[None]:
    lock = filelock.FileLock(root / "build.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        progress.phase("another build of the engine is under way: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def tidy(progress: BuildProgress) -> None:
    """Remove engines that nobody uses any more, unless somebody builds now: then the builder does."""
    root = cache_root()
    with suppress(OSError, filelock.Timeout), filelock.FileLock(root / "build.lock", timeout=0):
        _prune(root, progress)


def _prune(root: Path, progress: BuildProgress) -> None:
    for removed in prune(root):
        progress.phase(f"removed an engine of another version: {removed.name}, {format_size(removed.bytes)}")


def _sweep(root: Path) -> None:
    """Remove what interrupted builds left. Only under the lock: then nobody works in any of it."""
    for debris in root.glob(f"{UNFINISHED}*"):
        shutil.rmtree(debris, ignore_errors=True)


def _build(root: Path, toolchain: Toolchain, product: Product, progress: BuildProgress) -> None:
    started = time.monotonic()
    archive = fetch_source(progress)
    entry = product.entry
    (root / "logs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=root, ignore_cleanup_errors=True) as scratch:
        shop = _Workshop(
            Path(scratch, "src"), Path(scratch, "obj"), Path(scratch, "engine"), root / "logs" / f"{entry.name}.log"
        )
        progress.phase("unpacking the source")
        unpack_source(archive, shop.tree)
        for patch in patch_queue():
            progress.phase(f"patching: {patch.name}")
            apply_patch(shop.tree, patch)
        with shop.log.open("w", encoding="utf-8") as log:
            _compile(shop, toolchain, product, progress, log)
        progress.phase("keeping the result")
        shop.result.mkdir()
        product.gather(shop.tree, shop.objects, shop.result)
        record = product.describe(shop.result, int(time.time()), time.monotonic() - started)
        (shop.result / RECORD).write_text(record, "utf-8")
        if entry.exists():  # not whole, or find_engine had returned it
            shutil.rmtree(entry)
        shop.result.rename(entry)


def _compile(shop: _Workshop, toolchain: Toolchain, product: Product, progress: BuildProgress, log: IO[str]) -> None:
    progress.phase("configuring")
    configure = [str(toolchain.cmake), "-S", str(shop.tree), "-B", str(shop.objects), "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={toolchain.ninja}", *product.flags]
    _run("configuring", configure, shop, log, lambda _: None)

    def report(line: str) -> None:
        if step := _NINJA_STEP.match(line):
            progress.advance(int(step[1]), int(step[2]), "targets")

    progress.phase("compiling")
    compile_ = [str(toolchain.cmake), "--build", str(shop.objects), "--parallel", str(_jobs())]
    compile_ += ["--target", *product.targets]
    _run("compiling", compile_, shop, log, report)


def _jobs() -> int:
    memory: int = psutil.virtual_memory().total
    return max(1, min(os.cpu_count() or 1, memory // _BYTES_PER_JOB))


def _run(what: str, command: list[str], shop: _Workshop, log: IO[str], on_line: Callable[[str], None]) -> None:
    """Run one step with everything it says in the log.

    Raises:
        EngineError: it failed; the message ends with the last lines of the log.
    """
    # A version-control checkout around the cache, or a status format of the user's own, must not show through.
    environment = dict(os.environ, NINJA_STATUS="[%f/%t] ", GIT_CEILING_DIRECTORIES=str(shop.tree.parent))
    log.write(f"$ {' '.join(command)}\n")
    log.flush()
    with subprocess.Popen(
        command,
        cwd=shop.tree.parent,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # its compilers end with it, see below
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                on_line(line)
        except BaseException:
            _terminate(process)  # the exit from the block waits for it
            raise
    if process.returncode != 0:
        log.flush()
        said = "\n  ".join(_telling(shop.log.read_text("utf-8", "replace").splitlines()))
        raise EngineError(
            f"{what} the engine failed (exit {process.returncode}); {shop.log} says:\n  {said}",
            remedy="the whole log says more; if it is not about this machine, please report it",
        )


def _terminate(process: subprocess.Popen[str]) -> None:
    """End the step and whatever it started: a cmake that dies alone leaves Ninja and its compilers behind."""
    if os.name == "posix":
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    else:
        process.terminate()


def _telling(lines: list[str], count: int = 15) -> list[str]:
    """The lines of a log that say what went wrong: from the first error on, else the last ones."""
    for index, line in enumerate(lines):
        if _ERROR.search(line):
            return lines[index : index + count]
    return lines[-count:]


def _gather(tree: Path, objects: Path, result: Path) -> None:
    for name in BINARIES:
        shutil.copy2(executable(objects / "bin", name), executable(result, name))
    (result / "vocab").mkdir()
    for name in VOCABULARIES:
        shutil.copyfile(tree / "models" / f"ggml-vocab-{name}.gguf", result / "vocab" / f"ggml-vocab-{name}.gguf")
