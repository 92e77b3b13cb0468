"""Does a plan ever send a machine out of memory? Random limits, tried for real with the small model.

    bin/bench memory --json memory.json          (--tries N, --seed N)

Each try draws one to three machines with a limit each, a context and a number of slots, and plans. What is planned is
started with the mesh's own commands: every member's engine process in a control group whose limit is the very number
that the planner was given as `--max-memory`. Then prompts of several hundred tokens in every slot, texts to embed, and
conversations that push each other out of their slots. A member that is killed, fails twice, or whose resident memory
(mapped files included, whoever read them first) was ever above its limit is a failure. Swap does not count. Needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.measure import BenchError, long_prompt
from bench.models import find_model
from bench.quota import Group, limited
from bench.tables import markdown
from mesh.engine.cache import Engine, find_engine
from mesh.engine.commands import Launch, llama_server_command, rpc_server_command
from mesh.models.gguf import inspect
from mesh.plan.search import plan
from mesh.supervise.launch import child_environment
from mesh.wire.facts import Device, Layout, ModelCost, NodeFacts

MIB = 1 << 20
START_WITHIN_S = 240.0
CONTEXTS, SLOTS = (512, 1024, 2048, 4096), (1, 2, 4)
LEAST, MOST = 60 * MIB, 260 * MIB
"""Limits are drawn between these: from too little for anything to plenty for all."""
FREE = 8 << 30
MEMORY = "memory"
"""A failure that names it is one of the plan."""


@dataclass(slots=True)
class Try:
    """One draw. ``peaks`` are resident bytes of each member, in ring order."""

    number: int
    limits: list[int]
    context: int
    slots: int
    mode: str = "none"
    planned: list[int] = field(default_factory=list)
    budgets: list[int] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    failure: str = ""


def _node(index: int, limit: int, model: ModelCost, context: int, slots: int) -> NodeFacts:
    return NodeFacts(
        id="abc"[index] * 26, version=1, name="abc"[index], role="worker", mesh_version="0", engine="pin",
        backend="cpu", devices=(Device("CPU", "cpu", "a processor", FREE, FREE),), budget_bytes=limit, threads=1,
        models=(model,), wants=model.fingerprint, addresses=(), ctx_size=context, parallel=slots,
    )  # fmt: skip


def draw(number: int, seed: int, model: ModelCost) -> tuple[Try, Layout | None]:
    """Limits and sizes of a try, and what is planned for them."""
    chance = random.Random(f"{seed}/{number}")
    machines = chance.choice((1, 1, 2, 2, 3))
    context, slots = chance.choice(CONTEXTS), chance.choice(SLOTS)
    limits = [chance.randrange(LEAST, MOST) for _ in range(machines)]
    nodes = [_node(i, limit, model, context, slots) for i, limit in enumerate(limits)]
    if machines > 1 and chance.random() < 0.5:
        nodes = [_split(node) for node in nodes]
    rtts = {(a.id, b.id): 1.0 for a in nodes for b in nodes if a.id < b.id}
    layout = plan(nodes, model, rtt_ms=rtts, current=None).layout
    tried = Try(number, limits, context, slots)
    if layout is not None:
        tried.mode = layout.mode if layout.mode == "solo" else f"split {len(layout.ring)}"
        by_id = {node.id: node.budget_bytes for node in nodes}
        tried.budgets = [by_id[member.id] for member in layout.ring]
        tried.planned = [member.bytes for member in layout.ring]
    return tried, layout


def _split(node: NodeFacts) -> NodeFacts:
    from msgspec.structs import replace

    return replace(node, split="always")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Member:
    """One engine process in its group."""

    def __init__(self, launch: Launch, group: Group, log: Path) -> None:
        self.group, self.log = group, log
        self.peak = 0
        import os

        def enter() -> None:
            group.take(os.getpid())

        self.process = subprocess.Popen(
            launch.argv, env=child_environment(os.environ, launch.env), stdin=subprocess.DEVNULL,
            stdout=log.open("wb"), stderr=subprocess.STDOUT, preexec_fn=enter,
        )  # fmt: skip

    def look(self) -> None:
        """Note the highest resident memory, and raise when the process is gone.

        Raises:
            BenchError: it ended.
        """
        code = self.process.poll()
        if code is not None:
            how = f"was killed for its {MEMORY}" if code == -signal.SIGKILL else f"exited with {code}"
            raise BenchError(f"{Path(str(self.process.args[0])).name} {how}: {self.last_words()}")  # type: ignore[index]
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            self.peak = max(self.peak, int(status.split("VmHWM:")[1].split()[0]) * 1024)

    def last_words(self) -> str:
        return " / ".join(self.log.read_text(errors="replace").splitlines()[-2:])[-300:]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def _ring(
    layout: Layout, budgets: Sequence[int], engine: Engine, file: Path, logs: Path
) -> Iterator[tuple[list[_Member], str, str]]:
    secret, key = secrets.token_bytes(32), secrets.token_hex(8)
    ports = {worker.id: _free_port() for worker in layout.workers}
    with contextlib.ExitStack() as stack:
        members: list[_Member] = []

        def start(launch: Launch, index: int) -> None:
            group = stack.enter_context(limited(f"member{index}", memory_bytes=budgets[index]))
            member = _Member(launch, group, logs / f"{index}.log")
            stack.callback(member.end)
            members.append(member)

        for index, worker in enumerate(layout.workers, 1):
            after = layout.successor(worker.id)
            peers: Mapping[str, str] = {} if after is None else {after: f"127.0.0.1:{ports[after]}"}
            start(
                rpc_server_command(engine, ports[worker.id], threads=1, model_files=[file],
                                   fingerprint=layout.model.fingerprint, rpc_secret=secret, peers=peers), index,
            )  # fmt: skip
        _until(
            members, lambda: all("mesh-listening" in m.log.read_text(errors="replace") for m in members), "listening"
        )
        port = _free_port()
        endpoints = [f"127.0.0.1:{ports[worker.id]}" for worker in layout.workers]
        start(llama_server_command(engine, layout, file, port, endpoints, threads=1, rpc_secret=secret, api_key=key), 0)
        url = f"http://127.0.0.1:{port}"
        _until(members, lambda: _healthy(url), "serving")
        yield members, url, key


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _until(members: Sequence[_Member], done: Any, what: str) -> None:
    deadline = time.monotonic() + START_WITHIN_S
    while not done():
        for member in members:
            member.look()
        if time.monotonic() > deadline:
            raise BenchError(f"not {what} within {START_WITHIN_S:.0f} s: {members[-1].last_words()}")
        time.sleep(0.05)


def exercise(tried: Try, url: str, key: str, members: Sequence[_Member]) -> None:
    """Fill every slot, embed a batch, and let conversations push each other out.

    Raises:
        BenchError: a member is gone, or an answer is none.
    """
    words = min(tried.context // 4, 300)
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=600, trust_env=False) as client:

        def ask(path: str, body: dict[str, Any]) -> None:
            try:
                answer = client.post(path, json=body)
            except httpx.HTTPError as error:
                raise BenchError(f"{path}: {error}") from error
            if answer.status_code != 200:
                raise BenchError(f"{path} answered {answer.status_code}: {answer.text[:200]}")

        def told(salt: int) -> None:
            ask("/completion", {"prompt": long_prompt(words, salt), "n_predict": 4, "temperature": 0})

        try:
            with ThreadPoolExecutor(tried.slots) as pool:
                list(pool.map(told, range(tried.slots)))
            ask("/v1/embeddings", {"input": long_prompt(min(words, 120), 77), "model": "m"})
            told(100)
            told(0)
        finally:
            for member in members:
                member.look()


def run(tried: Try, layout: Layout, engine: Engine, file: Path, directory: Path) -> None:
    """Start what was planned and use it; what goes wrong is noted in ``tried``."""
    logs = directory / str(tried.number)
    logs.mkdir(exist_ok=True)
    members: list[_Member] = []
    tried.failure = ""
    try:
        with _ring(layout, tried.budgets, engine, file, logs) as (started, url, key):
            members = [started[-1], *started[:-1]]
            exercise(tried, url, key, members)
    except BenchError as error:
        tried.failure = str(error)
    tried.peaks = [member.peak for member in members]
    over = [f"{p // MIB} of {b // MIB} MiB" for p, b in zip(tried.peaks, tried.budgets, strict=False) if p > b]
    if over and not tried.failure:
        tried.failure = f"resident {MEMORY} above its limit: {', '.join(over)}"


def _save(path: Path | None, seed: int, refused: int, done: Sequence[Try]) -> None:
    if path is not None:
        report = {"seed": seed, "refused": refused, "tries": [asdict(tried) for tried in done]}
        path.write_text(json.dumps(report, indent=1) + "\n")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="bin/bench memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tries", type=int, default=200, metavar="N", help="limits that are tried for real")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    engine = find_engine()
    if engine is None:
        print("error: no engine is built: bin/mesh engine build", file=sys.stderr)
        return 1
    done: list[Try] = []
    refused = 0
    try:
        file = find_model("demo", engine.dir / "vocab")
        model = inspect(file).cost("5e" * 32)
        with tempfile.TemporaryDirectory(prefix="meshbench-") as text:
            number = 0
            while len(done) < options.tries:
                tried, layout = draw(number, options.seed, model)
                number += 1
                if layout is None:
                    refused += 1
                    continue
                run(tried, layout, engine, file, Path(text))
                if tried.failure:
                    print(f"try {tried.number}: {tried.failure}", file=sys.stderr)
                if tried.failure and MEMORY not in tried.failure:
                    # A port that somebody took, a machine too busy to start: once more, and then it counts.
                    run(tried, layout, engine, file, Path(text))
                done.append(tried)
                if len(done) % 20 == 0:
                    print(f"{len(done)} tried, {sum(bool(t.failure) for t in done)} failed", file=sys.stderr)
                    _save(options.json, options.seed, refused, done)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = []
    for mode in sorted({t.mode for t in done}):
        of = [t for t in done if t.mode == mode]
        shares = [peak / planned for t in of for peak, planned in zip(t.peaks, t.planned, strict=False) if peak]
        limits = [peak / budget for t in of for peak, budget in zip(t.peaks, t.budgets, strict=False) if peak]
        failed = sum(bool(t.failure) for t in of)
        rows.append([mode, str(len(of)), str(failed), f"{statistics.median(shares):.2f} ({max(shares):.2f})",
                     f"{max(limits):.2f}"])  # fmt: skip
    print(markdown(["mode", "tries", "failed", "peak by planned, median (worst)", "by limit, worst"], rows))
    print(f"{refused} more draws were refused by the planner: nothing of the model fits such limits")
    _save(options.json, options.seed, refused, done)
    return 1 if any(t.failure for t in done) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
