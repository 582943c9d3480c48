"""Plots from committed CSV files: what a plot shows can be read, and measured again."""

import importlib.util
import math
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.report import Row, is_sweep, latest, read

# One colour a provider, the same in every plot; kin are shades of one.
_COLORS = {
    "liger_fn": "#d1495b",
    "eager": "#30638e",
    "torch": "#5a8dbb",
    "compile": "#9cc0de",
    "liger": "#00798c",
    "liger-c16": "#4fa6b2",
    "liger-cute": "#93ccd3",
    "liger-sm90": "#4c7a51",
    "liger-sm90-8": "#93bd96",
    "cce": "#7b5ea7",
    "cce-exact": "#b9a5d3",
    "quack": "#edae49",
    "quack-base": "#f5d69a",
}
_UNKNOWN = "#8a8d91"
_SHAPES_A_LINE = 7
_LABELS = {
    "floor": "share of the floor (the device's limit is 100 %)",
    "ms": "milliseconds of host time a call",
    "peak_mib": "peak memory above the inputs, MiB",
}


def plot_files(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Draw every op and mode of committed files into `folder`; return what was written."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("Plots need matplotlib: pip install '.[bench]'.")
    for path in paths:
        require_committed(path)
    return plot([row for path in paths for row in read(path)], folder)


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in latest(rows):
        if row.status == "ok" and not is_sweep(row.mode):
            groups.setdefault((row.device, row.op, row.mode), []).append(row)
    drawn = [_draw(key, group, folder) for key, group in groups.items()]
    for (device, op, mode), group in groups.items():
        if mode == "full":
            drawn += [
                _draw_curve(device, op, shape, group, folder) for shape in _settings_of(group)
            ]
    return [path for path in drawn if path is not None]


def _settings_of(rows: list[Row]) -> list[str]:
    """The shapes at which our op was measured with several settings of its memory."""
    ours = [r.shape for r in rows if _is_ours(r)]
    return [shape for shape in dict.fromkeys(ours) if ours.count(shape) > 2]


def _is_ours(row: Row) -> bool:
    return row.provider.split("-")[0] == "liger_fn"


def _draw_curve(device: str, op: str, shape: str, rows: list[Row], folder: Path) -> Path:
    """Draw time against memory: our settings as a line, peers as points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    here = [r for r in rows if r.shape == shape and r.peak_mib is not None and r.ms is not None]
    here.sort(key=lambda r: r.peak_mib or 0.0)
    lines_below = 0
    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
    line = sorted((r.peak_mib, r.ms) for r in here if _is_ours(r))
    axes.plot(*zip(*line, strict=True), color=_COLORS["liger_fn"], marker="o", zorder=3)
    for row in here:
        floor = row.provider == "products"
        color = _COLORS.get(row.provider.split("-")[0], _UNKNOWN)
        if floor:
            axes.axhline(row.ms, color=_UNKNOWN, linestyle=":", linewidth=1)
        elif not _is_ours(row):
            axes.scatter([row.peak_mib], [row.ms], color=color, zorder=3)
        # Ours below the line, straight; the others above it, aslant: they crowd at the fast end.
        below = _is_ours(row) or floor
        lines_below = (lines_below + below) % 3
        axes.annotate(
            row.provider.removeprefix("liger_fn-"),
            (line[0][0], row.ms) if floor else (row.peak_mib, row.ms),
            (0, -12 - 9 * lines_below) if below else (2, 6),
            textcoords="offset points",
            rotation=0 if below else 35,
            ha="center" if below else "left",
            fontsize=7,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
    axes.xaxis.set_minor_formatter(matplotlib.ticker.ScalarFormatter())
    axes.set_xlabel("peak memory above the inputs, MiB (gradients included)", fontsize=8)
    axes.set_ylabel("milliseconds, forward and backward", fontsize=8)
    axes.set_ylim(0, 1.15 * max(r.ms or 0.0 for r in here))
    axes.set_title(f"{op} {shape}: {device}", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)

    path = folder / "-".join((device.replace(" ", "_"), op, shape, "memory-curve.png"))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def _draw(key: tuple[str, str, str], rows: list[Row], folder: Path) -> Path | None:
    device, op, mode = key
    quantity = "peak_mib" if mode == "memory" else "ms" if mode.startswith("host") else "floor"
    # What settings of ours cost is a curve of its own.
    value = {
        (r.shape, r.provider): getattr(r, quantity)
        for r in rows
        if getattr(r, quantity) is not None and (r.provider == "liger_fn" or not _is_ours(r))
    }
    if not value:
        return None
    path = folder / "-".join((device.replace(" ", "_"), op, mode + ".png"))
    bars(path, f"{op}, {mode}: {device}", _LABELS[quantity], value, _COLORS, quantity == "floor")
    return path


def bars(
    path: Path,
    title: str,
    label: str,
    value: Mapping[tuple[str, str], float],
    colors: Mapping[str, str],
    percent: bool = False,
) -> None:
    """Draw a group of bars for each shape, one for each provider; `value` is by both."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(shape for shape, _ in value))
    providers = list(dict.fromkeys(provider for _, provider in value))
    lines = math.ceil(len(shapes) / _SHAPES_A_LINE)
    longest = math.ceil(len(shapes) / lines)
    figure, panels = pyplot.subplots(
        lines, 1, squeeze=False, sharey=True, layout="constrained",
        figsize=(max(6.0, 1.2 + 1.9 * longest), 1.0 + 2.6 * lines),
    )  # fmt: skip
    width = 0.8 / len(providers)
    for line, axes in enumerate(panels[:, 0]):
        shown = shapes[line * longest : (line + 1) * longest]
        for i, provider in enumerate(providers):
            at = [s + (i - (len(providers) - 1) / 2) * width for s in range(len(shown))]
            heights = [value.get((shape, provider), 0.0) for shape in shown]
            name = provider if line == 0 else None
            axes.bar(at, heights, width * 0.92, label=name, color=colors.get(provider, _UNKNOWN))
        axes.set_xticks(range(len(shown)), [shape.replace("-", "\n", 1) for shape in shown])
        axes.tick_params("x", labelsize=8)
        axes.set_xlim(-0.6, longest - 0.4)
        axes.spines[["top", "right"]].set_visible(False)
        if percent:
            axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    figure.supylabel(label, fontsize=8)
    panels[0, 0].set_title(title, fontsize=10, loc="left")
    columns = min(len(providers), int(figure.get_figwidth() // 1.3))
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def require_committed(path: Path) -> None:
    """Raise ValueError unless git holds the file just as it is."""
    try:
        git = ("git", "-C", str(path.parent))
        subprocess.run(
            (*git, "ls-files", "--error-unmatch", path.name), check=True, capture_output=True
        )
        subprocess.run(
            (*git, "diff", "--quiet", "HEAD", "--", path.name), check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        raise ValueError(
            f"{path} is not committed as it is; plots are made from committed results."
        ) from None
