"""The result of a validation."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

VALIDATION_TABLE = "validation images"  # key in metrics.json, and title of the table


@dataclass
class ValidationResult:
    """Scalars, images and details of one validation."""

    scalars: dict[str, float]
    images: dict[str, Tensor] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)  # JSON by name of images: captions, counts of codes

    def merge(self, other: "ValidationResult") -> "ValidationResult":
        return ValidationResult(self.scalars | other.scalars, self.images | other.images, self.details | other.details)
