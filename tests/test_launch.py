"""Launching: when, with what memory, and with what sizes."""

import pytest
import torch

from liger_fn.functional.core import launch


def test_accumulator_is_float32_unless_the_input_is_float64():
    kinds = {
        torch.float16: torch.float32,
        torch.bfloat16: torch.float32,
        torch.float32: torch.float32,
        torch.float64: torch.float64,
    }
    assert {dtype: launch.accumulator(dtype) for dtype in kinds} == kinds


@pytest.mark.parametrize(
    ("n", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (4096, 4096), (4097, 8192)]
)
def test_next_power_of_2(n, power):
    assert launch.next_power_of_2(n) == power


@pytest.mark.parametrize(("a", "b", "parts"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2)])
def test_cdiv(a, b, parts):
    assert launch.cdiv(a, b) == parts


def test_nothing_is_launched_for_shapes_alone_or_for_no_elements():
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert launch.has_work(torch.empty(2, 3))
    assert not launch.has_work(torch.empty(0, 3))
    assert not launch.has_work(torch.empty(2, 3, device="meta"))
    with FakeTensorMode():
        # The Meta kernel of an op gets fake tensors as meta tensors.
        assert not launch.has_work(torch.empty(2, 3).to("meta"))


@pytest.mark.parametrize(
    ("x", "shares"),
    [
        (torch.randn(4, 8), True),
        (torch.randn(2, 3, 8), True),
        (torch.randn(8), True),
        (torch.randn(4, 16)[:, :8], True),
        (torch.randn(6, 8)[::2], True),
        (torch.randn(1, 8).expand(4, 8), True),
        (torch.randn(8, 4).t(), False),
        (torch.randn(4, 16)[:, ::2], False),
        (torch.randn(3, 2, 8).transpose(0, 1), False),
    ],
    ids=[
        "dense",
        "3d",
        "1d",
        "wide",
        "every-other-row",
        "expanded",
        "transposed",
        "every-other",
        "swapped",
    ],
)
def test_as_rows_views_where_a_view_can(x, shares):
    rows = launch.as_rows(x)
    assert rows.shape == (x.numel() // x.shape[-1], x.shape[-1])
    assert rows.stride(-1) == 1
    assert torch.equal(rows, x.reshape(rows.shape))
    assert (rows.data_ptr() == x.data_ptr()) == shares


def test_as_rows_of_a_single_column():
    column = torch.randn(5, 3)[:, 1:2]
    assert launch.as_rows(column).data_ptr() == column.data_ptr()


@pytest.mark.parametrize(
    ("x", "stride"),
    [
        (torch.randn(4, 8), 8),
        (torch.randn(2, 3, 8), 8),
        (torch.randn(8), 8),
        (torch.randn(4, 16)[:1, :8], 8),
        (torch.randn(4, 16)[:, :8], 16),
        (torch.randn(1, 8).expand(4, 8), 0),
        (torch.randn(8, 4).t(), 8),
        (torch.randn(3, 2, 8).transpose(0, 1), 8),
    ],
    ids=["dense", "3d", "1d", "one", "wide", "expanded", "columns", "swapped"],
)
def test_rows_of_are_where_a_kernel_looks_for_them(x, stride):
    rows, distance = launch.rows_of(x)
    assert distance == stride
    assert rows is x or not x.is_contiguous()
    N, D = x.numel() // x.shape[-1], x.shape[-1]
    assert torch.equal(rows.as_strided((N, D), (distance, 1)), x.reshape(N, D))


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
def test_per_row_has_the_shape_of_the_rows(shape):
    made = launch.per_row(torch.empty(shape, dtype=torch.bfloat16), torch.float32)
    assert (made.shape, made.dtype) == (shape[:-1], torch.float32)
    assert made.is_contiguous()


def test_unit_stride():
    dense, sparse = torch.randn(8), torch.randn(16)[::2]
    assert launch.unit_stride(None) is None
    assert launch.unit_stride(dense) is dense
    assert launch.unit_stride(sparse).is_contiguous()
    assert torch.equal(launch.unit_stride(sparse), sparse)


def test_sm_count(device):
    """Several even where there are none, so that the interpreter adds partial sums too."""
    assert launch.sm_count(device) > 1


def test_triton_dtype():
    tl = pytest.importorskip("triton.language", reason="needs Triton")
    assert launch.triton_dtype(torch.bfloat16) is tl.bfloat16
    assert launch.triton_dtype(torch.float64) is tl.float64


def test_what_stands_for_an_absent_triton():
    """Only where Triton is missing is the class used, so a process without Triton shows it."""
    import subprocess
    import sys
    from pathlib import Path

    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from liger_fn.functional.core.launch import TRITON_MISSING, interpreted, tl, triton\n"
        "assert 'triton' in TRITON_MISSING and not interpreted()\n"
        "f = lambda: 3\n"
        "assert triton.jit(f) is f and triton.jit(do_not_specialize=[1])(f) is f\n"
        "tl.constexpr, tl.math.exp, triton.heuristics({})(f)\n"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=120)
