"""Devices as the machine shows them, on made-up machines."""

from __future__ import annotations

import builtins
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mesh import hardware
from mesh.hardware import apple, cpu, nvidia
from mesh.hardware.cgroup import Limits, limits
from mesh.hardware.fake import FakeHardware

GIB = 1 << 30


class NVMLError(Exception):
    pass


class Nvml:
    """The part of NVML that is asked, with two GPUs."""

    NVMLError = NVMLError

    def __init__(self, *, broken: tuple[int, ...] = ()) -> None:
        self.broken = broken
        self.open = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index in self.broken:
            raise NVMLError("GPU is lost")
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(total=24 * GIB, free=(20 + handle) * GIB)

    def nvmlDeviceGetName(self, handle: int) -> bytes | str:
        return b"NVIDIA GeForce RTX 4090" if handle == 0 else "NVIDIA RTX A5000"

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return ["GPU-aaaa-1", "GPU-bbbb-2"][handle]


@pytest.fixture(autouse=True)
def all_gpus_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_this_machine_has_memory_and_a_thread() -> None:
    found = hardware.devices()
    assert found[-1].name == "CPU"
    assert 0 < found[-1].free_bytes <= found[-1].total_bytes
    assert hardware.threads() >= 1


def test_every_nvidia_gpu_is_a_device() -> None:
    nvml = Nvml()
    first, second = nvidia.devices(lambda: nvml)
    assert (first.name, first.kind, first.description) == ("CUDA0", "cuda", "NVIDIA GeForce RTX 4090")
    assert (second.total_bytes, second.free_bytes) == (24 * GIB, 21 * GIB)
    assert nvml.open == 0


def test_without_a_driver_there_is_no_nvidia_gpu() -> None:
    def load() -> Any:
        raise NVMLError("Driver Not Loaded")

    assert nvidia.devices(load) == ()


def test_without_the_library_there_is_no_nvidia_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "pynvml":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    assert nvidia.devices() == ()


def test_a_lost_gpu_does_not_hide_the_other() -> None:
    assert [d.name for d in nvidia.devices(lambda: Nvml(broken=(0,)))] == ["CUDA1"]


@pytest.mark.parametrize(
    ("visible", "free"),
    [("1", [21]), ("1,0", [21, 20]), ("", []), ("-1", []), ("0,9,1", [20]), ("GPU-bbbb", [21])],
)
def test_hidden_gpus_stay_hidden(monkeypatch: pytest.MonkeyPatch, visible: str, free: list[int]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = nvidia.devices(Nvml)
    assert [d.free_bytes // GIB for d in found] == free
    assert [d.name for d in found] == [f"CUDA{n}" for n in range(len(free))]


def test_apple_gpu_gets_what_the_system_recommends() -> None:
    # Recorded: MacBook Air M2, 16 GB; nobody has set a limit.
    answers = {"hw.memsize": "17179869184", "iogpu.wired_limit_mb": "0", "machdep.cpu.brand_string": "Apple M2"}
    (gpu,) = apple._gpu(answers, 14 * GIB)
    assert (gpu.name, gpu.kind, gpu.description) == ("MTL0", "metal", "Apple M2")
    assert gpu.total_bytes == 17179869184 * 2 // 3
    assert gpu.free_bytes == gpu.total_bytes


def test_apple_gpu_follows_a_limit_that_was_set_and_what_is_free() -> None:
    answers = {"hw.memsize": str(64 * GIB), "iogpu.wired_limit_mb": "57344"}
    (gpu,) = apple._gpu(answers, 30 * GIB)
    assert (gpu.total_bytes, gpu.free_bytes) == (56 * GIB, 30 * GIB)


def test_a_large_apple_machine_gives_three_quarters() -> None:
    (gpu,) = apple._gpu({"hw.memsize": str(64 * GIB)}, 64 * GIB)
    assert gpu.total_bytes == 48 * GIB


def test_apple_answers_that_make_no_sense_are_no_device() -> None:
    assert apple._gpu(apple._sysctl(lambda name: "sysctl: unknown oid"), 1 << 30) == ()


@pytest.mark.skipif(apple._is_apple_silicon(), reason="this is one")
def test_elsewhere_there_is_no_apple_gpu() -> None:
    assert apple.devices() == ()
    assert apple.fast_cores() == 0


@pytest.mark.parametrize(
    ("affinity", "physical", "quota", "threads"),
    [(8, 4, None, 4), (2, 4, None, 2), (8, None, None, 8), (8, 8, 2.5, 2), (8, 8, 0.5, 1), (1, 0, None, 1)],
)
def test_threads_are_the_cores_that_may_really_be_used(
    affinity: int, physical: int | None, quota: float | None, threads: int
) -> None:
    assert cpu._cores(affinity, physical, quota) == threads


def test_a_container_limits_total_and_free() -> None:
    device = cpu._device(16 * GIB, 12 * GIB, Limits(4 * GIB, 1 * GIB), "processor")
    assert (device.total_bytes, device.free_bytes) == (4 * GIB, GIB)
    assert "container" in device.description


def test_the_machine_limits_what_a_container_promises() -> None:
    device = cpu._device(16 * GIB, 2 * GIB, Limits(32 * GIB, 30 * GIB), "processor")
    assert (device.total_bytes, device.free_bytes) == (16 * GIB, 2 * GIB)


class Tree:
    """A made-up /proc/self and cgroup file system."""

    def __init__(self, directory: Path) -> None:
        self.proc = directory / "proc"
        self.mount = directory / "cgroup"
        self.proc.mkdir()

    def write(self, path: str, text: str) -> None:
        place = self.mount / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)

    def second(self, group: str, root: str = "/") -> None:
        (self.proc / "cgroup").write_text(f"0::{group}\n")
        (self.proc / "mountinfo").write_text(f"41 31 0:38 {root} {self.mount} rw,relatime - cgroup2 cgroup2 rw\n")

    def first(self, group: str, root: str = "/") -> None:
        (self.proc / "cgroup").write_text(f"4:memory:{group}\n3:cpu,cpuacct:{group}\n0::/\n")
        (self.proc / "mountinfo").write_text(
            "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
            f"35 31 0:32 {root} {self.mount}/memory rw,relatime - cgroup cgroup rw,memory\n"
            f"32 31 0:29 {root} {self.mount}/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
        )


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_second_generation_limits_count_on_every_level(tree: Tree) -> None:
    tree.second("/user.slice/app.scope")
    tree.write("user.slice/memory.max", str(2 * GIB))
    tree.write("user.slice/memory.current", str(1 * GIB))
    tree.write("user.slice/memory.stat", f"anon 5\ninactive_file {GIB // 2}\n")
    tree.write("user.slice/app.scope/memory.max", "max\n")
    tree.write("user.slice/app.scope/cpu.max", "150000 100000\n")
    assert limits(tree.proc) == Limits(2 * GIB, 2 * GIB - GIB // 2, 1.5)


def test_first_generation_limits_are_read_too(tree: Tree) -> None:
    tree.first("/docker/abc")
    tree.write("memory/docker/abc/memory.limit_in_bytes", str(GIB))
    tree.write("memory/docker/abc/memory.usage_in_bytes", str(GIB // 4))
    tree.write("memory/docker/abc/memory.stat", f"inactive_file 7\ntotal_inactive_file {GIB // 8}\n")
    tree.write("cpu/docker/abc/cpu.cfs_quota_us", "200000\n")
    tree.write("cpu/docker/abc/cpu.cfs_period_us", "100000\n")
    assert limits(tree.proc) == Limits(GIB, GIB - GIB // 8, 2.0)


def test_no_limit_is_no_limit(tree: Tree) -> None:
    tree.first("/")
    tree.write("memory/memory.limit_in_bytes", "9223372036854771712\n")
    tree.write("cpu/cpu.cfs_quota_us", "-1\n")
    tree.write("cpu/cpu.cfs_period_us", "100000\n")
    assert limits(tree.proc) == Limits()


def test_inside_a_container_the_mount_is_the_group(tree: Tree) -> None:
    tree.second("/docker/abc", root="/docker/other")
    tree.write("memory.max", str(GIB))
    tree.write("memory.current", "0")
    assert limits(tree.proc).memory_bytes == GIB


def test_without_control_groups_nothing_is_limited(tmp_path: Path) -> None:
    assert limits(tmp_path) == Limits()


def test_a_full_container_has_nothing_free(tree: Tree) -> None:
    tree.second("/")
    tree.write("memory.max", str(GIB))
    tree.write("memory.current", str(2 * GIB))
    assert limits(tree.proc).free_bytes == 0


def test_the_fake_answers_like_the_real_thing() -> None:
    fake = FakeHardware(5 * GIB, threads=3)
    assert (fake.devices()[0].free_bytes, fake.threads()) == (5 * GIB, 3)
