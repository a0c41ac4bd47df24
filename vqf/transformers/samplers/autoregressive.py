"""Autoregressive sampling.

Taming Transformers for High-Resolution Image Synthesis, https://arxiv.org/abs/2012.09841, section 3.2.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from vqf.batch import Size
from vqf.protocols import Autoregressive
from vqf.registry import register
from vqf.transformers.samplers.filtering import batch_noise, sample_from_logits
from vqf.transformers.samplers.logit_sampler import LogitSampler, check_finite, init_tokens


@register("sampler", "autoregressive")
class AutoregressiveSampler(LogitSampler):
    """Samples tokens one after the other, row by row.

    Args:
        cache: Keep keys and values between tokens. Without it, or with a prior that is not `Autoregressive`, every
            token costs a full forward pass. The tokens are the same.
    """

    speed_options: ClassVar = {"cache"}

    def __init__(self, *, cache: bool = True, **options: Any) -> None:
        super().__init__(**options)
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
        """Sample tokens (B, h * w) from a prior in eval mode.

        Args:
            prior: A `Prior`; one that is `Autoregressive` is faster.

        Raises:
            UserError: If guidance has no `null_prefix`.
        """
        self.require_null_prefix(null_prefix)
        batch, count = len(prefix), grid[0] * grid[1]
        tokens = init_tokens(known, (batch, count), prior.vocab_size, prefix.device)
        noise = batch_noise(seed, first, batch, count).to(prefix.device)
        scales = self.guidance_scales(count).to(prefix.device)
        prefixes = torch.cat([prefix, null_prefix]) if self.uses_guidance and null_prefix is not None else prefix
        logits_of = self._make_logits_fn(prior, prefixes, tokens)
        for n in range(count):
            logits = logits_of(n)
            if n == 0:
                check_finite(logits)
            sampled = sample_from_logits(self.filter(self.guide(logits, scales[n])), noise[:, n])
            tokens[:, n] = torch.where(tokens[:, n] < 0, sampled, tokens[:, n])
        return tokens

    def _make_logits_fn(self, prior: Any, prefixes: Tensor, tokens: Tensor) -> Callable[[int], Tensor]:
        """A function of n = 0, 1, ..., in this order: the logits of token n, given those filled in before."""
        copies = len(prefixes) // len(tokens)  # 2 with guidance
        if not (self.cache and isinstance(prior, Autoregressive)):
            # Tokens that are not sampled yet are shown as 0: a causal prior does not see them.
            return lambda n: prior(tokens.clamp(min=0).repeat(copies, 1), prefixes)[:, n]
        first, cache = prior.prefill(prefixes)
        return lambda n: prior.decode(tokens[:, n - 1].repeat(copies), cache) if n else first
