"""What compiles the engine on this machine, with which flags, and what to install when something is missing."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mesh.engine import needs
from mesh.engine.distribution import compiler_remedy
from mesh.errors import EngineError, UsageError

_COMMON_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DFETCHCONTENT_FULLY_DISCONNECTED=ON",
    "-DGGML_NATIVE=ON",
    "-DGGML_RPC=ON",
    "-DGGML_RPC_RDMA=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
_NO_METAL = "-DGGML_METAL=OFF"  # on by default where it exists: a CPU engine must say no
_BACKEND_FLAGS = {
    "cpu": (_NO_METAL,),
    "cuda": (_NO_METAL, "-DGGML_CUDA=ON"),
    "metal": ("-DGGML_METAL=ON", "-DGGML_METAL_EMBED_LIBRARY=ON"),
    "vulkan": (_NO_METAL, "-DGGML_VULKAN=ON"),
    "rocm": (_NO_METAL, "-DGGML_HIP=ON"),
    "sycl": (_NO_METAL, "-DGGML_SYCL=ON", "-DCMAKE_C_COMPILER=icx", "-DCMAKE_CXX_COMPILER=icpx"),
}
BACKENDS = tuple(_BACKEND_FLAGS)
_OLDEST_CMAKE = (3, 18)


@dataclass(frozen=True, slots=True)
class Toolchain:
    """The programs that are called by name; the compilers CMake finds itself."""

    cmake: Path
    ninja: Path


def build_flags(backend: str) -> tuple[str, ...]:
    """CMake's flags for one backend.

    Raises:
        UsageError: no such backend.
    """
    if backend not in _BACKEND_FLAGS:
        raise UsageError(f"no backend {backend!r}", remedy=f"one of: {', '.join(BACKENDS)}")
    return _COMMON_FLAGS + _BACKEND_FLAGS[backend]


def find_toolchain(backend: str) -> Toolchain:
    """Everything a build needs, looked for before anything is downloaded.

    Raises:
        EngineError: something is missing; all of it is named at once, with what to install here.
    """
    build_flags(backend)
    cmake = next((p for p in _candidates("cmake", "CMAKE_BIN_DIR") if _cmake_version(p) >= _OLDEST_CMAKE), None)
    ninja = next(_candidates("ninja", "BIN_DIR"), None)
    missing: list[str] = []
    remedies: list[str] = []
    if not _has_compiler():
        missing.append("a C++ compiler")
        remedies.append(compiler_remedy())
    if cmake is None:
        missing.append(f"CMake {'.'.join(map(str, _OLDEST_CMAKE))} or newer")
    if ninja is None:
        missing.append("Ninja")
    if cmake is None or ninja is None:
        remedies.append("pip install cmake ninja")
    for need in needs.missing(backend):
        missing.append(need.what)
        remedies.append(need.remedy)
    if missing or cmake is None or ninja is None:
        raise EngineError(
            f"the engine cannot be built for {backend} here: missing {'; '.join(missing)}",
            remedy="\n".join(dict.fromkeys(remedies)),
            code="toolchain",
        )
    return Toolchain(cmake, ninja)


def _candidates(name: str, package_constant: str) -> Iterator[Path]:
    """Places a build tool may be in: PATH, this environment's scripts, the package that pip installs for it."""
    for path in (os.environ.get("PATH"), sysconfig.get_path("scripts")):
        if found := shutil.which(name, path=path):
            yield Path(found)
    if importlib.util.find_spec(name) is not None:
        directory = getattr(importlib.import_module(name), package_constant, None)
        if directory and (found := shutil.which(name, path=str(directory))):
            yield Path(found)


def _cmake_version(cmake: Path) -> tuple[int, ...]:
    try:
        said = subprocess.run([cmake, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ()
    match = re.search(r"version (\d+)\.(\d+)", said)
    return (int(match[1]), int(match[2])) if match else ()


def _has_compiler() -> bool:
    if sys.platform == "win32":
        return any(shutil.which(name) for name in ("cl", "clang-cl", "g++"))
    if sys.platform == "darwin":
        # /usr/bin/c++ exists without the developer tools, too: it only opens a dialog.
        selected = subprocess.run(["xcode-select", "-p"], capture_output=True, check=False)
        return selected.returncode == 0
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    return any(shutil.which(name.split()[0]) for name in names if name.strip())
