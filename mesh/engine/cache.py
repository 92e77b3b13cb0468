"""Where built engines live, and when one counts as built.

An entry is a directory named after everything that went into it. It appears by a rename once it is complete, and names
the size of each file it holds, so that neither a killed build nor a lost disk write is taken for an engine.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from mesh.engine.pin import SOURCE, engine_pin, patch_queue, queue_digest
from mesh.engine.toolchain import build_flags
from mesh.errors import EngineError

BINARIES = ("llama-server", "ggml-rpc-server", "llama-bench")
VOCABULARIES = ("llama-spm", "llama-bpe")
RECORD = "engine.json"
_RECORD_FORMAT = 1
# What -march=native may emit; the rest of the line changes with kernels and microcode, not with what the CPU can run.
_X86_FEATURE = re.compile(
    r"^(mmx|sse|pni|ssse|avx|amx|fma|f16c|bmi|abm|lzcnt|popcnt|movbe|vaes|aes|pclmul|vpclmul|gfni|sha|adx|xsave|rdrnd"
    r"|rdseed|lahf|cx16|fsgsbase|clflushopt|clwb|prefetchw|rdpid|movdir|serialize|waitpkg|cldemote|lm$|cmov)"
)


@dataclass(frozen=True, slots=True)
class Engine:
    """One finished entry of the cache."""

    dir: Path
    pin: str
    backend: str
    llama_server: Path
    rpc_server: Path
    llama_bench: Path

    def vocab(self, name: str) -> Path:
        """A tokenizer-only GGUF of the engine's source: ``llama-spm`` (32,000 tokens) or ``llama-bpe`` (128,256).

        Raises:
            EngineError: this engine keeps no such vocabulary.
        """
        path = self.dir / "vocab" / f"ggml-vocab-{name}.gguf"
        if name not in VOCABULARIES or not path.is_file():
            raise EngineError(
                f"the engine in {self.dir} has no vocabulary {name!r}; it keeps {', '.join(VOCABULARIES)}",
                remedy="mesh engine build",
            )
        return path


def cache_root() -> Path:
    """The user's directory of engines: ``MESH_CACHE_DIR``, or what the platform calls a cache, then ``engine``."""
    base = os.environ.get("MESH_CACHE_DIR")
    return (Path(base).expanduser().absolute() if base else platformdirs.user_cache_path("mesh")) / "engine"


def executable(directory: Path, name: str) -> Path:
    """The path of a program in ``directory``, as this platform names programs."""
    return directory / (f"{name}.exe" if sys.platform == "win32" else name)


def cpu_features() -> str:
    """What this processor can run, as text to be hashed; empty where the platform does not tell."""
    if sys.platform == "darwin":
        names = ("machdep.cpu.brand_string", "machdep.cpu.features", "machdep.cpu.leaf7_features")
        asked = subprocess.run(["/usr/sbin/sysctl", "-n", *names], capture_output=True, text=True, check=False)
        return asked.stdout.strip()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.processor()
    return _features_in(lines)


def _features_in(cpuinfo: list[str]) -> str:
    fields = dict(reversed([(k.strip(), v.strip()) for k, _, v in (line.partition(":") for line in cpuinfo)]))
    if "flags" in fields:
        return " ".join(sorted(f for f in fields["flags"].split() if _X86_FEATURE.match(f)))
    arm = ("Features", "CPU implementer", "CPU architecture", "CPU part")
    return "; ".join(fields[name] for name in arm if name in fields) or platform.processor()


def platform_tag() -> str:
    """System, machine and C library: what a binary needs besides a processor."""
    return " ".join((sys.platform, platform.machine(), *platform.libc_ver()))


def cache_key(pin: str, flags: tuple[str, ...], system: str, features: str) -> str:
    """Sixteen hex digits of everything that decides whether a binary is the right one here."""
    parts = json.dumps([pin, list(flags), system, features])
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def entry_named(name: str, flags: tuple[str, ...]) -> Path:
    """Where something that is built here from this version's source with ``flags`` belongs, built or not."""
    return cache_root() / f"{name}-{cache_key(engine_pin(), flags, platform_tag(), cpu_features())}"


def entry_dir(backend: str) -> Path:
    """Where the engine of this version of mesh for this machine belongs, built or not."""
    return entry_named(backend, build_flags(backend))


def describe(directory: Path, backend: str, flags: tuple[str, ...], *, built_at: int, seconds: float) -> str:
    """The text of ``engine.json`` for a directory that holds all its files."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != RECORD)
    record = {
        "format": _RECORD_FORMAT,
        "pin": engine_pin(),
        "source": SOURCE,
        "patches": queue_digest(patch_queue()),
        "backend": backend,
        "flags": flags,
        "platform": platform_tag(),
        "built_at": built_at,
        "build_seconds": round(seconds, 1),
        "files": {p.relative_to(directory).as_posix(): p.stat().st_size for p in files},
    }
    return json.dumps(record, indent=1)


def open_programs(directory: Path, names: tuple[str, ...]) -> list[Path] | None:
    """The programs in ``directory``, or None unless every file that belongs there is there in full."""
    try:
        record = json.loads((directory / RECORD).read_text("utf-8"))
        whole = all((directory / name).stat().st_size == size for name, size in record["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    programs = [executable(directory, name) for name in names]
    if not whole or record.get("format") != _RECORD_FORMAT or record.get("pin") != engine_pin():
        return None
    return programs if all(os.access(program, os.X_OK) for program in programs) else None


def damage(directory: Path) -> str:
    """What keeps an entry from being an engine, in words; empty when nothing does."""
    try:
        record = json.loads((directory / RECORD).read_text("utf-8"))
        files = dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {RECORD} cannot be read ({type(error).__name__})"
    for name, size in files.items():
        try:
            there = (directory / name).stat().st_size
        except OSError as error:
            return f"{name}: {error.strerror or error}"
        if there != size:
            return f"{name} has {there} bytes and should have {size}"
    lame = [name for name in BINARIES if not os.access(executable(directory, name), os.X_OK)]
    return f"{lame[0]} may not be executed" if lame else ""


def open_engine(directory: Path, backend: str) -> Engine | None:
    """The engine in ``directory``, or None unless every file of it is there in full."""
    programs = open_programs(directory, BINARIES)
    return None if programs is None else Engine(directory, engine_pin(), backend, *programs)


def find_engine(backend: str = "cpu") -> Engine | None:
    """The finished engine of this version of mesh for this machine and ``backend``, or None if it is yet to be built.

    Raises:
        EngineError: no such backend, or this installation lacks its patches.
    """
    return open_engine(entry_dir(backend), backend)
