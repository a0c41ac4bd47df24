"""The condition tokens in front of the tokens of an image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vqf.batch import GridPosition

EMBEDDED = -1  # the id of a prefix token that is an embedding


@dataclass(frozen=True)
class Prefix:
    """M condition tokens: ids, or embeddings of a frozen encoder such as that of a caption.

    Where a prefix has ids alone, functions also take these, (B, M), as they are (`Prefix.of`).
    """

    ids: Tensor  # (B, M) int64; -1 where the token is an embedding
    embeddings: Tensor | None = None  # (B, M, D) float, read where the id is -1

    @staticmethod
    def of(prefix: "Prefix | Tensor") -> "Prefix":
        return Prefix(prefix) if isinstance(prefix, Tensor) else prefix

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | Tensor) -> "Prefix":
        return self.map(lambda each: each[rows])

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Prefix":
        return Prefix(fn(self.ids), None if self.embeddings is None else fn(self.embeddings))

    def equals(self, other: "Prefix") -> bool:
        pairs = ((self.ids, other.ids), (self.embeddings, other.embeddings))
        return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)

    @staticmethod
    def cat(prefixes: Sequence["Prefix"], dim: int = 0) -> "Prefix":
        """Concatenate samples (dim 0) or tokens (dim 1). Tokens without an embedding get one of zeros."""
        widths = {each.embeddings.shape[-1] for each in prefixes if each.embeddings is not None}
        ids = torch.cat([each.ids for each in prefixes], dim)
        if not widths:
            return Prefix(ids)
        (width,) = widths
        like = next(each.embeddings for each in prefixes if each.embeddings is not None)
        embeddings = [
            like.new_zeros(*each.ids.shape, width) if each.embeddings is None else each.embeddings for each in prefixes
        ]
        return Prefix(ids, torch.cat(embeddings, dim))


@dataclass(frozen=True)
class PrefixSpec:
    """What a prior is built for: the prefixes that it will be given."""

    vocab_size: int  # ids are in [0, vocab_size); 0 if all tokens are embeddings
    length: int  # M
    positions: Sequence[GridPosition | None] = field(default=())  # of each token in the image's grid; none by default
    embedding_dim: int = 0  # D; 0 without embeddings
