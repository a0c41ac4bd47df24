"""Learning-rate schedules for vqf. vqf passes the optimizer and the number of steps; `end` is an option."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vqf import register


@register("schedule", "linear")
def linear(optimizer: Optimizer, steps: int, *, end: float = 0.0) -> LambdaLR:
    """Linear decay to `end` times the learning rate at the last step."""
    return LambdaLR(optimizer, lambda step: 1 - (1 - end) * min(step / max(steps - 1, 1), 1))
