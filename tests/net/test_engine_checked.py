"""Upstream's own RPC test, and real rings, on servers built with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import asyncio
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mesh.engine.cache import find_engine
from mesh.models.demo import write_demo
from tests.net.engine_kit import serving
from tests.net.push_kit import push_ring, told
from workshop.checked import Checked, find_checked

pytestmark = pytest.mark.engine

REPORTS = ("AddressSanitizer", "runtime error")


@pytest.fixture
def checked() -> Checked:
    found = find_checked()
    if found is None:
        pytest.skip("LEFT OUT: the server with sanitizers is not built: bin/env --dev -m workshop.checked")
    return found


@pytest.mark.skipif(shutil.which("bash") is None, reason="upstream's script needs bash")
async def test_upstreams_test_of_several_servers_passes(checked: Checked) -> None:
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
    assert not any(report in text for report in REPORTS), text


async def test_a_ring_of_workers_with_sanitizers_says_what_one_machine_says(checked: Checked, tmp_path: Path) -> None:
    engine = find_engine()
    if engine is None:
        pytest.skip("the engine is not built: mesh engine build")
    model = tmp_path / "tiny.gguf"
    write_demo(model, engine.vocab("llama-spm"), preset="tiny")
    prompt = "one two three four five six seven eight nine ten " * 8
    said = []
    for counts in ([4], [1, 1, 2]):
        async with push_ring(replace(engine, rpc_server=checked.rpc_server), model, counts) as ring:
            await serving(ring.host, ring.port)
            said.append((await told(ring.port, prompt, words=8)).content)
        for worker in ring.workers:
            assert not any(report in worker.text for report in REPORTS), worker.text
    assert said[0] == said[1] != ""
