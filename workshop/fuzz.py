"""The command ``bin/fuzz``: bytes of strangers, bred by what they reach in our code (libFuzzer, through atheris).

For Linux and macOS; atheris has no wheels for Windows. msgspec is compiled and shows the fuzzer no branches of its own,
so for ``control`` and ``opening`` it works from the seeds and from what our side does with the outcome; what is written
in Python (tokens, grants, frames, STUN, addresses) it sees line by line.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click

_CHILD = "MESH_FUZZ_TARGET"
_LONGEST = 4096


@click.command()
@click.argument("targets", nargs=-1)
@click.option("--seconds", default=30, show_default=True, help="for each target")
@click.option("--corpus", type=click.Path(path_type=Path), help="where inputs are kept between runs; else nowhere")
def main(targets: tuple[str, ...], seconds: int, corpus: Path | None) -> None:
    """Fuzz TARGETS, or all of them. Ends with 1 and the input when one of them breaks."""
    if importlib.util.find_spec("atheris") is None:
        raise click.ClickException(
            f"the fuzzer is not installed; to install it:  {sys.executable} -m pip install 'atheris>=3,<4'"
        )
    known = importlib.import_module("workshop.fuzz_targets").TARGETS
    unknown = [name for name in targets if name not in known]
    if unknown:
        raise click.UsageError(f"there is no target {unknown[0]!r}; there are {', '.join(known)}")
    failed = []
    for name in targets or tuple(known):
        with tempfile.TemporaryDirectory(prefix="mesh-fuzz-") as scratch:
            kept = (corpus or Path(scratch)) / name
            kept.mkdir(parents=True, exist_ok=True)
            for number, seed in enumerate(known[name].seeds):
                (kept / f"seed-{number}").write_bytes(seed)
            print(f"-- {name}", flush=True)
            arguments = [f"-max_total_time={seconds}", f"-max_len={_LONGEST}", "-timeout=5", "-rss_limit_mb=1024"]
            # libFuzzer leaves with its own exit, so each target has a process.
            done = subprocess.run(
                [sys.executable, "-m", "workshop.fuzz", *arguments, "-print_final_stats=1",
                 f"-artifact_prefix={Path.cwd()}/fuzz-{name}-", str(kept)],
                env={**os.environ, _CHILD: name}, check=False,
            )  # fmt: skip
            if done.returncode:
                failed.append(name)
    if failed:
        raise click.ClickException(f"broken: {', '.join(failed)}; the input is in fuzz-NAME-crash-* here")


def _fuzz(name: str) -> None:
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["mesh", "workshop.fuzz_targets"]):
        target = importlib.import_module("workshop.fuzz_targets").TARGETS[name]
    atheris.Setup(sys.argv, target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    if _CHILD in os.environ:
        _fuzz(os.environ[_CHILD])
    else:
        main()
