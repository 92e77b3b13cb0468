"""What nobody expected: one line for the person, the traceback for whoever mends it."""

from __future__ import annotations

import tempfile
import time
import traceback
from pathlib import Path

from mesh.errors import MeshError


def internal_error(error: BaseException, state_dir: Path) -> MeshError:
    """Write the traceback into the node's log, or where it can be written, and say where it is."""
    text = "".join(traceback.format_exception(error))
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    entry = f"{stamp} CRITICAL mesh: internal error\n{text}"
    where = _append(state_dir / "logs" / "mesh.log", entry) or _append(
        Path(tempfile.gettempdir()) / "mesh-crash.log", entry
    )
    name = type(error).__name__
    return MeshError(
        f"internal error: {name}: {error}" if str(error) else f"internal error: {name}",
        remedy=f"please report it, with the traceback at the end of {where}" if where else "please report it",
        code="internal",
    )


def _append(path: Path, text: str) -> Path | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(text)
    except OSError:
        return None
    return path
