"""Several conditioners at once: what stage 2 is told, one after the other, in front of the codes of an image."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from vqf.batch import Batch, GridPosition
from vqf.protocols import Conditioner


class ConditionerStack(nn.Module):
    """Conditioners side by side, each with ids of its own.

    In training one random number of each image says what is left out: all whose `dropout` is above it. So each is
    absent as often as its `dropout` says, and whenever one is, all with a larger `dropout` are, too. Guidance asks for
    what is drawn without any of them, and training has seen that as often as the smallest `dropout` above 0 says.

    Args:
        conditioners: By name; their tokens stand in this order.
    """

    def __init__(self, conditioners: Mapping[str, Conditioner]) -> None:
        super().__init__()
        assert conditioners, "stage 2 has at least a start token in front"
        self.conditioners = dict(conditioners)
        self.weights = nn.ModuleDict({name: each for name, each in conditioners.items() if isinstance(each, nn.Module)})
        self.vocab_size = sum(each.vocab_size for each in conditioners.values())
        self.length = sum(each.length for each in conditioners.values())

    @property
    def positions(self) -> list[GridPosition | None]:
        """The place in the image that each token of the prefix speaks of; None where it speaks of none."""
        parts = self.conditioners.values()
        return [place for each in parts for place in getattr(each, "positions", [None] * each.length)]

    @property
    def channels(self) -> int | None:
        """Channels of the images that a condition is drawn as; None where no condition is an image."""
        found = [each.channels for each in self.conditioners.values() if hasattr(each, "channels")]
        return found[0] if found else None

    @property
    def size_multiple(self) -> int:
        """Pixels that must divide the sides of those images."""
        return math.lcm(*(getattr(each, "size_multiple", 1) for each in self.conditioners.values()))

    def prepare(self, batch: Batch, *, shifted: bool = False) -> Batch:
        """Return the batch with the codes of all images that a condition is made of.

        Args:
            batch: Has the images.
            shifted: Whether windows will be cut of it that may start between two codes of a condition.
        """
        for each in self.conditioners.values():
            if shifted and hasattr(each, "prepare_shifted"):
                batch = each.prepare_shifted(batch)
            elif hasattr(each, "prepare"):
                batch = each.prepare(batch)
        return batch

    def forward(self, batch: Batch) -> Tensor:
        """Return the prefix (B, M)."""
        prefixes = [each(batch) for each in self.conditioners.values()]
        return self._concat(self._apply_dropout(prefixes, batch) if self.training else prefixes)

    def _apply_dropout(self, prefixes: list[Tensor], batch: Batch) -> list[Tensor]:
        """Leave conditions out at random."""
        drops = [getattr(each, "dropout", 0.0) for each in self.conditioners.values()]
        if not any(drops):
            return prefixes
        chance = torch.rand(len(batch), 1, device=prefixes[0].device)
        return [
            prefix if null is None else torch.where(chance < drop, null, prefix)
            for prefix, null, drop in zip(prefixes, self._null_prefixes(batch), drops, strict=True)
        ]

    def _null_prefixes(self, batch: Batch) -> list[Tensor | None]:
        conditioners = self.conditioners.values()
        return [each.null_prefix(batch) if hasattr(each, "null_prefix") else None for each in conditioners]

    def null_prefix(self, batch: Batch) -> Tensor | None:
        """Return the prefix (B, M) without what can be left out; None if nothing can."""
        without = self._null_prefixes(batch)
        if all(each is None for each in without):
            return None
        parts = zip(self.conditioners.values(), without, strict=True)
        return self._concat(part(batch) if left is None else left for part, left in parts)

    def render(self, batch: Batch) -> dict[str, Tensor]:
        """Draw every condition that can be drawn, (B, C, H, W) each."""
        return {name: each.render(batch) for name, each in self.conditioners.items() if hasattr(each, "render")}

    def _concat(self, prefixes: Iterable[Tensor]) -> Tensor:
        first, shifted = 0, []
        for part, prefix in zip(self.conditioners.values(), prefixes, strict=True):
            shifted.append(prefix + first)
            first += part.vocab_size
        return torch.cat(shifted, dim=1)
