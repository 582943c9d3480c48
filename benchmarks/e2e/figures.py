"""Figures of committed results: bars by provider, whole or in parts, and loss curves."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from benchmarks import rows as files
from benchmarks.e2e import breakdown
from benchmarks.e2e.breakdown import IDLE, WALL, Part
from benchmarks.e2e.parts import INDUCTOR, OTHER
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
# What only others can make faster is blue.
_PART_COLORS = {
    "matrix products": "#30638e",
    "attention": "#5a8dbb",
    "experts": "#7b5ea7",
    "gated unit": "#d1495b",
    "norms": "#edae49",
    "rope": "#a33345",
    "loss": "#e07a5f",
    "embedding": "#f5d69a",
    "additions": "#00798c",
    "other elementwise": "#4fa6b2",
    INDUCTOR: "#4c7a51",
    "optimizer": "#9cc0de",
    "copies and memsets": "#93ccd3",
    OTHER: "#8a8d91",
    IDLE: "#e4e5e7",
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


def draw_parts(rows: Sequence[Part], folder: Path) -> list[Path]:
    """One figure a device: a panel for each model, a bar for each provider, made of its parts."""
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    rows = latest(rows)
    for device in dict.fromkeys(row.device for row in rows):
        known = breakdown.values(row for row in rows if row.device == device)
        names = list(dict.fromkeys(name for name, _, _ in known))
        if not names:
            continue
        figure, panels = pyplot.subplots(
            1,
            len(names),
            figsize=(2.6 + 2.4 * len(names), 4.6),
            squeeze=False,
            layout="constrained",
        )
        for axes, name in zip(panels[0], names, strict=True):
            _stack(axes, {(who, part): ms for (n, who, part), ms in known.items() if n == name})
            axes.set_title(name, fontsize=9, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
        panels[0, 0].set_ylabel("milliseconds of a step", fontsize=8)
        present = {part for _, _, part in known}
        handles = [
            matplotlib.patches.Patch(color=color, label=part)
            for part, color in _PART_COLORS.items()
            if part in present
        ]
        # As they lie on each other.
        figure.legend(handles=handles[::-1], loc="outside right center", frameon=False, fontsize=8)
        figure.suptitle(f"where a training step goes: {device}", fontsize=10)
        drawn.append(folder / f"{device.replace(' ', '_')}-e2e-profile.png")
        figure.savefig(drawn[-1], dpi=150)
        pyplot.close(figure)
    return drawn


def _stack(axes, known: dict[tuple[str, str], float]) -> None:
    """Lay the parts of each provider on each other, and mark the wall time."""
    providers = list(dict.fromkeys(provider for provider, _ in known))
    bottom = [0.0] * len(providers)
    for part, color in _PART_COLORS.items():
        heights = [known.get((provider, part), 0.0) for provider in providers]
        axes.bar(providers, heights, 0.8, bottom, color=color)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    for i, provider in enumerate(providers):
        axes.hlines(known[provider, WALL], i - 0.45, i + 0.45, color="black", linewidth=1)
    axes.tick_params("x", rotation=35, labelsize=7)


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


DRAW = {"e2e": draw_steps, "curves": draw_curves, "profile": draw_parts}
