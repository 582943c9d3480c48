"""The peers, each behind our op's own signature, so that one call measures them all.

A method named after an op returns the function to measure: it imports the peer once and passes our
arguments on. What that function does not take, the peer cannot do. Where a peer holds several
kernels for one op, the provider says which of them runs.
"""

import importlib
import inspect
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import eager
from liger_fn import functional

PEERS = "pip install '.[peers]'"


class Provider:
    """Somebody's implementation of some of the ops.

    Attributes:
        name: what `--providers` and the tables call it.
        packages: the distributions whose versions decide what is measured.
        modules: what must be importable.
        install: how to get it.
        needs_gpu: whether it has no path for the CPU.
        answers: whether what it returns is right; else it is timed as a floor.
    """

    name = ""
    packages: tuple[str, ...] = ("torch",)
    modules: tuple[str, ...] = ()
    install = ""
    needs_gpu = True
    answers = True

    def call(self, op: str) -> Callable[..., Any] | None:
        """The function to measure, or None where the peer has no such op."""
        make = getattr(self, op, None)
        return make() if make else None

    def missing(self, device: torch.device) -> str:
        """Say why the provider cannot run here; the empty string if it can."""
        if self.needs_gpu and device.type != "cuda":
            return "needs a GPU"
        for module in self.modules:
            try:
                importlib.import_module(module)
            except Exception as error:  # a peer may fail on import in ways of its own
                return f"{module} cannot be imported ({first_line(error)}); {self.install}"
        return ""

    def version(self) -> str:
        return " ".join(f"{p} {_version(p)}" for p in self.packages)


class Eager(Provider):
    name = "eager"
    needs_gpu = False

    def call(self, op):
        return getattr(eager, op, None)


class Compiled(Provider):
    """`torch.compile` of what Hugging Face writes."""

    name = "compile"

    def call(self, op):
        function = getattr(eager, op, None)
        if function is None:
            return None
        # What an earlier shape taught the compiler would otherwise make this one dynamic.
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False)


class Torch(Provider):
    """PyTorch's own op."""

    name = "torch"
    needs_gpu = False

    def rms_norm(self):
        return lambda x, weight=None, *, eps=1e-6: F.rms_norm(x, x.shape[-1:], weight, eps)

    def fused_add_rms_norm(self):
        def call(x, residual, weight=None, *, eps=1e-6):
            s = x + residual
            return F.rms_norm(s, s.shape[-1:], weight, eps), s

        return call

    def layer_norm(self):
        def call(x, weight=None, bias=None, *, eps=1e-5):
            return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

        return call

    def softmax(self):
        return lambda x: torch.softmax(x, -1)

    def cross_entropy(self):
        def call(logits, target, *, ignore_index=-100, reduction="mean", label_smoothing=0.0):
            return F.cross_entropy(
                logits, target, None, None, ignore_index, None, reduction, label_smoothing
            )

        return call

    def fused_linear_cross_entropy(self):
        cross_entropy = self.cross_entropy()

        def call(weight, x, y, *, bias=None, **options):
            return cross_entropy(F.linear(x, weight, bias), y, **options)

        return call

    def kl_div(self):
        def call(input, target, *, reduction="mean", log_target=False):
            return F.kl_div(input, target, reduction=reduction, log_target=log_target)

        return call

    def group_norm(self):
        return lambda x, num_groups, weight, bias: F.group_norm(x, num_groups, weight, bias)

    def embedding(self):
        return lambda input, weight: F.embedding(input, weight)

    def fused_moe(self):
        """Grouped products, as Transformers' "grouped_mm" experts have them."""

        def call(x, indices, weights, gate_up, down, *, gate_up_bias=None, down_bias=None, **unit):
            K, E = indices.shape[-1], gate_up.shape[0]
            experts, order = indices.flatten().sort()
            ends = torch.searchsorted(experts, torch.arange(E, device=x.device), right=True)
            ends = ends.to(torch.int32)
            h = F.grouped_mm(x[order // K], gate_up.transpose(1, 2), offs=ends)
            if gate_up_bias is not None:
                h = h + gate_up_bias[experts]
            a = eager.gated_activation(h, **unit) if unit else eager.swiglu(h)
            out = F.grouped_mm(a, down.transpose(1, 2), offs=ends)
            if down_bias is not None:
                out = out + down_bias[experts]
            out = out * weights.flatten()[order, None]
            return out[order.argsort()].view(-1, K, x.shape[-1]).sum(1).to(x.dtype)

        return call

    def soft_target_cross_entropy(self):
        return lambda logits, target: F.cross_entropy(logits, target)


class Flex(Provider):
    """PyTorch's flex_attention, compiled, with a mask of blocks that is made once for a shape."""

    name = "flex"

    def neighborhood_attention(self):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        attend = torch.compile(flex_attention, dynamic=False)
        masks: dict[tuple, Any] = {}

        def call(q, k, v, kernel_size, *, dilation=1, window="shifted", scale=None):
            sizes = kernel_size if isinstance(kernel_size, tuple) else (kernel_size,)
            steps = dilation if isinstance(dilation, tuple) else (dilation,) * len(sizes)
            if q.dim() != 3 + len(sizes):
                raise NotImplementedError("only of a batch and of heads, both of them there")
            lengths = q.shape[2:-1]
            key = (lengths, sizes, steps, window)
            if key not in masks:

                def allowed(b, h, i, j):
                    # From the last dimension to the first, as numbers of tokens are read.
                    seen = None
                    for T, size, step in zip(
                        *(x[::-1] for x in (lengths, sizes, steps)), strict=True
                    ):
                        here = eager.in_window(i % T, j % T, T, size, step, window)
                        seen = here if seen is None else seen & here
                        i, j = i // T, j // T
                    return seen

                T = lengths.numel()
                masks[key] = create_block_mask(allowed, None, None, T, T, q.device)
            q, k, v = (t.flatten(2, -2) for t in (q, k, v))
            return attend(q, k, v, block_mask=masks[key], scale=scale).unflatten(2, lengths)

        return call


class Ours(Provider):
    name = "liger_fn"
    packages = ("liger_fn",)
    needs_gpu = False

    def call(self, op):
        return getattr(functional, op, None)

    def version(self):
        from liger_fn import __version__

        return f"liger_fn {__version__}"


class Liger(Provider):
    """liger-kernel's Triton kernels, which `liger_kernel.transformers.functional` always runs."""

    name = "liger"
    packages = ("liger-kernel",)
    modules = ("liger_kernel.transformers.functional",)
    install = PEERS
    chunks = 1

    def missing(self, device):
        if "LIGER_KERNEL_IMPL" in os.environ:
            return "LIGER_KERNEL_IMPL is set, which replaces its Triton kernels; unset it"
        return super().missing(device)

    def rms_norm(self):
        from liger_kernel.transformers.functional import liger_rms_norm

        def call(x, weight, *, eps=1e-6, offset=0.0, cast_before_weight=False):
            return liger_rms_norm(x, weight, eps, offset, "gemma" if offset else "llama")

        return call

    def fused_add_rms_norm(self):
        from liger_kernel.transformers.functional import liger_fused_add_rms_norm

        def call(x, residual, weight, *, eps=1e-6, offset=0.0, cast_before_weight=False):
            mode = "gemma" if offset else "llama"
            return liger_fused_add_rms_norm(x, residual, weight, eps, offset, mode)

        return call

    def layer_norm(self):
        from liger_kernel.transformers.functional import liger_layer_norm

        return lambda x, weight, bias, *, eps=1e-5: liger_layer_norm(x, weight, bias, eps)

    def swiglu(self):
        from liger_kernel.transformers.functional import liger_swiglu

        return lambda gate, up=None: liger_swiglu(*eager.halves(gate, up))

    def geglu(self):
        from liger_kernel.transformers.functional import liger_geglu

        return _tanh_only(lambda gate, up=None: liger_geglu(*eager.halves(gate, up)))

    def softmax(self):
        from liger_kernel.transformers.functional import liger_softmax

        return lambda x: liger_softmax(x)

    def modulated_rms_norm(self):
        from liger_kernel.transformers.functional import liger_modulated_rms_norm

        def call(x, scale, shift, *, eps=1e-6):
            each = (t.unsqueeze(1) for t in (scale, shift))
            return liger_modulated_rms_norm(x, None, *each, eps)

        return call

    def poly_norm(self):
        from liger_kernel.transformers.functional import liger_poly_norm

        return lambda x, weight, bias, *, eps=1e-6: liger_poly_norm(x, weight, bias, eps)

    def group_norm(self):
        from liger_kernel.transformers.functional import liger_group_norm

        def call(x, num_groups, weight, bias, *, eps=1e-5):
            flat = x.reshape(*x.shape[:2], -1)
            y = liger_group_norm(flat, weight, bias, x.shape[1], num_groups, eps)
            return y.reshape(x.shape)

        return call

    def dyt(self):
        from liger_kernel.transformers.functional import liger_dyt

        return lambda x, alpha, weight, bias: liger_dyt(x, alpha, weight, bias)

    def sparsemax(self):
        from liger_kernel.transformers.functional import liger_sparsemax

        return lambda x: liger_sparsemax(x)

    def embedding(self):
        from liger_kernel.ops.experimental.embedding import LigerEmbeddingFunction

        return lambda input, weight: LigerEmbeddingFunction.apply(weight, input)

    def kl_div(self):
        from liger_kernel.transformers.functional import liger_kl_div

        def call(input, target, *, reduction="mean", log_target=False):
            return liger_kl_div(input, target, reduction=reduction, log_target=log_target)

        return call

    def jsd(self):
        from liger_kernel.transformers.functional import liger_jsd

        def call(input, target, labels=None, *, beta=0.5, ignore_index=-100):
            return liger_jsd(input, target, labels, beta, ignore_index)

        return call

    def fused_moe(self):
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        def call(x, indices, weights, gate_up, down):
            return LigerFusedMoEFunction.apply(x, gate_up, down, indices.int(), weights)

        return call

    def attention_residual(self):
        from liger_kernel.transformers.functional import liger_attn_res

        return lambda values, query, weight: liger_attn_res(values, query, weight)

    def mhc_pre(self):
        from liger_kernel.transformers.functional import liger_mhc_coeffs, liger_mhc_pre

        def call(x, weight, bias, scale):
            wide = {"allow_fp32": x.dtype is torch.float32}
            pre, post, res = liger_mhc_coeffs(x, weight.t(), bias, *scale.unbind(), **wide)
            return liger_mhc_pre(x, pre), post, res

        return call

    def mhc_post(self):
        from liger_kernel.transformers.functional import liger_mhc_post_res

        return lambda x, y, post, res: liger_mhc_post_res(x, y, post, res)

    def fused_mlp(self):
        """Its products of gate, up and activation; it has nothing for one packed weight."""
        from liger_kernel.ops.mlp import LigerMLPFunction

        return lambda x, gate_up, down: LigerMLPFunction.apply(x, *gate_up.chunk(2), down)

    def gated_linear(self):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return lambda gate, up, weight: F.linear(LigerSiLUMulFunction.apply(gate, up), weight)

    def fused_linear_jsd(self):
        from liger_kernel.transformers.functional import liger_fused_linear_jsd

        def call(
            weight, x, teacher_weight, teacher_x, labels=None, *, beta=0.5, temperature=1.0,
            ignore_index=-100,
        ):  # fmt: skip
            return liger_fused_linear_jsd(
                x, weight, teacher_x, teacher_weight, labels, beta, ignore_index, temperature
            )

        return call

    def multi_token_attention(self):
        from liger_kernel.transformers.functional import liger_multi_token_attention

        def call(scores, weight, bias, *, padding=0, groups=1, sparse=False):
            if padding == "causal":
                raise NotImplementedError("pads queries on both sides alike")
            return liger_multi_token_attention(
                scores, weight, bias, padding=padding, groups=groups, sparse=sparse
            )

        return call

    def neighborhood_attention(self):
        from liger_kernel.transformers.functional import liger_fused_neighborhood_attention

        def call(q, k, v, kernel_size, *, dilation=1, window="shifted"):
            if isinstance(kernel_size, tuple) or window == "causal":
                raise NotImplementedError("only along a line, and with keys after the query")
            return liger_fused_neighborhood_attention(q, k, v, kernel_size, dilation)

        return call

    def tvd(self):
        from liger_kernel.transformers.functional import liger_tvd

        def call(input, target, labels=None, *, ignore_index=-100):
            return liger_tvd(input, target, labels, "batchmean", ignore_index)

        return call

    def relu_squared(self):
        from liger_kernel.transformers.functional import liger_relu_squared

        return lambda x: liger_relu_squared(x)

    def rope(self):
        from liger_kernel.transformers.functional import liger_rope

        return lambda q, k, cos, sin: liger_rope(q, k, cos, sin)

    def cross_entropy(self):
        from liger_kernel.transformers.functional import liger_cross_entropy

        def call(logits, target, *, z_loss=0.0, **options):
            return liger_cross_entropy(logits, target, lse_square_scale=z_loss, **options)

        return call

    def fused_linear_cross_entropy(self):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        def call(weight, x, y, *, bias=None, z_loss=0.0, **options):
            return liger_fused_linear_cross_entropy(
                x, weight, y, bias, lse_square_scale=z_loss, chunk_mem_const=self.chunks, **options
            )

        return call

    def fused_linear_logprobs(self):
        """Its kernels of CuTe on a Hopper chip that has them, else its chunks."""
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as op

        def call(weight, x, y, *, entropy=False):
            losses = op.apply(x, weight, y, 1.0, -100, 1, entropy)
            return (-losses[0], losses[1]) if entropy else -losses

        return call


class LigerLargeChunks(Provider):
    """The same with sixteen times the default budget for logits: its fastest setting."""

    name = "liger-c16"
    packages, modules, install = Liger.packages, Liger.modules, Liger.install
    chunks = 16
    fused_linear_cross_entropy = Liger.fused_linear_cross_entropy


class LigerCute(Provider):
    """liger-kernel's CuTe kernels, asked for by name.

    Its dispatcher takes them by itself on Hopper as soon as `cutlass.cute` can be imported, except
    for `cross_entropy`, where it prefers Triton.
    """

    name = "liger-cute"
    packages = ("liger-kernel", "nvidia-cutlass-dsl", "apache-tvm-ffi")
    modules = ("cutlass.cute", "liger_kernel.functional")
    install = PEERS
    kernels = "nvidia-cutedsl"

    def rms_norm(self):
        from liger_kernel.functional import rms_norm

        def call(x, weight, *, eps=1e-6, offset=0.0, cast_before_weight=False):
            mode = "gemma" if offset else "llama"
            return rms_norm(x, weight, eps, offset=offset, casting_mode=mode, impl=self.kernels)

        return call

    def fused_add_rms_norm(self):
        from liger_kernel.functional import fused_add_rms_norm

        def call(x, residual, weight, *, eps=1e-6, offset=0.0, cast_before_weight=False):
            mode = "gemma" if offset else "llama"
            return fused_add_rms_norm(
                x, residual, weight, eps, offset=offset, casting_mode=mode, impl=self.kernels
            )

        return call

    def layer_norm(self):
        from liger_kernel.functional import layer_norm

        def call(x, weight, bias=None, *, eps=1e-5):
            return layer_norm(x, weight, bias, eps, impl=self.kernels)

        return call

    def swiglu(self):
        from liger_kernel.functional import swiglu

        return lambda gate, up=None: swiglu(*eager.halves(gate, up), impl=self.kernels)

    def geglu(self):
        from liger_kernel.functional import geglu

        return _tanh_only(lambda gate, up=None: geglu(*eager.halves(gate, up), impl=self.kernels))

    def softmax(self):
        from liger_kernel.functional import softmax

        return lambda x: softmax(x, impl=self.kernels)

    def rope(self):
        from liger_kernel.functional import rope

        return lambda q, k, cos, sin: rope(q, k, cos, sin, impl=self.kernels)

    def cross_entropy(self):
        from liger_kernel.functional import cross_entropy

        def call(logits, target, *, z_loss=0.0, **options):
            return cross_entropy(
                logits, target, lse_square_scale=z_loss, impl=self.kernels, **options
            )[0]

        return call

    def fused_linear_cross_entropy(self):
        from liger_kernel.functional import fused_linear_cross_entropy

        def call(weight, x, y, *, bias=None, z_loss=0.0, **options):
            return fused_linear_cross_entropy(
                x, weight, y, bias, lse_square_scale=z_loss, impl=self.kernels, **options
            )[0]

        return call


class LigerHopper(Provider):
    """liger-kernel's Hopper kernels that hold all logits (6NHV)."""

    name = "liger-sm90"
    packages, modules, install = LigerCute.packages, LigerCute.modules, LigerCute.install

    def fused_linear_cross_entropy(self):
        from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import (
            liger_fused_linear_cross_entropy_sm90,
        )

        def call(weight, x, y, *, ignore_index=-100, reduction="mean"):
            return liger_fused_linear_cross_entropy_sm90(x, weight, y, ignore_index, reduction)

        return call


class LigerHopperRecompute(Provider):
    """liger-kernel's Hopper kernels that hold no logits and compute them twice (8NHV)."""

    name = "liger-sm90-8"
    packages, modules, install = LigerCute.packages, LigerCute.modules, LigerCute.install

    def fused_linear_cross_entropy(self):
        from liger_kernel.ops.cutedsl.ops import LigerFusedScaledCrossEntropySM90Function as op

        def call(weight, x, y, *, ignore_index=-100):
            losses = op.apply(x, weight, y, 1.0, ignore_index)
            return losses.sum() / (y != ignore_index).sum()

        return call


class CutCrossEntropy(Provider):
    """Apple's, which by default leaves out gradients that bf16 would hardly show."""

    name = "cce"
    packages = ("cut-cross-entropy",)
    modules = ("cut_cross_entropy",)
    install = PEERS
    filter: str | None = "high"

    def fused_linear_cross_entropy(self):
        from cut_cross_entropy import linear_cross_entropy

        def call(weight, x, y, *, ignore_index=-100, reduction="mean", softcap=None):
            return linear_cross_entropy(
                x,
                weight,
                y,
                ignore_index=ignore_index,
                softcap=softcap,
                reduction=reduction,
                filter_eps=self.filter,
            )

        return call


class CutCrossEntropyExact(CutCrossEntropy):
    """The same, leaving nothing out."""

    name = "cce-exact"
    filter = None


class Quack(Provider):
    """quack-kernels; its linear cross entropy picks the scaled-exp path by itself on Hopper."""

    name = "quack"
    packages = ("quack-kernels", "nvidia-cutlass-dsl")
    modules = ("quack",)
    install = PEERS
    scaled_exp: bool | None = None

    def rms_norm(self):
        from quack import rmsnorm

        def call(x, weight=None, *, eps=1e-6, offset=0.0):
            return rmsnorm(x, weight, eps=eps, weight_offset=offset)

        return call

    def fused_add_rms_norm(self):
        from quack import rmsnorm

        def call(x, residual, weight=None, *, eps=1e-6, offset=0.0):
            return rmsnorm(
                x,
                weight,
                residual=residual,
                residual_dtype=x.dtype,
                eps=eps,
                prenorm=True,
                weight_offset=offset,
            )

        return call

    def softmax(self):
        from quack import softmax

        return lambda x: softmax(x)

    def rope(self):
        from quack.rotary import apply_rotary_emb

        def call(q, k, cos, sin):
            # quack wants one angle per pair, one table for the batch, and heads after tokens.
            cos, sin = (t.reshape(t.shape[-2:])[:, : q.shape[-1] // 2] for t in (cos, sin))
            return tuple(
                apply_rotary_emb(t.transpose(1, 2), cos, sin).transpose(1, 2) for t in (q, k)
            )

        return call

    def cross_entropy(self):
        from quack.cross_entropy import cross_entropy

        def call(logits, target, *, ignore_index=-100, reduction="mean"):
            return cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)

        return call

    def fused_linear_cross_entropy(self):
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        def call(weight, x, y, *, ignore_index=-100, reduction="mean"):
            # It takes chunks as long as the features for ambiguous: its default, or twice that.
            chunk = 4096 if x.shape[-1] != 4096 else 8192
            return chunked_linear_cross_entropy(
                x,
                weight,
                y,
                chunk_size=chunk,
                ignore_index=ignore_index,
                reduction=reduction,
                use_scaled_exp=self.scaled_exp,
            )

        return call


class QuackBase(Provider):
    """quack's linear cross entropy on every other chip: it first tries many matrix kernels."""

    name = "quack-base"
    packages, modules, install = Quack.packages, Quack.modules, Quack.install
    scaled_exp = False
    fused_linear_cross_entropy = Quack.fused_linear_cross_entropy


class TRL(Provider):
    """TRL's: a tile of logits at a time, made again for the gradient; and a kernel over logits."""

    name = "trl"
    packages = ("trl",)
    modules = ("trl.kernels",)
    install = "pip install 'trl>=1.16'"

    def fused_linear_logprobs(self):
        from trl.kernels import ChunkedLogProbFunction

        def call(weight, x, y, *, entropy=False):
            wanted = ("entropy",) if entropy else ()
            # Tiles as wide as in its trainers.
            out = ChunkedLogProbFunction.apply(x, weight, None, y, 1.0, 32768, None, 1.0, wanted)
            return out[:2] if entropy else out[0]

        return call

    def logprobs(self):
        from trl.kernels import selective_log_softmax_and_entropy

        def call(logits, target, *, entropy=False):
            out = selective_log_softmax_and_entropy(logits, target)
            return out if entropy else out[0]

        return call


class Verl(Provider):
    """verl's Triton kernels, which make the logits of a tile within the product."""

    name = "verl"
    packages = ("verl",)
    modules = ("verl.utils.kernel.linear_cross_entropy",)
    install = "pip install verl"

    def fused_linear_logprobs(self):
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

        def call(weight, x, y, *, entropy=False):
            logp, entropies = linear_cross_entropy(x, weight, y, 1.0, "none", None)
            return (logp, entropies) if entropy else logp

        return call


class VerlTorch(Provider):
    """verl's chunks in plain PyTorch."""

    name = "verl-torch"
    packages = ("verl",)
    modules = ("verl.utils.experimental.torch_functional",)
    install = Verl.install

    def fused_linear_logprobs(self):
        from verl.utils.experimental.torch_functional import FusedLinearForPPO

        def call(weight, x, y, *, entropy=False):
            logp, entropies = FusedLinearForPPO()(x, weight, y)
            return (logp, entropies) if entropy else logp

        return call


class OursWith(Ours):
    """Ours with other settings of linear heads: points of time against memory."""

    def __init__(self, name: str, **options: Any) -> None:
        self.name, self.options = name, options

    call = Provider.call

    def fused_linear_cross_entropy(self):
        return self._with(functional.fused_linear_cross_entropy)

    def fused_linear_logprobs(self):
        return self._with(functional.fused_linear_logprobs)

    def _with(self, op):
        return lambda weight, x, y, **options: op(weight, x, y, **options, **self.options)


class OursCounted(OursWith):
    """Ours, told how many targets count: who asks the device waits for it, once a batch."""

    def _with(self, op):
        counts: dict[int, int] = {}

        def call(weight, x, y, **options):
            ignored = options.get("ignore_index", -100)
            if y.data_ptr() not in counts:
                counts[y.data_ptr()] = int((y != ignored).sum())
            return op(weight, x, y, max_valid=counts[y.data_ptr()], **options)

        return call


class Products(Provider):
    """The three matrix products of a linear head and nothing else: no loss, and no right answer."""

    name = "products"
    needs_gpu = False
    answers = False

    def fused_linear_cross_entropy(self):
        products = self.fused_linear_logprobs()
        return lambda weight, x, y, **options: products(weight, x, y)[0]

    def fused_linear_logprobs(self):
        """No fourth product, which would make the logits again."""

        class Bare(torch.autograd.Function):
            @staticmethod
            def forward(ctx, weight, x):
                logits = x @ weight.t()
                ctx.save_for_backward(weight, x, logits)
                return logits[:, 0].float()

            @staticmethod
            def backward(ctx, upstream):
                weight, x, g = ctx.saved_tensors
                return g.t() @ x, g @ weight

        return lambda weight, x, y: Bare.apply(weight, x)


def _settings() -> tuple[Provider, ...]:
    """Chunks that add up in 16 bits, sums in float32, and memory for all logits."""
    chunks = tuple(
        OursWith(f"liger_fn-{rows}", chunk_size=rows, accum_dtype=torch.bfloat16)
        for rows in (4096, 2048, 1024, 512)
    )
    float32 = OursWith("liger_fn-float32", accum_dtype=torch.float32)
    return *chunks, float32, OursWith("liger_fn-8GiB", memory_budget=8 << 30)


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Eager(),
        Torch(),
        Compiled(),
        Flex(),
        Liger(),
        LigerLargeChunks(),
        LigerCute(),
        LigerHopper(),
        LigerHopperRecompute(),
        CutCrossEntropy(),
        CutCrossEntropyExact(),
        Quack(),
        QuackBase(),
        TRL(),
        Verl(),
        VerlTorch(),
        Ours(),
        *_settings(),
        OursCounted("liger_fn-counted"),
        Products(),
    )
}


def refusal(call: Callable[..., Any], arguments: dict[str, Any]) -> str:
    """Say which argument the peer does not take; the empty string if it takes them all."""
    try:
        inspect.signature(call).bind(**arguments)
    except TypeError as error:
        return first_line(error)
    return ""


def first_line(error: BaseException) -> str:
    """An error's class and the first line of its message."""
    message = str(error).strip().splitlines()
    return f"{type(error).__name__}: {message[0]}" if message else type(error).__name__


def _tanh_only(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(gate, up=None, *, approximate="tanh"):
        if approximate != "tanh":
            raise NotImplementedError("only the tanh approximation")
        return function(gate, up)

    return call


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
