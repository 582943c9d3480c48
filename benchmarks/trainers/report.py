"""What trainers showed: rows, verdicts on their losses, and a table."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.e2e.readme import NOTHING, heading, table
from benchmarks.e2e.report import AGREES, DIFFERS, DRAWS
from benchmarks.trainers.providers import NUDGED, REFERENCE

BEGIN, END = "<!-- benchmarks trl: begin -->", "<!-- benchmarks trl: end -->"


@dataclass(frozen=True)
class Row:
    """One trainer of one provider.

    Attributes:
        size: "tiny" or "real".
        precision: "float32", or "bfloat16" where accelerate's autocast runs float32 weights in it.
        status: "ok", "out of memory", "timed out", "crashed" or "failed".
        step_ms, spread: the median of the steps after the warm-up, and the distance between their
            quartiles over it.
        slowest_ms: the slowest of them; of GRPO one that generates, which the median one does not.
        tokens_per_s: the tokens that a step reads over step_ms.
        peak_mib: the most that is allocated during these steps, the models included.
        losses, entropies: one for each step, the warm-up included, separated by spaces.
        loss_gap: the largest difference from a loss of TRL's own trainer.
        gradient_norm: of the first step.
        verdict: whether losses and entropies agree with TRL's.
    """

    trainer: str
    size: str
    precision: str
    provider: str
    status: str
    step_ms: float | None = None
    spread: float | None = None
    slowest_ms: float | None = None
    tokens_per_s: float | None = None
    peak_mib: float | None = None
    losses: str = ""
    entropies: str = ""
    loss_gap: float | None = None
    gradient_norm: float | None = None
    verdict: str = ""
    parameters: int | None = None
    replaced: str = ""
    note: str = ""
    version: str = ""
    device: str = ""
    torch: str = ""
    triton: str = ""
    transformers: str = ""
    commit: str = ""
    date: str = ""


# Of numbers of size one or more: rounding each token's loss once, and through a few steps four
# times, as for whole models. In float32 sums of many tokens are in another order.
_ALLOWED = {"bfloat16": 4 * 2**-8, "float32": 2**-16}


def numbers(text: str) -> list[float]:
    return [float(x) for x in text.split()]


def gap(ours: str, theirs: str) -> float:
    """The largest difference between two rows of numbers; NaN if one of them is."""
    gaps = [abs(a - b) for a, b in zip(numbers(ours), numbers(theirs), strict=True)]
    return math.nan if any(map(math.isnan, gaps)) else max(gaps, default=math.nan)


def judged(row: Row, reference: Row | None, nudged: Row | None = None) -> tuple[float | None, str]:
    """The gap between the losses, and whether it is rounding.

    A loss of sums over thousands of tokens, as DPO's, carries roundings far: how far, TRL's own
    second run says, whose weights began as far away as bfloat16 rounds them.
    """
    if row.status != "ok":
        return None, ""
    if row.provider == REFERENCE:
        return 0.0, "the reference"
    if reference is None or reference.status != "ok":
        return None, f"not judged: no row of {REFERENCE}"
    if row.provider == NUDGED:
        return gap(row.losses, reference.losses), "the yardstick"
    found = gap(row.losses, reference.losses)
    for name in _compared(row):
        ours, theirs = getattr(row, name), getattr(reference, name)
        # Without metrics of tokens there are no entropies.
        drawn = getattr(nudged, name) if nudged and nudged.status == "ok" else ""
        if ours and not _is_rounding(ours, theirs, row.precision, drawn):
            return found, f"{DIFFERS}: {name}, by {gap(ours, theirs):.2g}"
    return found, AGREES


def _compared(row: Row) -> tuple[str, ...]:
    """What a verdict is about: not losses of answers that are sampled from rounded numbers."""
    is_sampled = row.trainer == "GRPO" and row.precision == "bfloat16"
    return ("entropies",) if is_sampled else ("losses", "entropies")


def _is_rounding(ours: str, theirs: str, precision: str, drawn: str) -> bool:
    largest = max(1.0, *map(abs, numbers(theirs)))
    spread = DRAWS * gap(drawn, theirs) if drawn else 0.0
    # A comparison with NaN is false.
    return gap(ours, theirs) <= max(_ALLOWED[precision] * largest, spread)


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of rows about the same thing the last, in the order in which each came first."""
    found: dict[tuple, Row] = {}
    for row in rows:
        found[row.device, row.trainer, row.size, row.precision, row.provider] = row
    return list(found.values())


HEAD = (
    "trainer", "provider", "step, ms", "slowest, ms", "tokens/s", "peak, GiB", "last loss",
    "largest difference", "verdict",
)  # fmt: skip


def grid(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each row; in brackets a number over TRL's own."""
    lines = [list(HEAD)]
    for row in rows:
        like = [r for r in rows if (r.trainer, r.size) == (row.trainer, row.size)]
        reference = next((r for r in like if r.provider == REFERENCE), None)
        if row.status != "ok" or row.verdict.startswith(DIFFERS):
            said = row.status if row.status != "ok" else row.verdict
            lines.append([f"{row.trainer} {row.size}", row.provider, *["-"] * 6, said])
            continue
        lines.append([
            f"{row.trainer} {row.size}",
            row.provider,
            f"{row.step_ms:,.1f}",
            f"{row.slowest_ms:,.1f}",
            _with_ratio(row, reference, "tokens_per_s", 1, 0),
            _with_ratio(row, reference, "peak_mib", 1024, 1),
            f"{numbers(row.losses)[-1]:.4f}",
            "-" if row.loss_gap is None else f"{row.loss_gap:.1e}",
            row.verdict,
        ])  # fmt: skip
    return lines


def _with_ratio(row: Row, reference: Row | None, name: str, unit: float, decimals: int) -> str:
    value = getattr(row, name)
    if value is None:
        return "-"
    out = f"{value / unit:,.{decimals}f}"
    of_theirs = getattr(reference, name) if reference else None
    return out if row is reference or not of_theirs else f"{out} ({value / of_theirs:.2f}x)"


def remarks(rows: Iterable[Row]) -> list[str]:
    """Say in words what failed and how."""
    return [
        f"{r.status}: {r.provider}, {r.trainer} {r.size}: {r.note}"
        for r in rows
        if r.status != "ok"
    ]


def section(rows: Sequence[Row]) -> str:
    """All that the rows say, device by device, in Markdown."""
    rows = latest(rows)
    parts = []
    for device in dict.fromkeys(row.device for row in rows):
        of_device = [row for row in rows if row.device == device]
        parts += [heading(device, of_device), table(grid(of_device))]
        if said := remarks(of_device):
            parts.append("\n".join(f"- {line}" for line in said))
    return "\n\n".join(parts) or NOTHING
