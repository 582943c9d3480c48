"""What whole models showed: rows, verdicts on their losses, and tables of them."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.e2e.providers import COMPILE, REFERENCE
from benchmarks.report import columns


@dataclass(frozen=True)
class Row:
    """One provider with one model. Providers that were measured several times have several.

    Attributes:
        mode: "e2e" are training steps, "lengths" the search for the longest sequence.
        variant: "checkpointing", "lora", both, or neither.
        status: "ok", "out of memory", "timed out", "crashed", "failed", or "cannot".
        tokens_per_s, step_ms: by the median of the steps after the warm-up.
        spread: the distance between the quartiles of the steps over their median.
        peak_mib: the most that is allocated during these steps, the model's weights included.
        longest: the longest sequence that fits, a multiple of 1024 tokens.
        loss_first, loss_last: before the first step and before the last of `steps`.
        gradient_norm: of all gradients of the first step.
        verdict: whether loss and gradient agree with the reference's.
        first_step_s: the first forward and backward pass, which compiles.
        patch_s: how long the provider took to change the model.
        graph: of a compiled model, whether it is one graph.
        replaced: what the provider says that it replaced.
        note: in words, why there is no number, or what to know about it.
        date: of the run's begin, to the second; it tells runs apart.
    """

    mode: str
    shape: str
    variant: str
    dtype: str
    batch: int | None
    seq: int | None
    provider: str
    status: str
    tokens_per_s: float | None = None
    step_ms: float | None = None
    spread: float | None = None
    peak_mib: float | None = None
    longest: float | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    gradient_norm: float | None = None
    verdict: str = ""
    steps: int | None = None
    first_step_s: float | None = None
    patch_s: float | None = None
    parameters: int | None = None
    graph: str = ""
    replaced: str = ""
    note: str = ""
    version: str = ""
    device: str = ""
    torch: str = ""
    triton: str = ""
    transformers: str = ""
    commit: str = ""
    date: str = ""


@dataclass(frozen=True)
class Quantity:
    """A number of a row that is shown.

    Attributes:
        name: of the attribute of a row.
        title: what it is, with its unit.
        unit: the same in a sentence, after the number.
        scale: how many units of the row make one that is shown.
        decimals: how many are shown.
        more_is_better: whether more or less of it is; None where it is no contest.
        mode: of the rows that have it.
    """

    name: str
    title: str
    unit: str
    scale: float
    decimals: int
    more_is_better: bool | None
    mode: str = "e2e"

    def write(self, value: float) -> str:
        return f"{value:,.{self.decimals}f}"


SPEED = Quantity("tokens_per_s", "tokens/s", "tokens/s", 1, 0, True)
MEMORY = Quantity("peak_mib", "peak memory, GiB", "GiB", 1024, 1, False)
COMPILING = Quantity("first_step_s", "first step, s", "s", 1, 1, None)
LONGEST = Quantity("longest", "longest sequence, tokens", "tokens", 1, 0, True, "lengths")
QUANTITIES = (SPEED, MEMORY, COMPILING, LONGEST)

AGREES, DIFFERS = "agrees", "differs"

# Two models that compute the same differ by the roundings of each token's loss, 2^-8 of it in
# bfloat16, and their mean by less. A gradient has gone through every layer twice, and a last loss
# through every step; each is allowed four roundings.
_ROUNDING = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2**-20}
_ALLOWED = {"loss_first": 1, "gradient_norm": 4, "loss_last": 4}


def verdict(row: Row, reference: Row | None) -> str:
    """Say whether a row's losses and gradient are the reference's, up to rounding."""
    if row.provider == REFERENCE:
        return "the reference"
    if reference is None or reference.status != "ok":
        return f"not judged: no row of {REFERENCE}"
    for name, roundings in _ALLOWED.items():
        got, want = getattr(row, name), getattr(reference, name)
        # A comparison with NaN is false: a loss that is NaN does not agree.
        if not abs(got - want) <= roundings * _ROUNDING[row.dtype] * abs(want):
            return f"{DIFFERS}: {name} is {got:.6g}, the reference's {want:.6g}"
    return AGREES


def is_right(row: Row) -> bool:
    return row.status == "ok" and not row.verdict.startswith(DIFFERS)


def number(row: Row, quantity: Quantity) -> float | None:
    """The number of a row that may be shown; a search that was cut off has found some length."""
    value = getattr(row, quantity.name)
    if quantity.mode != row.mode or value is None:
        return None
    if is_right(row) or (quantity is LONGEST and value):
        return value / quantity.scale
    return None


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of rows about the same thing those of the last run, in the order in which each came first."""
    groups: dict[tuple, list[Row]] = {}
    for r in rows:
        key = (r.device, r.mode, r.shape, r.variant, r.dtype, r.batch, r.seq, r.provider)
        group = groups.setdefault(key, [])
        if group and group[-1].date != r.date:
            group.clear()
        group.append(r)
    return [row for group in groups.values() for row in group]


def label(row: Row) -> str:
    """A model with its batch, where that is its own and not what is searched for."""
    size = f" {row.batch:.0f}x{row.seq:.0f}" if row.mode != "lengths" else ""
    return row.shape + size + (f", {row.variant}" if row.variant else "")


Values = dict[tuple[str, str], float]


def values(rows: Sequence[Row], quantity: Quantity) -> Values:
    """The median of what may be shown, by label and provider."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        value = number(row, quantity)
        if value is not None:
            found.setdefault((label(row), row.provider), []).append(value)
    return {key: statistics.median(numbers) for key, numbers in found.items()}


def grid(rows: Sequence[Row], quantity: Quantity) -> list[list[str]]:
    """Models x providers, each number with its ratio to the reference's; the best has a star."""
    rows = [r for r in rows if r.mode == quantity.mode]
    known = values(rows, quantity)
    if not known:
        return []
    state = {(label(r), r.provider): "differs" if r.status == "ok" else r.status for r in rows}
    providers = list(dict.fromkeys(r.provider for r in rows))
    lines = [[quantity.title, *providers]]
    for name in dict.fromkeys(label(r) for r in rows):
        first = _best(known, name, quantity)
        cells = [_cell(known, state, name, p, quantity) + "*" * (p == first) for p in providers]
        lines.append([name, *cells])
    return lines


def _cell(known: Values, state: dict, name: str, provider: str, quantity: Quantity) -> str:
    if (name, provider) not in known:
        return state.get((name, provider), "-")
    number = quantity.write(known[name, provider])
    return f"{number} {_ratio(known, name, provider, quantity)}".rstrip()


def _ratio(known: Values, name: str, provider: str, quantity: Quantity) -> str:
    """A number over the reference's; the empty string where that says nothing."""
    reference = known.get((name, REFERENCE))
    if provider == REFERENCE or not reference or quantity.more_is_better is None:
        return ""
    return f"({known[name, provider] / reference:.2f}x)"


def _best(known: Values, name: str, quantity: Quantity) -> str | None:
    of_name = {provider: value for (shape, provider), value in known.items() if shape == name}
    if len(of_name) < 2 or quantity.more_is_better is None:
        return None
    return (max if quantity.more_is_better else min)(of_name, key=of_name.__getitem__)


def tables(rows: Sequence[Row], bold: bool = False) -> str:
    """All tables of some rows, for a terminal."""
    grids = [grid(rows, quantity) for quantity in QUANTITIES]
    return "\n\n".join(columns(lines, bold) for lines in grids if lines)


# Steps of one batch do the same work; the quartiles of a machine that does nothing else are closer.
_STEADY = 0.1


def remarks(rows: Iterable[Row]) -> list[str]:
    """Say what a table cannot: what failed and how, what differs, what is not one graph."""
    lines = []
    for r in rows:
        who = f"{r.provider}, {label(r)}"
        if r.status != "ok":
            lines.append(f"{r.status}: {who}: {r.note}")
        elif r.verdict.startswith((DIFFERS, "not judged")):
            lines.append(f"{who}: {r.verdict}")
        if r.spread is not None and r.spread > _STEADY:
            lines.append(
                f"{who}: its steps vary by {r.spread:.0%}; measure again on an idle machine"
            )
        if r.status == "ok" and r.note:
            lines.append(f"{who}: {r.note}")
    return list(dict.fromkeys(lines))


# What is no reason to choose.
_CLOSE = 0.03

COMPILED = f"{REFERENCE}{COMPILE}"


def advice(rows: Sequence[Row]) -> list[str]:
    """What the rows say to somebody who chooses, model by model, and of `torch.compile` alone."""
    speed, memory = values(rows, SPEED), values(rows, MEMORY)
    names = list(dict.fromkeys(label(r) for r in rows if r.mode == "e2e"))
    lines = []
    for name in names:
        said = [_first("fastest", speed, name, SPEED), _first("least memory", memory, name, MEMORY)]
        if any(said):
            lines.append(f"{name}: {'; '.join(filter(None, said))}.")
    if any(provider == COMPILED for _, provider in speed):
        enough = [n for n in names if _is_close(speed, n, SPEED) and _is_close(memory, n, MEMORY)]
        where = f"for {', '.join(enough)}" if enough else "for none of these models"
        lines.append(
            f"`torch.compile` alone comes within {_CLOSE:.0%} of the best in both speed and memory"
            f" {where}."
        )
    return lines


def _first(word: str, known: Values, name: str, quantity: Quantity) -> str:
    provider = _best(known, name, quantity)
    if provider is None:
        return ""
    number = f"{quantity.write(known[name, provider])} {quantity.unit}"
    return f"{word} {provider}, {number} {_ratio(known, name, provider, quantity)}".rstrip()


def _is_close(known: Values, name: str, quantity: Quantity) -> bool:
    """Say whether the compiled reference is nearly the best."""
    if (name, COMPILED) not in known:
        return False
    best = known[name, _best(known, name, quantity) or COMPILED]
    return abs(known[name, COMPILED] - best) <= _CLOSE * best


@dataclass(frozen=True)
class Curve:
    """The losses of one run over real text.

    Attributes:
        run: the provider, or the reference with one weight nudged.
        losses: one for each step, separated by spaces.
        held_out: the mean loss on text that was not trained on, after the last step.
    """

    shape: str
    dtype: str
    run: str
    status: str
    steps: int | None = None
    held_out: float | None = None
    tokens_per_s: float | None = None
    losses: str = ""
    replaced: str = ""
    note: str = ""
    version: str = ""
    device: str = ""
    torch: str = ""
    triton: str = ""
    transformers: str = ""
    commit: str = ""
    date: str = ""

    def values(self) -> list[float]:
        return [float(x) for x in self.losses.split()]


NUDGED = f"{REFERENCE}, nudged"

# Each of the two differences that are compared is one draw of what rounding does.
DRAWS = 2


def distance(a: Curve, b: Curve) -> float:
    """The largest difference between two runs at any step; NaN if either has a NaN."""
    gaps = [abs(x - y) for x, y in zip(a.values(), b.values(), strict=True)]
    return math.nan if any(map(math.isnan, gaps)) else max(gaps, default=math.nan)


def by_run(curves: Iterable[Curve]) -> dict[tuple[str, str], dict[str, Curve]]:
    """The last curve of each run that came to its end, by shape and dtype."""
    groups: dict[tuple[str, str], dict[str, Curve]] = {}
    for curve in curves:
        if curve.status == "ok":
            groups.setdefault((curve.shape, curve.dtype), {})[curve.run] = curve
    return groups


def spreads(curves: Iterable[Curve]) -> dict[str, float]:
    """How far two unpatched bfloat16 runs are apart that differ in one weight's last bit."""
    return {
        shape: distance(runs[REFERENCE], runs[NUDGED])
        for (shape, dtype), runs in by_run(curves).items()
        if dtype == "bfloat16" and {REFERENCE, NUDGED} <= runs.keys()
    }


def curve_grid(curves: Sequence[Curve]) -> list[list[str]]:
    """Each run's largest distance from the reference, and that over the spread of its model."""
    yardstick = spreads(curves)
    lines = [["losses", "run", "last loss", "held out", "distance", "over bf16 spread", "verdict"]]
    for (shape, dtype), runs in by_run(curves).items():
        for name, curve in runs.items():
            line = [f"{shape} {dtype}", name, f"{curve.values()[-1]:.4f}", f"{curve.held_out:.4f}"]
            if name == REFERENCE or REFERENCE not in runs:
                lines.append([*line, "-", "-", ""])
                continue
            gap = distance(runs[REFERENCE], curve)
            spread = yardstick.get(shape)
            ratio = gap / spread if spread else math.nan
            word = "within" if ratio <= DRAWS else "beyond" if spread else "no spread"
            lines.append([*line, f"{gap:.1e}", f"{ratio:.2g}", "" if name == NUDGED else word])
    return lines


def curve_remarks(curves: Iterable[Curve]) -> list[str]:
    return [
        f"{c.status}: {c.run}, {c.shape} {c.dtype}: {c.note}" for c in curves if c.status != "ok"
    ]
