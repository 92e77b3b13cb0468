"""The command line: what each command takes, and how errors look. The work is elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from mesh import __version__
from mesh.cli import output
from mesh.config import BACKENDS, SPLITS, WIRE_DTYPES, default_state_dir, load_settings, parse_duration, parse_size
from mesh.errors import MeshError, UsageError

F = TypeVar("F", bound=Callable[..., Any])


class _Group(click.Group):
    """Shows a :class:`MeshError` as one sentence and a remedy, or as JSON where ``--json`` was given."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MeshError as error:
            output.show_error(error, as_json="--json" in sys.argv)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            ctx.exit(130)


def _size(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    return None if value is None else _usage(parse_size, value)


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
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")


def _options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


_plan_options = _options(
    click.option("--model", metavar="PATH|NAME", help="A GGUF file, or the name of one in the models folder."),
    click.option("--max-memory", callback=_size, metavar="SIZE", help="Use at most this much memory, e.g. 12GB."),
    click.option("--ctx-size", type=int, metavar="N", help="Context of one slot, tokens."),
    click.option("--parallel", type=int, metavar="N", help="Requests answered at the same time."),
    click.option("--split", type=click.Choice(SPLITS), help="Spread the model: when needed (auto), always, or never."),
    click.option("--backend", type=click.Choice(BACKENDS), help="What computes. Default: the best that is built."),
    click.option("--gpu-layers", type=int, metavar="N", help="At most this many layers on this machine's GPU."),
)
_net_options = _options(
    click.option("--join", multiple=True, metavar="TOKEN", help="Join the mesh that gave this invite."),
    click.option("--bind-port", type=int, metavar="N", help="UDP port other nodes reach. Default 7842."),
    click.option("--api-port", type=int, metavar="N", help="Port of the API on this machine. Default 9337."),
    click.option("--name", metavar="NAME", help="What people call this machine. Default: its host name."),
    _state_dir,
    click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="TOML with any of these settings."),
    click.option("--bind-host", multiple=True, metavar="ADDR", help="Listen only on this address. Repeatable."),
    click.option("--advertise", multiple=True, metavar="HOST:PORT", help="An address others reach this node by."),
    click.option("--no-discovery", is_flag=True, default=None, help="Send and answer no local announcements."),
    click.option("--plain", is_flag=True, default=None, help="Plain lines even in a terminal."),
    click.option("--json-logs", is_flag=True, default=None, help="One JSON object per line."),
)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
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
@click.option("--relay-only", is_flag=True, default=None, help="Carry traffic for others, compute nothing.")
@click.option(
    "--api-key-file", type=click.Path(path_type=Path), metavar="FILE", help="Keys the API asks for, one per line."
)
@click.option("--wire-dtype", type=click.Choice(WIRE_DTYPES), help="Number format of activations between machines.")
def up(config: Path | None, **flags: Any) -> None:
    """Start this machine as a member, and serve.

    \b
    mesh up --demo                         try it, alone
    mesh up --model ~/models/qwen.gguf     found a mesh around a model
    mesh up --join mesh1...                lend this machine to a mesh
    mesh up                                come back to the mesh this machine was in
    """
    from mesh.cli import up as run

    run.run_node(load_settings({**flags, "role": "worker"}, config))


@cli.command()
@_net_options
def client(config: Path | None, **flags: Any) -> None:
    """Use a mesh from this machine without lending it: no engine, no model, the same local API.

    \b
    mesh client --join mesh1...            then: curl http://localhost:9337/v1/models
    """
    from mesh.cli import up as run

    run.run_node(load_settings({**flags, "role": "client"}, config))


@cli.command()
@click.option("--uses", type=click.IntRange(1, 1000), default=1, show_default=True, help="How many may join with it.")
@click.option("--expires", "expires_s", default="1h", show_default=True, callback=_duration, help="For how long.")
@click.option("--role", type=click.Choice(["worker", "client"]), default="worker", show_default=True)
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

    With a running node: the plan over the machines in its mesh. Without: over this machine alone.
    """
    from mesh.cli import local_commands

    local_commands.plan(_dir(state_dir), as_json, {name: value for name, value in flags.items() if value is not None})


@cli.command()
@_state_dir
@_json
def doctor(state_dir: Path | None, as_json: bool) -> None:
    """Check this machine: tools, engine, devices, ports, models. Exit 1 when something needs doing."""
    from mesh.cli import doctor as checks

    checks.run(_dir(state_dir), as_json)


@cli.command()
@click.argument("code")
@_state_dir
def approve(code: str, state_dir: Path | None) -> None:
    """Let in a machine on this network by the code that it shows."""
    from mesh.cli import remote_commands

    remote_commands.approve(_dir(state_dir), code)


@cli.command()
@click.argument("node")
@_state_dir
def revoke(node: str, state_dir: Path | None) -> None:
    """Throw NODE (a name or an id from `mesh status`) out, for good."""
    from mesh.cli import remote_commands

    remote_commands.revoke(_dir(state_dir), node)


@cli.command()
@_state_dir
def leave(state_dir: Path | None) -> None:
    """Leave the mesh for good and stop; coming back takes a new invite."""
    from mesh.cli import remote_commands

    remote_commands.stop(_dir(state_dir), "leave")


@cli.command()
@_state_dir
def down(state_dir: Path | None) -> None:
    """Stop this node; `mesh up` brings it back to the same mesh."""
    from mesh.cli import remote_commands

    remote_commands.stop(_dir(state_dir), "down")


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
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True)
def engine_build(backend: str) -> None:
    """Fetch, patch and compile the engine, unless this user's cache has it."""
    from mesh.cli import local_commands

    local_commands.engine_build(backend)


@engine.command("info")
@_json
def engine_info(as_json: bool) -> None:
    """What is pinned, and what is built."""
    from mesh.cli import local_commands

    local_commands.engine_info(as_json)


@cli.group()
def models() -> None:
    """Model files on this machine."""


@models.command("list")
@_json
def models_list(as_json: bool) -> None:
    """Models in the models folder."""
    from mesh.cli import model_commands

    model_commands.list_all(as_json)


@models.command("inspect")
@click.argument("model", metavar="PATH|NAME")
@_json
def models_inspect(model: str, as_json: bool) -> None:
    """What a model is, what it asks of memory, and its fingerprint."""
    from mesh.cli import model_commands

    model_commands.inspect(model, as_json)


@models.command("demo")
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option(
    "--preset", type=click.Choice(["demo", "mid"]), default="demo", show_default=True, help="Tens of MB, or 270."
)
@click.option("--shards", type=click.IntRange(1, 99), default=1, show_default=True, help="Write it in this many files.")
def models_demo(path: Path | None, preset: str, shards: int) -> None:
    """Write a small seeded model, the same bytes on every machine."""
    from mesh.cli import model_commands

    model_commands.demo(path, preset, shards)


@cli.command()
@click.option("--tokens", type=click.IntRange(1, 4096), default=64, show_default=True, help="Tokens to generate.")
@click.option("--runs", type=click.IntRange(1, 100), default=3, show_default=True)
@_state_dir
@_json
def bench(state_dir: Path | None, **arguments: Any) -> None:
    """Measure the running mesh: time to first token, prompt and generation tok/s."""
    from mesh.cli import remote_commands

    remote_commands.bench(_dir(state_dir), **arguments)


def _dir(given: Path | None) -> Path:
    return (given or default_state_dir()).expanduser().absolute()


def main() -> None:
    """Entry point of the console script."""
    cli(prog_name="mesh")
