"""The table of all that liger-kernel has: ours beside it, from what is committed.

Where its answer is wrong, the line names our test that shows the right one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report
from benchmarks.e2e.readme import NOTHING, put_between, table
from benchmarks.report import Row

BEGIN, END = "<!-- benchmarks catalogue: begin -->", "<!-- benchmarks catalogue: end -->"
OURS, PEER = "liger_fn", "liger"
# Not peers but floors, ours with other settings, and PyTorch before anybody helps it.
_NOT_SHOWN = ("products", "eager")


@dataclass(frozen=True)
class Entry:
    """One thing that liger-kernel has.

    Attributes:
        peer: what it calls it.
        ours: our functions; the first is measured, if a shape is given.
        shape: of the spec's benchmarks the one that is shown.
        different: what a user gets or loses.
        test: of ours, where the peer's answer is wrong: file::name under tests/.
    """

    peer: str
    ours: tuple[str, ...]
    shape: str
    different: str
    test: str = ""


def _entry(peer: str, ours: str, shape: str, different: str, test: str = "") -> Entry:
    return Entry(peer, tuple(ours.split()), shape, different, test)


ENTRIES = (
    _entry("RMSNorm", "rms_norm", "8192x4096",
        "leaves the gradient that comes in as it was; the second derivative is right"),
    _entry("fused add + RMSNorm", "fused_add_rms_norm", "8192x4096", "the same"),
    _entry("modulated RMSNorm", "modulated_rms_norm modulated_layer_norm", "2x4096x3072",
        "gradients of scale and shift without atomics; also of a layer norm"),
    _entry("LayerNorm", "layer_norm", "8192x4096", "weight and bias may be absent; any width"),
    _entry("GroupNorm", "group_norm", "16x320x64x64",
        "exact two-pass statistics: theirs cancel far from zero",
        "test_group_norm.py::test_far_from_zero_nothing_cancels"),
    _entry("PolyNorm", "poly_norm", "8192x4096", "any number of features and any strides"),
    _entry("DyT", "dyt", "8192x4096", "any number of rows"),
    _entry("(gated norms: none)", "gated_rms_norm", "8192x4096", "both orders, groups"),
    _entry("attention residual", "attention_residual", "8x8192x4096",
        "any number of blocks, the depth anywhere; no atomics",
        "test_attention_residual.py::test_no_block_is_left_out"),
    _entry("SwiGLU", "swiglu gated_activation", "8192x14336",
        "writes over no input; packed without a copy; bounds, scales"),
    _entry("GEGLU", "geglu", "8192x14336", "the same; exact erf too"),
    _entry("ReLU²", "relu_squared", "8192x24576", ""),
    _entry("fused MLP", "fused_mlp gated_linear", "llama-3-8b-8192",
        "packed weights, any gate; the activation kept or made again"),
    _entry("tiled MLP", "tiled_mlp", "",
        "any function; one gradient a parameter, right under DDP and FSDP2"),
    _entry("fused MoE", "fused_moe", "qwen3-30b-a3b-4096",
        "any gate, biases, bounds; no tuning at the first call, which takes theirs minutes"),
    _entry("RoPE; Llama 4; multimodal; vision", "rope", "4x2048-32+8-128",
        "one op with layouts; q and k stay as they were; learned angles"),
    _entry("softmax", "softmax", "32768x4096", "any width, a mask, a scale"),
    _entry("sparsemax", "sparsemax", "32768x4096", "any width; no sorting"),
    _entry("multi-token attention", "multi_token_attention", "1x32x1024x1024-3x3-32",
        "any length; padding that lets no query see later ones"),
    _entry("neighborhood attention", "neighborhood_attention", "line-2x16x4096x64-129",
        "no T x T scores; two dimensions, dilation, causal"),
    _entry("mHC", "mhc_post mhc_pre", "8192x4x4096",
        "up to 16 streams; no atomics, no new compilation for a new length"),
    _entry("embedding", "embedding", "16384-of-32000x4096",
        "sums in float32, the same bits twice; theirs adds with atomics"),
    _entry("cross entropy", "cross_entropy", "4096x128256",
        "logits stay as they were; loss in float32; a second derivative"),
    _entry("selective log-softmax", "logprobs", "8192x151936-entropy",
        "entropy, lse, most likely token from the same read; each has a gradient"),
    _entry("fused linear cross entropy",
        "fused_linear_cross_entropy fused_linear_cross_entropy_accumulate", "8192x4096x128256",
        "a frozen body or head costs less, not a gradient; any upstream weight of a row",
        "test_fused_linear_cross_entropy.py::test_only_wanted_gradients_are_computed"),
    _entry("fused linear scaled cross entropy",
        "fused_linear_logprobs fused_linear_selected_logprobs", "8192x4096x151936",
        "log-probabilities, entropy, most likely token; softcap"),
    _entry("vocab-parallel cross entropy",
        "vocab_parallel_cross_entropy fused_linear_vocab_parallel_cross_entropy", "",
        "five numbers of a row travel; also straight from the hidden states; no label smoothing"),
    _entry("KL divergence", "kl_div", "4096x128256", "a divergence per row too"),
    _entry("JSD", "jsd", "4096x128256", "any β with both ends; what underflows is 0, not NaN"),
    _entry("TVD", "tvd", "4096x128256", "ignored rows"),
    _entry("fused linear JSD", "fused_linear_jsd", "8192x2048x128256-teacher-4096",
        "never logits of either head; a hard loss beside it"),
    _entry("fused linear KL, CE + TVD", "fused_linear_kl_div fused_linear_tvd",
        "8192x2048x128256-teacher-4096", "forward and reverse"),
    _entry("fused linear cosine similarity", "fused_linear_cosine",
        "8192x2048x128256-teacher-4096", "ignored rows count in no part of it"),
    _entry("DPO, CPO, SimPO, ORPO",
        "preference.dpo_loss preference.cpo_loss preference.simpo_loss preference.orpo_loss", "",
        "16 kinds of DPO; equal to TRL in float64"),
    _entry("KTO", "preference.kto_loss", "", "one KL for each answer is no sum over all pairs",
        "test_preference.py::test_kto_takes_one_kl_per_answer"),
    _entry("GRPO and its kin", "preference.grpo_loss", "",
        "9 kinds; LUSPO with padding and VESPO with a sampler's ratio by their formulas",
        "test_preference.py::test_luspo_with_padding_by_its_formula"),
    _entry("int8 x int2 product", "", "", "left out: no training step needs it"),
)  # fmt: skip


def committed(results: Path) -> list[Row]:
    """The rows of all ops among the committed results."""
    return [row for path in sorted(results.glob("*/*.csv")) for row in report.read(path)]


def insert(page: Path, rows: Iterable[Row]) -> None:
    """Write the table between the markers of a page."""
    put_between(page, BEGIN, END, section(list(rows)))


def section(rows: Sequence[Row]) -> str:
    """The table, of the device that has the most of it."""
    rows = [row for row in report.latest(rows) if row.dtype == "bfloat16"]
    device = _fullest([row for row in rows if _entry_of(row) is not None])
    if not device:
        return NOTHING
    rows = [row for row in rows if row.device == device]
    shown = [row for row in rows if _entry_of(row) is not None]
    head = ["liger-kernel", "liger_fn", "shape", "forward, ms", "and backward, ms", "different"]
    lines = [head, *(_line(entry, rows) for entry in ENTRIES)]
    return f"{_heading(device, shown)}\n\n{table(lines)}"


def _entry_of(row: Row) -> Entry | None:
    found = (e for e in ENTRIES if e.shape and (e.ours[0], e.shape) == (row.op, row.shape))
    return next(found, None) if row.mode in ("fwd", "full") else None


def _fullest(rows: Sequence[Row]) -> str:
    ours = {}
    for row in rows:
        if row.provider == OURS:
            ours.setdefault(row.device, set()).add((row.op, row.mode))
    return max(ours, key=lambda device: len(ours[device]), default="")


def _heading(device: str, rows: Sequence[Row]) -> str:
    def all_of(name: str) -> str:
        return ", ".join(sorted({getattr(row, name) for row in rows if getattr(row, name)}))

    return (
        f"{device}, bfloat16; torch {all_of('torch')}, triton {all_of('triton')};"
        f" commit {all_of('commit')}:"
    )


def _line(entry: Entry, rows: Sequence[Row]) -> list[str]:
    functions = ", ".join(f"`{name}`" for name in entry.ours)
    different = entry.different
    if entry.test:
        different += f" (`{entry.test.split('::')[1]}`)"
    times = [_times(entry, rows, mode) for mode in ("fwd", "full")]
    return [entry.peer, functions or "-", entry.shape or "-", *times, different]


def _times(entry: Entry, rows: Sequence[Row], mode: str) -> str:
    """Our time and share of the floor, then liger's, then that of the best of the others."""
    if not entry.shape:
        return "-"
    here = [r for r in rows if (r.op, r.shape, r.mode) == (entry.ours[0], entry.shape, mode)]
    by_name = {r.provider: r for r in here}
    if OURS not in by_name:
        return "not measured"
    others = [r for r in here if not r.provider.startswith(PEER) and r.provider not in _NOT_SHOWN]
    told = [_told(by_name[OURS])]
    peers = [r for r in here if r.provider.startswith(PEER) and not r.provider.startswith(OURS)]
    if peers:
        peer = report.best(peers, "ms") or peers[0]
        told.append(f"{peer.provider} {_told(peer, share=False)}")
    if (fastest := report.best(others, "ms")) is not None:
        told.append(f"{fastest.provider} {_told(fastest, share=False)}")
    return "; ".join(told)


def _told(row: Row, share: bool = True) -> str:
    if row.status != "ok" or row.ms is None:
        return row.status
    out = f"{row.ms:.4g}"
    return f"**{out}** ({row.floor:.0%})" if share and row.floor else out
