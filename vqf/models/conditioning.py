"""Several conditioners as one."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from vqf.batch import Batch, GridPosition
from vqf.protocols import Conditioner


class ConditionerStack(nn.Module):
    """Conditioners in a fixed order, each with a vocabulary range of its own.

    Condition dropout is nested: training draws one uniform u per image, and drops every condition with `dropout` > u.
    Example: with 0.1 (label) and 0.4 (map), u = 0.05 drops both, u = 0.2 only the map, u = 0.5 none.
    """

    def __init__(self, conditioners: Mapping[str, Conditioner]) -> None:
        super().__init__()
        assert conditioners, "a prior needs at least one prefix token; conditioner 'none' is a start token"
        self.conditioners = dict(conditioners)
        self.weights = nn.ModuleDict({name: each for name, each in conditioners.items() if isinstance(each, nn.Module)})
        self.vocab_size = sum(each.vocab_size for each in conditioners.values())
        self.length = sum(each.length for each in conditioners.values())

    @property
    def positions(self) -> list[GridPosition | None]:
        return [
            position
            for each in self.conditioners.values()
            for position in getattr(each, "positions", [None] * each.length)
        ]

    @property
    def channels(self) -> int | None:
        return next((each.channels for each in self.conditioners.values() if hasattr(each, "channels")), None)

    @property
    def size_multiple(self) -> int:
        return math.lcm(*(getattr(each, "size_multiple", 1) for each in self.conditioners.values()))

    def prepare(self, batch: Batch, *, shifted: bool = False) -> Batch:
        for each in self.conditioners.values():
            if shifted and hasattr(each, "prepare_shifted"):
                batch = each.prepare_shifted(batch)
            elif hasattr(each, "prepare"):
                batch = each.prepare(batch)
        return batch

    def forward(self, batch: Batch) -> Tensor:
        prefixes = [each(batch) for each in self.conditioners.values()]
        return self._concat(self._apply_dropout(prefixes, batch) if self.training else prefixes)

    def _apply_dropout(self, prefixes: list[Tensor], batch: Batch) -> list[Tensor]:
        rates = [getattr(each, "dropout", 0.0) for each in self.conditioners.values()]
        if not any(rates):
            return prefixes
        u = torch.rand(len(batch), 1, device=prefixes[0].device)
        return [
            prefix if null is None else torch.where(u < rate, null, prefix)
            for prefix, null, rate in zip(prefixes, self._null_prefixes(batch), rates, strict=True)
        ]

    def _null_prefixes(self, batch: Batch) -> list[Tensor | None]:
        conditioners = self.conditioners.values()
        return [each.null_prefix(batch) if hasattr(each, "null_prefix") else None for each in conditioners]

    def null_prefix(self, batch: Batch) -> Tensor | None:
        """The prefix (B, M) without all droppable conditions, if any."""
        nulls = self._null_prefixes(batch)
        if all(null is None for null in nulls):
            return None
        pairs = zip(self.conditioners.values(), nulls, strict=True)
        return self._concat(conditioner(batch) if null is None else null for conditioner, null in pairs)

    def render(self, batch: Batch) -> dict[str, Tensor]:
        return {name: each.render(batch) for name, each in self.conditioners.items() if hasattr(each, "render")}

    def _concat(self, prefixes: Iterable[Tensor]) -> Tensor:
        offset, ids = 0, []
        for conditioner, prefix in zip(self.conditioners.values(), prefixes, strict=True):
            ids.append(prefix + offset)
            offset += conditioner.vocab_size
        return torch.cat(ids, dim=1)
