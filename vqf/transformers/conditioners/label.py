"""Conditioning on nothing, or on a class label."""

import torch
from torch import Tensor, nn

from vqf.batch import Batch
from vqf.options.ranges import Rate
from vqf.registry import register


@register("conditioner", "none")
class NoCondition(nn.Module):
    """A start token."""

    vocab_size = 1
    length = 1

    def __init__(self) -> None:
        super().__init__()

    def forward(self, batch: Batch) -> Tensor:
        return torch.zeros(len(batch), 1, dtype=torch.int64, device=batch.any_field.device)


@register("conditioner", "label")
class LabelConditioner(nn.Module):
    """The class as one token.

    Args:
        dropout: Fraction of labels that training replaces by one more class, the null class, for guidance
            (Classifier-Free Diffusion Guidance, https://arxiv.org/abs/2207.12598). 0 adds no null class.
    """

    length = 1

    def __init__(self, num_classes: int, *, dropout: Rate = 0.0) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError("the data has no labels; choose model/conditioner=none")
        self.dropout = dropout
        self.null_class = num_classes if dropout else None
        self.vocab_size = num_classes + bool(dropout)

    def forward(self, batch: Batch) -> Tensor:
        return self._labels(batch)

    def null_prefix(self, batch: Batch) -> Tensor | None:
        if self.null_class is None:
            return None
        return torch.full_like(self._labels(batch), self.null_class)

    def _labels(self, batch: Batch) -> Tensor:
        if batch.labels is None:
            raise ValueError("the batch has no labels; choose model/conditioner=none")
        return batch.labels[:, None]
