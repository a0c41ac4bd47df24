"""GAN objectives of a tokenizer.

VQGAN, https://arxiv.org/abs/2012.09841, equations 5 to 7. The generator's loss is multiplied by
λ = |∇ L_rec| / (|∇ L_GAN| + δ), with gradients at the decoder's last layer.
"""

import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor

from vqf.options.ranges import NonNegativeFloat, PositiveFloat, StepsOrFraction
from vqf.protocols import to_steps
from vqf.registry import register


class AdversarialObjective:
    """Schedule and weight of the GAN loss.

    Args:
        steps: Steps of the run; options below 1 are fractions of it.
        weight: Weight of the generator's loss, or a factor on λ if `adaptive` (disc_weight). Below 0
            the decoder would help the discriminator.
        adaptive: Whether to multiply by λ, computed anew at every step.
        start: First step of the GAN: a number of steps, or a fraction of the run if below 1 (disc_start).
        warmup: Steps (or a fraction) for which the discriminator trains before the generator's loss counts.
        ramp_steps: Steps (or a fraction) over which the weight of the generator's loss then rises linearly from 0.
        delta: δ, which keeps λ finite where the GAN gradient is 0. 1e-4 in the code of VQGAN, 1e-6 in the paper.
        max_weight: Upper limit of λ; inf is none.
        refresh_fakes: Train the discriminator on reconstructions of the tokenizer after its update, as the code of
            VQGAN does, at the cost of a second forward pass. By default both networks share one forward pass.
    """

    def __init__(
        self,
        steps: int,
        *,
        weight: NonNegativeFloat = 0.8,
        adaptive: bool = True,
        start: StepsOrFraction = 0.25,
        warmup: StepsOrFraction = 0,
        ramp_steps: StepsOrFraction = 0,
        delta: PositiveFloat = 1e-4,
        max_weight: Annotated[float, Interval(ge=0, le=math.inf)] = 1e4,
        refresh_fakes: bool = False,
    ) -> None:
        self.base_weight, self.adaptive, self.delta, self.max_weight = weight, adaptive, delta, max_weight
        self.start_step = to_steps(start, steps)
        self.generator_start_step = self.start_step + to_steps(warmup, steps)
        self.ramp_steps = to_steps(ramp_steps, steps)
        self.refresh_fakes = refresh_fakes

    def adaptive_weight(self, rec_grad: Tensor, gan_grad: Tensor) -> Tensor:
        """Compute the weight () from gradients at the last layer."""
        if not self.adaptive:
            return torch.full((), self.base_weight, device=rec_grad.device)
        ratio = rec_grad.norm() / (gan_grad.norm() + self.delta)
        return self.base_weight * ratio.clamp(0, self.max_weight)

    def weight_at(self, step: int) -> float:
        """Return the multiplier in [0, 1] of the generator's loss."""
        if step < self.generator_start_step:
            return 0.0
        return min((step - self.generator_start_step + 1) / (self.ramp_steps + 1), 1.0)


@register("adversary", "hinge")
class Hinge(AdversarialObjective):
    """Hinge loss, https://arxiv.org/abs/1705.02894, as in the code of VQGAN."""

    def generator_loss(self, fake: Tensor) -> Tensor:
        """-E[D(x̂)]."""
        return -fake.mean()

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """½ (E[max(0, 1 - D(x))] + E[max(0, 1 + D(x̂))])."""
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


@register("adversary", "vanilla")
class Vanilla(AdversarialObjective):
    """The original objective with logits, https://arxiv.org/abs/1406.2661, in VQGAN's `vanilla` form.

    Args:
        saturating: The generator minimizes log(1 - D(x̂)), as equation 5 is written, whose gradient vanishes where
            the discriminator is confident. By default it maximizes the logit, as the code of VQGAN does.
    """

    def __init__(self, steps: int, *, saturating: bool = False, **options: Any) -> None:
        super().__init__(steps, **options)
        self.saturating = saturating

    def generator_loss(self, fake: Tensor) -> Tensor:
        """-E[logit D(x̂)], or E[log(1 - D(x̂))] if saturating."""
        return -F.softplus(fake).mean() if self.saturating else -fake.mean()

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """-½ (E[log D(x)] + E[log(1 - D(x̂))])."""
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


@register("adversary", "non_saturating")
class NonSaturating(AdversarialObjective):
    """The original objective with the generator's non-saturating loss, https://arxiv.org/abs/1406.2661, as StyleGAN2.

    Both losses are of one logistic regression, so it needs no margin. Where hinge loss ignores patches that are told
    apart already, this one keeps a gradient; it is usually paired with `regularizer=r1`.
    """

    def generator_loss(self, fake: Tensor) -> Tensor:
        """-E[log D(x̂)]."""
        return F.softplus(-fake).mean()

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """-(E[log D(x)] + E[log(1 - D(x̂))])."""
        return F.softplus(-real).mean() + F.softplus(fake).mean()


@register("adversary", "least_squares")
class LeastSquares(AdversarialObjective):
    """Least Squares GAN, https://arxiv.org/abs/1611.04076, equation 9: images are labelled 1, reconstructions 0.

    Its gradient does not vanish for patches on the right side of the boundary but far from it, which makes early
    training smooth; logits that are far off are punished more than by hinge loss.
    """

    def generator_loss(self, fake: Tensor) -> Tensor:
        """½ E[(D(x̂) - 1)²]."""
        return 0.5 * (fake - 1).square().mean()

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """½ (E[(D(x) - 1)²] + E[D(x̂)²])."""
        return 0.5 * ((real - 1).square().mean() + fake.square().mean())
