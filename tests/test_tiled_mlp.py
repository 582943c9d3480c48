"""Facts of tiled_mlp: values, derivatives, memory, and who waits for gradients."""

import functools

import pytest
import torch
import torch.multiprocessing as mp
from test_fused_linear_cross_entropy import LargestTensor
from torch import nn
from torch.func import grad, hessian, jacrev, jvp, vmap

import liger_fn.nn as lnn
from liger_fn.functional import tiled_mlp, using

T, D, F = 12, 6, 10


@pytest.fixture
def mlp(device):
    return lnn.SwiGLUMLP(D, F, bias=True, device=device, dtype=torch.float64)


@pytest.fixture
def x(device):
    return torch.randn(2, T, D, dtype=torch.float64, device=device, requires_grad=True)


def gradients(y, *leaves):
    return torch.autograd.grad(y.sin().sum(), leaves)


@pytest.mark.parametrize("tiles", [1, 2, 5, T, T + 1])
def test_is_the_mlp(tiles, mlp, x):
    y = lnn.TiledMLP(mlp, tiles)(x)
    torch.testing.assert_close(y, mlp(x))
    leaves = (x, *mlp.parameters())
    torch.testing.assert_close(gradients(y, *leaves), gradients(mlp(x), *leaves))


def product(x, w, b):
    return (x @ w + b).sin()


@pytest.fixture
def params(device):
    w = torch.randn(D, 5, dtype=torch.float64, device=device, requires_grad=True)
    return w, torch.randn(5, dtype=torch.float64, device=device, requires_grad=True)


def in_tiles(x, *params):
    return tiled_mlp(product, x, 3, params)


def test_gradients_are_slopes(x, params):
    assert torch.autograd.gradcheck(in_tiles, (x, *params), fast_mode=True)
    assert torch.autograd.gradgradcheck(in_tiles, (x, *params), fast_mode=True)


def loss(f):
    return lambda *tensors: f(*tensors).square().sum()


TRANSFORMS = {
    "grad": lambda f, *t: grad(loss(f), (0, 1, 2))(*t),
    "jacrev": lambda f, *t: jacrev(f, (0, 1))(*t),
    "hessian": lambda f, *t: hessian(loss(f), (0, 1))(*t),
    "jvp": lambda f, *t: jvp(f, t, tuple(a.cos() for a in t)),
    "vmap": lambda f, x, *t: vmap(f, (0, None, None))(torch.stack([x, -x]), *t),
    "per-sample": lambda f, x, *t: vmap(grad(loss(f), (0, 1)), (0, None, None))(x, *t),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_under_transforms(transform, x, params):
    torch.testing.assert_close(transform(in_tiles, x, *params), transform(product, x, *params))


def test_compiled_whole(mlp, x):
    def block(x):
        return tiled_mlp(mlp, x, 3)

    y = torch.compile(block, fullgraph=True)(x)
    leaves = (x, *mlp.parameters())
    torch.testing.assert_close(y, mlp(x))
    torch.testing.assert_close(gradients(y, *leaves), gradients(mlp(x), *leaves))


def test_a_parameter_gets_one_gradient(mlp, x):
    counts = dict.fromkeys(dict(mlp.named_parameters()), 0)

    def count(name, _):
        counts[name] += 1

    for name, p in mlp.named_parameters():
        p.register_post_accumulate_grad_hook(functools.partial(count, name))
    tiled_mlp(mlp, x, 4).sum().backward()
    assert set(counts.values()) == {1}


def test_what_is_frozen_stays_so(mlp, x):
    mlp.up_proj.requires_grad_(False)
    tiled_mlp(mlp, x.detach(), 4).sum().backward()
    got = {name for name, p in mlp.named_parameters() if p.grad is not None}
    assert got == {n for n, _ in mlp.named_parameters() if not n.startswith("up_proj")}


def test_two_parameters_with_one_gradient(device):
    """Autograd gives both the same tensor, and the cotangent itself where nothing is in between."""
    p, q = (torch.zeros(2, D, device=device, requires_grad=True) for _ in range(2))
    y = tiled_mlp(lambda x, p, q: x + p + q, torch.ones(6, D, device=device), 3, (p, q))
    cotangent = torch.ones_like(y)
    for gradient in torch.autograd.grad(y, (p, q), cotangent):
        assert (gradient == 3).all()
    assert (cotangent == 1).all()


def test_sums_are_held_in_float32(device):
    """In bfloat16 1 added to 256 is lost."""
    w = torch.ones(D, dtype=torch.bfloat16, device=device, requires_grad=True)
    x = torch.ones(260, D, dtype=torch.bfloat16, device=device)
    (dw,) = torch.autograd.grad(tiled_mlp(lambda x, w: x * w, x, 260, (w,)).sum(), w)
    assert (dw == 260).all()


def test_holds_the_intermediates_of_one_tile(device):
    mlp = lnn.SwiGLUMLP(D, 4 * D, device=device)
    x = torch.randn(64, D, device=device, requires_grad=True)
    with LargestTensor() as largest:
        tiled_mlp(mlp, x, 8).sum().backward()
    assert largest.numel == max(64 * D, 4 * D * D, 64 // 8 * 4 * D) < 64 * 4 * D


def test_the_backward_pass_is_in_the_autocast_of_the_forward_pass(mlp, x, device):
    mlp.float()
    with torch.autocast(device.type, torch.bfloat16):
        y, expected = tiled_mlp(mlp, x.float(), 3), mlp(x.float())
    assert y.dtype is torch.bfloat16
    theirs = torch.autograd.grad(expected.float().sin().sum(), list(mlp.parameters()))
    ours = torch.autograd.grad(y.float().sin().sum(), list(mlp.parameters()))
    # Sums of 24 numbers, each rounded to 8 bits.
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("fn", "tiles", "error", "sentence"),
    [
        (None, 2, TypeError, "`fn` must be a module or a function; got NoneType."),
        (nn.Identity(), 0, ValueError, "`tiles` must be a positive integer; got 0."),
        (nn.Identity(), 1.5, ValueError, "`tiles` must be a positive integer; got 1.5."),
    ],
)
def test_errors(fn, tiles, error, sentence, x):
    with pytest.raises(error, match="tiled_mlp: ") as caught:
        tiled_mlp(fn, x, tiles)
    assert sentence in str(caught.value)


def test_a_gradient_that_would_be_lost_is_an_error(x, params, mlp):
    w, b = params
    for given in (x, x.detach()):
        with pytest.raises(ValueError, match="`fn` must get by `params` all that requires grad"):
            tiled_mlp(lambda tile: product(tile, w, b), given, 2)
    with pytest.raises(ValueError, match="`params` must be None for a module"):
        tiled_mlp(mlp, x, 2, params)
    with torch.no_grad():
        assert tiled_mlp(lambda tile: product(tile, w, b), x, 2).shape == (2, T, 5)


def test_ddp_and_fsdp2_on_two_processes(tmp_path):
    mp.start_processes(run, (str(tmp_path / "store"),), 2, start_method="spawn")


def run(rank, store):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    try:
        with using("reference"):
            wrapped_by(nn.parallel.DistributedDataParallel, rank)
            wrapped_by(sharded, rank)
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Left to itself FSDP takes the GPU where there is one, and gloo does not serve it.
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def wrapped_by(wrap, rank):
    torch.manual_seed(0)
    plain = nn.Sequential(*(lnn.SwiGLUMLP(D, F) for _ in range(2)))
    batches = torch.randn(2, 1, T, D)
    (sum(plain(batch).square().mean() for batch in batches) / 2).backward()
    expected = [p.grad for p in plain.parameters()]
    plain.zero_grad(set_to_none=True)

    tiled = nn.Sequential(*(lnn.TiledMLP(layer, 3) for layer in plain))
    wrapped = wrap(tiled)
    wrapped(batches[rank]).square().mean().backward()
    got = [p.grad for p in wrapped.parameters()]
    got = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in got]
    torch.testing.assert_close(got, expected)
