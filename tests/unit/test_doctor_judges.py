"""What the doctor makes of what it saw: pure judgements on made-up machines.

Firewalls are written from the formats of their manuals, not recorded.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.config import Settings
from mesh.doctor import devices, engine, examination, firewall, members, nat, ports, token
from mesh.doctor.finding import Finding, ok, problem
from mesh.doctor.firewall import Guess, from_firewalld, from_iptables, from_mac, from_nft, from_ufw, guess
from mesh.doctor.outfit import Outfit
from mesh.doctor.patient import Patient
from mesh.doctor.ports import Owner, Port
from mesh.engine.placement import Placement
from mesh.errors import EngineError
from mesh.hardware import Power
from mesh.node.statedir import Running
from mesh.wire.facts import Device

GB = 10**9
PORT = 7842
OUTFIT = Outfit("cpu", "91c0", Path("/cache/cpu-0123456789abcdef"))


def codes(found: Iterator[Finding] | Sequence[Finding]) -> list[str]:
    return [finding.code for finding in found]


def bad(found: Iterator[Finding] | Sequence[Finding]) -> list[Finding]:
    return [finding for finding in found if finding.level != "ok"]


# -- firewalls -------------------------------------------------------------------------------------------------------

NFT_DROP = """table inet filter {
	chain input {
		type filter hook input priority filter; policy drop;
		ct state established,related accept
		tcp dport 22 accept
	}
}
"""
UFW = """Status: active

To                         Action      From
--                         ------      ----
22/tcp                     ALLOW       Anywhere
"""


@pytest.mark.parametrize(
    ("found", "blocks"),
    [
        (from_nft(NFT_DROP, PORT), True),
        (from_nft(NFT_DROP.replace("tcp dport 22", "udp dport 7842 accept\n\t\ttcp dport 7000-8000"), PORT), False),
        (from_nft(NFT_DROP.replace("tcp dport 22", "udp dport { 53, 7842 }"), PORT), True),  # UDP alone
        (from_nft(NFT_DROP.replace("policy drop", "policy accept"), PORT), False),
        (from_nft("", PORT), None),
        (from_ufw(UFW, PORT), True),
        (from_ufw(UFW + "7842                       ALLOW       Anywhere\n", PORT), False),
        (from_ufw(UFW + "7842/udp                   ALLOW       Anywhere\n", PORT), True),
        (from_ufw(UFW + "7000:8000/tcp ALLOW Anywhere\n7000:8000/udp ALLOW Anywhere\n", PORT), False),
        (from_ufw("Status: inactive\n", PORT), None),
        (from_firewalld("running\n", "public (active)\n  target: default\n  ports: 22/tcp\n", PORT), True),
        (from_firewalld("running\n", "public\n  target: default\n  ports: 7842/tcp 7842/udp\n", PORT), False),
        (from_firewalld("running\n", "trusted\n  target: ACCEPT\n  ports: \n", PORT), False),
        (from_firewalld("not running\n", "", PORT), None),
        (from_iptables("-P INPUT DROP\n-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT\n", PORT), True),
        (from_iptables("-P INPUT ACCEPT\n", PORT), False),
        (from_iptables("-P INPUT ACCEPT\n-A INPUT -j REJECT --reject-with icmp-host-prohibited\n", PORT), True),
        (
            from_iptables(
                "-P INPUT DROP\n-A INPUT -p udp -m udp --dport 7842 -j ACCEPT\n"
                "-A INPUT -p tcp -m tcp --dport 7000:9000 -j ACCEPT\n",
                PORT,
            ),
            False,
        ),
        (from_iptables("", PORT), None),
        (from_mac("Firewall is enabled. (State = 1)"), True),
        (from_mac("Firewall is disabled. (State = 0)"), False),
    ],
)
def test_a_firewall_that_drops_what_nobody_opened_is_a_guess_of_one(found: Guess | None, blocks: bool | None) -> None:
    assert (None if found is None else found.blocks) is blocks
    if found is not None and found.blocks:
        finding = firewall.judge(found, PORT)
        assert finding.level == "warning" and finding.remedy
        assert str(PORT) in finding.remedy or "socketfilterfw" in finding.remedy


def test_the_remedy_names_the_table_that_drops() -> None:
    found = from_nft(NFT_DROP.replace("inet filter", "ip guard").replace("chain input", "chain incoming"), PORT)
    assert found is not None
    assert found.remedy.splitlines()[0] == "sudo nft insert rule ip guard incoming udp dport 7842 accept"


def test_what_no_tool_tells_cannot_be_told() -> None:
    finding = firewall.judge(guess(lambda command: "", PORT), PORT)
    assert (finding.level, finding.code) == ("ok", "unknown")


@given(st.text(), st.text())
def test_no_firewall_tool_can_confuse_the_doctor(first: str, second: str) -> None:
    """Whatever a tool prints, there is a guess or none."""
    for found in (from_ufw(first, PORT), from_firewalld("running", second, PORT), from_nft(f"chain {first}", PORT)):
        assert found is None or isinstance(found, Guess)
    from_iptables(f"-P INPUT DROP\n{second}", PORT)
    from_mac(first)


# -- clocks and links ------------------------------------------------------------------------------------------------

NOW = 1796000000.0


def link(name: str, ahead: float | None = 0.0, **changes: Any) -> dict[str, Any]:
    return {
        "id": name, "name": name, "error": None, "path": "tcp", "rtt_ms": 0.4, "burst_ms": 1.4, "burst_bytes": 32768,
        "clock_ahead_s": ahead, "clock_within_s": 0.001, **changes,
    }  # fmt: skip


def test_clocks_that_agree_are_fine() -> None:
    (finding,) = members.judge_clock(NOW, [link("attic", 0.3), link("cellar", -2.0), link("old", None)])
    assert finding.level == "ok" and "agrees with 2 members" in finding.text


def test_the_one_clock_that_differs_is_the_wrong_one() -> None:
    (finding,) = members.judge_clock(NOW, [link("attic", 90), link("cellar", 0.1), link("hall", 0)])
    assert "attic's clock is 90 s ahead of this machine's" in finding.text
    (finding,) = members.judge_clock(NOW, [link("attic", 7200), link("cellar", 7201)])
    assert "this machine's clock is 2 h behind the others'" in finding.text
    assert "set-ntp true" in finding.remedy


def test_a_clock_before_there_was_a_mesh_is_wrong() -> None:
    (finding,) = members.judge_clock(1000.0, [])
    assert (finding.code, finding.level) == ("clock-wrong", "problem")
    assert "01 January 1970" in finding.text


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, "ok"),
        ({"path": "relay"}, "relayed"),
        ({"rtt_ms": 140.0, "burst_ms": 180.0}, "slow-link"),
        ({"error": "node attic did not answer within 6 s"}, "link-dead"),
        ({"burst_ms": 0.1}, "ok"),
    ],
)
def test_links_are_judged_by_what_a_token_would_meet(changes: dict[str, Any], code: str) -> None:
    assert codes(members.judge_links([link("attic", **changes)])) == [code]


# -- members ---------------------------------------------------------------------------------------------------------


def member(name: str, pin: str = "91c0aaaaaaaa", **changes: Any) -> dict[str, Any]:
    return {"id": name, "name": name, "role": "worker", "engine": pin, "computes_on": "", **changes}


def test_engines_of_the_minority_are_the_ones_to_renew() -> None:
    (finding,) = members.judge_pins(member("me"), [member("attic", "7f3a00000000"), member("hall")])
    assert "attic runs engine 7f3a0000, this mesh runs 91c0aaaa" in finding.text
    assert finding.remedy == "on attic:  git pull && bin/mesh engine build"
    (finding,) = members.judge_pins(member("me", "7f3a00000000"), [member("attic"), member("hall")])
    assert finding.text.startswith("this machine runs engine 7f3a") and finding.remedy.startswith("git pull")


def test_who_has_no_engine_has_no_wrong_one() -> None:
    others = [member("laptop", "", role="client"), member("relay", ""), member("hall")]
    assert codes(members.judge_pins(member("me"), others)) == ["ok"]


def test_who_carries_nothing_is_told_with_the_plans_own_remedy() -> None:
    why = "has no copy of Qwen on its disk; copy the file there, then:  mesh up --model"
    peers: list[dict[str, Any]] = [
        {"name": "attic", "state": "alive", "role": "standby", "excluded": why},
        {"name": "hall", "state": "suspect", "role": "worker", "excluded": None},
        {"name": "gone", "state": "left", "role": "standby", "excluded": "stopped by its owner"},
        {"name": "cut", "state": "left", "role": "standby", "excluded": "unreachable"},
        {"name": "laptop", "state": "alive", "role": "client", "excluded": "is a lite client"},
        {"name": "old", "state": "alive", "role": "standby", "excluded": "runs engine 1: they cannot share a ring; x"},
    ]
    first, second, third = members.judge_excluded(peers, member("me"))
    assert first.text == "attic has no copy of Qwen on its disk"
    assert first.remedy == "copy the file there, then:  mesh up --model"
    assert (second.code, second.remedy) == ("suspect", "on hall:  mesh doctor")
    assert third.text == "cut is gone: unreachable"


@pytest.mark.parametrize(("state", "level"), [("serving", "ok"), ("waiting", "warning"), ("electing", "warning")])
def test_a_node_that_does_not_serve_is_a_warning(state: str, level: str) -> None:
    (finding,) = members.judge_node({"mesh": {"state": state, "reason": "no model"}}, 7, "mesh plan")
    assert finding.level == level


def test_a_node_of_an_older_version_is_told_to_be_started_again() -> None:
    patient = Patient(
        Settings(state_dir=Path("/s")),
        Running(7, "", "http://127.0.0.1:1", ""),
        {"mesh": {"state": "serving", "reason": ""}, "node": {"engine": {"backend": "cpu"}}},
        silent="a node knows no call 'checkup'",
    )
    first, second = members.check_node(patient)
    assert (first.level, second.code) == ("ok", "node-older")
    assert "mesh down --state-dir /s && mesh up --state-dir /s" in second.remedy
    assert list(members.check_links(patient)) == [] and list(members.check_peers(patient)) == []


# -- NAT and ports ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "state", "code"),
    [
        ("open", "answered", "ok"),
        ("cone", "answered", "ok"),
        ("symmetric", "answered", "symmetric-nat"),
        ("unknown", "silent", "stun-silent"),
        ("cone", "silent", "ok"),  # members have said it
        ("unknown", "off", "off"),
    ],
)
def test_the_nat_is_named_and_what_it_means(kind: Any, state: str, code: str) -> None:
    (finding,) = nat.judge(kind, state, ["192.168.1.5:7842", "203.0.113.9:41000"], 4)
    assert finding.code == code
    if (kind, state) == ("cone", "answered"):
        assert "203.0.113.9:41000" in finding.text


UDP = Port("--bind-port", "UDP", "0.0.0.0", PORT)


@pytest.mark.parametrize(
    ("port", "trouble", "owner", "level", "words"),
    [
        (UDP, 0, None, "ok", ""),
        (UDP, errno.EADDRINUSE, Owner(42, "dnsmasq"), "problem", "mesh up --bind-port 7843"),
        (replace(UDP, kind="TCP"), errno.EADDRINUSE, None, "warning", "mesh up --bind-port 7843"),
        (Port("--api-port", "TCP", "127.0.0.1", 9337), errno.EADDRINUSE, None, "problem", "mesh up --api-port 7843"),
        (UDP, errno.EADDRINUSE, Owner(42, "mesh", "/srv/a", True), "problem", "mesh down --state-dir /srv/a"),
        (replace(UDP, number=80), errno.EACCES, None, "problem", "mesh up --bind-port 7843"),
        (replace(UDP, host="203.0.113.9"), errno.EADDRNOTAVAIL, None, "problem", "--bind-host"),
    ],
)
def test_a_port_that_cannot_be_had_names_its_owner_and_another(
    port: Port, trouble: int, owner: Owner | None, level: str, words: str
) -> None:
    finding = ports.judge(port, trouble, owner, 7843)
    assert finding.level == level and words in finding.remedy
    if owner is not None:
        assert f"pid {owner.pid}" in finding.text


# -- engine, devices, token ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, ["engine-not-built"]),
        ({"damaged": "llama-server has 0 bytes"}, ["engine-damaged"]),
        ({"unbuildable": EngineError("missing g++", remedy="sudo apt install g++")}, ["toolchain"]),
        ({"damaged": "half", "unbuildable": EngineError("missing g++", remedy="x")}, ["engine-damaged", "toolchain"]),
    ],
)
def test_an_engine_that_is_not_there_says_what_is_missing(changes: dict[str, Any], found: list[str]) -> None:
    assert codes(engine.judge(replace(OUTFIT, **changes))) == found


def test_little_memory_is_no_matter_while_our_own_engine_holds_it() -> None:
    little = Device("CPU", "cpu", "processor", 8 * GB, GB // 2)
    assert codes(devices.judge_memory([little], 0, busy=False)) == ["little-memory"]
    assert codes(devices.judge_memory([little], 0, busy=True)) == ["ok"]
    assert "max-memory" in codes(devices.judge_memory([little], 4 * GB, busy=False))


def test_a_laptop_on_battery_is_a_warning() -> None:
    assert codes(devices.judge_power(Power(True, 30, True))) == ["on-battery", "saving"]
    assert codes(devices.judge_power(Power(False, 100))) == []


def test_a_member_on_another_device_than_planned_is_told() -> None:
    (finding,) = bad(devices.judge_placement("CPU (29 MiB)", [member("attic", computes_on="CPU"), member("hall")]))
    assert finding.code == "misplaced" and "attic computes on CPU" in finding.text


def test_a_token_that_came_from_elsewhere_is_a_problem() -> None:
    placement = Placement()
    placement.read("load_tensors:   CPU_Mapped model buffer size =    28.58 MiB")
    assert codes(token.judge(OUTFIT, "CPU", "", placement, 0.3)) == ["ok"]
    assert codes(token.judge(OUTFIT, "CUDA0", "", placement, 0.3)) == ["misplaced"]
    (finding,) = token.judge(OUTFIT, "CUDA0", "was killed by SIGILL", placement, 0.0)
    assert "mesh engine build" in finding.remedy and "--backend cpu" in finding.remedy


# -- all together ----------------------------------------------------------------------------------------------------


def test_findings_come_in_order_and_a_check_that_breaks_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(_: Patient) -> Iterator[Finding]:
        raise RuntimeError("oops")

    async def tokens(_: Patient) -> list[Finding]:
        return [ok("token", "came")]

    checks: Any = (("one", lambda _: iter([ok("one", "fine")])), ("two", breaks), ("three", lambda _: iter([])))
    monkeypatch.setattr(examination, "CHECKS", checks)
    monkeypatch.setattr(token, "check", tokens)
    told: list[Finding] = []
    found = asyncio.run(examination.examine(Patient(Settings()), told.append))
    assert found == told
    assert [finding.check for finding in found] == ["one", "two", "token"]
    assert found[1].code == "internal" and "oops" in found[1].text


def test_a_check_that_hangs_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hangs(_: Patient) -> list[Finding]:
        await asyncio.Event().wait()
        return [problem("token", "never", "", "")]

    monkeypatch.setattr(examination, "CHECKS", ())
    monkeypatch.setattr(examination, "WITHIN_S", 0.05)
    monkeypatch.setattr(token, "check", hangs)
    assert codes(asyncio.run(examination.examine(Patient(Settings()), lambda finding: None))) == ["hangs"]
