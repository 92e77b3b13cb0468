"""Would this machine's own firewall keep others out? A guess from what the tools show; a router's cannot be seen.

nft, iptables and ufw tell root only. The formats are those of their manuals, and none of the five was ever run here.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mesh.doctor.finding import Finding, ok, warning
from mesh.doctor.patient import Patient
from mesh.hardware.ask import ask
from mesh.transport.address import split_address

CHECK = "firewall"
_MAC = "/usr/libexec/ApplicationFirewall/socketfilterfw"
_HOOK = re.compile(r"type filter hook input [^\n]*policy drop")
_RANGES = re.compile(r"\b(\d{1,5})(?:-(\d{1,5}))?\b")


@dataclass(frozen=True, slots=True)
class Guess:
    """``blocks`` None: nobody can tell. ``remedy`` opens the port."""

    blocks: bool | None
    tool: str
    remedy: str = ""


def check(patient: Patient) -> Iterator[Finding]:
    """The firewall of this machine and the port that others reach."""
    port = patient.settings.bind_port
    if patient.checkup is not None and patient.checkup["bound"]:
        port = split_address(patient.checkup["bound"][0])[1]
    hosts = (
        patient.settings.bind_host
        if patient.checkup is None
        else [split_address(a)[0] for a in patient.checkup["bound"]]
    )
    if all(host in ("127.0.0.1", "::1", "localhost") for host in hosts):
        yield ok(CHECK, "this node is for this machine alone: no firewall matters")
        return
    yield judge(guess(ask, port), port)


def judge(found: Guess, port: int) -> Finding:
    """Pure."""
    if found.blocks is None:
        return ok(CHECK, f"cannot tell ({found.tool}); others need UDP and TCP {port}", "unknown")
    if found.blocks:
        return warning(
            CHECK,
            "firewall",
            f"{found.tool} seems to keep others from UDP and TCP {port}: they may not reach this node",
            found.remedy,
        )
    return ok(CHECK, f"{found.tool} lets others reach UDP and TCP {port}, or filters nothing")


def guess(tool: Callable[[Sequence[str]], str], port: int) -> Guess:
    """The first tool that tells something decides: those that people use come before what they write to."""
    if sys.platform == "darwin":
        return from_mac(tool([_MAC, "--getglobalstate"]))
    if sys.platform == "win32":
        return Guess(None, "Windows asks when a program first listens")
    for found in (
        from_ufw(tool(["ufw", "status"]), port),
        from_firewalld(tool(["firewall-cmd", "--state"]), tool(["firewall-cmd", "--list-all"]), port),
        from_nft(tool(["nft", "list", "ruleset"]), port),
        from_iptables(tool(["iptables", "-S", "INPUT"]), port),
    ):
        if found is not None:
            return found
    tools = [name for name in ("nft", "iptables", "ufw", "firewall-cmd") if shutil.which(name)]
    return Guess(None, f"only root may ask {tools[0]}" if tools else "no tool that would tell")


def from_ufw(status: str, port: int) -> Guess | None:
    """``ufw status``, which prints a table of ``TO ACTION FROM``."""
    if "Status: inactive" in status:
        return None  # somebody else may still filter
    if "Status: active" not in status:
        return None
    open_ports = [line.split()[0] for line in status.splitlines() if " ALLOW" in line and line[:1].strip()]
    kinds = {kind for entry in open_ports for kind in ("udp", "tcp") if _covers(entry, port, kind)}
    return Guess(kinds != {"udp", "tcp"} and "Anywhere" not in open_ports, "ufw", f"sudo ufw allow {port}")


def from_firewalld(state: str, listed: str, port: int) -> Guess | None:
    """``firewall-cmd --list-all`` of the default zone."""
    if state.strip() != "running":
        return None
    fields = dict(line.strip().split(":", 1) for line in listed.splitlines() if ":" in line)
    ports = fields.get("ports", "").split()
    opened = {kind for entry in ports for kind in ("udp", "tcp") if _covers(entry, port, kind)}
    accepts = fields.get("target", "").strip() == "ACCEPT"
    return Guess(
        opened != {"udp", "tcp"} and not accepts,
        "firewalld",
        f"sudo firewall-cmd --permanent --add-port={port}/udp --add-port={port}/tcp\nsudo firewall-cmd --reload",
    )


def from_nft(ruleset: str, port: int) -> Guess | None:
    """``nft list ruleset``: chains with a hook, a policy and rules."""
    if "chain" not in ruleset:
        return None
    if not _HOOK.search(ruleset):
        return Guess(False, "nftables")
    accepted = [line for line in ruleset.splitlines() if "dport" in line and line.rstrip().endswith("accept")]
    udp, tcp = (any(kind in line and _mentions(line, port) for line in accepted) for kind in ("udp", "tcp"))
    table = re.search(r"table (\S+ \S+) \{(?:[^}]|\}(?!\n\}))*?chain (\S+) \{[^}]*hook input", ruleset)
    where = f"{table[1]} {table[2]}" if table else "inet filter input"
    return Guess(
        not (udp and tcp),
        "nftables",
        f"sudo nft insert rule {where} udp dport {port} accept\nsudo nft insert rule {where} tcp dport {port} accept",
    )


def from_iptables(rules: str, port: int) -> Guess | None:
    """``iptables -S INPUT``: the policy, then rules."""
    if "-P INPUT" not in rules:
        return None
    drops = "-P INPUT DROP" in rules or re.search(r"^-A INPUT -j (?:DROP|REJECT)", rules, re.MULTILINE) is not None
    if not drops:
        return Guess(False, "iptables")
    accepted = [line for line in rules.splitlines() if "--dport" in line and line.rstrip().endswith("-j ACCEPT")]
    udp, tcp = (any(f"-p {kind}" in line and _mentions(line, port) for line in accepted) for kind in ("udp", "tcp"))
    return Guess(
        not (udp and tcp),
        "iptables",
        "\n".join(f"sudo iptables -I INPUT -p {kind} --dport {port} -j ACCEPT" for kind in ("udp", "tcp")),
    )


def from_mac(state: str) -> Guess:
    """``socketfilterfw --getglobalstate``: the application firewall asks when a program first listens."""
    if "disabled" in state or "State = 0" in state:
        return Guess(False, "the firewall of macOS")
    if "enabled" not in state:
        return Guess(None, "the firewall of macOS does not answer")
    return Guess(
        True,
        "the firewall of macOS",
        f"sudo {_MAC} --add {sys.executable}\nsudo {_MAC} --unblockapp {sys.executable}",
    )


def _covers(entry: str, port: int, kind: str) -> bool:
    """``7842``, ``7842/udp``, ``7000:8000/udp`` or ``7000-8000/tcp``."""
    numbers, _, kinds = entry.partition("/")
    if kinds and kind not in kinds:
        return False
    first, _, last = numbers.replace(":", "-").partition("-")
    return first.isdecimal() and (not last or last.isdecimal()) and int(first) <= port <= int(last or first)


def _mentions(line: str, port: int) -> bool:
    after = line.partition("dport")[2].replace(":", "-")
    return any(int(m[1]) <= port <= int(m[2] or m[1]) for m in _RANGES.finditer(after))
