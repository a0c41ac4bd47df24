"""Codebook usage on the validation images."""

from typing import ClassVar

import torch

from vqf.metrics.running_mean import accumulation_dtype
from vqf.protocols import Reconstruction
from vqf.registry import register


@register("metric", "usage")
class Usage:
    """Codebook usage over all images; several codebooks with one vocabulary are counted together.

    `usage` is the fraction of the codes that occur, `dead_codes` the number that do not, `perplexity` exp(entropy).
    """

    indices_only = True
    higher_is_better: ClassVar = {"usage": True, "perplexity": True, "dead_codes": False}

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self.counts = torch.zeros(vocab_size, dtype=torch.int64, device=device)

    def update(self, batch: Reconstruction) -> None:
        self.counts += torch.bincount(batch.indices.flatten(), minlength=len(self.counts))

    def compute(self) -> dict[str, float]:
        frequencies = self.counts.to(accumulation_dtype(self.counts.device)) / self.counts.sum().clamp(min=1)
        used = int((self.counts > 0).sum())
        return {
            "usage": used / len(self.counts),
            "perplexity": float(torch.special.entr(frequencies).sum().exp()),
            "dead_codes": float(len(self.counts) - used),
        }
