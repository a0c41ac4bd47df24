"""The base class of samplers."""

import torch
from torch import Tensor

from vqf.errors import UserError
from vqf.options.ranges import Fraction, NonNegativeFloat, PositiveFloat, PositiveFraction, PositiveInt
from vqf.options.typed_nodes import to_cli
from vqf.tokens.layout import TokenLayout
from vqf.transformers.samplers.filtering import min_p, temperature, top_k, top_p
from vqf.transformers.samplers.guidance import Schedule, guide, scale_at


class LogitSampler:
    """Filters and guidance.

    A subclass is a `vqf.protocols.Sampler`.

    Args:
        temperature: Divides the logits: below 1 sharpens the prior's distribution, above 1 flattens it. `top_k=1` takes
            the best token.
        top_k: Sample among this many best tokens; all by default.
        top_p: Sample among the best tokens that together reach this probability; all by default.
        min_p: Sample among the tokens at least this many times as likely as the best; all by default.
        guidance: s of classifier-free guidance, u + s (c - u); 1 is none. It needs a prior that was trained
            with `model.conditioner.label.dropout`, or that of another condition, and costs a second pass.
        guidance_schedule: How s changes from the first token to the last: `constant`; `interval`, s inside of
            `guidance_interval` and 1 elsewhere; `linear`, from 1 to s; `power_cosine`, the same along half a cosine.
        guidance_interval: Start and end of `interval`, as fractions of the tokens.
        guidance_power: Power of `power_cosine`: the larger, the later guidance sets in.
    """

    def __init__(
        self,
        *,
        temperature: PositiveFloat = 1.0,
        top_k: PositiveInt | None = None,
        top_p: PositiveFraction | None = None,
        min_p: PositiveFraction | None = None,
        guidance: NonNegativeFloat = 1.0,
        guidance_schedule: Schedule = "constant",
        guidance_interval: tuple[Fraction, Fraction] = (0.0, 1.0),
        guidance_power: PositiveFloat = 1.0,
    ) -> None:
        if guidance_interval[0] > guidance_interval[1]:
            raise ValueError(f"guidance_interval={to_cli(guidance_interval)}: give the start first, then the end")
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.guidance, self.guidance_schedule = guidance, guidance_schedule
        self.guidance_interval, self.guidance_power = tuple(guidance_interval), guidance_power

    def filter(self, logits: Tensor) -> Tensor:
        logits = temperature(logits.float(), self.temperature)
        if self.top_k is not None:
            logits = top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = top_p(logits, self.top_p)
        return logits if self.min_p is None else min_p(logits, self.min_p)

    @property
    def uses_guidance(self) -> bool:
        return self.guidance != 1

    def guidance_scales(self, count: int) -> Tensor:
        """s of each of `count` tokens, or groups of tokens, float32 on the CPU."""
        interval, power = self.guidance_interval, self.guidance_power
        return torch.tensor([
            scale_at(n / count, self.guidance, self.guidance_schedule, interval=interval, power=power)
            for n in range(count)
        ])  # fmt: skip

    def guide(self, logits: Tensor, scale: Tensor) -> Tensor:
        """Combine logits with and without the condition to (n, ..., V).

        Args:
            logits: (n, ..., V); with guidance (2 n, ..., V), first those with the condition.
            scale: s of each row (n,), or ().
        """
        if not self.uses_guidance:
            return logits
        conditional, unconditional = logits.float().chunk(2)
        return guide(conditional, unconditional, scale.view(*scale.shape, *[1] * (conditional.ndim - scale.ndim)))

    def require_null_prefix(self, null_prefix: object | None) -> None:
        """Check that guidance has a null prefix.

        Raises:
            UserError: If it has none.
        """
        if self.uses_guidance and null_prefix is None:
            raise UserError(
                f"sampler.guidance={self.guidance:g}: the prior was not trained without its condition; "
                "train one with dropout of the condition, as in model.conditioner.label.dropout=0.1"
            )


def init_tokens(known: Tensor | None, shape: tuple[int, int], layout: TokenLayout, device: torch.device) -> Tensor:
    """A copy (B, T) of the known tokens, or -1 everywhere.

    Raises:
        ValueError: If their shape or values are wrong.
    """
    if known is None:
        return torch.full(shape, -1, device=device)
    if known.shape != shape:
        raise ValueError(f"known tokens must be {shape}, not {tuple(known.shape)}")
    sizes = torch.tensor(layout.vocab_sizes, device=known.device)
    if (layout.by_codebook(known) >= sizes).any():
        limits = " and ".join(map(str, layout.vocab_sizes))
        raise ValueError(f"known tokens must be below {limits}, the prior's vocabulary, not {int(known.max())}")
    return known.clone()


def check_finite(logits: Tensor) -> None:
    """Refuse logits with NaN.

    Raises:
        UserError: If there is one.
    """
    if logits.isnan().any():
        raise UserError(
            "the prior's logits are NaN (not numbers): its training diverged; sample from an earlier checkpoint"
        )
