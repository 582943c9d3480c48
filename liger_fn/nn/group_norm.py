"""Norms over groups of channels as modules."""

from torch import Tensor, nn

from liger_fn.functional import group_norm


class GroupNorm(nn.GroupNorm):
    """torch.nn.GroupNorm, its parameters and state_dict keys. See `functional.group_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        return group_norm(input, self.num_groups, self.weight, self.bias, eps=self.eps)
