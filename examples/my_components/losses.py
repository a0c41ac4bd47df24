"""A custom loss in a module of your package.

    python -m vqf.run experiment=quickstart plugins=[my_components.losses] "model/loss=[charbonnier]"

Run it in the folder that contains the package, or add that folder to PYTHONPATH.
"""

from torch import Tensor, nn

from vqf import register


@register("loss", "charbonnier")
class Charbonnier(nn.Module):
    """A smooth L1: sqrt(d² + ε²), https://arxiv.org/abs/1710.01992."""

    def __init__(self, *, weight: float = 1.0, epsilon: float = 1e-3) -> None:
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Compare (B, 3, H, W) with (B, 3, H, W)."""
        return ((reconstructions - images).square() + self.epsilon**2).sqrt().mean()
