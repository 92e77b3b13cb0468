"""How fast devices are: found once, kept, and told."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from mesh.engine import speed
from mesh.engine.cache import Engine, find_engine
from mesh.engine.speed import Measured, measure, recall, remember, speed_key
from mesh.errors import EngineError
from mesh.models.gguf import inspect
from mesh.wire.facts import Device, weight_family

CPU = Device("CPU", "cpu", "a processor", 8 << 30, 4 << 30)
ENGINE = Engine(Path("e"), "pin", "cpu", Path("e/s"), Path("e/r"), Path("e/none"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "cache_root", lambda: tmp_path / "engine")


def test_what_was_found_is_found_again() -> None:
    key = speed_key(ENGINE, CPU, 4, None)
    assert recall(key) == Measured()
    remember(key, Measured({"Q8_0": 3e10}, 4.0))
    assert recall(key) == Measured({"Q8_0": 3e10}, 4.0)


@pytest.mark.parametrize("threads_and_cpus", [(2, None), (4, 1.5)])
def test_other_threads_or_less_time_are_another_machine(threads_and_cpus: tuple[int, float | None]) -> None:
    assert speed_key(ENGINE, CPU, *threads_and_cpus) != speed_key(ENGINE, CPU, 4, None)


def test_a_record_that_makes_no_sense_is_none(tmp_path: Path) -> None:
    key = speed_key(ENGINE, CPU, 4, None)
    remember(key, Measured({"Q8_0": 3e10}, 4.0))
    (record,) = (tmp_path / "speed").iterdir()
    for text in ("", "[]", '{"speeds": 3, "layer_us": 1}', '{"speeds": {"Q8_0": "x"}, "layer_us": 1}'):
        record.write_text(text)
        assert recall(key) == Measured()


@pytest.mark.parametrize(
    ("weights", "family"),
    [
        *[
            ("Q8_0", "Q8_0"),
            ("Q6_K", "Q8_0"),
            ("Q4_K", "Q4_K"),
            ("Q5_K", "Q4_K"),
            ("IQ2_XXS", "Q4_K"),
            ("MXFP4", "Q4_K"),
        ],
        *[("F16", "F16"), ("BF16", "F16"), ("F32", "F16"), ("", "F16")],
    ],
)
def test_types_belong_to_families(weights: str, family: str) -> None:
    assert weight_family(weights) == family


@pytest.mark.parametrize("family", speed.FAMILIES)
def test_the_models_are_models(tmp_path: Path, family: str) -> None:
    path = tmp_path / "m.gguf"
    speed._write_model(path, family, 256, 512, 3)
    file = inspect(path)
    assert (file.n_layers, file.weights) == (3, family)
    assert file.layer_bytes[0] - 2 * 4 * 256 == speed._layer_bytes(256, 512, family)


def test_after_a_failure_nobody_tries_for_an_hour() -> None:
    key = speed_key(ENGINE, CPU, 4, None)
    now = time.time()
    assert not speed.gave_up(key, now)
    speed.give_up(key)
    assert speed.gave_up(key, now)
    assert not speed.gave_up(key, now + speed.AGAIN_S + 5)


async def test_a_benchmark_that_is_not_there_is_an_error_with_a_remedy() -> None:
    with pytest.raises(EngineError, match="cannot run") as raised:
        await measure(ENGINE, CPU, 1, "Q8_0", Measured())
    assert raised.value.remedy == "mesh engine build"


@pytest.mark.engine
async def test_the_engine_tells_how_fast_it_is() -> None:
    engine = find_engine()
    if engine is None:
        pytest.skip("the engine is not built: bin/mesh engine build")
    found = await measure(engine, CPU, 1, "Q8_0", Measured())
    again = await measure(engine, CPU, 1, "F16", found)
    assert set(again.speeds) == {"Q8_0", "Q8_0 alone", "F16", "F16 alone"}
    assert all(1e8 < each < 1e12 for each in again.speeds.values())
    assert again.layer_us == found.layer_us
    assert found.layer_us is not None and 0.1 < found.layer_us < 5000
    device = found.on(CPU)
    assert device.bytes_per_second == device.speeds[0].bytes_per_second > 0
