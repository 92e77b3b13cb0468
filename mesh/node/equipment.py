"""How this node starts its part of a layout: its engine, its copy of the model, its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mesh.engine.cache import Engine
from mesh.engine.commands import Launch, llama_server_command, rpc_server_command
from mesh.errors import EngineError, ModelError
from mesh.models.gguf import ModelFile
from mesh.tunnel.handover import Doors
from mesh.wire.facts import Fingerprint, Layout, NodeId


class Equipment:
    """Makes command lines. Ports and secrets are the supervisor's.

    Args:
        file: this node's copy of a model, or None.
        gpu_layers: at most so many layers on the GPU, solo; None for all.
        wire_dtype: of activations, whenever this node is the host.
        doors: what the engine is told of connections of its own.
    """

    def __init__(
        self,
        me: NodeId,
        engine: Engine | None,
        file: Callable[[Fingerprint], ModelFile | None],
        threads: int,
        gpu_layers: int | None,
        wire_dtype: str = "f32",
        doors: Doors | None = None,
    ) -> None:
        self._me = me
        self._engine = engine
        self._file = file
        self._threads = threads
        self._gpu_layers = gpu_layers
        self._wire_dtype = wire_dtype
        self._doors = doors

    def rpc_server(self, layout: Layout, port: int, secret: bytes, peers: Mapping[NodeId, str]) -> Launch:
        """This node's rpc-server, which reaches the worker after it as ``peers`` says.

        Raises:
            MeshError: no engine, or no copy of the model.
        """
        engine, files = self._equipment(layout)
        share = next(member for member in layout.ring if member.id == self._me)
        return rpc_server_command(
            engine,
            port,
            threads=self._threads,
            model_files=files,
            fingerprint=layout.model.fingerprint,
            rpc_secret=secret,
            device=share.device,
            peers=peers,
            handover={} if self._doors is None else self._doors.env_of_rpc_server,
        )

    def llama_server(self, layout: Layout, port: int, endpoints: Sequence[str], secret: bytes, api_key: str) -> Launch:
        """The host's server, which reaches its workers at ``endpoints``.

        Raises:
            MeshError: no engine, or no copy of the model.
        """
        engine, files = self._equipment(layout)
        return llama_server_command(
            engine,
            layout,
            files[0],
            port,
            endpoints,
            threads=self._threads,
            rpc_secret=secret,
            api_key=api_key,
            gpu_layers=self._gpu_layers,
            wire_dtype=self._wire_dtype,
            handover={} if self._doors is None else self._doors.env_of_llama_server,
        )

    def _equipment(self, layout: Layout) -> tuple[Engine, tuple[Path, ...]]:
        if self._engine is None:
            raise EngineError("this node was given layers, but has no engine", remedy="mesh engine build")
        file = self._file(layout.model.fingerprint)
        if file is None:
            raise ModelError(f"this node was given layers of {layout.model.name}, but has no copy of it")
        return self._engine, file.paths
