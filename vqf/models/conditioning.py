"""Several conditioners at once: what stage 2 is told, one after the other, in front of the codes of a picture."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from vqf.batch import Batch, Place
from vqf.protocols import Conditioner


class Conditions(nn.Module):
    """Conditioners side by side, each with ids of its own.

    In training one random number of each picture says what is left out: all whose `drop` is above it. So each is absent
    as often as its `drop` says, and whenever one is, all with a larger `drop` are, too. Guidance asks for what is drawn
    without any of them, and training has seen that as often as the smallest `drop` above 0 says.

    Args:
        parts: By name; their tokens stand in this order.
    """

    def __init__(self, parts: Mapping[str, Conditioner]) -> None:
        super().__init__()
        assert parts, "stage 2 has at least a start token in front"
        self.parts = dict(parts)
        self.weights = nn.ModuleDict({name: each for name, each in parts.items() if isinstance(each, nn.Module)})
        self.vocab_size = sum(each.vocab_size for each in parts.values())
        self.length = sum(each.length for each in parts.values())

    @property
    def places(self) -> list[Place | None]:
        """The place in the picture that each token of the prefix speaks of; None where it speaks of none."""
        parts = self.parts.values()
        return [place for each in parts for place in getattr(each, "places", [None] * each.length)]

    @property
    def channels(self) -> int | None:
        """Channels of the pictures that a condition is drawn as; None where no condition is a picture."""
        found = [each.channels for each in self.parts.values() if hasattr(each, "channels")]
        return found[0] if found else None

    @property
    def multiple(self) -> int:
        """Pixels that must divide the sides of those pictures."""
        return math.lcm(*(getattr(each, "multiple", 1) for each in self.parts.values()))

    def prepare(self, batch: Batch, *, shifted: bool = False) -> Batch:
        """Return the batch with the codes of all pictures that a condition is made of.

        Args:
            batch: Has the pictures.
            shifted: Whether windows will be cut of it that may start between two codes of a condition.
        """
        for each in self.parts.values():
            if shifted and hasattr(each, "prepare_shifted"):
                batch = each.prepare_shifted(batch)
            elif hasattr(each, "prepare"):
                batch = each.prepare(batch)
        return batch

    def forward(self, batch: Batch) -> Tensor:
        """Return the prefix (B, M)."""
        prefixes = [each(batch) for each in self.parts.values()]
        return self._joined(self._dropped(prefixes, batch) if self.training else prefixes)

    def _dropped(self, prefixes: list[Tensor], batch: Batch) -> list[Tensor]:
        """Leave conditions out at random."""
        drops = [getattr(each, "drop", 0.0) for each in self.parts.values()]
        if not any(drops):
            return prefixes
        chance = torch.rand(len(batch), 1, device=prefixes[0].device)
        return [
            prefix if null is None else torch.where(chance < drop, null, prefix)
            for prefix, null, drop in zip(prefixes, self._nulls(batch), drops, strict=True)
        ]

    def _nulls(self, batch: Batch) -> list[Tensor | None]:
        return [each.null(batch) if hasattr(each, "null") else None for each in self.parts.values()]

    def null(self, batch: Batch) -> Tensor | None:
        """Return the prefix (B, M) without what can be left out; None if nothing can."""
        without = self._nulls(batch)
        if all(each is None for each in without):
            return None
        parts = zip(self.parts.values(), without, strict=True)
        return self._joined(part(batch) if left is None else left for part, left in parts)

    def show(self, batch: Batch) -> dict[str, Tensor]:
        """Draw every condition that can be drawn, (B, C, H, W) each."""
        return {name: each.show(batch) for name, each in self.parts.items() if hasattr(each, "show")}

    def _joined(self, prefixes: Iterable[Tensor]) -> Tensor:
        first, shifted = 0, []
        for part, prefix in zip(self.parts.values(), prefixes, strict=True):
            shifted.append(prefix + first)
            first += part.vocab_size
        return torch.cat(shifted, dim=1)
