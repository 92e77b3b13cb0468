"""The engine without our patches, from the same pinned source: what patched figures stand beside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import filelock

from bench.measure import BenchError
from bench.servers import Programs
from mesh.engine.cache import cache_key, cache_root, cpu_features, executable, platform_tag
from mesh.engine.pin import SOURCE
from mesh.engine.source import fetch_source, unpack_source
from mesh.engine.toolchain import build_flags, find_toolchain

_BINARIES = ("llama-server", "ggml-rpc-server")


def programs_in(directory: Path, vocabularies: Path) -> Programs:
    """Binaries that lie in one directory.

    Raises:
        BenchError: one of them does not.
    """
    server, worker = (executable(directory, name) for name in _BINARIES)
    if not server.is_file() or not worker.is_file():
        raise BenchError(f"{directory} does not hold {' and '.join(_BINARIES)}")
    return Programs(server, worker, vocabularies)


def find_upstream(vocabularies: Path) -> Programs:
    """The unpatched engine from the user's cache, compiled with the mesh's flags the first time (minutes).

    Raises:
        BenchError: it does not compile.
        EngineError: a tool is missing, or the source cannot be had.
    """
    flags = build_flags("cpu")
    entry = cache_root() / f"upstream-{cache_key(SOURCE, flags, platform_tag(), cpu_features())}"
    entry.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(entry.parent / "upstream.lock"):
        for left in entry.parent.glob("upstream-building-*"):  # by a build that was killed
            shutil.rmtree(left, ignore_errors=True)
        if not entry.is_dir():
            _compile(entry, flags)
    return programs_in(entry, vocabularies)


def _compile(entry: Path, flags: tuple[str, ...]) -> None:
    toolchain = find_toolchain("cpu")
    archive = fetch_source(_Said())
    print("compiling the engine without patches, once ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="upstream-building-", dir=entry.parent) as scratch:
        tree, objects, result = Path(scratch, "src"), Path(scratch, "obj"), Path(scratch, "result")
        unpack_source(archive, tree)
        configure = [str(toolchain.cmake), "-S", str(tree), "-B", str(objects), "-G", "Ninja"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={toolchain.ninja}", *flags]
        build = [str(toolchain.cmake), "--build", str(objects), "--parallel", str(os.cpu_count() or 1)]
        for command in (configure, [*build, "--target", *_BINARIES]):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            if done.returncode:
                raise BenchError(f"the engine without patches does not compile:\n{done.stdout[-2000:]}")
        result.mkdir()
        for name in _BINARIES:
            shutil.copy2(executable(objects / "bin", name), executable(result, name))
        result.rename(entry)


class _Said:
    """Progress as lines on stderr."""

    def phase(self, text: str) -> None:
        print(text, file=sys.stderr)

    def advance(self, done: int, total: int, unit: str) -> None:
        pass
