"""What a stage is to the loop."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class ValidationResult:
    """What a look at held-out data shows."""

    scalars: dict[str, float]
    images: dict[str, Tensor] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)  # JSON by name: words of images, counts of codes

    def merge(self, other: "ValidationResult") -> "ValidationResult":
        """Return what both show."""
        return ValidationResult(self.scalars | other.scalars, self.images | other.images, self.details | other.details)
