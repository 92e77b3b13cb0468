"""Which engine this node computes with: what is built, what the engine sees, and what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mesh import hardware
from mesh.engine.build import build_engine, tidy
from mesh.engine.cache import Engine, find_engine
from mesh.engine.devices import list_devices, unused
from mesh.engine.distribution import vulkan_driver_remedy
from mesh.engine.needs import missing
from mesh.engine.prune import mark_used
from mesh.engine.toolchain import find_toolchain
from mesh.errors import EngineError
from mesh.hardware import Shown
from mesh.hardware.power_supply import warnings
from mesh.notice import Notice, View
from mesh.wire.facts import Device

ACCELERATED = ("cuda", "metal", "rocm", "sycl", "vulkan")
"""Backends in the order ``auto`` prefers them."""


class _Build:
    """Shows a build of the engine."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._phase = "engine"

    def phase(self, text: str) -> None:
        self._view.show(Notice("engine", text))
        self._phase = text

    def advance(self, done: int, total: int, unit: str) -> None:
        self._view.progress(self._phase, done, total, "B" if unit == "bytes" else unit)


def prepare_engine(backend: str, view: View) -> Engine:
    """The engine for ``backend``, built now if need be. Says so when a GPU of this machine will stay idle.

    ``auto`` is the best one that is built and sees a device; else the processor's.

    Raises:
        EngineError: it cannot be built here, does not run, or sees no device.
    """
    engine, listed = best_built() if backend == "auto" else _asked_for(backend, view)
    if engine is None:
        engine = find_engine("cpu") or _build("cpu", view)
        list_devices(engine)  # it runs, which a binary from another machine or a full disk may not
    if listed:
        names = ", ".join(f"{device.name} {device.description}" for device in listed)
        view.show(Notice("engine", f"computes with {engine.backend}: {names}", {"backend": engine.backend}))
    for idle in unused(hardware.shown(), listed, engine.backend, forced=backend == engine.backend):
        text = f"{idle.text}: it stays idle. To use it:\n{idle.remedy}"
        view.show(Notice("warning", text, {"remedy": idle.remedy}))
    for text in warnings(hardware.power()):
        view.show(Notice("warning", text))
    mark_used(engine)
    return engine


def build_for(backend: str, view: View) -> Engine:
    """Build the engine, unless that is done; ``auto``: for the best GPU that is here and can be built for.

    Raises:
        EngineError: it cannot be built here.
    """
    if backend == "auto":
        backend, why = choose(hardware.shown(), lambda name: not missing(name))
        if why:
            view.show(Notice("engine", why))
    engine = find_engine(backend)
    if engine is None:
        return _build(backend, view)
    tidy(_Build(view))
    return engine


def choose(shown: Sequence[Shown], can_build: Callable[[str], bool]) -> tuple[str, str]:
    """The backend worth building for on a machine with these GPUs, and a sentence on it when there is one to say."""
    wanted = [name for name in ACCELERATED if any(name in gpu.backends for gpu in shown)]
    if not wanted:
        return "cpu", ""
    name = next((name for name in wanted if can_build(name)), None)
    if name is not None:
        gpu = next(gpu for gpu in shown if name in gpu.backends)
        return name, f"for {name}, which {gpu.description} computes with; for the processor alone: --backend cpu"
    return "cpu", (
        f"for the processor: what the GPU here needs is not complete; see: mesh engine build --backend {wanted[0]}"
    )


def best_built() -> tuple[Engine | None, tuple[Device, ...]]:
    """The best accelerated engine that is built and sees a device, with what it sees."""
    for name in ACCELERATED:
        engine = find_engine(name)
        if engine is None:
            continue
        try:
            listed = list_devices(engine)
        except EngineError:
            continue  # a driver that is gone takes its library along: the others may run
        if listed:
            return engine, listed
    return None, ()


def _asked_for(backend: str, view: View) -> tuple[Engine, tuple[Device, ...]]:
    engine = find_engine(backend) or _build(backend, view)
    listed = list_devices(engine)
    if backend != "cpu" and not listed:
        raise EngineError(
            f"the engine built for {backend} sees no device here",
            remedy=f"{_SEES_NOTHING[backend]()}\nor compute without it:  mesh up --backend cpu",
        )
    return engine, listed


def _build(backend: str, view: View) -> Engine:
    find_toolchain(backend)  # what is missing is said at once, not after a promise of minutes
    view.show(Notice("engine", f"not built yet for this machine ({backend}); this takes some minutes, once"))
    return build_engine(_Build(view), backend)


_SEES_NOTHING: dict[str, Callable[[], str]] = {
    "cuda": lambda: "`nvidia-smi` must show a GPU, and CUDA_VISIBLE_DEVICES must not hide it",
    "rocm": lambda: "`rocminfo` must show a GPU, and this user be in the groups render and video",
    "sycl": lambda: "`sycl-ls` must show a GPU",
    "metal": lambda: "Metal needs a Mac with a GPU, outside of a virtual machine",
    "vulkan": vulkan_driver_remedy,
}
