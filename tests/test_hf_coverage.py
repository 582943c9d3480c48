"""Every causal and image-text architecture of transformers, small, with every op in it that fits.

Loss and all gradients must be those of the untouched model, and undoing must leave it untouched.
The counts may not fall below those of the README, where they were measured on the newest version of
transformers that is not newer than this one.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

from liger_fn.__main__ import main
from liger_fn.hf import apply
from liger_fn.hf.output_head import FUSED
from liger_fn.testing import architectures, tiny_models
from liger_fn.testing.architectures import OPS, counts, difference, markdown, row_name, try_all

README = Path(__file__).parent.parent / "README.md"


def floor_of(task: str) -> dict[str, int]:
    """The README's row for a task: how many architectures run, and get which op."""
    name = re.escape(row_name(task).split(", ")[1])
    rows = re.findall(rf"^\| ([\d.]+), {name} \| (.*) \|$", README.read_text("utf-8"), re.MULTILINE)
    here = Version(transformers.__version__)
    known = {Version(version): cells for version, cells in rows if Version(version) <= here}
    numbers = [int(cell.split()[0]) for cell in known[max(known)].split(" | ")]
    return dict(zip(("run", *OPS), numbers, strict=True))


@pytest.mark.parametrize("task", list(tiny_models.MAPPINGS))
def test_every_architecture_is_equal_with_all_ops(task: str, capsys) -> None:
    types = [t for t in tiny_models.model_types(task) if t not in tiny_models.NOT_TRAINABLE]
    outcomes = try_all(task, types)
    with capsys.disabled():
        print("\n" + markdown({task: outcomes}))
    assert not [(o.model_type, o.wrong) for o in outcomes if o.wrong]
    found = counts(outcomes)
    short = {name: least for name, least in floor_of(task).items() if found[name] < least}
    assert not short, {o.model_type: o.skipped for o in outcomes if o.skipped}


def test_the_readme_has_the_head_of_the_table():
    assert markdown({}) in README.read_text("utf-8")


# `python -m liger_fn models`


def used(cells: list[str]) -> set[str]:
    """The ops whose cells are not empty."""
    return {op for op, cell in zip(OPS, cells, strict=True) if cell not in ("-", "0")}


def test_models_says_what_is_replaced_and_why_not_the_rest(capsys):
    assert main(["models", "causal-lm", "--only", "llama", "gpt2", "gemma3n"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"causal-lm, transformers {transformers.__version__}"
    words = {line.split()[0]: line.split()[1 : 1 + len(OPS)] for line in lines if line}
    assert used(words["llama"]) == {FUSED, "rms_norm", "rope", "swiglu"}
    assert used(words["gpt2"]) == {FUSED, "layer_norm"}
    assert "GPT2MLP has parameters outside its linear layers" in "\n".join(lines)
    assert lines[-1].startswith(f"| {row_name('causal-lm')} | ")


def test_models_tries_both_tasks_and_prints_the_table_of_the_readme(capsys):
    assert main(["models", "--markdown", "--only", "gemma3"]) == 0
    *_, causal, image = capsys.readouterr().out.splitlines()
    for row, task in ((causal, "causal-lm"), (image, "image-text-to-text")):
        name, ran, *counted = row.strip("| ").split(" | ")
        assert (name, ran) == (row_name(task), "1 of 1")
        assert used(counted) == {FUSED, "rms_norm", "rope", "geglu"}


def test_models_that_cannot_be_run_say_why(capsys):
    assert main(["models", "image-text-to-text", "--only", "udop"]) == 0
    text = capsys.readouterr().out
    assert "cannot be run here: ValueError: Bbox is required" in text
    assert f"| 0 of 1{' | 0' * len(OPS)} |" in text


def test_models_that_are_not_equal_are_wrong(capsys, monkeypatch):
    def wrong(gate, up, weight, bias):
        return torch.nn.functional.linear(gate * up, weight, bias)

    monkeypatch.setattr(architectures.functional, "gated_linear", wrong)
    assert main(["models", "causal-lm", "--only", "llama"]) == 0
    assert "LlamaMLP is not swiglu or geglu" in capsys.readouterr().out

    def apply_and_spoil(model):
        report = apply(model)
        model.lm_head.weight.data.mul_(2)
        return report

    monkeypatch.setattr(architectures, "apply", apply_and_spoil)
    assert main(["models", "causal-lm", "--only", "llama"]) == 1
    text = capsys.readouterr().out
    assert re.search(r"WRONG: loss \S+ instead of \S+ not undone", text)
    assert "| 0 of 1 |" in text


def test_differences_in_gradients_are_told():
    model = tiny_models.tiny_model("llama")
    loss, gradients = tiny_models.loss_and_gradients(model, tiny_models.tiny_inputs(model))
    name = "model.norm.weight"
    fewer = {key: value for key, value in gradients.items() if key != name}
    assert difference((loss, fewer), (loss, gradients)) == f"gradients of {[name]}"
    doubled = {**gradients, name: 2 * gradients[name]}
    assert f"gradient of {name}: off by" in difference((loss, doubled), (loss, gradients))
    assert not difference((loss, gradients), (loss, gradients))


def test_models_refuses_what_it_does_not_know(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["models", "--only", "lama"])
    assert "`--only` must name model types of the task; got 'lama'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["models", "causal"])
    refusal = capsys.readouterr().err
    assert all(task in refusal for task in tiny_models.MAPPINGS)
