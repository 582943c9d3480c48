"""What every test stands on: the interpreter where there is no GPU, one thread, seeds, and NaN in
memory that nobody has written yet."""

from __future__ import annotations

import os
import random
import tempfile

# Read when torch is imported; pytest-xdist runs one worker per core already.
for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
# cuBLAS keeps its order of summation only with a workspace of its own.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# No test asks the network, opens a window, or warns about forked tokenizers.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Apart from what Inductor wrote for other programs, and from what another worker is writing.
_inductor = tempfile.TemporaryDirectory(prefix="liger_fn-inductor-", ignore_cleanup_errors=True)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _inductor.name

import pytest
import torch

# Triton reads this when it is imported, and decides once for the process.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from liger_fn.testing import interpreter

torch.set_num_threads(1)
interpreter.hasten()


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """Fill what `torch.empty` and its kin return with NaN (the largest value for integers).

    A kernel that leaves an element unwritten, or reads one before it is written, then shows it.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture
def reference_path():
    """Compute by the references: of the adapter, not the kernels are in question."""
    from liger_fn.functional import using

    with using("reference"):
        yield


@pytest.fixture
def model():
    """A small Llama that trains."""
    from liger_fn.testing.tiny_models import tiny_model

    return tiny_model("llama").train()


@pytest.fixture
def inputs(model):
    """A batch for it."""
    from liger_fn.testing.tiny_models import tiny_inputs

    return tiny_inputs(model)


@pytest.fixture
def device() -> torch.device:
    """The device that kernels run on here: the GPU, or the CPU through the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def on_device(device):
    """The kernels on a GPU, the references on the CPU: who uses the ops is in question."""
    from liger_fn.functional import using

    with using("kernels" if device.type == "cuda" else "reference"):
        yield device


def _interpreter_cannot_loop() -> bool:
    """Triton 3.6 takes int() of an array of one element, which NumPy 2.4 no longer gives."""
    import numpy

    try:
        import triton
    except ImportError:
        return False
    numbers = [tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, numpy)]
    return numbers[0] < (3, 7) and numbers[1] >= (2, 4)


@pytest.fixture
def interpreter_loops() -> None:
    """Skip what interprets loops where that interpreter cannot."""
    if _interpreter_cannot_loop():
        pytest.skip("Triton 3.6's interpreter cannot loop with NumPy 2.4")
