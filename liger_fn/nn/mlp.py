"""Gated MLPs: down(act(gate(x)) · up(x))."""

from typing import Literal

import torch
from torch import Tensor, nn

from liger_fn.functional import geglu, swiglu, tiled_mlp


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
