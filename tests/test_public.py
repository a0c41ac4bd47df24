"""What a user imports from `vqf` itself; inner paths may move."""

import vqf
from vqf.models.generator import Generator
from vqf.models.tokenizer import Tokenizer


def test_the_public_names() -> None:
    assert vqf.__all__ == ["Generator", "Tokenizer", "build", "load", "register"]
    assert (vqf.Generator, vqf.Tokenizer) == (Generator, Tokenizer)
    assert all(callable(getattr(vqf, name)) for name in vqf.__all__)
