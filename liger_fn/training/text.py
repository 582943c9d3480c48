"""Text for training: files to documents, documents to tokens, tokens to batches."""

from __future__ import annotations

import itertools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from liger_fn.training.options import BadInput

END = "<|end|>"
# Third-party packages and test data live under the standard library's directory on some systems
# and not on others; without them every machine with the same Python has the same text.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
HELD_OUT = 20


def standard_library() -> list[Path]:
    """List the modules of this Python's standard library, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [f for f in sorted(root.rglob("*.py")) if not SKIPPED & set(f.relative_to(root).parts)]


def files_under(paths: list[Path]) -> list[Path]:
    """List the given files, and the visible text files under the given directories, sorted."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise BadInput(
                f"train: `--text` must name files or directories that exist; got {path}."
            )
        found += (
            [path] if path.is_file() else [f for f in sorted(path.rglob("*")) if visible(f, path)]
        )
    return found


def visible(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return not hidden and file.is_file() and not is_binary(file)


def is_binary(file: Path) -> bool:
    with file.open("rb") as stream:
        return b"\0" in stream.read(1024)


def read(files: list[Path]) -> list[str]:
    """Read every file as UTF-8; what is not becomes U+FFFD."""
    return [f.read_bytes().decode("utf-8", errors="replace") for f in files]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per byte and one for the end of a document."""
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    return for_transformers(byte_level(models.BPE(vocab={**alphabet, END: 256}, merges=[])))


def byte_pair_tokenizer(documents: list[str], size: int) -> PreTrainedTokenizerFast:
    """Learn at most `size` byte-pair tokens from `documents`; a small text yields fewer."""
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return for_transformers(tokenizer)


def byte_level(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def for_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, clean_up_tokenization_spaces=False
    )


def encode(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> torch.Tensor:
    """Turn documents into one row of tokens (int64), each document closed by the end token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([*itertools.chain.from_iterable(row + end for row in rows)])


def split(tokens: torch.Tensor, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split tokens into those to train on and the last twentieth, which is held out."""
    if tokens.numel() < HELD_OUT * seq:
        raise BadInput(
            f"train: the text must have at least {HELD_OUT * seq} tokens for `--seq {seq}`;"
            f" got {tokens.numel()}."
        )
    kept = tokens.numel() - tokens.numel() // HELD_OUT
    return tokens[:kept], tokens[kept:]


def random_batches(tokens: torch.Tensor, batch: int, seq: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield (batch, seq) windows at random places, without end; the seed decides them all."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(seq)
    while True:
        starts = torch.randint(tokens.numel() - seq + 1, (batch, 1), generator=generator)
        yield tokens[starts + offsets]


def first_batches(tokens: torch.Tensor, batch: int, seq: int, count: int) -> Iterator[torch.Tensor]:
    """Yield up to `count` batches of the first whole windows, in order."""
    windows = tokens[: tokens.numel() // seq * seq].view(-1, seq)
    yield from windows[: batch * count].split(batch)
