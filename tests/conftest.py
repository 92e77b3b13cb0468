"""What holds for the whole suite."""

from __future__ import annotations

import os
import signal

# A shell starts what it puts in the background with SIGINT ignored, and that is inherited: without this, no Ctrl-C that
# a test sends would reach the program it started.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No test, and nothing that a test starts, asks servers of others where it is; a test about that names its own.
os.environ["MESH_STUN"] = "none"
