"""Gated MLPs: down(act(gate(x)) · up(x))."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from liger_fn.functional import fused_mlp, geglu, swiglu, tiled_mlp


class SwiGLUMLP(nn.Module):
    """The MLP of Llama and its kin: down_proj(silu(gate_proj(x)) · up_proj(x)).

    state_dict keys are Hugging Face's: gate_proj.weight, up_proj.weight, down_proj.weight, and the
    biases.

    Args:
        hidden_size: D, the width of x.
        intermediate_size: F, the width between.
        bias: whether the three projections have one.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias, device, dtype)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return swiglu(gate, up)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))


class GeGLUMLP(SwiGLUMLP):
    """The MLP of Gemma and its kin: down_proj(gelu(gate_proj(x)) · up_proj(x)); keys as SwiGLUMLP.

    Args:
        approximate: "tanh" (Gemma) or "none" (erf), as in torch.nn.GELU.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        *,
        approximate: Literal["tanh", "none"] = "tanh",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, intermediate_size, bias, device=device, dtype=dtype)
        self.approximate = approximate

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return geglu(gate, up, approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class FusedMLP(nn.Module):
    """A gated MLP with gate and up in one matrix: down_proj(act(gate) · up), all in one op.

    state_dict keys are those of Hugging Face's Phi3MLP: gate_up_proj.weight (2F, D), the gate's
    rows before those of up, and down_proj.weight (D, F); and the biases. Of a checkpoint that has
    both apart, as Llama's, gate_up_proj.weight is torch.cat([gate_proj.weight, up_proj.weight]).

    Args:
        hidden_size: D, the width of x.
        intermediate_size: F, the width between.
        bias: whether both projections have one.
        recompute: make the activation again in the backward pass instead of keeping it.
        unit: the options of the unit, as `liger_fn.functional.gated_activation` has them, say
            activation="gelu_pytorch_tanh"; of none, SwiGLU.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        *,
        recompute: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unit: Any,
    ) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias, device, dtype)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias, device, dtype)
        self.recompute, self.unit = recompute, unit

    def forward(self, x: Tensor) -> Tensor:
        return fused_mlp(
            x,
            self.gate_up_proj.weight,
            self.down_proj.weight,
            gate_up_bias=self.gate_up_proj.bias,
            down_bias=self.down_proj.bias,
            recompute=self.recompute,
            **self.unit,
        )

    def extra_repr(self) -> str:
        options = {"recompute": self.recompute, **self.unit}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


class TiledMLP(nn.Module):
    """An MLP that computes a tile of tokens at a time, and again for the backward pass.

    Where sequences are so long that what lies between its layers does not fit. Parameters get one
    gradient a pass, so DDP and FSDP2 work as around `mlp` itself; wrap this module or one around
    it, not `mlp`. See `liger_fn.functional.tiled_mlp`.

    Args:
        mlp: the module, which must treat each token by itself, and twice the same.
        tiles: how many tiles the tokens are cut into.
    """

    def __init__(self, mlp: nn.Module, tiles: int) -> None:
        super().__init__()
        self.mlp, self.tiles = mlp, tiles

    def forward(self, x: Tensor) -> Tensor:
        return tiled_mlp(self.mlp, x, self.tiles)

    def extra_repr(self) -> str:
        return f"tiles={self.tiles}"
