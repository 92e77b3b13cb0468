"""What bin/fuzz drives holds for its seeds, and for what Hypothesis makes of them without any guide."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.identity.invite import Invite
from workshop.fuzz_targets import INVITE, TARGETS, token_body

FEW = settings(max_examples=50, deadline=None)


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_takes_its_seeds_and_anything_near_them(name: str) -> None:
    target = TARGETS[name]
    for seed in target.seeds:
        target.run(seed)

    @FEW
    @given(st.sampled_from(target.seeds), st.lists(st.tuples(st.integers(0, 5000), st.binary(max_size=4)), max_size=4))
    def near(seed: bytes, changes: list[tuple[int, bytes]]) -> None:
        data = bytearray(seed)
        for at, change in changes:
            at %= len(data) + 1
            data[at : at + len(change)] = change
        target.run(bytes(data))

    @FEW
    @given(st.binary(max_size=500))
    def anything(data: bytes) -> None:
        target.run(data)

    near()
    anything()


def test_the_seed_of_a_tokens_body_is_a_good_token(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Invite] = []
    decode = Invite.decode

    def noting(text: str) -> Invite:
        read.append(decode(text))
        return read[-1]

    monkeypatch.setattr(Invite, "decode", noting)
    token_body(TARGETS["token-body"].seeds[0])
    assert read[0] == INVITE
