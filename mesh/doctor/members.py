"""The node that runs here, its members, and the links to them."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mesh.doctor.finding import Finding, ok, problem, warning
from mesh.doctor.patient import Patient

NODE, PEERS, LINKS, CLOCK = "node", "peers", "links", "clock"
SLOW_RTT_MS = 100.0
"""A token waits for every hop: two such links alone cost a fifth of a second each time."""
CLOCK_OFF_S = 5.0
"""Invites and grants expire by the clock of whoever is asked."""
EARLIEST = 1767225600.0
"""1 January 2026, when there was no mesh yet: no clock that is right says an earlier time."""
LATEST = EARLIEST + 50 * 365 * 86400


def check_node(patient: Patient) -> Iterator[Finding]:
    """Does a node run here, and does it serve?"""
    if patient.running is None:
        yield ok(NODE, f"none is running in {patient.state_dir}")
        return
    pid = patient.running.pid
    if patient.status is None:
        why = patient.silent or "it is still preparing its engine and model"
        if patient.silent:
            yield problem(
                NODE, "node-silent", f"the node (pid {pid}) does not answer: {why}",
                f"{patient.command('logs')}\nif it hangs:  kill {pid}",
            )  # fmt: skip
        else:
            yield warning(NODE, "node-starting", f"running (pid {pid}); {why}", patient.command("logs -f"))
        return
    yield from judge_node(patient.status, pid, patient.command("plan"))
    if patient.silent:
        yield warning(
            NODE,
            "node-older",
            f"the node tells nothing of its members and links: {patient.silent}",
            f"{patient.command('down')} && {patient.command('up')}   (if mesh was updated since it was started)",
        )


def judge_node(status: Mapping[str, Any], pid: int, plan: str) -> Iterator[Finding]:
    """Pure."""
    mesh = status["mesh"]
    text = f"running (pid {pid}), {mesh['state']} {mesh['reason']}".rstrip()
    if mesh["state"] == "serving":
        yield ok(NODE, text)
    else:
        yield warning(NODE, f"node-{mesh['state']}", text, plan)


def check_peers(patient: Patient) -> Iterator[Finding]:
    """Do all members run the same engine, and why does somebody carry nothing?"""
    mine = patient.mine()
    if mine is not None and patient.status is not None:
        yield from judge_pins(mine, patient.others())
        yield from judge_excluded(patient.status["peers"], mine)


def judge_pins(mine: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Engines of other pins cannot share a ring: which machine should be brought up to date?

    The pin that most have is taken for the right one; of a tie, ours is.
    """
    workers = [m for m in (mine, *others) if m["engine"] and m["role"] == "worker"]
    counts = Counter(m["engine"] for m in workers)
    if len(counts) <= 1:
        if others:
            yield ok(PEERS, f"{len(others)} other member{'' if len(others) == 1 else 's'}, all with the same engine")
        return
    most = max(counts, key=lambda pin: (counts[pin], pin == mine["engine"]))
    for member in workers:
        if member["engine"] != most:
            here = member["id"] == mine["id"]
            yield problem(
                PEERS,
                "engine-pin",
                f"{'this machine' if here else member['name']} runs engine {member['engine'][:8]}, "
                f"{'the others run' if here else 'this mesh runs'} {most[:8]}: they cannot share a ring",
                f"{'' if here else 'on ' + member['name'] + ':  '}git pull && bin/mesh engine build",
            )


def judge_excluded(peers: Sequence[Mapping[str, Any]], mine: Mapping[str, Any]) -> Iterator[Finding]:
    """Members that are there and carry nothing, with the plan's own words."""
    for peer in peers:
        why = peer["excluded"]
        if peer["state"] == "suspect":
            yield warning(PEERS, "suspect", f"{peer['name']} does not answer", f"on {peer['name']}:  mesh doctor")
        elif peer["state"] == "left" and why in ("unreachable", "crashed"):
            yield warning(
                PEERS, "gone", f"{peer['name']} is gone: {why}", f"on {peer['name']}:  mesh up   (or mesh doctor)"
            )
        elif why and peer["state"] == "alive" and peer["role"] != "client" and "cannot share a ring" not in why:
            text, _, remedy = why.partition("; ")
            yield warning(PEERS, "excluded", f"{peer['name']} {text}", remedy or f"on {peer['name']}:  mesh doctor")


def check_links(patient: Patient) -> Iterator[Finding]:
    """What the test of every link found."""
    if patient.checkup is not None:
        yield from judge_links(patient.checkup["links"])


def judge_links(links: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Pure."""
    for link in links:
        name = link["name"]
        if link["error"]:
            yield problem(
                LINKS, "link-dead", f"{name}: {link['error']}", f"on {name}:  mesh doctor   (ports and firewall)"
            )
            continue
        rate = 2 * link["burst_bytes"] / max(link["burst_ms"] - link["rtt_ms"], 0.01) / 1000
        text = f"{name} over {link['path']}: {link['rtt_ms']:.1f} ms there and back, {rate:.0f} MB/s in a burst"
        if link["path"] == "relay":
            yield warning(
                LINKS, "relayed", f"{text}; through another member, which is slower",
                "forward a port here or there, then:  mesh up --advertise HOST:PORT",
            )  # fmt: skip
        elif link["rtt_ms"] > SLOW_RTT_MS:
            yield warning(
                LINKS, "slow-link", f"{text}; every token waits for it", "mesh plan   (shows what it costs), or a cable"
            )
        else:
            yield ok(LINKS, text)


def check_clock(patient: Patient) -> Iterator[Finding]:
    """Does this machine's clock agree with the calendar, and with the other members'?"""
    links = [] if patient.checkup is None else patient.checkup["links"]
    yield from judge_clock(time.time(), links)


def judge_clock(wall: float, links: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Pure. With two peers or more it is the one who differs from most that is wrong."""
    set_it = "sudo timedatectl set-ntp true   (macOS: sudo sntp -sS time.apple.com)"
    if not EARLIEST <= wall <= LATEST:
        date = time.strftime("%d %B %Y", time.gmtime(wall))
        yield problem(CLOCK, "clock-wrong", f"this machine believes it is {date}: invites and grants are void", set_it)
        return
    ahead = {
        link["name"]: link["clock_ahead_s"] for link in links if not link["error"] and link["clock_ahead_s"] is not None
    }
    middle = statistics.median(ahead.values()) if ahead else 0.0
    off = {name: by for name, by in ahead.items() if abs(by) > CLOCK_OFF_S}
    if not off:
        agrees = f", and agrees with {len(ahead)} member{'' if len(ahead) == 1 else 's'}" if ahead else ""
        yield ok(CLOCK, time.strftime("%d %B %Y %H:%M:%S UTC", time.gmtime(wall)) + agrees)
    elif len(ahead) > 1 and abs(middle) > CLOCK_OFF_S:
        yield warning(
            CLOCK,
            "clock-skew",
            f"this machine's clock is {_by(-middle)} the others': invites expire early or late",
            set_it,
        )
    else:
        for name, by in off.items():
            yield warning(
                CLOCK,
                "clock-skew",
                f"{name}'s clock is {_by(by)} this machine's: one is wrong, and invites expire early or late",
                f"look at both:  date -u\non the one that is wrong:  {set_it}",
            )


def _by(ahead: float) -> str:
    amount = abs(ahead)
    text = (
        f"{amount:.0f} s" if amount < 120 else f"{amount / 60:.0f} min" if amount < 7200 else f"{amount / 3600:.0f} h"
    )
    return f"{text} {'ahead of' if ahead > 0 else 'behind'}"
