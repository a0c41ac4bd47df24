"""Sampling: what is done to logits before a draw, the draw, and the sampler that goes token by token.

The filters compose in the order temperature, top-k, top-p, min-p, each acting on what the one before left. Top-p is
The Curious Case of Neural Text Degeneration, https://arxiv.org/abs/1904.09751; min-p is
Turning Up the Heat: Min-p Sampling, https://arxiv.org/abs/2407.01082.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vqf.errors import UserError
from vqf.transformers.samplers.filtering import min_p, temperature, top_k, top_p
from vqf.transformers.samplers.guidance import Schedule, guide, scale_at
from vqf.transformers.samplers.guidance import check_guidance as check_guidance


class LogitSampler:
    """What samplers share: the filters, guidance, and the draw. Their options say what each number means."""

    def __init__(
        self,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        min_p: float | None,
        guidance: float,
        guidance_schedule: Schedule,
        guidance_interval: Sequence[float],
        guidance_power: float,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, not {temperature}; top_k=1 takes the best code")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {top_k}; null draws among all codes")
        for name, value in (("top_p", top_p), ("min_p", min_p)):
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1], not {value}; null draws among all codes")
        check_guidance(guidance, guidance_interval, guidance_power)
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.guidance, self.guidance_schedule = guidance, guidance_schedule
        self.guidance_interval, self.guidance_power = tuple(guidance_interval), guidance_power

    def filter(self, logits: Tensor) -> Tensor:
        """Apply temperature, top-k, top-p and min-p to logits (..., V)."""
        logits = temperature(logits.float(), self.temperature)
        if self.top_k is not None:
            logits = top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = top_p(logits, self.top_p)
        return logits if self.min_p is None else min_p(logits, self.min_p)

    @property
    def uses_guidance(self) -> bool:
        """Whether a prior is asked for every token without the condition, too."""
        return self.guidance != 1

    def guidance_scales(self, count: int) -> Tensor:
        """Return s for each of `count` tokens of a sample, on the CPU."""
        options = {"interval": self.guidance_interval, "power": self.guidance_power}
        every = [scale_at(n / count, self.guidance, self.guidance_schedule, **options) for n in range(count)]  # type: ignore[arg-type]
        return torch.tensor(every)

    def guide(self, logits: Tensor, scale: Tensor) -> Tensor:
        """Guide the logits of tokens.

        Args:
            logits: (n, V); (2 n, V) with guidance, those without the condition after those with it.
            scale: s of each (n,), or one for all.

        Returns:
            (n, V).
        """
        if not self.uses_guidance:
            return logits
        conditional, unconditional = logits.float().chunk(2)
        return guide(conditional, unconditional, scale[..., None])

    def require_null_prefix(self, null_prefix: object | None) -> None:
        """Refuse guidance where nobody knows what no condition is."""
        if self.uses_guidance and null_prefix is None:
            raise UserError(
                f"sampler.guidance={self.guidance:g}: the prior has not learned to go without its condition; "
                "train it with the option drop of its condition, as in model.conditioner.label.dropout=0.1"
            )


def init_tokens(known: Tensor | None, shape: tuple[int, int], vocab_size: int, device: torch.device) -> Tensor:
    """Return tokens (B, N) to fill: -1, or what is known already.

    Raises:
        ValueError: If the known tokens do not fit.
    """
    if known is None:
        return torch.full(shape, -1, device=device)
    if known.shape != shape:
        raise ValueError(f"known tokens must be {shape}, not {tuple(known.shape)}")
    if known.max() >= vocab_size:
        raise ValueError(f"known tokens must be below {vocab_size}, the prior's vocabulary, not {int(known.max())}")
    return known.clone()


def check_finite(logits: Tensor) -> None:
    """Refuse the logits of a prior that diverged."""
    if logits.isnan().any():
        raise UserError("the prior's logits are not numbers: its training diverged; go back to an earlier checkpoint")
