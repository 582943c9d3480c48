"""Where the time of a training step went: rows, and a table for each model."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from benchmarks.e2e.parts import PARTS
from benchmarks.e2e.report import Row, is_right, label
from benchmarks.report import columns

# What stands below the parts. Only the first is a sum of them.
KERNELS, WALL, HOST, IDLE = "all kernels", "wall time", "host time", "idle"
SUMMARY = (KERNELS, WALL, HOST, IDLE)

MEANING = (
    "What a step consists of: each kernel counts for what its name says that it does; one of"
    " PyTorch's own does not say for whom, so that the addition in an unpatched rotation is an"
    " addition. Wall time and the host's time until a step is queued are measured without the"
    " profiler; idle is the device's time without any kernel."
)


@dataclass(frozen=True)
class Part:
    """One part of a provider's step with one model. One that failed has a row without a part.

    Attributes:
        mode: "profile".
        part: one of PARTS, or of SUMMARY: all kernels together; the wall time of a step, whose
            profile nobody takes; the host's time until it has queued one; and the time of the
            device in which nothing runs, which is the wall time without that of the kernels, and 0
            where these took longer under the profiler. On a CPU operators stand for kernels.
        ms: of one step; of the kernels the mean of some.
        launches: how many kernels a step has for it.
        share: of the time of all kernels.
        spread: of the wall time: the distance between the quartiles over the median.
        verdict, status, note, variant: as in a row of steps.
    """

    mode: str
    shape: str
    variant: str
    dtype: str
    batch: int | None
    seq: int | None
    provider: str
    status: str
    part: str = ""
    ms: float | None = None
    launches: float | None = None
    share: float | None = None
    spread: float | None = None
    verdict: str = ""
    graph: str = ""
    note: str = ""
    version: str = ""
    device: str = ""
    torch: str = ""
    triton: str = ""
    transformers: str = ""
    commit: str = ""
    date: str = ""


def parts_of(row: Row, facts: Mapping[str, Any]) -> list[Part]:
    """The rows of what a process found, of which `row` says who, with what, and how it ended."""
    known = {f.name for f in fields(Row)}
    shared = {f.name: getattr(row, f.name) for f in fields(Part) if f.name in known}
    shared["mode"] = "profile"
    if row.status != "ok":
        return [Part(**shared)]
    found = facts["parts"]
    total = sum(ms for ms, _ in found.values())
    out = [
        Part(**shared, part=part, ms=ms, launches=launches, share=ms / total)
        for part, (ms, launches) in sorted(found.items(), key=lambda item: PARTS.index(item[0]))
    ]
    launches = sum(launches for _, launches in found.values())
    out.append(Part(**shared, part=KERNELS, ms=total, launches=launches, share=1.0))
    idle = max(0.0, row.step_ms - facts["busy_ms"])
    times = {WALL: row.step_ms, HOST: facts["host_ms"], IDLE: idle}
    return out + [Part(**shared, part=part, ms=ms) for part, ms in times.items()]


Values = dict[tuple[str, str, str], float]


def values(rows: Iterable[Part]) -> Values:
    """The median milliseconds of what may be shown, by label, provider and part."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        if row.ms is not None and is_right(row):
            found.setdefault((label(row), row.provider, row.part), []).append(row.ms)
    return {key: statistics.median(numbers) for key, numbers in found.items()}


def shown(known: Values, name: str) -> list[str]:
    """The parts that any provider has with a model, in their order."""
    present = {part for shape, _, part in known if shape == name}
    return [part for part in (*PARTS, *SUMMARY) if part in present]


def grids(rows: Sequence[Part]) -> list[list[list[str]]]:
    """For each model parts x providers, in milliseconds; the shortest wall time has a star."""
    known = values(rows)
    out = []
    for name in dict.fromkeys(label(row) for row in rows):
        states = {
            row.provider: "differs" if row.status == "ok" else row.status
            for row in rows
            if label(row) == name
        }
        lines = [
            [part, *(_cell(known, states, name, provider, part) for provider in states)]
            for part in shown(known, name)
        ]
        if lines:
            out.append([[f"{name}: ms of a step", *states], *lines])
    return out


def _cell(known: Values, states: Mapping[str, str], name: str, provider: str, part: str) -> str:
    if (name, provider, WALL) not in known:
        return states[provider] if part == WALL else "-"
    if (name, provider, part) not in known:
        return "-"
    ms = known[name, provider, part]
    walls = [known[name, p, WALL] for p in states if (name, p, WALL) in known]
    is_best = part == WALL and len(walls) > 1 and ms == min(walls)
    return f"{ms:,.2f}" + "*" * is_best


def tables(rows: Sequence[Part], bold: bool = False) -> str:
    """All tables of some rows, for a terminal."""
    return "\n\n".join(columns(lines, bold) for lines in grids(rows))
