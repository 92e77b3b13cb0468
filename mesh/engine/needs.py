"""What the engine needs here to be built for a backend, looked for before a minute is spent.

The builds are for this very machine (``GGML_NATIVE``): one for a GPU that is not here would have to guess its kind.
"""

from __future__ import annotations

import ctypes.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mesh.engine.distribution import SDK, cuda_remedy, vulkan_remedy
from mesh.hardware import nvidia

CUDA_ELSEWHERE = ("CUDA_HOME", "CUDA_PATH")
_COMPILES_WITHIN_S = 20.0


@dataclass(frozen=True, slots=True)
class Need:
    """Something that is missing, and what to do about it. Several of one remedy are told of together."""

    what: str
    remedy: str


def missing(backend: str) -> tuple[Need, ...]:
    """Everything this backend needs beyond what the processor's build does, and that is not here."""
    return _LOOK[backend]() if backend in _LOOK else ()


def _cuda() -> tuple[Need, ...]:
    found = []
    nvcc = shutil.which("nvcc")
    toolkit = "NVIDIA's compiler (nvcc, of the CUDA toolkit)"
    if nvcc is None:
        found.append(Need(f"{toolkit} in PATH", cuda_remedy()))
    elif not _has_cublas(_toolkit_of(nvcc)):
        found.append(Need(f"cuBLAS, which this CUDA toolkit ({_toolkit_of(nvcc)}) lacks", cuda_remedy()))
    if not nvidia.details():
        found.append(
            Need(
                "an NVIDIA GPU with a driver that answers",
                "`nvidia-smi` must show the GPU: install NVIDIA's driver, or choose another --backend",
            )
        )
    return tuple(found)


def _toolkit_of(nvcc: str) -> Path:
    """Where the toolkit of ``nvcc`` is: it may be a script that calls the real one, so it is asked."""
    for variable in CUDA_ELSEWHERE:
        if os.environ.get(variable):
            return Path(os.environ[variable])
    said = _run([nvcc, "--dryrun", "-x", "cu", os.devnull])
    for line in said.splitlines():
        if "TOP=" in line:
            return Path(line.partition("TOP=")[2].strip()).resolve()
    return Path(nvcc).resolve().parents[1]


def _has_cublas(toolkit: Path) -> bool:
    if sys.platform == "win32":
        return any(toolkit.glob("lib/x64/cublas.lib"))
    places = (toolkit / "lib64", toolkit / "lib", *toolkit.glob("targets/*/lib"))
    distribution = ctypes.util.find_library("cublas") is not None and toolkit in (Path("/usr"), Path("/usr/lib/cuda"))
    return distribution or any(any(place.glob("libcublas.so*")) for place in places)


_HAS = "#if !__has_include(<{}>)\n#error it is not there\n#endif\n"
# The engine makes a vk::LayerSettingEXT, which older headers do not know: found out after ten minutes of compiling.
_OLDEST_VULKAN = "1.3.272"
_VULKAN_IS_NEW = "#include <vulkan/vulkan.h>\n#ifndef VK_EXT_layer_settings\n#error too old\n#endif\n"


def _vulkan() -> tuple[Need, ...]:
    found = []
    remedy = vulkan_remedy()
    if shutil.which("glslc") is None:
        found.append(Need("glslc in PATH", remedy))
    if not _accepts(_HAS.format("vulkan/vulkan.hpp")):
        found.append(Need("the headers of Vulkan", remedy))
    elif not _accepts(_VULKAN_IS_NEW):
        found.append(Need(f"headers of Vulkan {_OLDEST_VULKAN} or newer: this system's are older", SDK))
    if not _accepts(_HAS.format("spirv/unified1/spirv.hpp")):
        found.append(Need("the headers of SPIR-V", remedy))
    if sys.platform == "linux" and "VULKAN_SDK" not in os.environ and ctypes.util.find_library("vulkan") is None:
        found.append(Need("the Vulkan loader (libvulkan)", remedy))
    return tuple(found)


def _accepts(program: str) -> bool:
    """Does the preprocessor take it? Asked of the compiler itself, which knows its places. Yes where there is none."""
    compiler = next(
        (c for c in (os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++") if shutil.which(c)), ""
    )
    if not compiler or sys.platform == "win32":
        return True  # the missing compiler is told of already; on Windows the SDK sets what CMake reads
    also = [f"-I{os.environ['VULKAN_SDK']}/include"] if os.environ.get("VULKAN_SDK") else []
    try:
        asked = subprocess.run(
            [compiler, "-std=c++17", *also, "-x", "c++", "-M", "-"],
            input=program.encode(),
            capture_output=True,
            timeout=_COMPILES_WITHIN_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return True
    return asked.returncode == 0


def _rocm() -> tuple[Need, ...]:
    found = []
    site = "https://rocm.docs.amd.com/projects/install-on-linux"
    if shutil.which("hipconfig") is None:
        found.append(Need("AMD's HIP compiler (hipconfig in PATH)", f"install ROCm with hipBLAS and rocBLAS: {site}"))
    if sys.platform == "linux" and not Path("/dev/kfd").exists():
        found.append(Need("an AMD GPU that computes (/dev/kfd)", f"install AMD's kernel driver: {site}"))
    return tuple(found)


def _sycl() -> tuple[Need, ...]:
    if shutil.which("icpx") is not None and shutil.which("icx") is not None:
        return ()
    return (
        Need(
            "Intel's compilers (icx and icpx in PATH)",
            "install Intel oneAPI, then in this shell:  source /opt/intel/oneapi/setvars.sh",
        ),
    )


def _metal() -> tuple[Need, ...]:
    return () if sys.platform == "darwin" else (Need("macOS, for Metal", "choose another --backend"),)


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, timeout=_COMPILES_WITHIN_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout + done.stderr).decode("utf-8", "replace")


_LOOK: dict[str, Callable[[], tuple[Need, ...]]] = {
    "cuda": _cuda,
    "vulkan": _vulkan,
    "rocm": _rocm,
    "sycl": _sycl,
    "metal": _metal,
}
