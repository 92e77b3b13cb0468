"""All checks at once, their findings in order: what waits for a network does not hold up what looks at a disk."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator

from mesh.doctor import devices, engine, firewall, members, models, nat, ports, state, token
from mesh.doctor.finding import Finding, problem
from mesh.doctor.patient import Patient
from mesh.errors import MeshError

log = logging.getLogger(__name__)
WITHIN_S = 60.0
"""For one check. Each has tighter bounds of its own; this one is for what nobody thought of."""

Check = Callable[[Patient], Iterator[Finding]]
CHECKS: tuple[tuple[str, Check], ...] = (
    ("engine", engine.check),
    ("devices", devices.check),
    ("disk", state.check_disk),
    ("state", state.check),
    ("keys", state.check_keys),
    ("models", models.check),
    ("ports", ports.check),
    ("firewall", firewall.check),
    ("nat", nat.check),
    ("clock", members.check_clock),
    ("node", members.check_node),
    ("peers", members.check_peers),
    ("links", members.check_links),
)
TOKEN = "token"  # noqa: S105 - the check's name


async def examine(
    patient: Patient,
    found: Callable[[Finding], None],
    pending: Callable[[tuple[str, ...]], None] = lambda names: None,
) -> list[Finding]:
    """Run every check, tell of findings as soon as all before them are known, and give all of them.

    Args:
        found: told each finding, in the order of the checks.
        pending: told which checks are still under way, whenever that changes.
    """
    tasks = {name: asyncio.ensure_future(_bounded(name, _run(name, check, patient))) for name, check in CHECKS}
    tasks[TOKEN] = asyncio.ensure_future(_bounded(TOKEN, token.check(patient)))
    findings: list[Finding] = []
    try:
        for task in tasks.values():
            while not task.done():
                waiting = [other for other in tasks.values() if not other.done()]
                pending(tuple(other for other, under_way in tasks.items() if not under_way.done()))
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for finding in task.result():
                findings.append(finding)
                found(finding)
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
    return findings


async def _run(name: str, check: Check, patient: Patient) -> list[Finding]:
    return await asyncio.to_thread(lambda: list(check(patient)))


async def _bounded(name: str, work: Awaitable[list[Finding]]) -> list[Finding]:
    """What nobody foresaw is a finding, too: the others are worth no less for it."""
    try:
        async with asyncio.timeout(WITHIN_S):
            return await work
    except TimeoutError:
        return [problem(name, "hangs", f"this check did not end within {WITHIN_S:.0f} s", "please report it")]
    except MeshError as error:
        return [problem(name, error.code, error.message, error.remedy or "please report it")]
    except Exception as error:
        log.exception("the check %s failed", name)
        return [problem(name, "internal", f"this check failed: {type(error).__name__}: {error}", "please report it")]
