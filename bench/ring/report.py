"""The ring's figures as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench import tables as markdown
from bench.ring.records import Model, Run, Turns
from bench.ring.verdicts import Verdict, differing_texts
from bench.tables import size

_KINDS = (("host > worker", "a", "w"), ("worker > worker", "w", "w"), ("worker > host", "w", "a"))


def bars(reached: Sequence[Verdict]) -> str:
    """Every bar with what was measured, and how many were met."""
    header = ["model", "what", "bar", "upstream", "measured", "met"]
    words = {True: "yes", False: "NO", None: "-"}
    rows = [[v.model, v.what, v.bar, v.upstream, v.measured, words[v.met]] for v in reached]
    judged = [v for v in reached if v.met is not None]
    count = f"{sum(v.met is True for v in judged)} of {len(judged)} bars met"
    return "\n".join(["", markdown.markdown(header, rows), "", count])


def tables(models: Sequence[Model], runs: Sequence[Run]) -> str:
    """What the bars do not show: each link, load and round trips, conversations, and texts that differ."""
    parts = []
    for model in models:
        mine = [run for run in runs if run.model == model.name]
        activation = size(4 * model.n_embd)
        parts.append(f"{model.name}: {size(model.bytes)}, {model.n_layers} layers, an activation is {activation}")
        parts += [part for part in (_engine_table(mine), _visit_table(mine)) if part]
    differing = differing_texts(runs)
    parts.append("\n".join(["text DIFFERS:", *differing]) if differing else "text: a single process's, in every ring")
    return "\n\n".join(parts)


def _engine_table(runs: Sequence[Run]) -> str:
    header = ["workers", "", "layers", "load s", "wire at load", "turns at load", "to 1st token", "per new shape"]
    header += ["solo ms", "ms/token", "over solo", "limit", *(kind for kind, _, _ in _KINDS), "late"]
    turned = {(run.name, run.workers): run.turns for run in runs if run.turns}
    engines = [run for run in runs if run.name in ("ring", "upstream") and run.link != "lan"]
    # Runs that only counted have a row of their own where nothing else was measured.
    measured = [run for run in engines if run.link != "relayed"] or engines
    rows = []
    for run in (run for run in runs if run.name == "solo" and run.loads.seconds):
        rows.append(["0", "solo", "-", f"{statistics.median(run.loads.seconds):.2f}", *["-"] * (len(header) - 4)])
    for run in measured:
        row = [str(run.workers), run.name, "+".join(map(str, run.layers)) or "-"]
        row += [f"{statistics.median(run.loads.seconds):.2f}", size(statistics.median(run.loads.wire))]
        row += [*_turn_cells(turned.get((run.name, run.workers))), *_token_cells(run)]
        rows.append(row)
    return markdown.markdown(header, rows) if rows else ""


def _turn_cells(turns: Turns | None) -> list[str]:
    if turns is None:
        return ["-"] * 3
    return [str(turns.to_healthy), str(turns.to_first_token), f"{turns.per_new_shape:.1f}"]


def _token_cells(run: Run) -> list[str]:
    token = run.token
    if token is None:
        return [*["-"] * 3, f"{run.limit_ms:.0f}", *["-"] * len(_KINDS), f"{run.late_packets:.1%}"]
    cells = [f"{statistics.median(part):.1f}" for part in (token.solo_ms, token.ms, token.over_solo_ms)]
    cells.append(f"{run.limit_ms:.0f}")
    for _, by, to in _KINDS:
        ends = [(link.split(">"), count) for link, count in token.links.items()]
        carried = [count for (source, sink), count in ends if source[0] == by and sink[0] == to]
        cells.append(size(max(carried)) if carried else "-")
    return [*cells, f"{token.late_packets:.1%}"]


def _visit_table(runs: Sequence[Run]) -> str:
    header = ["workers", "", "visit", "new tokens", "computed", "to a worker", "from a worker", "first token s"]
    rows = []
    for run in runs:
        for number, visit in enumerate(run.visits):
            word = f"{visit.conversation} {1 + number // 2}"
            row = [str(run.workers), run.name, word, str(visit.new_tokens), str(visit.computed)]
            rows.append([*row, size(visit.to_worker), size(visit.from_worker), f"{visit.first_s:.2f}"])
    return markdown.markdown(header, rows) if rows else ""
