"""``mesh`` as ever, and beside it a thread that writes down how many objects of each of its classes are alive.

    python -m bench.soak.census FILE MESH-ARGUMENT...

Nothing of the mesh knows of it. The file holds the newest count as JSON: ``{"asyncio.Task": 12, ...}``. While there is
a file beside it that ends in ``.collect``, garbage is collected first, so that what is counted is really held.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from asyncio import Task
from collections import Counter
from pathlib import Path

from mesh.cli.main import main

EVERY_S = 10.0
TASKS = "asyncio.Task"
COLLECT = ".collect"
_ROOMS = ("mesh.", "aioquic.", "uvicorn.", "httpcore.")


def count() -> dict[str, int]:
    """Living objects by class, of the mesh and what it is built on; tasks are those that are not done."""
    found: Counter[str] = Counter()
    for thing in gc.get_objects():
        kind = type(thing)
        if str(kind.__module__).startswith(_ROOMS):
            found[f"{kind.__module__}.{kind.__qualname__}"] += 1
        elif isinstance(thing, Task) and not thing.done():
            found[TASKS] += 1
    return dict(found)


def _write_for_ever(path: Path) -> None:
    partial = path.with_suffix(".partial")
    while True:
        time.sleep(EVERY_S)
        if path.with_suffix(COLLECT).exists():
            gc.collect()
        partial.write_text(json.dumps(count()))
        partial.replace(path)


if __name__ == "__main__":
    threading.Thread(target=_write_for_ever, args=[Path(sys.argv[1])], daemon=True).start()
    sys.argv[1:] = sys.argv[2:]
    main()
