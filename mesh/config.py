"""What a person can set, from flags and an optional TOML file, checked once.

Precedence: flag, then ``--config`` file (same names, underscores), then the default.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import msgspec
import platformdirs

from mesh.errors import UsageError

API_PORT = 9337
BIND_PORT = 7842
STUN_SERVERS = (
    "stun.l.google.com:19302",
    "stun.cloudflare.com:3478",
    "stun.nextcloud.com:3478",
    "stun.sipgate.net:3478",
)
"""Of four operators: two must say the same. Each learns our public address and that somebody there runs something."""
STUN_VARIABLE = "MESH_STUN"
"""Environment: servers with commas between them, or ``none``."""
API_KEYS_VARIABLE = "MESH_API_KEYS"
"""Environment: API keys with commas or line ends between them, besides those of ``--api-key-file``."""
RELAY_RATE = 2_000_000
MAX_DRAIN_S = 600
BACKENDS = ("auto", "cpu", "cuda", "metal", "vulkan", "rocm", "sycl")
SPLITS = ("auto", "always", "never")
WIRE_DTYPES = ("f32", "f16")

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*$", re.IGNORECASE)
_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(s|m|h|d)\s*$", re.IGNORECASE)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_size(text: str) -> int:
    """``4GB``, ``1.5 GiB``, ``800m`` or plain bytes, in bytes. Decimal unless written with an ``i``.

    Raises:
        UsageError: not a size.
    """
    match = _SIZE.match(text)
    if match is None:
        raise UsageError(f'"{text}" is not a size', remedy="write it like 12GB, 800MB or 4GiB")
    number, unit, binary = match.groups()
    power = " kmgt".index(unit.lower()) if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def parse_duration(text: str) -> float:
    """``90s``, ``10m``, ``1h``, ``7d``, in seconds.

    Raises:
        UsageError: not a duration.
    """
    match = _DURATION.match(text)
    if match is None:
        raise UsageError(f'"{text}" is not a length of time', remedy="write it like 90s, 10m, 1h or 7d")
    return float(match[1]) * _SECONDS[match[2].lower()]


def format_size(size: float) -> str:
    """Bytes for people: three digits, decimal units."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def default_state_dir() -> Path:
    """Where a node keeps its key, grants and logs unless told otherwise."""
    return Path(platformdirs.user_state_dir("mesh", appauthor=False))


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything ``mesh up`` and ``mesh client`` can be told."""

    role: str = "worker"
    state_dir: Path = Path()
    name: str = ""
    model: str | None = None
    demo: bool = False
    join: tuple[str, ...] = ()
    bind_host: tuple[str, ...] = ("0.0.0.0", "::")  # noqa: S104 - only QUIC with pinned keys listens there
    bind_port: int = BIND_PORT
    api_host: str = "127.0.0.1"
    api_port: int = API_PORT
    api_key_file: Path | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """From the environment alone; a file of them is named by ``api_key_file``."""
    advertise: tuple[str, ...] = ()
    max_memory: int = 0
    ctx_size: int = 0
    parallel: int = 0
    split: str = "auto"
    backend: str = "auto"
    gpu_layers: int | None = None
    no_discovery: bool = False
    relay_only: bool = False
    relay_rate: int = RELAY_RATE
    """Bytes per second that this node carries between two others; 0: none."""
    stun: tuple[str, ...] = STUN_SERVERS
    """``HOST[:PORT]`` of servers that say where this node is seen; empty: nobody is asked."""
    wire_dtype: str = "f32"
    drain_s: float = 10.0
    """In which requests may finish before a planned change stops what answers them."""
    plain: bool = False
    json_logs: bool = False

    @property
    def api_is_local(self) -> bool:
        """Only programs of this machine reach the API."""
        try:
            return self.api_host == "localhost" or ipaddress.ip_address(self.api_host).is_loopback
        except ValueError:
            return False

    def checked(self) -> Settings:
        """The same settings with defaults filled in.

        Raises:
            UsageError: a value is out of range, or two contradict each other.
        """
        _one_of("--split", self.split, SPLITS)
        _one_of("--backend", self.backend, BACKENDS)
        _one_of("--wire-dtype", self.wire_dtype, WIRE_DTYPES)
        for flag, port in (("--bind-port", self.bind_port), ("--api-port", self.api_port)):
            if not 0 <= port <= 65535:
                raise UsageError(f"{flag} {port} is not a port", remedy="use a number from 1 to 65535, or 0 for any")
        if self.model and self.demo:
            raise UsageError("--model and --demo each name a model", remedy="give one of them")
        if self.ctx_size < 0 or self.parallel < 0 or self.parallel > 256:
            raise UsageError(
                f"ctx_size {self.ctx_size} or parallel {self.parallel} makes no sense",
                remedy="both are positive, and parallel is at most 256",
            )
        if self.relay_only and (self.model or self.demo):
            raise UsageError(
                "--relay-only computes nothing, so it takes no model", remedy="leave out --model and --demo"
            )
        if not 0 <= self.drain_s <= MAX_DRAIN_S:
            raise UsageError(
                f"drain_s {self.drain_s:g} is no time to wait for requests",
                remedy=f"write seconds, from 0 to {MAX_DRAIN_S:g}",
            )
        if self.relay_rate < 0 or (self.relay_only and not self.relay_rate):
            raise UsageError(f"relay_rate {self.relay_rate} is no rate to relay at", remedy='write it like "2MB"')
        if not self.api_is_local and self.api_key_file is None and not self.api_keys:
            raise UsageError(
                f"api_host {self.api_host} opens the API to other machines, and no API key is set",
                remedy=f"say who may: --api-key-file FILE (one key per line), or {API_KEYS_VARIABLE}=KEY,KEY",
            )
        name = self.name or socket.gethostname().split(".")[0] or "node"
        if len(name) > 64 or not name.isprintable():
            raise UsageError(f"--name {name!r} must be at most 64 printable characters")
        state_dir = self.state_dir if self.state_dir != Path() else default_state_dir()
        return replace(self, name=name, state_dir=state_dir.expanduser().absolute())


def load_settings(flags: Mapping[str, Any], config: Path | None) -> Settings:
    """Settings from flags that were given and the file behind ``--config``.

    Raises:
        UsageError: the file is unreadable, or holds a name or type that does not exist.
    """
    values = _read_config(config) if config is not None else {}
    values.update({name: value for name, value in flags.items() if value is not None and value != ()})
    if "stun" not in values and STUN_VARIABLE in os.environ:
        values["stun"] = os.environ[STUN_VARIABLE].replace(",", " ").split()
    if values.get("stun") == ["none"]:
        values["stun"] = ()
    written = re.split(r"[,\r\n]", os.environ.get(API_KEYS_VARIABLE, ""))
    values["api_keys"] = [key.strip() for key in written if key.strip()]
    try:
        return msgspec.convert(values, Settings, dec_hook=_path).checked()
    except msgspec.ValidationError as error:
        raise UsageError(f"{config or 'settings'}: {_in_words(str(error), values)}") from error


_SHAPE = re.compile(r"^Expected `(\w+).*`, got .* - at `\$\.(\w+)")
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text in quotes",
    "bool": "true or false",
    "array": "a list",
}


def _in_words(problem: str, values: Mapping[str, Any]) -> str:
    match = _SHAPE.match(problem)
    if match is None or match[2] not in values:
        return problem
    return f"{match[2]} must be {_WORDS.get(match[1], match[1])}, not {values[match[2]]!r}"


def _read_config(path: Path) -> dict[str, Any]:
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", remedy="check the path given to --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}", remedy='a line reads like:  max_memory = "12GB"') from error
    known = {setting.name for setting in fields(Settings)} - {"role", "api_keys"}
    values: dict[str, Any] = {}
    for written, value in raw.items():
        name = written.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f'did you mean "{near[0]}"?' if near else f"known: {', '.join(sorted(known))}"
            raise UsageError(f'{path}: there is no setting "{written}"', remedy=remedy)
        if name in ("join", "bind_host", "advertise", "stun") and isinstance(value, str):
            value = [value]
        is_size = name in ("max_memory", "relay_rate") and isinstance(value, str)
        values[name] = _size_in(path, name, value) if is_size else value
    return values


def _size_in(path: Path, name: str, text: str) -> int:
    try:
        return parse_size(text)
    except UsageError as error:
        raise UsageError(f"{path}: {name}: {error.message}", remedy=error.remedy) from error


def _path(kind: type, value: Any) -> Any:
    if isinstance(value, kind):
        return value
    if kind is Path and isinstance(value, str):
        return Path(value).expanduser()
    raise NotImplementedError(kind)


def _one_of(flag: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f'{flag} knows no "{value}"', remedy=f"one of: {', '.join(known)}")
