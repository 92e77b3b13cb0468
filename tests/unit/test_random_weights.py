"""Random blocks are blocks of their kind: the format's own reader finds the values that were meant."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from bench.noise import F16, Q4_K, Q8_0, Kind, random_matrix


def values(kind: Kind, name: str = "a.weight") -> np.ndarray:
    tensor = random_matrix(name, (256, 512), kind, 2.0)
    data = b"".join(tensor.data())
    assert len(data) == tensor.n_bytes
    rows = np.frombuffer(data, np.float16 if kind is F16 else np.uint8).reshape(512, -1)
    return np.asarray(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(kind.number)), np.float32)


@pytest.mark.parametrize("kind", [F16, Q8_0, Q4_K], ids=lambda kind: kind.name)
def test_rows_have_the_length_that_was_asked_for(kind: Kind) -> None:
    found = values(kind)
    assert found.shape == (512, 256)
    assert np.linalg.norm(found, axis=1).mean() == pytest.approx(2.0, rel=0.05)
    assert abs(found.mean()) < 0.01
    # No value stands for many others.
    assert len(np.unique(found)) > 200


def test_a_name_is_a_seed() -> None:
    assert np.array_equal(values(Q4_K), values(Q4_K))
    assert not np.array_equal(values(Q4_K), values(Q4_K, "b.weight"))
