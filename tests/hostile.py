"""Values of any wire type, valid and not, made from the types themselves."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect as kinds

from tests.sim.fakes import node_id

_FEW = 4


def values(of: Any) -> st.SearchStrategy[Any]:
    """Valid values of a wire type; bounds and patterns are kept, collections are short."""
    return _values(kinds.type_info(of))


def _made(cls: type[Any], found: dict[str, Any]) -> Any:
    return cls(**found)


def _values(kind: kinds.Type) -> st.SearchStrategy[Any]:
    match kind:
        case kinds.IntType():
            most = 2**62 if kind.le is None else kind.le
            return st.integers(-(2**62) if kind.ge is None else kind.ge, most if kind.lt is None else kind.lt - 1)
        case kinds.FloatType():
            return st.floats(kind.ge, kind.le, allow_nan=False)
        case kinds.BoolType():
            return st.booleans()
        case kinds.NoneType():
            return st.none()
        case kinds.StrType():
            if kind.pattern is not None and "[a-z2-7]{26}" in kind.pattern:  # whom the receiver knows, mostly
                known = st.sampled_from([node_id(number) for number in range(4)])
                return known | st.from_regex(kind.pattern.rstrip("$") + r"\Z")
            if kind.pattern is not None:
                return st.from_regex(kind.pattern.rstrip("$") + r"\Z")
            return st.text(st.characters(codec="utf-8"), **_sizes(kind))
        case kinds.BytesType():
            return st.binary(**_sizes(kind))
        case kinds.LiteralType():
            return st.sampled_from(kind.values)
        case kinds.VarTupleType():
            least = kind.min_length or 0
            most = max(least, min(kind.max_length or _FEW, _FEW))
            return st.lists(_values(kind.item_type), min_size=least, max_size=most).map(tuple)
        case kinds.TupleType():
            return st.tuples(*(_values(item) for item in kind.item_types))
        case kinds.DictType():
            return st.dictionaries(_values(kind.key_type), _values(kind.value_type), max_size=_FEW)
        case kinds.UnionType():
            return st.one_of(*(_values(one) for one in kind.types))
        case kinds.StructType():
            fields = {field.name: _values(field.type) for field in kind.fields}
            return st.fixed_dictionaries(fields).map(partial(_made, kind.cls))
        case kinds.Metadata():
            return _values(kind.type)
    raise NotImplementedError(kind)


def _sizes(kind: kinds.StrType | kinds.BytesType) -> dict[str, int]:
    least = kind.min_length or 0
    return {"min_size": least, "max_size": max(least, min(kind.max_length or 30, 30))}


def twisted(of: Any) -> st.SearchStrategy[bytes]:
    """Bytes near those of a valid value: a field too many or few, of another type, out of bounds, cut, or repeated."""
    junk = st.one_of(
        st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=2000),
        st.binary(max_size=2000), st.lists(st.integers(0, 9), max_size=600), st.dictionaries(st.text(), st.booleans()),
    )  # fmt: skip

    def twist(value: Any, changes: list[tuple[int, Any, str]], cut: int) -> bytes:
        plain = msgspec.msgpack.decode(msgspec.msgpack.encode(value))
        for at, other, how in changes:
            if not isinstance(plain, dict) or not plain:
                break
            key = list(plain)[at % len(plain)]
            if how == "drop":
                del plain[key]
            elif how == "add":
                plain[f"{key}?"] = other
            elif isinstance(plain[key], list) and how == "many":
                plain[key] = plain[key] * 300
            else:
                plain[key] = other
        data = bytes(msgspec.msgpack.encode(plain))
        return data[: len(data) - cut] if cut else data

    change = st.tuples(st.integers(0, 30), junk, st.sampled_from(["drop", "add", "many", "other"]))
    return st.builds(twist, values(of), st.lists(change, max_size=3), st.sampled_from([0, 0, 0, 1, 7]))
