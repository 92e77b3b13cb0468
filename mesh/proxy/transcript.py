"""What a client has got of one event stream, exactly enough for another engine to go on from there. Pure.

Only whole groups of blocks go to the client: whatever follows a loss (the continuation, a comment, an error) never
lands in the middle of one, and the tokens that are recorded are those whose text the client has, no more and no fewer.

The engine says by a *trace*, a comment line at the head of a group's first block, which tokens the group brings a
choice up to: ``: mesh CHOICE BLOCKS TOKEN TOKEN ... [end]``. Traces are ours and are cut out; nothing else is changed.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_HELD_BYTES = 16 << 20
"""A longer block or group is passed on as it comes; a stream that is cut in one cannot be mended."""
MAX_TOKENS = 1 << 20
"""Recorded of one request, all choices together: more than the longest context models are trained for."""
MAX_CHOICES = 128
MAX_GROUP_BLOCKS = 4096
TOKEN_BYTES = 12
"""What a token costs here: four bytes kept, and up to eight more while the engine is asked to go on."""

_TRACE = b": mesh "
_BOUNDARY = re.compile(rb"\n\r?\n")


@dataclass(frozen=True, slots=True)
class Traced:
    """One group: the ids it brings its choice up to (none where a choice merely begins). ``ends``: it is the last."""

    choice: int
    tokens: Sequence[int]
    ends: bool = False


@dataclass(slots=True)
class Said:
    """What the client has of one choice. ``ended``: nothing more belongs to it."""

    tokens: array[int] = field(default_factory=lambda: array("I"))
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Portion:
    """Whole groups, and what is true once the client has them. ``last``: the newest block that was no comment."""

    data: bytes = b""
    traced: Sequence[Traced] = ()
    last: bytes = b""


@dataclass(slots=True)
class _Group:
    """One engine result's blocks, not all of them here yet."""

    trace: Traced = Traced(0, ())
    missing: int = 0
    data: bytearray = field(default_factory=bytearray)
    last: bytes = b""


@dataclass(slots=True)
class _Ready:
    data: bytearray = field(default_factory=bytearray)
    traced: list[Traced] = field(default_factory=list)
    last: bytes = b""


class Transcript:
    """Cuts engines' byte streams into what may be delivered, and keeps what was."""

    def __init__(self) -> None:
        self._waiting = bytearray()
        self._scanned = 0
        self._group = _Group()
        self._choices: dict[int, Said] = {}
        self._traced = False
        self.cut_inside = False
        """Part of a block has gone out, and its end has not."""
        self.spoiled = False
        """What was delivered is not known any more, token for token."""
        self.n_tokens = 0
        self.last = b""
        """The newest delivered block that was no comment; empty before the first."""

    @property
    def resumable(self) -> bool:
        """The engine says what it sends, and all of it is recorded."""
        return self._traced and not self.spoiled

    @property
    def choices(self) -> list[Said | None]:
        """What the client has, by choice; None for a choice of which it has nothing."""
        return [self._choices.get(index) for index in range(max(self._choices, default=-1) + 1)]

    def feed(self, data: bytes) -> Portion:
        """The whole groups that ``data`` completes. Tell :meth:`deliver` when the client has them."""
        waiting = self._waiting
        waiting += data
        out = _Ready()
        start = 0
        position = max(0, self._scanned - 2)  # a boundary may lie across two pieces
        while (boundary := _BOUNDARY.search(waiting, position)) is not None:
            self._take(bytes(memoryview(waiting)[start : boundary.end()]), out)
            start = position = boundary.end()
        del waiting[:start]
        self._scanned = len(waiting)
        if len(waiting) + len(self._group.data) > MAX_HELD_BYTES:
            self._let_go(out)
        return Portion(bytes(out.data), out.traced, out.last)

    def pass_on(self, data: bytes) -> bytes | None:
        """What :meth:`feed` and :meth:`deliver` make of one whole group of one block and one token, in a single step.

        Most pieces are one. None: this is another kind, or comes in the middle of something, and nothing was done.
        """
        if self._waiting or self._group.missing or not data.startswith(_TRACE):
            return None
        line, _, block = data.partition(b"\n")
        words = line.split(b" ")
        if len(words) != 5 or words[3] != b"1" or not (words[2].isdigit() and words[4].isdigit()):
            return None
        choice, token = int(words[2]), int(words[4])
        is_one = block.find(b"\n\n") == len(block) - 2 > 0 and b"\r" not in block and not block.startswith(b":")
        if not is_one or choice >= MAX_CHOICES or token >> 32 or self.n_tokens >= MAX_TOKENS:
            return None
        said = self._choices.get(choice)
        if said is None:
            said = self._choices[choice] = Said()
        said.tokens.append(token)
        self.n_tokens += 1
        self._traced = True
        self.cut_inside = False
        self.last = block[:-2]
        return block

    def deliver(self, portion: Portion) -> int:
        """The client has it. Returns how many tokens that are new to the record."""
        fresh = 0
        for group in portion.traced:
            if group.choice >= MAX_CHOICES or self.n_tokens + len(group.tokens) > MAX_TOKENS:
                self.spoiled = True
                break
            said = self._choices.setdefault(group.choice, Said())
            said.tokens.extend(group.tokens)
            said.ended = said.ended or group.ends
            fresh += len(group.tokens)
            self.n_tokens += len(group.tokens)
        self.last = portion.last or self.last
        return fresh

    def finish(self) -> bytes:
        """What remains after the last whole group of a stream that ended in good order."""
        rest = bytes(self._group.data) + bytes(self._waiting)
        self.restart()
        return rest

    def restart(self) -> None:
        """Another engine goes on: what the one before left half-said is forgotten."""
        self._waiting.clear()
        self._scanned = 0
        self._group = _Group()

    # -- within ------------------------------------------------------------------------------------------------------

    def _take(self, block: bytes, out: _Ready) -> None:
        if block.startswith(_TRACE):
            if self._group.missing:  # the group before never came to its end
                self.spoiled = True
                self._release(out)
            block = self._begin_group(block)
        group = self._group
        into: _Group | _Ready = group if group.missing else out
        into.data += block
        self.cut_inside = False
        if not block.startswith(b":"):
            into.last = block.rstrip(b"\r\n") or into.last
        if group.missing:
            group.missing -= 1
            if not group.missing:
                self._release(out)

    def _release(self, out: _Ready) -> None:
        group, self._group = self._group, _Group()
        out.data += group.data
        out.traced.append(group.trace)
        out.last = group.last or out.last

    def _begin_group(self, block: bytes) -> bytes:
        """The block without its trace."""
        line, _, rest = block.partition(b"\n")
        try:
            words = line[len(_TRACE) :].split()
            ends = words[-1:] == [b"end"]
            choice, blocks, *tokens = map(int, words[:-1] if ends else words)
            understood = choice >= 0 and 0 < blocks <= MAX_GROUP_BLOCKS
            ids = array("I", tokens)
        except (ValueError, OverflowError):
            understood = False
        if not understood:
            self.spoiled = True
            return rest
        self._traced = True
        self._group = _Group(Traced(choice, ids, ends), blocks)
        return rest if rest.strip() else b""

    def _let_go(self, out: _Ready) -> None:
        out.data += self._group.data + self._waiting
        out.last = self._group.last or out.last
        self.cut_inside = bool(self._waiting)
        self.spoiled = True
        self.restart()
