"""One node in the user's hands: start, ask, stop, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.net.cli_kit import MESH, Place, Up, a_place, lines_of, wait_until

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    yield from a_place(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def node(place: Place) -> Iterator[Up]:
    """Serving the demo model; stopped by `mesh down` at the end, which is a test in itself."""
    up = place.start("up", "--demo")
    up.wait_for("ready ")
    yield up
    up.children()
    done = up.run("down")
    assert (done.code, done.out) == (0, "stopped\n")
    assert up.ended(1) == 0


def test_the_screen_says_what_happens_in_order(node: Up) -> None:
    node.wait_for("invite ")  # it is written to disk first, which may take a moment longer than to be ready
    kinds = [line.split()[0] for line in node.lines if not line.startswith(" ")]
    assert kinds[:6] == ["model", "model", "mesh", "plan", "ready", "invite"]
    assert node.said('founded "kitchen"')
    assert node.said("all 12 layers on this machine")
    assert node.said(f"{node.api.replace('127.0.0.1', 'localhost')}/v1   mesh-demo, hosted here")


def test_the_api_answers(node: Up) -> None:
    assert len(node.complete()) > 10


def test_status_is_the_contract_and_reads_well(node: Up) -> None:
    found = node.status()
    assert found["mesh"]["state"] == "serving"
    assert found["node"]["role"] == "host"
    assert [tuple(member["layers"]) for member in found["layout"]["ring"]] == [(0, 11)]
    text = node.run("status").out
    assert "kitchen  host  mesh" in text
    assert "serving" in text
    assert "0-11" in text


def test_the_plan_of_a_running_node_can_be_tried_with_other_settings(node: Up) -> None:
    assert node.run("plan", "--json").json["layout"]["mode"] == "solo"
    larger = node.run("plan", "--ctx-size", "6000", "--json").json["layout"]
    assert larger["ctx_size"] == 6000
    named = node.run("plan", "--model", "mesh-demo", "--parallel", "1")
    assert "context 4096 x 1" in named.out
    short = node.run("plan", "--max-memory", "40MB")
    assert short.code == 1
    assert "missing on kitchen" in short.out
    refused = node.run("plan", "--backend", "cpu")
    assert refused.code == 2
    assert "cannot be tried out" in refused.err


def test_an_invite_is_one_line_to_paste(node: Up) -> None:
    made = node.run("invite", "--uses", "2", "--expires", "10m")
    (line,) = lines_of(made.out)
    assert line.startswith("mesh up --join mesh1")
    assert "works 2 times" in made.err
    as_json = node.run("invite", "--role", "client", "--json").json
    assert set(as_json) == {"token", "expires_at", "uses", "role"}
    assert as_json["role"] == "client"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("revoke", "nobody"), 2, '"nobody"'),
        (("revoke", "kitchen"), 2, "mesh leave"),
        (("approve", "1234"), 2, "eight letters and digits"),
        (("approve", "0000-0000"), 1, "no machine asks to be let in"),
    ],
)
def test_what_the_node_refuses_is_told_in_its_words(
    node: Up, arguments: tuple[str, ...], code: int, words: str
) -> None:
    refused = node.run(*arguments)
    assert refused.err.startswith("error: ")
    assert words in refused.err
    assert refused.code == code


def test_doctor_finds_the_node_and_nothing_wrong(node: Up) -> None:
    findings = {f["check"]: f for f in node.run("doctor", "--json").json["findings"]}
    assert "serving" in findings["node"]["text"]
    assert findings["engine"]["level"] == "ok"
    assert "mesh-demo" in findings["models"]["text"]
    assert node.run("doctor").code == 0


def test_bench_measures_through_the_api(node: Up) -> None:
    figures = node.run("bench", "--runs", "1", "--tokens", "8", "--json").json
    assert figures["generation_tok_per_s"] > 0
    assert figures["prompt_tok_per_s"] > 0
    assert figures["time_to_first_token_ms"] > 0


def test_models_are_listed_and_inspected(node: Up) -> None:
    assert [model["name"] for model in node.place.run("models", "list", "--json").json["models"]] == ["mesh-demo"]
    assert "mesh-demo" in node.place.run("models", "list").out
    inspected = node.place.run("models", "inspect", "mesh-de", "--json").json
    assert inspected["n_layers"] == 12
    wrong = node.place.run("models", "inspect", "mesh-dmo")
    assert wrong.code == 1
    assert 'did you mean "mesh-demo"?' in wrong.err


def test_the_log_has_what_was_shown_but_not_the_token(node: Up) -> None:
    text = node.run("logs").out
    assert "all 12 layers on this machine" in text
    assert "llama-server" in text
    assert "mesh1" not in text


def test_logs_can_be_followed_until_interrupted(node: Up) -> None:
    command = [*MESH, "logs", "-f", "--state-dir", str(node.state)]
    with subprocess.Popen(
        command, env=node.place.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as follower:
        assert follower.stdout is not None
        assert b"mesh" in follower.stdout.readline()
        follower.send_signal(signal.SIGINT)
        _, said = follower.communicate(timeout=10)
    assert follower.returncode == 130
    assert said.strip() == b""


@pytest.mark.parametrize("command", ["status", "logs"])
def test_whoever_reads_a_command_may_stop_reading(node: Up, command: str) -> None:
    arguments = [*MESH, command, "--state-dir", str(node.state)]
    with subprocess.Popen(arguments, env=node.place.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as one:
        assert one.stdout is not None
        one.stdout.close()
        assert one.stderr is not None
        assert one.stderr.read() == b""


def test_a_second_node_on_the_same_directory_is_refused(node: Up) -> None:
    refused = node.run("up", "--demo")
    assert refused.code == 1
    assert f"{node.state} is in use by a running node" in refused.err
    assert node.status()["mesh"]["state"] == "serving"


@pytest.mark.parametrize("flag", ["--api-port", "--bind-port"])
def test_a_port_of_the_running_node_is_refused_to_another(node: Up, tmp_path: Path, flag: str) -> None:
    udp = next(
        c.laddr.port for c in psutil.Process(node.process.pid).net_connections("udp") if c.laddr.ip == "127.0.0.1"
    )
    ports = {
        "--api-port": "0",
        "--bind-port": "0",
        flag: node.api.rpartition(":")[2] if flag == "--api-port" else str(udp),
    }
    arguments = [part for pair in ports.items() for part in pair]
    refused = node.place.run("up", "--demo", "--bind-host", "127.0.0.1", "--state-dir", str(tmp_path / "b"), *arguments)
    assert refused.code == 1
    assert ports[flag] in refused.err
    assert flag in refused.err
    assert not (tmp_path / "b" / "mesh.json").exists()


def test_nothing_of_a_node_listens_beyond_loopback(node: Up) -> None:
    processes = [psutil.Process(node.process.pid), *node.children()]
    heard = {
        c.laddr.ip for process in processes for c in process.net_connections("inet") if c.status in ("LISTEN", "NONE")
    }
    assert heard <= {"127.0.0.1", "::1"}


# -- endings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_stop_by_signal_is_clean_and_exits_0(place: Place, number: signal.Signals) -> None:
    up = place.start("up", "--demo", "--json-logs", name="ending")
    ready = json.loads(up.wait_for('"ready"'))
    assert up.children(), "an engine runs"
    up.signal(number)
    assert up.ended() == 0
    assert json.loads(up.lines[-1])["text"].startswith("stopping")
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(ready["api"].split(":")[2].split("/")[0]))) != 0
    assert not (up.state / "node.json").exists()


def test_a_second_interrupt_ends_it_at_once_with_130(place: Place) -> None:
    up = place.start("up", "--demo", name="ending")
    up.wait_for("ready ")
    up.signal(signal.SIGINT)
    up.wait_for("stopping")
    up.signal(signal.SIGINT)
    assert up.ended() in (0, 130), "0 when the first was faster"


def test_sigkill_leaves_no_engine_and_the_next_start_serves_again(place: Place) -> None:
    up = place.start("up", "--demo", name="killed")
    up.wait_for("ready ")
    up.signal(signal.SIGKILL)
    assert up.ended() == -signal.SIGKILL
    gone = up.run("status")
    assert gone.code == 1
    assert "no node is running" in gone.err
    again = place.start("up", "--demo", name="killed")
    again.wait_for("ready ")
    assert again.said('back in "killed"')
    assert again.status()["mesh"]["epoch"] >= 2
    again.signal(signal.SIGTERM)
    assert again.ended() == 0


def test_a_node_that_prepares_can_be_told_from_one_that_is_not_there_and_be_stopped(place: Place) -> None:
    """The state directory is held, and nothing answers: as during a build, which a stopped process stands in for."""
    up = place.start("up", "--demo", name="preparing")
    # On a fast machine the moment may be over before it is seen: then only the stop is tried.
    wait_until((up.state / "node.json").exists)
    os.kill(up.process.pid, signal.SIGSTOP)
    try:
        early = not json.loads((up.state / "node.json").read_text())["api_url"]
        asked = up.run("status")
    finally:
        os.kill(up.process.pid, signal.SIGCONT)
    if early:
        assert asked.code == 1
        assert "still preparing" in asked.err
    assert up.run("down").code == 0
    assert up.ended(1) in (0, 130)


def test_a_model_that_fits_nowhere_leaves_the_node_waiting_with_what_is_missing(place: Place) -> None:
    up = place.start("up", "--demo", "--max-memory", "60MB", name="small")
    line = up.wait_for("plan ")
    assert "waiting: mesh-demo needs" in line
    assert "missing on small" in line
    found = up.status()
    assert found["mesh"]["state"] == "waiting"
    assert "missing on small" in found["mesh"]["reason"]
    assert found["layout"] is None
    assert up.said("mesh up --join mesh1"), "another machine is what helps"
    up.signal(signal.SIGTERM)
    assert up.ended() == 0


def test_leaving_works_with_and_without_a_running_node(place: Place) -> None:
    up = place.start("up", name="leaver")
    up.wait_for("no machine names a model")
    up.children()
    left = up.run("leave")
    assert (left.code, left.out) == (0, "left the mesh and stopped\n")
    assert up.ended(1) == 0
    assert not (up.state / "mesh.json").exists()
    again = up.run("leave")
    assert again.code == 1
    assert "belongs to no mesh" in again.err


def test_a_plan_needs_no_running_node(place: Place) -> None:
    made = place.run("models", "demo", str(place.root / "plan.gguf"), "--json").json
    planned = place.run("plan", "--model", made["paths"][0], "--json", "--state-dir", str(place.root / "none"))
    assert planned.code == 0
    assert planned.json["layout"]["mode"] == "solo"
    assert not (place.root / "none").exists()
