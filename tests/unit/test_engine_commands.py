"""Layouts become the engine's arguments."""

from __future__ import annotations

from bisect import bisect_right
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.engine.cache import Engine
from mesh.engine.commands import (
    llama_server_command,
    micro_batch,
    rpc_server_command,
    split_arguments,
)
from mesh.errors import EngineError
from mesh.wire.facts import Layout, ModelCost, RingMember

ENGINE = Engine(Path("e"), "0" * 12, "cpu", Path("e/llama-server"), Path("e/ggml-rpc-server"), Path("e/llama-bench"))
SECRET = b"sixteen bytes..."
IDS = [f"{chr(ord('a') + n)}" * 26 for n in range(20)]


def layout(counts: list[int], device: str = "CPU", **changes: object) -> Layout:
    """A layout whose members carry ``counts`` layers each, host first; a host with 0 carries the ends only."""
    ring = []
    at = 0
    for n, count in enumerate(counts):
        layers = (at, at + count - 1) if count else None
        ring.append(RingMember(IDS[n], f"n{n}", layers, 1, device if n == 0 else "CPU"))
        at += count
    model = ModelCost("f" * 64, "m", "llama", 1, at, 8, 9, 4096, (1,) * at, 1, 1, (1,) * at)
    fields = {"mode": "split", "host": IDS[0], "model": model, "ring": tuple(ring), "ctx_size": 512, "parallel": 2}
    return Layout(**(fields | changes))  # type: ignore[arg-type]


def ports(n: int) -> list[str]:
    return [f"127.0.0.1:{7000 + i}" for i in range(n)]


def argument(argv: tuple[str, ...] | list[str], name: str) -> str:
    return argv[list(argv).index(name) + 1]


def dealt(argv: list[str], n_layers: int) -> list[str]:
    """Device of each layer, output last, by the engine's own arithmetic (32-bit floats, first bound above)."""
    devices = argument(argv, "-dev").split(",")
    offloaded = int(argument(argv, "-ngl"))
    shares = [np.float32(x) for x in argument(argv, "-ts").split(",")]
    sums = list(accumulate(shares))
    bounds = [np.float32(s / sums[-1]) for s in sums]
    first = n_layers + 1 - offloaded
    return [
        "CPU" if layer < first else devices[bisect_right(bounds, np.float32(layer - first) / np.float32(offloaded))]
        for layer in range(n_layers + 1)
    ]


COUNTS = st.tuples(st.integers(0, 120), st.lists(st.integers(1, 120), min_size=1, max_size=14)).map(
    lambda pair: [pair[0], *pair[1]]
)


# The engine deals every layer to the member that the layout names, whatever the rounding.
@given(COUNTS)
def test_a_cpu_host_keeps_the_first_layers_and_workers_carry_the_rest_in_ring_order(counts: list[int]) -> None:
    argv = split_arguments(layout(counts), ports(len(counts) - 1))
    expected = ["CPU"] * counts[0]
    for n, count in enumerate(counts[1:]):
        expected += [f"RPC{n}"] * count
    assert dealt(argv, sum(counts))[:-1] == expected


# The same when the host has a GPU: it is the first device, and nothing stays on the CPU but the embedding.
@given(COUNTS.filter(lambda counts: counts[0] > 0))
def test_a_gpu_host_is_the_first_device(counts: list[int]) -> None:
    argv = split_arguments(layout(counts, device="CUDA0"), ports(len(counts) - 1))
    expected = ["CUDA0"] * counts[0]
    for n, count in enumerate(counts[1:]):
        expected += [f"RPC{n}"] * count
    assert dealt(argv, sum(counts))[:-1] == expected
    assert argument(argv, "-ot") == "^output.*=CUDA0,^token_embd.*=CPU"


# Shares add up to what is offloaded: the workers' layers and the output layer.
@given(COUNTS)
def test_shares_add_up(counts: list[int]) -> None:
    argv = split_arguments(layout(counts), ports(len(counts) - 1))
    shares = [int(x) for x in argument(argv, "-ts").split(",")]
    assert sum(shares) == int(argument(argv, "-ngl")) == sum(counts[1:]) + 1


def test_the_output_layer_comes_home() -> None:
    argv = split_arguments(layout([2, 3]), ports(1))
    assert argument(argv, "-ot") == "^output.*=CPU,^token_embd.*=CPU"


def test_a_split_takes_endpoints_in_ring_order_and_keeps_the_cache_where_it_is() -> None:
    plan = layout([1, 2, 3], prompt_cache_bytes=12 << 20)
    launch = llama_server_command(ENGINE, plan, Path("m.gguf"), 8000, ports(2), threads=4, rpc_secret=SECRET)
    assert argument(launch.argv, "--rpc") == "127.0.0.1:7000,127.0.0.1:7001"
    assert argument(launch.argv, "-cram") == "12"
    assert argument(launch.argv, "-ctxcp") == "0"
    assert argument(launch.argv, "-c") == "1024"
    assert argument(launch.argv, "--host") == "127.0.0.1"
    assert launch.env == {
        "MESH_GGUF_ID": "f" * 64,
        "MESH_RPC_SECRET": SECRET.hex(),
        "MESH_RPC_RING": f"127.0.0.1:7000={IDS[1]},127.0.0.1:7001={IDS[2]}",
        "MESH_MICRO_BATCH": "64",
        "MESH_KV_ON_DEVICE": f"local={2 << 20},127.0.0.1:7000={4 << 20},127.0.0.1:7001={6 << 20}",
    }


def test_half_precision_on_the_wire_is_said_only_when_asked_for() -> None:
    command = partial(llama_server_command, ENGINE, layout([1, 2]), Path("m.gguf"), 8000, ports(1), threads=4)
    assert "MESH_RPC_WIRE_DTYPE" not in command(rpc_secret=SECRET).env
    assert command(rpc_secret=SECRET, wire_dtype="f16").env["MESH_RPC_WIRE_DTYPE"] == "f16"


def test_a_ring_with_a_gpu_computes_more_of_a_prompt_at_a_time() -> None:
    slow, fast = layout([2, 2]), layout([2, 2], device="CUDA0")
    assert micro_batch(slow) < micro_batch(fast) < micro_batch(layout([4], mode="solo", device="CUDA0"))


def test_a_machine_alone_computes_prompts_as_a_ring_does() -> None:
    assert micro_batch(layout([4], mode="solo")) == micro_batch(layout([1, 3]))


@pytest.mark.parametrize("counts", [[4], [1, 3]])
def test_without_memory_for_it_no_conversation_is_kept(counts: list[int]) -> None:
    plan = layout(counts, mode="split" if counts[1:] else "solo")
    launch = llama_server_command(
        ENGINE, plan, Path("m.gguf"), 8000, ports(len(counts) - 1), threads=4, rpc_secret=SECRET
    )
    assert argument(launch.argv, "-cram") == "0"
    assert "MESH_KV_ON_DEVICE" not in launch.env


def test_a_model_on_two_devices_of_one_machine_keeps_no_conversation() -> None:
    plan = layout([4], "CUDA0", mode="solo", prompt_cache_bytes=1 << 30)  # counted on one of them
    launch = llama_server_command(ENGINE, plan, Path("m.gguf"), 8000, threads=4, gpu_layers=2)
    assert argument(launch.argv, "-cram") == "0"


def test_solo_knows_no_rpc() -> None:
    launch = llama_server_command(ENGINE, layout([4], mode="solo"), Path("m.gguf"), 8000, threads=4, api_key="k")
    assert not {"--rpc", "-ts", "-ot"} & set(launch.argv)
    assert argument(launch.argv, "-ngl") == "0"
    assert launch.env == {"LLAMA_API_KEY": "k", "MESH_MICRO_BATCH": "64"}


def test_secrets_stay_out_of_the_process_list() -> None:
    launch = llama_server_command(
        ENGINE, layout([1, 2]), Path("m"), 8000, ports(1), threads=1, rpc_secret=SECRET, api_key="also hidden"
    )
    worker = rpc_server_command(ENGINE, 9, threads=1, model_files=[Path("m")], fingerprint="f" * 64, rpc_secret=SECRET)
    line = " ".join(launch.argv + worker.argv)
    assert "also hidden" not in line
    assert SECRET.hex() not in line


def test_a_worker_may_read_its_shards_in_order_and_binds_loopback() -> None:
    files = [Path("m-00001-of-00002.gguf"), Path("m-00002-of-00002.gguf")]
    launch = rpc_server_command(ENGINE, 9, threads=3, model_files=files, fingerprint="f" * 64, rpc_secret=SECRET)
    given_files = [launch.argv[i + 1] for i, word in enumerate(launch.argv) if word == "--gguf"]
    assert given_files == [str(file) for file in files]
    assert argument(launch.argv, "-H") == "127.0.0.1"


@pytest.mark.parametrize(
    "ring",
    [
        [(0, 1), (3, 4)],  # a layer missing
        [(0, 2), (2, 4)],  # a layer twice
        [(1, 2), (3, 4)],  # the first missing
        [(0, 2), (3, 3)],  # the last missing
        [(0, 4), None],  # a worker without work
    ],
)
def test_a_layout_that_does_not_carry_each_layer_once_is_refused(ring: list[tuple[int, int] | None]) -> None:
    members = tuple(RingMember(IDS[n], "n", layers, 1, "CPU") for n, layers in enumerate(ring))
    with pytest.raises(EngineError):
        llama_server_command(ENGINE, layout([2, 3], ring=members), Path("m"), 8000, ports(1), threads=1)


def test_more_devices_than_the_engine_takes_are_refused() -> None:
    with pytest.raises(EngineError, match="16 devices"):
        split_arguments(layout([1] * 17), ports(16))


def test_a_server_is_never_started_without_a_secret() -> None:
    with pytest.raises(EngineError, match="16 to 64"):
        rpc_server_command(ENGINE, 9, threads=1, model_files=[], fingerprint="f" * 64, rpc_secret=b"")
    with pytest.raises(EngineError, match="16 to 64"):
        llama_server_command(ENGINE, layout([1, 2]), Path("m"), 8000, ports(1), threads=1)
