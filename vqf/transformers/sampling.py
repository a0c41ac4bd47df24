"""Sampling: what is done to logits before a draw, the draw, and the sampler that goes token by token.

The filters compose in the order temperature, top-k, top-p, min-p, each acting on what the one before left. Top-p is
The Curious Case of Neural Text Degeneration, https://arxiv.org/abs/1904.09751; min-p is
Turning Up the Heat: Min-p Sampling, https://arxiv.org/abs/2407.01082.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vqf.errors import UserError
from vqf.protocols import Autoregressive, Size
from vqf.registry import register
from vqf.transformers.guidance import Schedule, guide, scale_at
from vqf.transformers.guidance import check as check_guidance

UNIFORM_BITS = 24  # all that a float32 in [0, 1) holds
WEIGHT_BITS = 38  # with the uniform's bits, products stay below 2 ** 63


def temperature(logits: Tensor, value: float) -> Tensor:
    """Divide logits (..., V) by a temperature; the best is 0 afterwards, so that no small value overflows."""
    return (logits - logits.amax(-1, keepdim=True)) / value


def top_k(logits: Tensor, k: int) -> Tensor:
    """Set all logits (..., V) below the k-th best to -inf. Ties with it stay; k may exceed V."""
    least = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Set to -inf all logits (..., V) outside the smallest set of the best whose probability reaches p.

    The best stays whatever p is; of equal logits the lower index counts as better.
    """
    if p >= 1:
        return logits  # rounding of the sum would cut the tail
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1, dtype=torch.float32)
    better = probabilities.cumsum(-1) - probabilities
    outside = better >= p
    outside[..., 0] = False
    return logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)


def min_p(logits: Tensor, p: float) -> Tensor:
    """Set to -inf all logits (..., V) of codes less than p times as likely as the best, which stays whatever p is."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -torch.inf)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw an index from each row of logits (B, V) by inverting its cumulative distribution.

    Args:
        logits: Unnormalised; -inf is never drawn.
        uniforms: (B,) in [0, 1), of which the first 24 bits count.

    Returns:
        (B,) int64.
    """
    # In integers: a float cumulative sum, done in parallel, can grow where a probability is 0.
    weights = (logits.softmax(-1, dtype=torch.float32) * 2**WEIGHT_BITS).round().long()
    cumulative = weights.cumsum(-1)
    threshold = (uniforms * 2**UNIFORM_BITS).long() * cumulative[:, -1] >> UNIFORM_BITS
    return torch.searchsorted(cumulative, threshold[:, None], right=True)[:, 0]


def uniforms(seed: int, index: int, count: int) -> Tensor:
    """Return `count` numbers in [0, 1) that depend on the seed and the index of a sample alone, on the CPU."""
    # Not a torch.Generator: the CPU's looks at 32 bits of its seed, and many samples would soon share one.
    key = np.array([seed % 2**64, index % 2**64], dtype=np.uint64)
    raw = np.random.Philox(key=key).random_raw(count) >> np.uint64(64 - UNIFORM_BITS)
    return torch.from_numpy(raw.astype(np.float32) / np.float32(2**UNIFORM_BITS))


def many_uniforms(seed: int, first: int, batch: int, count: int) -> Tensor:
    """Return the numbers (batch, count) of samples `first`, `first + 1`, ..., on the CPU."""
    return torch.stack([uniforms(seed, first + i, count) for i in range(batch)])


class Drawing:
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
    def guided(self) -> bool:
        """Whether a prior is asked for every token without the condition, too."""
        return self.guidance != 1

    def scales(self, count: int) -> Tensor:
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
        if not self.guided:
            return logits
        conditional, unconditional = logits.float().chunk(2)
        return guide(conditional, unconditional, scale[..., None])

    def require(self, null_prefix: object | None) -> None:
        """Refuse guidance where nobody knows what no condition is."""
        if self.guided and null_prefix is None:
            raise UserError(
                f"sampler.guidance={self.guidance:g}: the prior has not learned to go without its condition; "
                "train it with the option drop of its condition, as in model.conditioner.label.drop=0.1"
            )


@register("sampler", "autoregressive")
class AutoregressiveSampler(Drawing):
    """Draws tokens one after the other, row by row.

    Args:
        temperature: Below 1 sharpens the prior's distribution, above 1 flattens it.
        top_k: Draw among this many best codes; all by default.
        top_p: Draw among the best codes that together reach this probability; all by default.
        min_p: Draw among the codes at least this many times as likely as the best; all by default.
        guidance: s of classifier-free guidance, u + s (c - u); 1 is none. It needs a prior that was trained with
            `model.conditioner.label.drop`, or that of another condition, and costs a second pass.
        guidance_schedule: How s moves from the first token to the last; see `vqf.transformers.guidance.scale_at`.
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
        self.require(null_prefix)
        batch, count = len(prefix), grid[0] * grid[1]
        tokens = start(known, (batch, count), prior.vocab_size, prefix.device)
        numbers = many_uniforms(seed, first, batch, count).to(prefix.device)
        scales = self.scales(count).to(prefix.device)
        prefixes = torch.cat([prefix, null_prefix]) if self.guided and null_prefix is not None else prefix
        following = self._logits(prior, prefixes, tokens)
        for n in range(count):
            logits = following(n)
            if n == 0:
                check_numbers(logits)
            drawn = draw(self.filter(self.guide(logits, scales[n])), numbers[:, n])
            tokens[:, n] = torch.where(tokens[:, n] < 0, drawn, tokens[:, n])
        return tokens

    def _logits(self, prior: Any, prefixes: Tensor, tokens: Tensor) -> Callable[[int], Tensor]:
        """Return what gives the logits of token n = 0, 1, ... after each prefix, given `tokens` up to there."""
        copies = len(prefixes) // len(tokens)
        if not (self.cache and isinstance(prior, Autoregressive)):
            return lambda n: prior(tokens.clamp(min=0).repeat(copies, 1), prefixes)[:, n]
        first, cache = prior.begin(prefixes)
        return lambda n: prior.advance(tokens[:, n - 1].repeat(copies), cache) if n else first


def start(known: Tensor | None, shape: tuple[int, int], vocab_size: int, device: torch.device) -> Tensor:
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


def check_numbers(logits: Tensor) -> None:
    """Refuse the logits of a prior that diverged."""
    if logits.isnan().any():
        raise UserError("the prior's logits are not numbers: its training diverged; go back to an earlier checkpoint")
