"""``mesh up`` and ``mesh client``: prepare, run, and put everything back on the way out."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import logging.handlers
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mesh.cli.crash import internal_error
from mesh.cli.preflight import check, check_gpu_layers
from mesh.cli.view import LoggedView, make_view
from mesh.config import Settings, format_size
from mesh.engine.cache import Engine
from mesh.errors import MeshError, StateError
from mesh.node.backend import prepare_engine
from mesh.node.departure import Stop
from mesh.node.enter import enter
from mesh.node.newcomer import may_seek, seek
from mesh.node.prepare import LocalModel, prepare_model
from mesh.node.record import Record
from mesh.node.run import run
from mesh.node.statedir import StateDir
from mesh.notice import Notice, View
from mesh.supervise.priority import priority

LOG_BYTES = 4 * 1024 * 1024
log = logging.getLogger(__name__)
_STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def run_node(settings: Settings) -> None:
    """Run until Ctrl-C, SIGTERM, ``mesh down`` or ``mesh leave``; returns when nothing of the node is left.

    Raises:
        MeshError: it cannot start, or was thrown out; or something unexpected happened, and the log says what.
        KeyboardInterrupt: it was interrupted before there was a node.
    """
    view = LoggedView(make_view(plain=settings.plain, json_lines=settings.json_logs))
    try:
        with StateDir(settings.state_dir):
            _log_to(_log_file(settings))
            try:
                check(settings)
                record = asyncio.run(enter(settings, view))
                if record is None and may_seek(settings):
                    stopped, record = asyncio.run(_seek_until_stopped(settings, view))
                    if stopped:
                        return
                computes = settings.role == "worker" and not settings.relay_only
                engine, model = _equip(settings, view) if computes else (None, None)
                priority.yield_to_engines()
                _keep_what_is_loaded()
                asyncio.run(_until_stopped(settings, record, engine, model, view))
            except MeshError as error:
                log.error("%s", error.message)
                raise
    except MeshError:
        raise
    except Exception as error:
        raise internal_error(error, settings.state_dir) from error
    finally:
        view.close()


def _keep_what_is_loaded() -> None:
    """Leave all that exists by now out of the garbage collector's rounds: modules and classes, nine tenths of all.

    With them a full round took 40 ms of a core that an engine computes with, and came so rarely that the garbage
    between two rounds made the node grow by megabytes."""
    gc.collect()
    gc.freeze()


def _equip(settings: Settings, view: View) -> tuple[Engine, LocalModel | None]:
    engine = prepare_engine(settings.backend, view)
    check_gpu_layers(settings, engine.backend)
    model = prepare_model(settings, engine, view)
    if model is not None:
        size = format_size(model.cost.size_bytes)
        view.show(Notice("model", f"{model.cost.name}, {size}, on disk here", {"model": model.cost.name}))
    return engine, model


async def _seek_until_stopped(settings: Settings, view: View) -> tuple[bool, Record | None]:
    """Whether a person ended it; and the mesh that was found, if any."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_Surprises(view, _log_file(settings)))
    before = {number: signal.getsignal(number) for number in _STOPPING}

    def asked() -> None:
        view.show(Notice("change", "stopping; this machine is in no mesh"))
        stop.set()

    _on_interrupt(lambda: loop.call_soon_threadsafe(asked), view)
    try:
        record = await seek(settings, view, stop)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return stop.is_set() and record is None, record


async def _until_stopped(
    settings: Settings, record: Record | None, engine: Engine | None, model: LocalModel | None, view: View
) -> None:
    stop = Stop()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_Surprises(view, _log_file(settings)))

    def asked() -> None:
        view.show(Notice("change", "stopping (again to stop at once)"))
        stop.ask()

    def again() -> bool:
        if not stop.waits:
            return False
        loop.call_soon_threadsafe(stop.ask)
        return True

    _on_interrupt(lambda: loop.call_soon_threadsafe(asked), view, again)
    running = asyncio.ensure_future(run(settings, record, engine, model, view, stop))
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


def _on_interrupt(first: Callable[[], object], view: View, again: Callable[[], bool] = lambda: False) -> None:
    """Call ``first`` for the first signal; end the process at the second, unless ``again`` has something to cut short.

    Plain handlers, not the loop's: those are gone before the process is, and a late Ctrl-C would find Python's own.
    """
    asks = 0

    def heard(*_: object) -> None:
        nonlocal asks
        asks += 1
        if asks > 1:
            if asks == 2 and again():
                return
            view.close()
            os._exit(130)  # the engine dies with us: the kernel, or its guard, sees to that
        with contextlib.suppress(RuntimeError):  # the loop has ended by itself: so shall we
            first()

    for number in _STOPPING:
        signal.signal(number, heard)


class _Surprises:
    """Tells of exceptions that nobody caught, each once, and goes on: the others count on this node."""

    def __init__(self, view: View, path: Path) -> None:
        self._view = view
        self._path = path
        self._told: set[str] = set()

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        loop.default_exception_handler(context)  # to the log, with its traceback
        error = context.get("exception")
        text = context["message"] if error is None else f"{type(error).__name__}: {error}"
        if error is not None and text not in self._told:
            self._told.add(text)
            self._view.show(Notice("warning", f"internal error: {text}; please report it, with {self._path}"))


def _log_file(settings: Settings) -> Path:
    return settings.state_dir / "logs" / "mesh.log"


def _log_to(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.handlers.RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=3, encoding="utf-8")
    except OSError as error:
        raise StateError(
            f"cannot write the log {path}: {error.strerror}", remedy="check its permissions, or choose --state-dir DIR"
        ) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.raiseExceptions = False  # a disk that is full costs the log, not the terminal
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    for noisy in ("httpx", "httpcore", "quic", "asyncio", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
