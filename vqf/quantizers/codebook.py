"""What quantizers with an explicit codebook share: the search, the gradient, the numbers for the log."""

import torch
from torch import Tensor

from vqf.distributed import comm


def nearest(vectors: Tensor, codebook: Tensor, chunk: int = 1 << 24) -> Tensor:
    """Return the index of the nearest code for every vector, the first of equals.

    The matrix of distances is made in pieces of at most `chunk` entries (or of one row), so that memory stays
    bounded for large codebooks; but for rounding the result does not depend on it.

    Args:
        vectors: (N, D).
        codebook: (V, D).
        chunk: Entries of the distance matrix held at once.
    """
    half_norms = codebook.square().sum(1) / 2
    rows = max(chunk // len(codebook), 1)
    # |z - e|² / 2 = |z|² / 2 - z·e + |e|² / 2, whose first term does not matter to the minimum
    pieces = [(half_norms - piece @ codebook.T).argmin(1) for piece in vectors.split(rows)]
    return torch.cat(pieces) if pieces else vectors.new_zeros(0, dtype=torch.long)


def straight_through(latents: Tensor, quantized: Tensor) -> Tensor:
    """Return exactly the values of `quantized`, with the gradient of the result handed to `latents` unchanged."""
    # The usual latents + (quantized - latents) is off by a rounding, and a code would not be its own look-up.
    return quantized.detach() + (latents - latents.detach())


def index_counts(indices: Tensor, size: int) -> Tensor:
    """Count how often each of `size` codes occurs in indices of any shape -> (size,) int64."""
    # torch.bincount would make the host wait for a GPU.
    flat = indices.flatten()
    return flat.new_zeros(size).index_add_(0, flat, torch.ones_like(flat))


def usage_stats(counts: Tensor, training: bool = False) -> dict[str, Tensor]:
    """Describe how a batch uses the codebook: perplexity exp(-Σ p log p), and the share of codes it touches.

    Args:
        counts: How often each code is chosen.
        training: Whether every process is here with its part of the batch, and all of it is to be described.
    """
    counts = comm.all_reduce_sum(counts) if training else counts
    p = counts / counts.sum().clamp(min=1)
    entropy = -(p * (p + 1e-10).log()).sum()
    return {"perplexity": entropy.exp(), "batch_usage": (counts > 0).float().mean()}


def check_positive(**sizes: int) -> None:
    """Refuse sizes below 1.

    Raises:
        ValueError: Naming the first of them.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, not {size}")
