"""What proves the ops must itself be able to fail: broken ops, and the commands of the proof."""

import csv
import functools
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from liger_fn.functional import rms_norm
from liger_fn.testing import verify
from liger_fn.testing.properties import PROPERTIES, NotApplicable
from liger_fn.testing.properties.cuda import alone_on
from liger_fn.testing.specs.rms_norm import SPEC

ROOT = Path(__file__).parents[1]


def around(change):
    """rms_norm, its result changed: `change(y, x)`."""

    @functools.wraps(rms_norm)
    def broken(x, weight=None, **options):
        return change(rms_norm(x, weight, **options), x)

    return broken


@functools.wraps(rms_norm)
def in_dense_memory(x, weight=None, **options):
    strides = torch.empty(x.shape, device="meta").stride()
    return rms_norm(x.as_strided(x.shape, strides), weight, **options)


@functools.wraps(rms_norm)
def unchecked(x, weight=None, **options):
    return x


def undocumented(x, weight=None, *, eps=1e-6, offset=0.0, cast_before_weight=False):
    """Normalise."""


def other_default(x, weight=None, *, eps=1e-5, offset=0.0, cast_before_weight=False):
    """Normalise."""


@functools.wraps(rms_norm)
def writes_its_argument(x, weight=None, **options):
    x.detach().mul_(1.0)
    return rms_norm(x, weight, **options)


def by_rows(y, x):
    for _ in range(x.shape[0]):
        y = y * 1.0
    return y


def breaks_the_graph(y, x):
    torch._dynamo.graph_break()
    return y


class Undifferentiated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy.detach()


class Aliased(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x):
        return x.detach()

    @staticmethod
    def backward(ctx, dy):
        return dy.clone(), dy.clone()


BROKEN = {
    "accuracy": (around(lambda y, x: y * 1.001), "result 0, torch.float32: error"),
    "purity": (writes_its_argument, "was written"),
    "purity of memory": (around(Aliased.apply), "shares memory with an argument"),
    "determinism": (around(lambda y, x: y + torch.rand_like(y)), "a second call: .* other bits"),
    "strides": (in_dense_memory, "not close"),
    "unwritten_memory": (around(lambda y, x: y + 0 * torch.empty_like(y)), "full of NaN"),
    "gradcheck": (around(lambda y, x: 2 * y - y.detach()), "Jacobian mismatch"),
    "gradgradcheck": (around(lambda y, x: Undifferentiated.apply(y)), "mismatch"),
    "partial_requires_grad": (
        around(lambda y, x: y if x.requires_grad else 2 * y),
        r"the gradients of \('weight',\) alone: .* not close",
    ),
    "autocast": (around(lambda y, x: y @ torch.eye(len(y.T)).to(y)), "another type|other bits"),
    "dual_numbers": (around(lambda y, x: y.detach()), "None is not tensor"),
    "vmap_each": (around(lambda y, x: y + x.sum()), "not close"),
    "compiled": (around(breaks_the_graph), "graph_break"),
    "compiled_dynamic": (around(by_rows), "compilations after each size"),
    "shapes": (around(lambda y, x: y.float() if x.is_meta else y), "meta"),
    "export": (functools.wraps(rms_norm)(SPEC.reference), "no op reached the dispatcher"),
    "errors": (unchecked, "x integer: <class 'TypeError'> expected; got None"),
    "documentation": (undocumented, "there is but one line"),
    "signature": (other_default, "eps"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_ops_are_caught(name, device):
    op, sentence = BROKEN[name]
    spec, property = replace(SPEC, op=op), PROPERTIES[name.partition(" ")[0]]
    property.check(SPEC, SPEC.cases[0], device)
    with pytest.raises(Exception, match=sentence) as raised:
        property.check(spec, spec.cases[0], device)
    assert raised.type is not NotApplicable


# One large test at a time


@pytest.fixture
def locks(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_device_is_held_by_one_at_a_time(locks):
    fcntl = pytest.importorskip("fcntl", reason="this system has no locks of this kind")

    def take():
        (path,) = locks.iterdir()
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    with alone_on("device"), pytest.raises(BlockingIOError):
        take()
    take()


def test_a_failure_leaves_no_tensor_behind(locks):
    tensors = []

    def fails():
        large = torch.ones(3)
        tensors.append(weakref.ref(large))
        raise AssertionError("the last rows")

    with pytest.raises(AssertionError, match="the last rows") as kept, alone_on("device"):
        fails()
    assert kept.tb is not None
    assert tensors[0]() is None


# The commands


def test_verify_prints_a_table_and_writes_every_outcome(tmp_path, capsys):
    path = tmp_path / "outcomes.csv"
    arguments = ["rms_norm", "--property", "signature", "--property", "one_result"]
    assert verify.main([*arguments, "--csv", str(path)]) == 0

    printed = capsys.readouterr().out
    assert "signature         ok" in printed
    assert "one_result         -" in printed
    assert printed.endswith("1 ok, 0 failed, 1 not applicable\n")
    with path.open() as file:
        rows = {row["property"]: row for row in csv.DictReader(file)}
    assert rows["signature"]["outcome"] == "ok"
    assert rows["one_result"]["message"] == "there is one result"


def test_verify_reports_failures(monkeypatch, capsys):
    broken = replace(SPEC, op=undocumented)
    monkeypatch.setattr("liger_fn.testing.specs.specs", lambda: (broken,))
    assert verify.main(["--property", "documentation", "--property", "signature"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED undocumented documentation 4x8: AssertionError: there is but one line" in printed
    assert printed.endswith("1 ok, 1 failed, 0 not applicable\n")


@pytest.mark.parametrize("arguments", [["no_op"], ["--property", "no_property"]])
def test_verify_names_what_it_knows(arguments, capsys):
    assert verify.main(arguments) == 2
    assert "must be one of" in capsys.readouterr().err


def test_the_interpreter_gives_the_same_bits_sooner():
    code = """
import torch
from triton.runtime import interpreter as tritons
from liger_fn.functional import cross_entropy, softmax, swiglu
from liger_fn.testing import interpreter

torch.manual_seed(0)
x, target = torch.randn(5, 70, requires_grad=True), torch.arange(5)

def both_passes():
    ours = cross_entropy(x, target) + (softmax(x) * swiglu(x, x)).sum()
    return ours, *torch.autograd.grad(ours, x)

calls, original = [], tritons._patch_builtin
tritons._patch_builtin = lambda *a: calls.append(a) or original(*a)
before, as_it_was = both_passes(), len(calls)
interpreter.hasten()
assert tritons.interpreter_builder.options.sanitize_overflow is False
calls.clear()
after = both_passes()
assert all(map(torch.equal, before, after))
assert len(calls) < as_it_was / 2, (len(calls), as_it_was)
"""
    run = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120}
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, **run)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_table_is_cut_into_blocks_that_fit():
    outcomes = [verify.Outcome(f"op_{i}", "purity", "case", verify.OK, 0.0) for i in range(9)]
    blocks = verify.table(outcomes, width=40).split("\n\n")
    assert len(blocks) == 3
    assert max(len(line) for block in blocks for line in block.splitlines()) <= 40


def compilation(
    *arguments: str, seconds: int, interpret: bool = False
) -> subprocess.CompletedProcess:
    """Run the command; at the end of its time its processes end too, which else would hold a pipe.

    What is waited for then never comes.
    """
    outside = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        [sys.executable, "-m", "liger_fn.testing.compilation", *arguments],
        cwd=ROOT,
        env=outside | ({"TRITON_INTERPRET": "1"} if interpret else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, *printed)


def test_every_kernel_compiles_for_every_chip():
    done = compilation(seconds=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_kernel_compiles_within_its_limit_of_registers():
    """Without one that of a wide softmax takes more than fifty."""
    done = compilation("softmax", "--chips", "90", seconds=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (line,) = (line.split() for line in done.stdout.splitlines() if " fwd-32768 " in line)
    assert int(line[3]) <= 40, line


def test_compilation_refuses_the_interpreter():
    done = compilation(seconds=120, interpret=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET must be unset" in done.stderr
