from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.config import format_size, load_settings, parse_duration, parse_size
from mesh.errors import UsageError
from mesh.proxy.keys import read_api_keys


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("1024", 1024), ("4GB", 4_000_000_000), ("1.5 GiB", 1_610_612_736), ("800m", 800_000_000), ("2k", 2000)],
)
def test_a_size_is_read_as_people_write_it(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "4 gigs", "1e9", "NaN"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1h", 3600), ("7d", 604800), ("0.5h", 1800)])
def test_a_duration_is_read_as_people_write_it(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


# A size printed for people reads back within the three digits it shows.
@given(st.integers(min_value=0, max_value=10**14))
def test_printed_sizes_read_back(size: int) -> None:
    assert abs(parse_size(format_size(size)) - size) <= size * 0.0051


def test_a_flag_beats_the_file_which_beats_the_default(tmp_path: Path) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text('name = "attic"\nmax-memory = "4GB"\napi_port = 1\nbind-host = "127.0.0.1"\n')
    settings = load_settings({"api_port": 2, "name": None}, file)
    assert (settings.name, settings.max_memory, settings.api_port) == ("attic", 4_000_000_000, 2)
    assert settings.bind_host == ("127.0.0.1",)
    assert settings.bind_port == 7842


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nmae = 'x'", 'no setting "nmae"'),
        ("api_port = 'x'", "whole number"),
        ("name = [", "not TOML"),
        ("split = 'maybe'", "--split"),
        ("api_port = 70000", "not a port"),
        ("model = 'x'\ndemo = true", "--demo"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_settings({}, file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml"):
        load_settings({}, tmp_path / "none.toml")


def test_stun_servers_come_from_the_file_then_the_environment_then_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text('stun = ["stun.example:3478"]\nrelay_rate = "500KB"\n')
    monkeypatch.setenv("MESH_STUN", "one.example, two.example:1")
    assert load_settings({}, file).stun == ("stun.example:3478",)
    assert load_settings({}, file).relay_rate == 500_000
    assert load_settings({}, None).stun == ("one.example", "two.example:1")
    monkeypatch.setenv("MESH_STUN", "none")
    assert load_settings({}, None).stun == ()
    file.write_text('stun = "none"\n')
    monkeypatch.delenv("MESH_STUN")
    assert load_settings({}, file).stun == ()
    assert len(load_settings({}, None).stun) >= 3


def test_a_relay_takes_no_model_and_needs_a_rate() -> None:
    assert load_settings({"relay_only": True}, None).relay_only
    for wrong in ({"demo": True}, {"model": "x.gguf"}, {"relay_rate": 0}):
        with pytest.raises(UsageError):
            load_settings({"relay_only": True, **wrong}, None)


@pytest.fixture
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MESH_API_KEYS", raising=False)


@pytest.mark.usefixtures("no_keys")
def test_an_api_that_others_reach_wants_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.4", "attic.lan"):
        with pytest.raises(UsageError, match="opens the API to other machines") as caught:
            load_settings({"api_host": host}, None)
        assert "--api-key-file" in (caught.value.remedy or "") and "MESH_API_KEYS" in (caught.value.remedy or "")
        assert load_settings({"api_host": host, "api_key_file": tmp_path / "keys"}, None).api_host == host
    for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        assert load_settings({"api_host": host}, None).api_is_local
    monkeypatch.setenv("MESH_API_KEYS", "one")
    assert load_settings({"api_host": "0.0.0.0"}, None).api_keys == ("one",)
    monkeypatch.setenv("MESH_API_KEYS", " ,\n")
    with pytest.raises(UsageError):
        load_settings({"api_host": "0.0.0.0"}, None)


@pytest.mark.usefixtures("no_keys")
def test_api_keys_come_from_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_API_KEYS", "two, three\nfour,,")
    settings = load_settings({}, None)
    assert settings.api_keys == ("two", "three", "four") and "three" not in repr(settings)
    file = tmp_path / "keys"
    file.write_text("# of the office\n\n one \ntwo\n")
    assert read_api_keys(file, settings.api_keys) == ("one", "two", "three", "four")
    assert read_api_keys(None) == ()


@pytest.mark.usefixtures("no_keys")
def test_api_keys_are_no_setting_of_the_config_file(tmp_path: Path) -> None:
    file = tmp_path / "mesh.toml"
    file.write_text('api_keys = ["secret"]\n')
    with pytest.raises(UsageError, match="no setting"):
        load_settings({}, file)
