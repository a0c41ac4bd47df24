"""The generator of stage 2: conditions to images."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vqf.batch import Batch, Size
from vqf.errors import UserError
from vqf.models.class_labels import class_index, resolve_labels
from vqf.models.condition_batch import condition_batch, condition_image_size, pad_to
from vqf.models.conditioning import ConditionerStack
from vqf.models.inputs import check_codes, check_mask, check_seed, check_start, whole_number
from vqf.models.prefixes import full_prefixes, window_prefixes
from vqf.models.sample_request import (
    check_raster,
    check_sampler,
    known_token_mask,
    layout_for_size,
)
from vqf.models.tokenizer import Tokenizer
from vqf.protocols import Prior, Sampler, ScoredSamples, Scorer, Windowed
from vqf.seeding import hash_seed
from vqf.tokens.layout import TokenLayout


class Generator(nn.Module):
    """Samples images, and completes masked ones.

    Args:
        crop_extent: Mean height and width of training crops as fractions of a full image, if known.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        conditioner: ConditionerStack,
        prior: Prior,
        sampler: Sampler,
        classes: Sequence[str],
        scorer: Scorer | None = None,
        crop_extent: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer, self.conditioner, self.prior = tokenizer, conditioner, prior
        self.sampler, self.scorer, self.crop_extent = sampler, scorer, crop_extent
        self.classes = list(classes)

    @property
    def device(self) -> torch.device:
        return next(self.tokenizer.parameters()).device

    @torch.no_grad()
    def sample(
        self,
        count: int,
        *,
        label: int | str | None = None,
        labels: Sequence[int | str] | Tensor | None = None,
        seed: int = 0,
        first: int = 0,
        batch_size: int = 64,
        size: int | Sequence[int] | None = None,
        conditions: Tensor | Batch | None = None,
        tile: int | None = None,
        candidates: int = 1,
    ) -> Tensor:
        """Sample images (count, 3, H, W) in [-1, 1].

        Image i depends on `seed`, `first + i` and its conditions alone, not on the batch size.

        Args:
            label: One class for all images, by index or name.
            labels: Class of each image, by index or name; by default (`first` + i) mod their number.
            size: Height and width in pixels, or one number for both; by default as in training. Condition images decide
                it themselves.
            conditions: Images in [-1, 1], (count, C, H, W), or (C, H, W) for all; or a batch of `count` rows or one.
            tile: Decode at most so many cells per side at once.
            candidates: Samples for each image, of which `self.scorer` keeps the best.

        Raises:
            UserError: If an argument is wrong, a class or condition is missing, or the sampler cannot sample that size.
        """
        count, candidates, seed = whole_number("count", count), whole_number("candidates", candidates), check_seed(seed)
        first, batch_size = whole_number("first", first, 0), whole_number("batch_size", batch_size)
        tile = None if tile is None else whole_number("tile", tile)
        batch = condition_batch(conditions, self.conditioner, count)
        if batch.labels is None or label is not None or labels is not None:
            batch = replace(batch, labels=resolve_labels(count, self.classes, label, labels, first))
        if (pixels := condition_image_size(batch)) is None:
            layout = self.tokenizer.layout if size is None else layout_for_size(size, self.tokenizer)
        elif size is not None:
            raise UserError(f"size={size}: an image is as large as its condition; leave size out")
        else:
            batch, layout = self._pad_conditions(batch, pixels)
        images = torch.cat([
            self._best_of(batch.slice(i, i + batch_size), candidates, seed, first + i, layout, tile)
            for i in range(0, count, batch_size)
        ])  # fmt: skip
        return images if pixels is None else images[..., : pixels[0], : pixels[1]]

    def _pad_conditions(self, conditions: Batch, size: Size) -> tuple[Batch, TokenLayout]:
        layout = self.tokenizer.layout
        if layout.stride is None:
            return conditions, layout
        multiple = math.lcm(layout.stride, self.conditioner.size_multiple)
        smallest = self.tokenizer.image_size
        height, width = (-(-max(size[i], smallest[i]) // multiple) * multiple for i in (0, 1))
        grid = (height // layout.stride, width // layout.stride)
        return pad_to(conditions, size, (height, width)), self.tokenizer.layout_of(grid)

    def _best_of(
        self, conditions: Batch, candidates: int, seed: int, first: int, layout: TokenLayout, tile: int | None
    ) -> Tensor:
        best = scores = torch.zeros(())
        for candidate in range(candidates):
            # Candidate 0 is the sample of candidates=1, so that more candidates can only improve the score.
            key = hash_seed(seed, "candidate", candidate) if candidate else seed
            tokens = self.sample_tokens(conditions, seed=key, first=first, layout=layout)
            images = self.tokenizer.decode_unchecked(layout.unflatten(tokens), tile)
            if candidates == 1:
                return images
            new_scores = self._score(conditions, tokens, images, layout)
            better = new_scores > scores if candidate else torch.ones_like(new_scores, dtype=torch.bool)
            best = torch.where(better[:, None, None, None], images, best)
            scores = torch.where(better, new_scores, scores)
        return best

    def _score(self, conditions: Batch, tokens: Tensor, images: Tensor, layout: TokenLayout) -> Tensor:
        if self.scorer is None:
            raise UserError("candidates: needs a scorer to choose the best; add scorer=likelihood or scorer=imagenet")
        batch = conditions.to(self.device)
        trained = layout == self.prior.layout
        prefix = self.conditioner(self.conditioner.prepare(batch)) if trained else None
        return self.scorer(ScoredSamples(images, tokens, self.prior, prefix, batch.labels, self.classes))

    @torch.no_grad()
    def complete(
        self,
        images: Tensor,
        mask: Tensor,
        *,
        labels: Sequence[int | str] | Tensor | None = None,
        seed: int = 0,
        first: int = 0,
        batch_size: int = 64,
        conditions: Tensor | Batch | None = None,
    ) -> Tensor:
        """Sample the unknown region of images, with the options of `sample`.

        Returns images (B, 3, H, W) in [-1, 1]. With a causal prior, a token depends on known ones above it and to its
        left only.

        Args:
            images: (B, C, H, W), or their indices (B, h, w) or (B, h, w, K). Tokens near the mask may depend on a few
                unknown pixels.
            mask: True where known: (H, W) or (B, H, W) in pixels, or (h, w) or (B, h, w) in cells. The tokens of a cell
                are known where all of its pixels are.
            conditions: Conditioners that read a view of the image see all of `images` by default.

        Raises:
            UserError: If an argument is wrong, the sampler cannot keep known tokens, or cannot sample this size, or the
                tokens are not those of one grid.
        """
        check_raster(self.tokenizer.layout, "mask")
        first, batch_size = whole_number("first", first, 0), whole_number("batch_size", batch_size)
        start, seed, mask = check_start(images, self.tokenizer.layout), check_seed(seed), check_mask(mask)
        images = self.tokenizer.check_images(images) if start is None else start
        indices, count = self._to_indices(images, batch_size), len(images)
        layout = self.tokenizer.layout_of((indices.shape[1], indices.shape[2]))
        unknown = ~known_token_mask(mask.to(self.device), layout, count)
        tokens = layout.flatten(indices)
        if not images.is_floating_point():
            check_codes(tokens.masked_fill(unknown, 0), layout, "images")
        known = tokens.masked_fill(unknown, -1)
        batch = condition_batch(self._default_conditions(conditions, images), self.conditioner, count)
        if batch.labels is None or labels is not None:
            batch = replace(batch, labels=resolve_labels(count, self.classes, None, labels, first))
        completed = []
        for i in range(0, count, batch_size):
            rows = slice(i, i + batch_size)
            tokens = self.sample_tokens(
                batch.slice(i, i + batch_size), seed=seed, first=first + i, layout=layout, known=known[rows]
            )
            completed.append(self.tokenizer.decode_unchecked(layout.unflatten(tokens)))
        return torch.cat(completed)

    @torch.no_grad()
    def sample_tokens(
        self,
        conditions: Batch,
        *,
        seed: int = 0,
        first: int = 0,
        layout: TokenLayout | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """Sample tokens (B, T), one row for each of a batch of conditions.

        Args:
            layout: Of the images, by default that of the tokenizer's training.
            known: (B, T), tokens to keep, -1 where one is to be sampled.

        Raises:
            UserError: If the sampler cannot keep known tokens, or cannot sample this layout.
        """
        self.eval()
        layout = layout or self.tokenizer.layout
        check_sampler(self.sampler, self.prior, self.conditioner, layout, known is not None)
        conditions, windowed = conditions.to(self.device), isinstance(self.sampler, Windowed)
        if not conditions.condition_indices:
            conditions = self.conditioner.prepare(conditions, shifted=windowed and layout != self.prior.layout)
        grid, trained_grid = layout.scales[-1], self.prior.layout.scales[-1]
        prefix: Any  # a `Prefix`, or a function of windows
        null_prefix: Any
        if windowed:
            prefix, null_prefix = window_prefixes(self.conditioner, conditions, grid, trained_grid, self.crop_extent)
        else:
            prefix, null_prefix = full_prefixes(self.conditioner, conditions, grid, self.crop_extent)
        return self.sampler(self.prior, prefix, layout, seed=seed, first=first, known=known, null_prefix=null_prefix)

    def _default_conditions(self, conditions: Tensor | Batch | None, images: Tensor) -> Tensor | Batch | None:
        if isinstance(conditions, Tensor) or not images.is_floating_point():
            return conditions
        batch = conditions or Batch()
        return replace(batch, images=images) if batch.images is None else batch

    def _to_indices(self, images: Tensor, batch_size: int) -> Tensor:
        if not images.is_floating_point():
            return images.to(self.device)
        self.eval()
        return torch.cat([self.tokenizer.encode_unchecked(chunk) for chunk in images.split(batch_size)])

    def class_index(self, label: int | str) -> int:
        """The index of a class by index or name.

        Raises:
            UserError: If there is none.
        """
        return class_index(label, self.classes)
