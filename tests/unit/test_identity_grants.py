"""Chains of grants and what revocations do to them."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import AdmissionError
from mesh.identity.grants import Roster, found_mesh, is_signed, sign_grant, sign_revocation
from mesh.identity.key import NodeKey
from mesh.wire.facts import Role
from mesh.wire.messages import Grant, Revocation

FOUNDER, ANNA, BEN, CARL, MALLORY = (NodeKey.from_seed(bytes([n]) * 32) for n in range(1, 6))
MESH = FOUNDER.id
ROOT = found_mesh(FOUNDER, wall=1000)


def grant(issuer: NodeKey, subject: NodeKey, wall: float = 1001, role: Role = "worker", expires_at: int = 0) -> Grant:
    return sign_grant(issuer, mesh=MESH, subject=subject.public, role=role, wall=wall, expires_at=expires_at)


def revocation(issuer: NodeKey, subject: NodeKey, wall: float) -> Revocation:
    return sign_revocation(issuer, mesh=MESH, subject=subject.public, wall=wall)


def roster(*grants: Grant) -> Roster:
    fresh = Roster(MESH, FOUNDER.public, [ROOT])
    fresh.add(grants, wall=2000)
    return fresh


def test_the_founder_belongs() -> None:
    assert roster().role_of(FOUNDER.public, 2000) == "worker"


def test_a_chain_leads_to_the_founder() -> None:
    mesh = roster(grant(FOUNDER, ANNA), grant(ANNA, BEN))
    assert mesh.role_of(BEN.public, 2000) == "worker"
    assert [link.subject for link in mesh.chain(BEN.public, 2000)] == [FOUNDER.public, ANNA.public, BEN.public]


def test_order_of_arrival_does_not_matter_within_one_batch() -> None:
    mesh = roster(grant(BEN, CARL), grant(ANNA, BEN), grant(FOUNDER, ANNA))
    assert mesh.role_of(CARL.public, 2000) == "worker"


def test_a_client_cannot_let_anyone_in() -> None:
    mesh = roster(grant(FOUNDER, ANNA, role="client"), grant(ANNA, BEN))
    assert mesh.role_of(ANNA.public, 2000) == "client"
    assert mesh.role_of(BEN.public, 2000) is None


def test_strangers_and_circles_prove_nothing_and_leave_no_trace() -> None:
    mesh = roster(grant(ANNA, BEN), grant(BEN, ANNA), grant(MALLORY, MALLORY))
    assert mesh.role_of(ANNA.public, 2000) is None
    assert mesh.role_of(MALLORY.public, 2000) is None
    assert mesh.grants == (ROOT,)


def test_a_forged_or_altered_grant_is_ignored() -> None:
    good = grant(FOUNDER, ANNA, role="client")
    assert roster(msgspec.structs.replace(good, role="worker")).role_of(ANNA.public, 2000) is None
    assert (
        roster(msgspec.structs.replace(grant(MALLORY, ANNA), issuer=FOUNDER.public)).role_of(ANNA.public, 2000) is None
    )


def test_grants_of_another_mesh_do_not_count() -> None:
    foreign = sign_grant(FOUNDER, mesh=ANNA.id, subject=BEN.public, role="worker", wall=1001)
    assert roster(foreign).role_of(BEN.public, 2000) is None


def test_an_expired_grant_ends_with_everything_hung_on_it() -> None:
    mesh = roster(grant(FOUNDER, ANNA, expires_at=3000), grant(ANNA, BEN))
    assert mesh.role_of(BEN.public, 2999) == "worker"
    assert mesh.role_of(ANNA.public, 3000) is None
    assert mesh.role_of(BEN.public, 3000) is None


def test_a_revocation_ends_its_subject_but_not_those_it_had_let_in() -> None:
    mesh = roster(grant(FOUNDER, ANNA), grant(ANNA, BEN, wall=1100))
    assert mesh.revoke([revocation(FOUNDER, ANNA, wall=1500)], wall=1500) == [ANNA.public]
    assert mesh.role_of(ANNA.public, 2000) is None
    assert mesh.is_revoked(ANNA.public)
    assert mesh.role_of(BEN.public, 2000) == "worker"


def test_a_revoked_issuers_later_grants_are_void() -> None:
    mesh = roster(grant(FOUNDER, ANNA), grant(ANNA, BEN, wall=1600))
    mesh.revoke([revocation(FOUNDER, ANNA, wall=1500)], wall=1600)
    assert mesh.role_of(BEN.public, 2000) is None


def test_an_antedated_grant_of_a_revoked_key_is_refused_from_the_one_it_speaks_for() -> None:
    mesh = roster(grant(FOUNDER, ANNA))
    mesh.revoke([revocation(FOUNDER, ANNA, wall=1500)], wall=1600)
    antedated = grant(ANNA, MALLORY, wall=1200)
    assert not mesh.add([antedated], wall=1700)
    assert mesh.role_of(MALLORY.public, 2000) is None
    assert mesh.add([antedated], wall=1700, vouched=True), "a member had accepted it before the revocation"


def test_a_newer_grant_lets_a_revoked_node_in_again() -> None:
    mesh = roster(grant(FOUNDER, ANNA))
    mesh.revoke([revocation(FOUNDER, ANNA, wall=1500)], wall=1600)
    assert mesh.add([grant(FOUNDER, ANNA, wall=1700)], wall=1700)
    assert mesh.role_of(ANNA.public, 2000) == "worker"
    assert not mesh.is_revoked(ANNA.public)


def test_on_a_tie_the_revocation_wins() -> None:
    mesh = roster(grant(FOUNDER, ANNA, wall=1500))
    mesh.revoke([revocation(FOUNDER, ANNA, wall=1500)], wall=1500)
    assert mesh.role_of(ANNA.public, 2000) is None


def test_the_mesh_outlives_its_founder() -> None:
    mesh = roster(grant(FOUNDER, ANNA), grant(ANNA, BEN))
    mesh.revoke([revocation(ANNA, FOUNDER, wall=1500)], wall=1600)
    assert mesh.role_of(FOUNDER.public, 2000) is None
    assert mesh.role_of(ANNA.public, 2000) == "worker"
    mesh.add([grant(BEN, CARL, wall=1700)], wall=1700)
    assert mesh.role_of(CARL.public, 2000) == "worker"


@pytest.mark.parametrize("issuer", [MALLORY, BEN])
def test_only_a_worker_in_good_standing_revokes(issuer: NodeKey) -> None:
    mesh = roster(grant(FOUNDER, ANNA), grant(FOUNDER, BEN, role="client"))
    assert mesh.revoke([revocation(issuer, ANNA, wall=1500)], wall=1600) == []
    assert mesh.role_of(ANNA.public, 2000) == "worker"


def test_a_roster_survives_its_own_records() -> None:
    mesh = roster(grant(FOUNDER, ANNA), grant(ANNA, BEN, wall=1100))
    mesh.revoke([revocation(BEN, ANNA, wall=1500)], wall=1500)
    again = Roster(MESH, FOUNDER.public, mesh.grants, mesh.revocations)
    for key in (FOUNDER, ANNA, BEN):
        assert again.role_of(key.public, 2000) == mesh.role_of(key.public, 2000)


def test_the_founder_key_must_be_the_meshs() -> None:
    with pytest.raises(AdmissionError):
        Roster(MESH, ANNA.public)


def test_a_dense_forest_of_grants_that_leads_nowhere_is_cheap() -> None:
    keys = [NodeKey.from_seed(bytes([n, 99]) * 16) for n in range(20)]
    forest = [grant(a, b) for a in keys for b in keys if a is not b]
    mesh = roster(*forest)
    assert mesh.role_of(keys[0].public, 2000) is None
    assert mesh.grants == (ROOT,)


# Whatever the order in which the same grants come one by one with repeats, the same nodes belong in the end.
@given(st.randoms(use_true_random=False))
def test_gossip_in_any_order_converges(rng: random.Random) -> None:
    grants = [
        grant(FOUNDER, ANNA, role="client"), grant(FOUNDER, ANNA, wall=1002),
        grant(ANNA, BEN), grant(BEN, CARL, role="client"),
    ]  # fmt: skip
    mesh = roster()
    for _ in range(len(grants)):  # each round brings at least one link nearer
        rng.shuffle(grants)
        for one in grants:
            mesh.add([one], wall=2000)
    assert [mesh.role_of(k.public, 2000) for k in (ANNA, BEN, CARL)] == ["worker", "worker", "client"]


# A record read back from the wire is signed exactly when it was not altered.
@given(st.integers(0, 2**40), st.integers(0, 2**40), st.sampled_from(["worker", "client"]), st.integers(0, 700))
def test_a_flipped_byte_on_the_wire_is_never_a_signed_grant(issued: int, expires: int, role: Role, at: int) -> None:
    original = sign_grant(FOUNDER, mesh=MESH, subject=ANNA.public, role=role, wall=issued, expires_at=expires)
    body = bytearray(msgspec.msgpack.encode(original))
    assert is_signed(msgspec.msgpack.decode(body, type=Grant))
    body[at % len(body)] ^= 1 + at % 255
    try:
        altered = msgspec.msgpack.decode(body, type=Grant)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return
    assert altered == original or not is_signed(altered)


# A grant's signature never stands for a revocation of the same fields.
def test_kinds_of_records_do_not_mix() -> None:
    good = grant(FOUNDER, ANNA)
    assert not is_signed(Revocation(good.mesh, good.subject, good.issuer, good.issued_at, good.signature))
