"""Sampling: what is done to logits before a draw, the draw, and the sampler that goes token by token.

The filters compose in the order temperature, top-k, top-p, min-p, each acting on what the one before left. Top-p is
The Curious Case of Neural Text Degeneration, https://arxiv.org/abs/1904.09751; min-p is
Turning Up the Heat: Min-p Sampling, https://arxiv.org/abs/2407.01082.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vqf.batch import Size
from vqf.protocols import Autoregressive
from vqf.registry import register
from vqf.transformers.samplers.filtering import batch_noise, sample_from_logits
from vqf.transformers.samplers.guidance import Schedule
from vqf.transformers.samplers.logit_sampler import LogitSampler, check_finite, init_tokens


@register("sampler", "autoregressive")
class AutoregressiveSampler(LogitSampler):
    """Draws tokens one after the other, row by row.

    Args:
        temperature: Below 1 sharpens the prior's distribution, above 1 flattens it.
        top_k: Draw among this many best codes; all by default.
        top_p: Draw among the best codes that together reach this probability; all by default.
        min_p: Draw among the codes at least this many times as likely as the best; all by default.
        guidance: s of classifier-free guidance, u + s (c - u); 1 is none. It needs a prior that was trained with
            `model.conditioner.label.dropout`, or that of another condition, and costs a second pass.
        guidance_schedule: How s moves from the first token to the last; see
            `vqf.transformers.samplers.guidance.scale_at`.
        guidance_interval: Shares of the sample between which `interval` guides.
        guidance_power: Of `power_cosine`.
        cache: Remember keys and values between tokens. Off, or with a prior that is not `Autoregressive`,
            every token costs a whole forward pass.
    """

    speed_options: ClassVar = {"cache"}

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        guidance: float = 1.0,
        guidance_schedule: Schedule = "constant",
        guidance_interval: Sequence[float] = (0.0, 1.0),
        guidance_power: float = 1.0,
        cache: bool = True,
    ) -> None:
        super().__init__(
            temperature, top_k, top_p, min_p, guidance, guidance_schedule, guidance_interval, guidance_power
        )
        self.cache = cache

    @torch.no_grad()
    def __call__(
        self,
        prior: Any,
        prefix: Tensor,
        grid: Size,
        *,
        seed: int,
        first: int = 0,
        known: Tensor | None = None,
        null_prefix: Tensor | None = None,
    ) -> Tensor:
        """Draw tokens (B, h * w) from a prior in eval mode.

        Args:
            prior: Gives logits; see `vqf.protocols.Prior`.
            prefix: (B, M), the condition of each sample.
            grid: Height and width in tokens.
            seed: With `first + i` it decides sample i, whatever else is in the batch.
            first: Index of the batch's first sample.
            known: (B, h * w) int64, tokens to keep, -1 where one is to be drawn.
            null_prefix: (B, M), what says that there is no condition; guidance needs it.

        Raises:
            UserError: If guidance has no `null_prefix`.
        """
        self.require_null_prefix(null_prefix)
        batch, count = len(prefix), grid[0] * grid[1]
        tokens = init_tokens(known, (batch, count), prior.vocab_size, prefix.device)
        numbers = batch_noise(seed, first, batch, count).to(prefix.device)
        scales = self.guidance_scales(count).to(prefix.device)
        prefixes = torch.cat([prefix, null_prefix]) if self.uses_guidance and null_prefix is not None else prefix
        following = self._make_logits_fn(prior, prefixes, tokens)
        for n in range(count):
            logits = following(n)
            if n == 0:
                check_finite(logits)
            drawn = sample_from_logits(self.filter(self.guide(logits, scales[n])), numbers[:, n])
            tokens[:, n] = torch.where(tokens[:, n] < 0, drawn, tokens[:, n])
        return tokens

    def _make_logits_fn(self, prior: Any, prefixes: Tensor, tokens: Tensor) -> Callable[[int], Tensor]:
        """Return what gives the logits of token n = 0, 1, ... after each prefix, given `tokens` up to there."""
        copies = len(prefixes) // len(tokens)
        if not (self.cache and isinstance(prior, Autoregressive)):
            return lambda n: prior(tokens.clamp(min=0).repeat(copies, 1), prefixes)[:, n]
        first, cache = prior.prefill(prefixes)
        return lambda n: prior.decode(tokens[:, n - 1].repeat(copies), cache) if n else first
