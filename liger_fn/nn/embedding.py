"""Tables of vectors as modules."""

from typing import Any

from torch import Tensor, nn

from liger_fn.functional import embedding


class Embedding(nn.Embedding):
    """torch.nn.Embedding, whose gradient is the same bits twice and summed in float32.

    See `liger_fn.functional.embedding`. Rows are never renormalised and gradients are dense and
    unscaled: `max_norm`, `scale_grad_by_freq` and `sparse` are refused.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        refused = {"max_norm": None, "scale_grad_by_freq": False, "sparse": False}
        for name, plain in refused.items():
            if getattr(self, name) != plain:
                raise NotImplementedError(
                    f"Embedding: `{name}` must be {plain}; got {getattr(self, name)}."
                )

    def forward(self, input: Tensor) -> Tensor:
        return embedding(input, self.weight, padding_idx=self.padding_idx)
