"""Functions of quantizers with a codebook."""

import torch
from torch import Tensor

from vqf.distributed import comm


def nearest(vectors: Tensor, codebook: Tensor, chunk: int = 1 << 24) -> Tensor:
    """Index (N,) int64 of the code (V, D) nearest to each vector (N, D); of equals the first.

    Args:
        chunk: Entries of the distance matrix held at once (at least one row).
    """
    # |z - e|² / 2 = |z|² / 2 - z·e + |e|² / 2: the first term is the same for every code
    return _least(vectors, codebook, codebook.square().sum(1) / 2, chunk)


def most_similar(vectors: Tensor, codebook: Tensor, chunk: int = 1 << 24) -> Tensor:
    """Index (N,) int64 of the code (V, D) with the largest dot product with each vector (N, D); else as `nearest`."""
    return _least(vectors, codebook, codebook.new_zeros(()), chunk)


def _least(vectors: Tensor, codebook: Tensor, offsets: Tensor, chunk: int) -> Tensor:
    rows = max(chunk // len(codebook), 1)
    indices = [(offsets - z @ codebook.T).argmin(1) for z in vectors.split(rows)]
    return torch.cat(indices) if indices else vectors.new_zeros(0, dtype=torch.long)


def straight_through(latents: Tensor, quantized: Tensor) -> Tensor:
    """The values of `quantized`, with the gradient passed to `latents`."""
    # The usual latents + (quantized - latents) rounds, and would differ from the lookup of the index.
    return quantized.detach() + (latents - latents.detach())


def index_counts(indices: Tensor, size: int) -> Tensor:
    """Occurrences (size,) int64 of each code."""
    # torch.bincount makes the host wait for the GPU.
    flat = indices.flatten()
    return flat.new_zeros(size).index_add_(0, flat, torch.ones_like(flat))


def usage_stats(counts: Tensor, training: bool = False) -> dict[str, Tensor]:
    """`perplexity`, exp(-Σ p log p), and `batch_usage`, the fraction of codes in a batch.

    Args:
        training: Whether to sum over ranks, which must all call this then.
    """
    counts = comm.all_reduce_sum(counts) if training else counts
    p = counts / counts.sum().clamp(min=1)
    entropy = -(p * (p + 1e-10).log()).sum()
    return {"perplexity": entropy.exp(), "batch_usage": (counts > 0).float().mean()}
