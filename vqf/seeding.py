"""Seeds as a pure function of their purpose."""

import hashlib

import torch


def hash_seed(*parts: int | str) -> int:
    """Hash numbers and strings into a 63-bit seed."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seeded_generator(*parts: int | str) -> torch.Generator:
    """CPU generator seeded by `hash_seed(*parts)`."""
    return torch.Generator().manual_seed(hash_seed(*parts))


def hash_fraction(text: str) -> float:
    """Hash a string into [0, 1); surrogates are allowed, as in file names."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:6], "big") / 2**48
