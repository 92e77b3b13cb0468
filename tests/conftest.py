"""What holds for the whole suite."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# A shell starts what it puts in the background with SIGINT ignored, and that is inherited: without this, no Ctrl-C that
# a test sends would reach the program it started.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No test, and nothing that a test starts, asks servers of others where it is; a test about that names its own.
os.environ["MESH_STUN"] = "none"


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """Where tests run side by side, a file's stay together, and those of the lab: two labs would share the cores that
    each of them measures with, and one sweeps away what a test has left for itself to find.

    xdist has groups for that, which pytest 9.2 does not know of: a name that is appended to a test's is not seen."""

    def _split_scope(self, nodeid: str) -> str:
        return "lab" if nodeid.startswith("tests/lab/") else nodeid.split("::", 1)[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return ByFile(config, log)
