"""Autoregressive sampling.

Taming Transformers for High-Resolution Image Synthesis, https://arxiv.org/abs/2012.09841, section 3.2; scale by scale
as in Visual Autoregressive Modeling, https://arxiv.org/abs/2404.02905.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vqf.protocols import Causal
from vqf.registry import register
from vqf.tokens.layout import TokenLayout
from vqf.tokens.prefix import Prefix
from vqf.transformers.samplers.filtering import batch_noise, sample_from_logits
from vqf.transformers.samplers.logit_sampler import LogitSampler, check_finite, init_tokens


@register("sampler", "autoregressive")
class AutoregressiveSampler(LogitSampler):
    """Samples the groups of tokens of a causal prior one after the other: token by token, or scale by scale.

    Args:
        cache: Keep keys and values between groups. Without it, every group costs a full forward pass. The tokens are
            the same.
    """

    draws = Causal
    keeps_known = True
    speed_options = frozenset({"cache"})

    def __init__(self, *, cache: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.cache = cache

    @torch.no_grad()
    def __call__(
        self,
        prior: Causal,
        prefix: Prefix | Tensor,
        layout: TokenLayout,
        *,
        seed: int,
        first: int = 0,
        known: Tensor | None = None,
        null_prefix: Prefix | Tensor | None = None,
    ) -> Tensor:
        """Sample tokens (B, T) from a prior in eval mode.

        Raises:
            UserError: If guidance has no `null_prefix`.
        """
        self.require_null_prefix(null_prefix)
        prefix = Prefix.of(prefix)
        batch, count = len(prefix), layout.length
        tokens = init_tokens(known, (batch, count), layout, prefix.device)
        noise = batch_noise(seed, first, batch, count).to(prefix.device)
        spans = group_spans(prior, count)
        scales = self.guidance_scales(len(spans)).to(prefix.device)
        prefixes = prefix
        if self.uses_guidance and null_prefix is not None:
            prefixes = Prefix.cat([prefix, Prefix.of(null_prefix)])
        logits_of = self._make_logits_fn(prior, prefixes, tokens, spans)
        for n, span in enumerate(spans):
            logits = logits_of(n)  # (B, g, V), with guidance (2 B, g, V)
            if n == 0:
                check_finite(logits)
            sampled = sample_from_logits(self.filter(self.guide(logits, scales[n])), noise[:, span])
            tokens[:, span] = torch.where(tokens[:, span] < 0, sampled, tokens[:, span])
        return tokens

    def _make_logits_fn(
        self, prior: Causal, prefixes: Prefix, tokens: Tensor, spans: list[slice]
    ) -> Callable[[int], Tensor]:
        """A function of n = 0, 1, ..., in this order: the logits of group n, given those filled in before."""
        copies = len(prefixes) // len(tokens)  # 2 with guidance
        if not self.cache:
            return lambda n: prior(tokens[:, : spans[n].stop].repeat(copies, 1), prefixes)[:, spans[n]]
        first, cache = prior.prefill(prefixes)
        return lambda n: prior.decode(tokens[:, spans[n - 1]].repeat(copies, 1), cache) if n else first


def group_spans(prior: Causal, count: int) -> list[slice]:
    """The slices of the groups of the first `count` tokens."""
    spans, start = [], 0
    for group in prior.groups:
        if start == count:
            break
        spans.append(slice(start, start + group))
        start += group
    assert start == count, f"groups of {prior.groups} tokens do not add up to {count}"
    return spans
