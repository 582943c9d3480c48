"""What the runs showed: a table for the terminal, and CSV, JSON and a plot for later."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

from liger_fn.training.loop import Run

STRETCHES = 10
# Training amplifies rounding: at the default rate, weights that differ in their last bit alone lead
# to float32 losses up to 3e-5 apart after 300 steps; at a rate half as high again, to 1e-2. In
# bfloat16 one rounding is 4e-3 of an activation, so only the course of the curves can be compared.
TOLERANCE = {"float32": 1e-3, "mixed": 5e-2, "bfloat16": 2e-1}


def stretches(steps: int) -> list[slice]:
    """Cut the steps into at most STRETCHES nearly equal pieces."""
    count = min(STRETCHES, steps)
    edges = [steps * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def largest_difference(runs: Sequence[Run], where: slice = slice(None)) -> float:
    """Give the largest distance, over steps and runs, from the first run's loss."""
    first, *others = (run.losses[where] for run in runs)
    gaps = [abs(a - b) for other in others for a, b in zip(first, other, strict=True)]
    # A loss that is NaN in any run must not look like agreement.
    return math.nan if any(map(math.isnan, gaps)) else max(gaps, default=0.0)


def table(runs: Sequence[Run]) -> str:
    """Lay out losses, differences, speed and memory of all runs."""
    names = [run.provider for run in runs]
    compared = len(runs) > 1
    rows = [["step", *names] + ["largest difference"] * compared]
    for part in stretches(len(runs[0].losses)):
        losses = [f"{mean(run.losses[part]):.4f}" for run in runs]
        gap = [f"{largest_difference(runs, part):.1e}"] * compared
        steps = sorted({part.start + 1, part.stop})
        rows.append(["-".join(map(str, steps)), *losses, *gap])
    rows.append([])
    rows.append(["held-out loss before", *(f"{run.held_out[0]:.4f}" for run in runs)])
    rows.append(["held-out loss after", *(f"{run.held_out[1]:.4f}" for run in runs)])
    rows.append(["tokens/s (median)", *(f"{run.tokens_per_second:,.0f}" for run in runs)])
    rows.append(["peak memory, MiB", *(memory(run) for run in runs)])
    if compared:
        rows[-2].append(ratio([run.tokens_per_second for run in runs]))
        rows[-1].append(ratio([run.peak_mib for run in runs]))
    return align(rows)


def memory(run: Run) -> str:
    return "n/a on a CPU" if run.peak_mib is None else f"{run.peak_mib:,.0f}"


def ratio(values: Sequence[float | None]) -> str:
    first, last = values[0], values[-1]
    return "" if first is None or last is None else f"{last / first:.2f} x"


def align(rows: list[list[str]]) -> str:
    """Set the first column flush left and the others flush right."""
    columns = max(map(len, rows))
    filled = [row + [""] * (columns - len(row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*filled, strict=True)]
    lines = []
    for row in filled:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def write_csv(file: Path, runs: Sequence[Run]) -> None:
    """Write one row per step with every run's loss."""
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["step", *(run.provider for run in runs)])
        for i, losses in enumerate(zip(*(run.losses for run in runs), strict=True), start=1):
            writer.writerow([i, *losses])


def write_json(file: Path, settings: dict[str, Any], runs: Sequence[Run]) -> None:
    """Write the settings, the machine and each run's summary."""
    summary = {
        run.provider: {
            "final_loss": run.losses[-1],
            "held_out_before_after": run.held_out,
            "tokens_per_second": run.tokens_per_second,
            "peak_mib": run.peak_mib,
        }
        for run in runs
    }
    file.write_text(json.dumps({"settings": settings, "runs": summary}, indent=2) + "\n")


def plot(file: Path, runs: Sequence[Run], title: str) -> None:
    """Draw the loss curves over each other, and below them their distance from the first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = 2 if len(runs) > 1 else 1
    figure, axes = pyplot.subplots(
        panels,
        1,
        figsize=(8, 3.5 + 2 * (panels - 1)),
        height_ratios=[3, 1.5][:panels],
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    losses = axes[0, 0]
    for run, style in zip(runs, cycle(STYLES), strict=False):
        losses.plot(range(1, len(run.losses) + 1), run.losses, label=legend(run), **style)
    losses.set_title(title, fontsize="medium")
    losses.set(ylabel="training loss, nats per token")
    losses.legend(frameon=False)

    if len(runs) > 1:
        gaps = axes[1, 0]
        first = runs[0]
        for run in runs[1:]:
            gap = [abs(a - b) for a, b in zip(first.losses, run.losses, strict=True)]
            gaps.semilogy(range(1, len(gap) + 1), gap, color="0.3", linewidth=1)
        gaps.set(ylabel="|difference|")
    axes[-1, 0].set(xlabel="step")
    for panel in axes[:, 0]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


# Wide and pale under thin and dashed, so that two equal curves are both seen.
STYLES = (
    {"color": "#f4a259", "linewidth": 4, "alpha": 0.8},
    {"color": "#1f4e79", "linewidth": 1.2, "linestyle": "--"},
)


def legend(run: Run) -> str:
    held = "" if run.peak_mib is None else f", {run.peak_mib / 1024:.1f} GiB"
    return f"{run.provider}: {run.tokens_per_second:,.0f} tokens/s{held}"
