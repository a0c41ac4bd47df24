"""Small components of other shapes of tokens: tokens without places, embedded conditions, a masked prior.

Importing the module registers them; `plugins=[tests.support.shelf]` does so on the command line.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqf import register
from vqf.batch import Batch, Size
from vqf.options.ranges import Depth, Dimension, NonNegativeFloat, PositiveFloat, PositiveInt, Rate
from vqf.protocols import Masked
from vqf.tokens.layout import TokenLayout
from vqf.tokens.prefix import EMBEDDED, Prefix, PrefixSpec
from vqf.transformers.samplers.filtering import batch_noise, sample_from_logits
from vqf.transformers.samplers.logit_sampler import LogitSampler, check_finite, init_tokens


@register("encoder", "toy_queries")
class ToyQueries(nn.Module):
    """An image to latents that are of no place, each a linear function of the whole image."""

    stride = None

    def __init__(self, in_channels: int, image_size: Size, *, dim: Dimension = 6, num_latents: Dimension = 5) -> None:
        super().__init__()
        self.dim, self.num_latents = dim, num_latents
        pixels = in_channels * math.prod(side // 4 for side in image_size)
        self.project = nn.Linear(pixels, dim * num_latents)

    def forward(self, images: Tensor) -> Tensor:
        return self.project(F.avg_pool2d(images, 4).flatten(1)).unflatten(1, (self.dim, 1, self.num_latents))


@register("decoder", "toy_queries")
class ToyQueriesDecoder(nn.Module):
    """The way back."""

    stride = None

    def __init__(self, dim: int, out_channels: int, image_size: Size, *, num_latents: Dimension = 5) -> None:
        super().__init__()
        self.grid = (image_size[0] // 4, image_size[1] // 4)
        self.project = nn.Linear(dim * num_latents, 4 * math.prod(self.grid))
        self.last_layer = nn.ConvTranspose2d(4, out_channels, 4, stride=4)

    def features(self, latents: Tensor) -> Tensor:
        return self.project(latents.flatten(1)).unflatten(1, (4, *self.grid))

    def forward(self, latents: Tensor) -> Tensor:
        return self.last_layer(self.features(latents))


@register("prior", "toy_masked", defaults=[{"override /sampler@_global_.sampler": "toy_masked"}])
class ToyMasked(nn.Module):
    """Unknown tokens given the known ones, https://arxiv.org/abs/2202.04200."""

    likelihood = False

    def __init__(
        self, layout: TokenLayout, prefix: PrefixSpec, *, layers: Depth = 1, heads: Dimension = 2, dim: Dimension = 16
    ) -> None:
        super().__init__()
        self.layout = layout
        self.tokens = nn.Embedding(sum(layout.vocab_sizes) + 1, dim)  # the last one stands for unknown tokens
        self.prefix = nn.Embedding(max(prefix.vocab_size, 1), dim)
        self.embeddings = nn.Linear(prefix.embedding_dim, dim) if prefix.embedding_dim else None
        self.positions = nn.Parameter(torch.randn(prefix.length + layout.length, dim) / 4)
        block = {"dim_feedforward": 4 * dim, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.body = nn.Sequential(*(nn.TransformerEncoderLayer(dim, heads, **block) for _ in range(layers)))
        self.head = nn.Linear(dim, layout.vocab_size)
        offsets = torch.tensor(layout.vocab_offsets)[layout.coordinates()[:, 3]]
        sizes = torch.tensor(layout.vocab_sizes)[layout.coordinates()[:, 3]]
        self.register_buffer("offsets", offsets, persistent=False)
        self.register_buffer("beyond", torch.arange(layout.vocab_size) >= sizes[:, None], persistent=False)

    def predict(self, tokens: Tensor, prefix: Prefix | Tensor) -> Tensor:
        prefix = Prefix.of(prefix)
        front = self.prefix(prefix.ids.clamp(min=0))
        if self.embeddings is not None and prefix.embeddings is not None:
            front = torch.where((prefix.ids == EMBEDDED)[..., None], self.embeddings(prefix.embeddings), front)
        ids = torch.where(tokens < 0, self.tokens.num_embeddings - 1, tokens + self.offsets)
        h = self.body(torch.cat([front, self.tokens(ids)], 1) + self.positions)
        return self.head(h[:, -tokens.shape[1] :]).masked_fill(self.beyond, -torch.inf)

    def loss(self, tokens: Tensor, prefix: Prefix | Tensor) -> Tensor:
        share = torch.cos(torch.rand(len(tokens), 1, device=tokens.device) * math.pi / 2)
        unknown = torch.rand(tokens.shape, device=tokens.device) < share.clamp(min=1 / tokens.shape[1])
        logits = self.predict(tokens.masked_fill(unknown, -1), prefix)
        nats = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
        return (nats * unknown).sum() / unknown.sum().clamp(min=1)


@register("sampler", "toy_masked")
class ToyMaskedSampler(LogitSampler):
    """Samples all unknown tokens, and keeps the most confident: more in each of the steps."""

    draws = Masked
    keeps_known = True

    def __init__(
        self, *, steps: PositiveInt = 3, temperature: PositiveFloat = 1.0, guidance: NonNegativeFloat = 1.0
    ) -> None:
        super().__init__(temperature=temperature, guidance=guidance)
        self.steps = steps

    @torch.no_grad()
    def __call__(
        self,
        prior: Masked,
        prefix: Prefix | Tensor,
        layout: TokenLayout,
        *,
        seed: int,
        first: int = 0,
        known: Tensor | None = None,
        null_prefix: Prefix | Tensor | None = None,
    ) -> Tensor:
        self.require_null_prefix(null_prefix)
        prefix = Prefix.of(prefix)
        tokens = init_tokens(known, (len(prefix), layout.length), layout, prefix.device)
        noise = batch_noise(seed, first, len(prefix), self.steps * layout.length).to(prefix.device)
        prefixes = Prefix.cat([prefix, Prefix.of(null_prefix)]) if self.uses_guidance and null_prefix else prefix
        for step, numbers in enumerate(noise.chunk(self.steps, dim=1), 1):
            logits = prior.predict(tokens.repeat(len(prefixes) // len(tokens), 1), prefixes)
            check_finite(logits)
            logits = self.filter(self.guide(logits, torch.tensor(self.guidance)))
            sampled = sample_from_logits(logits, numbers)
            confidence = logits.log_softmax(-1).gather(-1, sampled[..., None])[..., 0]
            confidence = confidence.masked_fill(tokens >= 0, -torch.inf)
            unknown = (tokens < 0).sum(1, keepdim=True)
            rank = confidence.argsort(1, descending=True).argsort(1)
            chosen = (rank < unknown * step / self.steps) & (tokens < 0)
            tokens = torch.where(chosen, sampled, tokens)
        return tokens


@register("conditioner", "toy_embedding")
class ToyEmbedding(nn.Module):
    """A class as two embeddings of a frozen table, as a caption would be those of its words."""

    vocab_size, length, embedding_dim = 0, 2, 3

    def __init__(self, num_classes: int, *, dropout: Rate = 0.25) -> None:
        super().__init__()
        self.dropout = dropout
        table = torch.randn(num_classes + 1, 2, 3, generator=torch.Generator().manual_seed(0))
        self.register_buffer("table", table, persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        assert batch.labels is not None
        return self.table[batch.labels]

    def null_prefix(self, batch: Batch) -> Tensor:
        return self.table[-1:].expand(len(batch), 2, 3)
