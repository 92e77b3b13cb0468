"""Whom the doctor looks at: a state directory, the settings of a node there, and the node itself if one runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh.config import Settings
from mesh.doctor.outfit import Outfit
from mesh.node.statedir import Running, command_for


@dataclass(frozen=True, slots=True)
class Patient:
    """Everything the checks begin with.

    Attributes:
        settings: those given to the doctor; a running node's own are in ``checkup``.
        running: the process that holds the state directory; None when no node does.
        status: the contract's status; None unless the node answers.
        checkup: see :mod:`mesh.node.checkup`; None unless the node answers.
        outfit: its engine; None for a node that computes nothing.
        silent: why a running node does not answer, or not all that is asked; empty when it does, or there is none.
    """

    settings: Settings
    running: Running | None = None
    status: Mapping[str, Any] | None = None
    checkup: Mapping[str, Any] | None = None
    silent: str = ""
    outfit: Outfit | None = None

    @property
    def state_dir(self) -> Path:
        return self.settings.state_dir

    @property
    def computes(self) -> bool:
        """Is layers' work to be expected of this machine?"""
        if self.checkup is None:
            return self.settings.role == "worker" and not self.settings.relay_only
        own = self.checkup["settings"]
        return own["role"] == "worker" and not own["relay_only"]

    @property
    def backend(self) -> str:
        """The engine's, which runs or would be chosen: ``auto`` until somebody looks."""
        if self.status is not None and self.status["node"]["engine"]["backend"]:
            return str(self.status["node"]["engine"]["backend"])
        return self.settings.backend

    def command(self, command: str) -> str:
        """How to give ``command`` to this node."""
        return command_for(self.state_dir, command)

    def mine(self) -> dict[str, Any] | None:
        """What this node tells the others of itself."""
        if self.checkup is None:
            return None
        me = self.checkup["settings"]["id"]
        return next((dict(member) for member in self.checkup["members"] if member["id"] == me), None)

    def others(self) -> list[dict[str, Any]]:
        """What the other members tell of themselves."""
        if self.checkup is None:
            return []
        me = self.checkup["settings"]["id"]
        return [dict(member) for member in self.checkup["members"] if member["id"] != me]
