"""The one error tree: what happened, and what to do next.

Every error a person may meet is a :class:`MeshError`. Foreign exceptions become one at the boundary where they appear.
``code`` is stable and goes into JSON; ``exit_code`` is what the command line returns (1 failed, 2 wrong usage).
"""

from __future__ import annotations


class MeshError(Exception):
    """Something a person should read.

    Args:
        message: what happened and why it matters, with names and numbers.
        remedy: the next thing to do, usually a command.
        code: stable name of this very case, where the class alone does not say it (``expired``, ``wrong-key``).
    """

    code = "failed"
    exit_code = 1

    def __init__(self, message: str, *, remedy: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return self.message if self.remedy is None else f"{self.message}\n       {self.remedy}"


class UsageError(MeshError):
    """The command line or the configuration asks for something that does not exist or contradicts itself."""

    code = "usage"
    exit_code = 2


class StateError(MeshError):
    """The state directory is in use, unreadable, or belongs to something else."""

    code = "state"


class AdmissionError(MeshError):
    """A key, grant or invite does not open the door it was held to."""

    code = "refused"


class TransportError(MeshError):
    """A peer cannot be reached, or a lane to it broke."""

    code = "transport"


class WireError(MeshError):
    """A peer sent bytes that are not the protocol: too long, truncated or of the wrong shape."""

    code = "wire"


class ModelError(MeshError):
    """A model file is missing, unreadable, or not what it should be."""

    code = "model"


class EngineError(MeshError):
    """The engine cannot be built, found or started."""

    code = "engine"


class PlanError(MeshError):
    """No layout fits: the message says how much is missing, and where."""

    code = "plan"
