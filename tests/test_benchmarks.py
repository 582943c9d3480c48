"""The benchmark CLI on tiny shapes: it checks before it times, and reports what it cannot time."""

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import answers, layer, plot, providers, report, sweep, timing
from benchmarks.bench import DeviceLost
from benchmarks.ceilings import Ceilings
from benchmarks.inputs import DeviceDraw, Overwritten, draw_inputs, watch
from benchmarks.providers import PROVIDERS, Eager, Provider
from benchmarks.report import Row
from benchmarks.timing import Clock, Step, Timing, host_ms, in_turns, step
from benchmarks.tiny import tiny
from liger_fn.functional import neighborhood_attention
from liger_fn.functional.activation import softmax as softmax_file
from liger_fn.testing.spec import Benchmark, Launch, around
from liger_fn.testing.specs import specs
from liger_fn.testing.specs.fused_linear_divergence import heads

SPECS = {spec.name: spec for spec in specs()}
CPU = torch.device("cpu")


def linear(draw, **more):
    """A head and its input."""
    return {"weight": draw.normal(128, 32, scale=0.2), "x": draw.normal(16, 32), **more}


# In place of tiny calls that take a GPU microseconds, and the interpreter seconds.
SMALLER = {
    "fused_linear_cross_entropy": lambda d: linear(d, y=d.integers(128, 16)),
    "fused_linear_logprobs": lambda d: linear(d, y=d.integers(128, 16)),
    "fused_linear_selected_logprobs": lambda d: linear(d, indices=d.integers(128, 16, 4)),
    "fused_linear_cosine": lambda d: heads(d, 16, 32, 64, 128),
    "fused_linear_jsd": lambda d: heads(d, 16, 32, 64, 128),
    "fused_linear_kl_div": lambda d: heads(d, 16, 32, 64, 128),
    "fused_linear_tvd": lambda d: heads(d, 16, 32, 64, 128, apart=True),
}


def small(name: str):
    """The spec with its tiny call, or a smaller one, as its only shape."""
    call = tiny(SPECS[name])
    call = dataclasses.replace(call, make=SMALLER.get(name, call.make))
    return dataclasses.replace(SPECS[name], benchmarks=(call,))


class WrongGradient(Provider):
    name = "wrong"
    needs_gpu = False

    def rms_norm(self):
        def call(x, weight=None, *, eps=1e-6):
            return torch.nn.functional.rms_norm(x, x.shape[-1:], weight.detach() + 0 * weight, eps)

        return call


class Raises(Provider):
    name = "raises"
    needs_gpu = False

    def rms_norm(self):
        def call(x, weight=None):
            raise RuntimeError("out of luck\nand of words")

        return call


class TakesNoWeight(Provider):
    name = "no-weight"
    needs_gpu = False

    def rms_norm(self):
        return lambda x: x


class WrongWithoutGrad(Provider):
    """Right, but for the kernel that it runs where no gradient will follow."""

    name = "wrong-alone"
    needs_gpu = False

    def rms_norm(self):
        function = Eager().call("rms_norm")
        return lambda x, weight: function(x, weight) * (1 if torch.is_grad_enabled() else 2)


class ReusesTheCotangent(Provider):
    """Right, but its backward pass writes dx over dy and returns it."""

    name = "reuses"
    needs_gpu = False

    def rms_norm(self):
        function = Eager().call("rms_norm")

        class OverDy(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, weight):
                ctx.save_for_backward(x, weight)
                return function(x, weight)

            @staticmethod
            def backward(ctx, dy):
                with torch.enable_grad():
                    leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
                    dx, dweight = torch.autograd.grad(function(*leaves), leaves, dy)
                return dy.copy_(dx), dweight

        return lambda x, weight: OverDy.apply(x, weight)


class Spoils(Provider):
    """Fails in its backward pass, after it has written over its input."""

    name = "spoils"
    needs_gpu = False

    def rms_norm(self):
        def call(x, weight):
            x.detach().zero_()
            raise RuntimeError("too late")

        return call


class InPlace(Provider):
    """Right, but it leaves the input scaled."""

    name = "in-place"
    needs_gpu = False

    def rms_norm(self):
        function = Eager().call("rms_norm")

        def call(x, weight):
            y = function(x, weight)
            x.detach().mul_(2.0)
            return y

        return call


@pytest.fixture
def bench(monkeypatch):
    """Run the CLI on the tiny call of the given ops; return the rows."""

    def run(ops, *arguments, extra=()):
        monkeypatch.setattr(cli, "specs", lambda: tuple(small(name) for name in ops))
        for provider in extra:
            monkeypatch.setitem(PROVIDERS, provider.name, provider)
        runs = []
        monkeypatch.setattr(cli, "run", lambda b, cases: runs.append(b) or run_cases(b, cases))
        options = ("--device", "cpu", "--budget", "0", "--repeats", "1", "--calls", "1", *arguments)
        assert cli.main(options) == 0
        return runs[0].rows

    run_cases = cli.run
    return run


@pytest.mark.parametrize("name", SPECS)
def test_every_mode_of_every_op(bench, name, monkeypatch):
    # Nobody reads these times.
    monkeypatch.setattr(timing, "WARM_UP", 0)
    rows = bench(
        [name], "--mode", "fwd,bwd,full,host,memory", "--providers", "eager,torch,liger_fn"
    )
    modes = ("fwd", "bwd", "full", "memory", "host-fwd", "host-full")
    peers = [p for p in ("eager", "torch", "liger_fn") if PROVIDERS[p].call(name)]
    assert {(r.mode, r.provider) for r in rows} == {(m, p) for m in modes for p in peers}
    for row in rows:
        assert row.status == "ok", row.note
        assert (row.ms is not None and row.ms > 0) == (row.mode != "memory")
        assert 0 <= row.error <= answers.LIMITS[torch.bfloat16]
        assert row.overwrites == 0


def test_a_wrong_answer_gets_the_word_and_no_time(bench, capsys):
    rows = bench(["rms_norm"], "--providers", "wrong,liger_fn", extra=[WrongGradient()])
    wrong, ours = rows
    assert (wrong.status, wrong.ms, wrong.floor) == ("wrong", None, None)
    assert "dweight is off by 1 of its norm" in wrong.note
    assert ours.status == "ok"
    printed = capsys.readouterr().out
    assert "wrong: wrong, rms_norm tiny: dweight is off by" in printed
    assert "*" in printed.splitlines()[-2]


def test_the_kernel_without_grad_is_checked_where_it_is_timed(bench):
    extra = [WrongWithoutGrad()]
    rows = bench(["rms_norm"], "--providers", "wrong-alone", "--mode", "full,fwd", extra=extra)
    assert {r.status for r in rows} == {"wrong"}
    assert "result 0 without grad is off by 1 of its norm" in rows[0].note
    (row,) = bench(["rms_norm"], "--providers", "wrong-alone", "--mode", "full", extra=extra)
    assert row.status == "ok"


def test_one_that_fails_is_reported_and_the_rest_go_on(bench):
    extra = [Raises(), TakesNoWeight()]
    rows = bench(["rms_norm"], "--providers", "raises,no-weight,eager", extra=extra)
    assert [r.status for r in rows] == ["failed", "cannot", "ok"]
    assert rows[0].note == "RuntimeError: out of luck"
    assert "unexpected keyword argument 'weight'" in rows[1].note


def test_one_that_overwrites_gets_fresh_inputs(bench, capsys):
    rows = bench(["rms_norm"], "--providers", "in-place,eager,liger_fn", extra=[InPlace()])
    assert [(r.status, r.overwrites) for r in rows] == [("ok", 1), ("ok", 0), ("ok", 0)]
    assert rows[0].error == rows[1].error
    assert "overwrites: in-place, rms_norm: " in capsys.readouterr().out


def test_one_that_fails_after_it_overwrote_leaves_the_inputs_whole(bench):
    alone = bench(["rms_norm"], "--providers", "eager")
    rows = bench(["rms_norm"], "--providers", "spoils,eager", extra=[Spoils()])
    assert [r.status for r in rows] == ["failed", "ok"]
    assert rows[1].error == alone[0].error


def test_a_gradient_in_the_memory_of_its_cotangent_is_judged_before_that_is_restored(bench):
    rows = bench(["rms_norm"], "--providers", "reuses,eager", extra=[ReusesTheCotangent()])
    assert [(r.status, r.overwrites) for r in rows] == [("ok", 1), ("ok", 0)]


def test_watch_finds_what_changed_and_restores_it():
    spec = small("rms_norm")
    inputs = draw_inputs(spec, spec.benchmarks[0], DeviceDraw(CPU, torch.float32))
    before = [t.clone() for t in inputs.tensors()]

    def whole():
        return all(torch.equal(t, old) for t, old in zip(inputs.tensors(), before, strict=True))

    def spoil():
        inputs.arguments["x"].detach()[3] = float("nan")
        inputs.cotangents[0].zero_()
        return {"dx": inputs.cotangents[0]}

    def again():
        assert whole()
        inputs.cotangents[0].fill_(1.0)
        return {"dx again": inputs.cotangents[0]}

    values, overwritten = watch(inputs, spoil, again)
    assert whole()
    assert len(overwritten.pairs) == 2
    assert not values["dx"].any()
    assert values["dx again"].all()
    spoil()
    overwritten.restore()
    assert whole()


def test_an_absent_provider_says_how_to_get_it(bench, capsys):
    class Absent(Provider):
        name = "absent-one"
        needs_gpu = False
        modules = ("no_such_module",)
        install = "pip install no-such-module"

    rows = bench(["rms_norm"], "--providers", "absent-one,eager", extra=[Absent()])
    assert [r.provider for r in rows] == ["eager"]
    printed = capsys.readouterr().out
    assert "absent: absent-one: no_such_module cannot be imported" in printed
    assert "pip install no-such-module" in printed


def test_a_lost_device_ends_the_run_but_not_the_report(bench, capsys, monkeypatch):
    def case(self, spec, benchmark, modes):
        raise DeviceLost("the device is lost")

    monkeypatch.setattr(cli.Bench, "case", case)
    assert bench(["rms_norm", "swiglu"], "--providers", "eager") == []
    printed = capsys.readouterr().out
    assert "broken off, the device is lost: rms_norm tiny" in printed
    assert "not run, the device is lost: swiglu tiny" in printed


def test_no_case_starts_after_the_limit(bench, capsys):
    assert bench(["rms_norm"], "--providers", "eager", "--limit", "-1") == []
    assert "not run, out of time: rms_norm tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["no_such_op"], "OP: 'no_such_op' is not one of attention_residual, "),
        (["--mode", "sideways"], "--mode: 'sideways' is not one of fwd, bwd, full, host, memory"),
        (["--providers", "x"], "--providers: 'x' is not one of eager, "),
        (["--shape", "x"], "--shape: 'x' is not one of 8x8192x4096, "),
        (["--repeats", "0"], "--repeats and --calls: must be 1 at least"),
        (["--calls", "0"], "--repeats and --calls: must be 1 at least"),
        (["--device", "gpu"], "argument --device: 'gpu' is not a device"),
        (["--device", "meta"], "argument --device: must be cpu or cuda; got 'meta'"),
        (["--device", "cuda:99"], "sees no 'cuda:99' here"),
    ],
)
def test_an_unknown_word_is_refused(arguments, sentence, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert sentence in capsys.readouterr().err


def test_no_provider_no_run(capsys):
    assert cli.main(["--device", "cpu", "--providers", "quack"]) == 2
    assert capsys.readouterr().err == "None of these providers can run here.\n"


def test_help_says_what_the_modes_mean(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    for mode in cli.MODES:
        assert f"{mode} " in words.partition("modes:")[2]


def test_a_named_provider_is_measured_once(bench):
    assert len(bench(["rms_norm"], "--providers", "eager,eager")) == 1


@pytest.mark.parametrize("provider", PROVIDERS.values(), ids=list(PROVIDERS))
def test_providers_name_known_ops(provider):
    own = {n for n in dir(provider) if callable(getattr(provider, n)) and not n.startswith("_")}
    assert own - {"call", "missing", "version"} <= set(SPECS)
    assert provider.name
    assert not provider.modules or provider.install


@pytest.mark.parametrize("window", ["shifted", "cut", "causal"])
@pytest.mark.parametrize(
    ("lengths", "kernel_size", "dilation"), [((19,), 4, 2), ((5, 7), (2, 3), (2, 1))]
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_sees_the_windows_of_our_op(lengths, kernel_size, dilation, window, monkeypatch):
    # Its mask is what is at stake, not how it compiles.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    attend = PROVIDERS["flex"].call("neighborhood_attention")
    q, k, v = torch.randn(3, 2, 3, *lengths, 16).unbind()
    options = {"dilation": dilation, "window": window}
    expected = neighborhood_attention(q, k, v, kernel_size, **options)
    torch.testing.assert_close(attend(q, k, v, kernel_size, **options), expected)
    with pytest.raises(NotImplementedError, match="only of a batch and of heads"):
        attend(q[0], k[0], v[0], kernel_size, **options)


def test_a_sliced_reference_equals_the_whole(monkeypatch):
    for name in ("cross_entropy", "fused_linear_cross_entropy"):
        spec = small(name)
        inputs = draw_inputs(spec, spec.benchmarks[0], DeviceDraw(CPU, torch.float64))
        inputs.arguments[spec.rows[1]][::3] = -100
        whole = answers.answer(inputs, spec.reference)
        monkeypatch.setattr(answers, "_SLICE", 5 * 1024)
        sliced = answers.exact(spec, inputs)
        assert whole.keys() == sliced.keys()
        # Gradients by row are kept in float32.
        assert answers.worst(sliced, whole)[1] < 1e-6


def test_worst_is_infinite_for_nan_and_for_another_shape():
    want = {"result 0": torch.ones(3)}
    assert answers.worst({"result 0": torch.tensor([1.0, float("nan"), 1.0])}, want)[1] == float(
        "inf"
    )
    assert answers.worst({"result 0": torch.ones(1)}, want)[1] == float("inf")
    assert answers.worst({"result 0": torch.ones(3) * 1.5}, want) == ("result 0", 0.5)


def test_providers_take_turns_and_a_failing_one_leaves():
    order = []

    def runner(name, fails_at=None):
        def run(_):
            order.append(name)
            if order.count(name) == fails_at:
                raise RuntimeError("tired")

        return Step(lambda: None, run, lambda: None)

    steps = {"a": runner("a"), "b": runner("b", fails_at=2), "c": runner("c")}
    timings = in_turns(steps, Clock(CPU).time, budget=0.0, fewest=3)
    # Two rounds warm up; the order of each is drawn.
    rounds = [order[:3], order[3:6], *(order[i : i + 2] for i in (6, 8, 10))]
    assert ["".join(sorted(r)) for r in rounds] == ["abc", "abc", "ac", "ac", "ac"]
    assert len({"".join(r) for r in rounds}) > 2
    assert isinstance(timings["b"], RuntimeError)
    assert timings["a"].repeats == 3


def test_a_timing_is_the_median_and_the_quartiles():
    assert Timing.of([1.0, 2.0, 3.0, 4.0, 100.0]) == Timing(3.0, (52.0 - 1.5) / 3.0, 5)


class Gpu:
    """A device of one stream in virtual milliseconds, and a host that enqueues on it."""

    def __init__(self, monkeypatch):
        self.now = self.free = 0.0
        self.spins = []
        self.clock = Clock(CPU)
        self.clock._cuda = True
        self.clock._flush = torch.empty(1)
        self.clock._start, self.clock._end = self.Event(self), self.Event(self)
        monkeypatch.setattr(torch.cuda, "_sleep", self.spin)
        monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: {})

    def enqueue(self, host, device):
        """Take the host so long, and then give the device so much to do."""
        self.now += host
        self.free = max(self.free, self.now) + device

    def spin(self, cycles):
        self.spins.append(cycles)
        self.enqueue(0.0, cycles / 2e6)

    def wait(self):
        self.now = max(self.now, self.free)

    class Event:
        def __init__(self, gpu):
            self.gpu, self.at = gpu, 0.0

        def record(self):
            self.at = max(self.gpu.free, self.gpu.now)

        def query(self):
            return self.at <= self.gpu.now

        def synchronize(self):
            self.gpu.wait()

        def elapsed_time(self, end):
            return end.at - self.at


def launches(gpu, *, count=4, host=0.3, device=0.05, wait_after=None):
    """A call of some kernels, with host work before each."""

    def run(_):
        for i in range(count):
            gpu.enqueue(host, device)
            if i == wait_after:
                gpu.wait()

    return Step(lambda: None, run, lambda: None)


def test_the_device_is_timed_however_slow_the_host(monkeypatch):
    gpu = Gpu(monkeypatch)
    slow = launches(gpu)
    assert [gpu.clock.time(slow) for _ in range(3)] == pytest.approx([0.2] * 3)
    # Found once: the host takes 1.2 ms, the device spins for half a millisecond, one, and two.
    shortest = timing._SHORTEST
    assert gpu.spins == [shortest, 2 * shortest, 4 * shortest, 4 * shortest, 4 * shortest]
    assert not slow.waits

    gpu.spins.clear()
    assert gpu.clock.time(launches(gpu, host=0.01)) == pytest.approx(0.2)
    assert gpu.spins == [shortest]


def test_a_call_that_waits_is_timed_with_its_host_and_found_out_once(monkeypatch):
    gpu = Gpu(monkeypatch)
    waiting = launches(gpu, wait_after=1)
    # Two kernels, then the host is waited for twice; the last kernel ends the call.
    assert gpu.clock.time(waiting) == pytest.approx(2 * 0.05 + 2 * 0.3 + 0.05)
    assert waiting.waits
    assert max(gpu.spins) == timing._LONGEST

    gpu.spins.clear()
    gpu.clock.time(waiting)
    assert gpu.spins == [timing._SHORTEST]


def test_a_row_says_that_its_call_waits(bench, monkeypatch):
    monkeypatch.setattr(timing.Clock, "_time_on_host", lambda self, step: (1.0, False))
    (row,) = bench(["rms_norm"], "--providers", "eager")
    assert row.note.startswith("largest error in ")
    assert row.note.endswith("; waits for the device")


def test_the_allocator_is_not_timed(monkeypatch):
    clock, repeats = Clock(CPU), []
    monkeypatch.setattr(clock, "_allocations", lambda: min(len(repeats), 3))
    clock.time(Step(lambda: None, repeats.append, lambda: None))
    assert len(repeats) == 4


def test_what_is_overwritten_is_put_back_after_a_failure():
    restored = []

    def run(_):
        raise RuntimeError("tired")

    failing = Step(lambda: None, run, lambda: restored.append(1))
    with pytest.raises(RuntimeError, match="tired"):
        Clock(CPU).time(failing)
    assert restored == [1]


def test_the_host_is_timed_for_so_many_calls_and_so_long():
    calls = []
    quick = Step(lambda: None, calls.append, lambda: None)
    host_ms(Clock(CPU), most=7, seconds=60.0)(quick)
    assert len(calls) == 7

    slow = Step(lambda: None, lambda _: time.sleep(0.01), lambda: None)
    start = time.perf_counter()
    # A sleep is never shorter than asked.
    assert host_ms(Clock(CPU), most=1000, seconds=0.05)(slow) >= 10.0
    assert time.perf_counter() - start < 5.0
    assert host_ms(Clock(CPU), most=1000, seconds=0.0)(slow) >= 10.0


def test_providers_share_the_budget_for_the_host(bench, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "benchmarks.bench.host_ms",
        lambda clock, most, seconds: asked.append(seconds) or (lambda step: 1.0),
    )
    arguments = ("--mode", "host", "--providers", "eager,torch,liger_fn")
    bench(["rms_norm"], *arguments, "--budget", "2.1", "--repeats", "5")
    # Three providers, seven rounds, for fwd and for full.
    assert asked == pytest.approx([0.1, 0.1])


def test_backward_is_timed_alone():
    spec = small("rms_norm")
    inputs = draw_inputs(spec, spec.benchmarks[0], DeviceDraw(CPU, torch.float32))
    calls = []

    def call(**arguments):
        calls.append(torch.is_grad_enabled())
        return spec.reference(**arguments)

    backward = step("bwd", inputs, call, Overwritten([]))
    prepared = backward.prepare()
    assert calls == [True]
    gradients = backward.run(prepared)
    assert calls == [True]
    assert [g.shape for g in gradients] == [t.shape for t in inputs.leaves]
    assert all(leaf.grad is None for leaf in inputs.leaves)
    step("fwd", inputs, call, Overwritten([])).run(None)
    assert calls == [True, False]


def test_the_floor_is_the_slower_of_traffic_and_work():
    case = Benchmark("x", dict, bytes_fwd=10**9, bytes_bwd=2 * 10**9, flops_fwd=10**12)
    rates = Ceilings(copy=1e12, matrix=1e15)
    assert rates.floor_ms(case, "fwd") == pytest.approx(1.0)
    assert rates.floor_ms(case, "bwd") == pytest.approx(2.0)
    assert rates.floor_ms(case, "full") == pytest.approx(3.0)
    assert rates.floor_ms(case, "host-fwd") is None
    assert rates.floor_ms(Benchmark("x", dict), "fwd") is None


# Sweeps


def softmax_launch(*candidates, mode="fwd") -> Launch:
    return Launch(softmax_file, f"_softmax_{mode}_config", mode, lambda current: candidates)


def swept(*launches: Launch):
    """The spec of softmax with its tiny call, of 1024 columns, and these launches."""
    return dataclasses.replace(small("softmax"), launches=launches)


@pytest.mark.parametrize("spec", [s for s in SPECS.values() if s.launches], ids=lambda s: s.name)
def test_every_launch_that_a_spec_names_is_asked_and_can_be_replaced(spec, device):
    # The call's memory is read and written, so that a candidate out of bounds would show.
    (call,) = small(spec.name).benchmarks
    inputs = draw_inputs(spec, call, DeviceDraw(device, torch.float32))
    for launch in spec.launches:
        with sweep.recorded(launch) as seen:
            want = answers.answer(inputs, spec.op)
        today, *others = sweep.configurations(seen, launch)
        assert today == seen[0]
        assert others
        assert today not in others
        for config in others[:2]:
            with sweep.recorded(launch) as asked, sweep.replaced(launch, config):
                got = answers.answer(inputs, spec.op)
            assert asked == []
            # Float32, summed in another order.
            assert answers.worst(got, want)[1] < 1e-5


def test_a_sweep_has_rows_of_all_candidates_and_says_what_the_op_does_today(bench, monkeypatch):
    wrong = {"BLOCK_D": 512, "BLOCK_N": 1, "num_warps": 4}
    fails = {"BLOCK_D": 1000, "BLOCK_N": 1, "num_warps": 4}
    other = {"BLOCK_D": 1024, "BLOCK_N": 1, "num_warps": 4}
    spec = swept(softmax_launch(other, wrong, fails), softmax_launch(other, mode="bwd"))
    monkeypatch.setitem(globals(), "small", lambda name: spec)
    rows = bench(["softmax"], "--mode", "sweep")
    got = {(r.mode, r.provider): r for r in rows}
    fwd, bwd = "sweep-fwd _softmax_fwd_config", "sweep-bwd _softmax_bwd_config"
    assert {key: r.status for key, r in got.items()} == {
        (fwd, "BLOCK_D=1024 BLOCK_N=2 num_warps=4"): "ok",
        (fwd, "BLOCK_D=1024 BLOCK_N=1 num_warps=4"): "ok",
        (fwd, "BLOCK_D=512 BLOCK_N=1 num_warps=4"): "wrong",
        (fwd, "BLOCK_D=1000 BLOCK_N=1 num_warps=4"): "failed",
        (bwd, "BLOCK_D=1024 BLOCK_N=2 num_warps=4"): "ok",
        (bwd, "BLOCK_D=1024 BLOCK_N=1 num_warps=4"): "ok",
    }
    assert all((r.ms is not None and r.ms > 0) == (r.status == "ok") for r in rows)
    today = [r.provider for r in rows if r.note == report.CURRENT]
    assert today == ["BLOCK_D=1024 BLOCK_N=2 num_warps=4", "BLOCK_D=1024 BLOCK_N=2 num_warps=4"]
    assert softmax_file._softmax_fwd_config(1024, True)["BLOCK_N"] == 2


def test_a_launcher_that_keeps_what_it_made_of_a_configuration_makes_it_anew(monkeypatch):
    kept = functools.cache(lambda: softmax_file._softmax_fwd_config(8, True)["num_warps"])
    monkeypatch.setattr(softmax_file, "_kept", kept, raising=False)
    launch = softmax_launch()
    today = kept()
    with sweep.replaced(launch, {"num_warps": today + 1}):
        assert kept() == today + 1
    assert kept() == today


def test_a_configuration_that_no_call_asks_is_a_mistake():
    with pytest.raises(ValueError, match="_softmax_fwd_config was not asked in a call"):
        sweep.configurations([], softmax_launch())


def test_a_sweep_needs_kernels(monkeypatch, capsys):
    monkeypatch.setattr(sweep, "interpreted", lambda: False)
    assert cli.main(["--mode", "sweep", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "--mode sweep: needs a GPU.\n"


def test_around_combines_what_there_is_and_leaves_out_what_idles_or_spills():
    today = {"BLOCK_D": 256, "num_warps": 4}
    candidates = around(BLOCK_N=(1, 2), BLOCK_D=(128, 1024, 8192), num_warps=(1, 4))(today)
    assert candidates == [
        {"BLOCK_D": 128, "num_warps": 1},
        {"BLOCK_D": 1024, "num_warps": 1},
        {"BLOCK_D": 1024, "num_warps": 4},
        {"BLOCK_D": 8192, "num_warps": 4},
    ]
    two_loops = {"BLOCK_D": 1024, "BLOCK_G": 1024, "num_warps": 4}
    assert around(num_warps=(4, 8))(two_loops) == []
    assert around(tile=("BLOCK_D",), num_warps=(4, 8))(two_loops) == [
        two_loops,
        two_loops | {"num_warps": 8},
    ]


def test_a_table_of_a_sweep_marks_what_is_far_from_the_best(tmp_path):
    def of(shape: str, settings: str, ms: float, note: str = "") -> Row:
        about = dataclasses.asdict(row(settings, ms, note=note))
        return Row(**about | {"shape": shape, "mode": "sweep-fwd _config"})

    rows = [of("a", "W=4", 1.04, report.CURRENT), of("a", "W=8", 1.0)]
    rows += [of("b", "W=4", 1.02, report.CURRENT), of("b", "W=8", 1.0)]
    rows += [of("c", "W=4", 1.0, report.CURRENT), of("c", "W=8", 2.0)]
    head, names, *lines = report.tables(rows).splitlines()
    assert head.startswith("rms_norm, sweep-fwd _config (ms, share of the floor; ")
    assert names.split() == ["now", "best", "slower"]
    assert [line.split() for line in lines] == [
        ["a", "W=4", "1.040", "50%", "W=8", "1.000", "50%", "4.0%*"],
        ["b", "W=4", "1.020", "50%", "W=8", "1.000", "50%", "2.0%"],
        ["c", "W=4", "1.000", "50%", "the", "same", "1.000", "50%", "0.0%"],
    ]
    assert plot.plot(rows, tmp_path) == []


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="there is no Triton to compile with"
)
def test_what_a_sweep_needs_is_compiled_ahead_without_a_gpu(tmp_path):
    code = """
from triton.backends.compiler import GPUTarget
from benchmarks import ahead

ahead.launch_nothing(GPUTarget("cuda", 90, 32), 132)
assert ahead.compile_case("softmax", "32768x256", 0, "bfloat16") == 0
"""
    outside = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=outside | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Forward and backward as they are, and the candidates; forward with gradients and without.
    spec = SPECS["softmax"]
    today = softmax_file._softmax_fwd_config(256, True)
    candidates = sweep.configurations([today], spec.launches[0])
    assert len(list(tmp_path.rglob("_softmax_fwd_kernel.cubin"))) == 2 * len(candidates)
    assert len(list(tmp_path.rglob("_softmax_bwd_kernel.cubin"))) == 1


# The layer


def test_a_layer_has_a_row_for_every_choice_of_ops(bench, monkeypatch):
    compiled = []

    def compile(function, **options):
        assert options["fullgraph"]
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    rows = bench(["rms_norm"], "--mode", "layer")
    assert len(compiled) == len(layer.CHOICES)
    assert [(r.shape, r.provider) for r in rows] == [
        (f"1x16 {how}", choice) for how in ("eager", "compiled") for choice in layer.CHOICES
    ]
    for r in rows:
        assert (r.op, r.mode, r.status) == ("layer", "layer", "ok"), r.note
        assert r.ms > 0


def test_a_wrong_layer_gets_no_time(bench, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr("liger_fn.functional.swiglu", lambda gate, up: gate * up)
    rows = bench(["rms_norm"], "--mode", "layer")
    status = {r.provider: (r.status, r.ms is None) for r in rows}
    assert status["swiglu"] == status["all"] == ("wrong", True)
    assert status["rope"] == ("ok", False)


def test_the_work_of_a_layer():
    # 218,103,808 weights in its matrices; 4096 · 4096 · 4096 products twice, half of them masked.
    sizes = layer.LLAMA_8B
    case = sizes.benchmark()
    assert case.flops_fwd == 2 * 4096 * (2 * 218103808 + 2 * 4096 * 4096)
    assert case.flops_bwd == 2 * case.flops_fwd
    tiny_layer = layer.weights(layer.TINY, DeviceDraw(CPU, torch.bfloat16))
    weights = sum(w.numel() for w in tiny_layer.values() if w.dim() == 2)
    assert layer.TINY.benchmark().flops_fwd == 16 * (2 * weights + 2 * 16 * 32)


def row(provider: str, ms: float | None, **facts) -> Row:
    facts = {"floor": 0.5, "status": "ok", "device": "Chip 1"} | facts
    return Row("rms_norm", "8x8", "full", "bfloat16", provider, ms=ms, **facts)


def test_csv_is_appended_read_back_and_never_mixed(tmp_path, bench):
    path = tmp_path / "new" / "rows.csv"
    rows = bench(["rms_norm"], "--providers", "eager", "--csv", str(path), "--commit", "abc")
    report.append(path, [row("b", 2.0)])
    back = report.read(path)
    assert [r.provider for r in back] == ["eager", "b"]
    assert back[0].commit == "abc"
    assert back[0].ms == pytest.approx(rows[0].ms, rel=1e-5)
    assert path.read_text().splitlines()[0] == ",".join(report.COLUMNS)

    other = tmp_path / "other.csv"
    other.write_text("something,else\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        report.append(other, rows)
    assert other.read_text() == "something,else\n1,2\n"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read: No such file or directory."),
        (b"\x89PNG\r\n\x1a\n", "is not a CSV file."),
        (b"a,b\n1,2\n", "has other columns than this program writes; name another file."),
        (b"COLUMNS\nrms_norm,8x8\n", "line 2 is not a row of results."),
        (b"COLUMNS\n" + b"x," * 22 + b"x\n", "line 2 is not a row of results."),
    ],
    ids=["missing", "binary", "columns", "short", "words"],
)
def test_a_file_that_is_none_of_ours_gets_one_sentence(tmp_path, capsys, content, sentence):
    path = tmp_path / "rows.csv"
    if content is not None:
        path.write_bytes(content.replace(b"COLUMNS", ",".join(report.COLUMNS).encode()))
        assert cli.main(["--csv", str(path), "--device", "cpu"]) == 2
        assert sentence in capsys.readouterr().err
    assert cli.main(["--table", "--csv", str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert sentence in printed.err


def test_a_file_that_cannot_be_written_is_found_before_the_run(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "rows.csv"
    assert cli.main(["--csv", str(path), "--device", "cpu"]) == 2
    assert capsys.readouterr().err == f"{path} cannot be written: File exists.\n"


def test_table_is_printed_from_a_file(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    report.append(path, [row("a", 2.0), row("b", 1.0)])
    assert cli.main(["--table", "--csv", str(path)]) == 0
    assert "8x8  2.000  50%   1.000  50%*" in capsys.readouterr().out
    assert cli.main(["swiglu", "--table", "--csv", str(path)]) == 0
    assert "8x8" not in capsys.readouterr().out


def test_table_marks_the_best_right_answer():
    rows = [row("a", 2.0), row("b", 1.0), row("c", None, status="wrong")]
    head, names, line = report.tables(rows).splitlines()
    assert head == "rms_norm, full (ms, share of the floor)"
    assert names.split() == ["a", "b", "c"]
    assert line.split() == ["8x8", "2.000", "50%", "1.000", "50%*", "wrong"]
    assert "\033[1m" in report.tables(rows, bold=True)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.0123456, "0.01235"), (1.0, "1.000"), (123.456, "123.5"), (98765.4, "98765")],
)
def test_significant_digits(value, text):
    assert report.significant(value) == text


def test_the_latest_of_equal_rows_counts():
    rows = report.latest([row("a", 2.0), row("b", 1.0), row("a", 3.0)])
    assert [(r.provider, r.ms) for r in rows] == [("a", 3.0), ("b", 1.0)]


def git(folder, *arguments):
    who = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    subprocess.run(("git", "-C", folder, *who, *arguments), check=True, capture_output=True)


def test_plots_come_from_committed_files_only(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    path = tmp_path / "rows.csv"
    report.append(path, [row("liger_fn", 1.0), row("eager", 2.0), row("bad", None, status="wrong")])
    assert cli.main(["--plot", "--csv", str(path)]) == 2
    assert "is not committed as it is" in capsys.readouterr().err
    git(tmp_path, "init")
    git(tmp_path, "add", "rows.csv")
    git(tmp_path, "commit", "-m", "rows")
    (drawn,) = plot.plot_files([path], tmp_path / "plots")
    assert drawn.name == "Chip_1-rms_norm-full.png"
    assert drawn.read_bytes().startswith(b"\x89PNG")
    report.append(path, [row("torch", 1.5)])
    with pytest.raises(ValueError, match="not committed"):
        plot.plot_files([path], tmp_path / "plots")


def test_plots_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["--plot"]) == 2
    assert capsys.readouterr().err == "Plots need matplotlib: pip install '.[bench]'.\n"


def test_commit_says_when_files_differ_from_it(tmp_path):
    assert cli.commit(tmp_path) == "unknown"
    git(tmp_path, "init")
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-m", "a")
    clean = cli.commit(tmp_path)
    assert len(clean) == 12
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "rows.csv").write_text("x")
    assert cli.commit(tmp_path) == clean
    (tmp_path / "a.py").write_text("2")
    assert cli.commit(tmp_path) == clean + "-dirty"


def test_first_line_names_the_error():
    assert providers.first_line(ValueError("a\nb")) == "ValueError: a"
    assert providers.first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
