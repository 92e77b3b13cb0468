"""The command line: what each command takes, and how errors look. The work is elsewhere."""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path
from typing import Any

import click
from click.exceptions import NoArgsIsHelpError

from mesh import __version__
from mesh.cli import output
from mesh.cli.crash import internal_error
from mesh.cli.options import (
    doctor_options,
    duration,
    json_option,
    net_options,
    no_node,
    not_empty,
    plan_options,
    state_dir_option,
)
from mesh.config import BACKENDS, WIRE_DTYPES, default_state_dir, load_settings
from mesh.errors import MeshError, UsageError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mesh")
def cli() -> None:
    """Run one large language model on the machines you already own.

    \b
    On the first machine:      mesh up --demo          (or --model FILE.gguf)
    To let another one in:     mesh invite             prints the line to paste there
    On the other machine:      mesh up --join TOKEN
    On the same network:       mesh up                 there, then here: mesh approve CODE
    Without lending memory:    mesh client --join TOKEN
    Then, on any of them:      curl http://localhost:9337/v1/models
    """


@cli.command()
@plan_options
@click.option("--demo", is_flag=True, default=None, help="Serve a tiny built-in model: try everything offline.")
@net_options
@click.option("--relay-only", is_flag=True, default=None, help="Carry traffic for others, compute nothing.")
@click.option(
    "--api-key-file", type=click.Path(path_type=Path), metavar="FILE", help="Keys the API asks for, one per line."
)
@click.option(
    "--wire-dtype",
    type=click.Choice(WIRE_DTYPES),
    help="Activations between machines while this one is the host: f16 halves the bytes, and rounds them.",
)
def up(config: Path | None, **flags: Any) -> None:
    """Start this machine as a member, and serve.

    \b
    mesh up --demo                         try it, alone
    mesh up --model ~/models/qwen.gguf     found a mesh around a model
    mesh up --join mesh1...                lend this machine to a mesh
    mesh up                                come back to the mesh this machine was in; if it was in none, ask those on
                                           this network to be let in by a code (see mesh approve), or found one

    Ctrl-C, SIGTERM or `mesh down` stop it and everything it started (exit 0); a second Ctrl-C does not wait (130).
    """
    from mesh.cli import up as run

    run.run_node(load_settings({**flags, "role": "worker"}, config))


@cli.command()
@net_options
def client(config: Path | None, **flags: Any) -> None:
    """Use a mesh from this machine without lending it.

    No engine, no model, the same local API.

    \b
    mesh client --join mesh1...            then: curl http://localhost:9337/v1/models
    mesh client                            come back; or ask a mesh on this network (see mesh approve)
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
    callback=duration,
    help="For how long: 90s, 10m, 1h or 7d.",
)
@click.option(
    "--role",
    type=click.Choice(["worker", "client"]),
    default="worker",
    show_default=True,
    help="Lend memory and compute, or use the mesh only.",
)
@state_dir_option
@json_option
def invite(state_dir: Path | None, **arguments: Any) -> None:
    """Print a token that lets another machine in.

    Whoever holds a worker token will compute part of your prompts, and you will run on their machine: give it to
    people you trust.
    """
    from mesh.cli import remote_commands

    remote_commands.invite(_dir(state_dir), **arguments)


@cli.command()
@state_dir_option
@json_option
def status(state_dir: Path | None, as_json: bool) -> None:
    """Who is in, who carries which layers, and how it goes."""
    from mesh.cli import remote_commands

    remote_commands.status(_dir(state_dir), as_json)


@cli.command()
@plan_options
@click.option(
    "--what-if",
    multiple=True,
    metavar="node=NAME,memory=SIZE,...",
    help="With a machine one does not have yet; or another size of one that one has. Repeatable.",
)
@state_dir_option
@json_option
def plan(state_dir: Path | None, as_json: bool, what_if: tuple[str, ...], **flags: Any) -> None:
    """Show who would carry what, how long a token takes, and why.

    With a running node: over the machines in its mesh, as if it had been started with these options. Without: over
    this machine alone. Nothing is started or changed; exit 1 when the model fits nowhere.

    \b
    mesh plan                              what runs, and what it is made of
    mesh plan --model qwen --ctx-size 32768
    mesh plan --what-if node=attic,memory=16GB,speed=20GB/s,rtt=5ms
                                           speed: how fast it reads weights (as fast as this machine);
                                           rtt: the round trip to every other machine (1ms)

    The time is compute (weights read, by the measured speed of each device), hops (half a round trip to each next
    machine), bytes (an activation for each hop) and tunnels. A speed with a question mark is a guess.
    """
    from mesh.cli import plan as command

    given = {name: value for name, value in flags.items() if value is not None}
    command.plan(_dir(state_dir), as_json, given, what_if)


@cli.command()
@doctor_options
@json_option
def doctor(config: Path | None, as_json: bool, **flags: Any) -> None:
    """Check this machine and its mesh, with a remedy for each finding.

    \b
    mesh doctor                            the node that runs here, or one that would run with the defaults
    mesh doctor --config mesh.toml         before a first start, with the settings it will have

    Looks at the engine and what builds it, devices, memory, disk, state, models, ports, firewall, NAT, clock, the other
    members' engines and every link to them, and has each device compute a token. Changes nothing. Exit 1 when something
    will not work; warnings alone are 0.
    """
    from mesh.cli import doctor as checks

    checks.run(config, as_json, flags)


@cli.command()
@click.argument("code")
@state_dir_option
@json_option
def approve(code: str, state_dir: Path | None, as_json: bool) -> None:
    """Let in the machine that shows CODE, without a token.

    \b
    On the new machine, on the same network:     mesh up         (or mesh client)
    It shows a code, like k7mp-q2xd. On any machine of the mesh:
                                                 mesh approve k7mp-q2xd

    A code is good for one machine, and for some minutes. Compare it with the machine in front of you: whoever shows
    it will be a member. After three wrong codes a request is dropped, and the machine asks anew.
    """
    from mesh.cli import remote_commands

    remote_commands.approve(_dir(state_dir), code, as_json)


@cli.command()
@click.argument("node")
@state_dir_option
@json_option
def revoke(node: str, state_dir: Path | None, as_json: bool) -> None:
    """Throw NODE (a name or an id from `mesh status`) out, for good."""
    from mesh.cli import remote_commands

    remote_commands.revoke(_dir(state_dir), node, as_json)


@cli.command()
@state_dir_option
def leave(state_dir: Path | None) -> None:
    """Leave the mesh for good and stop; coming back takes a new invite."""
    from mesh.cli import remote_commands

    remote_commands.leave(_dir(state_dir))


@cli.command()
@state_dir_option
def down(state_dir: Path | None) -> None:
    """Stop this node; `mesh up` brings it back to the same mesh."""
    from mesh.cli import remote_commands

    remote_commands.down(_dir(state_dir))


@cli.command()
@click.option("-f", "--follow", is_flag=True, help="Keep printing what comes.")
@state_dir_option
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
@no_node
@json_option
def engine_build(backend: str, as_json: bool) -> None:
    """Fetch, patch and compile the engine, unless this user's cache has it."""
    from mesh.cli import local_commands

    local_commands.engine_build(backend, as_json)


@engine.command("info")
@no_node
@json_option
def engine_info(as_json: bool) -> None:
    """What is pinned, and what is built."""
    from mesh.cli import local_commands

    local_commands.engine_info(as_json)


@cli.group()
def models() -> None:
    """Model files on this machine."""


@models.command("list")
@no_node
@json_option
def models_list(as_json: bool) -> None:
    """Models in the models folder."""
    from mesh.cli import model_commands

    model_commands.list_all(as_json)


@models.command("inspect")
@click.argument("model", metavar="PATH|NAME", callback=not_empty)
@no_node
@json_option
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
@no_node
@json_option
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
@state_dir_option
@json_option
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
