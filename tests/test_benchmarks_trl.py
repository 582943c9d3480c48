"""TRL's trainers side by side, on a tiny model."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import rows as files
from benchmarks.trainers import cli, report
from benchmarks.trainers.providers import OURS, PROVIDERS, REFERENCE, missing
from benchmarks.trainers.report import Row
from benchmarks.trainers.sizes import SIZES, Task, options, tokens_a_step
from benchmarks.trainers.training import measure, share_of_even, texts


def run(*arguments) -> int:
    return benchmarks.main(["--mode", "trl", *map(str, arguments), "--commit", "abc"])


def row(provider=REFERENCE, losses="5 4 3", **facts) -> Row:
    fixed = {"trainer": "SFT", "size": "tiny", "precision": "float32", "status": "ok"}
    fixed |= {"step_ms": 10.0, "slowest_ms": 20.0, "tokens_per_s": 100.0, "peak_mib": 2048.0}
    fixed |= {"entropies": "6 6 6", "device": "a chip", "verdict": "agrees", "loss_gap": 0.0}
    return Row(provider=provider, losses=losses, **{**fixed, **facts})


def test_a_whole_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl", reason="trl is not installed")
    # Workers compute by the references: who is measured how is in question, not the kernels.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path = tmp_path / "rows.csv"
    arguments = ("--trainers", "DPO", "--steps", 2, "--warm-up", 1, "--device", "cpu")
    assert run(*arguments, "--csv", path) == 0
    theirs, ours = files.read(path, Row)
    assert (theirs.provider, ours.provider) == ("trl", "liger_fn")
    assert (theirs.verdict, ours.verdict) == ("the reference", "agrees")
    assert "fused_linear_cross_entropy 1" in ours.replaced
    assert len(report.numbers(ours.losses)) == 3
    assert 0 <= ours.loss_gap < 1e-5
    assert ours.slowest_ms >= ours.step_ms
    assert ours.peak_mib is None
    assert ours.commit == "abc"
    assert "DPO tiny  liger_fn" in capsys.readouterr().out


@pytest.mark.usefixtures("reference_path")
@pytest.mark.parametrize("trainer", ["SFT", "GRPO"])
def test_one_process(tmp_path, monkeypatch, trainer):
    pytest.importorskip("trl", reason="trl is not installed")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    told, facts = {}, []
    for name in (REFERENCE, "liger_fn"):
        task = Task(trainer, name, "tiny", "cpu", steps=2, warm_up=1)
        facts.append(measure(task, PROVIDERS[name], lambda **more: told.update(more)))
    theirs, ours = facts
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5)
    assert ours["entropies"] == pytest.approx(theirs["entropies"], abs=1e-5)
    assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)
    assert ours["tokens_per_s"] == pytest.approx(
        tokens_a_step(trainer, SIZES["tiny"]) / ours["step_ms"] * 1e3
    )
    assert told["doing"] == "step 3"
    assert told["version"].startswith("trl ")


def test_verdicts():
    first = row()
    assert report.judged(first, None) == (0.0, "the reference")
    assert report.judged(row("a", "5 4 3.00001"), first) == (pytest.approx(1e-5), "agrees")
    assert report.judged(row("a", entropies=""), first) == (0.0, "agrees")
    for losses in ("5 4 3.1", "5 4 nan"):
        assert report.judged(row("a", losses), first)[1].startswith("differs: losses, by ")
    assert report.judged(row("a", entropies="6 6 7"), first) == (0.0, "differs: entropies, by 1")
    assert report.judged(row("a"), row(status="failed")) == (None, "not judged: no row of trl")
    assert report.judged(row("a", status="crashed"), first) == (None, "")
    # Rounding is as large as the precision says.
    ours, theirs = row("a", "5 4 3.02", precision="bfloat16"), row(precision="bfloat16")
    assert report.judged(ours, theirs)[1] == "agrees"
    # Or as large as it shows in a second run of TRL's own.
    drawn = row("trl-nudged", "5 4 3.1", precision="bfloat16")
    assert report.judged(drawn, theirs) == (pytest.approx(0.1), "the yardstick")
    for losses, word in (("5 4 3.15", "agrees"), ("5 4 3.5", "differs: losses, by 0.5")):
        ours = row("a", losses, precision="bfloat16")
        assert report.judged(ours, theirs, drawn)[1] == word
        assert report.judged(ours, theirs)[1].startswith("differs")
    # Other answers have other losses, but not other entropies.
    sampled = {"trainer": "GRPO", "precision": "bfloat16"}
    ours, theirs = row("a", "5 4 9", **sampled), row(**sampled)
    assert report.judged(ours, theirs) == (6.0, "agrees")
    ours = row("a", entropies="6 6 7", **sampled)
    assert report.judged(ours, theirs) == (0.0, "differs: entropies, by 1")


def test_tables():
    rows = [
        row(),
        row("liger_fn", tokens_per_s=150.0, peak_mib=1024.0),
        row("a", status="crashed", note="why", losses=""),
        row("b", verdict="differs: losses, by 1"),
    ]
    lines = report.grid(rows)
    assert lines[1][4:6] == ["100", "2.0"]
    assert lines[2][4:6] == ["150 (1.50x)", "1.0 (0.50x)"]
    assert [line[-1] for line in lines[3:]] == ["crashed", "differs: losses, by 1"]
    assert report.remarks(rows) == ["crashed: a, SFT tiny: why"]
    section = report.section([*rows, replace(rows[1], tokens_per_s=160.0)])
    assert section.startswith("a chip; torch ")
    assert "| 160 (1.60x) |" in section
    assert "150" not in section
    assert section.endswith("- crashed: a, SFT tiny: why")


def test_committed_results_are_inserted_and_drawn(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results"
    files.append(results / "h" / "trl" / "rows.csv", Row, [row(), row("liger_fn")])
    for command in (("init",), ("add", "."), ("commit", "-m", "rows")):
        git = ("git", "-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run((*git, *command), cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setattr(cli, "RESULTS", results)
    monkeypatch.setattr(cli, "PLOTS", tmp_path / "plots")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}{report.END}\nafter\n")
    assert run("--insert", page) == 0
    assert "| SFT tiny | liger_fn | 10.0 |" in page.read_text()
    assert run("--table") == 0
    assert "SFT tiny  liger_fn" in capsys.readouterr().out
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    assert run("--plot") == 0
    drawn = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in drawn] == [
        "a_chip-trl-tokens_per_s.png",
        "a_chip-trl-peak_mib.png",
    ]


def test_the_readme_shows_what_is_committed():
    """`python -m benchmarks --mode trl --insert README.md` would change nothing."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    between = text.split(report.BEGIN)[1].split(report.END)[0].strip()
    rows = [r for path in cli.results() for r in files.read(path, Row)]
    assert between == report.section(rows)


def test_what_is_not_understood_is_said(capsys):
    for arguments in (("--trainers", "PPO"), ("--providers", "trl,lig"), ("--steps", "0")):
        with pytest.raises(SystemExit):
            run(*arguments)
    err = capsys.readouterr().err
    for sentence in ("'PPO' is not one of SFT", "'lig' is not one of trl", "--steps: must be 1"):
        assert sentence in err


def test_tasks():
    asked = cli.parse(["--mode", "trl", "--device", "cpu", "--providers", "liger_fn-lean,trl"])
    assert (asked.size, asked.providers) == ("tiny", ["trl", "liger_fn-lean"])
    found = [(task.trainer, task.provider) for task in cli.tasks(asked, asked.providers)]
    assert found == [("SFT", "trl"), ("SFT", "liger_fn-lean"), ("DPO", "trl"), ("GRPO", "trl")]


def test_providers():
    cpu = torch.device("cpu")
    assert missing("trl+liger", cpu).startswith("needs ")
    if not missing("trl", cpu):
        lean = PROVIDERS["liger_fn-lean"].trainer("SFT")
        assert lean.__name__ == "SFTTrainer"
        assert lean.__mro__[1].__module__ == OURS
        assert not lean.token_metrics


def test_texts_are_as_long_as_they_are_said_to_be():
    size = SIZES["tiny"]
    (pair,) = texts("DPO", size, 1, seed=0)
    assert [len(text.split()) for text in pair.values()] == [16, 32, 32]
    assert texts("SFT", size, 2, seed=1) == texts("SFT", size, 2, seed=1)
    assert tokens_a_step("DPO", size) == 2 * tokens_a_step("SFT", size) == 2 * 4 * 48
    assert options("GRPO", size)["per_device_train_batch_size"] % size.generations == 0


def test_the_reward():
    assert share_of_even([[2, 3, 4, 6], []]) == [0.75, 0.0]
