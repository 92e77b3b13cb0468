"""What a model file is and what it asks of memory, from its headers alone; shards included.

Key names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and the engine's ``llama-arch.cpp``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGMLQuantizationType, LlamaFileType

from mesh.errors import ModelError
from mesh.models.header import DAMAGED, Header, Tensor, Value, read_header
from mesh.models.memory import Keys, LayerMemory, weigh_layers, widest_feed
from mesh.wire.facts import ModelCost

SHARD = re.compile(r"^(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf$", re.IGNORECASE)
MAX_SHARDS = 512
MAX_NAME = 64
_LAYER = re.compile(r"^(?:dec\.)?blk\.(\d+)\.")
# Anchored: `attn_output` is part of a layer.
_OUTPUT = re.compile(r"^(?:dec\.)?(?:output|cls|dense_\d)[._]")
_NOT_A_MODEL = {
    "clip": "an image projector (mmproj)",
    "adapter": "an adapter (LoRA)",
    "imatrix": "an importance matrix",
    "controlvector": "a control vector",
}


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model on this disk, complete and consistent.

    Args:
        paths: all shards in order; the engine is given the first.
        name: the file's stem, without the shard number.
        title: what the file calls itself (``general.name``), or empty.
        quantisation: as in file names, e.g. ``Q4_K_M``.
        size_bytes: of all shards.
        layer_bytes: weights of each transformer layer.
        input_bytes: token embedding and all else that belongs to no layer and not to the output.
        output_bytes: output norm and head; a tied embedding counts here again, since it is read here again.
        layers: what each layer asks of memory besides its weights.
        weights: the type that most bytes of the layers have.
        n_ff: the widest feed-forward row of one token, all its experts together; 0 when unknown.
    """

    paths: tuple[Path, ...]
    name: str
    title: str
    architecture: str
    quantisation: str
    has_chat_template: bool
    size_bytes: int
    n_layers: int
    n_embd: int
    n_vocab: int
    n_ctx_train: int
    layer_bytes: tuple[int, ...]
    input_bytes: int
    output_bytes: int
    layers: tuple[LayerMemory, ...]
    n_ff: int = 0
    weights: str = ""
    demo_version: int = 0

    @property
    def kv_bytes_per_token(self) -> tuple[int, ...]:
        """f16 K and V of one token, for each layer."""
        return tuple(layer.kv_bytes for layer in self.layers)

    def cost(self, fingerprint: str) -> ModelCost:
        """The facts that other nodes need, with the fingerprint that :mod:`mesh.models.fingerprint` computes."""
        return ModelCost(
            fingerprint=fingerprint,
            name=self.name[:MAX_NAME],
            architecture=self.architecture[:MAX_NAME],
            size_bytes=self.size_bytes,
            n_layers=self.n_layers,
            n_embd=self.n_embd,
            n_vocab=self.n_vocab,
            n_ctx_train=self.n_ctx_train,
            layer_bytes=self.layer_bytes,
            input_bytes=self.input_bytes,
            output_bytes=self.output_bytes,
            kv_bytes_per_token=self.kv_bytes_per_token,
            n_ff=self.n_ff,
            windows=tuple(layer.window for layer in self.layers),
            state_bytes=tuple(layer.state_bytes for layer in self.layers),
            read_bytes=tuple(layer.read_bytes for layer in self.layers),
            attention_row=max(layer.attention_row for layer in self.layers),
            state_row=max(layer.state_row for layer in self.layers),
            feed_row=max(layer.feed_row for layer in self.layers),
            weights=self.weights,
            demo_version=self.demo_version,
        )


def inspect(path: Path) -> ModelFile:
    """Open a GGUF, all its shards if it has some, and weigh it. Reads headers only.

    Args:
        path: the file, or any shard of a set.

    Raises:
        ModelError: missing, unreadable, truncated or damaged file, missing shard, or not a language model.
    """
    if path.is_dir():
        found = sorted(p.name for p in path.glob("*.gguf"))[:3]
        raise ModelError(
            f"{path} is a directory, not a GGUF file",
            remedy=f"name a file inside it:  --model {path / found[0]}" if found else "name the .gguf file itself",
        )
    first = read_header(path)
    headers = [first] if _shard_count(first) == 1 else _read_shards(path, _shard_count(first))
    return _weigh(headers)


def shard_paths(path: Path) -> tuple[Path, ...]:
    """The paths of a shard set by name alone, or just ``path`` when its name is not a shard's."""
    match = SHARD.match(path.name)
    if match is None or not 1 <= int(match["count"]) <= MAX_SHARDS:
        return (path,)
    count = int(match["count"])
    return tuple(path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1))


def _stem(path: Path) -> str:
    match = SHARD.match(path.name)
    return match["stem"] if match else path.stem


def _shard_count(header: Header) -> int:
    count = header.metadata.get("split.count", 1)
    if not isinstance(count, int) or not 0 <= count <= MAX_SHARDS:
        raise ModelError(f"{header.path} is damaged: it says it is one of {count} shards", remedy=DAMAGED)
    return max(count, 1)


def _read_shards(path: Path, count: int) -> list[Header]:
    paths = shard_paths(path)
    if len(paths) != count:
        raise ModelError(
            f"{path} is one of {count} shards, and its name does not say which",
            remedy=f"give the shards their names back, the first one being NAME-00001-of-{count:05d}.gguf",
        )
    missing = [p.name for p in paths if not p.exists()]
    if missing:
        raise ModelError(
            f"{len(missing)} of the {count} shards of {_stem(path)} {'is' if len(missing) == 1 else 'are'} missing: "
            f"{', '.join(missing[:4])}{', ...' if missing[4:] else ''}",
            remedy=f"put {'it' if len(missing) == 1 else 'them'} into {path.parent}",
        )
    headers = [read_header(p) for p in paths]
    for index, header in enumerate(headers):
        if _shard_count(header) != count or header.metadata.get("split.no") != index:
            raise ModelError(
                f"{header.path} is not shard {index + 1} of {count}: its header disagrees with its name", remedy=DAMAGED
            )
    total = headers[0].metadata.get("split.tensors.count")
    there = sum(len(h.tensors) for h in headers)
    if isinstance(total, int) and total != there:
        raise ModelError(f"the shards of {path} hold {there} tensors and should hold {total}", remedy=DAMAGED)
    return headers


def _weigh(headers: Sequence[Header]) -> ModelFile:
    path, metadata = headers[0].path, headers[0].metadata
    architecture = _architecture(headers[0])
    tensors = [t for h in headers for t in h.tensors]
    if len({t.name for t in tensors}) != len(tensors):
        raise ModelError(f"two shards of {path} hold the same tensor: they are of different sets", remedy=DAMAGED)
    keys = Keys(architecture, metadata)
    n_layers = _required(path, keys, "block_count", 1, 1024)
    n_embd = _required(path, keys, "embedding_length", 1, 1 << 20)
    layers, ends = _layers(path, tensors, n_layers)
    memory = weigh_layers(keys, layers, n_embd)
    embedding = next((t for t in tensors if t.name == "token_embd.weight"), None)
    if embedding is None:
        raise ModelError(f"{path} has no token embedding: it is not a whole language model", remedy=DAMAGED)
    outputs = sum(t.n_bytes for t in ends if _OUTPUT.match(t.name))
    tied = not any(t.name == "output.weight" for t in tensors)
    title, demo = metadata.get("general.name", ""), metadata.get("mesh.demo.version", 0)
    return ModelFile(
        paths=tuple(h.path for h in headers),
        name=_stem(path) or "model",
        title=title if isinstance(title, str) else "",
        architecture=architecture,
        quantisation=_quantisation(metadata, tensors),
        has_chat_template=bool(metadata.get("tokenizer.chat_template")),
        size_bytes=sum(h.file_bytes for h in headers),
        n_layers=n_layers,
        n_embd=n_embd,
        n_vocab=embedding.shape[-1],
        n_ctx_train=_required(path, keys, "context_length", 1, 1 << 31),
        layer_bytes=tuple(sum(t.n_bytes for t in layer) for layer in layers),
        input_bytes=sum(t.n_bytes for t in ends if not _OUTPUT.match(t.name)),
        output_bytes=outputs + (embedding.n_bytes if tied else 0),
        layers=memory,
        n_ff=widest_feed(keys, n_layers),
        weights=_main_type([t for layer in layers for t in layer])[:16],
        demo_version=demo if isinstance(demo, int) else 0,
    )


def _architecture(header: Header) -> str:
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise ModelError(
            f"{header.path} does not say which architecture it has", remedy="take a file made by a current converter"
        )
    kind = header.metadata.get("general.type", "model")
    other = _NOT_A_MODEL.get(architecture) or _NOT_A_MODEL.get(str(kind))
    if other:
        raise ModelError(
            f"{header.path} is {other}, not a language model", remedy="name the model's own file with --model"
        )
    return architecture


def _layers(path: Path, tensors: Sequence[Tensor], n_layers: int) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The tensors of each layer, and those that belong to none."""
    layers: list[list[Tensor]] = [[] for _ in range(n_layers)]
    ends: list[Tensor] = []
    for tensor in tensors:
        match = _LAYER.match(tensor.name)
        if match is None:
            ends.append(tensor)
        elif int(match[1]) < n_layers:
            layers[int(match[1])].append(tensor)
        else:
            raise ModelError(
                f"{path} is damaged: it has {n_layers} layers and a tensor {tensor.name!r}", remedy=DAMAGED
            )
    if not any(layers):
        raise ModelError(
            f"{path} holds a vocabulary only, no weights", remedy="name a whole model; `mesh models demo` writes one"
        )
    return layers, ends


def _required(path: Path, keys: Keys, key: str, low: int, high: int) -> int:
    name = f"{keys.architecture}.{key}"
    value = keys.metadata.get(name)
    if value is None:
        raise ModelError(
            f"{path} lacks the setting {name}: this mesh does not know how large it is",
            remedy="take a file made by a current converter; adapters and projectors are not models",
        )
    if not isinstance(value, int) or not low <= value <= high:
        raise ModelError(f"{path} is damaged: {name} is {value!r}", remedy=DAMAGED)
    return value


def _quantisation(metadata: Mapping[str, Value], tensors: Sequence[Tensor]) -> str:
    """The name people know, from the file's own word or else from the type that most bytes have."""
    kind = metadata.get("general.file_type")
    if isinstance(kind, int):
        try:
            return LlamaFileType(kind & 1023).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        except ValueError:
            pass
    return _main_type(tensors)


def _main_type(tensors: Sequence[Tensor]) -> str:
    weight: Counter[int] = Counter()
    for tensor in tensors:
        weight[tensor.type] += tensor.n_bytes
    return GGMLQuantizationType(weight.most_common(1)[0][0]).name
