"""The demo model is the same everywhere, and its text depends on every layer and on the context."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mesh.engine.cache import find_engine
from mesh.errors import MeshError, ModelError
from mesh.models import demo, write
from mesh.models.demo import (
    DEMO_PROMPT,
    DEMO_SHA256,
    DEMO_TEXT,
    DEMO_VERSION,
    HEAD,
    OFFSETS,
    PRESETS,
    ROPE_BASE,
    write_demo,
)
from mesh.models.fingerprint import fingerprint
from mesh.models.gguf import inspect
from mesh.models.header import read_header

Floats = npt.NDArray[np.float64]
N_TOKENS = 300


def small_vocab(path: Path, words: int = 256) -> Path:
    """A vocabulary of some control tokens and two-letter words."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [f"<{i}>" for i in range(N_TOKENS - words)]
    tokens += [f"▁{a}{b}" for a in letters for b in letters][:words]
    key = b"tokenizer.ggml.tokens"
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 8, len(tokens))
    entry += b"".join(struct.pack("<Q", len(t.encode())) + t.encode() for t in tokens)
    entries = [write.text("general.architecture", "llama"), write.text("tokenizer.ggml.model", "llama"), entry]
    write.write_gguf(path, entries, [], lambda done, total: None)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    return write_demo(directory / "tiny.gguf", small_vocab(directory / "v.gguf"), preset="tiny").paths[0]


def test_the_bytes_are_the_same_on_every_machine(tiny: Path) -> None:
    assert fingerprint([tiny]) == "8165ddcbade0118d5e42e591c09ff8511b7f5774717a27e94c9c4fdf5ef8de7c"


def test_another_seed_has_the_same_shape_and_other_weights(tiny: Path, tmp_path: Path) -> None:
    other = write_demo(tmp_path / "tiny.gguf", small_vocab(tmp_path / "v.gguf"), preset="tiny", seed=2)
    assert fingerprint(other.paths) != fingerprint([tiny])
    assert other.cost("0" * 64) == inspect(tiny).cost("0" * 64)


def test_only_the_default_demo_says_that_any_node_can_make_it(tiny: Path, tmp_path: Path) -> None:
    vocab = small_vocab(tmp_path / "v.gguf")
    assert write_demo(tmp_path / "demo.gguf", vocab).demo_version == DEMO_VERSION
    assert inspect(tiny).demo_version == 0
    assert write_demo(tmp_path / "other.gguf", vocab, seed=2).demo_version == 0
    assert write_demo(tmp_path / "chat.gguf", vocab, chat_template="{{ messages }}").demo_version == 0


def test_progress_rises_to_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_demo(tmp_path / "m.gguf", small_vocab(tmp_path / "v.gguf"), preset="tiny", progress=lambda *s: seen.append(s))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]


def test_a_vocabulary_without_words_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no words"):
        write_demo(tmp_path / "m.gguf", small_vocab(tmp_path / "v.gguf", words=0))
    assert not (tmp_path / "m.gguf").exists()


# A head must have one clear winner at every position, the first ones included. 0.25 is what is lost by rounding.
def test_every_head_looks_at_one_token_only() -> None:
    n_ctx = max(p.n_ctx for p in PRESETS.values())
    angles = ROPE_BASE ** (-2 * np.arange(HEAD // 2) / HEAD)
    for offset in OFFSETS:
        distance = np.arange(n_ctx) - offset
        score = np.cos(distance[:, None] * angles).sum(axis=1) * (120 / 8) * (64 / 8) / np.sqrt(HEAD)
        for position in range(1, n_ctx):
            if position <= 64:
                best, second = np.sort(score[: position + 1])[:-3:-1]
                assert best - second > 15, (offset, position)
        others = np.delete(score, offset)
        assert score[offset] - others.max() > 15


class Reference:
    """The llama architecture in a few lines of numpy: what the engine should compute."""

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        data = np.fromfile(path, np.uint8)
        self.w: dict[str, Floats] = {}
        for t in header.tensors:
            raw = data[t.offset : t.offset + t.n_bytes]
            if t.type == 0:
                self.w[t.name] = raw.view(np.float32).astype(np.float64)
                continue
            blocks = raw.reshape(-1, 34)
            scale = blocks[:, :2].copy().view(np.float16).astype(np.float64)
            self.w[t.name] = (blocks[:, 2:].view(np.int8) * scale).reshape(t.shape[1], t.shape[0])
        self.n_layers = inspect(path).n_layers

    def logits(self, tokens: list[int], skip: int | None = None) -> Floats:
        h = self.w["token_embd.weight"][tokens]
        at = np.arange(len(tokens))
        turn = np.exp(1j * at[:, None] * ROPE_BASE ** (-2 * np.arange(HEAD // 2) / HEAD))
        for layer in range(self.n_layers):
            if layer == skip:
                continue
            w = {name.split(".", 2)[2]: v for name, v in self.w.items() if name.startswith(f"blk.{layer}.")}
            x = norm(h, w["attn_norm.weight"])
            q, k, v = (x @ w[f"attn_{part}.weight"].T for part in "qkv")
            heads = [self.attend(*part, turn) for part in self.heads(q, k, v)]
            h = h + np.concatenate(heads, axis=1) @ w["attn_output.weight"].T
            x = norm(h, w["ffn_norm.weight"])
            gate, up = x @ w["ffn_gate.weight"].T, x @ w["ffn_up.weight"].T
            h = h + (gate / (1 + np.exp(-gate)) * up) @ w["ffn_down.weight"].T
        out: Floats = norm(h, self.w["output_norm.weight"])[-1] @ self.w["output.weight"].T
        return out

    @staticmethod
    def heads(q: Floats, k: Floats, v: Floats) -> Iterator[tuple[Floats, Floats, Floats]]:
        """Each query head with the keys and values of its group."""
        n_query, n_key = q.shape[1] // HEAD, k.shape[1] // HEAD
        for head in range(n_query):
            own, shared = slice(head * HEAD, (head + 1) * HEAD), head * n_key // n_query
            group = slice(shared * HEAD, (shared + 1) * HEAD)
            yield q[:, own], k[:, group], v[:, group]

    @staticmethod
    def attend(q: Floats, k: Floats, v: Floats, turn: npt.NDArray[np.complex128]) -> Floats:
        at = np.arange(len(q))
        turned = [(m[:, ::2] + 1j * m[:, 1::2]) * turn for m in (q, k)]
        scores = (turned[0] @ turned[1].conj().T).real / np.sqrt(HEAD)
        scores[at[:, None] < at[None, :]] = -np.inf
        weight = np.exp(scores - scores.max(axis=1, keepdims=True))
        weight /= weight.sum(axis=1, keepdims=True)
        out: Floats = weight @ v
        return out

    def greedy(self, prompt: list[int], n: int, skip: int | None = None) -> list[int]:
        tokens = list(prompt)
        for _ in range(n):
            tokens.append(int(self.logits(tokens, skip).argmax()))
        return tokens[len(prompt) :]


def norm(h: Floats, weight: Floats) -> Floats:
    out: Floats = h / np.sqrt((h * h).mean(axis=1, keepdims=True) + 2.0**-20) * weight
    return out


PROMPT = [7, 90, 110, 41]


def test_text_is_lively_and_made_of_words(tiny: Path) -> None:
    text = Reference(tiny).greedy(PROMPT, 60)
    assert len(set(text)) > 40
    assert all(token >= N_TOKENS - 256 for token in text)


def test_the_best_token_wins_by_a_wide_margin(tiny: Path) -> None:
    model, tokens = Reference(tiny), list(PROMPT)
    for _ in range(40):
        second, best = np.sort(model.logits(tokens))[-2:]
        assert best - second > 2.5
        tokens.append(int(model.logits(tokens).argmax()))


@pytest.mark.parametrize("layer", range(PRESETS["tiny"].n_layers))
def test_without_any_one_layer_every_word_is_another(tiny: Path, layer: int) -> None:
    model = Reference(tiny)
    same = [a == b for a, b in zip(model.greedy(PROMPT, 20), model.greedy(PROMPT, 20, skip=layer), strict=True)]
    assert sum(same) <= 2


def test_text_depends_on_earlier_tokens(tiny: Path) -> None:
    model = Reference(tiny)
    assert model.logits([7, 90, 110, 41]).argmax() != model.logits([7, 91, 110, 41]).argmax()


@pytest.fixture(scope="module")
def vocab() -> Path:
    try:
        engine = find_engine()
    except MeshError as error:
        pytest.skip(f"no engine: {error.message}")
    if engine is None:
        pytest.skip("no engine is built")
    return engine.vocab("llama-spm")


@pytest.mark.engine
def test_the_demo_model_is_byte_identical_everywhere(vocab: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    model = write_demo(tmp_path / "demo.gguf", vocab)
    assert time.monotonic() - start < 10
    assert fingerprint(model.paths) == DEMO_SHA256
    assert (model.n_layers, model.n_vocab, model.has_chat_template) == (12, 32000, True)


@pytest.mark.engine
def test_the_demo_model_says_what_it_always_says(vocab: Path, tmp_path: Path) -> None:
    model = Reference(write_demo(tmp_path / "demo.gguf", vocab).paths[0])
    tokens = demo._tokens(read_header(vocab))
    prompt = [tokens.index("<s>"), tokens.index(f"▁{DEMO_PROMPT}")]
    text = "".join(tokens[t] for t in model.greedy(prompt, 8)).replace("▁", " ")
    assert text == DEMO_TEXT
