"""Direct launches: what is launched without asking Triton, and when Triton is asked."""

import inspect
import itertools
from types import SimpleNamespace

import pytest
import torch

from liger_fn.functional import swiglu
from liger_fn.functional.core import direct
from liger_fn.functional.core.direct import Bound, launch

triton = pytest.importorskip("triton", reason="needs Triton")

DEVICE, STREAM = 3, 7


class Kernel:
    """Stands for a kernel of Triton's, and notes how it is launched.

    Attributes:
        by_triton: grid, arguments and constants of each launch by Triton.
        directly: of each direct launch the arguments for which Triton had compiled, and what the
            compiled kernel got.
    """

    def __init__(self, *parameters: str) -> None:
        self.by_triton: list[tuple] = []
        self.directly: list[tuple] = []
        self.pre_run_hooks: list = []
        names = parameters or ("x", "y")
        self.params = [SimpleNamespace(is_constexpr=n.isupper()) for n in names]

    def run(self, grid, *args, enable_fp_fusion, **constants):
        assert enable_fp_fusion
        self.by_triton.append((grid, args, constants))
        return SimpleNamespace(
            run=lambda *got: self.directly.append((args, got)),
            function="function",
            packed_metadata="metadata",
        )

    def __getitem__(self, grid):
        return lambda *args, **constants: self.run(grid, *args, **constants)

    @property
    def counts(self) -> tuple[int, int]:
        return len(self.by_triton), len(self.directly)


@pytest.fixture
def known(monkeypatch):
    """A Triton that is known, on a device that need not be here."""
    monkeypatch.setattr(direct, "_KNOWN_RUN", Kernel.run)
    monkeypatch.setattr(direct, "_current_device", lambda: DEVICE)
    monkeypatch.setattr(direct, "_current_stream", lambda device: STREAM + device)


@pytest.fixture
def x():
    return torch.randn(64)


def test_triton_launches_first_and_is_not_asked_again(known, x):
    kernel = Kernel("x", "y", "BLOCK")
    for _ in range(3):
        launch(kernel, (5,), x, 8, BLOCK=16)
    assert kernel.by_triton == [((5,), (x, 8), {"BLOCK": 16})]
    got = (5, 1, 1, STREAM + DEVICE, "function", "metadata", None, None, None, x.data_ptr(), 8)
    assert [how for _, how in kernel.directly] == [(*got, None)] * 2


@pytest.mark.parametrize("grid", [(5,), (5, 6), (5, 6, 7)])
def test_a_grid_has_three_sizes(known, grid, x):
    kernel = Kernel()
    for _ in range(2):
        launch(kernel, grid, x, None)
    assert kernel.directly[0][1][:3] == (*grid, 1, 1)[:3]


def test_a_kernel_with_its_constants(known, x):
    kernel = Kernel("x", "y", "BLOCK")
    bound = Bound(kernel, BLOCK=16)
    for rows in (1, 2):
        bound((rows,), x, 8)
    assert bound.constants == {"BLOCK": 16}
    assert kernel.by_triton == [((1,), (x, 8), {"BLOCK": 16})]
    assert len(kernel.directly) == 1


def test_memory_may_move(known, x):
    kernel = Kernel()
    moved = [x, x.clone(), x + 1]
    for tensor in moved:
        launch(kernel, (1,), tensor, 8)
    assert kernel.counts == (1, 2)
    assert [how[9] for _, how in kernel.directly] == [t.data_ptr() for t in moved[1:]]


def test_constants_have_compiled_kernels_of_their_own(known, x):
    kernel = Kernel("x", "y", "BLOCK", "OTHER")
    kinds = [{"BLOCK": 1, "OTHER": 2}, {"BLOCK": 2, "OTHER": 1}, {"OTHER": 1, "BLOCK": None}]
    for constants in kinds * 2:
        launch(kernel, (1,), x, 8, **constants)
    assert [constants for _, _, constants in kernel.by_triton] == kinds


def test_kernels_are_told_apart(known, x):
    kernels = [Kernel(), Kernel()]
    for kernel in kernels * 2:
        launch(kernel, (1,), x, 8)
    assert [kernel.counts for kernel in kernels] == [(1, 1), (1, 1)]


def test_devices_are_told_apart(known, x, monkeypatch):
    kernel = Kernel()
    for device in (0, 1, 0, 1):
        monkeypatch.setattr(direct, "_current_device", lambda device=device: device)
        launch(kernel, (1,), x, 8)
    assert kernel.counts == (2, 2)
    assert [how[3] for _, how in kernel.directly] == [STREAM, STREAM + 1]


def test_arguments_that_triton_tells_apart_are_told_apart(known):
    """By Triton's own word, on every pair of a list of arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    def of_two(x, y):
        pass

    jit = JITFunction(of_two)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(jit.signature, jit.params, backend)
    memory = torch.zeros(256, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % 16 :]
    tensors = [memory[i : i + 64].view(d) for i in (0, 8) for d in (torch.int8, torch.float64)]
    numbers = [None, True, False, 0, 1, 2, 16, 17, 32, -1, -16, 2**31, 2**32, 1.0, 2.0]

    kernel, pairs = Kernel(), list(itertools.product([*tensors, *numbers], repeat=2))
    for pair in pairs * 2:
        launch(kernel, (1,), *pair)
        if kernel.directly:
            compiled_for = kernel.directly.pop()[0]
            assert str(binder(*compiled_for)[1]) == str(binder(*pair)[1])
    assert len(kernel.by_triton) == len(pairs)


def test_arguments_by_name_are_left_to_triton(known, x):
    """Without their place in the signature they cannot be passed on."""
    kernel = Kernel()
    for _ in range(2):
        launch(kernel, (1,), x, y=8)
    assert kernel.counts == (2, 0)


def test_what_was_not_compiled_is_not_remembered(known, x, monkeypatch):
    """Triton's jit_cache_hook may forbid to compile: nothing is launched then."""
    kernel = Kernel()
    with pytest.MonkeyPatch.context() as forbidding:
        forbidding.setattr(Kernel, "__getitem__", lambda self, grid: lambda *args, **options: None)
        launch(kernel, (1,), x, 8)
    for _ in range(2):
        launch(kernel, (1,), x, 8)
    assert kernel.counts == (1, 1)


def test_what_is_remembered_is_bounded(known, x, monkeypatch):
    monkeypatch.setattr(direct, "MOST", 4)
    monkeypatch.setattr(direct, "_bound", {})
    kernel = Kernel("x", "y", "BLOCK")
    for n in range(30):
        launch(kernel, (1,), x, n, BLOCK=0)
        launch(kernel, (1,), x, 0, BLOCK=n)
    kept = direct._bound.values()
    assert len(kept) <= 4
    assert all(len(bound._compiled) <= 4 for bound in kept)


# When Triton must see the launch


def test_an_unknown_triton_launches_itself(known, x, monkeypatch):
    monkeypatch.setattr(direct, "_KNOWN_RUN", None)
    kernel = Kernel()
    for _ in range(3):
        launch(kernel, (1,), x, 8)
    assert kernel.counts == (3, 0)


def _replace_run(kernel, monkeypatch):
    monkeypatch.setattr(kernel, "run", lambda *a, run=kernel.run, **k: run(*a, **k))


def _replace_run_of_all(kernel, monkeypatch):
    monkeypatch.setattr(Kernel, "run", lambda *a, run=Kernel.run, **k: run(*a, **k))


def _hook_before_run(kernel, monkeypatch):
    kernel.pre_run_hooks.append(print)


def _knob(knobs: str, name: str, value):
    def turn(kernel, monkeypatch):
        monkeypatch.setattr(getattr(triton.knobs, knobs), name, value)

    return turn


def _chain(name: str):
    def add(kernel, monkeypatch):
        monkeypatch.setattr(getattr(triton.knobs.runtime, name), "calls", [print])

    return add


WATCHERS = {
    "run": _replace_run,
    "run_of_all": _replace_run_of_all,
    "pre_run_hook": _hook_before_run,
    "enter_hook": _knob("runtime", "launch_enter_hook", print),
    "exit_hook": _knob("runtime", "launch_exit_hook", print),
    "enter_chain": _chain("launch_enter_hook"),
    "exit_chain": _chain("launch_exit_hook"),
    "stages": _knob("runtime", "add_stages_inspection_hook", print),
    "debug": _knob("runtime", "debug", True),
    "instrumentation": _knob("compilation", "instrumentation_mode", "consan"),
}


@pytest.mark.parametrize("watcher", WATCHERS)
def test_triton_sees_the_launch_if_it_is_watched(known, watcher, x):
    kernel = Kernel()
    for _ in range(2):
        launch(kernel, (1,), x, 8)
    with pytest.MonkeyPatch.context() as watching:
        WATCHERS[watcher](kernel, watching)
        launch(kernel, (1,), x, 8)
        assert kernel.counts == (2, 1)
    kernel.pre_run_hooks.clear()
    launch(kernel, (1,), x, 8)
    assert kernel.counts == (2, 2)


# Triton itself


def test_this_triton_launches_as_we_do():
    """If not, a call costs more of the host's time, and direct.py wants to learn the new way."""
    run = inspect.getsource(triton.runtime.jit.JITFunction.run)
    assert direct._unspaced(direct._TRITONS_CALL) in direct._unspaced(run)


def test_a_triton_that_launches_in_another_way_is_unknown(monkeypatch):
    monkeypatch.setattr(direct, "interpreted", lambda: False)
    monkeypatch.setattr(direct, "_current_stream", lambda device: STREAM)
    monkeypatch.setattr(torch.version, "hip", None)
    known = triton.runtime.jit.JITFunction.run
    assert direct._known_run() is known

    def run(self, *args, grid, warmup, **kwargs):
        return self.launch(grid, *args)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    assert direct._known_run() is None
    # Without a source.
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", len)
    assert direct._known_run() is None


@pytest.mark.parametrize("hip", [None, "7.0"])
def test_amd_is_told_no_limit_of_registers(monkeypatch, hip):
    monkeypatch.setattr(torch.version, "hip", hip)
    constants = Bound(Kernel(), BLOCK=8, maxnreg=40).constants
    assert constants == {"BLOCK": 8} | ({} if hip else {"maxnreg": 40})


def test_the_interpreter_is_unknown(monkeypatch):
    monkeypatch.setattr(direct, "interpreted", lambda: True)
    assert direct._known_run() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="launches on a GPU")
def test_direct_launches_give_the_same_bits(monkeypatch):
    # Wide rows and odd ones, aligned and not: several compiled kernels of one kernel.
    memory = torch.randn(2, 4, 257, device="cuda")
    given = [memory[..., a:b] for a, b in ((0, 256), (1, 257), (0, 1), (0, 255), (4, 100))]
    monkeypatch.setattr(direct, "_KNOWN_RUN", None)
    by_triton = [swiglu(*pair) for pair in given]
    monkeypatch.undo()

    asked = []
    remember = Bound._remember
    monkeypatch.setattr(Bound, "_remember", lambda *a: asked.append(a) or remember(*a))
    monkeypatch.setattr(direct, "_bound", {})
    counts = []
    for _ in range(3):
        for pair, expected in zip(given, by_triton, strict=True):
            assert torch.equal(swiglu(*pair), expected)
        counts.append(len(asked))
    assert counts == [len(given)] * 3
