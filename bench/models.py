"""The models that figures are made with."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from bench.measure import BenchError
from mesh.models.demo import DEMO_VERSION, PRESETS, write_demo


def find_model(name: str, vocabularies: Path) -> Path:
    """A preset of the demo model, written once per user, or a file.

    Raises:
        BenchError: neither.
    """
    if name not in PRESETS:
        path = Path(name).expanduser().absolute()
        if not path.is_file():
            raise BenchError(f"{name} is no file and none of {', '.join(PRESETS)}")
        return path
    directory = Path(platformdirs.user_cache_dir("mesh-bench", appauthor=False))
    directory.mkdir(parents=True, exist_ok=True)
    # The generator's version only counts for one preset; its source covers the others too.
    source = Path(write_demo.__code__.co_filename).stat()
    path = directory / f"{name}-v{DEMO_VERSION}-{source.st_mtime_ns:x}.gguf"
    if not path.exists():
        for old in directory.glob(f"{name}-v*.gguf"):
            old.unlink()
        partial = path.with_suffix(f".{os.getpid()}.gguf")
        write_demo(partial, vocabularies / "ggml-vocab-llama-spm.gguf", preset=name)
        partial.replace(path)
    return path
