"""Tables in a page, made from committed results: what stands between the markers is replaced."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.e2e import breakdown
from benchmarks.e2e.breakdown import Part
from benchmarks.e2e.report import (
    QUANTITIES,
    Curve,
    Row,
    advice,
    curve_grid,
    grid,
    latest,
    remarks,
)

BEGIN, END = "<!-- benchmarks e2e: begin -->", "<!-- benchmarks e2e: end -->"
NOTHING = "Nothing is committed yet: the command below makes the rows."


def insert(page: Path, rows: Sequence[Row], curves: Sequence[Curve], parts: Sequence[Part]) -> None:
    """Write the tables between the markers of a page."""
    put_between(page, BEGIN, END, section(rows, curves, parts))


def put_between(page: Path, begin: str, end: str, section: str) -> None:
    """Replace what stands between two markers of a page."""
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{page} cannot be read: {error.strerror}.") from None
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{page} must contain {begin} and, after it, {end}, each once.")
    before, rest = text.split(begin)
    _, after = rest.split(end)
    page.write_text(f"{before}{begin}\n\n{section}\n\n{end}{after}", encoding="utf-8")


def section(rows: Sequence[Row], curves: Sequence[Curve], parts: Sequence[Part]) -> str:
    """All that the rows say, device by device, in Markdown."""
    rows, parts = latest(rows), latest(parts)
    devices = dict.fromkeys(row.device for row in (*rows, *curves, *parts))
    told = [
        _device(
            device, *([r for r in kind if r.device == device] for kind in (rows, curves, parts))
        )
        for device in devices
    ]
    return "\n\n".join(told) or NOTHING


def _device(
    device: str, rows: Sequence[Row], curves: Sequence[Curve], parts: Sequence[Part]
) -> str:
    grids = [grid(rows, quantity) for quantity in QUANTITIES]
    if curves:
        grids.append(curve_grid(curves))
    apart = breakdown.grids(parts)
    said = [f"- {line}" for line in (*advice(rows), *remarks([*rows, *parts]))]
    blocks = [
        heading(device, [*rows, *curves, *parts]),
        *(table(lines) for lines in grids if lines),
        breakdown.MEANING if apart else "",
        *(table(lines) for lines in apart),
        "\n".join(said),
    ]
    return "\n\n".join(block for block in blocks if block)


def heading(device: str, rows: Sequence[Any]) -> str:
    """What all rows of a device were measured with."""

    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(getattr(row, name) for row in rows if getattr(row, name)))

    return (
        f"{device}; torch {all_of('torch')}, triton {all_of('triton')},"
        f" transformers {all_of('transformers')}; {all_of('version')}; commit {all_of('commit')}:"
    )


def table(lines: list[list[str]]) -> str:
    """A table in Markdown; what has a star is bold."""
    head, *body = [[_cell(text) for text in line] for line in lines]
    ruled = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)


def _cell(text: str) -> str:
    text = text.replace("|", "\\|")
    return f"**{text[:-1]}**" if text.endswith("*") else text
