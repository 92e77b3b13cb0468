"""``mesh doctor`` on machines with something wrong: it finds each planted fault, and what it says to do mends it.

The faults are real ones (sockets, files, modes, processes, disks, two real nodes), but for the GPU, which is recorded.
A remedy that is a command of this project, of the shell or of the file system is typed as it stands.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest

from mesh.engine.cache import entry_dir, executable
from mesh.supervise.registry import process_mark
from tests.net.cli_kit import MESH, Place, Result, Up, a_place, wait_until
from tests.ports import free_port

Findings = dict[str, dict[str, Any]]


class Clinic:
    """A place of its own, with a demo model and no STUN server but those a test names."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.models = place.root / "models"
        self.state = place.root / "kitchen"
        place.environment["MESH_STUN"] = "none"
        self.ports = ["--bind-port", str(free_port()), "--api-port", str(free_port())]

    def doctor(self, *arguments: str, code: int | None = None, patch: str = "", **environment: str) -> Findings:
        """Findings that are not ``ok``, by their code."""
        done = subprocess.run(
            [*(MESH if not patch else (sys.executable, "-c", PATCHED.format(patch))), "doctor", "--json",
             "--state-dir", str(self.state), *self.ports, *arguments],
            env={**self.place.environment, **environment}, capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        found = json.loads(done.stdout)["findings"]
        bad = {finding["code"]: finding for finding in found if finding["level"] != "ok"}
        assert all(finding["remedy"] for finding in bad.values()), bad
        assert done.returncode == (1 if any(f["level"] == "problem" for f in bad.values()) else 0)
        if code is not None:
            assert done.returncode == code, bad
        return bad

    def type(self, remedy: str) -> Result:
        """The first line of a remedy, as a person types it: up to the remark behind it."""
        line = re.split(r" {3,}\(", remedy.splitlines()[0])[0]
        mesh = self.place.root / "bin" / "mesh"
        mesh.parent.mkdir(exist_ok=True)
        mesh.write_text(f'#!/bin/sh\nexec {shlex.join(MESH)} "$@"\n')
        mesh.chmod(0o755)
        path = f"{mesh.parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["sh", "-c", line], env={**self.place.environment, "PATH": path}, capture_output=True, text=True, timeout=60
        )
        return Result(done.returncode, done.stdout, done.stderr)


PATCHED = "{}\nfrom mesh.cli.main import main; main()"


@pytest.fixture
def clinic(tmp_path: Path) -> Iterator[Clinic]:
    for place in a_place(tmp_path):
        clinic = Clinic(place)
        assert place.run("models", "demo").code == 0
        yield clinic


# -- nothing wrong ---------------------------------------------------------------------------------------------------


def test_on_a_healthy_machine_nothing_is_wrong_and_it_takes_seconds(clinic: Clinic) -> None:
    began = time.monotonic()
    assert set(clinic.doctor(code=0)) <= {"on-battery", "saving"}
    assert time.monotonic() - began < 30  # one second where nobody else computes


def test_looking_changes_nothing(clinic: Clinic) -> None:
    shutil.rmtree(clinic.models)
    clinic.doctor(code=0)
    assert not clinic.models.exists() and not clinic.state.exists()


# -- ports -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
def test_a_port_that_another_program_has(clinic: Clinic, kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_INET, kind) as other:
        other.bind(("", 0))
        if kind == socket.SOCK_STREAM:
            other.listen()
        number = other.getsockname()[1]
        flag = "--bind-port" if kind == socket.SOCK_DGRAM else "--api-port"
        finding = clinic.doctor(flag, str(number), code=1)["port-taken"]
        assert f"pid {os.getpid()}" in finding["text"] and str(number) in finding["text"]
        wanted = re.fullmatch(rf"mesh up {flag} (\d+)", finding["remedy"])
        assert wanted is not None, finding
        assert clinic.doctor(flag, wanted[1], code=0) == {}


def test_a_port_that_another_node_has(clinic: Clinic) -> None:
    node = clinic.place.start("up", "--demo", name="attic")
    node.wait_for("ready")
    port = node.status() and json.loads(node.run("doctor", "--json").out)["findings"]
    bound = next(f["text"] for f in port if f["text"].startswith("this node listens on"))
    number = re.search(r":(\d+)", bound)
    assert number is not None
    finding = clinic.doctor("--bind-port", number[1], code=1)["port-taken"]
    assert "another node" in finding["text"]
    assert f"mesh down --state-dir {node.state}" in finding["remedy"]
    assert clinic.type(finding["remedy"].partition("   or:")[0]).code == 0
    assert node.ended() == 0
    assert clinic.doctor("--bind-port", number[1], code=0) == {}


def test_an_address_that_is_not_this_machines(clinic: Clinic) -> None:
    assert "203.0.113.9" in clinic.doctor("--bind-host", "203.0.113.9", code=1)["no-address"]["text"]


# -- models ----------------------------------------------------------------------------------------------------------


def test_a_truncated_model(clinic: Clinic) -> None:
    model = next(clinic.models.glob("*.gguf"))
    whole = model.read_bytes()
    model.write_bytes(whole[: len(whole) // 2])
    finding = clinic.doctor(code=1)["model-broken"]
    assert str(model) in finding["text"] and "download the file again" in finding["remedy"]
    model.write_bytes(whole)
    assert clinic.doctor(code=0) == {}


def test_a_file_that_is_no_model(clinic: Clinic) -> None:
    (clinic.models / "holiday.gguf").write_bytes(b"PK\x03\x04" + bytes(1000))
    assert "is not a GGUF" in clinic.doctor(code=1)["model-broken"]["text"]


def test_a_shard_that_is_missing(clinic: Clinic) -> None:
    assert clinic.place.run("models", "demo", str(clinic.models / "three.gguf"), "--shards", "3").code == 0
    first, second, _ = sorted(clinic.models.glob("three-*"))
    kept = second.rename(clinic.place.root / "elsewhere.gguf")
    finding = clinic.doctor(code=1)["model-broken"]
    assert second.name in finding["text"] and f"put it into {first.parent}" in finding["remedy"]
    kept.rename(second)
    assert clinic.doctor(code=0) == {}


def test_a_model_that_is_not_there(clinic: Clinic) -> None:
    finding = clinic.doctor("--model", "mesh-dmo", code=1)["model-broken"]
    assert 'did you mean "mesh-demo"?' in finding["remedy"]


def test_a_model_that_changed_since_its_fingerprint(clinic: Clinic) -> None:
    model = next(clinic.models.glob("*.gguf"))
    assert clinic.place.run("models", "inspect", str(model)).code == 0
    with model.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))
    finding = clinic.doctor(code=0)["model-changed"]
    assert str(model) in finding["text"]
    assert clinic.type(finding["remedy"]).code == 0
    assert clinic.doctor(code=0) == {}


def test_a_model_that_changed_under_a_running_node(clinic: Clinic) -> None:
    node = clinic.place.start("up", "--demo")
    node.wait_for("ready")
    model = next(clinic.models.glob("*.gguf"))
    os.utime(model, (1, 1))
    finding = clinic.doctor(code=1)["model-changed"]
    assert "still offers the old one" in finding["text"]
    assert "mesh down" in finding["remedy"]


# -- the engine ------------------------------------------------------------------------------------------------------


def own_engine(clinic: Clinic) -> Path:
    """A copy of the engine in a cache of its own, to be broken."""
    engines = clinic.place.root / "cache" / "engine"
    engines.unlink()
    engines.mkdir()
    real = entry_dir("cpu")
    copy = engines / real.name
    shutil.copytree(real, copy, copy_function=os.link)
    return copy


def spoil(file: Path, content: bytes) -> None:
    mode = file.stat().st_mode
    file.unlink()  # it is a link to the real one
    file.write_bytes(content)
    file.chmod(mode)


def test_an_engine_that_does_not_run(clinic: Clinic) -> None:
    entry = own_engine(clinic)
    server = executable(entry, "llama-server")
    spoil(server, b"\x7fELF" + bytes(server.stat().st_size - 4))
    finding = clinic.doctor(code=1)["engine-broken"]
    assert (
        clinic.type(finding["remedy"].partition(" && ")[0] if "&&" in finding["remedy"] else f"rm -r {entry}").code == 0
    )
    assert clinic.doctor(code=0)["engine-not-built"]["remedy"] == "mesh engine build --backend cpu"


def test_an_engine_of_which_a_part_is_lost(clinic: Clinic) -> None:
    entry = own_engine(clinic)
    spoil(executable(entry, "ggml-rpc-server"), b"half")
    finding = clinic.doctor(code=1)["engine-damaged"]
    assert "has 4 bytes and should have" in finding["text"]
    assert finding["remedy"] == "mesh engine build --backend cpu"


def test_no_compiler_and_nothing_built(clinic: Clinic) -> None:
    engines = clinic.place.root / "cache" / "engine"
    engines.unlink()
    engines.mkdir()
    tools = clinic.place.root / "tools"
    tools.mkdir()
    finding = clinic.doctor(code=1, PATH=str(tools), CXX="")["toolchain"]
    assert "a C++ compiler" in finding["text"]
    assert re.search(r"apt install|dnf install|pacman|zypper|apk add|g\+\+|xcode-select", finding["remedy"])


def test_no_compiler_but_an_engine_is_a_warning(clinic: Clinic) -> None:
    tools = clinic.place.root / "tools"
    tools.mkdir()
    finding = clinic.doctor(code=0, PATH=str(tools), CXX="")["toolchain"]
    assert "the one that is built works" in finding["text"]


def test_a_gpu_that_the_engine_cannot_use(clinic: Clinic) -> None:
    gpu = clinic.place.root / "pci" / "0000:01:00.0"
    (gpu / "nvidia").mkdir(parents=True)
    (gpu / "driver").symlink_to(gpu / "nvidia")
    for name, text in {"vendor": "0x10de", "device": "0x2684", "class": "0x030000"}.items():
        (gpu / name).write_text(text)
    patch = (
        "import mesh.hardware, pathlib\n"
        f"found = mesh.hardware.on_the_bus(pathlib.Path({str(gpu.parent)!r}))\n"
        "mesh.hardware.on_the_bus = lambda: found"
    )
    finding = clinic.doctor(patch=patch, code=0)["gpu-idle"]
    assert "NVIDIA GPU 0x2684" in finding["text"]
    assert finding["remedy"] == "mesh engine build --backend cuda"
    tried = clinic.type(finding["remedy"])  # on a machine that has none it must say what it lacks, and at once
    assert tried.code == 1 and "the engine cannot be built for cuda here: missing" in tried.err


# -- memory, disk, modes ---------------------------------------------------------------------------------------------


def test_memory_that_holds_nothing(clinic: Clinic) -> None:
    finding = clinic.doctor("--max-memory", "10MB", code=0)["max-memory"]
    size = re.match(r"mesh up --max-memory (\S+)", finding["remedy"])
    assert size is not None
    assert clinic.doctor("--max-memory", size[1], code=0) == {}


def test_a_container_with_little_memory(clinic: Clinic) -> None:
    patch = (
        "from mesh.hardware import cpu\nfrom mesh.hardware.cgroup import Limits\n"
        "cpu._limits = lambda: Limits(300_000_000, 200_000_000)"
    )
    finding = clinic.doctor(patch=patch, code=0)["little-memory"]
    assert "limited by its container" in finding["text"] and "container more memory" in finding["remedy"]


@pytest.mark.lab
@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root and unshare"
)
def test_a_full_disk(clinic: Clinic) -> None:
    clinic.state.mkdir()
    script = (
        f"mount -t tmpfs -o size=64k none {clinic.state} && head -c 60k /dev/zero > {clinic.state}/full;"
        f"cat /dev/zero > {clinic.state}/more 2>/dev/null; exec {shlex.join(MESH)} doctor --json"
        f" --state-dir {clinic.state} {shlex.join(clinic.ports)}"
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], env=clinic.place.environment, capture_output=True, text=True, timeout=60
    )
    finding = next(f for f in json.loads(done.stdout)["findings"] if f["check"] == "disk" and f["level"] == "problem")
    assert (done.returncode, finding["code"]) == (1, "unwritable")
    assert "No space left" in finding["text"] and "du -xh" in finding["remedy"]
    assert "--state-dir" in finding["remedy"]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_a_key_that_others_can_read(clinic: Clinic) -> None:
    node = clinic.place.start("up", "--demo")
    node.wait_for("ready")
    node.signal(signal.SIGTERM)
    node.ended()
    assert clinic.doctor(code=0) == {}
    (clinic.state / "node.key").chmod(0o644)
    finding = clinic.doctor(code=1)["state-unreadable"]
    command = finding["remedy"].rpartition(":  ")[2]
    assert clinic.type(command).code == 0
    clinic.state.chmod(0o755)
    finding = clinic.doctor(code=0)["open-state"]
    assert clinic.type(finding["remedy"]).code == 0
    assert clinic.doctor(code=0) == {}


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_api_keys_that_others_can_read(clinic: Clinic) -> None:
    keys = clinic.place.root / "keys"
    assert "cannot read" in clinic.doctor("--api-key-file", str(keys), code=1)["api-keys"]["text"]
    keys.write_text("secret\n")
    keys.chmod(0o644)
    finding = clinic.doctor("--api-key-file", str(keys), code=0)["open-api-keys"]
    assert clinic.type(finding["remedy"]).code == 0
    assert clinic.doctor("--api-key-file", str(keys), code=0) == {}


# -- processes -------------------------------------------------------------------------------------------------------


def test_a_state_directory_that_somebody_holds(clinic: Clinic) -> None:
    clinic.state.mkdir(mode=0o700)
    script = f"import filelock, sys; lock = filelock.FileLock({str(clinic.state / 'lock')!r}); lock.acquire()"
    holding = subprocess.Popen(
        [sys.executable, "-c", f"{script}; print('held', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with contextlib.closing(holding.stdin or sys.stdin):
        assert holding.stdout is not None and holding.stdout.readline() == "held\n"
        finding = clinic.doctor(code=1)["locked"]
        assert finding["remedy"] == f"kill {holding.pid}"
        assert clinic.type(finding["remedy"]).code == 0
        holding.wait(10)
    assert clinic.doctor(code=0) == {}
    with filelock.FileLock(clinic.state / "lock", timeout=0):
        pass


def test_engine_processes_that_a_crash_left(clinic: Clinic) -> None:
    clinic.state.mkdir(mode=0o700)
    left = subprocess.Popen(["sleep", "600"])
    try:
        entry = {"pid": left.pid, "mark": process_mark(left.pid), "kind": "rpc-server"}
        (clinic.state / "engine-processes.json").write_text(json.dumps([entry]))
        finding = clinic.doctor(code=0)["left-over"]
        assert clinic.type(f"kill {left.pid}").code == 0 and f"kill {left.pid}" in finding["remedy"]
    finally:
        left.kill()
        left.wait(10)
    assert clinic.doctor(code=0) == {}


@pytest.mark.skipif(os.name != "posix", reason="needs SIGSTOP")
def test_a_node_that_hangs(clinic: Clinic) -> None:
    node = clinic.place.start("up", "--demo")
    node.wait_for("ready")
    node.signal(signal.SIGSTOP)
    try:
        patch = "import mesh.cli.remote as r\nr._ask.__defaults__ = (1.0,)"
        finding = clinic.doctor(patch=patch, code=1)["node-silent"]
        assert f"kill {node.process.pid}" in finding["remedy"]
    finally:
        node.signal(signal.SIGCONT)


# -- the network -----------------------------------------------------------------------------------------------------


def test_stun_servers_that_do_not_answer(clinic: Clinic) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mute:
        mute.bind(("127.0.0.1", 0))
        finding = clinic.doctor(code=0, MESH_STUN=f"127.0.0.1:{mute.getsockname()[1]}")["stun-silent"]
    last = finding["remedy"].splitlines()[-1]
    assert "MESH_STUN=none" in last
    assert clinic.doctor(code=0, MESH_STUN="none") == {}


SKEWED = "import mesh.clock, time\nmesh.clock.SystemClock.wall = lambda self: time.time() + 3600"
OTHER_PIN = "import mesh.node.facts\nmesh.node.facts.engine_pin = lambda: '7f3a00000000'"


def start_patched(place: Place, patch: str, *arguments: str, name: str) -> Up:
    """A node whose program was changed in one place before it began."""
    from tests.net import cli_kit

    before = cli_kit.MESH
    cli_kit.MESH = (sys.executable, "-c", PATCHED.format(patch))  # type: ignore[assignment]
    try:
        return place.start(*arguments, name=name)
    finally:
        cli_kit.MESH = before


def test_a_member_with_another_engine_and_another_clock(clinic: Clinic) -> None:
    node = clinic.place.start("up", "--demo")
    node.wait_for("ready")
    token = node.invite()
    attic = start_patched(clinic.place, f"{SKEWED}\n{OTHER_PIN}", "up", "--join", token, name="attic")
    node.wait_for("attic is in")

    def both() -> dict[str, Any]:
        findings = clinic.doctor()
        return findings if {"clock-skew", "engine-pin"} <= findings.keys() else {}

    found = wait_until(both, 20, "both")
    assert "attic's clock is 60 min ahead of this machine's" in found["clock-skew"]["text"]
    assert "date -u" in found["clock-skew"]["remedy"]
    assert "attic runs engine 7f3a0000" in found["engine-pin"]["text"]
    assert found["engine-pin"]["remedy"] == "on attic:  git pull && bin/mesh engine build"
    assert attic.process.poll() is None


def test_every_link_is_tried(clinic: Clinic) -> None:
    node = clinic.place.start("up", "--demo")
    node.wait_for("ready")
    attic = clinic.place.start("up", "--join", node.invite(), name="attic")
    node.wait_for("attic is in")
    texts = [f["text"] for f in node.run("doctor", "--json").json["findings"] if f["check"] == "links"]
    assert len(texts) == 1 and re.search(r"attic over (tcp|quic): \d+\.\d ms there and back, \d+ MB/s", texts[0])
    attic.signal(signal.SIGSTOP)
    try:
        found = clinic.doctor()  # it depends on when it looks: members are given up after some seconds
        finding = next(found[code] for code in ("link-dead", "suspect", "gone") if code in found)
        assert "attic" in finding["text"] and "mesh doctor" in finding["remedy"]
    finally:
        attic.signal(signal.SIGCONT)


def test_it_works_while_a_node_serves_and_says_so(clinic: Clinic) -> None:
    node = clinic.place.start("up", "--demo")
    node.wait_for("ready")
    found = node.run("doctor", "--json").json
    texts = {(f["check"], f["code"]): f["text"] for f in found["findings"]}
    assert "serving" in texts["node", "ok"]
    assert found["problems"] == 0
    assert any(f["check"] == "token" and "CPU computes" in f["text"] for f in found["findings"])
