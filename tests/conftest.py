"""What holds for the whole suite."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# A shell starts what it puts in the background with SIGINT ignored, and that is inherited: without this, no Ctrl-C that
# a test sends would reach the program it started.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No test, and nothing that a test starts, asks servers of others where it is; a test about that names its own.
os.environ["MESH_STUN"] = "none"

_HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before xdist looks for the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run side by side, a file's stay together, and those of the lab: two labs would share the cores that
    each of them measures with, and one sweeps away what a test has left for itself to find."""
    for item in items:
        room, *rest = item.path.relative_to(_HERE).parts
        item.add_marker(pytest.mark.xdist_group(room if room == "lab" else "/".join((room, *rest))))
