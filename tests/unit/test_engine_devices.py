"""The engine's own list of devices, held to what the system shows; and where it says that it put its weights."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.engine.cache import Engine
from mesh.engine.devices import list_devices, read_devices, unused, usable
from mesh.engine.placement import Placement
from mesh.errors import EngineError
from mesh.hardware import Shown
from mesh.wire.facts import Device

GIB = 1 << 30
MIB = 1 << 20
# As the engine prints it; the first is recorded, the second in the same format.
NONE = "Available devices:\n  (none)\n"
TWO = (
    "ggml_cuda_init: found 2 CUDA devices:\n"
    "Available devices:\n"
    "  CUDA0: NVIDIA GeForce RTX 4090 (24080 MiB, 23600 MiB free)\n"
    "  CUDA1: NVIDIA RTX A5000 (24247 MiB, 24000 MiB free)\n"
)
CPU = Device("CPU", "cpu", "processor", 32 * GIB, 20 * GIB)


def engine_that(directory: Path, script: str, backend: str = "cuda") -> Engine:
    server = directory / "llama-server"
    server.write_text(f"#!/bin/sh\n{script}\n")
    server.chmod(server.stat().st_mode | stat.S_IXUSR)
    return Engine(directory, "pin", backend, server, server, server)


def test_the_list_is_read_line_by_line() -> None:
    first, second = read_devices(TWO, "cuda")
    assert (first.name, first.kind, first.description) == ("CUDA0", "cuda", "NVIDIA GeForce RTX 4090")
    assert (second.total_bytes, second.free_bytes) == (24247 * MIB, 24000 * MIB)
    assert read_devices(NONE, "cuda") == ()


@pytest.mark.parametrize(
    "line",
    [
        "  Vulkan0: AMD Radeon (RADV NAVI31) (24560 MiB, 24000 MiB free)",
        "  MTL0: Apple M2 (10922 MiB, 10922 MiB free)",
        "  SYCL0: Intel(R) Arc(TM) A770 Graphics (15473 MiB, 15000 MiB free)",
        "  ROCm0: Radeon RX 7900 XTX (24560 MiB, 24000 MiB free)\r",
    ],
)
def test_names_and_parentheses_of_every_backend_are_understood(line: str) -> None:
    (device,) = read_devices(line, "vulkan")
    assert device.total_bytes > 10 * GIB and not device.description.endswith("(")


@given(st.text())
def test_whatever_is_printed_a_list_comes_of_it(said: str) -> None:
    """No line raises, and a device's free bytes are within its total."""
    assert all(d.free_bytes <= d.total_bytes for d in read_devices(said, "cuda"))


def test_an_engine_is_asked_and_answers(tmp_path: Path) -> None:
    (tmp_path / "said").write_text(TWO)
    assert len(list_devices(engine_that(tmp_path, f'[ "$1" = --list-devices ] && cat {tmp_path}/said'))) == 2


def test_an_engine_that_does_not_run_here_says_so_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot open shared object") as error:
        list_devices(engine_that(tmp_path, "echo libcuda.so.1: cannot open shared object file >&2; exit 127"))
    assert f"rm -r {tmp_path}" in str(error.value.remedy)
    (tmp_path / "llama-server").write_bytes(b"\x7fELF not really")
    with pytest.raises(EngineError, match="cannot be run"):
        list_devices(Engine(tmp_path, "pin", "cuda", *[tmp_path / "llama-server"] * 3))


def test_an_engine_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.engine.devices.LIST_WITHIN_S", 0.2)
    began = time.monotonic()
    with pytest.raises(EngineError, match="did not list"):
        list_devices(engine_that(tmp_path, "exec sleep 60"))
    assert time.monotonic() - began < 5


# -- the last word ---------------------------------------------------------------------------------------------------


def test_the_engines_list_is_the_last_word_and_the_system_knows_what_is_free() -> None:
    listed = read_devices(TWO, "cuda")
    system = (
        Device("CUDA0", "cuda", "NVIDIA GeForce RTX 4090", 24080 * MIB, 9 * GIB),
        Device("CUDA2", "cuda", "one that the engine does not list", 80 * GIB, 80 * GIB),
        CPU,
    )
    first, second = usable(listed, system, "cuda")
    assert (first.name, first.free_bytes) == ("CUDA0", 9 * GIB)
    assert second == listed[1]


def test_a_device_of_another_size_under_the_same_name_is_another_device() -> None:
    listed = read_devices(TWO, "cuda")
    (first, _) = usable(listed, (Device("CUDA0", "cuda", "other", 8 * GIB, 8 * GIB), CPU), "cuda")
    assert first == listed[0]


def test_an_engine_without_a_device_computes_on_the_processor() -> None:
    gpu = Device("CUDA0", "cuda", "card", 8 * GIB, 8 * GIB)
    assert usable((), (gpu, CPU), "cuda") == (CPU,)
    assert usable((gpu,), (gpu, CPU), "cpu") == (CPU,)


NVIDIA = Shown("NVIDIA", "NVIDIA GPU 0x2684 at 0000:01:00.0", ("cuda", "vulkan"), "nvidia")


@pytest.mark.parametrize(
    ("gpu", "backend", "words"),
    [
        (NVIDIA, "cpu", "mesh engine build --backend cuda"),
        (NVIDIA, "cuda", "`nvidia-smi` must show the GPU"),
        (Shown("NVIDIA", "NVIDIA GPU", ("cuda", "vulkan"), "nouveau"), "cpu", "install NVIDIA's driver"),
        (Shown("AMD", "AMD GPU", ("rocm", "vulkan"), "amdgpu"), "cpu", "mesh engine build --backend rocm"),
        (Shown("AMD", "AMD GPU", ("rocm", "vulkan"), "amdgpu"), "vulkan", "usermod -aG render"),
        (Shown("Intel", "Intel GPU", ("sycl", "vulkan"), "i915"), "cuda", "mesh engine build --backend sycl"),
    ],
)
def test_a_gpu_that_the_engine_cannot_use_is_told_with_a_remedy(gpu: Shown, backend: str, words: str) -> None:
    (idle,) = unused([gpu], (), backend)
    assert gpu.description in idle.text
    assert words in idle.remedy


def test_a_gpu_that_is_used_or_was_refused_is_not_told_of() -> None:
    assert unused([NVIDIA], read_devices(TWO, "cuda"), "cuda") == ()
    assert unused([NVIDIA], (), "cpu", forced=True) == ()


# -- where the weights are -------------------------------------------------------------------------------------------

# Recorded: a host with a part of the ring, verbosity 4.
SOLO = """0.00.183.286 I load_tensors: offloading 12 repeating layers to GPU
0.00.183.307 I load_tensors: offloaded 13/13 layers to GPU
0.00.183.334 I load_tensors:   CPU_Mapped model buffer size =     8.30 MiB
0.00.183.335 I load_tensors:      Vulkan0 model buffer size =    28.58 MiB
0.00.184.246 I llama_context:        CPU  output buffer size =     0.49 MiB
"""


def read(text: str) -> Placement:
    placement = Placement()
    for line in text.splitlines():
        placement.read(line)
    return placement


def test_weights_are_where_the_engine_says() -> None:
    placement = read(SOLO)
    assert placement.devices == {"CPU": 8.30, "Vulkan0": 28.58}
    assert placement.offloaded == 13
    assert placement.instead_of("Vulkan0") == ""
    assert str(placement) == "CPU (8 MiB), Vulkan0 (29 MiB)"


def test_a_silent_fall_back_to_the_processor_is_seen() -> None:
    placement = read(SOLO.replace("Vulkan0", "CPU_REPACK").replace("offloaded 13", "offloaded 0"))
    assert placement.instead_of("CUDA0") == "CPU"
    assert placement.offloaded == 0


def test_what_workers_hold_is_theirs() -> None:
    placement = read(
        "load_tensors: RPC0[127.0.0.1:4242] model buffer size =    20.00 MiB\n"
        "load_tensors:          CPU model buffer size =     9.00 MiB\n"
        "load_tensors:    CUDA_Host model buffer size =     1.00 MiB\n"
    )
    assert placement.devices == {"CPU": 10.0}


def test_a_workers_server_names_its_device() -> None:
    placement = read("Devices:\n  CUDA0: NVIDIA GeForce RTX 4090 (24080 MiB, 23600 MiB free)\n  transport      : TCP\n")
    assert placement.instead_of("CUDA0") == ""
    assert placement.instead_of("CUDA1") == "CUDA0"


def test_an_engine_that_tells_nothing_accuses_nobody() -> None:
    assert Placement().instead_of("CUDA0") == ""


@given(st.text())
def test_no_line_of_output_raises(line: str) -> None:
    """Whatever it prints, the output of a process is read on."""
    Placement().read(line)
