"""Seeds as a pure function of their purpose, such as (seed, epoch, index): no generator state to save or sync."""

import hashlib

import torch


def hash_seed(*parts: int | str) -> int:
    """Hash numbers and strings into a 63-bit seed; unlike sums, neighboring numbers give unrelated seeds."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seeded_generator(*parts: int | str) -> torch.Generator:
    """CPU generator seeded by the parts: `seeded_generator(seed, epoch, index)`."""
    return torch.Generator().manual_seed(hash_seed(*parts))


def hash_fraction(text: str) -> float:
    """Hash a string into [0, 1). A train/validation split by it does not change when images are added.

    Surrogates are allowed: a file name need not be valid Unicode.
    """
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:6], "big") / 2**48
