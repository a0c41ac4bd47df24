"""Sliding windows: sample a grid of any size from a prior that was trained on a small one.

Taming Transformers for High-Resolution Image Synthesis, https://arxiv.org/abs/2012.09841, section 3.2 and figure 3.
Each token of an H x W grid is sampled, row by row, given the h x w window around it. Three shortcuts give the same
tokens:

* `prefix_only`: only the tokens of the window before the new one are read.
* `cache`: tokens that share a window share its keys and values.
* `wavefront`: rows are sampled side by side, in W + w (H - 1) steps instead of W H.
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
from vqf.transformers.samplers.logit_sampler import LogitSampler, check_finite, init_tokens
from vqf.transformers.samplers.window_logits import CachedWindows, RecomputedWindows, WindowPrefix, crop_prefix
from vqf.transformers.samplers.window_schedule import DecodingStep, make_schedule, raster_order, wavefront_order


@register("sampler", "sliding_window")
class SlidingWindowSampler(LogitSampler):
    """Samples a grid larger than the prior's own: each token given the window around it.

    The tokens do not depend on `prefix_only`, `cache` and `wavefront`, except for rounding.

    Args:
        window: Height and width in tokens, or one number for both; by default the grid that the prior was trained on.
            At another width its learned positions belong to other rows and columns.
        prefix_only: Read only the tokens of a window before the new one.
        cache: Keep the keys and values of windows that several tokens share: at the left and right border neighbors, at
            the upper and lower border all rows. Needs a prior with `RaggedDecoding`, and includes `prefix_only`.
        cache_gb: Limit of the kept keys and values in 10^9 bytes, at least 0; windows beyond it are read again.
        wavefront: Sample rows side by side, in batches up to W / w times as large.
    """

    speed_options: ClassVar = {"prefix_only", "cache", "cache_gb", "wavefront"}

    def __init__(
        self,
        *,
        window: int | Sequence[int] | None = None,
        prefix_only: bool = True,
        cache: bool = True,
        cache_gb: float = 4.0,
        wavefront: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
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
        """Sample tokens (B, H * W) from a prior in eval mode.

        Args:
            prior: A `Prior`; one with `RaggedDecoding` is faster.
            prefix: (B, M), (B, H, W), or a function of a window's start and size; see `crop_prefix`.
            null_prefix: The prefix of no condition, in the same form.
            window: The window if the option `window` is None; the full grid by default.

        Raises:
            UserError: If the grid is narrower than the window, the window too large for the prior, or guidance has no
                `null_prefix`.
        """
        self.require_null_prefix(null_prefix)
        window = self._fit_window(self.window or window or grid, grid, prior)
        prefixes = [prefix] if not self.uses_guidance or null_prefix is None else [prefix, null_prefix]
        first_prefix = crop_prefix(prefix, (0, 0), window)
        (batch, prefix_length), device, count = first_prefix.shape, first_prefix.device, grid[0] * grid[1]
        tokens = init_tokens(known, (batch, count), prior.vocab_size, device).unflatten(1, grid)
        windows = self._make_windows(prior, prefixes, tokens, window, prefix_length)
        noise = batch_noise(seed, first, batch, count).to(device).unflatten(1, grid)
        scales = self.guidance_scales(count).to(device).unflatten(0, grid)
        for step in windows.schedule.steps:
            self._sample_step(windows, step, tokens, noise, scales)
        return tokens.flatten(1)

    def _make_windows(
        self, prior: Any, prefixes: list[WindowPrefix], tokens: Tensor, window: Size, prefix_length: int
    ) -> CachedWindows | RecomputedWindows:
        grid = (tokens.shape[1], tokens.shape[2])
        order = wavefront_order(grid, window[1]) if self.wavefront else raster_order(grid)
        full_window = not (self.prefix_only or self.cache)
        if full_window or not isinstance(prior, RaggedDecoding):
            schedule = make_schedule(order, window, grid, prefix_length, max_cached=0)
            return RecomputedWindows(prior, prefixes, tokens, window, schedule, full_window)
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
    def _fit_window(window: Size, grid: Size, prior: Any) -> Size:
        if grid[1] < window[1]:
            raise UserError(
                f"sampler=sliding_window: a grid of {grid[0]} x {grid[1]} tokens is narrower than the window of "
                f"{window[0]} x {window[1]}; sample at least {window[1]} columns"
            )
        window = (min(window[0], grid[0]), window[1])  # fewer rows are the start of a sequence that was trained on
        length = getattr(prior, "length", window[0] * window[1])
        if window[0] * window[1] > length:
            raise UserError(
                f"sampler.window=[{window[0]},{window[1]}]: it has {window[0] * window[1]} tokens, the prior models "
                f"{length}"
            )
        return window
