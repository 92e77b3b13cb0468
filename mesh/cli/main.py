"""The command line: what each command takes, and how errors look. The work is elsewhere."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.exceptions import NoArgsIsHelpError

from mesh import __version__
from mesh.cli import output
from mesh.cli.crash import internal_error
from mesh.config import BACKENDS, SPLITS, WIRE_DTYPES, default_state_dir, load_settings, parse_duration, parse_size
from mesh.errors import MeshError, UsageError

F = TypeVar("F", bound=Callable[..., Any])


def _size(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    return None if value is None else _usage(parse_size, value)


def _not_empty(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is not None and not value.strip():
        raise click.BadParameter("it is empty; name a GGUF file, or a model in the models folder")
    return value


def _duration(_: click.Context, __: click.Parameter, value: str) -> float:
    return float(_usage(parse_duration, value))


def _usage(parse: Callable[[str], Any], value: str) -> Any:
    try:
        return parse(value)
    except UsageError as error:
        raise click.BadParameter(f"{error.message}; {error.remedy}") from error


_state_dir = click.option(
    "--state-dir", type=click.Path(path_type=Path), metavar="DIR",
    help="Where the node keeps its key, grants and logs. Give each node on one machine its own.",
)  # fmt: skip
_no_node = click.option(
    "--state-dir", expose_value=False, metavar="DIR", help="Taken by every command; this one needs no node."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
_port = click.IntRange(0, 65535)
_positive = click.IntRange(min=1)


def _options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


_plan_options = _options(
    click.option(
        "--model",
        callback=_not_empty,
        metavar="PATH|NAME",
        help="A GGUF file, or the name of one in the models folder.",
    ),
    click.option("--max-memory", callback=_size, metavar="SIZE", help="Use at most this much memory, e.g. 12GB."),
    click.option("--ctx-size", type=_positive, metavar="N", help="Context of one slot, tokens."),
    click.option("--parallel", type=click.IntRange(1, 256), metavar="N", help="Requests answered at the same time."),
    click.option("--split", type=click.Choice(SPLITS), help="Spread the model: when needed (auto), always, or never."),
    click.option("--backend", type=click.Choice(BACKENDS), help="What computes. Default: the best that is built."),
    click.option(
        "--gpu-layers", type=click.IntRange(min=0), metavar="N", help="At most this many layers on this machine's GPU."
    ),
)
_net_options = _options(
    click.option("--join", multiple=True, metavar="TOKEN", help="Join the mesh that gave this invite."),
    click.option("--bind-port", type=_port, metavar="N", help="UDP and TCP port other nodes reach. Default 7842."),
    click.option("--api-port", type=_port, metavar="N", help="Port of the API on this machine. Default 9337."),
    click.option("--name", metavar="NAME", help="What people call this machine. Default: its host name."),
    _state_dir,
    click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="TOML with any of these settings."),
    click.option("--bind-host", multiple=True, metavar="ADDR", help="Listen only on this address. Repeatable."),
    click.option("--advertise", multiple=True, metavar="HOST:PORT", help="An address others reach this node by."),
    click.option("--no-discovery", is_flag=True, default=None, help="Send and answer no local announcements."),
    click.option("--plain", is_flag=True, default=None, help="Plain lines even in a terminal."),
    click.option("--json-logs", is_flag=True, default=None, help="One JSON object per line."),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mesh")
def cli() -> None:
    """Run one large language model on the machines you already own.

    \b
    On the first machine:      mesh up --demo          (or --model FILE.gguf)
    To let another one in:     mesh invite             prints the line to paste there
    On the other machine:      mesh up --join TOKEN
    Without lending memory:    mesh client --join TOKEN
    Then, on any of them:      curl http://localhost:9337/v1/models
    """


@cli.command()
@_plan_options
@click.option("--demo", is_flag=True, default=None, help="Serve a tiny built-in model: try everything offline.")
@_net_options
@click.option(
    "--relay-only", is_flag=True, default=None, help="Carry traffic for others, compute nothing (not built yet)."
)
@click.option(
    "--api-key-file", type=click.Path(path_type=Path), metavar="FILE", help="Keys the API asks for, one per line."
)
@click.option(
    "--wire-dtype",
    type=click.Choice(WIRE_DTYPES),
    help="Number format of activations between machines; only f32 is built.",
)
def up(config: Path | None, **flags: Any) -> None:
    """Start this machine as a member, and serve.

    \b
    mesh up --demo                         try it, alone
    mesh up --model ~/models/qwen.gguf     found a mesh around a model
    mesh up --join mesh1...                lend this machine to a mesh
    mesh up                                come back to the mesh this machine was in

    Ctrl-C, SIGTERM or `mesh down` stop it and everything it started (exit 0); a second Ctrl-C does not wait (130).
    """
    from mesh.cli import up as run

    run.run_node(load_settings({**flags, "role": "worker"}, config))


@cli.command()
@_net_options
def client(config: Path | None, **flags: Any) -> None:
    """Use a mesh from this machine without lending it.

    No engine, no model, the same local API.

    \b
    mesh client --join mesh1...            then: curl http://localhost:9337/v1/models
    """
    from mesh.cli import up as run

    run.run_node(load_settings({**flags, "role": "client"}, config))


@cli.command()
@click.option(
    "--uses", type=click.IntRange(1, 1000), metavar="N", default=1, show_default=True, help="How many may join with it."
)
@click.option(
    "--expires",
    "expires_s",
    metavar="TIME",
    default="1h",
    show_default=True,
    callback=_duration,
    help="For how long: 90s, 10m, 1h or 7d.",
)
@click.option(
    "--role",
    type=click.Choice(["worker", "client"]),
    default="worker",
    show_default=True,
    help="Lend memory and compute, or use the mesh only.",
)
@_state_dir
@_json
def invite(state_dir: Path | None, **arguments: Any) -> None:
    """Print a token that lets another machine in.

    Whoever holds a worker token will compute part of your prompts, and you will run on their machine: give it to
    people you trust.
    """
    from mesh.cli import remote_commands

    remote_commands.invite(_dir(state_dir), **arguments)


@cli.command()
@_state_dir
@_json
def status(state_dir: Path | None, as_json: bool) -> None:
    """Who is in, who carries which layers, and how it goes."""
    from mesh.cli import remote_commands

    remote_commands.status(_dir(state_dir), as_json)


@cli.command()
@_plan_options
@_state_dir
@_json
def plan(state_dir: Path | None, as_json: bool, **flags: Any) -> None:
    """Show who would carry what, before anything starts.

    With a running node: over the machines in its mesh, as if it had been started with these options. Without: over
    this machine alone.
    """
    from mesh.cli import local_commands

    local_commands.plan(_dir(state_dir), as_json, {name: value for name, value in flags.items() if value is not None})


@cli.command()
@_state_dir
@_json
def doctor(state_dir: Path | None, as_json: bool) -> None:
    """Check this machine, with a remedy for each finding.

    Looks at the engine, tools, devices, disk, models, and the node or its ports. Exit 1 when something is wrong.
    """
    from mesh.cli import doctor as checks

    checks.run(_dir(state_dir), as_json)


@cli.command()
@click.argument("code")
@_state_dir
def approve(code: str, state_dir: Path | None) -> None:
    """Let in a machine by the code that it shows (not built yet)."""
    from mesh.cli import remote_commands

    remote_commands.approve(_dir(state_dir), code)


@cli.command()
@click.argument("node")
@_state_dir
@_json
def revoke(node: str, state_dir: Path | None, as_json: bool) -> None:
    """Throw NODE (a name or an id from `mesh status`) out, for good."""
    from mesh.cli import remote_commands

    remote_commands.revoke(_dir(state_dir), node, as_json)


@cli.command()
@_state_dir
def leave(state_dir: Path | None) -> None:
    """Leave the mesh for good and stop; coming back takes a new invite."""
    from mesh.cli import remote_commands

    remote_commands.leave(_dir(state_dir))


@cli.command()
@_state_dir
def down(state_dir: Path | None) -> None:
    """Stop this node; `mesh up` brings it back to the same mesh."""
    from mesh.cli import remote_commands

    remote_commands.down(_dir(state_dir))


@cli.command()
@click.option("-f", "--follow", is_flag=True, help="Keep printing what comes.")
@_state_dir
def logs(follow: bool, state_dir: Path | None) -> None:
    """Print the logs of this node and its engine."""
    from mesh.cli import local_commands

    local_commands.logs(_dir(state_dir), follow)


@cli.group()
def engine() -> None:
    """The patched llama.cpp this node runs."""


@engine.command("build")
@click.option(
    "--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="What it shall compute on."
)
@_no_node
@_json
def engine_build(backend: str, as_json: bool) -> None:
    """Fetch, patch and compile the engine, unless this user's cache has it."""
    from mesh.cli import local_commands

    local_commands.engine_build(backend, as_json)


@engine.command("info")
@_no_node
@_json
def engine_info(as_json: bool) -> None:
    """What is pinned, and what is built."""
    from mesh.cli import local_commands

    local_commands.engine_info(as_json)


@cli.group()
def models() -> None:
    """Model files on this machine."""


@models.command("list")
@_no_node
@_json
def models_list(as_json: bool) -> None:
    """Models in the models folder."""
    from mesh.cli import model_commands

    model_commands.list_all(as_json)


@models.command("inspect")
@click.argument("model", metavar="PATH|NAME", callback=_not_empty)
@_no_node
@_json
def models_inspect(model: str, as_json: bool) -> None:
    """What a model is, what it asks of memory, and its fingerprint."""
    from mesh.cli import model_commands

    model_commands.inspect(model, as_json)


@models.command("demo")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--preset", type=click.Choice(["demo", "mid"]), default="demo", show_default=True, help="30 MB, or 270.")
@click.option(
    "--shards", type=click.IntRange(1, 99), metavar="N", default=1, show_default=True, help="Write it in N files."
)
@_no_node
@_json
def models_demo(path: Path | None, preset: str, shards: int, as_json: bool) -> None:
    """Write a small seeded model, the same bytes on every machine.

    PATH is a file or a directory; without it, the models folder.
    """
    from mesh.cli import model_commands

    model_commands.demo(path, preset, shards, as_json)


@cli.command()
@click.option(
    "--tokens", type=click.IntRange(1, 4096), metavar="N", default=64, show_default=True, help="Tokens to generate."
)
@click.option(
    "--runs", type=click.IntRange(1, 100), metavar="N", default=3, show_default=True, help="How often to measure."
)
@_state_dir
@_json
def bench(state_dir: Path | None, **arguments: Any) -> None:
    """Measure the running mesh.

    Time to first token, prompt and generation tok/s, through this machine's own API; the median of some runs.
    """
    from mesh.cli import remote_commands

    remote_commands.bench(_dir(state_dir), **arguments)


def _dir(given: Path | None) -> Path:
    return (given or default_state_dir()).expanduser().absolute()


def main() -> None:
    """Entry point of the console script. Exit status: 0, 1 failed, 2 wrong usage, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a name this terminal cannot show is no reason to stop
    _on_signals(_interrupt, "SIGTERM", "SIGHUP")
    status = _run(sys.argv[1:])
    # All is done; while Python winds itself up, a late Ctrl-C must not turn a clean end into a death by signal.
    _on_signals(signal.SIG_IGN, "SIGINT", "SIGTERM", "SIGHUP")
    sys.exit(status)


def _on_signals(handler: Any, *names: str) -> None:
    for name in names:
        if hasattr(signal, name):  # Windows knows few
            signal.signal(getattr(signal, name), handler)


def _interrupt(*_: object) -> None:
    # As Ctrl-C does: whatever is under way, a compiler for one, is stopped on the way out.
    raise KeyboardInterrupt


def _run(arguments: list[str]) -> int:
    try:
        status = cli.main(arguments, prog_name="mesh", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.UsageError as error:
        of = "mesh" if error.ctx is None else error.ctx.command_path
        output.show_error(UsageError(_sentence(error.format_message()), remedy=f"see: {of} --help"), arguments)
        return 2
    except click.ClickException as error:
        output.show_error(MeshError(error.format_message()), arguments)
        return 1
    except MeshError as error:
        output.show_error(error, arguments)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        # Whoever reads us, `head` for one, has seen enough; nothing more is flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        output.show_error(internal_error(error, _state_dir_in(arguments)), arguments)
        return 1


def _sentence(text: str) -> str:
    """Click's words in the form of ours."""
    return (text[:1].lower() + text[1:]).rstrip(".").replace(". Did you mean", "; did you mean")


def _state_dir_in(arguments: list[str]) -> Path:
    for at, argument in enumerate(arguments):
        if argument.startswith("--state-dir="):
            return _dir(Path(argument.partition("=")[2]))
        if argument == "--state-dir" and at + 1 < len(arguments):
            return _dir(Path(arguments[at + 1]))
    return default_state_dir()
