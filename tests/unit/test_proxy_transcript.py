"""What an ingress cuts out of event streams, what it records of them, and how it asks another engine to go on."""

from __future__ import annotations

import itertools
import json
from array import array
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh.proxy import transcript
from mesh.proxy.origin import Origin, client_tag
from mesh.proxy.resume import may_be_wrapped, wrap
from mesh.proxy.transcript import Said, Transcript

BLOCKS = st.sampled_from(
    [b"data: x\n\n", b": hi\n\n", b"data: y\r\n\r\n", b"event: a\ndata: b\n\n", b"data: : mesh 0 1 7\n\n"]
)
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=4)


@dataclass
class Group:
    """As an engine says it."""

    choice: int | None
    tokens: list[int]
    blocks: list[bytes]
    ends: bool = False

    @property
    def plain(self) -> bytes:
        return b"".join(self.blocks)

    @property
    def said(self) -> bytes:
        if self.choice is None:
            return self.plain
        trace = " ".join(map(str, [self.choice, len(self.blocks), *self.tokens, *(["end"] if self.ends else [])]))
        return f": mesh {trace}\n".encode() + self.plain


GROUPS = st.lists(
    st.one_of(
        st.builds(Group, st.integers(0, 3), TOKENS, st.lists(BLOCKS, min_size=1, max_size=3), st.booleans()),
        st.builds(Group, st.none(), st.just([]), st.lists(BLOCKS, min_size=1, max_size=1)),
    ),
    max_size=8,
)


def pieces(stream: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    return [stream[start:stop] for start, stop in itertools.pairwise(edges)]


def ids_of(seen: Transcript) -> list[list[int] | None]:
    return [None if said is None else list(said.tokens) for said in seen.choices]


@given(st.lists(BLOCKS | st.just(b"data: cut")), st.lists(st.integers(0, 200)))
def test_a_stream_without_traces_passes_unchanged_in_whole_blocks(blocks: list[bytes], cuts: list[int]) -> None:
    # However the bytes are cut into pieces, what is passed on plus what is kept is what came.
    stream = b"".join(blocks)
    seen, passed = Transcript(), b""
    for piece in pieces(stream, cuts):
        portion = seen.feed(piece)
        assert portion.data == b"" or portion.data.endswith((b"\n\n", b"\n\r\n"))
        seen.deliver(portion)
        passed += portion.data
    rest = seen.finish()
    assert passed + rest == stream
    assert b"\n\n" not in rest and b"\r\n\r\n" not in rest
    assert not seen.resumable


@settings(suppress_health_check=[HealthCheck.too_slow])  # of a busy machine
@given(GROUPS, st.lists(st.integers(0, 2000), max_size=8), st.integers(0, 2000))
def test_whenever_the_engine_dies_the_record_is_what_the_client_has(
    groups: list[Group], cuts: list[int], death: int
) -> None:
    # Whole groups reach the client, traces never, and the tokens recorded are those of exactly these groups.
    stream = b"".join(group.said for group in groups)[:death]
    seen, passed = Transcript(), b""
    for piece in pieces(stream, cuts):
        portion = seen.feed(piece)
        seen.deliver(portion)
        passed += portion.data
    whole = list(itertools.accumulate((len(group.said) for group in groups), initial=0))
    there = [group for group, end in zip(groups, whole[1:], strict=True) if end <= len(stream)]
    assert passed == b"".join(group.plain for group in there)
    record: dict[int, Said] = {}
    for group in there:
        if group.choice is not None:
            said = record.setdefault(group.choice, Said())
            said.tokens.extend(group.tokens)
            said.ended |= group.ends
    assert seen.choices == [record.get(index) for index in range(max(record, default=-1) + 1)]
    assert seen.resumable == any(group.choice is not None for group in there) or len(there) < len(groups)
    assert not seen.spoiled


USUAL = st.builds(
    Group,
    st.integers(0, 3),
    st.lists(st.integers(0, 2**33), min_size=1, max_size=1),
    st.lists(BLOCKS, min_size=1, max_size=1),
)
ODD = st.sampled_from(
    [
        b": mesh 0 1 7\n\n\n",
        b": mesh 0 1 +7\ndata: x\n\n",
        b": mesh 0 1 7 \ndata: x\n\n",
        b": mesh 300 1 7\ndata: x\n\n",
    ]
)


@given(
    st.lists(
        st.one_of(USUAL, *[GROUPS.filter(bool).map(lambda groups: groups[0])]).map(lambda g: g.said) | ODD, max_size=12
    ),
    st.data(),
)
def test_the_short_way_through_makes_no_difference(said: list[bytes], data: st.DataObject) -> None:
    short, long = Transcript(), Transcript()
    cut = data.draw(st.booleans())
    for piece in said if not cut else pieces(b"".join(said), data.draw(st.lists(st.integers(0, 2000), max_size=12))):
        portion = long.feed(piece)
        long.deliver(portion)
        passed = short.pass_on(piece)
        if passed is None:
            other = short.feed(piece)
            short.deliver(other)
            passed = other.data
        assert passed == portion.data
        for seen in ("choices", "last", "spoiled", "resumable", "n_tokens", "cut_inside"):
            assert getattr(short, seen) == getattr(long, seen), seen


def test_most_pieces_take_the_short_way() -> None:
    seen = Transcript()
    assert seen.pass_on(b': mesh 0 1 17\ndata: {"content": "a"}\n\n') == b'data: {"content": "a"}\n\n'
    assert (ids_of(seen), seen.last, seen.resumable) == ([[17]], b'data: {"content": "a"}', True)


def test_another_engine_begins_where_the_last_whole_group_ended() -> None:
    seen = Transcript()
    seen.deliver(seen.feed(b": mesh 0 1 5\ndata: a\n\n: mesh 0 2 6 7\ndata: half a group\n\ndata: ha"))
    seen.restart()
    assert seen.feed(b": mesh 0 1 6\ndata: b\n\n").data == b"data: b\n\n"
    assert ids_of(seen) == [[5]]


def test_what_was_not_delivered_is_not_recorded() -> None:
    seen = Transcript()
    seen.feed(b": mesh 0 1 5\ndata: a\n\n")
    assert seen.choices == []


def test_comments_do_not_count_as_an_answer() -> None:
    seen = Transcript()
    portion = seen.feed(b": ping\n\n")
    assert (portion.data, portion.last) == (b": ping\n\n", b"")
    seen.deliver(seen.feed(b"data: 1\n\n:\n\n"))
    assert seen.last == b"data: 1"


def test_a_trace_without_blocks_of_text_says_nothing_to_the_client() -> None:
    seen = Transcript()
    portion = seen.feed(b": mesh 0 1 5 6\n\n")
    seen.deliver(portion)
    assert portion.data == b""
    assert ids_of(seen) == [[5, 6]]


def test_an_endless_event_is_passed_on_rather_than_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcript, "MAX_HELD_BYTES", 10)
    seen = Transcript()
    assert seen.feed(b"data: 12").data == b""
    assert seen.feed(b"3456789").data == b"data: 123456789"
    assert seen.cut_inside and seen.spoiled
    assert seen.feed(b"!\n\n").data == b"!\n\n"
    assert not seen.cut_inside


def test_an_endless_group_is_passed_on_and_cannot_be_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcript, "MAX_HELD_BYTES", 10)
    seen = Transcript()
    assert seen.feed(b": mesh 0 3 1\ndata: 1\n\ndata: 2\n\n").data == b"data: 1\n\ndata: 2\n\n"
    assert seen.spoiled and not seen.resumable


@pytest.mark.parametrize(
    "trace",
    [b"", b"0", b"0 0", b"-1 1", b"0 -1", b"0 9999999", b"a b", b"0 1 -5", b"0 1 99999999999", b"0 1 " + b"9" * 5000],
)
def test_a_trace_that_is_none_reaches_nobody_and_ends_the_record(trace: bytes) -> None:
    seen = Transcript()
    seen.deliver(seen.feed(b": mesh 0 1 5\ndata: a\n\n"))
    assert seen.feed(b": mesh " + trace + b"\ndata: b\n\n").data == b"data: b\n\n"
    assert not seen.resumable


def test_a_group_that_begins_inside_another_ends_the_record() -> None:
    seen = Transcript()
    assert seen.feed(b": mesh 0 2 5\ndata: a\n\n: mesh 0 1 6\ndata: b\n\n").data == b"data: a\n\ndata: b\n\n"
    assert not seen.resumable


def test_the_record_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcript, "MAX_TOKENS", 3)
    seen = Transcript()
    seen.deliver(seen.feed(b": mesh 0 1 1 2\ndata: a\n\n"))
    assert seen.resumable
    seen.deliver(seen.feed(b": mesh 0 1 3 4\ndata: b\n\n"))
    assert not seen.resumable and seen.n_tokens == 2
    other = Transcript()
    other.deliver(other.feed(b": mesh 128 1\ndata: a\n\n"))
    assert not other.resumable and other.choices == []


# -- asking another engine -------------------------------------------------------------------------------------------


@given(
    st.dictionaries(st.text(max_size=5), st.none() | st.booleans() | st.integers() | st.text(max_size=20)),
    st.lists(st.none() | st.tuples(TOKENS, st.booleans()), min_size=1, max_size=4),
)
def test_a_continuation_carries_the_request_as_it_came(
    body: dict[str, object], choices: list[tuple[list[int], bool] | None]
) -> None:
    # Byte for byte, and with it the tokens of every choice.
    written = json.dumps(body, indent=1).encode()
    said = [None if one is None else Said(array("I", one[0]), one[1]) for one in choices]
    asked = b"".join(wrap(written, said))
    assert written in asked
    told = [None if one is None else {"tokens": one[0], "end": one[1]} for one in choices]
    assert json.loads(asked) == {"body": body, "choices": told}


def test_only_a_json_object_can_be_carried_along() -> None:
    assert may_be_wrapped(b' \n{"a":1}')
    assert not may_be_wrapped(b'--boundary\r\nContent-Disposition: form-data; name="file"')
    assert not may_be_wrapped(b"")


# -- whose a request is ----------------------------------------------------------------------------------------------


def test_the_engine_is_told_whose_a_request_is_in_one_short_header() -> None:
    name, value = Origin("ab" * 16, 2**32 - 2, "cd" * 8).header(12.3456)
    assert name == b"X-Mesh-Request"
    assert json.loads(value) == {"id": "ab" * 16, "seed": 2**32 - 2, "age_ms": 12345, "client": "cd" * 8}
    assert len(value) < 512


def test_a_client_is_known_by_its_key_else_by_its_address_and_neither_can_be_read() -> None:
    one, two = b"1" * 32, b"2" * 32
    assert client_tag(one, "sk-secret", "10.0.0.1") == client_tag(one, "sk-secret", "10.0.0.2")
    assert client_tag(one, "sk-secret", None) != client_tag(two, "sk-secret", None), "of two ingresses"
    assert client_tag(one, None, "10.0.0.1") != client_tag(one, None, "10.0.0.2")
    assert client_tag(one, None, "10.0.0.1") == client_tag(one, None, "::ffff:10.0.0.1")
    assert client_tag(one, None, "fd00::1") == client_tag(one, None, "fd00::2"), "one machine, many addresses"
    assert client_tag(one, None, "fd00::1") != client_tag(one, None, "fd00:0:0:1::1")
    assert "secret" not in client_tag(one, "sk-secret", None) and len(client_tag(one, None, None)) == 16
