"""The main job: `python -m liger_fn train`, on a text and a model small enough for seconds."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from liger_fn.functional.core.backend import using
from liger_fn.training import model as models
from liger_fn.training import options, report, run, text
from liger_fn.training.loop import Run, looks, rate

# Float32 losses of two correct implementations differ by a few roundings (6e-8 of a loss near 5),
# fed back through the optimizer for 30 steps.
SAME_LOSS = 1e-4


@pytest.fixture(autouse=True)
def reference():
    """A user's CPU has no interpreter switched on; the kernels have tests of their own."""
    with using("reference"):
        yield


@pytest.fixture
def book(tmp_path) -> Path:
    words = random.Random(0).choices(["alpha", "beta", "gamma", "delta"], k=1500)
    file = tmp_path / "book.txt"
    file.write_text("\n".join(f"def {word}(x): return x + {len(word)}" for word in words))
    return file


@pytest.fixture
def config(tmp_path) -> Path:
    LlamaConfig(
        vocab_size=280,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    ).to_json_file(tmp_path / "tiny.json")
    return tmp_path / "tiny.json"


@pytest.fixture
def job(book, config, tmp_path, capsys):
    """Run the command on the small text and model; later options win. Gives status, out, err."""

    def start(*arguments: str) -> tuple[int, str, str]:
        small = f"--text {book} --config {config} --out {tmp_path / 'out'} --device cpu"
        small += " --steps 3 --batch 4 --seq 32 --lr 1e-2 --no-plot"
        asked = options.parser().parse_args([*small.split(), *arguments])
        status = run.main(asked)
        return status, *capsys.readouterr()

    return start


def losses(directory: Path) -> dict[str, list[float]]:
    names, *rows = csv.reader((directory / "losses.csv").open())
    columns = zip(*rows, strict=True)
    return {name: [*map(float, column)] for name, column in zip(names, columns, strict=True)}


def recorded(directory: Path) -> dict:
    return json.loads((directory / "settings.json").read_text())


class TestTheJob:
    def test_both_runs_learn_and_agree_and_all_is_kept(self, job, tmp_path):
        status, out, _ = job("--steps", "30", "--batch", "8")
        kept = losses(tmp_path / "out")

        assert status == 0
        assert kept["step"] == [*range(1, 31)]
        for provider in ("unpatched", "patched"):
            assert report.mean(kept[provider][-3:]) < 0.6 * report.mean(kept[provider][:3])
        gaps = [abs(a - b) for a, b in zip(kept["unpatched"], kept["patched"], strict=True)]
        assert max(gaps) < SAME_LOSS

        summary = recorded(tmp_path / "out")["runs"]
        for provider in ("unpatched", "patched"):
            before, after = summary[provider]["held_out_before_after"]
            assert after < 0.6 * before
            assert summary[provider]["tokens_per_second"] > 0
            assert summary[provider]["peak_mib"] is None
        for words in ("tokens/s (median)", "n/a on a CPU", "28-30", "The losses agree", "rms_norm"):
            assert words in out

    def test_the_saved_model_is_the_trained_one(self, job, tmp_path, book):
        job("--steps", "30", "--batch", "8")
        saved = tmp_path / "out" / "model"
        tokenizer = AutoTokenizer.from_pretrained(saved)
        model = AutoModelForCausalLM.from_pretrained(saved)

        tokens = tokenizer(book.read_text()[:256], return_tensors="pt")["input_ids"]
        loss = model(input_ids=tokens, labels=tokens).loss.item()
        before, after = recorded(tmp_path / "out")["runs"]["patched"]["held_out_before_after"]
        assert abs(loss - after) < 0.2 < before - after

    def test_prints_what_the_saved_model_writes(self, job):
        _, out, _ = job("--prompt", "def gam")
        sample = out.partition("sample of patched")[2]
        assert "def gam" in sample

    def test_same_seed_same_bits(self, job, tmp_path):
        for name in "ab":
            job("--providers", "unpatched", "--out", str(tmp_path / name))
        job("--providers", "unpatched", "--seed", "1", "--out", str(tmp_path / "c"))
        assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")

    def test_plot(self, job, tmp_path, book, config):
        pytest.importorskip("matplotlib", reason="plots need matplotlib")
        asked = f"--text {book} --config {config} --out {tmp_path} --device cpu --steps 3 --seq 32"
        assert run.main(options.parser().parse_args(asked.split())) == 0
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")

    def test_no_plot_on_request_and_without_matplotlib(self, job, tmp_path, monkeypatch, book):
        job()
        assert not (tmp_path / "out" / "loss.png").exists()
        monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
        asked = f"--text {book} --out {tmp_path} --device cpu --steps 1 --seq 32 --batch 1"
        run.main(options.parser().parse_args(asked.split()))
        assert not (tmp_path / "loss.png").exists()


class TestOptions:
    def test_without_options_the_text_is_the_standard_library(self):
        asked = options.parser().parse_args([])
        files = text.standard_library()
        assert asked.text is None
        assert Path(json.__file__) in files
        assert files == sorted(files)
        assert not any("site-packages" in f.parts for f in files)

    @pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
    def test_dtype(self, job, tmp_path, dtype):
        status, out, _ = job("--dtype", dtype)
        saved = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
        assert status == 0
        assert saved["dtype"] == ("bfloat16" if dtype == "bfloat16" else "float32")
        assert f"the tolerance for {dtype}" in out
        exact = losses(tmp_path / "out")["unpatched"]
        job("--dtype", "float32")
        assert losses(tmp_path / "out")["unpatched"] != exact

    def test_vocab_learns_byte_pairs(self, job, tmp_path):
        _, out, _ = job("--vocab", "270")
        assert "vocabulary of 270" in out
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
        assert len(tokenizer) == 270
        assert len(tokenizer("def alpha")["input_ids"]) < len("def alpha")

    def test_providers_in_their_order(self, job, tmp_path):
        job("--providers", "patched,unpatched")
        assert [*losses(tmp_path / "out")] == ["step", "patched", "unpatched"]

    def test_one_provider_compares_nothing(self, job, tmp_path):
        status, out, _ = job("--providers", "unpatched")
        assert status == 0
        assert [*losses(tmp_path / "out")] == ["step", "unpatched"]
        assert "difference" not in out

    def test_sizes_and_rate_are_used(self, job, tmp_path):
        _, out, _ = job("--steps", "2", "--batch", "3", "--seq", "16")
        assert "2 steps of 3 x 16 tokens" in out
        first = losses(tmp_path / "out")["patched"]
        job("--steps", "2", "--batch", "3", "--seq", "16", "--lr", "1e-3")
        second = losses(tmp_path / "out")["patched"]
        assert first[0] == second[0]
        assert first[1] != second[1]

    def test_threads(self, job, monkeypatch, tmp_path, book):
        chosen = []
        monkeypatch.setattr(torch, "set_num_threads", chosen.append)
        job("--providers", "unpatched")
        assert chosen == []
        job("--threads", "2", "--providers", "unpatched")
        assert chosen == [2]
        asked = f"--text {book} --out {tmp_path} --device cpu --steps 1 --seq 32 --no-plot"
        run.main(options.parser().parse_args(asked.split()))
        assert chosen == [2, 1]

    def test_compile(self, job, monkeypatch):
        compiled = []
        whole = torch.compile
        # The eager backend traces as every backend does, and needs no C++ compiler.
        monkeypatch.setattr(
            torch, "compile", lambda m: compiled.append(m) or whole(m, backend="eager")
        )
        status, _, _ = job("--compile")
        assert status == 0
        assert len(compiled) == 2

    def test_a_directory_with_weights_is_trained_on(self, job, tmp_path):
        job("--steps", "30", "--batch", "8", "--out", str(tmp_path / "first"))
        trained = losses(tmp_path / "first")["patched"]
        saved = tmp_path / "first" / "model"
        job("--config", str(saved), "--out", str(tmp_path / "second"))
        assert losses(tmp_path / "second")["unpatched"][0] < 1.1 * report.mean(trained[-3:])

    def test_a_directory_without_weights_is_only_a_config(self, job, tmp_path, config):
        config.rename(tmp_path / "config.json")
        _, out, _ = job("--config", str(tmp_path))
        assert "LlamaForCausalLM" in out

    def test_tolerance_decides_the_exit_status(self, job, monkeypatch):
        def disturbed(model):
            with torch.no_grad():
                model.lm_head.weight.mul_(1.5)

        monkeypatch.setitem(models.PATCHES, "patched", disturbed)
        status, out, _ = job()
        assert status == 1
        assert "The losses DIFFER" in out
        assert job("--tolerance", "100")[0] == 0


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ("--text /nowhere/at/all", "must name files or directories that exist; got /nowhere"),
            ("--seq 4096 --config {bare}", "must have at least 81920 tokens for `--seq 4096`; got"),
            ("--seq 257", "must be at most the config's 256 positions; got 257"),
            ("--device cuda:77", "`--device` must be one that works here; got cuda:77"),
            ("--device abacus", "`--device` must be one that works here; got abacus"),
            ("--device meta", "`--device` must be cpu or cuda; got meta"),
            ("--providers patched,other", "must name some of unpatched, patched, each once; got"),
            ("--providers ,", "must name some of unpatched, patched, each once; got"),
            ("--providers patched,patched", "must name some of unpatched, patched, each once"),
            ("--vocab many", "`--vocab` must be `bytes` or a number above 257; got 'many'"),
            ("--vocab 257", "`--vocab` must be `bytes` or a number above 257; got '257'"),
            ("--vocab 285", "`vocab_size` must be at least the tokenizer's 285; got 280"),
            ("--config /nowhere", "must be a config.json or a directory with one; got /nowhere"),
            ("--config {book}", "`--config` must hold a JSON object; got"),
            ("--config {list}", "`--config` must hold a JSON object; got"),
            ("--config {odd}", "must be one that transformers knows; got 'abacus'"),
            ("--config {vision}", "must be a causal language model's; got 'vit'"),
            ("--out {book}", "`--out` must be a directory that can be made; got"),
        ],
    )
    def test_one_sentence(self, job, book, tmp_path, arguments, sentence):
        made = {
            "bare": '{"model_type": "llama", "max_position_embeddings": 8192}',
            "list": "[1, 2]",
            "odd": '{"model_type": "abacus"}',
            "vision": '{"model_type": "vit"}',
        }
        for name, content in made.items():
            (tmp_path / f"{name}.json").write_text(content)
        places = {name: tmp_path / f"{name}.json" for name in made}
        status, _, err = job(*arguments.format(book=book, **places).split())
        assert status == 2
        assert err.startswith("train: ")
        assert sentence in err
        assert err.count("\n") == 1

    @pytest.mark.parametrize(
        ("option", "value", "sentence"),
        [
            ("--steps", "0", "must be a whole number of at least 1; got '0'"),
            ("--batch", "-1", "must be a whole number of at least 1; got '-1'"),
            ("--seq", "1.5", "must be a whole number of at least 1; got '1.5'"),
            ("--threads", "x", "must be a whole number of at least 1; got 'x'"),
            ("--lr", "0", "must be a number above 0; got '0'"),
            ("--lr", "nan", "must be a number above 0; got 'nan'"),
            ("--tolerance", "much", "must be a number above 0; got 'much'"),
            ("--dtype", "float16", "invalid choice: 'float16'"),
        ],
    )
    def test_values(self, capsys, option, value, sentence):
        with pytest.raises(SystemExit) as stopped:
            options.parser().parse_args([f"{option}={value}"])
        assert stopped.value.code == 2
        assert sentence in capsys.readouterr().err


class TestText:
    def test_files_of_a_directory(self, tmp_path):
        (tmp_path / "b.txt").write_text("b")
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "c.txt").write_text("c")
        (tmp_path / ".hidden").write_text("h")
        (tmp_path / "binary").write_bytes(b"x\0y")
        found = text.files_under([tmp_path])
        assert [f.name for f in found] == ["c.txt", "b.txt"]

    @pytest.mark.parametrize("words", ["def f(x):\n\treturn x", "Grüße, 世界 🌍", "\u00a0\r\n"])
    def test_bytes_round_trip(self, words):
        tokenizer = text.byte_tokenizer()
        tokens = text.encode(tokenizer, [words])
        assert len(tokenizer) == 257
        assert len(tokens) == len(words.encode()) + 1
        assert tokenizer.decode(tokens, skip_special_tokens=True) == words

    def test_documents_end(self):
        tokenizer = text.byte_tokenizer()
        tokens = text.encode(tokenizer, ["ab", "c"])
        assert [i for i, t in enumerate(tokens) if t == tokenizer.eos_token_id] == [2, 4]

    def test_bytes_that_are_no_text(self, tmp_path):
        (tmp_path / "latin").write_bytes("Grüße".encode("latin-1"))
        assert text.read([tmp_path / "latin"]) == ["Gr\ufffd\ufffde"]

    def test_held_out_text_is_never_trained_on(self):
        kept, held_out = text.split(torch.arange(1000), seq=10)
        batches = text.random_batches(kept, batch=64, seq=10, seed=0)
        seen = torch.stack([next(batches) for _ in range(50)])
        assert len(held_out) == 50
        assert set(seen.unique().tolist()) <= set(range(950))
        assert seen.max() == 949
        assert (seen.diff(dim=-1) == 1).all()

    def test_the_seed_decides_the_batches(self):
        a, b, c = (next(text.random_batches(torch.arange(99), 8, 5, seed)) for seed in (0, 0, 1))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)

    def test_first_batches_are_whole_windows(self):
        batches = [*text.first_batches(torch.arange(23), batch=3, seq=5, count=2)]
        assert [b.shape for b in batches] == [(3, 5), (1, 5)]
        assert torch.cat([b.flatten() for b in batches]).tolist() == [*range(20)]


class TestReport:
    RUNS = (
        Run("unpatched", "", [4.0, 3.0, 2.0], 1000.0, 2048.0, (4.0, 2.5)),
        Run("patched", "", [4.0, 3.5, 2.0], 1500.0, 1024.0, (4.0, 2.5)),
    )

    def test_table(self):
        lines = report.table(self.RUNS).splitlines()
        assert lines[0].split() == ["step", "unpatched", "patched", "largest", "difference"]
        assert lines[2].split() == ["2", "3.0000", "3.5000", "5.0e-01"]
        assert lines[-2].split()[-4:] == ["1,000", "1,500", "1.50", "x"]
        assert lines[-1].split()[-4:] == ["2,048", "1,024", "0.50", "x"]

    def test_a_loss_that_is_not_a_number_is_no_agreement(self):
        broken = Run("patched", "", [4.0, math.nan, 2.0])
        assert math.isnan(report.largest_difference([self.RUNS[0], broken]))

    def test_stretches_cover_every_step_once(self):
        for steps in (1, 7, 10, 203):
            covered = [i for part in report.stretches(steps) for i in range(steps)[part]]
            assert covered == [*range(steps)]

    def test_looks_cover_every_step_once(self):
        assert [sum(looks(steps)) for steps in (1, 49, 50, 51, 400)] == [1, 49, 50, 51, 400]

    def test_rate_warms_up_and_cools_down(self):
        rates = [rate(i, 100) for i in range(100)]
        assert rates[0] == pytest.approx(0.05)
        assert max(rates) == rates[20] == 1.0
        assert rates[-1] == pytest.approx(0.1, abs=0.01)
