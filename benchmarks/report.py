"""What was measured: one row each, appended to a CSV file, and printed as a table."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import rows as files


@dataclass(frozen=True)
class Row:
    """One provider in one mode of one case.

    Attributes:
        provider: who; in a sweep, with which settings; in a layer, with which of our ops.
        status: "ok", "wrong" (its answer is), "cannot" (it has no such option) or "failed".
        ms: the median; blank unless the answer is right. It is the device's time (timing.py says
            how), of the modes `host-fwd` and `host-full` the host's.
        spread: the distance between the quartiles over the median.
        floor: the share of the floor: the least possible time over `ms`.
        peak_mib: what a call holds at most above its inputs.
        error: the largest relative error of a result or gradient, in norm, against float64.
        first_s: the first call, which compiles.
        copy_gb_s, matrix_tflop_s: the ceilings that the floor stands on, measured in this run.
        overwrites: how many arguments and cotangents the provider writes into; what was there is
            put back outside of the timing.
        note: why there is no time, or which part has the largest error; and whether the call waits
            for the device, so that some of its host's time is in `ms`.
    """

    op: str
    shape: str
    mode: str
    dtype: str
    provider: str
    status: str
    ms: float | None = None
    spread: float | None = None
    floor: float | None = None
    peak_mib: float | None = None
    error: float | None = None
    repeats: int | None = None
    first_s: float | None = None
    overwrites: int | None = None
    note: str = ""
    version: str = ""
    device: str = ""
    copy_gb_s: float | None = None
    matrix_tflop_s: float | None = None
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""


# The note of a sweep's row: so the op runs today. A table marks what is slower by more than this.
CURRENT, _TOLERATED = "current", 0.03

COLUMNS = files.columns(Row)


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file of results, and the header to a new one."""
    files.append(path, Row, rows)


def read(path: Path) -> list[Row]:
    """Read a file that `append` wrote; of any other say in one ValueError what is wrong with it."""
    return files.read(path, Row)


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of rows about the same thing the last one, in the order in which each first came."""
    kept = {(r.device, r.op, r.shape, r.mode, r.dtype, r.provider): r for r in rows}
    return list(kept.values())


def tables(rows: Sequence[Row], bold: bool = False) -> str:
    """One table per op and mode: shapes x providers. The best of a shape has a star."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.op, row.mode), []).append(row)
    return "\n\n".join(
        (_sweep if is_sweep(key[1]) else _table)(*key, group, bold) for key, group in groups.items()
    )


def is_sweep(mode: str) -> bool:
    """Say whether rows of this mode compare configurations of one op, not providers."""
    return mode.startswith("sweep")


def remarks(rows: Iterable[Row]) -> list[str]:
    """Say what a table cannot: who has no time and why, and who writes over its inputs."""
    lines = []
    for r in rows:
        if r.status != "ok":
            lines.append(f"{r.status}: {r.provider}, {r.op} {r.shape}: {r.note}")
        elif r.overwrites:
            lines.append(
                f"overwrites: {r.provider}, {r.op}: it writes over what the caller gave it, which"
                " is put back untimed; its peak of memory is lower for it"
            )
    return list(dict.fromkeys(lines))


def best(rows: Iterable[Row], quantity: str) -> Row | None:
    """The right answer with the least of a quantity."""
    right = [r for r in rows if r.status == "ok" and getattr(r, quantity) is not None]
    return min(right, key=lambda r: getattr(r, quantity), default=None)


def _table(op: str, mode: str, rows: list[Row], bold: bool) -> str:
    quantity = "peak_mib" if mode == "memory" else "ms"
    providers = list(dict.fromkeys(r.provider for r in rows))
    lines = [["", *providers]]
    for shape in dict.fromkeys(r.shape for r in rows):
        of_shape = {r.provider: r for r in rows if r.shape == shape}
        first = best(of_shape.values(), quantity)
        cells = [_cell(of_shape.get(p), quantity, of_shape.get(p) is first) for p in providers]
        lines.append([shape, *cells])
    unit = "MiB above the inputs" if mode == "memory" else "ms, share of the floor"
    if mode.startswith("host"):
        unit = "ms of host time a call"
    return f"{op}, {mode} ({unit})\n" + columns(lines, bold)


def _sweep(op: str, mode: str, rows: list[Row], bold: bool) -> str:
    """Today's configuration of every shape beside the best one."""
    lines = [["", "now", "", "best", "", "slower"]]
    for shape in dict.fromkeys(r.shape for r in rows):
        of_shape = [r for r in rows if r.shape == shape]
        now = next((r for r in of_shape if r.note == CURRENT), None)
        first = best(of_shape, "ms")
        if now is None or now.ms is None or first is None or first.ms is None:
            continue
        slower = now.ms / first.ms - 1
        verdict = f"{slower:.1%}" + ("*" if slower > _TOLERATED else " ")
        lines.append(
            [
                shape,
                now.provider,
                _cell(now, "ms", False),
                "the same" if first is now else first.provider,
                _cell(first, "ms", False),
                verdict,
            ]
        )
    head = f"{op}, {mode} (ms, share of the floor; * more than {_TOLERATED:.0%} from the best)"
    return f"{head}\n" + columns(lines, bold)


def _cell(row: Row | None, quantity: str, first: bool) -> str:
    if row is None:
        return "-"
    value = getattr(row, quantity)
    if row.status != "ok" or value is None:
        return row.status if row.status != "ok" else "-"
    text = significant(value)
    if quantity == "ms" and row.floor is not None:
        text += f" {row.floor:4.0%}"
    return text + ("*" if first else " ")


def significant(value: float) -> str:
    """Four digits that count, and no exponent."""
    if not value:
        return "0"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def columns(lines: list[list[str]], bold: bool) -> str:
    """Set the first column flush left and the others flush right; starred cells may be bold."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    out = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        for text, width in zip(line[1:], widths[1:], strict=True):
            padded = text.rjust(width)
            cells.append(f"\033[1m{padded}\033[0m" if bold and text.endswith("*") else padded)
        out.append("  ".join(cells).rstrip())
    return "\n".join(out)
