"""How long silence may last before something follows from it. All times in seconds."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.membership.standing import Peer, Standing
from mesh.wire.facts import NodeId


@dataclass(slots=True)
class Patience:
    """When a peer is probed, suspected and judged. ``interval`` grows with the number of peers.

    The verdict falls ``stall_allowance + 1.2 * interval + 0.2 + 2 * round trip`` after the peer was last heard: a peer
    that slept for ``stall_allowance`` right after a whole probe interval of silence still has time to answer.
    """

    me: NodeId
    probe_interval: float = 0.25
    ping_timeout: float = 0.3
    stall_allowance: float = 1.0
    vouch_life: float = 2.0
    redial: float = 0.75
    """In which a link that the other side closed is up again, if its process lives."""
    interval: float = 0.25
    """As ``probe_interval``, stretched by the number of peers."""

    def among(self, peers: int) -> None:
        """Past 32 peers everyone probes more slowly, so that a node's traffic stays bounded."""
        self.interval = self.probe_interval * max(1.0, peers / 32)

    def probe_at(self, peer: Peer) -> float:
        """The lower id asks first, so that one probe serves both ends."""
        return max(peer.heard_at, peer.pinged_at) + self._probe_after(peer)

    def suspect_at(self, peer: Peer) -> float:
        return peer.heard_at + self._probe_after(peer) + self.ping_timeout + min(peer.rtt or 0.0, 1.0)

    def hurry_at(self, peer: Peer, now: float) -> float:
        """When the verdict on a peer that closed its link may fall, if nobody else hears it."""
        return now + self.redial + 2 * min(peer.rtt or 0.0, 1.0)

    def ask_at(self, peer: Peer) -> float:
        return peer.asked_at + 2 * self.interval

    def verdict_at(self, peer: Peer) -> float:
        rtt = min(peer.rtt or 0.0, 1.0)
        return peer.heard_at + self.stall_allowance + 1.2 * self.interval + 0.2 + 2 * rtt

    def vouched_until(self, peer: Peer) -> float:
        return peer.vouched_at + self.vouch_life

    def hears(self, peer: Peer, now: float) -> bool:
        """Whether we may vouch: by our own ears, and lately."""
        return peer.standing is Standing.ALIVE and peer.linked and now - peer.heard_at <= 2 * self.interval

    def due(self, peer: Peer) -> float | None:
        """The next moment at which anything above comes to pass."""
        standing = peer.standing
        if standing is Standing.ALIVE:
            # The common case, asked for every peer after every tick: as above, without the calls.
            heard, pinged, rtt = peer.heard_at, peer.pinged_at, peer.rtt
            after = self.interval if self.me < peer.id else 1.2 * self.interval
            suspect = heard + after + self.ping_timeout
            if rtt is not None:
                suspect += rtt if rtt < 1.0 else 1.0
            if not peer.linked:
                return suspect
            probe = (heard if heard > pinged else pinged) + after
            return probe if probe < suspect else suspect
        if not peer.is_member:
            return None
        probe = self.probe_at(peer) if peer.linked else float("inf")
        if standing is Standing.CUT:
            return min(probe, self.ask_at(peer), self.vouched_until(peer))
        verdict = self.verdict_at(peer)
        hurried = verdict if peer.hurry_at is None else min(verdict, peer.hurry_at)
        return min(probe, self.ask_at(peer), verdict, max(hurried, self.vouched_until(peer)))

    def _probe_after(self, peer: Peer) -> float:
        return self.interval if self.me < peer.id else 1.2 * self.interval
