"""Graphs of the op: torch.compile, torch.export, shapes alone, the dispatcher's own checks."""

import re
from collections.abc import Callable, Sequence

import torch
import torch._dynamo.testing
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from liger_fn.testing.call import (
    Call,
    assert_close,
    dispatched,
    forward_ops,
    is_float,
    is_tensor,
    loss,
)
from liger_fn.testing.properties.autograd import saving
from liger_fn.testing.properties.registry import PROPERTIES, NotApplicable, Property, holds_for
from liger_fn.testing.properties.transforms import TRANSFORMS


def _compiled(f: Callable, backend="aot_eager", **options) -> Callable:
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend=backend, **options)


def _grads_of_loss(f: Callable, call: Call):
    tensors = call.tensors(requires_grad=True)
    value = f(*tensors)
    return value, torch.autograd.grad(value, tensors)


@holds_for("cases")
def compiled(spec, case, device):
    """One graph, forward and backward."""
    call = Call(spec, case, device)
    got = _grads_of_loss(_compiled(loss(call.op())), call)
    assert_close(got, _grads_of_loss(loss(call.reference()), call))


@holds_for("first")
def compiled_by_inductor(spec, case, device):
    """The same through Inductor, with and without gradients, and no copies around the op."""
    call = Call(spec, case, device)
    f = _compiled(loss(call.op()), "inductor")
    # A cache would give back the code of a run in which the op had other strides.
    with torch._inductor.config.patch(force_disable_caches=True):
        got, codes = run_and_get_code(_grads_of_loss, f, call)
    assert_close(got, _grads_of_loss(loss(call.reference()), call))
    assert all(f"liger_fn.{op.__name__}(" in "".join(codes) for op in forward_ops(call))
    assert copying_kernels(codes) == []
    with torch.no_grad():
        assert_close(f(*call.tensors()), loss(call.reference())(*call.tensors()))


@holds_for("first")
def compiled_dynamic(spec, case, device):
    """With dynamic shapes no further number of rows compiles anything again."""
    call = _with_rows(Call(spec, case, device))
    names = tuple(dict.fromkeys(call.wrt + call.rows))
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    f = _compiled(loss(call.of(spec.op, names)), counter, dynamic=True)
    compilations = []
    for n in (4, 7, 9, 16):
        sized = call.resized(n)
        got, expected = (
            _grads_with_rows(g, sized, names) for g in (f, loss(sized.of(spec.reference, names)))
        )
        assert_close(got, expected)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1, f"compilations after each size: {compilations}"


def copying_kernels(codes: Sequence[str]) -> list[str]:
    """The kernels in Inductor's code that copy: their names say of which operations they are.

    A cast, `_to_copy`, is none of these.
    """
    names = re.findall(r"^\s*(\w*_fused_\w+)(?:\.run)?\(", "\n".join(codes), re.MULTILINE)
    return [name for name in names if re.search("clone|contiguous|(?<!_to)_copy", name)]


def _with_rows(call: Call) -> Call:
    if not call.rows:
        raise NotApplicable("no argument has rows")
    return call


def _grads_with_rows(f: Callable, call: Call, names):
    leaves = {n: call.arguments[n].detach().requires_grad_(n in call.wrt) for n in names}
    return torch.autograd.grad(f(*leaves.values()), [leaves[n] for n in call.wrt])


def _compiled_transform(transform: Callable) -> Callable:
    def holds(spec, case, device):
        call = Call(spec, case, device)
        op = call.op()
        f = _compiled(lambda *tensors: transform(op, *tensors))
        assert_close(f(*call.tensors()), transform(call.reference(), *call.tensors()))

    return holds


# PyTorch 2.11 does not trace a Hessian in several arguments, whatever the function.
for _name in (
    "grad",
    "grad_of_grad",
    "hessian_of_first",
    "jvp",
    "vmap",
    "per_sample_grads",
    "grad_of_vmap",
):
    PROPERTIES["compiled_" + _name] = Property(
        "compiled_" + _name, _compiled_transform(TRANSFORMS[_name]), "first"
    )


@holds_for("cases")
def compiled_autocast(spec, case, device):
    """Autocast around compiled code does what it does around eager code."""
    call = Call(spec, case, device, torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        got = _compiled(call.op())(*call.tensors(requires_grad=True))
        expected = call.op()(*call.tensors(requires_grad=True))
    assert_close(got, expected)


@holds_for("first")
def compiled_selective_checkpointing(spec, case, device):
    """Compiled, a policy that saves the op leaves it out of the backward graph."""
    call = Call(spec, case, device)
    ops, found = forward_ops(call), {}

    def counting(where: str) -> Callable:
        def compile_graph(graph: torch.fx.GraphModule, example_inputs) -> Callable:
            found[where] = sum(node.target in ops for node in graph.graph.nodes)
            return make_boxed_func(graph)

        return compile_graph

    backend = aot_autograd(fw_compiler=counting("forward"), bw_compiler=counting("backward"))
    inner = loss(call.op())

    def f(*tensors):
        tensors = [t.sin() for t in tensors]
        return checkpoint(inner, *tensors, use_reentrant=False, context_fn=saving(ops))

    got = _grads_of_loss(_compiled(f, backend), call)
    reference = loss(call.reference())
    assert_close(got, _grads_of_loss(lambda *t: reference(*(x.sin() for x in t)), call))
    assert found == {"forward": len(ops), "backward": 0}, f"the op in the graphs: {found}"


class _Program(torch.nn.Module):
    """An op as torch.export wants it: a module of its tensor arguments."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.op, self.arguments = call.spec.op, call.arguments

    def forward(self, tensors: dict[str, Tensor]):
        return self.op(**{**self.arguments, **tensors})


@holds_for("first")
def export(spec, case, device):
    """Exported strictly or not, for any number of rows, the op is one node of the graph."""
    call = Call(spec, case, device)
    tensors = {n: a for n, a in call.arguments.items() if is_tensor(a)}
    rows = torch.export.Dim("rows", min=2, max=64)
    shapes = {"tensors": {n: {0: rows} if n in call.rows else {} for n in tensors}}
    ops = forward_ops(call)
    example, other = ({n: call.resized(size).arguments[n] for n in tensors} for size in (4, 9))
    for strict in (True, False):
        torch._dynamo.reset()
        program = torch.export.export(
            _Program(call), (example,), strict=strict, dynamic_shapes=shapes if call.rows else None
        )
        assert ops <= {node.target for node in program.graph.nodes}, "the op was taken apart"
        expected = spec.reference(**{**call.arguments, **other})
        assert_close(program.module()(other), expected)


@holds_for("cases")
def shapes(spec, case, device):
    """On meta and on fake tensors the shapes, dtypes and strides are those of a real run."""
    call = Call(spec, case, device, torch.bfloat16)
    real = _layout(call)
    tensors = {n: a for n, a in call.arguments.items() if is_tensor(a)}
    meta = _layout(call.where(**{n: t.to("meta") for n, t in tensors.items()}))
    assert meta == real, f"on meta {meta}, really {real}"
    with FakeTensorMode() as mode:
        fake = call.where(**{n: mode.from_tensor(t) for n, t in tensors.items()})
        assert _layout(fake) == real, "fake"


def _layout(call: Call) -> list:
    tensors = call.tensors(requires_grad=True)
    outputs = call.op()(*tensors)
    grads = torch.autograd.grad(outputs, tensors, [torch.empty_like(o) for o in outputs])
    return [(t.shape, t.dtype, t.stride()) for t in (*outputs, *grads)]


_OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@holds_for("cases")
def opcheck(spec, case, device):
    """PyTorch's own checks of the dispatcher ops behind the call, forward and backward."""
    call = Call(spec, case, device, torch.float32)
    for op, values in dispatched(call):
        names = [a.name for a in op._schema.arguments]
        # Of a backward op it traces the derivative: the second of the op itself.
        symbolic = spec.symbolic or not op.__name__.endswith("_bwd.default")
        traced = "test_aot_dispatch_dynamic" if symbolic else "test_aot_dispatch_static"
        torch.library.opcheck(
            op,
            tuple(
                v.detach().requires_grad_() if _differentiable(n, v, call) else v
                for n, v in zip(names, values, strict=True)
            ),
            test_utils=(*_OPCHECKS, traced),
        )


def _differentiable(name: str, value, call: Call) -> bool:
    """An input that the op differentiates, or a cotangent of its backward op."""
    return is_float(value) and (name in call.spec.grads or name.startswith("d"))
