"""The losses of a run over real text, by the loop of `python -m liger_fn train`."""

import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.e2e.providers import Provider
from benchmarks.e2e.trainee import Task, Tell, make_model
from liger_fn.training import text
from liger_fn.training.loop import Run, Settings, train

RATE = 1e-3
BYTE_PAIRS = 8192


def write_tokens(path: Path, files: list[Path], byte_pairs: int, seq: int) -> int:
    """Turn files of text into a file of tokens; return how many different ones there are."""
    documents = text.read(files)
    tokenizer = (
        text.byte_pair_tokenizer(documents, byte_pairs) if byte_pairs else text.byte_tokenizer()
    )
    torch.save(text.split(text.encode(tokenizer, documents), seq), path)
    return len(tokenizer)


def measure_curve(task: Task, provider: Provider, tell: Tell) -> dict[str, Any]:
    """Train on the text; every step's loss."""
    tokens, held_out = torch.load(task.text)
    tell(doing="model")
    model = make_model(task)
    if task.nudge:
        nudge(model)
    replaced = provider.patch(model)
    settings = Settings(
        steps=task.steps,
        batch=task.batch,
        seq=task.seq,
        lr=RATE,
        seed=task.seed,
        device=torch.device(task.device),
        dtype=task.dtype,
        compile=provider.compiled,
    )
    run = Run(provider.name)
    tell(doing="train", replaced=str(replaced or ""), version=provider.version)
    train(run, model, tokens, held_out, settings)
    return {
        "losses": run.losses,
        "steps": len(run.losses),
        "tokens_per_s": run.tokens_per_second,
        "held_out": run.held_out[1],
    }


@torch.no_grad()
def nudge(model: Any) -> None:
    """Move one weight, the last of the last matrix, by one unit in its last place."""
    last = [p for p in model.parameters() if p.dim() == 2][-1]
    last[-1, -1] = torch.nextafter(last[-1, -1], last.new_tensor(math.inf))
