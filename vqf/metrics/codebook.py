"""Codebook usage on the validation images."""

from typing import ClassVar

import torch
from torch import Tensor

from vqf.metrics.running_mean import accumulation_dtype
from vqf.protocols import Reconstruction
from vqf.registry import register
from vqf.tokens.layout import MAX_COUNTED, TokenLayout


@register("metric", "usage")
class Usage:
    """Codebook usage over all images.

    `usage` is the fraction of the codes that occur, `dead_codes` the number that do not, `perplexity` exp(entropy).
    With several codebooks these are mean, sum and geometric mean, beside those of each: `usage/0`, `usage/1`.
    """

    tokens_only = True
    higher_is_better: ClassVar = {"usage": True, "perplexity": True, "dead_codes": False}

    def __init__(self, layout: TokenLayout, device: torch.device | str) -> None:
        self.layout = layout
        self.counters = [CodeCounter(size, device) for size in layout.vocab_sizes]

    def update(self, batch: Reconstruction) -> None:
        for counter, codes in zip(self.counters, self.layout.by_codebook(batch.tokens).unbind(-1), strict=True):
            counter.update(codes.flatten())

    def compute(self) -> dict[str, float]:
        each = [counter.compute() for counter in self.counters]
        if len(each) == 1:
            return each[0]
        entropy = torch.tensor([stats["perplexity"] for stats in each], dtype=torch.float64).log().mean()
        summary = {
            "usage": sum(stats["usage"] for stats in each) / len(each),
            "perplexity": float(entropy.exp()),
            "dead_codes": sum(stats["dead_codes"] for stats in each),
        }
        return summary | {f"{key}/{k}": value for k, stats in enumerate(each) for key, value in stats.items()}


class CodeCounter:
    """Occurrences of the codes of one codebook. Of a large one, only codes that occur take memory."""

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size, self.sparse = vocab_size, vocab_size > MAX_COUNTED
        self.codes = torch.arange(0 if self.sparse else vocab_size, device=device)
        self.counts = torch.zeros_like(self.codes)

    def update(self, codes: Tensor) -> None:
        if not self.sparse:
            self.counts += torch.bincount(codes, minlength=len(self.counts))
            return
        all_codes = torch.cat([self.codes, codes])
        occurrences = torch.cat([self.counts, torch.ones_like(codes)])
        self.codes, positions = all_codes.unique(return_inverse=True)
        self.counts = torch.zeros_like(self.codes).index_add_(0, positions, occurrences)

    def compute(self) -> dict[str, float]:
        frequencies = self.counts.to(accumulation_dtype(self.counts.device)) / self.counts.sum().clamp(min=1)
        used = int((self.counts > 0).sum())
        return {
            "usage": used / self.vocab_size,
            "perplexity": float(torch.special.entr(frequencies).sum().exp()),
            "dead_codes": float(self.vocab_size - used),
        }
