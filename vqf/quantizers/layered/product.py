"""Product quantization: groups of channels, each with a quantizer of its own.

UniTok: A Unified Tokenizer for Visual Generation and Understanding, https://arxiv.org/abs/2502.20321, section 3.2
(multi-codebook quantization); Product Quantization for Nearest Neighbor Search, Jégou et al. 2011.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqf.batch import Size
from vqf.options.ranges import Dimension
from vqf.protocols import Quantized
from vqf.quantizers.layered.base_quantizers import (
    base_of,
    build_base,
    codebook_sizes,
    join_indices,
    merge_stats,
    split_indices,
    update_all,
)
from vqf.registry import register
from vqf.tokens.layout import TokenLayout


@register("quantizer", "product")
class ProductQuantizer(nn.Module):
    """Splits the channels into groups and quantizes each by itself, https://arxiv.org/abs/2502.20321.

    z = [z_1, ..., z_G],  output [Q_1(z_1), ..., Q_G(z_G)]; the loss is the mean of the groups'.

    Good for a large vocabulary, V^G vectors, of small codebooks that are searched quickly and used fully. A prior has G
    tokens a cell to predict. Groups do not refine each other; where the first tokens shall be the coarse ones, take
    `residual`, also as the base: {name: residual, base: {name: vq}}.

    Args:
        base: The quantizer of each group, whose `dim` is the number of channels of a group, as
            {name: cosine, dim: 8, codebook_size: 4096}.
        groups: G, the number of groups; 8 in UniTok.
    """

    def __init__(self, *, base: Mapping[str, Any], groups: Dimension = 8) -> None:
        super().__init__()
        self.groups = build_base(base, groups)
        first = base_of(self.groups)
        self.group_dim, self.vocab_size = first.dim, first.vocab_size
        self.dim = groups * first.dim
        self.group_sizes = codebook_sizes(first)

    def layout(self, grid: Size, stride: int | None) -> TokenLayout:
        return TokenLayout((grid,), self.group_sizes * len(self.groups), stride)

    def forward(self, z: Tensor) -> Quantized:
        groups = zip(self.groups, z.split(self.group_dim, dim=1), strict=True)
        parts = [quantizer(channels) for quantizer, channels in groups]
        latents = torch.cat([part.latents for part in parts], dim=1)
        loss = torch.stack([part.loss for part in parts]).mean()
        return Quantized(latents, join_indices([part.indices for part in parts]), loss, merge_stats(parts))

    def update(self) -> dict[str, Tensor]:
        return update_all(self.groups)

    def lookup(self, indices: Tensor) -> Tensor:
        """The latents of indices; the channels of groups that are left out are 0."""
        parts = split_indices(indices, [len(self.group_sizes)] * len(self.groups))
        groups: list[Any] = list(self.groups)
        latents = torch.cat([groups[g].lookup(part) for g, part in enumerate(parts)], dim=1)
        return F.pad(latents, (0, 0, 0, 0, 0, self.dim - latents.shape[1]))
