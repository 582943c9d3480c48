"""What only a GPU can show: streams, graphs, large offsets, several devices."""

import contextlib
import os
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from liger_fn.testing.call import (
    Call,
    assert_close,
    assert_same_bits,
    cotangents_like,
    gradients,
    loss,
)
from liger_fn.testing.properties.registry import NotApplicable, holds_for

try:
    import fcntl
except ImportError:
    # Windows, which has no such lock.
    fcntl = None  # type: ignore[assignment]


def _run(call: Call):
    return gradients(call.op(), call.tensors(requires_grad=True))


@holds_for("cases", cuda=True)
def no_host_sync(spec, case, device):
    """Neither pass waits for the device."""
    call = Call(spec, case, device, torch.float32)
    tensors = call.tensors(requires_grad=True)
    given = cotangents_like(_run(call)[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(call.op(), tensors, given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@holds_for("cases", cuda=True)
def cuda_graph(spec, case, device):
    """Captured once and replayed on other values, it gives what eager code gives."""
    call = Call(spec, case, device, torch.float32)
    expected = _run(call)
    tensors = call.tensors(requires_grad=True)
    given = cotangents_like(expected[0])
    values = [t.detach().clone() for t in tensors]

    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        for t in tensors:
            t.zero_()
    with torch.cuda.graph(graph):
        captured = gradients(call.op(), tensors, given)
    with torch.no_grad():
        for t, value in zip(tensors, values, strict=True):
            t.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(sum(captured, ()), sum(expected, ()), "the replayed graph")


@holds_for("first", cuda=True)
def reduce_overhead(spec, case, device):
    """torch.compile puts it into CUDA graphs of its own."""
    call = Call(spec, case, device)
    torch._dynamo.reset()
    f = torch.compile(loss(call.op()), fullgraph=True, mode="reduce-overhead")
    tensors = call.tensors(requires_grad=True)
    expected = torch.autograd.grad(loss(call.reference())(*tensors), tensors)
    for _ in range(3):  # it warms up, records, replays
        torch.compiler.cudagraph_mark_step_begin()
        assert_close(torch.autograd.grad(f(*tensors), tensors), expected)


@holds_for("spec", cuda=True)
def large_offsets(spec, case, device):
    """Past 2^31 elements the last rows are what they are when they stand alone."""
    if spec.huge is None:
        raise NotApplicable("the spec names no huge case")
    with alone_on(str(torch.cuda.get_device_properties(device).uuid)):
        _last_rows_are_those_alone(Call(spec, spec.huge, device, torch.bfloat16))


def _last_rows_are_those_alone(call: Call) -> None:
    tail = call.where(**{n: call.arguments[n][-4:] for n in call.rows})
    last = {n: i for i, n in enumerate(call.wrt) if n in call.rows}

    outputs, grads = _run_on_rows(call)
    tail_outputs, tail_grads = _run_on_rows(tail)
    assert_same_bits([o[-4:] for o in outputs], tail_outputs, "the last rows")
    for n, i in last.items():
        if n in call.spec.parted:
            assert_close(grads[i][-4:], tail_grads[i], rtol=torch.finfo(tail_grads[i].dtype).eps)
        else:
            assert_same_bits([grads[i][-4:]], [tail_grads[i]], f"the last rows of d{n}")


@contextlib.contextmanager
def alone_on(device: str) -> Iterator[None]:
    """Wait until no other process is in here with this device; leave no memory of it in use.

    Large tensors of several test processes at once would not fit.
    """
    with _locked(f"liger_fn-{device}"):
        torch.cuda.empty_cache()
        try:
            yield
        except BaseException as error:
            # The frames that it came through hold the tensors.
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            torch.cuda.empty_cache()


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    """Hold a lock between the processes of a user; the system frees it if this one dies."""
    if fcntl is None:
        yield
        return
    with (Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run_on_rows(call: Call):
    tensors = call.tensors(requires_grad=True)
    outputs = call.op()(*tensors)
    return outputs, torch.autograd.grad(outputs, tensors, [torch.ones_like(o) for o in outputs])


@holds_for("first", cuda=True)
def another_device(spec, case, device):
    """Tensors on a GPU that is not the current one are computed there."""
    if torch.cuda.device_count() < 2:
        raise NotApplicable("needs two CUDA devices")
    expected = _run(Call(spec, case, "cuda:0", torch.float32))
    with torch.cuda.device(0):
        got = _run(Call(spec, case, "cuda:1", torch.float32))
    assert all(t.device.index == 1 for t in sum(got, ()))
    assert_same_bits([t.to("cuda:0") for t in sum(got, ())], sum(expected, ()), "on cuda:1")
