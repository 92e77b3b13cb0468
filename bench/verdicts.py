"""What a run is held to, and how it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench import tables


@dataclass(frozen=True, slots=True)
class Verdict:
    """One bar; ``met`` is None for a figure to see beside the others."""

    what: str
    bar: str
    measured: str
    met: bool | None


def verdict_table(found: Sequence[Verdict]) -> str:
    words = {True: "yes", False: "NO", None: "-"}
    rows = [[v.what, v.bar, v.measured or "-", words[v.met]] for v in found]
    return tables.markdown(["what", "bar", "measured", "met"], rows)
