"""SHA-256 as hexadecimal strings."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor


def sha256_of_file(path: Path) -> str:
    """Hash a file in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(value: object) -> str:
    """Hash the `repr` of a value."""
    return hashlib.sha256(repr(value).encode()).hexdigest()


def sha256_of_tensors(tensors: Mapping[str, Tensor], *context: object) -> str:
    """Hash names, shapes, dtypes and bytes of tensors by name, after `context`."""
    digest = hashlib.sha256(repr(context).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
