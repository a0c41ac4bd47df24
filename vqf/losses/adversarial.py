"""The adversarial game between decoder and discriminator.

VQGAN, https://arxiv.org/abs/2012.09841, equations 5 to 7: the generator's loss is weighed by
λ = |∇ L_rec| / (|∇ L_GAN| + δ), both gradients taken at the decoder's last layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vqf.protocols import to_steps
from vqf.registry import register


class AdversarialObjective:
    """What all objectives share: when the discriminator plays, and how much its verdict weighs.

    Args:
        steps: Steps of the run, of which a number below 1 is a share.
        weight: The weight where it is fixed; a factor on λ where it is adaptive (disc_weight).
        adaptive: Whether λ follows the gradients.
        start: The first step of the game: a number of steps, or below 1 a share of the run (disc_start).
        warmup: Steps, or a share, in which the discriminator learns before its verdict counts.
        ramp_steps: Steps, or a share, over which its weight then rises from 0.
        delta: δ. 1e-4 in the code of VQGAN, 1e-6 in its text.
        max_weight: Upper limit of λ.
        refresh_fakes: Show the discriminator what the tokenizer draws after its own update, as the code of
            VQGAN does at the price of a second forward; by default both players share one.
    """

    def __init__(
        self,
        steps: int,
        *,
        weight: float,
        adaptive: bool,
        start: float,
        warmup: float,
        ramp_steps: float,
        delta: float,
        max_weight: float,
        refresh_fakes: bool,
    ) -> None:
        for name, value in (("start", start), ("warmup", warmup), ("ramp_steps", ramp_steps)):
            if not value >= 0:
                raise ValueError(f"{name}={value}: it counts steps, or below 1 is a share of the run; never below 0")
        for name, value in (("weight", weight), ("max_weight", max_weight)):
            if not value >= 0:
                raise ValueError(f"{name}={value}: below 0 the decoder would help the discriminator")
        if not delta > 0:
            raise ValueError(f"delta={delta}: it keeps λ finite where the discriminator gives no gradient; above 0")
        self.base_weight, self.adaptive, self.delta, self.max_weight = weight, adaptive, delta, max_weight
        self.start_step = to_steps(start, steps)
        self.generator_start_step = self.start_step + to_steps(warmup, steps)
        self.ramp_steps = to_steps(ramp_steps, steps)
        self.refresh_fakes = refresh_fakes

    def adaptive_weight(self, rec_grad: Tensor, gan_grad: Tensor) -> Tensor:
        """Weigh the generator's loss, given both gradients at the last layer (of any one shape)."""
        if not self.adaptive:
            return torch.full((), self.base_weight, device=rec_grad.device)
        ratio = rec_grad.norm() / (gan_grad.norm() + self.delta)
        return self.base_weight * ratio.clamp(0, self.max_weight)

    def weight_at(self, step: int) -> float:
        """Return the share of the weight that counts at a step; 0 before the verdict counts at all."""
        if step < self.generator_start_step:
            return 0.0
        return min((step - self.generator_start_step + 1) / (self.ramp_steps + 1), 1.0)


@register("adversary", "hinge")
class Hinge(AdversarialObjective):
    """Hinge loss, https://arxiv.org/abs/1705.02894: what the code of VQGAN uses."""

    def __init__(
        self,
        steps: int,
        *,
        weight: float = 0.8,
        adaptive: bool = True,
        start: int | float = 0.25,
        warmup: int | float = 0,
        ramp_steps: int | float = 0,
        delta: float = 1e-4,
        max_weight: float = 1e4,
        refresh_fakes: bool = False,
    ) -> None:
        super().__init__(
            steps,
            weight=weight,
            adaptive=adaptive,
            start=start,
            warmup=warmup,
            ramp_steps=ramp_steps,
            delta=delta,
            max_weight=max_weight,
            refresh_fakes=refresh_fakes,
        )

    def generator_loss(self, fake: Tensor) -> Tensor:
        """-E[D(x̂)], from logits."""
        return -fake.mean()

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """½ (E[max(0, 1 - D(x))] + E[max(0, 1 + D(x̂))]), from logits."""
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


@register("adversary", "vanilla")
class Vanilla(AdversarialObjective):
    """The original objective with logits, https://arxiv.org/abs/1406.2661, in VQGAN's `vanilla` form.

    The discriminator maximises log D(x) + log(1 - D(x̂)). The generator raises the logit itself, as in the code
    of VQGAN; `saturating` makes it minimise log(1 - D(x̂)), the letter of equation 5, which is flat where the
    discriminator is sure.
    """

    def __init__(
        self,
        steps: int,
        *,
        weight: float = 0.8,
        adaptive: bool = True,
        start: int | float = 0.25,
        warmup: int | float = 0,
        ramp_steps: int | float = 0,
        delta: float = 1e-4,
        max_weight: float = 1e4,
        refresh_fakes: bool = False,
        saturating: bool = False,
    ) -> None:
        super().__init__(
            steps,
            weight=weight,
            adaptive=adaptive,
            start=start,
            warmup=warmup,
            ramp_steps=ramp_steps,
            delta=delta,
            max_weight=max_weight,
            refresh_fakes=refresh_fakes,
        )
        self.saturating = saturating

    def generator_loss(self, fake: Tensor) -> Tensor:
        """-E[logit D(x̂)], or E[log(1 - D(x̂))]."""
        return -F.softplus(fake).mean() if self.saturating else -fake.mean()

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """-½ (E[log D(x)] + E[log(1 - D(x̂))]), from logits."""
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
