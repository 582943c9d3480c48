"""Backends: which one runs where, and how to choose another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from liger_fn.functional import rms_norm, rope, using
from liger_fn.functional.core import backend
from liger_fn.functional.core.launch import interpreted
from liger_fn.functional.norm.rms_norm import reference

ROOT = Path(__file__).parents[1]


@pytest.fixture
def x(device):
    return torch.randn(3, 8, device=device)


def test_kernels_run_here(x):
    """The GPU's, or the interpreter's: conftest.py sees to it."""
    assert backend.kernels_on(x)


@pytest.mark.parametrize(
    ("name", "kernels"), [("reference", False), ("kernels", True), ("interpret", True)]
)
def test_using(name, kernels, x):
    with using(name):
        assert backend.kernels_on(x) == kernels
        torch.testing.assert_close(rms_norm(x), reference(x))
    assert backend.kernels_on(x)


def test_auto_is_kernels_on_gpus_and_the_reference_on_cpus(x):
    with using("auto"):
        assert backend.kernels_on(x) == x.is_cuda
        assert backend.kernels_on(torch.empty(1, device="meta"))


def test_auto_lays_out_what_is_on_meta_as_the_kernels_do():
    q, k = (torch.empty(2, 3, h, 4, device="meta").transpose(1, 2) for h in (2, 1))
    angles = torch.empty(3, 4, device="meta")
    strides = {}
    for name in ("auto", "kernels"):
        with using(name):
            leaves = [t.detach().requires_grad_() for t in (q, k)]
            outputs = rope(*leaves, angles, angles)
            grads = torch.autograd.grad(outputs, leaves, [t.contiguous() for t in outputs])
        strides[name] = [t.stride() for t in (*outputs, *grads)]
    assert strides["auto"] == strides["kernels"]
    assert strides["auto"][0] == q.stride()


def test_using_nests_and_restores_after_an_error(x):
    with using("reference"):
        with pytest.raises(ZeroDivisionError), using("kernels"):
            assert 1 // (not backend.kernels_on(x))
        assert not backend.kernels_on(x)
    assert backend.kernels_on(x)


def test_using_an_unknown_backend():
    sentence = (
        r"^using: `backend` must be one of auto, kernels, interpret, reference; got 'fast'\.$"
    )
    with pytest.raises(ValueError, match=sentence), using("fast"):
        pass


def test_the_reference_backend_launches_nothing(x, monkeypatch):
    from liger_fn.functional.norm import rows as room

    def launched(*args, **kwargs):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(room._norm_fwd_kernel, "run", launched)
    with using("reference"):
        assert torch.equal(rms_norm(x), reference(x))
    with pytest.raises(AssertionError, match="a kernel was launched"):
        rms_norm(x)


def test_why_names_the_backend_and_a_reason(device):
    name, reason = backend.why(device)
    assert name == ("interpreter" if interpreted() else "kernels")
    assert reason
    with using("reference"):
        assert backend.why(device) == ("reference", 'using("reference") is in force')


def test_first_tensor_says_where_a_call_runs(x):
    assert backend.first((None, 3.0, x, torch.empty(1, device="meta"))) is x


def test_on_device_launches_on_the_device_of_its_tensors(device):
    if torch.cuda.device_count() < 2:
        assert (
            backend.on_device(lambda x: x.device)(torch.empty(1, device=device)).type == device.type
        )
        return
    current = backend.on_device(lambda x: torch.cuda.current_device())
    assert [current(torch.empty(1, device=f"cuda:{i}")) for i in range(2)] == [0, 1]


def _python(code: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_without_the_interpreter_cpu_tensors_take_the_reference():
    _python(
        "import torch\n"
        "from liger_fn.functional import rms_norm\n"
        "from liger_fn.functional.core import backend\n"
        "from liger_fn.functional.norm.rms_norm import reference\n"
        "x = torch.randn(3, 8)\n"
        "assert not backend.kernels_on(x)\n"
        "assert backend.why(x.device) == ('reference', 'Triton has no compiler for cpu tensors')\n"
        "assert torch.equal(rms_norm(x), reference(x))\n"
    )


def test_without_triton_the_reference_runs_and_kernels_are_refused():
    _python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from liger_fn.functional import rms_norm, using\n"
        "from liger_fn.functional.core import backend\n"
        "from liger_fn.functional.norm.rms_norm import reference\n"
        "x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8)\n"
        "y = rms_norm(x, w)\n"
        "y.sum().backward()\n"
        "assert torch.equal(y, reference(x, w)) and x.grad is not None\n"
        "assert backend.why(x.device)[0] == 'reference'\n"
        "for name in ('kernels', 'interpret'):\n"
        "    try:\n"
        "        with using(name): pass\n"
        "    except RuntimeError as error:\n"
        "        assert str(error) == f'using: {name!r} needs Triton, which cannot be imported.'\n"
        "    else:\n"
        "        raise AssertionError(name)\n"
    )
