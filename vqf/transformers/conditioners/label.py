"""What stage 2 is told about a picture: tokens in front of its codes."""

import torch
from torch import Tensor, nn

from vqf.batch import Batch
from vqf.registry import register


@register("conditioner", "none")
class NoCondition(nn.Module):
    """A start token and nothing else."""

    vocab_size = 1
    length = 1

    def __init__(self) -> None:
        super().__init__()

    def forward(self, batch: Batch) -> Tensor:
        """Return (B, 1) zeros."""
        return torch.zeros(len(batch), 1, dtype=torch.int64, device=batch.any.device)


@register("conditioner", "label")
class Label(nn.Module):
    """The class as one token.

    Args:
        drop: Share of the labels that training replaces by one more class, `null_class`, which stands for any class
            (Classifier-Free Diffusion Guidance, https://arxiv.org/abs/2207.12598). 0 adds no such class.
    """

    length = 1

    def __init__(self, classes: int, *, drop: float = 0.0) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError("the data has no labels; choose model/conditioner=none")
        if not 0 <= drop < 1:
            raise ValueError(f"drop must be in [0, 1), not {drop}")
        self.drop = drop
        self.null_class = classes if drop else None
        self.vocab_size = classes + bool(drop)

    def forward(self, batch: Batch) -> Tensor:
        """Return the labels as (B, 1)."""
        return self._labels(batch)

    def null(self, batch: Batch) -> Tensor | None:
        """Return the prefix (B, 1) of no condition, or None if the prior has never seen one."""
        if self.null_class is None:
            return None
        return torch.full_like(self._labels(batch), self.null_class)

    def _labels(self, batch: Batch) -> Tensor:
        if batch.labels is None:
            raise ValueError("the batch has no labels; choose model/conditioner=none")
        return batch.labels[:, None]
