"""The worker's server with AddressSanitizer and UndefinedBehaviorSanitizer, and upstream's own test of its RPC.

Built from the pinned, patched source like the engine, into the same cache; only the targets that RPC needs. Whatever
the sanitizers find ends the process with a report.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from mesh.engine.build import Product, build_product
from mesh.engine.cache import describe, entry_named, executable, open_programs
from mesh.engine.toolchain import build_flags, find_toolchain
from mesh.errors import EngineError, MeshError

_NAME = "checked"
_PROGRAMS = ("ggml-rpc-server", "test-rpc-multi-server")
_SCRIPT = "test-rpc-multi-server.sh"
# Some optimisation, or the kernels take forever; as few lines of debug information as a report needs.
_OPTIMISATION = "-O1 -g1 -DNDEBUG -fno-omit-frame-pointer -fno-sanitize-recover=undefined"
LEAVE_OUT = "MESH_WITHOUT_SANITIZERS"


@dataclass(frozen=True, slots=True)
class Checked:
    """One finished build: programs with sanitizers, and upstream's script that runs its test with them."""

    rpc_server: Path
    multi_server_test: Path
    multi_server_script: Path


def _flags() -> tuple[str, ...]:
    return (
        *build_flags("cpu"),
        "-DGGML_SANITIZE_ADDRESS=ON",
        "-DGGML_SANITIZE_UNDEFINED=ON",
        "-DLLAMA_BUILD_TESTS=ON",
        f"-DCMAKE_C_FLAGS_RELEASE={_OPTIMISATION}",
        f"-DCMAKE_CXX_FLAGS_RELEASE={_OPTIMISATION}",
    )


def find_checked() -> Checked | None:
    """The finished build for this version of mesh and this machine, or None."""
    directory = entry_named(_NAME, _flags())
    programs = open_programs(directory, _PROGRAMS)
    return None if programs is None else Checked(programs[0], programs[1], directory / _SCRIPT)


def build_checked() -> Checked:
    """The build with sanitizers: at once when there is one, in two to three minutes otherwise.

    Raises:
        EngineError: a tool or a sanitizer's runtime is missing, or it does not compile.
    """
    if checked := find_checked():
        return checked
    flags = _flags()

    def gather(tree: Path, objects: Path, result: Path) -> None:
        for name in _PROGRAMS:
            shutil.copy2(executable(objects / "bin", name), executable(result, name))
        shutil.copy2(tree / "tests" / _SCRIPT, result / _SCRIPT)

    def record(directory: Path, built_at: int, seconds: float) -> str:
        return describe(directory, _NAME, flags, built_at=built_at, seconds=seconds)

    product = Product(entry_named(_NAME, flags), flags, _PROGRAMS, gather, record)
    try:
        build_product(product, lambda: find_checked() is not None, find_toolchain("cpu"), _Lines())
    except EngineError as error:
        raise EngineError(
            error.message,
            remedy=f"{error.remedy}\n       gcc needs libasan and libubsan; to test without: {LEAVE_OUT}=1 bin/test",
        ) from error
    checked = find_checked()
    assert checked is not None, "a build that succeeded is whole"
    return checked


class _Lines:
    """One line per piece of work."""

    def phase(self, text: str) -> None:
        if not text.startswith("patching"):
            print(f"checked build: {text}", file=sys.stderr)

    def advance(self, done: int, total: int, unit: str) -> None:
        pass


def main() -> int:
    """Build it, and say where it is."""
    if os.environ.get(LEAVE_OUT):
        print(f"{LEAVE_OUT} is set: no server with sanitizers is built, and its tests are left out", file=sys.stderr)
        return 0
    try:
        print(build_checked().rpc_server.parent)
    except MeshError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
