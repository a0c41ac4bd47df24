"""Regularizers of the discriminator."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqf.distributed import comm
from vqf.options.ranges import NonNegativeFloat, PositiveInt, Rate
from vqf.protocols import DiscriminatorOutput
from vqf.registry import register


@register("regularizer", "lecam")
class LeCam(nn.Module):
    """LeCam regularization, https://arxiv.org/abs/2104.03310, equation 5.

    E[max(0, D(x) - α_F)²] + E[max(0, α_R - D(x̂))²], with α_R and α_F the moving averages of the logits of real
    and of reconstructed images, updated before.

    Args:
        weight: Factor in the discriminator's loss: 0.3 in the paper's StyleGAN2, 0.05 and 0.001 in later tokenizers.
        decay: Decay of the moving averages.
    """

    averages: Tensor  # (2,): α_R, α_F; a buffer, so that a resumed run continues with them
    initialized: Tensor

    def __init__(self, *, weight: NonNegativeFloat = 0.05, decay: Rate = 0.99) -> None:
        super().__init__()
        self.weight, self.decay = weight, decay
        self.register_buffer("averages", torch.zeros(2))
        self.register_buffer("initialized", torch.zeros(()))

    def forward(self, output: DiscriminatorOutput) -> Tensor:
        self._update_averages(torch.stack([output.real_logits.detach().mean(), output.fake_logits.detach().mean()]))
        alpha_r, alpha_f = self.averages
        return (
            F.relu(output.real_logits - alpha_f).square().mean() + F.relu(alpha_r - output.fake_logits).square().mean()
        )

    @torch.no_grad()
    def _update_averages(self, means: Tensor) -> None:
        means = comm.all_reduce_mean(means)
        rate = torch.where(self.initialized > 0, 1 - self.decay, 1.0)
        self.averages.lerp_(means.to(self.averages.dtype), rate.to(self.averages.dtype))
        self.initialized.fill_(1)


@register("regularizer", "r1")
class R1(nn.Module):
    """R1 gradient penalty, https://arxiv.org/abs/1801.04406, equation 9: γ/2 E|∇ D(x)|² on real images.

    Args:
        weight: γ, the factor in the discriminator's loss.
        every: Compute the penalty every this many steps, scaled by that number (lazy regularization,
            https://arxiv.org/abs/1912.04958).

    Attributes:
        last_value: The last ½ E|∇ D(x)|²; a buffer, so that a resumed run logs the same.
    """

    last_value: Tensor

    def __init__(self, *, weight: NonNegativeFloat = 10.0, every: PositiveInt = 16) -> None:
        super().__init__()
        self.weight, self.every = weight, every
        self.register_buffer("last_value", torch.zeros(()))

    def forward(self, output: DiscriminatorOutput) -> Tensor:
        if output.step % self.every:
            return output.real_logits.new_zeros(())
        images = output.images.detach().requires_grad_()
        logits = output.discriminator(images)
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        term = gradient.square().sum((1, 2, 3)).mean() / 2
        self.last_value.copy_(comm.all_reduce_mean(term.detach()))
        return self.every * term
