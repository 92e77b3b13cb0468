"""Bad input gets one clear sentence and a remedy, exit 1 or 2, and changes nothing."""

from __future__ import annotations

import json
import logging
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from mesh.cli import main as command_line
from mesh.cli.main import _run, cli
from mesh.identity.invite import InviteBook, create_invite
from mesh.identity.key import NodeKey

KEY = NodeKey.from_seed(bytes(32))


@pytest.fixture(autouse=True)
def private_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test here sees the user's models, engine or state; logging is as it was afterwards."""
    for name, place in (("MESH_MODELS_DIR", "models"), ("MESH_CACHE_DIR", "cache"), ("XDG_STATE_HOME", "state")):
        monkeypatch.setenv(name, str(tmp_path / place))
    (tmp_path / "models").mkdir()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def token(expires_s: float = 3600) -> str:
    invite = create_invite(
        InviteBook(None), mesh=KEY.id, inviter=KEY.public, addresses=("127.0.0.1:9",),
        randomness=lambda n: bytes(n), wall=1_700_000_000, lifetime_s=expires_s,
    )  # fmt: skip
    return invite.encode()


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and the one error of a command, which must be all that it says."""
    code = _run(list(arguments))
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert lines[0].startswith("error: "), said
    assert all(line.startswith("       ") for line in lines[1:]), "one sentence, and what to do"
    assert said.out == ""
    return code, said.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["up", "--frobnicate"], ["no such option", "--frobnicate", "mesh up --help"]),
        (["upp"], ["no such command 'upp'", "did you mean 'up'"]),
        (["models", "lst"], ["no such command 'lst'", "mesh models --help"]),
        (["up", "extra"], ["unexpected extra argument", "extra"]),
        (["up", "--model"], ["--model", "requires an argument"]),
        (["up", "--model", ""], ["--model", "empty"]),
        (["up", "--max-memory", "lots"], ['"lots" is not a size', "12GB"]),
        (["up", "--max-memory", "-1GB"], ['"-1GB" is not a size']),
        (["up", "--ctx-size", "many"], ["--ctx-size", "many"]),
        (["up", "--ctx-size", "0"], ["--ctx-size"]),
        (["up", "--parallel", "1000"], ["--parallel", "256"]),
        (["up", "--bind-port", "70000"], ["--bind-port", "65535"]),
        (["up", "--api-port", "x"], ["--api-port"]),
        (["up", "--split", "maybe"], ["--split", "auto"]),
        (["up", "--backend", "abacus"], ["--backend", "vulkan"]),
        (["up", "--gpu-layers", "-3"], ["--gpu-layers"]),
        (["up", "--model", "x", "--demo"], ["--model and --demo"]),
        (["up", "--wire-dtype", "bf16"], ["--wire-dtype", "f16"]),
        (["up", "--relay-only", "--demo"], ["--relay-only computes nothing", "leave out"]),
        (["up", "--name", "a\nb"], ["--name", "printable"]),
        (["up", "--advertise", "foo:x"], ["'foo:x' is not an address", "192.168.1.5:7842"]),
        (["up", "--join", "hello"], ["not an invite token", "mesh invite"]),
        (["up", "--join", token()[:-1]], ["typo, or a part of it is missing"]),
        (["up", "--join", token().replace("mesh1", "mesh2")], ["version 2", "update this machine"]),
        (["client"], ["needs a mesh to use", "mesh invite --role client"]),
        (["client", "--demo"], ["no such option", "--demo"]),
        (["invite", "--uses", "0"], ["--uses"]),
        (["invite", "--expires", "soon"], ['"soon" is not a length of time', "1h"]),
        (["invite", "--role", "king"], ["--role", "worker"]),
        (["revoke"], ["NODE"]),
        (["models", "inspect"], ["PATH|NAME"]),
        (["models", "demo", "--shards", "0"], ["--shards"]),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_sentence_and_exit_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    code, text = refusal(capsys, *arguments)
    assert code == 2
    for word in words:
        assert word in text
    assert not (tmp_path / "state" / "mesh" / "mesh.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["status"], ["invite"], ["down"], ["revoke", "attic"], ["approve", "1234"], ["bench"], ["status", "--json"],
        ["invite", "--json"], ["revoke", "attic", "--json"], ["bench", "--json"],
    ],
)  # fmt: skip
def test_a_command_without_a_node_says_how_to_start_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]
) -> None:
    code = _run([*arguments, "--state-dir", str(tmp_path / "nothing")])
    said = capsys.readouterr()
    if "--json" in arguments:
        error = json.loads(said.out)["error"]
        assert error["code"] == "state"
        assert "mesh up" in error["remedy"]
    else:
        assert said.err.startswith(f"error: no node is running in {tmp_path / 'nothing'}\n")
        assert "mesh up" in said.err
    assert code == 1
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(("arguments", "words"), [(["logs"], "no logs"), (["leave"], "belongs to no mesh")])
def test_a_state_directory_with_nothing_in_it_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], words: str
) -> None:
    code, text = refusal(capsys, *arguments, "--state-dir", str(tmp_path / "nothing"))
    assert code == 1
    assert words in text
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["is empty", "compare its size"]),
        (b"hello, I am a text\n" * 10, ["is not a GGUF file"]),
        (b"GGUF" + struct.pack("<I", 99) + bytes(100), ["GGUF version 99"]),
        (b"GGUF" + struct.pack("<IQQ", 3, 5, 7) + bytes(10), ["truncated"]),
    ],
)
def test_a_file_that_is_no_whole_model_is_named_before_anything_is_built(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, words: list[str]
) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(content)
    code, text = refusal(capsys, "up", "--model", str(file), "--api-port", "0", "--bind-port", "0")
    assert code == 1
    assert str(file) in text
    for word in words:
        assert word in text
    assert not (tmp_path / "state" / "mesh" / "mesh.json").exists()
    assert not (tmp_path / "cache" / "engine").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing.gguf", ["there is no file nothing.gguf", "mesh models list"]),
        (".", ["is a directory"]),
        ("qwen", ['there is no model "qwen"', "mesh up --demo"]),
    ],
)
def test_a_model_that_is_not_there_is_named(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = refusal(capsys, "up", "--model", name, "--api-port", "0", "--bind-port", "0")
    assert code == 1
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ('bind_prt = "x"', ['no setting "bind_prt"', 'did you mean "bind_port"']),
        ("colour = 1", ['no setting "colour"', "known: ", "ctx_size"]),
        ('bind_port = "x"', ["bind_port must be a whole number, not 'x'"]),
        ("name = 3", ["name must be text in quotes, not 3"]),
        ("plain = 3", ["plain must be true or false"]),
        ('max_memory = "12 potatoes"', ["max_memory", '"12 potatoes" is not a size']),
        ("x = [", ["is not TOML"]),
        ('demo = true\nmodel = "x"', ["--model and --demo"]),
    ],
)
def test_a_config_file_that_is_wrong_is_named_with_its_setting(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, toml: str, words: list[str]
) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text(toml)
    code, text = refusal(capsys, "up", "--config", str(file))
    assert code == 2
    for word in words:
        assert word in text


def test_a_config_file_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, text = refusal(capsys, "up", "--config", str(tmp_path / "no.toml"))
    assert code == 2
    assert "cannot read" in text
    assert "no.toml" in text


@pytest.mark.parametrize(
    ("content", "words"), [(None, "cannot read the API keys"), ("# none yet\n", "holds no API key")]
)
def test_an_api_key_file_without_keys_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | None, words: str
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    code, text = refusal(capsys, "up", "--demo", "--api-key-file", str(file))
    assert code == 2
    assert words in text


def test_a_taken_api_port_is_named_with_the_flag(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, text = refusal(capsys, "up", "--demo", "--api-port", str(port), "--bind-port", "0")
    assert code == 1
    assert f"port {port}" in text
    assert "--api-port" in text
    assert not (tmp_path / "state" / "mesh" / "mesh.json").exists()


def test_a_taken_udp_port_is_named_with_the_flag(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("0.0.0.0", 0))
        port = taken.getsockname()[1]
        code, text = refusal(capsys, "up", "--demo", "--api-port", "0", "--bind-port", str(port))
    assert code == 1
    assert f"UDP port {port}" in text
    assert "--bind-port" in text
    assert not (tmp_path / "state" / "mesh" / "mesh.json").exists()


def test_an_address_that_is_not_ours_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = refusal(capsys, "up", "--demo", "--api-port", "0", "--bind-port", "0", "--bind-host", "192.0.2.77")
    assert code == 1
    assert "192.0.2.77" in text
    assert "--bind-host" in text


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_state_directory_that_cannot_be_one_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("")
    code, text = refusal(capsys, "up", "--demo", "--state-dir", str(tmp_path / place))
    assert code == 1
    assert str(tmp_path / place) in text
    assert "--state-dir DIR" in text


def test_tokens_of_two_meshes_contradict_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    other = NodeKey.from_seed(bytes([1]) * 32)
    second = create_invite(
        InviteBook(None), mesh=other.id, inviter=other.public, addresses=("127.0.0.1:9",),
        randomness=lambda n: bytes(n), wall=1_700_000_000, lifetime_s=60,
    ).encode()  # fmt: skip
    code, text = refusal(capsys, "client", "--join", token(), "--join", second, "--api-port", "0", "--bind-port", "0")
    assert code == 2
    assert "different meshes" in text


def test_json_logs_make_the_error_a_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["up", "--join", "hello", "--json-logs"]) == 2
    error = json.loads(capsys.readouterr().out)
    assert error["kind"] == "error"
    assert error["code"] == "not-a-token"


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


@pytest.mark.parametrize("path", list(commands(cli)), ids=" ".join)
def test_every_command_has_help_and_takes_a_state_directory(
    capsys: pytest.CaptureFixture[str], path: tuple[str, ...]
) -> None:
    assert _run([*path, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"Usage: mesh {' '.join(path)}")
    assert "--state-dir" in text


def test_mesh_alone_shows_its_help_and_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run([]) == 2
    assert "mesh up --demo" in capsys.readouterr().err


class SurpriseError(Exception):
    pass


def test_the_unexpected_is_one_line_with_its_traceback_in_the_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(_: Path | None) -> Path:
        raise SurpriseError("the sky fell")

    monkeypatch.setattr(command_line, "_dir", fail)
    monkeypatch.setattr(command_line, "_state_dir_in", lambda _: tmp_path / "here")
    code, text = refusal(capsys, "status")
    log = tmp_path / "here" / "logs" / "mesh.log"
    assert code == 1
    assert text.startswith("error: internal error: SurpriseError: the sky fell\n")
    assert str(log) in text
    assert "Traceback" not in text
    assert "Traceback" in log.read_text()


def test_the_log_of_the_unexpected_is_in_the_directory_that_was_named(tmp_path: Path) -> None:
    for arguments in (["status", "--state-dir", str(tmp_path)], ["status", f"--state-dir={tmp_path}", "--json"]):
        assert command_line._state_dir_in(arguments) == tmp_path
    assert command_line._state_dir_in(["status"]) == tmp_path / "state" / "mesh"


def test_an_interrupt_is_130_and_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: Path | None) -> Path:
        signal.raise_signal(signal.SIGINT)
        return Path()

    monkeypatch.setattr(command_line, "_dir", interrupt)
    assert _run(["status"]) == 130
    assert capsys.readouterr().err.strip() == ""
