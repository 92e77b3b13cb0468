"""GPUs and power as tools and drivers tell of them, on recorded and made-up answers.

No such machine was at hand: the answers are written from the formats that the makers document (the module that reads
them says where). Whatever else a tool prints must be no device, and no exception.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import hardware
from mesh.hardware import amd, apple, intel, nvidia
from mesh.hardware.android import is_android
from mesh.hardware.ask import ask, read_json, whole
from mesh.hardware.power_supply import Power, from_pmset, power, warnings
from mesh.hardware.sysfs import cards, shown
from tests.unit.test_hardware_devices import Nvml, NVMLError

GIB = 1 << 30


def says(text: str) -> Callable[[Sequence[str]], str]:
    return lambda command: text


class Card:
    """One graphics card in a made-up ``/sys``."""

    def __init__(self, root: Path, number: int, vendor: str, address: str, **files: str) -> None:
        device = root / "devices" / address
        device.mkdir(parents=True)
        (root / "drm" / f"card{number}").mkdir(parents=True)
        (root / "drm" / f"card{number}" / "device").symlink_to(device)
        for name, text in {"vendor": vendor, "device": "0x744c", "class": "0x030000", **files}.items():
            (device / name).write_text(f"{text}\n")


@pytest.fixture(autouse=True)
def everything_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


# -- AMD -----------------------------------------------------------------------------------------------------------


def test_amd_gpus_are_counted_in_the_order_of_their_addresses(tmp_path: Path) -> None:
    Card(tmp_path, 0, "0x1002", "0000:43:00.0", mem_info_vram_total=str(24 * GIB), mem_info_vram_used=str(GIB))
    Card(tmp_path, 1, "0x1002", "0000:03:00.0", mem_info_vram_total=str(16 * GIB), mem_info_vram_used="0",
         product_name="AMD Radeon PRO W7800")  # fmt: skip
    Card(tmp_path, 2, "0x10de", "0000:01:00.0")
    (tmp_path / "drm" / "card0-DP-1").mkdir()
    first, second = amd.devices(tmp_path / "drm")
    assert (first.name, first.kind, first.description) == ("ROCm0", "rocm", "AMD Radeon PRO W7800")
    assert (second.name, second.total_bytes, second.free_bytes) == ("ROCm1", 24 * GIB, 23 * GIB)


def test_an_integrated_amd_gpu_holds_no_layers(tmp_path: Path) -> None:
    Card(tmp_path, 0, "0x1002", "0000:03:00.0", mem_info_vram_total=str(GIB // 2), mem_info_vram_used="0")
    assert amd.devices(tmp_path / "drm") == ()


def test_where_the_kernels_files_are_not_seen_rocm_smi_is_asked(tmp_path: Path) -> None:
    said = "WARNING: AMD GPU device(s) is/are in a low-power state\n" + json.dumps(
        {
            "card1": {"VRAM Total Memory (B)": str(16 * GIB), "VRAM Total Used Memory (B)": "0", "Card Series": "b"},
            "card0": {"VRAM Total Memory (B)": str(24 * GIB), "VRAM Total Used Memory (B)": str(GIB),
                      "Card series": "Radeon RX 7900 XTX"},
            "system": {"Driver version": "6.7.0"},
        }
    )  # fmt: skip
    first, second = amd.devices(tmp_path, says(said))
    assert (first.name, first.description, first.free_bytes) == ("ROCm0", "Radeon RX 7900 XTX", 23 * GIB)
    assert second.total_bytes == 16 * GIB


def test_hidden_amd_gpus_stay_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        Card(tmp_path, number, "0x1002", f"0000:0{number}:00.0", mem_info_vram_total=str((number + 8) * GIB))
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "1")
    assert [d.total_bytes // GIB for d in amd.devices(tmp_path / "drm")] == [9]
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "-1")
    assert amd.devices(tmp_path / "drm") == ()


# -- Intel ---------------------------------------------------------------------------------------------------------


def test_intel_gpus_with_memory_of_their_own_are_devices() -> None:
    def tool(command: Sequence[str]) -> str:
        if "-d" not in command:
            return json.dumps({"device_list": [{"device_id": 0, "device_name": "Intel(R) Arc(TM) A770 Graphics"}]})
        return json.dumps(
            {
                "device_id": 0,
                "device_name": "Intel(R) Arc(TM) A770 Graphics",
                "memory_physical_size_byte": str(16 * GIB),
                "memory_free_size_byte": str(15 * GIB),
            }
        )

    (device,) = intel.devices(tool)
    assert (device.name, device.kind, device.free_bytes) == ("SYCL0", "sycl", 15 * GIB)
    assert "A770" in device.description


def test_an_intel_gpu_without_memory_of_its_own_is_none() -> None:
    assert intel.devices(says(json.dumps({"device_list": [{"device_id": 0, "device_name": "UHD 770"}]}))) == ()


# -- NVIDIA --------------------------------------------------------------------------------------------------------


class Parted(Nvml):
    """A first GPU in MIG mode, with one instance in its second place."""

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"550.54.15"

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return 9, 0

    def nvmlDeviceGetMigMode(self, handle: int) -> tuple[int, int]:
        if handle == 1:
            raise NVMLError("Not Supported")
        return 1, 1

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: int) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: int, place: int) -> str:
        if place != 1:
            raise NVMLError("Not Found")
        return "instance"

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:
        return (
            SimpleNamespace(total=20 * GIB, free=19 * GIB)
            if handle == "instance"
            else super().nvmlDeviceGetMemoryInfo(handle)
        )

    def nvmlDeviceGetName(self, handle: Any) -> bytes | str:
        return "NVIDIA H100 MIG 2g.20gb" if handle == "instance" else super().nvmlDeviceGetName(handle)

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        return "MIG-cccc-3" if handle == "instance" else super().nvmlDeviceGetUUID(handle)


def test_of_a_parted_gpu_the_first_instance_is_the_device() -> None:
    (device,) = nvidia.devices(Parted)
    assert (device.name, device.description, device.free_bytes) == ("CUDA0", "NVIDIA H100 MIG 2g.20gb", 19 * GIB)


@pytest.mark.parametrize(
    ("visible", "names"), [("MIG-cccc", ["NVIDIA H100 MIG 2g.20gb"]), ("1", ["NVIDIA RTX A5000"]), ("0", [])]
)
def test_a_parted_gpu_is_none_by_itself(monkeypatch: pytest.MonkeyPatch, visible: str, names: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [d.description for d in nvidia.devices(Parted)] == names


def test_driver_and_capability_of_every_gpu_are_told() -> None:
    first, second = nvidia.details(Parted)
    assert (first.driver, first.capability, first.parted, second.parted) == ("550.54.15", "9.0", True, False)
    assert nvidia.details(lambda: 1 / 0) == ()


# -- what the system shows -----------------------------------------------------------------------------------------


def test_gpus_on_the_bus_are_shown_with_the_driver_they_have(tmp_path: Path) -> None:
    for address, vendor, kind, driver in (
        ("0000:01:00.0", "0x10de", "0x030000", "nouveau"),
        ("0000:02:00.0", "0x10de", "0x030200", ""),
        ("0000:00:02.0", "0x8086", "0x030000", "i915"),
        ("0000:00:1f.3", "0x8086", "0x040300", "snd_hda_intel"),
        ("0000:05:00.0", "0x1234", "0x030000", "bochs-drm"),
    ):
        place = tmp_path / "pci" / address
        place.mkdir(parents=True)
        for name, text in {"vendor": vendor, "class": kind, "device": "0x2684"}.items():
            (place / name).write_text(text)
        if driver:
            (tmp_path / "drivers" / driver).mkdir(parents=True)
            (place / "driver").symlink_to(tmp_path / "drivers" / driver)
    found = shown(tmp_path / "pci")
    assert [(gpu.vendor, gpu.driver) for gpu in found] == [("Intel", "i915"), ("NVIDIA", "nouveau"), ("NVIDIA", "")]
    assert found[1].backends[0] == "cuda"


def test_without_a_bus_nothing_is_shown(tmp_path: Path) -> None:
    assert shown(tmp_path / "none") == () and cards(tmp_path / "none") == []


# -- Apple, Android, power -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chip", "gigabytes"),
    [
        ("Apple M1", 68),
        ("Apple M2 Max", 400),
        ("Apple M3 Ultra", 819),
        ("Apple M9", 0),
        ("Intel(R) Core(TM) i7", 0),
        ("", 0),
    ],
)
def test_the_maker_promises_a_bandwidth_for_each_tier(chip: str, gigabytes: int) -> None:
    assert apple.memory_bandwidth(chip) == gigabytes * 10**9


@given(st.integers(1 << 30, 1 << 40), st.integers(0, 1 << 21), st.integers(0, 1 << 40))
def test_an_apple_gpu_never_gets_more_than_the_system_gives_it(memory: int, limit_mb: int, available: int) -> None:
    """Whatever is set and free: at most the limit, at most the machine, at most what is free."""
    (gpu,) = apple._gpu({"hw.memsize": str(memory), "iogpu.wired_limit_mb": str(limit_mb)}, available)
    assert gpu.free_bytes <= min(gpu.total_bytes, available)
    assert gpu.total_bytes <= (min(limit_mb << 20, memory) if limit_mb else memory * 3 // 4)


def test_a_phone_is_recognised() -> None:
    assert is_android({"TERMUX_VERSION": "0.118.0"}, "linux")
    assert is_android({"PREFIX": "/data/data/com.termux/files/usr"}, "linux")
    assert is_android({}, "android")
    assert not is_android({"PREFIX": "/usr"}, "linux") and not is_android({}, "darwin")


def test_a_phone_lends_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=8 * GIB, available=3 * GIB))
    monkeypatch.setenv("TERMUX_VERSION", "0.118.0")
    device = hardware.devices()[-1]
    assert device.free_bytes <= 3 * GIB // 2 and "Android" in device.description


BATTERY = (
    "Now drawing from 'Battery Power'\n"
    " -InternalBattery-0 (id=4522083)\t73%; discharging; 4:10 remaining present: true\n"
)


@pytest.mark.parametrize(
    ("source", "settings", "state"),
    [
        (BATTERY, " lowpowermode         1\n hibernatemode        3\n", Power(True, 73, True)),
        ("Now drawing from 'AC Power'\n -InternalBattery-0\t100%; charged;\n", " lowpowermode 0\n", Power(False, 100)),
        ("Now drawing from 'AC Power'\n", "", Power(False, None)),
        ("", "", Power()),
    ],
)
def test_a_mac_says_what_it_runs_on(source: str, settings: str, state: Power) -> None:
    assert from_pmset(source, settings) == state


def test_a_laptop_on_battery_is_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    battery = SimpleNamespace(percent=41.7, power_plugged=False)
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    (tmp_path / "platform_profile").write_text("low-power\n")
    state = power(profile=tmp_path / "platform_profile")
    assert state == Power(True, 42, True)
    assert ["42% left" in said or "save power" in said for said in warnings(state)] == [True, True]
    battery.power_plugged = True
    assert warnings(power(profile=tmp_path / "none")) == []


def test_a_driver_that_confuses_psutil_is_no_battery(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def confused() -> None:
        raise ValueError("invalid literal for int()")

    monkeypatch.setattr(psutil, "sensors_battery", confused, raising=False)
    assert power(says(""), tmp_path / "none") == Power()


# -- tools ---------------------------------------------------------------------------------------------------------


def test_a_tool_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "rocm-smi"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setattr("mesh.hardware.ask.TOOL_WITHIN_S", 0.2)
    assert ask([str(tool)]) == ""
    assert ask([str(tmp_path / "none")]) == ""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["device_list", "device_id", "memory_physical_size_byte", "card0", "card1", "Card Series",
                         "VRAM Total Memory (B)", "VRAM Total Used Memory (B)", "device_name"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(JSON.map(json.dumps) | st.text(max_size=200))
def test_whatever_a_tool_prints_no_source_raises(said: str) -> None:
    """A device has bytes within bounds, or there is none."""
    for found in (amd.devices(Path("/nowhere"), says(said)), intel.devices(says(said))):
        for device in found:
            assert 0 <= device.free_bytes <= device.total_bytes < 1 << 62
    read_json(said)
    from_pmset(said, said)
    assert len(apple._gpu(apple._sysctl(lambda name: said), 1 << 30)) <= 1


@pytest.mark.parametrize(
    ("value", "count"),
    [("17", 17), (17, 17), (True, 0), (-1, 0), ("1e9", 0), ("٣", 0), (None, 0), (1 << 70, 0), ("9" * 40, 0)],
)
def test_only_a_whole_number_of_bytes_is_one(value: Any, count: int) -> None:
    assert whole(value) == count
