"""A layout as the engine's command lines. Pure: paths, numbers and a layout in, arguments and variables out.

The ring starts and ends on the host. A CPU host keeps its layers in its own process, without a server between; a GPU of
the host is the first of the devices. The output layer counts as one more layer of the last device for the engine's
arithmetic, and is then called home by name, so that 1 KB of activations comes back per token and not the logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

from mesh.engine.cache import Engine
from mesh.errors import EngineError
from mesh.wire.facts import Layout, NodeId, RingMember

LOOPBACK = "127.0.0.1"
_CPU_MICRO_BATCH, _GPU_MICRO_BATCH, _BATCH = 64, 256, 512
MIB = 1 << 20
_MAX_DEVICES = 15
"""The engine reads a split of fewer than 16 numbers."""
# Anchored: a bare "output" is in every "attn_output", and sends each layer home and back.
_OUTPUT = "^output.*"
_INPUT = "^token_embd.*"


@dataclass(frozen=True, slots=True)
class Launch:
    """What to start: arguments, and the variables that are not for everybody's eyes in a process list."""

    argv: tuple[str, ...]
    env: Mapping[str, str]


def llama_server_command(
    engine: Engine,
    layout: Layout,
    model_path: Path,
    port: int,
    endpoints: Sequence[str] = (),
    *,
    threads: int,
    rpc_secret: bytes = b"",
    api_key: str = "",
    gpu_layers: int | None = None,
    embeddings: bool = True,
    wire_dtype: str = "f32",
    handover: Mapping[str, str] = MappingProxyType({}),
) -> Launch:
    """The host's server.

    Args:
        model_path: the GGUF, or the first of its shards.
        endpoints: ``127.0.0.1:port`` of each worker's tunnel, in ring order.
        threads: of the CPU backend.
        rpc_secret: what every worker's server of this epoch expects, 16 to 64 bytes.
        gpu_layers: at most so many of the host's layers (the last ones) on its GPU; None for all.
        embeddings: answer ``/v1/embeddings`` too, by the mean over all tokens; costs ``512 * n_vocab * 4`` bytes.
        wire_dtype: number format of activations between machines, ``f32`` or ``f16``, which rounds them.
        handover: where it is to ask for the connections to its workers; empty: it connects to ``endpoints``.

    Raises:
        EngineError: the layout does not carry every layer exactly once, or names more devices than the engine takes, or
            there are workers and no secret.
    """
    check_layers(layout)
    if len(endpoints) != len(layout.workers):
        raise EngineError(f"{len(endpoints)} endpoints for {len(layout.workers)} workers")
    context = layout.ctx_size or layout.model.n_ctx_train
    argv = [str(engine.llama_server), "--model", str(model_path), "--alias", layout.model.name]
    argv += ["--host", LOOPBACK, "--port", str(port), "--no-ui", "--metrics", "--offline"]
    argv += ["-t", str(threads), "-c", str(context * layout.parallel), "-np", str(layout.parallel), "-fit", "off"]
    if layout.ring[0].device != "CPU":
        argv += ["-lv", "4"]  # it says what it puts where, which is checked
    if embeddings:
        argv += ["--embeddings", "--pooling", "mean"]
    # Alone as in a ring, so that a conversation that moves from one to the other is computed by the same kernels.
    env = {"MESH_MICRO_BATCH": str(micro_batch(layout))}
    if layout.workers:
        argv += ring_arguments(layout, endpoints, gpu_layers)
        env |= {**_ring_variables(layout, endpoints, rpc_secret, wire_dtype), **handover}
    else:
        argv += solo_arguments(layout.ring[0], gpu_layers)
    on_two_devices = not layout.workers and gpu_layers is not None
    if layout.prompt_cache_bytes >= MIB and not on_two_devices:
        # Idle slots are left where they are: a second copy of each would only take room from other conversations.
        argv += ["-cram", str(layout.prompt_cache_bytes // MIB), "--no-cache-idle-slots"]
        env["MESH_KV_ON_DEVICE"] = _kept_bytes(layout, endpoints)
    else:
        argv += ["-cram", "0"]  # the engine's own default is 8 GB, which no layout counts
    if api_key:
        env["LLAMA_API_KEY"] = api_key
    return Launch(tuple(argv), env)


def ring_arguments(layout: Layout, endpoints: Sequence[str], gpu_layers: int | None = None) -> list[str]:
    """What a server with workers is told that one alone is not."""
    return [
        *split_arguments(layout, endpoints, gpu_layers),
        # Checkpoints are made in host memory, and would drag the KV cache through the network. A mapped file would be
        # read in whole, the workers' layers included.
        *("-lm", "none", "-ctxcp", "0"),
        # A token goes around the ring before anybody is told of it (supervise/probe.py): one more would be for nothing.
        "--no-warmup",
        # Workers never repack weights. Where the host's CPU would, its results depend on what else is in the batch, and
        # the same prompt may be continued in two ways.
        "--no-repack",
    ]


def _ring_variables(layout: Layout, endpoints: Sequence[str], rpc_secret: bytes, wire_dtype: str) -> dict[str, str]:
    env = {"MESH_GGUF_ID": layout.model.fingerprint, "MESH_RPC_SECRET": _secret(rpc_secret)}
    if wire_dtype != "f32":
        env["MESH_RPC_WIRE_DTYPE"] = wire_dtype
    if len(layout.workers) > 1:
        seats = zip(endpoints, layout.workers, strict=True)
        env["MESH_RPC_RING"] = ",".join(f"{endpoint}={worker.id}" for endpoint, worker in seats)
    return env


def micro_batch(layout: Layout) -> int:
    """Tokens of a prompt that a member computes at a time, while the next computes those before.

    A prompt of n tokens takes ``n / size + members - 1`` turns of one micro-batch: small ones fill the ring sooner. A
    CPU is as fast with 64 tokens as with 512 (docs/benchmarks.md). A GPU wants more; how many was not measured.
    """
    if all(member.device == "CPU" for member in layout.ring):
        return _CPU_MICRO_BATCH
    return _GPU_MICRO_BATCH if layout.workers else _BATCH


def _kept_bytes(layout: Layout, endpoints: Sequence[str]) -> str:
    """Where the engine may keep how much of conversations that lost their slot."""
    places = zip(("local", *endpoints), layout.ring, strict=True)
    return ",".join(f"{place}={layout.prompt_cache_share(member.layers)}" for place, member in places)


def solo_arguments(host: RingMember, gpu_layers: int | None = None) -> list[str]:
    """Everything on one device of the host."""
    if host.device == "CPU":
        return ["-dev", "none", "-ngl", "0"]
    return ["-dev", host.device, "-ngl", "all" if gpu_layers is None else str(gpu_layers)]


def split_arguments(layout: Layout, endpoints: Sequence[str], gpu_layers: int | None = None) -> list[str]:
    """Which device carries which layers; of the host's own at most ``gpu_layers`` on its GPU.

    The engine offloads the last ``-ngl`` layers, the output layer being the very last, and deals them to ``-dev`` in
    order, as many to each as ``-ts`` says; what is not offloaded stays with the host's CPU, at the front.
    """
    host = layout.ring[0]
    on_gpu = host.device != "CPU" and host.layers is not None and gpu_layers != 0
    # What it must not take stays with the processor, at the front.
    devices = [(host.device, _count(host) if gpu_layers is None else min(gpu_layers, _count(host)))] if on_gpu else []
    devices += [(f"RPC{n}", _count(worker)) for n, worker in enumerate(layout.workers)]
    if len(devices) > _MAX_DEVICES:
        raise EngineError(f"the layout has {len(devices)} devices, and the engine takes {_MAX_DEVICES}")
    counts = [count for _, count in devices]
    counts[-1] += 1
    home = host.device if on_gpu else "CPU"
    return [
        *("--rpc", ",".join(endpoints)),
        *("-dev", ",".join(name for name, _ in devices)),
        *("-ngl", str(sum(counts))),
        *("-ts", ",".join(map(str, counts))),
        *("-ot", f"{_OUTPUT}={home},{_INPUT}=CPU"),
    ]


def _count(member: RingMember) -> int:
    return 0 if member.layers is None else member.layers[1] - member.layers[0] + 1


def check_layers(layout: Layout) -> None:
    """Insist that the ring carries every layer exactly once, in order, host first, and no worker nothing.

    Raises:
        EngineError: it does not.
    """
    if layout.ring[0].id != layout.host or any(m.id == layout.host for m in layout.ring[1:]):
        raise EngineError("the layout's ring does not begin with its host")
    if any(worker.layers is None for worker in layout.workers):
        raise EngineError("the layout has a worker without layers")
    ranges = [m.layers for m in layout.ring if m.layers is not None]
    ends = [(-1, -1), *ranges, (layout.model.n_layers, layout.model.n_layers)]
    if any(after[0] != before[1] + 1 for before, after in pairwise(ends)) or any(a > b for a, b in ranges):
        raise EngineError(f"the layout does not carry each of {layout.model.n_layers} layers exactly once: {ranges}")


def rpc_server_command(
    engine: Engine,
    port: int,
    *,
    threads: int,
    model_files: Sequence[Path],
    fingerprint: str,
    rpc_secret: bytes,
    device: str = "CPU",
    peers: Mapping[NodeId, str] | None = None,
    handover: Mapping[str, str] = MappingProxyType({}),
) -> Launch:
    """A worker's server.

    Args:
        model_files: the GGUF's files, shards in order: what it may read, and nothing else.
        fingerprint: the model's, hex SHA-256 over the files' contents.
        rpc_secret: 16 to 64 bytes that a client must send first, and this server to its peers.
        peers: workers it can push to, and the ``127.0.0.1:port`` of the tunnel to each.
        handover: where it is given connections, and asks for those to its peers; empty: through ports only.
    """
    argv = [str(engine.rpc_server), "-H", LOOPBACK, "-p", str(port), "-t", str(threads), "-d", device]
    for file in model_files:
        argv += ["--gguf", str(file)]
    argv += ["--gguf-id", fingerprint]
    env = {"MESH_RPC_SECRET": _secret(rpc_secret), **handover}
    if peers:
        env["MESH_RPC_PEERS"] = ",".join(f"{peer}={endpoint}" for peer, endpoint in peers.items())
    return Launch(tuple(argv), env)


def _secret(secret: bytes) -> str:
    if not 16 <= len(secret) <= 64:  # an empty one would leave the door open
        raise EngineError(f"an RPC secret has 16 to 64 bytes, not {len(secret)}")
    return secret.hex()
