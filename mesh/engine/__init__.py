"""The engine room: the pinned, patched llama.cpp. Built once, found by content, run with command lines made here."""

from mesh.engine.build import build_engine
from mesh.engine.cache import Engine, cache_root, find_engine
from mesh.engine.pin import engine_pin
from mesh.engine.source import BuildProgress
from mesh.engine.toolchain import BACKENDS, find_toolchain

__all__ = [
    "BACKENDS",
    "BuildProgress",
    "Engine",
    "build_engine",
    "cache_root",
    "engine_pin",
    "find_engine",
    "find_toolchain",
]
