"""Optimizers of torch and timm, and learning-rate schedules."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from vqf.errors import UserError, unknown_message
from vqf.options.ranges import Fraction, NonNegativeFloat, StepsOrFraction
from vqf.protocols import to_steps
from vqf.registry import register

register("optimizer", "adam")(torch.optim.Adam)
register("optimizer", "adamw")(torch.optim.AdamW)
register("optimizer", "sgd")(torch.optim.SGD)


@register("optimizer", "timm")
def timm_optimizer(
    params: Iterable[Any],
    *,
    opt: str = "lion",
    lr: NonNegativeFloat = 1e-4,
    weight_decay: NonNegativeFloat = 0.0,
    options: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """Any optimizer of timm by name.

    Args:
        params: Parameters or parameter groups.
        opt: A name of `timm.optim.list_optimizers()`.
        lr: Learning rate.
        weight_decay: Weight decay of groups without their own.
        options: Further arguments of that optimizer, `{betas: [0.9, 0.99]}`.
    """
    from timm.optim import create_optimizer_v2, list_optimizers

    if opt not in list_optimizers():
        raise UserError(f"optimizer.opt: {unknown_message('timm optimizer', opt, list_optimizers())}")
    return create_optimizer_v2(list(params), opt=opt, lr=lr, weight_decay=weight_decay, **(options or {}))


@register("schedule", "constant")
def constant(optimizer: torch.optim.Optimizer, steps: int, *, warmup: StepsOrFraction = 0) -> LambdaLR:
    """Constant learning rate after a linear warmup.

    Args:
        optimizer: The scheduled optimizer.
        steps: Steps of the run.
        warmup: Steps over which the learning rate rises linearly from 0, or a fraction of the run if below 1.
    """
    warmup_steps = to_steps(warmup, steps)
    return LambdaLR(optimizer, lambda step: min((step + 1) / (warmup_steps + 1), 1.0))


@register("schedule", "cosine")
def cosine(
    optimizer: torch.optim.Optimizer, steps: int, *, warmup: StepsOrFraction = 0.02, end: Fraction = 0.0
) -> LambdaLR:
    """Linear warmup, then half a cosine down to `end` times the learning rate at the last step.

    Args:
        optimizer: The scheduled optimizer.
        steps: Steps of the run.
        warmup: Steps over which the learning rate rises linearly from 0, or a fraction of the run if below 1.
        end: Multiplier of the learning rate at the last step.
    """
    warmup_steps = to_steps(warmup, steps)

    def multiplier(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        t = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
        return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * t))

    return LambdaLR(optimizer, multiplier)
