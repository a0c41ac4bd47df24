"""The generator: a tokenizer, a prior over its codes, and a sampler. What a user of a stage-2 run holds."""

import inspect
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vqf.batch import Batch, Size
from vqf.errors import UserError
from vqf.models.condition_batch import condition_batch, condition_image_size, pad_to, per_image_fields
from vqf.models.conditioning import ConditionerStack
from vqf.models.sample_request import class_index, grid_for_size, known_token_mask, resolve_labels
from vqf.models.tokenizer import Tokenizer
from vqf.protocols import Prior, Sampler, ScoredSamples, Scorer
from vqf.seeding import hash_seed


class Generator(nn.Module):
    """Draws new images.

    Args:
        classes: Names of the labels that the conditioner knows; empty where there are none.
        scorer: Chooses among candidates, where several are drawn.
        crop_extent: Height and width of the training images as shares of the whole that they were a part of, where
            they have places.
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
        size: int | Sequence[int] | None = None,
        conditions: Tensor | Batch | None = None,
        tile: int | None = None,
        candidates: int = 1,
    ) -> Tensor:
        """Draw `count` images (count, 3, H, W) in [-1, 1].

        Image i depends on `seed`, `first + i` and its conditions alone, not on the batch size.

        Args:
            count: How many.
            label: One class for all of them, by number or name.
            labels: A class for each; by default they take turns.
            seed: Another seed, other images.
            first: The number of the first image.
            batch_size: Images drawn at once.
            size: Height and width in pixels, or one number for both; as in training by default. Images that are drawn
                by others are as large as these, whatever their size is.
            conditions: Images to draw by, in [-1, 1]: (count, C, H, W), or (C, H, W) for all of them. A map where
                the prior was trained on maps, an image where it was trained on low-resolution images or edges. A
                batch, with a row for each or one for all, where it was trained on both, or is told places.
            tile: Decode no more than so many codes per side at once; see `Tokenizer.decode`.
            candidates: Draw so many for each, and keep the one that `self.scorer` likes best.

        Raises:
            UserError: If a class does not exist, the sampler cannot draw that size, or a condition is missing.
        """
        every = condition_batch(conditions, self.conditioner, count)
        if every.labels is None or label is not None or labels is not None:
            every = replace(every, labels=resolve_labels(count, self.classes, label, labels, first))
        if (kept := condition_image_size(every)) is None:
            grid = self.tokenizer.grid if size is None else grid_for_size(size, self.tokenizer.stride)
            kept = (grid[0] * self.tokenizer.stride, grid[1] * self.tokenizer.stride)
        elif size is not None:
            raise UserError(f"size={size}: an image is as large as its condition; leave size out")
        else:
            every, grid = self._pad_conditions(every, kept)
        pieces = []
        for i in range(0, count, batch_size):
            told = every.slice(i, i + batch_size)
            pieces.append(self._best_of(told, candidates, seed, first + i, grid, tile))
        return torch.cat(pieces)[..., : kept[0], : kept[1]]

    def _pad_conditions(self, conditions: Batch, size: Size) -> tuple[Batch, Size]:
        """Continue conditions of a size until codes fill them, of the image and of its conditions."""
        stride = self.tokenizer.stride
        unit = math.lcm(stride, self.conditioner.size_multiple)
        least = self.tokenizer.image_size
        height, width = (-(-max(size[i], least[i]) // unit) * unit for i in (0, 1))
        return pad_to(conditions, size, (height, width)), (height // stride, width // stride)

    def _best_of(
        self, conditions: Batch, candidates: int, seed: int, first: int, grid: Size, tile: int | None
    ) -> Tensor:
        """Draw candidates for each image and return the best ones (B, 3, H, W)."""
        best = scores = torch.zeros(())
        for candidate in range(candidates):
            # The first is what one candidate gives, so that more of them can only add to the choice.
            key = hash_seed(seed, "candidate", candidate) if candidate else seed
            tokens = self.sample_tokens(conditions, seed=key, first=first, grid=grid)
            images = self.tokenizer.decode_tokens(tokens, grid, tile)
            if candidates == 1:
                return images
            found = self._score(conditions, tokens, images, grid)
            better = found > scores if candidate else torch.ones_like(found, dtype=torch.bool)
            best = torch.where(better[:, None, None, None], images, best)
            scores = torch.where(better, found, scores)
        return best

    def _score(self, conditions: Batch, tokens: Tensor, images: Tensor, grid: Size) -> Tensor:
        if self.scorer is None:
            raise UserError("candidates: a scorer says which is best; choose one with scorer=likelihood")
        batch = conditions.to(self.device)
        prefix = self.conditioner(self.conditioner.prepare(batch)) if grid == self.tokenizer.grid else None
        return self.scorer(ScoredSamples(images, tokens, self.prior, prefix, batch.labels, self.classes))

    @torch.no_grad()
    def complete(
        self,
        images: Tensor,
        mask: Tensor,
        *,
        labels: Sequence[int] | Tensor | None = None,
        seed: int = 0,
        first: int = 0,
        batch_size: int = 64,
        conditions: Tensor | Batch | None = None,
    ) -> Tensor:
        """Draw the hidden part of images anew; returns images (B, 3, H, W) in [-1, 1].

        Codes are drawn row by row, each given the known and drawn ones before it. A hidden code therefore follows
        what is above it and to its left, and does not know of known codes below.

        Args:
            images: Images (B, 3, H, W), or their indices (B, h, w). A known code next to the border of the mask
                may have seen a few hidden pixels: an encoder looks further than one code.
            mask: True where the image is known: (H, W) or (B, H, W) in pixels, or (h, w) or (B, h, w) in codes. A
                code is known where all of its pixels are.
            labels: The class of each; by default they take turns.
            seed: Another seed, other completions.
            first: The number of the first image.
            batch_size: Images drawn at once.
            conditions: Images (B, C, H, W) to draw by, or a batch with more; see `sample`. A prior that is told by
                the images themselves sees them whole by default.

        Raises:
            UserError: If the sampler cannot keep codes, or cannot draw an image of this size.
        """
        indices = self._to_indices(images, batch_size)
        grid = (indices.shape[1], indices.shape[2])
        known = indices.masked_fill(~known_token_mask(mask, indices, self.tokenizer.stride), -1).flatten(1)
        every = condition_batch(self._default_conditions(conditions, images), self.conditioner, len(indices))
        if every.labels is None or labels is not None:
            every = replace(every, labels=resolve_labels(len(indices), self.classes, None, labels, first))
        pieces = []
        for i in range(0, len(indices), batch_size):
            told, kept = every.slice(i, i + batch_size), known[i : i + batch_size]
            tokens = self.sample_tokens(told, seed=seed, first=first + i, grid=grid, known=kept)
            pieces.append(self.tokenizer.decode_tokens(tokens, grid))
        return torch.cat(pieces)

    @torch.no_grad()
    def sample_tokens(
        self,
        conditions: Batch,
        *,
        seed: int = 0,
        first: int = 0,
        grid: Size | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """Draw token sequences (B, h * w), one for each image that a batch tells of.

        Args:
            conditions: Labels, maps, ... or the codes that were prepared of them: whatever the conditioners read.
            seed: Another seed, other tokens.
            first: The number of the first image.
            grid: Height and width in codes; as in training by default.
            known: (B, h * w), tokens to keep, -1 where one is to be drawn.
        """
        self.eval()
        wanted, grid = inspect.signature(self.sampler).parameters, grid or self.tokenizer.grid
        self._check_sampler(grid, known is not None, wanted)
        conditions = conditions.to(self.device)
        shifted = "window" in wanted and grid != self.tokenizer.grid
        batch = conditions if conditions.condition_indices else self.conditioner.prepare(conditions, shifted=shifted)
        prefix, null_prefix = self._prefixes(batch, grid, "window" in wanted)
        offered = {"known": known, "null_prefix": null_prefix, "window": self.tokenizer.grid}
        given = {key: value for key, value in offered.items() if key in wanted}
        return self.sampler(self.prior, prefix, grid, seed=seed, first=first, **given)

    def _prefixes(self, batch: Batch, grid: Size, sliding: bool) -> tuple[Any, Any]:
        """Return what stands in front, with and without the condition: tokens, or functions of a window."""
        told = self.conditioner
        if not sliding:
            batch = replace(batch, crop_boxes=self._window_conditions(batch, (0, 0), grid, grid).crop_boxes)
            return told(batch), told.null_prefix(batch)

        def at(tell: Callable[[Batch], Any]) -> Callable[[Size, Size], Any]:
            return lambda start, size: tell(self._window_conditions(batch, start, size, grid))

        height, width = self.tokenizer.grid
        corner = ((0, 0), (min(height, grid[0]), min(width, grid[1])))
        return at(told), None if at(told.null_prefix)(*corner) is None else at(told.null_prefix)

    def _window_conditions(self, batch: Batch, start: Size, size: Size, grid: Size) -> Batch:
        """Return what one window is told.

        Where nobody said which place an image shows, it is the whole. Windows in it are then told places as large as
        those of training, from one end of the whole to the other: a prior that has seen a tenth of the world at a time
        is told of a tenth, however small or large the image is.
        """
        part = batch.window(start, size, grid)
        if batch.crop_boxes is not None or self.crop_extent is None or part.crop_boxes is None:
            return part
        extent = torch.tensor(self.crop_extent, device=part.crop_boxes.device).clamp(max=1)
        ways = [start[i] / (grid[i] - size[i]) if grid[i] > size[i] else 0.5 for i in (0, 1)]  # from end to end
        corner = torch.tensor(ways, device=extent.device) * (1 - extent)
        return replace(part, crop_boxes=torch.cat([corner, corner + extent]).expand(len(batch), 4))

    def _check_sampler(self, grid: Size, keeps_known: bool, accepted: Collection[str]) -> None:
        trained, stride = self.tokenizer.grid, self.tokenizer.stride
        window = getattr(self.sampler, "window", None)
        if window not in (None, trained) and (places := per_image_fields(self.conditioner)):
            raise UserError(
                f"sampler.window=[{window[0]},{window[1]}]: this prior is told {', '.join(sorted(places))} of windows "
                f"of {trained[0]} x {trained[1]} codes, as in training; leave sampler.window out"
            )
        if keeps_known and "known" not in accepted:
            raise UserError("sampler: this one cannot keep codes that are known; sampler=autoregressive does")
        # Fewer rows are the start of a sequence; fewer or more columns are another sequence.
        if "window" not in accepted and (grid[1] != trained[1] or grid[0] > trained[0]):
            asked, learned = (f"{each[0] * stride} x {each[1] * stride}" for each in (grid, trained))
            raise UserError(
                f"size: the prior has learned images of {learned} pixels, not {asked}; "
                "sampler=sliding_window draws larger ones"
            )

    def _default_conditions(self, conditions: Tensor | Batch | None, images: Tensor) -> Tensor | Batch | None:
        """Return the conditions of images, those that are their own condition included."""
        if isinstance(conditions, Tensor) or not images.is_floating_point():
            return conditions
        told = conditions or Batch()
        return replace(told, images=images) if told.images is None else told

    def _to_indices(self, images: Tensor, batch_size: int) -> Tensor:
        if not images.is_floating_point():
            return images.to(self.device)
        self.eval()
        return torch.cat([self.tokenizer.encode(each.to(self.device)) for each in images.split(batch_size)])

    def class_index(self, label: int | str) -> int:
        """Return the number of a class given by number or name.

        Raises:
            UserError: If there is no such class.
        """
        return class_index(label, self.classes)
