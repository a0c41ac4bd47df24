"""How much of the codebook held-out images use."""

from typing import ClassVar

import torch

from vqf.metrics.running_mean import accumulation_dtype
from vqf.protocols import Reconstruction
from vqf.registry import register


@register("metric", "usage")
class Usage:
    """Use of the codes over all images seen; several codebooks of one vocabulary are counted together.

    `usage` is the share of the vocabulary that occurs, `dead_codes` how many codes do not, and `perplexity` the number
    of codes that, used evenly, would carry as much: exp of the entropy.
    """

    indices_only = True
    higher_is_better: ClassVar = {"usage": True, "perplexity": True, "dead_codes": False}

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self.counts = torch.zeros(vocab_size, dtype=torch.int64, device=device)

    def update(self, batch: Reconstruction) -> None:
        """Count the codes of a batch."""
        self.counts += torch.bincount(batch.indices.flatten(), minlength=len(self.counts))

    def compute(self) -> dict[str, float]:
        """Return `usage`, `perplexity` and `dead_codes`."""
        shares = self.counts.to(accumulation_dtype(self.counts.device)) / self.counts.sum().clamp(min=1)
        used = int((self.counts > 0).sum())
        return {
            "usage": used / len(self.counts),
            "perplexity": float(torch.special.entr(shares).sum().exp()),
            "dead_codes": float(len(self.counts) - used),
        }
