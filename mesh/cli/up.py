"""``mesh up`` and ``mesh client``: prepare, run, and put everything back on the way out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import logging.handlers
import os
import signal
from pathlib import Path

from mesh.cli.view import make_view
from mesh.config import Settings, format_size
from mesh.engine.cache import Engine
from mesh.errors import UsageError
from mesh.node.prepare import LocalModel, prepare_engine, prepare_model
from mesh.node.run import run
from mesh.node.statedir import StateDir
from mesh.notice import Notice, View

LOG_BYTES = 4 * 1024 * 1024


def run_node(settings: Settings) -> None:
    """Run until Ctrl-C, SIGTERM, ``mesh down`` or ``mesh leave``."""
    view = make_view(plain=settings.plain, json_lines=settings.json_logs)
    try:
        with StateDir(settings.state_dir):
            _log_to(settings.state_dir / "logs" / "mesh.log")
            if settings.role == "client":
                engine, model = None, None
            else:
                engine = prepare_engine(settings.backend, view)
                model = prepare_model(settings, engine, view)
                if settings.gpu_layers is not None and engine.backend == "cpu":
                    raise UsageError(
                        "--gpu-layers needs an engine that uses a GPU; this one uses the CPU",
                        remedy="build one, for example: mesh engine build --backend cuda",
                    )
            if engine is not None and model is not None:
                size = format_size(model.cost.size_bytes)
                view.show(Notice("model", f"{model.cost.name}  {size}, on disk here"))
            asyncio.run(_until_stopped(settings, engine, model, view))
    finally:
        view.close()


async def _until_stopped(settings: Settings, engine: Engine | None, model: LocalModel | None, view: View) -> None:
    stop = asyncio.Event()
    asks = 0

    def asked() -> None:
        nonlocal asks
        asks += 1
        if asks == 1:
            view.show(Notice("change", "stopping (again to stop at once)"))
            stop.set()
        else:
            view.close()
            os._exit(130)  # the engine dies with us: the kernel, or its guard, sees to that

    loop = asyncio.get_running_loop()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None:
            try:
                loop.add_signal_handler(number, asked)
            except NotImplementedError:  # Windows: no handlers in the loop
                signal.signal(number, lambda *_: loop.call_soon_threadsafe(asked))
    running = asyncio.ensure_future(run(settings, engine, model, view, stop))
    stopping = asyncio.ensure_future(stop.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=3, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    for noisy in ("httpx", "httpcore", "quic", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
