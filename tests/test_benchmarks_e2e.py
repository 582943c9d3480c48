"""Whole models side by side, on a tiny one: a provider that fails costs its own row only."""

import math
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import __main__ as benchmarks
from benchmarks import rows as files
from benchmarks.e2e import (
    breakdown,
    cli,
    curves,
    figures,
    lengths,
    parts,
    profile,
    readme,
    report,
    trainee,
)
from benchmarks.e2e.breakdown import HOST, IDLE, KERNELS, WALL, Part
from benchmarks.e2e.processes import Worker, how_it_ended
from benchmarks.e2e.profile import Span
from benchmarks.e2e.providers import Provider, find, is_name, missing
from benchmarks.e2e.report import LONGEST, MEMORY, NUDGED, SPEED, Curve, Row
from benchmarks.e2e.shapes import SHAPES
from benchmarks.e2e.trainee import Task

CPU = torch.device("cpu")

FAULTS = """
import os, signal, time, torch

def crash(model):
    os.kill(os.getpid(), signal.SIGSEGV)

def hang(model):
    time.sleep(3600)

def fill(model):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

def refuse(model):
    raise NotImplementedError("nothing for such a model")

def spoil(model):
    forward = model.model.norm.forward
    model.model.norm.forward = lambda x: 1.5 * forward(x)
"""


@pytest.fixture(autouse=True)
def references(monkeypatch):
    """Workers compute by the references: who is measured how is in question, not the kernels."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def faults(tmp_path, monkeypatch):
    """A module whose functions are patches that go wrong, importable by workers."""
    (tmp_path / "faults.py").write_text(FAULTS)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)


def run(*arguments) -> int:
    """As from the shell; on the CPU aot_eager stands for inductor, which would compile C++."""
    fixed = ("--device", "cpu", "--backend", "aot_eager", "--commit", "abc")
    return benchmarks.main([*map(str, arguments), *fixed])


def row(provider="hf", tokens=100.0, **facts) -> Row:
    fixed = {"mode": "e2e", "shape": "tiny", "variant": "", "dtype": "bfloat16", "batch": 2}
    fixed |= {"seq": 32, "status": "ok", "tokens_per_s": tokens, "peak_mib": 2048.0}
    fixed |= {"loss_first": 10.0, "loss_last": 9.0, "gradient_norm": 2.0, "verdict": "agrees"}
    fixed |= {"device": "a chip", "date": "2026-01-01T00:00:00", "first_step_s": 1.5}
    return Row(provider=provider, **{**fixed, **facts})


def curve(run="hf", losses="5 4 3", **facts) -> Curve:
    fixed = {"shape": "llama-small", "dtype": "bfloat16", "status": "ok", "held_out": 3.0}
    return Curve(run=run, losses=losses, **{**fixed, "device": "a chip", **facts})


def profiled(provider="hf", ms=6.0, **facts) -> list[Part]:
    """The rows of a step of three parts, of which additions take `ms`."""
    found = {"additions": (ms, 4.0), "norms": (1.0, 2.0), "matrix products": (3.0, 2.0)}
    whole = row(provider, step_ms=12.0, spread=0.01, version=f"{provider} 1", **facts)
    return breakdown.parts_of(whole, {"busy_ms": ms + 3.5, "host_ms": 5.0, "parts": found})


# Whole runs


def test_every_provider_that_runs_on_a_cpu(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    assert run("--mode", "e2e", "--steps", 2, "--warm-up", 1, "--csv", path) == 0
    out = capsys.readouterr().out
    assert "absent: liger: needs a GPU" in out
    assert "tokens/s" in out

    rows = {r.provider: r for r in files.read(path, Row)}
    assert list(rows) == ["hf", "hf+compile", "liger_fn", "liger_fn+compile"]
    assert {r.status for r in rows.values()} == {"ok"}
    verdicts = [r.verdict for r in rows.values()]
    assert verdicts == ["the reference", "agrees", "agrees", "agrees"]
    assert [r.graph for r in rows.values()] == ["", "one graph", "", "one graph"]
    assert "fused_linear_cross_entropy 1" in rows["liger_fn"].replaced
    assert rows["liger_fn"].version.startswith("liger_fn ")
    for r in rows.values():
        assert (r.steps, r.batch, r.seq, r.commit) == (4, 2, 32, "abc")
        assert r.tokens_per_s == pytest.approx(64e3 / r.step_ms, rel=1e-3)
        # The same batch at every step is learned.
        assert r.loss_last < r.loss_first == pytest.approx(math.log(320), abs=0.2)
        assert r.peak_mib is None


def test_a_step_is_taken_apart(tmp_path, capsys, faults):
    path = tmp_path / "rows.csv"
    names = "hf,liger_fn+compile,faults:fill"
    options = ("--steps", 2, "--warm-up", 1, "--providers", names, "--csv", path)
    assert run("--mode", "e2e", "--profile", *options) == 0
    out = capsys.readouterr().out
    assert "tiny 2x32: ms of a step" in out
    assert "out of memory: faults:fill, tiny 2x32: " in out

    rows = files.read(path, Part)
    assert {r.mode for r in rows} == {"profile"}
    for provider in ("hf", "liger_fn+compile"):
        mine = {r.part: r for r in rows if r.provider == provider}
        kernels = [r for part, r in mine.items() if part in parts.PARTS]
        assert {"matrix products", "attention", "norms", "optimizer"} <= mine.keys()
        assert {WALL, HOST, IDLE} < mine.keys()
        for quantity in ("ms", "launches", "share"):
            total = sum(getattr(r, quantity) for r in kernels)
            # Six digits are written of each.
            assert total == pytest.approx(getattr(mine[KERNELS], quantity), rel=1e-4)
        assert mine[KERNELS].share == 1
        # Seven linear layers in each of two layers, and the head.
        assert mine["matrix products"].launches >= 15
        assert mine[WALL].ms > 0 < mine[HOST].ms
        assert mine[WALL].launches is None
        assert {(r.batch, r.seq, r.commit) for r in mine.values()} == {(2, 32, "abc")}
    assert [r.verdict for r in rows if r.part == WALL] == ["the reference", "agrees"]
    assert [(r.part, r.status) for r in rows if r.provider == "faults:fill"] == [
        ("", "out of memory")
    ]


def test_what_goes_wrong_costs_one_row(tmp_path, capsys, faults):
    path = tmp_path / "rows.csv"
    names = [f"faults:{fault}" for fault in ("crash", "fill", "refuse", "spoil", "absent")]
    providers = ",".join([*names, "liger_fn", "hf"])
    options = ("--lora", "--checkpointing", "--steps", 1, "--warm-up", 0, "--csv", path)
    assert run("--mode", "e2e", "--providers", providers, *options) == 0
    rows = {r.provider.removeprefix("faults:"): r for r in files.read(path, Row)}
    assert {name: r.status for name, r in rows.items()} == {
        "hf": "ok",
        "crash": "crashed",
        "fill": "out of memory",
        "refuse": "cannot",
        "spoil": "ok",
        "absent": "failed",
        "liger_fn": "ok",
    }
    assert rows["crash"].note.startswith("killed by SIGSEGV, in: patch")
    assert rows["absent"].note == "AttributeError: module 'faults' has no attribute 'absent'"
    assert rows["spoil"].verdict.startswith("differs: ")
    assert rows["liger_fn"].verdict == "agrees"
    assert "swiglu 2" in rows["liger_fn"].replaced
    assert {r.variant for r in rows.values()} == {"checkpointing, lora"}
    out = capsys.readouterr().out
    assert "cannot: faults:refuse, tiny 2x32, checkpointing, lora: NotImplementedError" in out
    assert "faults:spoil, tiny 2x32, checkpointing, lora: differs: " in out


def test_a_worker_that_hangs_is_ended(tmp_path, faults):
    worker = Worker(Task("steps", "tiny", "faults:hang", "cpu", 1, 8), tmp_path, "w")
    seen = []
    facts = worker.measure(1.0, seen.append)
    assert facts["status"] == "timed out"
    assert facts["note"].startswith("ended after 1 s, in: ")
    assert seen[0] == "import"
    assert worker.process.returncode == -9
    worker.end()


def test_a_worker_that_nobody_starts_ends_with_its_parent(tmp_path):
    worker = Worker(Task("steps", "tiny", "hf", "cpu", 1, 8), tmp_path, "w")
    worker.process.stdin.close()
    assert worker.process.wait(timeout=120) == 0
    assert worker.facts() == {}


def test_a_line_that_is_cut_off_is_not_read(tmp_path):
    worker = object.__new__(Worker)
    worker.facts_path = tmp_path / "facts"
    assert worker.facts() == {}
    worker.facts_path.write_text('{"doing": "model"}\n{"doing": "patch", "longest": 1}\n{"long')
    assert worker.facts() == {"doing": "patch", "longest": 1}


def test_how_a_process_ended():
    assert how_it_ended(-9) == "killed by SIGKILL"
    assert how_it_ended(3) == "ended with status 3"


def test_what_was_not_run_is_said(capsys):
    assert run("--mode", "e2e", "--limit", 0, "--providers", "hf,liger_fn") == 0
    out = capsys.readouterr().out
    assert "not run, out of time: tiny hf\nnot run, out of time: tiny liger_fn\n" in out


def test_curves(tmp_path, capsys):
    text, path = tmp_path / "text.py", tmp_path / "curves.csv"
    text.write_text(Path(cli.__file__).read_text() * 2)
    sizes = ("--steps", 3, "--batch", 2, "--seq", 32, "--dtype", "bfloat16")
    options = ("--shape", "qwen3-small", "--text", text, "--csv", path)
    assert run("--mode", "curves", *sizes, *options) == 0
    found = files.read(path, Curve)
    assert [c.run for c in found] == ["hf", NUDGED, "liger_fn"]
    for c in found:
        assert (c.status, c.steps, len(c.values())) == ("ok", 3, 3)
        assert c.values()[0] == pytest.approx(math.log(257), abs=0.3)
    # Eight bits of mantissa, a mean over 62 tokens, three steps.
    assert report.distance(found[0], found[2]) < 0.05
    assert "qwen3-small bfloat16" in capsys.readouterr().out


def test_a_model_of_ones_own(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(
        '{"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "head_dim": 8,'
        ' "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,'
        ' "vocab_size": 64}'
    )
    options = ("--config", config, "--seq", 16, "--providers", "hf", "--steps", 1)
    assert run("--mode", "e2e", *options) == 0
    assert f"{config} 1x16" in capsys.readouterr().out


# What a worker does


def untold(**facts) -> None:
    pass


def nothing(model) -> None:
    pass


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 100])
@pytest.mark.parametrize("most", [1, 4, 7, 8, 100])
def test_search_finds_the_longest(limit, most):
    asked = []

    def fits(length):
        asked.append(length)
        return length <= 10 * limit

    assert lengths.search(fits, 10, 10 * most + 3) == 10 * min(limit, most)
    assert len(asked) == len(set(asked)) <= 2 * math.log2(most) + 2
    assert max(asked) <= 10 * most


def test_search_where_nothing_fits():
    assert lengths.search(lambda length: False, 1024, 4096) == 0


def task(**facts) -> Task:
    fixed = {"kind": "lengths", "shape": "tiny", "provider": "hf", "device": "cpu", "batch": 1}
    return Task(**{**fixed, "seq": 8, **facts})


@pytest.mark.parametrize("compiled", [False, True])
def test_longest_sequence(compiled):
    def short(model):
        forward = model.forward

        def call(input_ids=None, **options):
            if input_ids.shape[1] > 2500:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(input_ids=input_ids, **options)

        model.forward = call

    told = []
    facts = lengths.measure_lengths(
        task(longest=8192, backend="eager"),
        Provider("short", short, compiled),
        lambda **facts: told.append(facts),
    )
    assert facts == {"longest": 2048}
    assert [t["longest"] for t in told if "longest" in t] == [1024, 2048]


def test_a_search_that_reaches_its_end_says_so():
    facts = lengths.measure_lengths(task(longest=1500), Provider("hf", nothing, False), untold)
    assert facts == {"longest": 1024, "note": "no longer one was tried"}


def test_a_search_that_is_out_of_time_says_so():
    facts = lengths.measure_lengths(task(seconds=-1.0), Provider("hf", nothing, False), untold)
    assert facts == {"longest": 0, "note": "the time was over: longer ones may fit"}


def test_other_errors_of_a_search_are_not_hidden():
    def fail(model):
        model.forward = lambda **_: 1 / 0

    with pytest.raises(ZeroDivisionError):
        lengths.measure_lengths(task(), Provider("fail", fail, False), untold)


def test_a_model_that_is_not_one_graph_is_measured_in_several():
    def breaks(model):
        forward = model.forward

        def call(**options):
            torch._dynamo.graph_break()
            return forward(**options)

        model.forward = call

    told = {}
    facts = trainee.measure_steps(
        task(kind="steps", steps=1, warm_up=0, backend="eager"),
        Provider("breaks", breaks, True),
        lambda **facts: told.update(facts),
    )
    assert told["graph"] == "several graphs"
    assert told["note"].startswith("not one graph: Unsupported")
    assert facts["tokens_per_s"] > 0


def test_adapters_train_beside_a_frozen_model():
    model = trainee.make_model(task())
    inputs = {"input_ids": torch.arange(8)[None]}
    before = model(**inputs).logits
    trainee.add_adapters(model, rank=4)
    assert torch.equal(model(**inputs).logits, before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2
    assert all(".down." in name or ".up." in name for name in trained)
    assert type(model.lm_head) is torch.nn.Linear


def test_published_shapes_have_the_published_size():
    with torch.device("meta"):
        model = trainee.make_model(task(shape="llama-1b", device="meta"))
    # As its model card counts; the head is the embedding.
    assert sum(p.numel() for p in model.parameters()) == 1_235_814_400


def test_a_nudge_moves_one_weight_by_one_unit():
    model, same = trainee.make_model(task()), trainee.make_model(task())
    curves.nudge(model)
    pairs = zip(model.parameters(), same.parameters(), strict=True)
    moved = [(a[a != b], b[a != b]) for a, b in pairs if not torch.equal(a, b)]
    assert len(moved) == 1
    assert moved[0][0].numel() == 1
    assert torch.equal(
        torch.nextafter(moved[0][1], torch.full((1,), math.inf).bfloat16()), moved[0][0]
    )


def test_providers_by_name():
    assert find("hf+compile").compiled
    assert not find("liger_fn").compiled
    assert is_name("some.module:function+compile")
    assert not is_name("ligr")
    assert missing("liger", CPU) == "needs a GPU"
    assert missing("hf+compile", CPU) == ""


# Where the time of a step goes

NATIVE = "void at::native::"
VECTORIZED = f"{NATIVE}vectorized_elementwise_kernel<8, at::native::"

KERNEL_NAMES = {
    "matrix products": (
        "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NTT",
        "nvjet_sm90_tst_128x256_64x4_2x1_v_badd_coopB_TNT",
        "nvjet_sm90_tst_64x8_64x16_4x1_v_bz_splitK_TNN",
        "void cublasLt::splitKreduce_kernel<32, 16, int, __nv_bfloat16, __nv_bfloat16>",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x64_32x4_nn>",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64",
        "aten::mm",
        "aten::addmm",
    ),
    "attention": (
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x64x128",
        "void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16, 128>",
        "void cudnn::fusion::convert_dq_to_16bits<true, __nv_bfloat16, 128>",
        "void cudnn::fusion::fmha_reduce_head<__nv_bfloat16>",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<>",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "experts": (
        "_fused_moe_rows_kernel",
        "_fused_moe_outer_kernel",
        "_fused_moe_combine_kernel",
        "_fused_up_proj_swiglu_kernel",
    ),
    "gated unit": (
        "_glu_fwd_kernel",
        "_glu_bwd_kernel",
        "_swiglu_forward_kernel",
        "_swiglu_backward_kernel",
        "_geglu_tanh_forward_kernel",
        f"{VECTORIZED}(anonymous namespace)::silu_kernel(at::TensorIteratorBase&)::lambda>",
        "aten::silu_backward",
    ),
    "norms": (
        "_norm_fwd_kernel",
        "_norm_bwd_kernel",
        "_add_parts_kernel",
        "_rms_norm_forward_kernel",
        "_rms_norm_backward_kernel",
        f"{VECTORIZED}rsqrt_kernel_cuda(at::TensorIteratorBase&)::lambda>",
        f"{NATIVE}reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float>>>",
        "aten::rsqrt",
    ),
    "rope": (
        "_rope_kernel",
        "_triton_rope",
        f"{NATIVE}(anonymous namespace)::CatArrayBatchedCopy_vectorized<OpaqueType<2u>>",
        f"{VECTORIZED}neg_kernel_cuda(at::TensorIteratorBase&)::lambda>",
        "aten::cat",
    ),
    "loss": (
        "_cross_entropy_kernel",
        "_times_scalar_kernel",
        "liger_cross_entropy_kernel",
        "element_mul_kernel",
        f"{NATIVE}(anonymous namespace)::cunn_SoftMaxForward<4, float, LogSoftMaxForwardEpilogue>",
        f"{NATIVE}(anonymous namespace)::nll_loss_forward_reduce_cuda_kernel_2d<float>",
        "aten::_log_softmax_backward_data",
    ),
    "embedding": ("_embedding_bwd_kernel", "aten::embedding_dense_backward"),
    "additions": (
        f"{VECTORIZED}CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul> >",
        "aten::add_",
    ),
    "other elementwise": (
        f"{VECTORIZED}BinaryFunctor<float, float, float, at::native::binary_internal::MulFunctor>>",
        f"{NATIVE}reduce_kernel<128, 4, at::native::ReduceOp<float, at::native::func_wrapper_t>>",
        "aten::mul",
    ),
    parts.INDUCTOR: (
        "triton_poi_fused_add_rms_norm_bwd_view_1",
        "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_3",
        "triton_per_fused_nll_loss_backward_7",
        "triton_poi_fused__scaled_dot_product_flash_attention_transpose_2",
    ),
    "optimizer": (
        f"{NATIVE}(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous"
        " namespace)::FusedOptimizerTensorListMetadata<4>",
        "aten::_fused_adamw_",
    ),
    "copies and memsets": (
        "Memset (Device)",
        "Memcpy DtoD",
        f"{VECTORIZED}bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)::lambda>",
        f"{VECTORIZED}FillFunctor<float>, std::array<char*, 1ul> >",
        "aten::copy_",
    ),
    parts.OTHER: (
        "void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<>",
        "a_kernel_with_properties",
        "autograd::engine::evaluate_function: MmBackward0",
    ),
}


@pytest.mark.parametrize("part", KERNEL_NAMES)
def test_a_kernel_s_name_says_what_it_is_for(part):
    assert {name: parts.part_of(name) for name in KERNEL_NAMES[part]} == dict.fromkeys(
        KERNEL_NAMES[part], part
    )


def test_every_part_has_names_and_a_colour():
    assert list(KERNEL_NAMES) == list(parts.PARTS)
    assert list(figures._PART_COLORS) == [*parts.PARTS, IDLE]


def event(name, start, end, device=DeviceType.CUDA, **facts):
    time = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    fixed = {"device_type": device, "is_user_annotation": False, "time_range": time}
    return SimpleNamespace(name=name, **{**fixed, **facts})


def test_only_kernels_count():
    events = [
        event("_rope_kernel", 2.0, 5.0),
        event("ProfilerStep*", 0.0, 9.0),
        event("Optimizer.step#AdamW.step", 0.0, 9.0),
        event("Context Sync", 0.0, 9.0),
        event("what somebody has named", 0.0, 9.0, is_user_annotation=True),
        event("cudaLaunchKernel", 0.0, 1.0, DeviceType.CPU),
    ]
    found = list(profile.spans_of(events, DeviceType.CUDA))
    assert found == [Span("_rope_kernel", 2.0, 5.0, 3.0)]


def test_an_operator_s_time_is_its_own():
    events = [event("aten::linear", 0.0, 9.0, DeviceType.CPU, self_cpu_time_total=1.5)]
    found = list(profile.spans_of(events, DeviceType.CPU))
    assert found == [Span("aten::linear", 0.0, 9.0, 1.5)]


def test_kernels_that_run_at_once_are_busy_once():
    def span(start, end, name="_rope_kernel"):
        return Span(name, start, end, end - start)

    spans = [span(10.0, 14.0), span(0.0, 4.0), span(1.0, 2.0), span(3.0, 6.0, "Memset (Device)")]
    assert profile.busy_us(spans) == 6 + 4
    assert profile.by_part(spans) == {"rope": (9.0, 3), "copies and memsets": (3.0, 1)}


def test_the_rows_of_a_step():
    rows = profiled()
    assert [(r.part, r.ms, r.launches, r.share) for r in rows] == [
        ("matrix products", 3.0, 2.0, 0.3),
        ("norms", 1.0, 2.0, 0.1),
        ("additions", 6.0, 4.0, 0.6),
        (KERNELS, 10.0, 8.0, 1.0),
        (WALL, 12.0, None, None),
        (HOST, 5.0, None, None),
        (IDLE, 2.5, None, None),
    ]
    # Under the profiler the kernels have taken longer than the step without it.
    assert profiled(ms=9.0)[-1].ms == 0
    assert [(r.part, r.note) for r in profiled(status="crashed", note="why")] == [("", "why")]


def test_a_table_shows_the_parts_of_right_steps():
    rows = [*profiled(), *profiled("a", 5.0), *profiled("b", verdict="differs: loss_first")]
    faster = [replace(r, ms=11.0) if (r.provider, r.part) == ("a", WALL) else r for r in rows]
    crashed = profiled("c", status="crashed")
    assert breakdown.grids([*faster, *crashed]) == [
        [
            ["tiny 2x32: ms of a step", "hf", "a", "b", "c"],
            ["matrix products", "3.00", "3.00", "-", "-"],
            ["norms", "1.00", "1.00", "-", "-"],
            ["additions", "6.00", "5.00", "-", "-"],
            [KERNELS, "10.00", "9.00", "-", "-"],
            [WALL, "12.00", "11.00*", "differs", "crashed"],
            [HOST, "5.00", "5.00", "-", "-"],
            [IDLE, "2.50", "3.50", "-", "-"],
        ]
    ]


def test_rounds_of_profiles_are_one_number_and_older_runs_none():
    old = profiled(ms=50.0, date="2025-01-01T00:00:00")
    rows = report.latest([*old, *profiled(ms=1.0), *profiled(ms=2.0), *profiled(ms=6.0)])
    assert breakdown.values(rows)["tiny 2x32", "hf", "additions"] == 2.0


# Rows


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, "agrees"),
        ({"loss_first": 10.03, "loss_last": 9.1, "gradient_norm": 2.03}, "agrees"),
        ({"loss_first": 10.05}, "differs: loss_first is 10.05, the reference's 10"),
        ({"gradient_norm": 2.04}, "differs: gradient_norm is 2.04, the reference's 2"),
        ({"loss_last": 9.2}, "differs: loss_last is 9.2, the reference's 9"),
        ({"loss_first": math.nan}, "differs: loss_first is nan, the reference's 10"),
    ],
)
def test_verdicts(facts, expected):
    assert report.verdict(row("p", **facts), row("hf")) == expected


def test_nothing_is_judged_without_a_reference():
    assert report.verdict(row("hf"), None) == "the reference"
    assert report.verdict(row("p"), None) == "not judged: no row of hf"
    assert report.verdict(row("p"), row("hf", status="crashed")) == "not judged: no row of hf"


def test_table_shows_the_right_numbers_only():
    rows = [
        row("hf", 100.0),
        row("a", 150.0, peak_mib=1024.0),
        row("b", 900.0, verdict="differs: loss_first"),
        row("c", None, status="out of memory"),
    ]
    speed, memory = report.grid(rows, SPEED), report.grid(rows, MEMORY)
    assert speed == [
        ["tokens/s", "hf", "a", "b", "c"],
        ["tiny 2x32", "100", "150 (1.50x)*", "differs", "out of memory"],
    ]
    assert memory[1] == ["tiny 2x32", "2.0", "1.0 (0.50x)*", "differs", "out of memory"]
    assert report.grid(rows, LONGEST) == []


def test_rounds_are_one_number_and_older_runs_none():
    old = [row("hf", 1.0, date="2025-01-01T00:00:00")]
    rows = report.latest([*old, row("hf", 10.0), row("a", 5.0), row("hf", 30.0)])
    assert [r.tokens_per_s for r in rows] == [10.0, 30.0, 5.0]
    assert report.values(rows, SPEED) == {
        ("tiny 2x32", "hf"): 20.0,
        ("tiny 2x32", "a"): 5.0,
    }


def test_a_search_that_was_cut_off_has_found_a_length():
    facts = {"mode": "lengths", "batch": 1, "tokens_per_s": None}
    rows = [
        row("hf", **{**facts, "tokens": None}, longest=2048.0),
        row("a", **{**facts, "tokens": None}, longest=4096.0, status="timed out", note="in: x"),
        row("b", **{**facts, "tokens": None}, longest=0.0, status="out of memory"),
    ]
    assert report.grid(rows, LONGEST) == [
        ["longest sequence, tokens", "hf", "a", "b"],
        ["tiny", "2,048", "4,096 (2.00x)*", "out of memory"],
    ]
    assert "timed out: a, tiny: in: x" in report.remarks(rows)
    none = [replace(rows[0], longest=0.0), rows[1]]
    assert report.grid(none, LONGEST)[1] == ["tiny", "0", "4,096*"]


def test_remarks_name_what_is_unsteady_and_what_is_not_one_graph():
    rows = [row("hf", spread=0.5), row("a", spread=0.01, note="not one graph: why")]
    assert report.remarks(rows) == [
        "hf, tiny 2x32: its steps vary by 50%; measure again on an idle machine",
        "a, tiny 2x32: not one graph: why",
    ]


def test_advice_says_where_the_compiler_alone_is_enough():
    near = [row("hf", 100.0), row("hf+compile", 150.0), row("liger_fn", 152.0)]
    far = [row("hf+compile", 150.0, shape="b", peak_mib=2200.0), row("liger_fn", 150.0, shape="b")]
    lines = report.advice([*near, *far])
    assert lines[0].startswith("tiny 2x32: fastest liger_fn, 152 tokens/s (1.52x); least memory ")
    assert lines[-1] == (
        "`torch.compile` alone comes within 3% of the best in both speed and memory for tiny 2x32."
    )
    assert report.advice(far)[-1].endswith("for none of these models.")


def test_distance_of_losses():
    assert report.distance(curve(losses="5 4 3"), curve(losses="5 4.5 2.75")) == 0.5
    assert math.isnan(report.distance(curve(losses="5 4"), curve(losses="5 nan")))


def test_curves_are_judged_by_the_spread_in_bfloat16():
    def three(dtype, patched):
        return [
            curve(dtype=dtype),
            curve(NUDGED, "5 4.01 3", dtype=dtype),
            curve("liger_fn", patched, dtype=dtype),
        ]

    lines = report.curve_grid([*three("bfloat16", "5 4.015 3"), *three("float32", "5 4.03 3")])
    assert [line[-1] for line in lines[1:]] == ["", "", "within", "", "", "beyond"]
    assert lines[3][4:6] == ["1.5e-02", "1.5"]
    alone = report.curve_grid([curve(), curve("liger_fn")])
    assert alone[2][-1] == "no spread"
    lost = report.curve_grid([*three("bfloat16", "5 nan 3")])
    assert lost[3][-1] == "beyond"


# Files, pages and figures


def git(folder, *arguments):
    who = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    subprocess.run(("git", "-C", folder, *who, *arguments), check=True, capture_output=True)


@pytest.fixture
def committed(tmp_path, monkeypatch):
    """Results of all kinds in a repository of their own."""
    results = tmp_path / "results"
    rows = [row("hf"), row("liger_fn", 150.0, version="liger_fn 1", peak_mib=1024.0)]
    lost = [curve("liger", "", status="crashed", note="why")]
    files.append(results / "h" / "e2e" / "steps.csv", Row, rows)
    apart = [*profiled(), *profiled("liger_fn", 4.0)]
    files.append(results / "h" / "e2e" / "profile.csv", Part, apart)
    runs = [curve(), curve(NUDGED, "5 4.1 3"), curve("liger_fn", "5 4 3.1"), *lost]
    files.append(results / "h" / "curves" / "losses.csv", Curve, runs)
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "rows")
    monkeypatch.setattr(cli, "RESULTS", results)
    monkeypatch.setattr(cli, "PLOTS", tmp_path / "plots")
    return results


def test_figures(committed, capsys):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    assert run("--mode", "e2e", "--plot") == 0
    assert run("--mode", "curves", "--plot") == 0
    assert run("--mode", "e2e", "--profile", "--plot") == 0
    drawn = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in drawn] == [
        "a_chip-e2e-tokens_per_s.png",
        "a_chip-e2e-peak_mib.png",
        "a_chip-curves.png",
        "a_chip-e2e-profile.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_tables_of_committed_results(committed, capsys):
    assert run("--mode", "e2e", "--table") == 0
    assert run("--mode", "curves", "--table") == 0
    assert run("--mode", "e2e", "--profile", "--table") == 0
    out = capsys.readouterr().out
    assert "150 (1.50x)*" in out
    assert (
        "tiny 2x32: fastest liger_fn, 150 tokens/s (1.50x); least memory liger_fn, 1.0 GiB (0.50x)."
        in out
    )
    assert "llama-small bfloat16  hf, nudged" in out
    assert ["additions", "6.00", "4.00"] in [line.split() for line in out.splitlines()]


def test_results_that_are_not_committed_are_not_shown(committed, tmp_path, capsys):
    files.append(committed / "h" / "e2e" / "steps.csv", Row, [row("late")])
    page = tmp_path / "page.md"
    page.write_text(f"{readme.BEGIN}{readme.END}")
    assert run("--mode", "e2e", "--insert", page) == 2
    assert run("--mode", "e2e", "--plot") == 2
    assert "is not committed as it is" in capsys.readouterr().err
    assert page.read_text() == f"{readme.BEGIN}{readme.END}"


def test_tables_are_inserted_between_markers(committed, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n\n{readme.BEGIN}\nold\n{readme.END}\n\nafter\n")
    assert run("--mode", "e2e", "--insert", page) == 0
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("# Before\n")
    assert text.endswith(f"{readme.END}\n\nafter\n")
    assert "| tokens/s | hf | liger_fn |\n| --- | --- | --- |\n" in text
    assert "| tiny 2x32 | 100 | **150 (1.50x)** |" in text
    assert "| llama-small bfloat16 | liger_fn |" in text
    assert "| tiny 2x32: ms of a step | hf | liger_fn |\n| --- | --- | --- |\n" in text
    assert "| additions | 6.00 | 4.00 |" in text
    assert f"| {KERNELS} | 10.00 | 8.00 |" in text
    assert run("--mode", "e2e", "--insert", page) == 0
    assert page.read_text() == text


@pytest.mark.parametrize("content", ["", readme.BEGIN, readme.END + readme.BEGIN])
def test_a_page_without_markers_is_left_alone(committed, tmp_path, capsys, content):
    page = tmp_path / "page.md"
    page.write_text(content)
    assert run("--mode", "e2e", "--insert", page) == 2
    assert "must contain" in capsys.readouterr().err
    assert page.read_text() == content


def test_the_readme_shows_what_is_committed():
    """`python -m benchmarks --mode e2e --insert README.md` would change nothing."""
    text = (cli.ROOT / "README.md").read_text(encoding="utf-8")
    between = text.split(readme.BEGIN)[1].split(readme.END)[0].strip()
    steps = [r for path in cli.results("e2e") for r in files.read(path, Row)]
    runs = [c for path in cli.results("curves") for c in files.read(path, Curve)]
    apart = [p for path in cli.results("profile") for p in files.read(path, Part)]
    assert between == readme.section(steps, runs, apart)


# The command line


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shape", "lama"], "'lama' is not one of llama-1b"),
        (["--providers", "hf,ligr"], "'ligr' is not one of hf, hf+compile"),
        (["--steps", "0"], "--steps: must be 1 at least"),
        (["--batch", "0"], "--batch: must be 1 at least"),
        (["--dtype", "float8"], "'float8' is not one of"),
        (["--profile", "--lengths"], "--profile: is for the steps of e2e, without --lengths"),
    ],
)
def test_what_is_not_understood_is_said(arguments, sentence, capsys):
    with pytest.raises(SystemExit):
        run("--mode", "e2e", *arguments)
    assert sentence in capsys.readouterr().err


def test_providers_take_turns():
    options = cli.parse(["--mode", "e2e", "--rounds", "2", "--device", "cpu"])
    tasks = cli.step_tasks(options, ["hf", "a", "b"])
    assert [t.provider for t in tasks] == ["hf", "a", "b", "b", "a", "hf"]
    options = cli.parse(["--mode", "e2e", "--providers", "liger,hf", "--device", "cpu"])
    assert options.providers == ["hf", "liger"]


def test_defaults_are_for_the_device():
    assert cli.parse(["--mode", "e2e", "--device", "cpu"]).shapes == ["tiny"]
    options = cli.parse(["--mode", "e2e", "--device", "cpu", "--shape", "llama-1b,qwen3-moe-2"])
    sizes = [(t.shape, t.batch, t.seq) for t in cli.step_tasks(options, ["hf"])]
    assert sizes == [("llama-1b", 4, 4096), ("qwen3-moe-2", 2, 4096)]
    assert [name for name, shape in SHAPES.items() if shape.is_for_tests] == ["tiny"]


def test_other_modes_have_their_own_options():
    assert cli.asked(["--mode", "e2e", "--lora"])
    assert not cli.asked(["rms_norm", "--mode", "fwd", "--quick"])


def test_a_file_of_other_rows_is_refused(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    files.append(path, Curve, [curve()])
    assert run("--mode", "e2e", "--csv", path) == 2
    assert "has other columns" in capsys.readouterr().err


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [row("hf"), replace(row("a"), tokens_per_s=None, note="a, b\nc")]
    files.append(tmp_path / "rows.csv", Row, rows)
    assert files.read(tmp_path / "rows.csv", Row) == rows
