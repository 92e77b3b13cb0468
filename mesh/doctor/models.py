"""The models on this disk: broken files, and files that are not what they were."""

from __future__ import annotations

from collections.abc import Iterator

from mesh.config import format_size
from mesh.doctor.finding import Finding, ok, problem, warning
from mesh.doctor.patient import Patient
from mesh.errors import ModelError
from mesh.models.gguf import ModelFile
from mesh.models.inventory import Inventory

CHECK = "models"
MANY = 5


def check(patient: Patient) -> Iterator[Finding]:
    """Every model file here, and those that the node or the settings name."""
    if not patient.computes:
        return
    inventory = Inventory()
    scan = inventory.scan()
    named = patient.settings.model if patient.checkup is None else patient.checkup["settings"]["model"]
    wanted: ModelFile | None = None
    if named is not None:
        try:
            wanted = inventory.find(named)
        except ModelError as error:
            yield problem(CHECK, "model-broken", error.message, error.remedy or "mesh models list")
    for path, broken in scan.broken:
        if wanted is None or path not in wanted.paths:
            yield problem(CHECK, "model-broken", broken.message, broken.remedy or f"move it away:  mv {path} /tmp")
    models = {model.paths: model for model in (*scan.models, *((wanted,) if wanted is not None else ()))}
    running = {} if patient.mine() is None else (patient.mine() or {})["models"]
    for model in models.values():
        yield from judge_change(model, inventory.cache.changed(model.paths), running, patient.command("down"))
    where = ", ".join(map(str, inventory.directories))
    if models:
        names = ", ".join(model.name for model in list(models.values())[:MANY])
        more = f" and {len(models) - MANY} more" if len(models) > MANY else ""
        total = format_size(sum(model.size_bytes for model in models.values()))
        yield ok(CHECK, f"{len(models)} whole ({names}{more}), {total}, in {where}")
    elif named is None and not scan.broken:
        yield ok(CHECK, f"none in {where}: give one with --model, or try:  mesh up --demo")


def judge_change(model: ModelFile, before: str | None, running: dict[str, str], down: str) -> Iterator[Finding]:
    """Is the file another one than when its fingerprint was taken?

    Args:
        before: the fingerprint of what was there; None: it is unchanged, or was never taken.
        running: what the running node tells the others that it has, by fingerprint.
    """
    if before is None:
        return
    text = f"{model.paths[0]} changed since its fingerprint ({before[:8]}) was taken"
    if before in running:
        yield problem(
            CHECK,
            "model-changed",
            f"{text}, and the running node still offers the old one: it would compute something else",
            f"{down} && mesh up   (takes it anew; every machine needs the same file)",
        )
    else:
        yield warning(
            CHECK,
            "model-changed",
            f"{text}: other machines may have the old one",
            f"mesh models inspect {model.paths[0]}   (takes it anew; compare with the other machines')",
        )
