"""Figures as Markdown tables: what a terminal and docs/benchmarks.md both show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.measure import Figures


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose source is lined up too."""
    table = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes for people, decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def speed_table(done: Iterable[Figures]) -> str:
    """One row per configuration, grouped by link; wire columns are those of the busiest worker."""
    header = ["link", "workers", "", "layers", "load s", "first token ms", "ms/token", "tok/s", "prompt tok/s"]
    header += ["wire at load", "wire per token", "wire per prompt", "late"]
    rows = []
    for f in sorted(done, key=lambda f: (f.link != "none", f.link, f.workers)):
        rows.append(
            [
                "-" if f.link == "none" else f.link,
                str(f.workers) if f.workers else "-",
                f.name,
                "+".join(map(str, f.layers)) or "-",
                f"{f.load_s:.2f}",
                f"{f.first_token_s * 1e3:.0f}",
                f"{f.ms_per_token:.1f}",
                f"{f.generation_tokens_per_s:.1f}",
                f"{f.prompt_tokens_per_s:.0f}",
                _most(f.load_bytes.values()),
                _most(f.bytes_per_token.values()),
                _most(f.prompt_bytes.values()),
                f"{f.late_packets:.1%}",
            ]
        )
    return markdown(header, rows)


def _most(values: Iterable[float]) -> str:
    counted = list(values)
    return size(max(counted)) if counted else "-"
