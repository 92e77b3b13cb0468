"""Android, where Termux gives people a shell: recognised, and asked for little.

The system ends an app that takes too much without a word. Written from what Termux documents, never run on a phone:
https://github.com/termux/termux-packages/wiki/Termux-execution-environment
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

SHARE = 0.5
"""Of what is free now: the rest is for the screen, the launcher, and the apps that would be ended for us."""


def is_android(environment: Mapping[str, str] = os.environ, platform: str = sys.platform) -> bool:
    """Does this run in an app on a phone or a tablet?"""
    if platform == "android":  # from Python 3.13 on
        return True
    return platform == "linux" and (
        "TERMUX_VERSION" in environment
        or environment.get("PREFIX", "").startswith("/data/data/com.termux")
        or ("ANDROID_ROOT" in environment and "ANDROID_DATA" in environment)
    )
