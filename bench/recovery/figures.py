"""What one fault cost, put together from what the nodes said. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.recovery.diary import Entry


@dataclass(frozen=True, slots=True)
class Recovery:
    """Seconds from one event to the next; None: it was not seen.

    Args:
        case: the fault.
        detected_s: from the fault until the first node that was not hit said that the victim is gone, or, when nobody
            is, that what runs is over. (The tunnels of a killed process break at once, and an engine with them, which
            does not tell a crash from a bad moment.)
        elected_s: from there until the last of them followed a layout with a new number.
        load_s: from there until a node that asked learned that it serves: old engines stopped, new ones loaded, a token
            through the ring.
        token_s: from the fault to the first token of a request sent right after it.
        epochs: new numbers until then.
        whole_s: from the end of the fault until the layout was the whole mesh's again.
        accused: nodes that were hit but fine, and taken for dead.
        orphans: engine processes that outlived their node.
    """

    case: str
    detected_s: float | None = None
    elected_s: float | None = None
    load_s: float | None = None
    token_s: float | None = None
    epochs: int = 0
    whole_s: float | None = None
    accused: int = 0
    orphans: int = 0

    @property
    def beyond_s(self) -> float | None:
        """What the next token took beyond detection and load."""
        if self.token_s is None or self.detected_s is None or self.load_s is None:
            return None
        return self.token_s - self.detected_s - self.load_s


def is_sign(entry: Entry, epoch: int) -> bool:
    """Whether a node says here that the layout of ``epoch`` is over, or one of its members is missing."""
    if entry.kind == "plan":
        return int(entry.said.get("epoch", 0)) > epoch
    return entry.kind == "change" and ("node" in entry.said or "requests wait" in str(entry.said.get("text")))


def timeline(
    case: str,
    epoch: int,
    since: float,
    said: Mapping[str, Sequence[Entry]],
    witness: str,
    token_at: float | None,
    victim: str = "",
) -> Recovery:
    """The figures of one fault at ``since``, in a mesh that was at ``epoch``.

    Args:
        said: by each node that was not hit.
        witness: of them, who asked.
        victim: the id of the node that was hit.
    """
    after = {name: [e for e in entries if e.at >= since - 0.001] for name, entries in said.items()}
    every = [entry for entries in after.values() for entry in entries]
    gone = [e.at for e in every if e.kind == "change" and e.said.get("node") == victim]
    signs = gone or [e.at for e in every if is_sign(e, epoch)]
    detected = min(signs, default=None)
    plans = {name: [e for e in entries if _is_layout_after(e, epoch)] for name, entries in after.items()}
    ready = [e.at for e in after[witness] if e.kind == "ready" and detected is not None and e.at >= detected]
    served = min(ready, default=None)
    numbers = {int(e.said["epoch"]) for e in plans[witness] if served is None or e.at <= served}
    # The layout that came to serve: an earlier one may have been given up on the way.
    last = max(numbers, default=None)
    follows = [next((e.at for e in entries if int(e.said["epoch"]) == last), None) for entries in plans.values()]
    known = [at for at in follows if at is not None]
    elected = max(known) if last is not None and len(known) == len(plans) else None
    return Recovery(
        case,
        None if detected is None else detected - since,
        None if elected is None or detected is None else elected - detected,
        None if elected is None or served is None else served - elected,
        None if token_at is None else token_at - since,
        len(numbers),
    )


def _is_layout_after(entry: Entry, epoch: int) -> bool:
    return entry.kind == "plan" and int(entry.said.get("epoch", 0)) > epoch
