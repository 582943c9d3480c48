"""Figures of committed results: bars by provider, and loss curves on each other."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from benchmarks import rows as files
from benchmarks.e2e.providers import REFERENCE
from benchmarks.e2e.report import LONGEST, MEMORY, NUDGED, SPEED, Curve, Row, by_run, latest, values
from benchmarks.plot import bars, require_committed

_COLORS = {
    "hf": "#30638e",
    "hf+compile": "#9cc0de",
    "liger": "#00798c",
    "liger_fn": "#d1495b",
    "liger_fn+compile": "#e9a3ad",
}
_STYLES = {
    REFERENCE: {"color": "#f4a259", "linewidth": 4, "alpha": 0.8},
    NUDGED: {"color": "#8a8d91", "linewidth": 1.2},
}
_PATCHED = {"color": "#1f4e79", "linewidth": 1.2, "linestyle": "--"}


def read(paths: Sequence[Path], kind: type) -> list:
    """The rows of committed files."""
    for path in paths:
        require_committed(path)
    return [row for path in paths for row in files.read(path, kind)]


def require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("Plots need matplotlib: pip install '.[bench]'.")


def draw_steps(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Bars of speed, of memory and of the longest sequence, for every device."""
    require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    rows = latest(rows)
    for device in dict.fromkeys(row.device for row in rows):
        of_device = [row for row in rows if row.device == device]
        for quantity in (SPEED, MEMORY, LONGEST):
            known = values(of_device, quantity)
            if not known:
                continue
            path = folder / f"{device.replace(' ', '_')}-e2e-{quantity.name}.png"
            bars(path, f"training steps: {device}", quantity.title, known, _COLORS)
            drawn.append(path)
    return drawn


def draw_curves(curves: Sequence[Curve], folder: Path) -> list[Path]:
    """One figure a device: losses above, distances from the reference below, model by model."""
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for device in dict.fromkeys(curve.device for curve in curves):
        groups = by_run(curve for curve in curves if curve.device == device)
        if not groups:
            continue
        figure, axes = pyplot.subplots(
            2,
            len(groups),
            figsize=(1 + 3.2 * len(groups), 5),
            height_ratios=[3, 1.5],
            sharex=True,
            sharey="row",
            squeeze=False,
            layout="constrained",
        )
        for (above, below), (key, runs) in zip(axes.T, groups.items(), strict=True):
            _draw_runs(above, below, runs)
            above.set_title(" ".join(key), fontsize=9, loc="left")
            for panel in (above, below):
                panel.spines[["top", "right"]].set_visible(False)
        axes[0, 0].set_ylabel("loss, nats per token", fontsize=8)
        axes[1, 0].set_ylabel(f"distance from {REFERENCE}", fontsize=8)
        figure.supxlabel("step", fontsize=8)
        figure.suptitle(device, fontsize=10)
        drawn.append(folder / f"{device.replace(' ', '_')}-curves.png")
        figure.savefig(drawn[-1], dpi=150)
        pyplot.close(figure)
    return drawn


def _draw_runs(above, below, runs: dict[str, Curve]) -> None:
    for name, curve in runs.items():
        losses, style = curve.values(), _STYLES.get(name, _PATCHED)
        steps = range(1, len(losses) + 1)
        above.plot(steps, losses, label=name, **style)
        if name != REFERENCE and REFERENCE in runs:
            pairs = zip(losses, runs[REFERENCE].values(), strict=True)
            below.semilogy(steps, [abs(a - b) for a, b in pairs], **style)
    above.legend(frameon=False, fontsize=7)
