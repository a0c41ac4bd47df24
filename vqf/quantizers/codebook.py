"""Shared by quantizers with a codebook: nearest-neighbor search, straight-through gradient, usage statistics."""

import torch
from torch import Tensor

from vqf.distributed import comm


def nearest(vectors: Tensor, codebook: Tensor, chunk: int = 1 << 24) -> Tensor:
    """Index (N,) int64 of the nearest code vector of each vector; of equal distances the first.

    Args:
        vectors: (N, D).
        codebook: (V, D).
        chunk: Entries of the (N, V) distance matrix held at once (at least one row), which bounds the memory. Except
            for rounding the result does not depend on it.
    """
    half_norms = codebook.square().sum(1) / 2
    rows = max(chunk // len(codebook), 1)
    # |z - e|² / 2 = |z|² / 2 - z·e + |e|² / 2: the first term is the same for every code
    indices = [(half_norms - z @ codebook.T).argmin(1) for z in vectors.split(rows)]
    return torch.cat(indices) if indices else vectors.new_zeros(0, dtype=torch.long)


def straight_through(latents: Tensor, quantized: Tensor) -> Tensor:
    """Exactly the values of `quantized`; its gradient is passed to `latents` unchanged."""
    # The usual latents + (quantized - latents) rounds, and would differ from the lookup of the index.
    return quantized.detach() + (latents - latents.detach())


def index_counts(indices: Tensor, size: int) -> Tensor:
    """Occurrences of each of `size` codes in indices of any shape, (size,) int64."""
    # torch.bincount makes the host wait for the GPU.
    flat = indices.flatten()
    return flat.new_zeros(size).index_add_(0, flat, torch.ones_like(flat))


def usage_stats(counts: Tensor, training: bool = False) -> dict[str, Tensor]:
    """`perplexity`, exp(-Σ p log p), and `batch_usage`, the fraction of codes that occur in a batch.

    Args:
        counts: Occurrences of each code, (V,).
        training: Whether to sum over ranks. All ranks must then call this at the same time.
    """
    counts = comm.all_reduce_sum(counts) if training else counts
    p = counts / counts.sum().clamp(min=1)
    entropy = -(p * (p + 1e-10).log()).sum()
    return {"perplexity": entropy.exp(), "batch_usage": (counts > 0).float().mean()}


def check_positive(**sizes: int) -> None:
    """Check that sizes are at least 1.

    Raises:
        ValueError: If one is not.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")
