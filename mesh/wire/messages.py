"""Every control message, as one tagged union.

A control stream carries these and nothing else; bulk streams begin with one :class:`Open` and are raw bytes after.
Sizes are bounded by type; whole frames by :data:`mesh.wire.codec.MAX_FRAME`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from mesh.wire.facts import NO_EPOCH, Address, Epoch, Fingerprint, Layout, MeshId, Name, NodeFacts, NodeId, Role, Text

PROTOCOL = 1
"""Grows when an old node cannot understand a new one."""

Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
Seq = Annotated[int, Meta(ge=0, le=2**62)]
Element = Annotated[bytes, Meta(min_length=33, max_length=33)]
"""Of SPAKE2 over Ed25519's group, with the side that it comes from."""
Proof = Annotated[bytes, Meta(min_length=32, max_length=32)]


class Grant(Struct, frozen=True):
    """``issuer`` says: the holder of ``subject`` may take part in ``mesh`` as ``role``. The founder grants itself."""

    mesh: MeshId
    subject: Key
    role: Role
    issuer: Key
    issued_at: int
    expires_at: int
    """Seconds since 1970; 0: never."""
    signature: Signature


class Revocation(Struct, frozen=True):
    """``issuer`` says: ``subject`` is out."""

    mesh: MeshId
    subject: Key
    issuer: Key
    issued_at: int
    signature: Signature


class _Message(Struct, frozen=True, tag_field="t"):
    pass


# -- the door: the only messages understood before admission ---------------------------------------------------------


class Join(_Message, frozen=True, tag="join"):
    """A token holder asks to be let in. Sent only after the inviter's key was seen to be the token's."""

    protocol: int
    secret: Annotated[bytes, Meta(min_length=16, max_length=32)]
    name: Name


class Joined(_Message, frozen=True, tag="joined"):
    """The answer to :class:`Join`: the chain of grants that ends in the joiner's, and where members were last seen."""

    mesh: MeshId
    mesh_name: Name
    founder: Key
    grants: Annotated[tuple[Grant, ...], Meta(max_length=512)]
    members: Annotated[tuple[MemberAddress, ...], Meta(max_length=256)]


class Hello(_Message, frozen=True, tag="hello"):
    """First message of each side on a control stream: proof of membership and what the node is."""

    protocol: int
    mesh: MeshId
    grants: Annotated[tuple[Grant, ...], Meta(max_length=512)]
    revocations: Annotated[tuple[Revocation, ...], Meta(max_length=512)]
    facts: NodeFacts


class Move(_Message, frozen=True, tag="move"):
    """Instead of :class:`Hello`, by a member whose link is relayed: it shall go on over the path of this connection.
    Answered with the same, once the answerer sends there; the connection itself has served its purpose then."""


class Ask(_Message, frozen=True, tag="ask"):
    """A machine without a token asks to be let in by a person who reads a code on it. See
    :mod:`mesh.identity.pairing`."""

    protocol: int
    name: Name
    role: Role
    element: Element


class Still(_Message, frozen=True, tag="still"):
    """The asking machine still waits."""


class Asked(_Message, frozen=True, tag="asked"):
    """The request is known here, for so many seconds more."""

    left_s: Annotated[float, Meta(ge=0, le=3600)]


class Prove(_Message, frozen=True, tag="prove"):
    """Somebody typed a code: if it was the asking machine's, ``proof`` says so."""

    mesh: MeshId
    element: Element
    proof: Proof


class Proven(_Message, frozen=True, tag="proven"):
    """It was, and here is the same from the other side. :class:`Joined` follows."""

    proof: Proof


class Mistyped(_Message, frozen=True, tag="mistyped"):
    """It was not. ``element`` is for one more try."""

    element: Element


class Refused(_Message, frozen=True, tag="refused"):
    """The door stays shut; the connection closes after this."""

    code: Annotated[str, Meta(max_length=32)]
    message: Text


# -- membership ------------------------------------------------------------------------------------------------------


class MemberAddress(Struct, frozen=True):
    id: NodeId
    name: Name
    addresses: Annotated[tuple[Address, ...], Meta(max_length=16)]


class Ping(_Message, frozen=True, tag="ping"):
    seq: Seq


class Pong(_Message, frozen=True, tag="pong"):
    seq: Seq


class PingReq(_Message, frozen=True, tag="pingreq"):
    """Please ping ``target`` for me (SWIM, section 4.1)."""

    target: NodeId
    seq: Seq


class PingAck(_Message, frozen=True, tag="pingack"):
    """``target`` answered the ping asked for with ``seq``."""

    target: NodeId
    seq: Seq


class Rumour(_Message, frozen=True, tag="rumour"):
    """``sender`` holds ``node`` to be in ``state`` at ``incarnation``; a node refutes with a higher one of its own."""

    node: NodeId
    incarnation: Seq
    state: Literal["alive", "suspect", "dead", "left"]


class Facts(_Message, frozen=True, tag="facts"):
    """A node's facts changed, or are passed on for a node the receiver may not know."""

    facts: NodeFacts


class Members(_Message, frozen=True, tag="members"):
    """Where members were last seen, and grants the receiver may lack."""

    members: Annotated[tuple[MemberAddress, ...], Meta(max_length=256)]
    grants: Annotated[tuple[Grant, ...], Meta(max_length=512)]


class Revoke(_Message, frozen=True, tag="revoke"):
    revocation: Revocation


class Leaving(_Message, frozen=True, tag="leaving"):
    """The sender goes on purpose: no need to find out."""

    reason: Text = ""


class Knock(_Message, frozen=True, tag="knock"):
    """The sender is about to open a bulk stream over TCP, and will show the ticket with this SHA-256 there, once."""

    digest: Annotated[bytes, Meta(min_length=32, max_length=32)]


# -- across NATs -----------------------------------------------------------------------------------------------------

LiteralAddress = Annotated[str, Meta(max_length=64)]


class Seen(_Message, frozen=True, tag="seen"):
    """The receiver's packets come from ``address``, as the sender sees it."""

    address: LiteralAddress


class Introduce(_Message, frozen=True, tag="introduce"):
    """The sender cannot reach ``target``, and asks the receiver to tell both where the other is."""

    target: NodeId


class Meet(_Message, frozen=True, tag="meet"):
    """Dial ``peer`` now: it is told the same. ``rtt_ms`` lies between it and the sender, who could relay."""

    peer: NodeId
    addresses: Annotated[tuple[LiteralAddress, ...], Meta(max_length=8)]
    rtt_ms: Annotated[float, Meta(ge=0, le=1e6)]


class Carry(_Message, frozen=True, tag="carry"):
    """The sender asks the receiver to carry datagrams between it and ``target``."""

    target: NodeId


class Carried(_Message, frozen=True, tag="carried"):
    """Datagrams of the sender's link that begin with ``channel`` are between ``peer`` and the receiver."""

    peer: NodeId
    channel: Annotated[int, Meta(ge=0, lt=2**15)]


class Apart(_Message, frozen=True, tag="apart"):
    """The answer to ``Introduce`` or ``Carry`` that is a no."""

    target: NodeId
    code: Annotated[str, Meta(max_length=32)]


class Approve(_Message, frozen=True, tag="approve"):
    """A person typed this pairing code here: is it for a machine that asks you? Only said between members that may
    invite, and only to those whose facts say ``pairs``."""

    seq: Seq
    code: Annotated[str, Meta(min_length=8, max_length=8)]


class Approved(_Message, frozen=True, tag="approved"):
    """The answer to :class:`Approve`. ``code`` empty: ``node`` was let in; else why not."""

    seq: Seq
    code: Annotated[str, Meta(max_length=32)]
    message: Text
    node: Annotated[str, Meta(max_length=26, pattern="^([a-z2-7]{26})?$")] = ""
    name: Annotated[str, Meta(max_length=64)] = ""
    role: Role = "worker"


# -- election and layout ---------------------------------------------------------------------------------------------


class HeldOff(Struct, frozen=True):
    """For how long a member is to be left out of layouts, because it failed too often of late."""

    seconds: Annotated[float, Meta(ge=0, le=600)]
    why: Text


class Propose(_Message, frozen=True, tag="propose"):
    """This layout, by this number. ``layout`` None: nothing can run, ``reason`` says why."""

    epoch: Epoch
    layout: Layout | None
    reason: Text
    excluded: Annotated[dict[NodeId, Text], Meta(max_length=256)] = {}
    """Members the plan leaves out, and why; for status."""
    lifts: Epoch = NO_EPOCH
    """The same layout was followed under this number: who runs it carries on, nothing restarts."""
    drain_s: Annotated[float, Meta(ge=0, le=600)] = 0.0
    """What runs is well: requests that it answers may finish for so many seconds before it is stopped."""
    held_off: Annotated[dict[NodeId, HeldOff], Meta(max_length=256)] = {}
    """As the sender remembers: who coordinates next may have forgotten, being one of them."""


class Accepted(_Message, frozen=True, tag="accepted"):
    epoch: Epoch


class Rejected(_Message, frozen=True, tag="rejected"):
    """``newest`` is the epoch the sender already follows."""

    epoch: Epoch
    newest: Epoch


class WorkerReady(_Message, frozen=True, tag="workerready"):
    """The sender's rpc-server of ``epoch`` listens: the host may open its tunnels."""

    epoch: Epoch


class LoadProgress(_Message, frozen=True, tag="load"):
    epoch: Epoch
    node: NodeId
    done_bytes: Seq
    total_bytes: Seq


class Serving(_Message, frozen=True, tag="serving"):
    """A token has come through the ring of ``epoch``; ``api_key`` opens the host's engine for members."""

    epoch: Epoch
    api_key: Annotated[str, Meta(max_length=128)]


class EngineDown(_Message, frozen=True, tag="enginedown"):
    """The sender's engine of ``epoch`` ended, or never came up."""

    epoch: Epoch
    reason: Text


Door = Join | Joined | Hello | Move | Refused | Ask | Still | Asked | Prove | Proven | Mistyped
Crossing = Seen | Introduce | Meet | Carry | Carried | Apart
Control = (
    Join | Joined | Hello | Move | Refused | Ask | Still | Asked | Prove | Proven | Mistyped | Approve | Approved
    | Ping | Pong | PingReq | PingAck | Rumour | Facts | Members | Revoke | Leaving | Knock
    | Seen | Introduce | Meet | Carry | Carried | Apart
    | Propose | Accepted | Rejected | WorkerReady | LoadProgress | Serving | EngineDown
)  # fmt: skip


# -- bulk streams ----------------------------------------------------------------------------------------------------


class OpenControl(_Message, frozen=True, tag="control"):
    """This stream carries :data:`Control` frames. The dialer opens exactly one."""


class OpenRpc(_Message, frozen=True, tag="rpc"):
    """Raw bytes to the receiver's rpc-server. Only the host of ``epoch`` may ask, and only while it is current."""

    epoch: Epoch
    sealed: bool = False
    """The sender's engine would carry the connection on by itself, once both sides have the keys of ``Opened``."""


class OpenPush(_Message, frozen=True, tag="push"):
    """Raw bytes to the receiver's rpc-server. Only the worker right before it in the ring of ``epoch`` may ask, and
    only while that is current."""

    epoch: Epoch
    sealed: bool = False
    """As in ``OpenRpc``."""


class OpenHttp(_Message, frozen=True, tag="http"):
    """Raw bytes to the llama-server of the receiving host, while ``epoch`` is current."""

    epoch: Epoch


class OpenProbe(_Message, frozen=True, tag="probe"):
    """The receiver sends back what it gets: how fast is this lane?"""


class Opened(_Message, frozen=True, tag="opened"):
    """The other end is connected; raw bytes follow."""

    wall: Annotated[float, Meta(ge=0, le=1e11)] = 0.0
    """The other end's clock, seconds since 1970; 0: not told."""
    seal: Annotated[bytes, Meta(max_length=64)] = b""
    """Two keys: what follows is between the engines, encrypted by them. Empty: raw bytes, as ever."""


class OpenFailed(_Message, frozen=True, tag="openfailed"):
    code: Annotated[str, Meta(max_length=32)]
    message: Text


Open = OpenControl | OpenRpc | OpenPush | OpenHttp | OpenProbe
OpenReply = Opened | OpenFailed

ModelName = Fingerprint | Name
