"""SHA-256 of files, facts and tensors."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def sha256_of_file(path: Path) -> str:
    """Hash a file, without reading it into memory at once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(facts: object) -> str:
    """Hash values that their `repr` tells apart."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def sha256_of_tensors(tensors: Mapping[str, Tensor], *facts: object) -> str:
    """Hash names, shapes, dtypes and bytes of tensors in the order of their names, after facts about their use."""
    digest = hashlib.sha256(repr(facts).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
