"""What `python -m liger_fn train` can be asked for, and what it does where nothing is said."""

from __future__ import annotations

import argparse
from pathlib import Path

DTYPES = ("float32", "bfloat16", "mixed")
PROVIDERS = ("unpatched", "patched")

DESCRIPTION = """\
Train a Hugging Face causal language model on real text, from the same seed and on the same batches:
once as it is and once with liger_fn applied. Print both loss curves, tokens per second and peak
memory in one table; save them with a plot; save the trained model, load it through
AutoLigerKernelForCausalLM and let it write.

Without options the text is the source of this Python's standard library, and the model a Llama that
suits the device. On a CPU: 0.8 M parameters over single bytes in float32, about a minute per run;
the reference path runs there, so expect equal losses and no gain. On a GPU: 110 M parameters in
bfloat16. A vocabulary of bytes would leave the fused loss nothing to save, so 32768 byte pairs are
learned from the text first, with the `tokenizers` package; nothing is downloaded.
"""

EPILOG = """\
examples:
  python -m liger_fn train
  python -m liger_fn train --text notes.txt ~/books --steps 1000 --out books
  python -m liger_fn train --config Llama-3.2-1B/ --text ~/code --batch 4 --seq 2048
  python -m liger_fn train --config tiny.json --vocab 4096 --dtype mixed --compile

A directory given as --config that holds weights is trained on from them; with a tokenizer, that
tokenizer is used. Exit status: 0; 1 if the losses differ by more than --tolerance; 2 for bad input.

Long runs and high learning rates amplify rounding: two runs of one unpatched model whose weights
differ in the last bit alone then drift apart too. A large difference in the first steps is an
error; one that grows from nothing is not.
"""


class BadInput(ValueError):
    """What the user gave cannot be used; the message is one sentence for the terminal."""


def parser() -> argparse.ArgumentParser:
    """Build the command line of `python -m liger_fn train`."""
    p = argparse.ArgumentParser(
        prog="python -m liger_fn train",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = p.add_argument_group("what to train")
    what.add_argument("--text", nargs="+", type=Path, metavar="PATH", help="files or directories")
    what.add_argument("--config", type=Path, help="Hugging Face config.json or model directory")
    what.add_argument("--vocab", metavar="bytes|SIZE", help="single bytes, or SIZE byte pairs")
    what.add_argument(
        "--providers",
        default=",".join(PROVIDERS),
        help="runs to make, in order; the first is what the others are compared with (%(default)s)",
    )

    how = p.add_argument_group("how")
    how.add_argument(
        "--steps", type=positive, metavar="N", help="optimizer steps (CPU 300, GPU 200)"
    )
    how.add_argument("--batch", type=positive, metavar="N", help="windows per step (16)")
    how.add_argument(
        "--seq", type=positive, metavar="N", help="tokens per window (CPU 128, GPU 1024)"
    )
    how.add_argument(
        "--lr",
        type=positive_real,
        metavar="X",
        help="peak learning rate of AdamW (CPU 2e-3, GPU 6e-4)",
    )
    how.add_argument("--seed", type=int, default=0, metavar="N", help="weights and batches (0)")
    how.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ... (auto: cuda if it works)"
    )
    how.add_argument(
        "--dtype",
        choices=DTYPES,
        help="mixed: float32 weights under bfloat16 autocast (CPU float32, GPU bfloat16)",
    )
    how.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="threads on a CPU (built-in model: 1, which it uses best; otherwise as torch chooses)",
    )
    how.add_argument("--compile", action="store_true", help="torch.compile every run's model")

    out = p.add_argument_group("what to keep")
    out.add_argument(
        "--out", type=Path, default=Path("liger_fn-train"), help="directory (%(default)s)"
    )
    out.add_argument(
        "--prompt",
        default="def __init__(self",
        help="what the trained model goes on from (%(default)r)",
    )
    out.add_argument("--no-plot", action="store_true", help="make no loss.png")
    out.add_argument(
        "--tolerance",
        type=positive_real,
        metavar="X",
        help="largest difference of the losses that still counts as agreement",
    )
    return p


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1; got {text!r}")
    return int(text)


def positive_real(text: str) -> float:
    """Read a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0; got {text!r}")
    return value


def providers(text: str) -> list[str]:
    """Read the comma-separated runs to make."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in PROVIDERS]
    if unknown or not names or len(set(names)) < len(names):
        raise BadInput(
            f"train: `--providers` must name some of {', '.join(PROVIDERS)}, each once;"
            f" got {text!r}."
        )
    return names
