"""What is missing for a backend is known before a minute is spent, all of it at once, with what to type."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mesh.engine.needs import missing
from mesh.engine.toolchain import BACKENDS, find_toolchain
from mesh.errors import EngineError
from mesh.hardware import Shown, nvidia
from mesh.node.backend import choose


class Machine:
    """A PATH with the tools that are put there, on a distribution of choice."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bin = directory / "bin"
        self.bin.mkdir()
        self.monkeypatch = monkeypatch
        monkeypatch.setenv("PATH", str(self.bin))
        for name in ("CXX", "VULKAN_SDK", "CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(nvidia, "details", lambda: ())
        monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
        self.distribution("debian")

    def tool(self, name: str, script: str = "exit 0") -> Path:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def distribution(self, *family: str) -> None:
        release = {"ID": family[0], "ID_LIKE": " ".join(family[1:])}
        self.monkeypatch.setattr("platform.freedesktop_os_release", lambda: release)

    def compiler(self, *, accepts: tuple[str, ...] = ()) -> None:
        """A preprocessor that finds these headers, and settings in headers that are new enough."""
        tests = " || ".join(f'case "$program" in *"{word}"*) true;; *) false;; esac' for word in accepts) or "false"
        self.tool("c++", f'program=""; while read -r line; do program="$program$line"; done; {tests}')


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def told(backend: str) -> str:
    return "\n".join(f"{need.what}: {need.remedy}" for need in missing(backend))


def test_the_processor_needs_nothing_more(machine: Machine) -> None:
    assert missing("cpu") == ()


def test_everything_that_vulkan_lacks_is_told_at_once(machine: Machine) -> None:
    machine.compiler()
    words = told("vulkan")
    assert "glslc" in words and "headers of Vulkan" in words and "SPIR-V" in words and "loader" in words
    assert "sudo apt install glslc libvulkan-dev spirv-headers" in words


def test_headers_that_are_too_old_are_known_before_ten_minutes_of_compiling(machine: Machine) -> None:
    machine.compiler(accepts=("__has_include",))
    machine.tool("glslc")
    assert "1.3.272" in told("vulkan") and "vulkan.lunarg.com" in told("vulkan")
    machine.compiler(accepts=("__has_include", "VK_EXT_layer_settings"))
    assert "1.3.272" not in told("vulkan")


def test_cuda_names_the_compiler_or_its_library_and_the_gpu(machine: Machine, tmp_path: Path) -> None:
    assert "nvcc" in told("cuda") and "nvidia-smi" in told("cuda")
    toolkit = tmp_path / "cuda"
    (toolkit / "lib64").mkdir(parents=True)
    machine.tool("nvcc", f'echo "#$ TOP={toolkit}/bin/.." >&2')
    (toolkit / "bin").mkdir()
    assert "cuBLAS" in told("cuda") and str(toolkit) in told("cuda")
    (toolkit / "lib64" / "libcublas.so").touch()
    gpu = nvidia.Details("card", "550", "8.9", False)
    machine.monkeypatch.setattr(nvidia, "details", lambda: (gpu,))
    assert told("cuda") == ""


@pytest.mark.parametrize(
    ("family", "command"),
    [
        (("ubuntu", "debian"), "sudo apt install nvidia-cuda-toolkit"),
        (("debian",), "developer.nvidia.com/cuda-downloads"),
        (("arch",), "sudo pacman -S cuda"),
    ],
)
def test_cuda_is_installed_as_the_distribution_does(machine: Machine, family: tuple[str, ...], command: str) -> None:
    machine.distribution(*family)
    assert command in told("cuda")


def test_sycl_rocm_and_metal_name_what_they_need(machine: Machine) -> None:
    assert "setvars.sh" in told("sycl")
    assert "hipconfig" in told("rocm")
    assert "macOS" in told("metal")
    for tool in ("icx", "icpx"):
        machine.tool(tool)
    assert told("sycl") == ""


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cpu"])
def test_the_error_says_for_which_backend_and_every_remedy_once(machine: Machine, backend: str) -> None:
    with pytest.raises(EngineError, match=f"for {backend} here: missing .*C\\+\\+ compiler") as error:
        find_toolchain(backend)
    lines = (error.value.remedy or "").splitlines()
    assert "sudo apt install build-essential" in lines
    assert len(lines) == len(set(lines))


# -- which backend is worth a build ----------------------------------------------------------------------------------

NVIDIA = Shown("NVIDIA", "NVIDIA RTX 4090", ("cuda", "vulkan"), "nvidia")


@pytest.mark.parametrize(
    ("shown", "can", "backend"),
    [
        ([], {"cuda", "vulkan"}, "cpu"),
        ([NVIDIA], {"cuda", "vulkan"}, "cuda"),
        ([NVIDIA], {"vulkan"}, "vulkan"),
        ([NVIDIA], set(), "cpu"),
    ],
)
def test_a_build_without_a_wish_is_for_the_best_that_is_here(shown: list[Shown], can: set[str], backend: str) -> None:
    chosen, why = choose(shown, can.__contains__)
    assert chosen == backend
    assert bool(why) == bool(shown)
    if shown and backend == "cpu":
        assert "mesh engine build --backend cuda" in why


def test_this_systems_own_tools_are_asked_without_harm() -> None:
    for backend in BACKENDS:
        assert isinstance(missing(backend), tuple)
    assert os.environ["PATH"]
