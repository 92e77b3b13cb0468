"""A model file is weighed exactly, and whatever else it may be is named with a remedy."""

from __future__ import annotations

import os
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import ModelError
from mesh.models import write
from mesh.models.gguf import inspect, shard_paths
from mesh.models.write import NewTensor, split_gguf, write_gguf

F32, F16, Q8_0 = 0, 1, 8


def tensor(name: str, *shape: int, kind: int = F32) -> NewTensor:
    count = 1
    for n in shape:
        count *= n
    n_bytes = {F32: 4 * count, F16: 2 * count, Q8_0: count // 32 * 34}[kind]
    return NewTensor(name, kind, shape, n_bytes, lambda: [b"\x01" * n_bytes])


SETTINGS: dict[str, bytes] = {
    "architecture": write.text("general.architecture", "llama"),
    "name": write.text("general.name", "A Model"),
    "layers": write.u32("llama.block_count", 2),
    "embd": write.u32("llama.embedding_length", 32),
    "ctx": write.u32("llama.context_length", 512),
    "heads": write.u32("llama.attention.head_count", 4),
    "kv": write.u32("llama.attention.head_count_kv", 2),
}
TENSORS = {
    "token_embd.weight": tensor("token_embd.weight", 32, 100, kind=Q8_0),
    "blk.0.attn_q.weight": tensor("blk.0.attn_q.weight", 32, 32, kind=F16),
    "blk.0.attn_output.weight": tensor("blk.0.attn_output.weight", 32, 32, kind=F16),
    "blk.1.attn_q.weight": tensor("blk.1.attn_q.weight", 32, 32, kind=F16),
    "rope_freqs.weight": tensor("rope_freqs.weight", 4),
    "output_norm.weight": tensor("output_norm.weight", 32),
    "output.weight": tensor("output.weight", 32, 100, kind=F16),
}


def model(
    path: Path, *, without: tuple[str, ...] = (), extra: tuple[bytes, ...] = (), add: tuple[NewTensor, ...] = ()
) -> Path:
    settings = [entry for name, entry in SETTINGS.items() if name not in without]
    tensors = [t for name, t in TENSORS.items() if name not in without]
    write_gguf(path, [*settings, *extra], [*tensors, *add], lambda done, total: None)
    return path


def u32s(key: str, *values: int) -> bytes:
    data = key.encode()
    return (
        struct.pack("<Q", len(data))
        + data
        + struct.pack("<IIQ", 9, 4, len(values))
        + struct.pack(f"<{len(values)}I", *values)
    )


def test_layers_and_ends_are_weighed_apart(tmp_path: Path) -> None:
    file = inspect(model(tmp_path / "a.gguf", extra=(write.u32("llama.feed_forward_length", 96),)))
    assert file.layer_bytes == (2 * 2048, 2048)
    assert file.input_bytes == 3400 + 16
    assert file.output_bytes == 128 + 6400
    assert (file.n_layers, file.n_embd, file.n_vocab, file.n_ctx_train, file.n_ff) == (2, 32, 100, 512, 96)
    assert (file.name, file.title, file.architecture, file.has_chat_template) == ("a", "A Model", "llama", False)
    assert file.size_bytes == (tmp_path / "a.gguf").stat().st_size


def test_attention_output_is_a_part_of_its_layer_not_of_the_output(tmp_path: Path) -> None:
    whole = inspect(model(tmp_path / "a.gguf"))
    less = inspect(model(tmp_path / "b.gguf", without=("blk.0.attn_output.weight",)))
    assert less.output_bytes == whole.output_bytes
    assert less.layer_bytes[0] < whole.layer_bytes[0]


def test_a_tied_embedding_counts_as_output_too(tmp_path: Path) -> None:
    file = inspect(model(tmp_path / "a.gguf", without=("output.weight",)))
    assert file.output_bytes == 128 + 3400


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ((), (2 * 2 * 16, 2 * 2 * 16)),
        ((write.u32("llama.attention.key_length", 64), write.u32("llama.attention.value_length", 32)), (384, 384)),
        ((u32s("llama.attention.head_count_kv", 4, 0),), (128, 0)),
        ((write.u32("llama.attention.key_length", 72), write.u32("llama.attention.key_length_mla", 24)), (288, 288)),
    ],
    ids=["grouped", "own lengths", "per layer", "latent"],
)
def test_kv_cache_bytes_follow_the_attention(
    tmp_path: Path, extra: tuple[bytes, ...], expected: tuple[int, ...]
) -> None:
    without = ("kv",) if any(b"head_count_kv" in e for e in extra) else ()
    assert inspect(model(tmp_path / "a.gguf", without=without, extra=extra)).kv_bytes_per_token == expected


def test_without_grouped_heads_every_head_has_keys(tmp_path: Path) -> None:
    assert inspect(model(tmp_path / "a.gguf", without=("kv",))).kv_bytes_per_token == (128, 128)


def test_experts_in_use_together_make_the_widest_row(tmp_path: Path) -> None:
    extra = (write.u32("llama.expert_feed_forward_length", 64), write.u32("llama.expert_used_count", 8))
    assert inspect(model(tmp_path / "a.gguf", extra=extra)).n_ff == 512


def test_quantisation_is_named_as_people_name_it(tmp_path: Path) -> None:
    assert inspect(model(tmp_path / "a.gguf", extra=(write.u32("general.file_type", 15),))).quantisation == "Q4_K_M"
    assert inspect(model(tmp_path / "b.gguf")).quantisation == "F16"


def test_a_long_vocabulary_is_read_in_well_under_a_second(tmp_path: Path) -> None:
    key = b"tokenizer.ggml.tokens"
    n = 300_000
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 8, n) + struct.pack("<Q", 4) * 0
    entry += b"".join(struct.pack("<Q", 5) + b"token" for _ in range(n))
    path = model(tmp_path / "a.gguf", extra=(entry,))
    start = time.monotonic()
    inspect(path)
    assert time.monotonic() - start < 2


def refusal(path: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        inspect(path)
    assert caught.value.remedy, f"no remedy: {caught.value}"
    return caught.value


def test_a_missing_file_is_called_missing(tmp_path: Path) -> None:
    assert "no file" in refusal(tmp_path / "nothing.gguf").message


def test_a_directory_suggests_the_file_inside(tmp_path: Path) -> None:
    model(tmp_path / "inside.gguf")
    assert "inside.gguf" in (refusal(tmp_path).remedy or "")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this platform has no named pipes")
def test_a_pipe_does_not_hang_the_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "not a file" in refusal(tmp_path / "pipe.gguf").message


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this platform has no file modes")
def test_an_unreadable_file_says_how_to_allow_it(tmp_path: Path) -> None:
    path = model(tmp_path / "a.gguf")
    path.chmod(0)
    me = os.geteuid()
    if me == 0:  # root may read everything: be somebody else for a moment
        for directory in (tmp_path, *tmp_path.parents):
            if Path(tempfile.gettempdir()) in directory.parents:
                directory.chmod(0o755)
        os.seteuid(65534)
    try:
        assert "chmod" in (refusal(path).remedy or "")
    finally:
        os.seteuid(me)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"GG", "truncated"),
        (b"PK\x03\x04 and so on", "zip archive"),
        (b"version https://git-lfs", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "web page"),
        (b"\x00" * 64, "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "architecture"),
    ],
)
def test_what_is_not_a_model_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    assert said in refusal(path).message


@pytest.mark.parametrize(
    "value",
    [
        struct.pack("<IQ", 8, 2**62),
        struct.pack("<IIQ", 9, 8, 2**62),
        struct.pack("<IIQ", 9, 4, 2**62),
        struct.pack("<IIQ", 9, 9, 1),
        struct.pack("<I", 77),
    ],
)
def test_a_hostile_length_is_refused_at_once(tmp_path: Path, value: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + value + b"\0" * 64)
    refusal(path)


def test_a_truncated_file_says_how_much_is_missing(tmp_path: Path) -> None:
    path = model(tmp_path / "a.gguf")
    whole = path.read_bytes()
    # The last tensor is padded: cut into the tensor itself.
    path.write_bytes(whole[:-100])
    error = refusal(path)
    assert "truncated" in error.message and f"{len(whole) - 100:,}" in error.message and "missing" in error.message


@given(cut=st.integers(0, 3000))
def test_a_file_cut_anywhere_is_refused_with_a_remedy(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    directory = tmp_path_factory.mktemp("cut")
    path = model(directory / "a.gguf")
    path.write_bytes(path.read_bytes()[:cut])
    refusal(path)


@given(at=st.integers(0, 1400), value=st.integers(0, 255))
def test_a_damaged_header_never_ends_in_anything_but_a_model_error(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int
) -> None:
    path = model(tmp_path_factory.mktemp("damage") / "a.gguf")
    data = bytearray(path.read_bytes())
    data[at % len(data)] = value
    path.write_bytes(data)
    try:
        inspect(path)
    except ModelError as error:
        assert error.message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: model(p, without=("layers",)), "llama.block_count"),
        (lambda p: model(p, without=("embd",)), "llama.embedding_length"),
        (lambda p: model(p, without=("ctx",)), "llama.context_length"),
        (lambda p: model(p, without=("architecture",)), "architecture"),
        (lambda p: model(p, without=("token_embd.weight",)), "token embedding"),
        (lambda p: model(p, without=tuple(n for n in TENSORS if n.startswith("blk"))), "vocabulary only"),
        (lambda p: model(p, without=("architecture",), extra=(write.text("general.architecture", "clip"),)), "mmproj"),
        (lambda p: model(p, extra=(write.text("general.type", "adapter"),)), "adapter"),
        (lambda p: model(p, add=(tensor("blk.7.attn_q.weight", 32),)), "blk.7"),
        (lambda p: model(p, add=(tensor("output.weight", 32),)), "twice"),
        (lambda p: model(p, extra=(write.text("general.name", "again"),)), "twice"),
        (lambda p: model(p, extra=(write.u32("general.alignment", 7),)), "alignment"),
        (lambda p: model(p, add=(NewTensor("odd", 99, (32,), 0, lambda: []),)), "type 99"),
    ],
)
def test_an_incomplete_or_foreign_model_says_what_is_wrong(
    tmp_path: Path, change: Callable[[Path], Path], said: str
) -> None:
    assert said in refusal(change(tmp_path / "a.gguf")).message


class TestShards:
    @pytest.mark.parametrize("given_shard", [0, 1, 2])
    def test_any_shard_stands_for_the_whole_model(self, tmp_path: Path, given_shard: int) -> None:
        whole = inspect(model(tmp_path / "a.gguf"))
        shards = split_gguf(tmp_path / "a.gguf", 3)
        file = inspect(shards[given_shard])
        assert file.paths == shards
        assert file.name == "a"
        assert (file.layer_bytes, file.input_bytes, file.output_bytes) == (
            whole.layer_bytes, whole.input_bytes, whole.output_bytes,
        )  # fmt: skip

    def test_a_missing_shard_is_named(self, tmp_path: Path) -> None:
        shards = split_gguf(model(tmp_path / "a.gguf"), 3)
        shards[1].unlink()
        assert "a-00002-of-00003.gguf" in refusal(shards[0]).message

    def test_a_shard_of_another_set_is_noticed(self, tmp_path: Path) -> None:
        shards = split_gguf(model(tmp_path / "a.gguf"), 3)
        shards[2].write_bytes(shards[1].read_bytes())
        assert "not shard 3" in refusal(shards[0]).message

    def test_a_truncated_shard_is_noticed(self, tmp_path: Path) -> None:
        shards = split_gguf(model(tmp_path / "a.gguf"), 2)
        shards[1].write_bytes(shards[1].read_bytes()[:-200])
        assert "truncated" in refusal(shards[0]).message

    def test_a_renamed_shard_says_which_name_it_needs(self, tmp_path: Path) -> None:
        shards = split_gguf(model(tmp_path / "a.gguf"), 2)
        assert "00001-of-00002" in (refusal(shards[0].rename(tmp_path / "b.gguf")).remedy or "")

    def test_as_many_shards_as_tensors_can_be_written_and_no_more(self, tmp_path: Path) -> None:
        path = model(tmp_path / "a.gguf")
        assert len(split_gguf(path, len(TENSORS))) == len(TENSORS)
        with pytest.raises(ModelError):
            split_gguf(path, len(TENSORS) + 1)

    def test_shard_names_are_derived_from_any_of_them(self) -> None:
        assert shard_paths(Path("x/m-00002-of-00003.gguf"))[0] == Path("x/m-00001-of-00003.gguf")
        assert shard_paths(Path("m.gguf")) == (Path("m.gguf"),)


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def broken() -> list[bytes]:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError):
        write_gguf(tmp_path / "a.gguf", [], [NewTensor("t", F32, (1,), 4, broken)], lambda done, total: None)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_an_error_a_person_can_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot be written"):
        write_gguf(tmp_path / "file" / "a.gguf", [], [], lambda done, total: None)
