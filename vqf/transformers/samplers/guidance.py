"""Classifier-free guidance: u + s (c - u).

Classifier-Free Diffusion Guidance, https://arxiv.org/abs/2207.12598, on logits: c with the condition, u without it.
Schedules of s: `interval` as in Applying Guidance in a Limited Interval, https://arxiv.org/abs/2404.07724; `linear`
is VAR's, https://arxiv.org/abs/2404.02905; `power_cosine` is RAR's, https://arxiv.org/abs/2411.00776.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["constant", "interval", "linear", "power_cosine"]
Notation = Literal["llamagen", "var", "maskgit", "rar"]


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """u + s (c - u) of logits (..., V)."""
    guided = unconditional + scale * (conditional - unconditional)
    return torch.where(conditional == unconditional, conditional, guided)  # -inf - -inf is NaN


def scale_at(
    progress: float, scale: float, schedule: Schedule, *, interval: Sequence[float] = (0, 1), power: float = 1.0
) -> float:
    """s of one token.

    Args:
        progress: t in [0, 1), the fraction of tokens before it.
        schedule: `constant`; `interval`, 1 outside of [start, end); `linear`, 1 + (s - 1) t;
            `power_cosine`, 1 + (s - 1) (1 - cos(pi t^p)) / 2.
    """
    if schedule == "interval":
        return scale if interval[0] <= progress < interval[1] else 1.0
    if schedule == "linear":
        return 1 + (scale - 1) * progress
    if schedule == "power_cosine":
        return 1 + (scale - 1) * (1 - math.cos(math.pi * progress**power)) / 2
    return scale


def scale_from_notation(value: float, notation: Notation) -> float:
    """Convert another project's guidance scale to s.

    Args:
        notation: `llamagen` (cfg_scale) and `rar` (guidance_scale): u + s (c - u), as here; `var`, and HMAR (cfg):
            (1 + t) c - t u, for `linear`; `maskgit`, and TiTok (guidance_scale): c + g (c - u).
    """
    return value + 1 if notation in ("var", "maskgit") else value
