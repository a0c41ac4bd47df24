"""Classifier-free guidance of a prior, in one notation: u + s (c - u).

Classifier-Free Diffusion Guidance, https://arxiv.org/abs/2207.12598, on logits: c are those with the condition, u
those without, s is the scale. s = 1 is no guidance, s = 0 forgets the condition, s > 1 exaggerates it.

The schedules over the course of a sample: `interval` is an on and off as in LlamaGen and in Applying Guidance in a
Limited Interval, https://arxiv.org/abs/2404.07724; `linear` is VAR's, https://arxiv.org/abs/2404.02905;
`power_cosine` is RAR's, https://arxiv.org/abs/2411.00776.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["constant", "interval", "linear", "power_cosine"]
Notation = Literal["llamagen", "var", "maskgit", "rar"]


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Return u + s (c - u) of logits (..., V)."""
    guided = unconditional + scale * (conditional - unconditional)
    return torch.where(conditional == unconditional, conditional, guided)  # both may be -inf


def scale_at(
    progress: float, scale: float, schedule: Schedule, *, interval: Sequence[float] = (0, 1), power: float = 1.0
) -> float:
    """Return s for a token.

    Args:
        progress: Share in [0, 1) of the tokens that come before it.
        scale: s, where it is largest.
        schedule: `constant`; `interval`, 1 outside of one; `linear`, from 1 at the first token;
            `power_cosine`, 1 + (s - 1) (1 - cos(pi t^p)) / 2 of the progress t.
        interval: First progress with guidance, and first without again.
        power: p of `power_cosine`; guidance sets in later the larger it is.
    """
    if schedule == "interval":
        return scale if interval[0] <= progress < interval[1] else 1.0
    if schedule == "linear":
        return 1 + (scale - 1) * progress
    if schedule == "power_cosine":
        return 1 + (scale - 1) * (1 - math.cos(math.pi * progress**power)) / 2
    return scale


def scale_from_notation(value: float, notation: Notation) -> float:
    """Return s for a number that another project calls its guidance.

    Args:
        value: Their number.
        notation: `llamagen` (cfg_scale): u + s (c - u), the notation here.
            `var`, and HMAR (cfg): (1 + t) c - t u; VAR multiplies t with the progress, so choose `linear`.
            `maskgit`, and TiTok, with a constant schedule (guidance_scale): c + g (c - u).
            `rar` (guidance_scale, with its guidance_scale_pow): u + s (c - u), so choose `power_cosine`.
    """
    return value + 1 if notation in ("var", "maskgit") else value


def check_guidance(scale: float, interval: Sequence[float], power: float) -> None:
    """Refuse options that mean nothing.

    Raises:
        ValueError: One line that names the option.
    """
    if not 0 <= scale < math.inf:
        raise ValueError(f"guidance must be at least 0, not {scale}; 1 is none")
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"guidance_interval is two shares of a sample, the first not above the second, not {interval}")
    if not power > 0:
        raise ValueError(f"guidance_power must be above 0, not {power}")
