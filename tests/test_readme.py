"""What the README shows runs, from the top to the bottom, as it is printed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch

import liger_fn.hf
import liger_fn.nn
from liger_fn import functional
from liger_fn.hf.names import ClassReport
from liger_fn.testing.tiny_models import HIDDEN, VOCAB, tiny_model

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def for_trl(folder: Path) -> dict:
    from datasets import Dataset
    from trl import DPOConfig

    from benchmarks.trainers.training import tokenizer

    pair = {"prompt": "w3 w4", "chosen": " w5", "rejected": " w6"}
    return {
        "settings": DPOConfig(str(folder), use_cpu=True, bf16=False, report_to=[]),
        "pairs": Dataset.from_list([pair]),
        "tokenizer": tokenizer(VOCAB),
    }


def test_every_example_runs(tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path)
    hidden, target = torch.randn(6, HIDDEN), torch.randint(VOCAB, (6,))
    weight, scale, batch = torch.randn(VOCAB, HIDDEN), torch.ones(HIDDEN), torch.randn(3, 6, HIDDEN)
    names = {"hidden": hidden, "target": target, "weight": weight, "x": hidden, "y": target}
    names |= {"scale": scale, "batch": batch}
    examples = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len(examples) == 6
    if all(map(importlib.util.find_spec, ("trl", "datasets"))):
        names |= for_trl(tmp_path)
    else:
        examples = [example for example in examples if "hf.trl" not in example]
    try:
        for example in examples:
            exec(example.replace("meta-llama/Llama-3.2-1B", str(tmp_path)), names)
    finally:
        for report in list(ClassReport.installed.values()):
            report.undo()
    assert "fused_linear_cross_entropy" in capsys.readouterr().out
    assert names["per_sample"].shape == (3, HIDDEN)
    assert names["loss"].isfinite()


def test_what_takes_the_place_of_liger_kernel_s_names_is_there():
    section = README.split("## Coming from liger_kernel")[1].split("## ")[0]
    rows = re.findall(r"^\| .* \| (.*) \|$", section, re.MULTILINE)
    named = re.findall(r"`(\w+)\(|`(AutoLiger\w+|[A-Z]\w+Loss)`", "\n".join(rows))
    found = {name for pair in named for name in pair if name}
    assert {"apply", "rms_norm", "rope", "SwiGLUMLP", "AutoLigerKernelForImageTextToText"} <= found
    doors = (liger_fn.hf, liger_fn.nn, functional)
    theirs = {"Trainer"}
    assert not [n for n in found - theirs if not any(hasattr(door, n) for door in doors)]
