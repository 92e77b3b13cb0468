"""The command ``bin/engine-bump``: see its help."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click

from mesh.engine.cache import cache_root
from mesh.engine.pin import VERSION, archive_name, patch_queue
from mesh.engine.source import download_source, fetch_source
from mesh.errors import MeshError, UsageError
from workshop.bump import (
    Move,
    carry_over,
    checked_archive,
    checked_version,
    finish,
    open_queue,
    protocol_of,
    resume,
    start,
)
from workshop.repository import Repository, export, write_queue

CHECKOUT = Path(__file__).resolve().parent.parent


class Lines:
    """Progress as lines on stderr."""

    def phase(self, text: str) -> None:
        print(text, file=sys.stderr)

    def advance(self, done: int, total: int, unit: str) -> None:
        pass


def _archive_of(version: str, given: Path | None, sha256: str | None) -> Path:
    """What was given, or a download that is kept beside the pinned source."""
    if given is not None:
        return given
    kept = cache_root() / "sources" / archive_name(version)
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        print(f"fetching llama-cpp-python {version} (about 77 MB)", file=sys.stderr)
        with tempfile.TemporaryDirectory(prefix="building-source-", dir=cache_root()) as scratch:
            download_source(version, sha256, Path(scratch), Lines()).replace(kept)
    return kept


def _begin(version: str, scratch: Path, archive: Path | None, sha256: str | None) -> tuple[Repository, Move]:
    if checked_version(version) == VERSION and archive is None:
        raise UsageError(f"the pin is at {version} already", remedy="bin/engine-bump --open DIRECTORY shows its queue")
    if scratch.exists() and any(scratch.iterdir()):
        raise UsageError(
            f"{scratch} is not empty: an earlier move was not finished",
            remedy=f"bin/engine-bump --continue, or rm -r {scratch} to give it up",
        )
    new = _archive_of(version, archive, sha256)
    digest = checked_archive(new, sha256)
    click.echo(
        f"llama-cpp-python {version}\nSHA-256 {digest}{'' if sha256 else '  (compare with the package index)'}\n"
    )
    repository = open_queue(scratch, fetch_source(Lines()), VERSION, patch_queue())
    move = Move(version, digest, protocol_of(scratch))
    start(repository, new, move)
    return repository, move


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.argument("version", required=False)
@click.option("--archive", type=click.Path(path_type=Path), help="The new source, when it is here already.")
@click.option("--sha256", help="What the new archive's hash has to be.")
@click.option("--continue", "go_on", is_flag=True, help="Go on with a move after its conflict was resolved.")
@click.option(
    "--scratch",
    type=click.Path(path_type=Path),
    default=CHECKOUT / ".engine-bump",
    show_default=".engine-bump in the checkout",
    help="Where the move is worked on.",
)
@click.option(
    "--open", "open_at", type=click.Path(path_type=Path), help="Make a repository of the present queue there."
)
@click.option(
    "--export", "export_from", type=click.Path(path_type=Path), help="Write patches/ from a repository's commits."
)
def command(
    version: str | None,
    archive: Path | None,
    sha256: str | None,
    go_on: bool,
    scratch: Path,
    open_at: Path | None,
    export_from: Path | None,
) -> None:
    """Change a patch of the engine, or move its pin to another VERSION of llama-cpp-python.

    \b
    To change, add or drop a patch:
      bin/engine-bump --open /tmp/engine     the source, then one commit per patch
      ... change and commit there; git rebase -i --autosquash engine-base keeps one commit per patch ...
      bin/engine-bump --export /tmp/engine   the files of patches/ again, and series
    A commit's message is the patch's header: the subject first, then Why:, Upstream:, Measured:. Its last line,
    "Patch-name:", is the file's name without its number; a commit without one gets its name from its subject.

    \b
    To move the pin:
      bin/engine-bump 0.3.37                 fetches it, and brings the queue over, patch by patch
      bin/engine-bump --continue             after a conflict was resolved and `git add`ed
    Each patch is said to apply exactly, to be merged (with the first hunk that did not fit), or to be in conflict.
    In the end patches/ and mesh/engine/pin.py are those of the new source. Look at what was merged before you build.
    """
    if sum((version is not None, go_on, open_at is not None, export_from is not None)) != 1:
        raise UsageError(
            "one of: VERSION, --continue, --open DIRECTORY, --export DIRECTORY", remedy="bin/engine-bump --help"
        )
    if open_at is not None:
        repository = open_queue(open_at.absolute(), fetch_source(Lines()), VERSION, patch_queue())
        click.echo(f"{len(patch_queue())} patches on llama-cpp-python {VERSION}: {repository.root}")
    elif export_from is not None:
        changed = write_queue(export(Repository(export_from.absolute())), CHECKOUT / "patches")
        click.echo("\n".join(f"patches/{name}" for name in changed) or "nothing changed")
    else:
        repository, move = resume(scratch) if version is None else _begin(version, scratch, archive, sha256)
        if not carry_over(repository, click.echo):
            sys.exit(1)
        finish(repository, move, CHECKOUT, click.echo)
        click.echo(f"(the repository stays in {repository.root}; remove it when the move is committed)")


def main() -> None:
    """Run it; what goes wrong is told in a line, with what to do."""
    try:
        command(standalone_mode=False)
    except MeshError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.Abort:
        sys.exit(130)


if __name__ == "__main__":
    main()
