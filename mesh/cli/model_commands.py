"""Commands about model files."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mesh.cli.output import print_json, print_table
from mesh.cli.view import make_view
from mesh.config import format_size
from mesh.models.demo import DEMO_NAME, write_demo
from mesh.models.gguf import ModelFile
from mesh.models.inventory import Inventory, models_directory
from mesh.models.write import split_gguf
from mesh.node.backend import prepare_engine
from mesh.node.prepare import measure


def list_all(as_json: bool) -> None:
    """Usable models, and files that only look like some."""
    scan = Inventory().scan()
    if as_json:
        print_json(
            {
                "directory": str(models_directory()),
                "models": [_summary(model) for model in scan.models],
                "broken": [{"path": str(path), "reason": error.message} for path, error in scan.broken],
            }
        )
        return
    click.echo(f"{models_directory()}\n")
    if not scan.models and not scan.broken:
        click.echo("no models; put GGUF files there, give a path with --model, or try: mesh up --demo")
    rows = [
        [model.name, format_size(model.size_bytes), model.quantisation, model.architecture, str(model.n_layers)]
        for model in scan.models
    ]
    if rows:
        print_table(["model", "size>", "type", "architecture", "layers>"], rows)
    for path, error in scan.broken:
        click.secho(f"unusable: {path.name}: {error.message}", fg="yellow")


def inspect(name: str, as_json: bool) -> None:
    """Everything the planner knows of a model."""
    file = Inventory().find(name)
    view = make_view(plain=False, json_lines=False, stream=sys.stderr)
    try:
        cost = measure(file, view).cost
    finally:
        view.close()
    if as_json:
        print_json(
            {
                **_summary(file),
                "fingerprint": cost.fingerprint,
                "layer_bytes": list(cost.layer_bytes),
                "input_bytes": cost.input_bytes,
                "output_bytes": cost.output_bytes,
                "kv_bytes_per_token": list(cost.kv_bytes_per_token),
            }
        )
        return
    kv = sum(cost.kv_bytes_per_token)
    rows = [
        ["name", file.name + (f'  ("{file.title}")' if file.title else "")],
        ["files", "\n".join(map(str, file.paths))],
        ["fingerprint", cost.fingerprint],
        ["type", f"{file.architecture}, {file.quantisation}, {format_size(file.size_bytes)}"],
        ["layers", f"{file.n_layers} of about {format_size(max(cost.layer_bytes))}"],
        ["ends", f"{format_size(cost.input_bytes)} in, {format_size(cost.output_bytes)} out, on the host"],
        ["KV cache", f"{format_size(kv)} per token, {format_size(kv * 4096)} for a context of 4096"],
        ["context", f"{file.n_ctx_train} tokens in training"],
        ["chat", "has a chat template" if file.has_chat_template else "no chat template"],
    ]
    print_table(["", ""], rows)


def demo(path: Path | None, preset: str, shards: int, as_json: bool) -> None:
    """Write the demo model; ``path`` may be a directory."""
    name = DEMO_NAME if preset == "demo" else f"{DEMO_NAME}-{preset}"
    target = path or models_directory()
    if target.is_dir() or path is None or target.suffix != ".gguf":
        target = target / f"{name}.gguf"
    view = make_view(plain=False, json_lines=False, stream=sys.stderr)
    try:
        engine = prepare_engine("auto", view)
        vocab = engine.vocab("llama-spm")
        file = write_demo(
            target, vocab, preset=preset, progress=lambda done, total: view.progress(f"writing {name}", done, total)
        )
    finally:
        view.close()
    written: tuple[Path, ...] = (target,)
    if shards > 1:
        written = split_gguf(target, shards)
        target.unlink()
    if as_json:
        print_json({"paths": [str(part) for part in written], "size_bytes": file.size_bytes})
        return
    for part in written:
        click.echo(part)
    click.echo(f"{format_size(file.size_bytes)}; serve it with: mesh up --model {written[0]}", err=True)


def _summary(model: ModelFile) -> dict[str, object]:
    return {
        "name": model.name,
        "title": model.title,
        "paths": [str(path) for path in model.paths],
        "size_bytes": model.size_bytes,
        "architecture": model.architecture,
        "quantisation": model.quantisation,
        "n_layers": model.n_layers,
        "n_embd": model.n_embd,
        "n_ctx_train": model.n_ctx_train,
        "has_chat_template": model.has_chat_template,
    }
