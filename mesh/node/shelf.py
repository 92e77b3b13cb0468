"""Which models this node can carry: those it was started with, and copies it finds of what others serve."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable

from mesh.engine.cache import Engine
from mesh.errors import MeshError
from mesh.models.demo import DEMO_VERSION
from mesh.models.gguf import ModelFile
from mesh.models.inventory import Inventory
from mesh.node.prepare import LocalModel, ensure_demo, measure
from mesh.notice import Notice, View
from mesh.wire.facts import Fingerprint, ModelCost

MAX_MODELS = 16


class Shelf:
    """Models on this disk, by fingerprint. Looks for those of others in a thread of its own.

    Args:
        engine: of which the demo model takes its vocabulary; None on a lite client, which carries nothing.
        on_found: told after a copy was found, so that the others can be.
    """

    def __init__(
        self, first: LocalModel | None, engine: Engine | None, view: View, on_found: Callable[[], None]
    ) -> None:
        self._models: dict[Fingerprint, LocalModel] = {}
        if first is not None:
            self._models[first.cost.fingerprint] = first
        self._engine = engine
        self._view = view
        self._on_found = on_found
        self._looked_for: set[Fingerprint] = set(self._models)
        self._missing: dict[Fingerprint, ModelCost] = {}
        self._searches: set[asyncio.Task[None]] = set()
        self._closing = threading.Event()

    @property
    def costs(self) -> tuple[ModelCost, ...]:
        return tuple(model.cost for model in self._models.values())[:MAX_MODELS]

    def file(self, fingerprint: Fingerprint) -> ModelFile | None:
        model = self._models.get(fingerprint)
        return None if model is None else model.file

    def look_for(self, wanted: Iterable[ModelCost]) -> None:
        """Search this disk for models that others have, unless that was done before."""
        if self._engine is None:
            return
        for cost in wanted:
            if cost.fingerprint not in self._looked_for and len(self._models) < MAX_MODELS:
                self._looked_for.add(cost.fingerprint)
                self._begin(cost)

    def look_again(self) -> None:
        """Search for what was missing: its copy may have arrived. Says nothing unless it has."""
        if not self._searches:
            for cost in self._missing.values():
                self._begin(cost)

    async def close(self) -> None:
        """Give up what is being searched; hashing a large file would keep the process for minutes."""
        self._closing.set()
        for search in self._searches:
            search.cancel()
        await asyncio.gather(*self._searches, return_exceptions=True)

    def _begin(self, cost: ModelCost) -> None:
        search = asyncio.ensure_future(self._search(cost))
        self._searches.add(search)
        search.add_done_callback(self._searches.discard)

    async def _search(self, cost: ModelCost) -> None:
        first = cost.fingerprint not in self._missing
        loop = asyncio.get_running_loop()
        try:
            found = await asyncio.to_thread(_find, cost, self._engine, _InLoop(self._view, loop, self._closing))
        except MeshError as error:
            self._missing[cost.fingerprint] = cost
            if first:
                self._view.show(Notice("warning", f"{cost.name}: {error.message}"))
            return
        if found is None:
            self._missing[cost.fingerprint] = cost
            if not first:
                return
            self._view.show(
                Notice(
                    "model",
                    f"no copy of {cost.name} (fingerprint {cost.fingerprint[:8]}) on this disk: this machine stands by"
                    f" until it has one in {Inventory().directories[0]}, or is started with --model FILE",
                )
            )
            return
        self._missing.pop(cost.fingerprint, None)
        self._models[cost.fingerprint] = found
        self._view.show(Notice("model", f"{found.cost.name} is on this disk, fingerprint matches"))
        self._on_found()


class _InLoop:
    """A view for a thread: what it shows is shown by the event loop, and its work ends when the shelf closes."""

    def __init__(self, view: View, loop: asyncio.AbstractEventLoop, closing: threading.Event) -> None:
        self._view = view
        self._loop = loop
        self._closing = closing

    def show(self, notice: Notice) -> None:
        self._loop.call_soon_threadsafe(self._view.show, notice)

    def progress(self, label: str, done: float, total: float, unit: str = "B") -> None:
        if self._closing.is_set():
            raise MeshError("given up: the node is stopping")
        self._loop.call_soon_threadsafe(self._view.progress, label, done, total, unit)

    def close(self) -> None:
        pass


def _find(cost: ModelCost, engine: Engine | None, view: View) -> LocalModel | None:
    label = f"checking {cost.name}"
    file = Inventory().find_like(cost, lambda done, total: view.progress(label, done, total))
    if file is not None:
        return LocalModel(file, cost)
    if cost.demo_version == DEMO_VERSION and engine is not None:
        made = measure(ensure_demo(engine, view), view)
        return made if made.cost.fingerprint == cost.fingerprint else None
    return None
