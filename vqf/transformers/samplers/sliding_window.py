"""Sliding windows: a prior that has learned a small grid draws a grid of any size.

Taming Transformers for High-Resolution Image Synthesis, https://arxiv.org/abs/2012.09841, section 3.2 and figure 3.
Every token of an H x W grid is drawn, row by row, from the prior's view of an h x w window around it. Three ways to
get the same tokens with less work are here, each an option:

* the prior is causal, so only the part of the window before the token runs, and one row of logits is computed;
* where the windows of several tokens stand at the same place, its keys and values are computed once;
* rows depend on each other only through their windows. A row may follow the one above it at a distance of w columns,
  and all rows under way are one batch: W + w (H - 1) steps in place of W H.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vqf.batch import Size, pair
from vqf.errors import UserError
from vqf.protocols import RaggedDecoding
from vqf.registry import register
from vqf.transformers.samplers.filtering import batch_noise, sample_from_logits
from vqf.transformers.samplers.guidance import Schedule
from vqf.transformers.samplers.logit_sampler import LogitSampler, check_finite, init_tokens
from vqf.transformers.samplers.window_logits import CachedWindows, RecomputedWindows, WindowPrefix, crop_prefix
from vqf.transformers.samplers.window_schedule import WavefrontStep, make_schedule, raster_order, wavefront_order


@register("sampler", "sliding_window")
class SlidingWindowSampler(LogitSampler):
    """Draws a grid larger than the prior's own: each token from the window around it.

    The tokens do not depend on `prefix_only`, `cache` and `wavefront`, except where rounding decides between two
    codes: the same numbers are added in another order.

    Args:
        window: Height and width in tokens, or one number for both; by default the grid that the prior was trained on.
            With another width its learned positions mean something else.
        temperature: Below 1 sharpens the prior's distribution, above 1 flattens it.
        top_k: Draw among this many best codes; all by default.
        top_p: Draw among the best codes that together reach this probability; all by default.
        min_p: Draw among the codes at least this many times as likely as the best; all by default.
        guidance: s of classifier-free guidance, as in `autoregressive`.
        guidance_schedule: How s moves from the first token of the grid to the last.
        guidance_interval: Shares of the sample between which `interval` guides.
        guidance_power: Of `power_cosine`.
        prefix_only: Run only the part of a window before the token.
        cache: Compute keys and values once for every place of a window: at the left and right border for neighbours, at
            the upper and lower border for all rows there. Needs a `Piecewise` prior, and includes `prefix_only`.
        cache_gb: What the kept keys and values may take, in 10^9 bytes; windows beyond it are read again.
        wavefront: Draw rows side by side, in batches up to W / w times as large.
    """

    speed_options: ClassVar = {"prefix_only", "cache", "cache_gb", "wavefront"}

    def __init__(
        self,
        *,
        window: int | Sequence[int] | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        guidance: float = 1.0,
        guidance_schedule: Schedule = "constant",
        guidance_interval: Sequence[float] = (0.0, 1.0),
        guidance_power: float = 1.0,
        prefix_only: bool = True,
        cache: bool = True,
        cache_gb: float = 4.0,
        wavefront: bool = True,
    ) -> None:
        super().__init__(
            temperature, top_k, top_p, min_p, guidance, guidance_schedule, guidance_interval, guidance_power
        )
        self.window = None if window is None else pair(window)
        if self.window is not None and min(self.window) < 1:
            raise ValueError(f"window must be at least 1 high and wide, not {self.window}")
        if not cache_gb >= 0:
            raise ValueError(f"cache_gb must be at least 0, not {cache_gb}")
        self.prefix_only, self.cache, self.cache_gb, self.wavefront = prefix_only, cache, cache_gb, wavefront

    @torch.no_grad()
    def __call__(
        self,
        prior: Any,
        prefix: WindowPrefix,
        grid: Size,
        *,
        seed: int,
        first: int = 0,
        known: Tensor | None = None,
        null_prefix: WindowPrefix | None = None,
        window: Size | None = None,
    ) -> Tensor:
        """Draw tokens (B, H * W) from a prior in eval mode.

        Args:
            prior: Gives logits; see `vqf.protocols.Prior`. A `Piecewise` one reads no more than it must.
            prefix: The condition: (B, M), (B, H, W) or a function of a window's start and size; see `crop`.
            grid: Height and width in tokens.
            seed: With `first + i` it decides sample i; every place of the grid has a number of its own.
            first: Index of the batch's first sample.
            known: (B, H * W) int64, tokens to keep, -1 where one is to be drawn.
            null_prefix: What says that there is no condition, in one of the forms of `prefix`; guidance needs it.
            window: The window where the option says none; the whole grid by default.

        Raises:
            UserError: If the grid is narrower than the window, the prior models fewer tokens than a window has, or
                guidance has no `null_prefix`.
        """
        self.require_null_prefix(null_prefix)
        size = self._fit_window(self.window or window or grid, grid, prior)
        prefixes = [prefix] if not self.uses_guidance or null_prefix is None else [prefix, null_prefix]
        corner = crop_prefix(prefix, (0, 0), size)
        tokens = init_tokens(known, (len(corner), grid[0] * grid[1]), prior.vocab_size, corner.device).unflatten(
            1, grid
        )
        views = self._make_windows(prior, prefixes, tokens, size, corner.shape[1])
        numbers = batch_noise(seed, first, *tokens.flatten(1).shape).to(tokens.device).unflatten(1, grid)
        scales = self.guidance_scales(grid[0] * grid[1]).to(tokens.device).unflatten(0, grid)
        for wave in views.schedule.steps:
            self._sample_step(views, wave, tokens, numbers, scales)
        return tokens.flatten(1)

    def _make_windows(
        self, prior: Any, prefixes: list[WindowPrefix], tokens: Tensor, window: Size, prefix_length: int
    ) -> CachedWindows | RecomputedWindows:
        """Plan the grid, and choose how the prior is asked."""
        grid = (tokens.shape[1], tokens.shape[2])
        order = wavefront_order(grid, window[1]) if self.wavefront else raster_order(grid)
        if not (isinstance(prior, RaggedDecoding) and (self.prefix_only or self.cache)):
            plan = make_schedule(order, window, grid, prefix_length, max_cached=0)
            return RecomputedWindows(
                prior, prefixes, tokens, window, plan, full_window=not (self.prefix_only or self.cache)
            )
        sequences = len(prefixes) * len(tokens)
        keep = int(self.cache_gb * 1e9 / (prior.sequence_bytes * sequences)) if self.cache else 0
        return CachedWindows(prior, prefixes, tokens, window, make_schedule(order, window, grid, prefix_length, keep))

    def _sample_step(
        self,
        windows: CachedWindows | RecomputedWindows,
        step: WavefrontStep,
        tokens: Tensor,
        numbers: Tensor,
        scales: Tensor,
    ) -> None:
        """Draw the tokens (B, H, W) of a wave."""
        batch, cells = len(tokens), len(step.reads)
        logits = windows.logits(step)
        if step.offset == 0:
            check_finite(logits)
        rows, columns = windows.table[:2, step.span]
        guided = self.guide(logits, scales[rows, columns].repeat_interleave(batch))
        drawn = (
            sample_from_logits(self.filter(guided), numbers[:, rows, columns].T.flatten())
            .unflatten(0, (cells, batch))
            .T
        )
        before = tokens[:, rows, columns]
        tokens[:, rows, columns] = torch.where(before < 0, drawn, before)

    @staticmethod
    def _fit_window(window: Size, grid: Size, prior: Any) -> Size:
        if grid[1] < window[1]:
            raise UserError(
                f"sampler=sliding_window: a grid of {grid[0]} x {grid[1]} codes is narrower than the window of "
                f"{window[0]} x {window[1]}; draw at least {window[1]} columns"
            )
        window = (min(window[0], grid[0]), window[1])  # fewer rows are the start of a sequence
        length = getattr(prior, "length", window[0] * window[1])
        if window[0] * window[1] > length:
            raise UserError(
                f"sampler.window=[{window[0]},{window[1]}]: it has {window[0] * window[1]} tokens, the prior models "
                f"{length}"
            )
        return window
