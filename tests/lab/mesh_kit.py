"""What the lab's mesh tests share: models, the reference answer, and questions to a node."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.lab import lab_available
from bench.meshnode import MeshNode
from bench.models import find_model
from mesh.engine.cache import find_engine
from tests.ports import free_port

AVAILABLE, WHY = lab_available()
IN_LAB = [
    pytest.mark.lab,
    pytest.mark.engine,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not AVAILABLE, reason=f"no lab here: {WHY}"),
]
PROMPT = "Three machines under one roof agreed"
TOKENS = 24


def model_file(preset: str) -> Path:
    """A preset of the demo model, written once per user."""
    engine = find_engine()
    assert engine is not None, "no engine is built: bin/mesh engine build"
    return find_model(preset, engine.dir / "vocab")


@contextlib.contextmanager
def plain_server(model: Path, *, slots: int = 1) -> Iterator[str]:
    """An ordinary llama-server on this machine's own loopback, as anybody would start it; yields its address."""
    engine = find_engine()
    assert engine is not None
    port = free_port()
    argv = [
        str(engine.llama_server),
        "-m",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "-t",
        "1",
        "-np",
        str(slots),
        "-c",
        str(4096 * slots),
        "--embeddings",
        "--pooling",
        "mean",
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_", "MESH_"))}
    server = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                    break
            assert server.poll() is None and time.monotonic() < deadline, "the plain llama-server does not start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def reference(model: Path, tokens: int = TOKENS) -> str:
    """What an ordinary llama-server answers to :data:`PROMPT`."""
    with plain_server(model) as url, httpx.Client(trust_env=False) as client:
        return complete(client, url, tokens)


def complete(client: httpx.Client, url: str, tokens: int = TOKENS, timeout: float = 90.0) -> str:
    """The greedy continuation of :data:`PROMPT`, through ``/v1/completions``."""
    body = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
    answer = client.post(f"{url}/v1/completions", json=body, timeout=timeout)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def ask(node: MeshNode, **options: Any) -> str:
    """The same, from a node's own localhost."""
    return complete(node.client, node.base_url, **options)


class Streamed(threading.Thread):
    """The same, streamed and in the background: ``text`` grows; ``error`` says what broke it."""

    def __init__(self, node: MeshNode, tokens: int) -> None:
        super().__init__(daemon=True)
        self.text, self.error, self.whole = "", "", False
        self.tokens = 0
        self._cancelled = False
        self._client, self._url, self._tokens = node.lab.client(node.machine), node.base_url, tokens
        self.start()

    def run(self) -> None:
        body = {"prompt": PROMPT, "max_tokens": self._tokens, "temperature": 0, "stream": True}
        try:
            with self._client.stream("POST", f"{self._url}/v1/completions", json=body, timeout=90) as answer:
                for line in answer.iter_lines():
                    if self._cancelled:
                        return
                    if line == "data: [DONE]":
                        self.whole = True
                    elif line.startswith("data: "):
                        self._read(json.loads(line[6:]))
        except httpx.HTTPError as error:
            self.error = repr(error)

    def cancel(self) -> None:
        """The client goes away."""
        self._cancelled = True
        self.join(30)

    def _read(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.error = str(event["error"])
        for choice in event.get("choices", ()):
            self.text += choice["text"]
            self.tokens += 1

    def wait_for(self, tokens: int, within: float = 30.0) -> None:
        """Until so many have come."""
        deadline = time.monotonic() + within
        while self.tokens < tokens:
            assert not self.error and time.monotonic() < deadline, f"{self.tokens} tokens came; {self.error}"
            time.sleep(0.005)


def covered(status: dict[str, Any]) -> list[int]:
    """Every layer named by the ring, in ring order."""
    ranges = [member["layers"] for member in status["layout"]["ring"] if member["layers"] is not None]
    return [layer for first, last in ranges for layer in range(first, last + 1)]
