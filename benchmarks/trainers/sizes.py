"""What is trained, and how: small for a CPU, and Qwen3-0.6B's shape for a GPU."""

from dataclasses import dataclass
from typing import Any

TRAINERS = ("SFT", "DPO", "GRPO")


@dataclass(frozen=True)
class Size:
    """One size of everything.

    Attributes:
        model: what Qwen3Config is given.
        prompt, answer: their words. SFT trains on whole texts, as long as both together.
        batch: texts a step; of DPO pairs, of GRPO answers.
        question, generations, written: of GRPO the words of a prompt, the number of answers to
            each, and the words of one, at most.
    """

    model: dict[str, Any]
    prompt: int
    answer: int
    batch: dict[str, int]
    question: int
    generations: int
    written: int


@dataclass(frozen=True)
class Task:
    """What one process does; everything that a provider must have in common with the others."""

    trainer: str
    provider: str
    size: str
    device: str
    steps: int
    warm_up: int
    seed: int = 0


SIZES = {
    "tiny": Size(
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 512,
        },
        prompt=16,
        answer=32,
        batch={"SFT": 4, "DPO": 4, "GRPO": 8},
        question=16,
        generations=4,
        written=16,
    ),
    "real": Size(
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
        },
        prompt=512,
        answer=1536,
        batch={"SFT": 4, "DPO": 2, "GRPO": 64},
        question=64,
        generations=8,
        written=64,
    ),
}


def options(trainer: str, size: Size) -> dict[str, Any]:
    """What the configuration of a trainer is given besides TRL's defaults."""
    out: dict[str, Any] = {"per_device_train_batch_size": size.batch[trainer]}
    if trainer != "GRPO":
        return out | {"max_length": size.prompt + size.answer}
    # Each generation is learnt from four times, as where generation is dear; so most of the steps,
    # and their median, contain none.
    return out | {
        "num_generations": size.generations,
        "max_completion_length": size.written,
        "num_iterations": 4,
    }


def tokens_a_step(trainer: str, size: Size) -> int:
    """The tokens that one step reads, if no text ends early."""
    rows = size.batch[trainer]
    if trainer == "GRPO":
        return rows * (size.question + size.written)
    return rows * (size.prompt + size.answer) * (2 if trainer == "DPO" else 1)
