"""The generator: a tokenizer, a prior over its codes, and a sampler. What a user of a stage-2 run holds."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vqf.errors import UserError, unknown
from vqf.protocols import Batch, Conditioner, Prior, Sampler, Size
from vqf.tokenizer import Tokenizer


class Generator(nn.Module):
    """Draws new images.

    Args:
        classes: Names of the labels that the conditioner knows; empty where there are none.
    """

    def __init__(
        self, tokenizer: Tokenizer, conditioner: Conditioner, prior: Prior, sampler: Sampler, classes: Sequence[str]
    ) -> None:
        super().__init__()
        self.tokenizer, self.conditioner, self.prior = tokenizer, conditioner, prior
        self.sampler = sampler
        self.classes = list(classes)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.tokenizer.parameters()).device

    @torch.no_grad()
    def sample(
        self,
        count: int,
        *,
        label: int | str | None = None,
        labels: Sequence[int] | Tensor | None = None,
        seed: int = 0,
        first: int = 0,
        batch_size: int = 64,
    ) -> Tensor:
        """Draw `count` images (count, 3, H, W) in [-1, 1].

        Picture i depends on `seed`, `first + i` and its label alone, not on the batch size.

        Args:
            count: How many.
            label: One class for all of them, by number or name.
            labels: A class for each; by default they take turns.
            seed: Another seed, other pictures.
            first: The number of the first picture.
            batch_size: Pictures drawn at once.

        Raises:
            UserError: If a class does not exist.
        """
        every = self._labels(count, label, labels, first)
        pieces = [
            self.tokenizer.images(self.sample_tokens(every[i : i + batch_size], seed=seed, first=first + i))
            for i in range(0, count, batch_size)
        ]
        return torch.cat(pieces)

    @torch.no_grad()
    def sample_tokens(self, labels: Tensor, *, seed: int = 0, first: int = 0, grid: Size | None = None) -> Tensor:
        """Draw token sequences (B, h * w), one for each of the labels (B,)."""
        self.eval()
        prefix = self.conditioner(Batch(labels=labels.to(self.device)))
        return self.sampler(self.prior, prefix, grid or self.tokenizer.grid, seed=seed, first=first)

    def _labels(self, count: int, label: int | str | None, labels: Sequence[int] | Tensor | None, first: int) -> Tensor:
        if labels is not None:
            chosen = torch.as_tensor(labels)
        elif label is not None:
            chosen = torch.full((count,), self.class_index(label))
        else:
            chosen = (torch.arange(count) + first) % max(len(self.classes), 1)
        if len(chosen) != count:
            raise UserError(f"labels: {len(chosen)} labels for {count} pictures")
        if self.classes and (chosen.min() < 0 or chosen.max() >= len(self.classes)):
            raise UserError(f"labels: classes are numbered 0 to {len(self.classes) - 1}")
        return chosen

    def class_index(self, label: int | str) -> int:
        """Return the number of a class given by number or name."""
        if isinstance(label, int) or str(label).isdigit():
            if int(label) not in range(len(self.classes)):
                raise UserError(f"label={label}: {unknown('class', label, range(len(self.classes)))}")
            return int(label)
        if label not in self.classes:
            raise UserError(f"label={label}: {unknown('class', label, self.classes)}")
        return self.classes.index(label)
