"""Random numbers as a pure function of what they are for, so that no state has to be saved or kept in step."""

import hashlib

import torch


def hash_seed(*parts: int | str) -> int:
    """Hash numbers and words into 63 bits. Neighbouring numbers give unrelated results, which a sum would not."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seeded_generator(*parts: int | str) -> torch.Generator:
    """Return a generator on the CPU that depends on the parts alone, as in `generator(seed, epoch, index)`."""
    return torch.Generator().manual_seed(hash_seed(*parts))


def hash_fraction(text: str) -> float:
    """Place a text, which need not be valid Unicode, in [0, 1): a split by it stays when images are added."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:6], "big") / 2**48
