"""Several conditioners as one."""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from vqf.batch import Batch, GridPosition
from vqf.errors import UserError
from vqf.protocols import (
    Conditioner,
    Droppable,
    Embedded,
    Positioned,
    Prepares,
    PreparesShifted,
    ReadsField,
    ReadsImages,
    Renders,
)
from vqf.tokens.prefix import EMBEDDED, Prefix, PrefixSpec


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
        vocab_size = sum(each.vocab_size for each in conditioners.values())
        length = sum(each.length for each in conditioners.values())
        self.spec = PrefixSpec(vocab_size, length, self._positions(), self._embedding_dim())

    def _positions(self) -> list[GridPosition | None]:
        return [
            position
            for each in self.conditioners.values()
            for position in (each.positions if isinstance(each, Positioned) else [None] * each.length)
        ]

    def _embedding_dim(self) -> int:
        dims = {name: each.embedding_dim for name, each in self.conditioners.items() if isinstance(each, Embedded)}
        if len({*dims.values()}) > 1:
            sizes = " and ".join(f"'{name}' of {dim}" for name, dim in dims.items())
            raise UserError(f"model.conditioner: embeddings must have one width, not {sizes} channels")
        return next(iter(dims.values()), 0)

    def image_conditioners(self) -> Iterator[tuple[str, ReadsImages]]:
        """The conditioners of images, by name."""
        return ((name, each) for name, each in self.conditioners.items() if isinstance(each, ReadsImages))

    @property
    def channels(self) -> int | None:
        return next((each.channels for _, each in self.image_conditioners()), None)

    @property
    def size_multiple(self) -> int:
        return math.lcm(*(each.size_multiple for _, each in self.image_conditioners()))

    @property
    def fields(self) -> set[str]:
        """The fields of a batch that are read of each image, except labels."""
        return {each.batch_field for each in self.conditioners.values() if isinstance(each, ReadsField)}

    def prepare(self, batch: Batch, *, shifted: bool = False) -> Batch:
        for each in self.conditioners.values():
            if shifted and isinstance(each, PreparesShifted):
                batch = each.prepare_shifted(batch)
            elif isinstance(each, Prepares):
                batch = each.prepare(batch)
        return batch

    def forward(self, batch: Batch) -> Prefix:
        prefixes = [each(batch) for each in self.conditioners.values()]
        return self._concat(self._apply_dropout(prefixes, batch) if self.training else prefixes)

    def _apply_dropout(self, prefixes: list[Tensor], batch: Batch) -> list[Tensor]:
        rates = [each.dropout if isinstance(each, Droppable) else 0.0 for each in self.conditioners.values()]
        if not any(rates):
            return prefixes
        u = torch.rand(len(batch), 1, device=prefixes[0].device)
        return [
            prefix if null is None else torch.where((u < rate).view(-1, *[1] * (prefix.ndim - 1)), null, prefix)
            for prefix, null, rate in zip(prefixes, self._null_prefixes(batch), rates, strict=True)
        ]

    def _null_prefixes(self, batch: Batch) -> list[Tensor | None]:
        conditioners = self.conditioners.values()
        return [each.null_prefix(batch) if isinstance(each, Droppable) else None for each in conditioners]

    def null_prefix(self, batch: Batch) -> Prefix | None:
        """The prefix without all droppable conditions, if any."""
        nulls = self._null_prefixes(batch)
        if all(null is None for null in nulls):
            return None
        pairs = zip(self.conditioners.values(), nulls, strict=True)
        return self._concat(conditioner(batch) if null is None else null for conditioner, null in pairs)

    def render(self, batch: Batch) -> dict[str, Tensor]:
        return {name: each.render(batch) for name, each in self.conditioners.items() if isinstance(each, Renders)}

    def _concat(self, prefixes: Iterable[Tensor]) -> Prefix:
        offset, parts = 0, []
        for conditioner, prefix in zip(self.conditioners.values(), prefixes, strict=True):
            if isinstance(conditioner, Embedded):
                parts.append(Prefix(prefix.new_full(prefix.shape[:2], EMBEDDED, dtype=torch.int64), prefix))
            else:
                parts.append(Prefix(prefix + offset))
                offset += conditioner.vocab_size
        return Prefix.cat(parts, dim=1)
