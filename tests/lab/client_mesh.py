"""A mesh that people's own programs talk to: three members, one of which wants a key, and two lite clients."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import anthropic
import openai
import platformdirs

from bench.lab import Lab, namespaces
from bench.meshnode import MeshNode, stop_all
from mesh.engine.cache import find_engine
from mesh.models.demo import write_demo

MEMBERS = ("a", "b", "c")
KEYED, CLIENT, APART = "c", "d", "e"
"""Machines: a member whose API wants a key, a lite client, and another that gets cut off."""
PLACES = ("host", "worker", "client")
LOCAL_URL = "http://localhost:9337"
KEY = "sk-only-for-those-who-know"
SLOTS = 2
T = TypeVar("T")

# A model without sense calls a tool only where its grammar leaves no choice. The engine's grammar for a template with
# bare JSON lets text come first, up to the first "{"; so requests push towards that one. Only the first call is
# rendered, which tells the engine that this template has no parallel calls.
TOOLS_TEMPLATE = """\
{% if tools %}tools: {{ tools | tojson }}
{% endif %}{% for message in messages %}{{ message['role'] }}: \
{% if message['content'] %}{{ message['content'] }}{% endif %}\
{% if message['tool_calls'] %}{% set call = message['tool_calls'][0]['function'] %}\
{"name": "{{ call['name'] }}", "arguments": {{ call['arguments'] | tojson }}}{% endif %}
{% endfor %}"""


def write_model(path: Path) -> None:
    """The demo model's weights under a chat template with tools."""
    engine = find_engine()
    assert engine is not None, "no engine is built: bin/mesh engine build"
    write_demo(path, engine.vocab("llama-spm"), chat_template=TOOLS_TEMPLATE)


class ClientMesh:
    """The mesh, and SDKs that sit in its machines."""

    def __init__(self, lab: Lab, directory: Path, model: Path) -> None:
        self.lab = lab
        keys = directory / "keys"
        keys.write_text(f"# for those who ask at {KEYED}\n{KEY}\n")
        shared = ("--split", "always", "--no-discovery", "--parallel", str(SLOTS), "--ctx-size", "4096")
        self.nodes = {
            name: MeshNode(
                lab,
                name,
                directory,
                model=model,
                arguments=(*shared, "--api-key-file", str(keys)) if name == KEYED else shared,
            )
            for name in MEMBERS
        }
        for name in (CLIENT, APART):
            self.nodes[name] = MeshNode(lab, name, directory, role="client", arguments=("--no-discovery",))

    def start(self) -> None:
        """All of them, serving over the three members."""
        first = self.nodes[MEMBERS[0]]
        first.start()
        first.wait(lambda status: True, 60, "an API")
        token, lite = first.invite(uses=2), first.invite(uses=2, role="client")
        for name in MEMBERS[1:]:
            self.nodes[name].start(join=token)
        for name in (CLIENT, APART):
            self.nodes[name].start(join=lite)
        for node in self.nodes.values():
            node.wait_serving(60, members=len(MEMBERS))

    def stop(self) -> None:
        stop_all([node for node in self.nodes.values() if node.running])

    def at(self, place: str) -> MeshNode:
        """Who plays the part now: the host, a worker or the lite client."""
        if place == "client":
            return self.nodes[CLIENT]
        status = self.nodes[MEMBERS[0]].status()
        assert status is not None
        host = next(m["name"] for m in status["layout"]["ring"] if m["id"] == status["layout"]["host"])
        return self.nodes[host if place == "host" else next(name for name in MEMBERS if name != host)]

    def inside(self, node: MeshNode, function: Callable[[], T]) -> T:
        """Call ``function`` in a thread of the node's machine: what it connects to by ``localhost`` is the node."""
        name = self.lab.namespace(node.machine)
        with ThreadPoolExecutor(1, initializer=namespaces.enter, initargs=(name,)) as thread:
            return thread.submit(function).result()

    def with_openai(self, node: MeshNode, use: Callable[[openai.OpenAI], T], **options: Any) -> T:
        """Use OpenAI's SDK on a node's machine."""

        def call() -> T:
            with openai_at(LOCAL_URL, **options) as client:
                return use(client)

        return self.inside(node, call)

    def with_anthropic(self, node: MeshNode, use: Callable[[anthropic.Anthropic], T], **options: Any) -> T:
        """Use Anthropic's."""

        def call() -> T:
            with anthropic_at(LOCAL_URL, **options) as client:
                return use(client)

        return self.inside(node, call)

    def busy_slots(self) -> int:
        """Slots of the engine that compute, as the host's machine sees them."""
        node = self.at("host")
        # A connection of its own: one that the server closes while it idles says nothing about slots.
        headers = {"Authorization": f"Bearer {KEY}", "Connection": "close"}
        slots = node.client.get(f"{node.base_url}/slots", headers=headers, timeout=5).json()
        assert len(slots) == SLOTS
        return sum(slot["is_processing"] for slot in slots)

    def wait_busy(self, wanted: int, within: float) -> float:
        """Wait until so many slots compute; returns how long it took."""
        began = time.monotonic()
        while (busy := self.busy_slots()) != wanted:
            took = time.monotonic() - began
            assert took < within, f"{busy} slots compute, not {wanted}, after {took:.1f} s"
            time.sleep(0.02)
        return time.monotonic() - began


def openai_at(url: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", **{"api_key": KEY, "max_retries": 0, **options})


def anthropic_at(url: str, **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, **{"api_key": KEY, "max_retries": 0, **options})


@contextlib.contextmanager
def node_program(script: Path) -> Iterator[Path]:
    """A copy of a Node.js program that finds its packages; they are fetched once per user, and then no more."""
    lock = (script.parent / "package-lock.json").read_bytes()
    cache = Path(platformdirs.user_cache_dir("mesh-test", appauthor=False))
    packages = cache / f"javascript-{hashlib.sha256(lock).hexdigest()[:12]}"
    if not packages.exists():
        cache.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=cache))
        try:
            for name in ("package.json", "package-lock.json"):
                shutil.copy(script.parent / name, fresh)
            command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            done = subprocess.run(command, cwd=fresh, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, f"npm ci: {done.stdout}{done.stderr}"
            with contextlib.suppress(OSError):  # another run was first
                fresh.rename(packages)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "node_modules").symlink_to(packages / "node_modules")
        yield Path(shutil.copy(script, directory))
