"""Bugs, planted one at a time: each must be caught, or the simulation proves nothing."""

from __future__ import annotations

from typing import Any

from mesh.election import events as el
from mesh.election.core import Election
from mesh.election.following import Following
from mesh.identity.invite import _Entry
from mesh.membership.core import BOOT_SHIFT, Membership
from mesh.proxy import events as px
from mesh.proxy.core import Core
from mesh.supervise import events as sv
from mesh.supervise.core import EngineCore, State
from mesh.wire.facts import Epoch, NodeFacts, NodeId
from mesh.wire.messages import Propose
from tests.sim.admission import Disk, DiskBook
from tests.sim.parts import Parts

# -- epochs and fencing ------------------------------------------------------------------------------------------------


class FollowsOlder(Election):
    """Any other epoch will do, be it older."""

    def _is_newer(self, epoch: Epoch) -> bool:
        return epoch != self.epoch


class AcceptsEqualEpochs(Election):
    """Epochs are compared by their numbers alone, and an equal one is as good as a newer one."""

    def _is_newer(self, epoch: Epoch) -> bool:
        return epoch.number >= self.epoch.number and epoch != self.epoch and epoch >= self._floor


class CarriesForAnyone(Election):
    """No fencing at the tunnel."""

    def may_carry(self, peer: NodeId, epoch: Epoch) -> bool:
        return True


class ForgetsItsEpoch(Election):
    """Begins anew at every start."""

    def __init__(self, me: NodeId, *, seen: int = 0, jitter: float = 0.5) -> None:
        super().__init__(me, jitter=jitter)


class AdoptsBeforeItRemembers(Election):
    """Follows first and writes down later."""

    def handle(self, event: el.Event, now: float) -> list[el.Effect]:
        return sorted(super().handle(event, now), key=lambda effect: isinstance(effect, el.Remember))


class ActsOnAStalePlan(Election):
    """Proposes what was planned, whoever went while it was planned, and whatever was asked since."""

    def _decide(self, decision: el.NeedPlan | Propose | None, now: float) -> None:
        if isinstance(decision, el.NeedPlan):
            self._asked = decision
        super()._decide(decision, now)

    def handle(self, event: el.Event, now: float) -> list[el.Effect]:
        if isinstance(event, el.Planned) and self._coordination._request is not None:
            # The answer to the first question is taken for that to the newest, a moment later.
            held: el.Planned | None = getattr(self, "_late", None)
            self._late = event
            event = event if held is None else el.Planned(event.request_id, held.layout, held.reason, held.excluded)
        return super().handle(event, now)


class NumbersByItselfAlone(Election):
    """A coordinator counts its own proposals only."""

    def _adopt(self, propose: Propose, now: float) -> None:
        mine = propose.epoch.coordinator == self._me
        number = getattr(self, "_mine", 0) + 1
        if mine:
            self._mine = number
            propose = Propose(Epoch(number, self._me), propose.layout, propose.reason, propose.excluded, propose.lifts)
        super()._adopt(propose, now)


# -- serving -----------------------------------------------------------------------------------------------------------


class RoutesBeforeItServes(Election):
    """Requests go to the host as soon as there is one."""

    def _review(self, now: float) -> None:
        following: Following = self._following
        if following.host is not None and following.api_key is None and not following.downs:
            following.api_key = "guessed"
        super()._review(now)


class DoesNotWaitForWorkers(EngineCore):
    """The host opens its tunnels and starts, whoever listens."""

    def _missing(self) -> list[NodeId]:
        return []


class ServesUnprobed(EngineCore):
    """A llama-server that listens is one that serves."""

    def handle(self, event: sv.Event, now: float) -> list[sv.Effect]:
        if isinstance(event, sv.ProcessStarted) and self.state is State.LAUNCHING and event.epoch == self.epoch:
            self._enter(State.SERVING)
            return [sv.AnnounceServing(self._epoch)]
        return super().handle(event, now)


class StartsBeforeTheOldHasEnded(EngineCore):
    """A newer layout starts at once, beside what runs."""

    def _replace(self, event: sv.Adopt, now: float) -> list[sv.Effect]:
        if event.epoch <= self._epoch:
            return []
        return [sv.StopEngine(), *self._begin(event, now)]


# -- requests ----------------------------------------------------------------------------------------------------------


class LosesWhatItHolds(Core):
    """A request that was cut short is not asked again."""

    def _take_back(self, request: Any, reason: str, planned: bool, now: float) -> list[px.Effect]:
        effects = super()._take_back(request, reason, planned, now)
        self._requests.pop(request.id, None)
        return effects


class SendsWhereItSentBefore(Core):
    """The end of a route is not noticed."""

    def _unserve(self, event: px.Unserved, now: float) -> list[px.Effect]:
        return []


class WaitsForEver(Core):
    """No deadline for who waits."""

    def _expire(self, request: Any, now: float) -> list[px.Effect]:
        request.deadline = now + 1000.0
        return []


# -- who is in ---------------------------------------------------------------------------------------------------------


class ForgetsToBurn(DiskBook):
    """An invite is checked, and stays as good as it was."""

    def redeem(self, secret: bytes, wall: float) -> Any:
        before = self._pages
        role = super().redeem(secret, wall)
        self._pages = self._disk.invites = before
        return role


class BurnsInMemoryAlone(DiskBook):
    """What was burned is whole again after a restart."""

    def __init__(self, disk: Disk) -> None:
        super().__init__(disk)
        self._burned = False

    def _write(self, entries: list[_Entry]) -> None:
        spent = any(entry.uses_left == 0 for entry in entries)
        kept = self._disk.invites
        super()._write(entries)
        if spent:
            self._disk.invites = kept


class ForgetsItsBoot(Membership):
    """Every run of its process calls itself the first."""

    def __init__(self, facts: NodeFacts, incarnation: int) -> None:
        super().__init__(facts, 1 << BOOT_SHIFT)


class BootsByTheSecond(Membership):
    """The wall clock's seconds tell the runs of a process apart."""

    def __init__(self, facts: NodeFacts, incarnation: int) -> None:
        super().__init__(facts, (incarnation >> BOOT_SHIFT) // 1000 << BOOT_SHIFT)


class NeverJudgesSilence(Membership):
    """Whoever says nothing may be asleep."""

    def __init__(self, facts: NodeFacts, incarnation: int) -> None:
        super().__init__(facts, incarnation, stall_allowance=1e6)


PLANTED: dict[str, Parts] = {
    "skip fencing": Parts(election=CarriesForAnyone, fences_engines=False),
    "accept equal epochs": Parts(election=AcceptsEqualEpochs),
    "follow older epochs": Parts(election=FollowsOlder),
    "forget the epoch": Parts(election=ForgetsItsEpoch),
    "adopt before it is written down": Parts(election=AdoptsBeforeItRemembers),
    "act on a stale plan": Parts(election=ActsOnAStalePlan),
    "number by itself alone": Parts(election=NumbersByItselfAlone),
    "route before it serves": Parts(election=RoutesBeforeItServes),
    "do not wait for workers": Parts(engine=DoesNotWaitForWorkers),
    "serve unprobed": Parts(engine=ServesUnprobed),
    "start beside the old engine": Parts(engine=StartsBeforeTheOldHasEnded),
    "lose what is held": Parts(proxy=LosesWhatItHolds),
    "send where it sent before": Parts(proxy=SendsWhereItSentBefore),
    "hold for ever": Parts(proxy=WaitsForEver),
    "forget to burn an invite": Parts(book=ForgetsToBurn),
    "burn an invite in memory alone": Parts(book=BurnsInMemoryAlone),
    "forget the own boot": Parts(membership=ForgetsItsBoot),
    "count boots by the second": Parts(membership=BootsByTheSecond),
    "do not judge silence": Parts(membership=NeverJudgesSilence),
}
