"""What the tokens of an image mean: scale by scale, row by row, codebook by codebook."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from vqf.batch import Size

MAX_COUNTED = 2**18  # codes: of a larger codebook nothing of its size is held


@dataclass(frozen=True)
class TokenLayout:
    """The positions of T tokens, (B, T) int64, of an image.

    Token t has a scale, a row and a column in the grid of that scale, and a codebook; codebooks change fastest, then
    columns, rows, scales.

    Example: VQGAN at 256 px, RQ-VAE, VAR, TiTok::

        TokenLayout(((16, 16),), (16384,), 16)
        TokenLayout(((8, 8),), (16384,) * 4, 32)
        TokenLayout(((1, 1), (2, 2), ..., (16, 16)), (4096,), 16)
        TokenLayout(((1, 32),), (4096,), None)

    Args:
        scales: Height and width of the grid of each scale, from coarse to fine.
        vocab_sizes: Number of codes of each codebook of a cell.
        stride: Pixels per cell and side of the last scale; None if cells have no places in the image.
    """

    scales: tuple[Size, ...]
    vocab_sizes: tuple[int, ...]
    stride: int | None

    @property
    def codebooks(self) -> int:
        """K, the tokens of a cell."""
        return len(self.vocab_sizes)

    @property
    def vocab_size(self) -> int:
        """V, the size of the largest codebook, and so the number of logits of a token."""
        return max(self.vocab_sizes)

    @property
    def length(self) -> int:
        """T."""
        return sum(self.groups())

    @property
    def grid(self) -> Size | None:
        """Rows and columns of the cells of the last scale; None if they have no places in the image."""
        return None if self.stride is None else self.scales[-1]

    @property
    def is_raster(self) -> bool:
        """Whether the tokens are those of one grid of cells with places in the image."""
        return len(self.scales) == 1 and self.stride is not None

    @property
    def uniform_nats(self) -> float:
        """Mean of ln V_k: the nats per token of a prior that knows nothing."""
        return sum(map(math.log, self.vocab_sizes)) / self.codebooks

    @property
    def bits(self) -> float:
        """Bits of the tokens of an image, if all are equally likely."""
        return self.length * self.uniform_nats / math.log(2)

    def groups(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(self.codebooks * height * width for height, width in self.scales)

    def resized(self, grid: Size) -> "TokenLayout":
        """The layout of an image of another number of cells, where there is one scale."""
        return replace(self, scales=(grid,))

    def starts(self, other: "TokenLayout") -> bool:
        """Whether these tokens are the first of `other`: the same layout, or a raster of fewer rows."""
        if not (self.is_raster and other.is_raster):
            return self == other
        (rows, columns), (other_rows, other_columns) = self.scales[0], other.scales[0]
        return other.resized((rows, columns)) == self and columns == other_columns and rows <= other_rows

    def flatten(self, indices: Tensor) -> Tensor:
        """Turn a quantizer's indices, (B, h, w) or (B, h, w, K) or (B, T), into tokens (B, T)."""
        return indices.flatten(1)

    def unflatten(self, tokens: Tensor) -> Tensor:
        """Turn tokens into a quantizer's indices: (B, h, w), with K codebooks (B, h, w, K), with scales (B, T).

        Raises:
            ValueError: If there are not T tokens.
        """
        if tokens.ndim != 2 or tokens.shape[1] != self.length:
            raise ValueError(f"tokens must be (B, {self.length}), not {tuple(tokens.shape)}")
        if len(self.scales) > 1:
            return tokens
        return tokens.unflatten(1, self.scales[0] if self.codebooks == 1 else (*self.scales[0], self.codebooks))

    def by_codebook(self, tokens: Tensor) -> Tensor:
        """Turn tokens (B, T) into (B, cells, K)."""
        return tokens.unflatten(1, (-1, self.codebooks))

    def cells_to_tokens(self, values: Tensor) -> Tensor:
        """Turn values (..., h, w) of the cells of a raster into (..., T)."""
        return values.flatten(-2).repeat_interleave(self.codebooks, -1)

    def coordinates(self) -> Tensor:
        """Scale, row, column and codebook of each token, (T, 4) int64."""
        return torch.cat([
            torch.cartesian_prod(
                torch.tensor([scale]), torch.arange(height), torch.arange(width), torch.arange(self.codebooks)
            )
            for scale, (height, width) in enumerate(self.scales)
        ])  # fmt: skip

    @cached_property
    def vocab_offsets(self) -> tuple[int, ...]:
        """First id of each codebook, where all codes of all codebooks are numbered in a row."""
        return tuple(sum(self.vocab_sizes[:k]) for k in range(self.codebooks))

    def __str__(self) -> str:
        grids = " + ".join(f"{height} x {width}" for height, width in self.scales)
        return grids if self.codebooks == 1 else f"({grids}) x {self.codebooks}"
