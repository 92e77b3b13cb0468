"""Options that several commands take, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from mesh.config import BACKENDS, SPLITS, parse_duration, parse_size
from mesh.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


def size(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    return None if value is None else _usage(parse_size, value)


def not_empty(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is not None and not value.strip():
        raise click.BadParameter("it is empty; name a GGUF file, or a model in the models folder")
    return value


def duration(_: click.Context, __: click.Parameter, value: str) -> float:
    return float(_usage(parse_duration, value))


def _usage(parse: Callable[[str], Any], value: str) -> Any:
    try:
        return parse(value)
    except UsageError as error:
        raise click.BadParameter(f"{error.message}; {error.remedy}") from error


state_dir_option = click.option(
    "--state-dir", type=click.Path(path_type=Path), metavar="DIR",
    help="Where the node keeps its key, grants and logs. Give each node on one machine its own.",
)  # fmt: skip
no_node = click.option(
    "--state-dir", expose_value=False, metavar="DIR", help="Taken by every command; this one needs no node."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
PORT = click.IntRange(0, 65535)
POSITIVE = click.IntRange(min=1)


def together(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


plan_options = together(
    click.option(
        "--model",
        callback=not_empty,
        metavar="PATH|NAME",
        help="A GGUF file, or the name of one in the models folder.",
    ),
    click.option("--max-memory", callback=size, metavar="SIZE", help="Use at most this much memory, e.g. 12GB."),
    click.option("--ctx-size", type=POSITIVE, metavar="N", help="Context of one slot, tokens."),
    click.option("--parallel", type=click.IntRange(1, 256), metavar="N", help="Requests answered at the same time."),
    click.option("--split", type=click.Choice(SPLITS), help="Spread the model: when needed (auto), always, or never."),
    click.option("--backend", type=click.Choice(BACKENDS), help="What computes. Default: the best that is built."),
    click.option(
        "--gpu-layers", type=click.IntRange(min=0), metavar="N", help="At most this many layers on this machine's GPU."
    ),
)
net_options = together(
    click.option("--join", multiple=True, metavar="TOKEN", help="Join the mesh that gave this invite."),
    click.option("--bind-port", type=PORT, metavar="N", help="UDP and TCP port other nodes reach. Default 7842."),
    click.option("--api-port", type=PORT, metavar="N", help="Port of the API on this machine. Default 9337."),
    click.option("--name", metavar="NAME", help="What people call this machine. Default: its host name."),
    state_dir_option,
    click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="TOML with any of these settings."),
    click.option("--bind-host", multiple=True, metavar="ADDR", help="Listen only on this address. Repeatable."),
    click.option("--advertise", multiple=True, metavar="HOST:PORT", help="An address others reach this node by."),
    click.option("--no-discovery", is_flag=True, default=None, help="Send and answer no local announcements."),
    click.option("--plain", is_flag=True, default=None, help="Plain lines even in a terminal."),
    click.option("--json-logs", is_flag=True, default=None, help="One JSON object per line."),
)
doctor_options = together(
    state_dir_option,
    click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="TOML with the node's settings."),
    click.option("--model", callback=not_empty, metavar="PATH|NAME", help="A model to look at, wherever it is."),
    click.option(
        "--backend", type=click.Choice(BACKENDS), help="The engine to look at. Default: the node's, or the best."
    ),
    click.option("--max-memory", callback=size, metavar="SIZE", help="As for mesh up."),
    click.option("--bind-port", type=PORT, metavar="N", help="As for mesh up."),
    click.option("--bind-host", multiple=True, metavar="ADDR", help="As for mesh up."),
    click.option("--api-port", type=PORT, metavar="N", help="As for mesh up."),
    click.option("--api-key-file", type=click.Path(path_type=Path), metavar="FILE", help="As for mesh up."),
)
