"""The models that figures are made with."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import platformdirs

from bench.measure import BenchError
from bench.noise import SHAPES, write_noise
from mesh.models.demo import PRESETS, write_demo

_FORGOTTEN_AFTER_S = 86400.0


def find_model(name: str, vocabularies: Path) -> Path:
    """A preset of the demo model or ``noise-PRESET`` (:mod:`bench.noise`), written once per user, or a file.

    Raises:
        BenchError: none of them.
    """
    preset = name.removeprefix("noise-")
    writer, presets = (write_demo, PRESETS) if preset == name else (write_noise, SHAPES)
    if preset not in presets:
        path = Path(name).expanduser().absolute()
        if not path.is_file():
            known = ", ".join([*PRESETS, *(f"noise-{shape}" for shape in SHAPES)])
            raise BenchError(f"{name} is no file and none of {known}")
        return path
    directory = Path(platformdirs.user_cache_dir("mesh-bench", appauthor=False))
    directory.mkdir(parents=True, exist_ok=True)
    # The generator's version only counts for one preset; its source covers the others too.
    source = hashlib.sha256(Path(writer.__code__.co_filename).read_bytes()).hexdigest()[:12]
    path = directory / f"{name}-{source}.gguf"
    if path.exists():
        path.touch()
    else:
        for old in directory.glob("*.gguf"):
            if time.time() - old.stat().st_mtime > _FORGOTTEN_AFTER_S:  # a bench may be using a younger one
                old.unlink()
        partial = path.with_suffix(f".{os.getpid()}.gguf")
        writer(partial, vocabularies / "ggml-vocab-llama-spm.gguf", preset=preset)
        partial.replace(path)
    return path
