"""What nodes know and tell of themselves, of models, and of layouts: the nouns of every message.

All structs are frozen and forbid unknown shapes; bounds are part of the types, so that a hostile peer is refused by the
decoder before anything is allocated on its word.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from msgspec import Meta, Struct

NodeId = Annotated[str, Meta(min_length=26, max_length=26, pattern="^[a-z2-7]{26}$")]
"""Lowercase base32 of the first 16 bytes of SHA-256 over a node's raw Ed25519 public key."""
MeshId = NodeId
"""The id of the founder's key."""
Fingerprint = Annotated[str, Meta(min_length=64, max_length=64, pattern="^[0-9a-f]{64}$")]
"""Hex SHA-256 over a model's content, shards in order."""
Role = Literal["worker", "client"]
Name = Annotated[str, Meta(min_length=1, max_length=64)]
Text = Annotated[str, Meta(max_length=1024)]
Address = Annotated[str, Meta(max_length=128)]
"""``host:port``; IPv6 hosts in brackets."""
Bytes64 = Annotated[int, Meta(ge=0, le=2**62)]
Count = Annotated[int, Meta(ge=0, le=2**31)]


class Epoch(Struct, frozen=True, order=True):
    """The number of a layout. Ordered; two coordinators of a parted mesh never make equal epochs."""

    number: Annotated[int, Meta(ge=0, le=2**53)]
    coordinator: Annotated[str, Meta(max_length=26, pattern="^([a-z2-7]{26})?$")]
    """A node id; empty before any layout."""


NO_EPOCH = Epoch(0, "")
"""Before any layout was agreed."""


class Speed(Struct, frozen=True):
    """What a device streams per second of weights of one family (:func:`weight_family`, :func:`alone`)."""

    weights: Annotated[str, Meta(max_length=16)]
    bytes_per_second: Annotated[float, Meta(ge=0, le=1e18)]


class Device(Struct, frozen=True):
    """One thing that can hold layers, as the engine names it (``CPU``, ``CUDA0``)."""

    name: Name
    kind: Literal["cpu", "cuda", "metal", "vulkan", "rocm", "sycl"]
    description: Text
    total_bytes: Bytes64
    free_bytes: Bytes64
    """What was free before the mesh's own engine took any."""
    bytes_per_second: Annotated[float, Meta(ge=0)] = 0.0
    """Weights the device can stream per second; 0 when not measured."""
    speeds: Annotated[tuple[Speed, ...], Meta(max_length=8)] = ()
    """The same by the family of their type, since arithmetic may take longer than memory."""
    layer_us: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    """What a layer costs besides its weights, microseconds."""


class ModelCost(Struct, frozen=True):
    """What a model asks of memory, from its GGUF alone."""

    fingerprint: Fingerprint
    name: Name
    architecture: Name
    size_bytes: Bytes64
    n_layers: Annotated[int, Meta(ge=1, le=1024)]
    n_embd: Annotated[int, Meta(ge=1, le=2**20)]
    n_vocab: Annotated[int, Meta(ge=1, le=2**24)]
    n_ctx_train: Count
    layer_bytes: Annotated[tuple[Bytes64, ...], Meta(max_length=1024)]
    """Weights of each transformer layer."""
    input_bytes: Bytes64
    """Token embedding and whatever else stays where the tokens come in."""
    output_bytes: Bytes64
    """Output norm and head."""
    kv_bytes_per_token: Annotated[tuple[Bytes64, ...], Meta(max_length=1024)]
    """f16 K and V of one token, for each layer."""
    n_ff: Count = 0
    """Widest feed-forward row of a token (experts in use together). 0 when unknown."""
    windows: Annotated[tuple[Count, ...], Meta(max_length=1024)] = ()
    """Tokens that each layer's cache holds at most; 0: all of the context. Empty: no layer is limited."""
    state_bytes: Annotated[tuple[Bytes64, ...], Meta(max_length=1024)] = ()
    """Recurrent state of one slot, for each layer. Empty: none has any."""
    read_bytes: Annotated[tuple[Bytes64, ...], Meta(max_length=1024)] = ()
    """Weights of each layer that one token reads; less than all where it chooses experts. Empty: all."""
    attention_row: Count = 0
    """Values of one token that attention holds at its peak; sizes compute buffers. 0 when unknown."""
    state_row: Count = 0
    """What a recurrent layer holds in attention's place. 0: there is none."""
    feed_row: Count = 0
    """The same of the feed-forward part."""
    weights: Annotated[str, Meta(max_length=16)] = ""
    """Type that most bytes of the layers have, as the format calls it (``Q4_K``). Empty when unknown."""
    demo_version: Count = 0
    """Generator version when this is the demo model, which any node can make for itself; else 0."""


def weight_family(weights: str) -> str:
    """Types that a device treats about alike bear the name of one of them: ``Q4_K``, ``Q8_0`` or ``F16``.

    Args:
        weights: a type of the format; empty when unknown.
    """
    bits = "".join(c for c in weights if c.isdigit())[:2]
    if not bits or weights.startswith(("F", "BF")):
        return "F16"
    return "Q4_K" if int(bits[0]) < 6 else "Q8_0"


def alone(family: str) -> str:
    """The name of the speed that a device has with weights it rearranges, as it does where it serves alone."""
    return f"{family} alone"


class LinkFact(Struct, frozen=True):
    """What a node measured of its link to another."""

    peer: NodeId
    rtt_ms: Annotated[float, Meta(ge=0, le=1e6)]
    """Over the lane that bulk takes."""
    bytes_per_second: Annotated[float, Meta(ge=0, le=1e12)] = 0.0
    """Of bulk; 0 when not measured."""


class NodeFacts(Struct, frozen=True):
    """What a node tells the others of itself. ``version`` grows with every change; the highest is the truth."""

    id: NodeId
    version: Bytes64
    name: Name
    role: Role
    mesh_version: Annotated[str, Meta(max_length=32)]
    engine: Annotated[str, Meta(max_length=64)]
    """Source pin and patches: equal on every node of a ring. Empty when the node has no engine."""
    backend: Annotated[str, Meta(max_length=16)]
    devices: Annotated[tuple[Device, ...], Meta(max_length=32)]
    budget_bytes: Bytes64
    """Upper bound over all devices (``--max-memory``); 0 for no bound beyond the devices' own."""
    threads: Annotated[int, Meta(ge=0, le=4096)]
    models: Annotated[tuple[ModelCost, ...], Meta(max_length=16)]
    """Models whose file is complete on this node's disk."""
    wants: Annotated[str, Meta(max_length=64, pattern="^([0-9a-f]{64})?$")]
    """The model this node was started for; empty: whatever the mesh serves."""
    addresses: Annotated[tuple[Address, ...], Meta(max_length=16)]
    ctx_size: Annotated[int, Meta(ge=0, le=2**24)] = 0
    """Wanted context per slot, tokens; 0: no wish."""
    parallel: Annotated[int, Meta(ge=0, le=256)] = 0
    split: Literal["auto", "always", "never"] = "auto"
    draining: bool = False
    """The node is about to leave: plan without it."""
    tcp: bool = False
    """The node takes bulk streams over TCP, on the port number of its QUIC links."""
    crosses: bool = False
    """The node understands what is said to get across NATs: ``Seen``, ``Introduce`` and all that follows."""
    relay_only: bool = False
    """The node introduces and relays, and carries no layers."""
    links: Annotated[tuple[LinkFact, ...], Meta(max_length=64)] = ()
    """What this node measured of its links to others; told again when it has changed much."""
    battery: bool = False
    """The node runs on a battery now: it carries layers only where others cannot."""
    pairs: bool = False
    """The node lets machines in by a pairing code, and understands what is said of that among members."""
    gpu_layers: Annotated[int, Meta(ge=1, le=4096)] | None = None
    """As a worker it takes at most so many layers on its GPU; None: as many as fit."""
    computes_on: Annotated[str, Meta(max_length=64)] = ""
    """What holds the node's share, as its engine's log says, where that is not the device the layout names."""


class RingMember(Struct, frozen=True):
    """One node's share: the inclusive range of layers it carries, or none (the host may carry only the ends)."""

    id: NodeId
    name: Name
    layers: tuple[int, int] | None
    bytes: Bytes64
    """Weights, KV cache, compute buffers, and what it keeps of conversations that lost their slot."""
    device: Name


class Layout(Struct, frozen=True):
    """Who carries what. ``ring`` is in data-flow order and begins with the host."""

    mode: Literal["solo", "split"]
    host: NodeId
    model: ModelCost
    ring: Annotated[tuple[RingMember, ...], Meta(min_length=1, max_length=64)]
    ctx_size: Count
    """Context of one slot, tokens."""
    parallel: Annotated[int, Meta(ge=1, le=256)]
    predicted_ms_per_token: float = 0.0
    prompt_cache_bytes: Bytes64 = 0
    """For conversations that lost their slot, over the whole ring; each member has it in proportion to its KV cache."""

    def prompt_cache_share(self, layers: tuple[int, int] | None) -> int:
        """What a member with these layers may keep of ``prompt_cache_bytes``."""
        per_token = self.model.kv_bytes_per_token
        carried = sum(per_token[layers[0] : layers[1] + 1]) if layers is not None else 0
        return self.prompt_cache_bytes * carried // sum(per_token) if carried else 0

    def shape(self) -> tuple[object, ...]:
        """What must differ for a restart to be worth it; predictions do not count."""
        members = tuple((m.id, m.layers, m.device) for m in self.ring)
        return (self.mode, self.host, self.model.fingerprint, members, self.ctx_size, self.parallel)

    @property
    def workers(self) -> tuple[RingMember, ...]:
        """The members the host reaches through tunnels, in ring order."""
        return tuple(m for m in self.ring if m.id != self.host)

    def successor(self, worker: NodeId) -> NodeId | None:
        """The worker that goes on with what ``worker`` has computed; None for the last one and for who is none."""
        ids = [m.id for m in self.workers]
        return dict(pairwise(ids)).get(worker)
