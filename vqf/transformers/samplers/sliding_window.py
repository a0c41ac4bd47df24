"""Sliding windows: sample a grid of any size from a prior that was trained on a small one.

Taming Transformers for High-Resolution Image Synthesis, https://arxiv.org/abs/2012.09841, section 3.2 and figure 3.
Each token of an H x W grid is sampled, row by row, given those before it in the h x w window around it. Two shortcuts
give the same tokens:

* `cache`: tokens that share a window share its keys and values.
* `wavefront`: rows are sampled side by side, in W + w (H - 1) steps instead of W H.
"""

from typing import Annotated, Any

import torch
from annotated_types import Interval
from torch import Tensor

from vqf.batch import Size, pair
from vqf.errors import UserError
from vqf.options.ranges import Sides
from vqf.protocols import Causal, RaggedDecoding
from vqf.registry import register
from vqf.tokens.layout import TokenLayout
from vqf.tokens.prefix import Prefix
from vqf.transformers.samplers.filtering import batch_noise, sample_from_logits
from vqf.transformers.samplers.logit_sampler import LogitSampler, check_finite, init_tokens
from vqf.transformers.samplers.window_logits import CachedWindows, RecomputedWindows, WindowPrefixes, crop_prefix
from vqf.transformers.samplers.window_schedule import DecodingStep, make_schedule, raster_order, wavefront_order


@register("sampler", "sliding_window")
class SlidingWindowSampler(LogitSampler):
    """Samples a grid larger than the prior's own: each token given the window around it.

    The tokens do not depend on `cache` and `wavefront`, except for rounding.

    Args:
        window: Height and width in tokens, or one number for both; by default the grid that the prior was trained on.
            At another width its learned positions belong to other rows and columns.
        cache: Keep the keys and values of windows that several tokens share: at the left and right border neighbors, at
            the upper and lower border all rows. Needs a prior with `RaggedDecoding`, and a prefix without embeddings.
        cache_gb: Limit of the kept keys and values in 10^9 bytes; windows beyond it are read again.
        wavefront: Sample rows side by side, in batches up to W / w times as large.
    """

    draws = Causal
    keeps_known = True
    speed_options = frozenset({"cache", "cache_gb", "wavefront"})

    def __init__(
        self,
        *,
        window: Sides | None = None,
        cache: bool = True,
        cache_gb: Annotated[float, Interval(ge=0, le=1_000_000)] = 4.0,
        wavefront: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.window = None if window is None else pair(window)
        self.cache, self.cache_gb, self.wavefront = cache, cache_gb, wavefront

    @torch.no_grad()
    def __call__(
        self,
        prior: Causal,
        prefix: WindowPrefixes,
        layout: TokenLayout,
        *,
        seed: int,
        first: int = 0,
        known: Tensor | None = None,
        null_prefix: WindowPrefixes | None = None,
    ) -> Tensor:
        """Sample tokens (B, H * W) from a prior in eval mode.

        Args:
            prior: One with `RaggedDecoding` is faster.
            prefix: A `Prefix`, ids (B, M), ids (B, H, W), or a function of a window's start and size; see
                `crop_prefix`.
            layout: A raster of one codebook.
            null_prefix: The prefix of no condition, in the same form.

        Raises:
            UserError: If the grid is narrower than the window, the window too large for the prior, or guidance has no
                `null_prefix`.
        """
        self.require_null_prefix(null_prefix)
        grid = layout.scales[0]
        window = self._fit_window(self.window or prior.layout.scales[0], grid, prior)
        prefixes = [prefix] if not self.uses_guidance or null_prefix is None else [prefix, null_prefix]
        first_prefix = crop_prefix(prefix, (0, 0), window)
        batch, device = len(first_prefix), first_prefix.device
        tokens = init_tokens(known, (batch, layout.length), layout, device).unflatten(1, grid)
        windows = self._make_windows(prior, prefixes, tokens, window, first_prefix)
        noise = batch_noise(seed, first, batch, layout.length).to(device).unflatten(1, grid)
        scales = self.guidance_scales(layout.length).to(device).unflatten(0, grid)
        for step in windows.schedule.steps:
            self._sample_step(windows, step, tokens, noise, scales)
        return tokens.flatten(1)

    def _make_windows(
        self, prior: Causal, prefixes: list[WindowPrefixes], tokens: Tensor, window: Size, first_prefix: Prefix
    ) -> CachedWindows | RecomputedWindows:
        grid, prefix_length = (tokens.shape[1], tokens.shape[2]), first_prefix.ids.shape[1]
        order = wavefront_order(grid, window[1]) if self.wavefront else raster_order(grid)
        if not isinstance(prior, RaggedDecoding) or first_prefix.embeddings is not None:
            schedule = make_schedule(order, window, grid, prefix_length, max_cached=0)
            return RecomputedWindows(prior, prefixes, tokens, window, schedule)
        window_bytes = prior.sequence_bytes * len(prefixes) * len(tokens)
        max_cached = int(self.cache_gb * 1e9 / window_bytes) if self.cache else 0
        schedule = make_schedule(order, window, grid, prefix_length, max_cached)
        return CachedWindows(prior, prefixes, tokens, window, schedule)

    def _sample_step(
        self,
        windows: CachedWindows | RecomputedWindows,
        step: DecodingStep,
        tokens: Tensor,
        noise: Tensor,
        scales: Tensor,
    ) -> None:
        batch, cells = len(tokens), len(step.chunks)
        logits = windows.logits(step)
        if step.offset == 0:
            check_finite(logits)
        rows, columns = windows.table[:2, step.span]
        logits = self.filter(self.guide(logits, scales[rows, columns].repeat_interleave(batch)))  # (cells * B, V)
        sampled = sample_from_logits(logits, noise[:, rows, columns].T.flatten()).unflatten(0, (cells, batch)).T
        known = tokens[:, rows, columns]
        tokens[:, rows, columns] = torch.where(known < 0, sampled, known)

    @staticmethod
    def _fit_window(window: Size, grid: Size, prior: Causal) -> Size:
        if grid[1] < window[1]:
            raise UserError(
                f"sampler=sliding_window: a grid of {grid[0]} x {grid[1]} tokens is narrower than the window of "
                f"{window[0]} x {window[1]}; sample at least {window[1]} columns"
            )
        window = (min(window[0], grid[0]), window[1])  # fewer rows are the start of a sequence that was trained on
        length = prior.layout.length
        if window[0] * window[1] > length:
            raise UserError(
                f"sampler.window=[{window[0]},{window[1]}]: it has {window[0] * window[1]} tokens, the prior models "
                f"{length}"
            )
        return window
