"""Two machines and a lite client, as their owners meet them: the same text everywhere, whoever comes and goes."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.net.cli_kit import Place, Up, a_place, wait_until

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    yield from a_place(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def kitchen(place: Place) -> Up:
    """Founds the mesh, around a model file named by its path, which the others have a copy of."""
    model = place.run("models", "demo", "--json").json["paths"][0]
    up = place.start("up", "--model", model, "--split", "always")
    up.wait_for("ready ")
    return up


@pytest.fixture(scope="module")
def solo_text(kitchen: Up) -> str:
    """What the model says while one machine carries it."""
    assert kitchen.status()["layout"]["mode"] == "solo"
    text = kitchen.complete()
    assert len(text) > 20
    return text


@pytest.fixture(scope="module")
def attic(place: Place, kitchen: Up, solo_text: str) -> Up:
    """Joined with a token, and shares the model."""
    up = place.start("up", "--join", kitchen.invite(), name="attic")
    kitchen.wait_serving(ring=2)
    up.wait_serving(ring=2)
    return up


def test_a_split_says_the_same_as_one_machine_on_both(kitchen: Up, attic: Up, solo_text: str) -> None:
    ring = kitchen.status()["layout"]["ring"]
    layers = [n for member in ring if member["layers"] for n in range(member["layers"][0], member["layers"][1] + 1)]
    assert len(ring) == 2
    assert sorted(layers) == list(range(12)), "every layer exactly once"
    assert kitchen.complete() == solo_text
    assert attic.complete() == solo_text


def test_the_screens_say_who_came_and_who_carries_what(kitchen: Up, attic: Up) -> None:
    assert attic.said('joined "kitchen" through kitchen')
    assert kitchen.said('attic is in; "kitchen" has 2 machines')
    assert "+ output >" in kitchen.wait_for("as --split always asks")
    assert attic.said("mesh-demo is on this disk, fingerprint matches")
    assert not attic.said("mesh1"), "a token is shown only by a node that is alone"
    assert attic.said("another machine: mesh invite")


def test_status_shows_the_other_machine(kitchen: Up, attic: Up) -> None:
    (peer,) = kitchen.status()["peers"]
    assert (peer["name"], peer["state"]) == ("attic", "alive")
    assert peer["rtt_ms"] > 0
    assert "attic" in kitchen.run("status").out
    assert "attic" in attic.run("status").out


def test_a_lite_client_has_the_same_text_and_lends_nothing(
    place: Place, kitchen: Up, attic: Up, solo_text: str
) -> None:
    client = place.start("client", "--join", attic.invite("--role", "client"), name="laptop")
    client.wait_for("ready ")
    epoch = kitchen.status()["mesh"]["epoch"]
    assert client.complete() == solo_text
    assert client.status()["node"]["role"] == "client"
    assert client.children() == [], "it runs no engine"
    refused = client.run("invite")
    assert refused.code == 1
    assert "a lite client lets nobody in" in refused.err
    client.signal(signal.SIGTERM)
    assert client.ended() == 0
    assert kitchen.status()["mesh"]["epoch"] == epoch, "a lite client is no change of the layout"


def test_a_spent_token_admits_nobody_else(place: Place, kitchen: Up, attic: Up, tmp_path: Path) -> None:
    token = kitchen.invite()
    first = place.start("client", "--join", token, name="first")
    first.wait_for("joined")
    first.signal(signal.SIGTERM)
    assert first.ended() in (0, 130)
    arguments = ["--state-dir", str(tmp_path), "--api-port", "0", "--bind-port", "0", "--bind-host", "127.0.0.1"]
    second = place.run("client", "--join", token, *arguments)
    assert second.code == 1
    assert "was used up" in second.err
    assert "mesh invite" in second.err
    assert not (tmp_path / "mesh.json").exists()


def test_an_expired_token_admits_nobody(place: Place, kitchen: Up, tmp_path: Path) -> None:
    invited = kitchen.run("invite", "--expires", "1s", "--json").json
    arguments = ["--state-dir", str(tmp_path), "--api-port", "0", "--bind-port", "0", "--bind-host", "127.0.0.1"]
    wait_until(lambda: time.time() > invited["expires_at"] + 1, 10)
    late = place.run("client", "--join", invited["token"], *arguments, within=20)
    assert late.code == 1
    assert "has expired" in late.err


def test_a_node_that_was_killed_leaves_no_engine_and_comes_back_without_a_token(
    place: Place, kitchen: Up, attic: Up, solo_text: str
) -> None:
    epoch = kitchen.status()["mesh"]["epoch"]
    assert attic.children(), "it carries layers"
    attic.signal(signal.SIGKILL)
    assert attic.ended() == -signal.SIGKILL
    kitchen.wait_serving(ring=1)
    assert kitchen.complete() == solo_text
    again = place.start("up", name="attic")
    again.wait_for('back in "kitchen"')
    found = kitchen.wait_serving(ring=2)
    assert found["mesh"]["epoch"] > epoch
    again.wait_serving(ring=2)
    assert again.complete() == solo_text
    assert kitchen.said("back in ")
    again.signal(signal.SIGTERM)
    assert again.ended() == 0
    kitchen.wait_for("attic left")
    kitchen.wait_serving(ring=1)


def test_a_machine_that_was_thrown_out_is_told_and_needs_a_new_invite(place: Place, kitchen: Up) -> None:
    guest = place.start("client", "--join", kitchen.invite("--role", "client"), name="guest")
    guest.wait_for("ready ")
    out = kitchen.run("revoke", "guest", "--json")
    assert out.code == 0
    assert out.json["name"] == "guest"
    assert guest.ended() == 1
    kitchen.wait_for("guest revoked")
    assert "not a member any more" in guest.lines[-2]
    assert "mesh up --join TOKEN" in guest.lines[-1]
    again = place.start("client", name="guest")
    assert again.ended() == 1, "nor does it come back by itself"
    back = place.start("client", "--join", kitchen.invite("--role", "client"), name="guest")
    back.wait_for("ready ")
    back.signal(signal.SIGTERM)
    assert back.ended() == 0


def test_a_first_mesh_without_members_gives_way_to_a_token(place: Place, kitchen: Up) -> None:
    """Who tried `mesh up` alone first can still join."""
    alone = place.start("up", name="newcomer")
    alone.wait_for('founded "newcomer"')
    alone.wait_for("waiting")
    alone.signal(signal.SIGTERM)
    assert alone.ended() == 0
    joined = place.start("up", "--join", kitchen.invite(), name="newcomer")
    joined.wait_for('left "newcomer", where this machine was alone')
    joined.wait_for('joined "kitchen"')
    joined.wait_for("ready ")
    joined.signal(signal.SIGTERM)
    assert joined.ended() == 0


def test_a_member_of_another_mesh_is_not_moved_by_a_token(place: Place, kitchen: Up) -> None:
    """Kitchen has let others in: a token of another mesh does not take it away from them."""
    other = place.start("up", name="other")
    other.wait_for("waiting")
    token = other.invite()
    other.signal(signal.SIGTERM)
    assert other.ended() == 0
    kitchen.signal(signal.SIGTERM)
    assert kitchen.ended() == 0
    before = (kitchen.state / "mesh.json").read_bytes()
    refused = kitchen.run("up", "--join", token, "--api-port", "0", "--bind-port", "0", "--bind-host", "127.0.0.1")
    assert refused.code == 1
    assert 'in another mesh, "kitchen"' in refused.err
    assert "mesh leave" in refused.err
    assert (kitchen.state / "mesh.json").read_bytes() == before
    unreachable = place.run(
        "client", "--join", token, "--state-dir", str(place.root / "far"), "--api-port", "0", "--bind-port", "0"
    )
    assert unreachable.code == 1
    assert "cannot be reached" in unreachable.err
    assert "firewall" in unreachable.err
    assert not (place.root / "far" / "mesh.json").exists()
