"""Upstream's own test of RPC with several servers, as it comes with the source, on programs built with sanitizers."""

from __future__ import annotations

import asyncio
import os
import shutil

import pytest

from workshop.checked import find_checked

pytestmark = pytest.mark.engine


@pytest.mark.skipif(shutil.which("bash") is None, reason="upstream's script needs bash")
async def test_upstreams_test_of_several_servers_passes() -> None:
    checked = find_checked()
    if checked is None:
        pytest.skip("LEFT OUT: upstream's RPC test is not built: bin/env --dev -m workshop.checked")
    process = await asyncio.create_subprocess_exec(
        "bash",
        str(checked.multi_server_script),
        str(checked.rpc_server),
        str(checked.multi_server_test),
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},  # the client keeps its connections until it ends
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await asyncio.wait_for(process.communicate(), 90)
    text = said.decode(errors="replace")
    assert process.returncode == 0, text
    assert "runtime error" not in text and "AddressSanitizer" not in text, text
