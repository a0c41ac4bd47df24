"""What a stage is to the loop."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Evaluation:
    """What a look at held-out data shows."""

    scalars: dict[str, float]
    images: dict[str, Tensor] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)  # JSON by name: words of pictures, counts of codes

    def join(self, other: "Evaluation") -> "Evaluation":
        """Return what both show."""
        return Evaluation(self.scalars | other.scalars, self.images | other.images, self.details | other.details)
