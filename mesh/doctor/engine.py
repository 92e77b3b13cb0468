"""Is there an engine for this version, whole and running, and could another one be built?"""

from __future__ import annotations

from collections.abc import Iterator

from mesh.doctor.finding import Finding, ok, problem, warning
from mesh.doctor.outfit import Outfit
from mesh.doctor.patient import Patient

CHECK = "engine"


def judge(seen: Outfit) -> Iterator[Finding]:
    """Pure."""
    build = f"mesh engine build --backend {seen.backend}"
    if seen.broken is not None:
        yield problem(CHECK, "engine-broken", seen.broken.message, seen.broken.remedy or build)
    elif seen.engine is not None:
        yield ok(CHECK, f"built for {seen.backend}, version {seen.pin}, and runs")
    elif seen.damaged:
        yield problem(CHECK, "engine-damaged", f"the engine in {seen.entry} is damaged: {seen.damaged}", build)
    elif seen.unbuildable is None:
        yield warning(CHECK, "engine-not-built", f"version {seen.pin} is not built yet for {seen.backend}", build)
    if seen.engine is not None and seen.backend != "cpu" and not seen.listed and seen.broken is None:
        yield problem(
            CHECK,
            "no-device",
            f"the engine built for {seen.backend} sees no device here",
            "mesh up --backend cpu   (or see: mesh up --backend " + seen.backend + ")",
        )
    if seen.unbuildable is not None:
        needed = seen.engine is None or seen.broken is not None
        say = problem if needed else warning
        also = "" if needed else "; the one that is built works, the next version's could not be"
        yield say(CHECK, "toolchain", f"{seen.unbuildable.message}{also}", seen.unbuildable.remedy or "")


def check(patient: Patient) -> Iterator[Finding]:
    """The engine of the running node, or the one that would be chosen."""
    if patient.outfit is not None:
        yield from judge(patient.outfit)
