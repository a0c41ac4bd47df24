"""Hashes differ exactly if the content does."""

import hashlib
from pathlib import Path

import torch

from vqf.hashing import sha256_of, sha256_of_file, sha256_of_tensors


def test_a_file_has_the_hash_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a" * 100_000)
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(b"a" * 100_000).hexdigest()


def test_values_and_tensors_are_distinguished() -> None:
    a, b = torch.arange(6.0), torch.arange(3)
    same = [{"a": a, "b": b}, {"b": b, "a": a}, {"a": a.view(2, 3).t().contiguous().t().reshape(6), "b": b}]
    assert len({sha256_of_tensors(each) for each in same}) == 1
    others = [{"a": a}, {"a": a.view(2, 3), "b": b}, {"a": a, "c": b}, {"a": a.double(), "b": b}, {"a": a + 1, "b": b}]
    assert len({sha256_of_tensors(each) for each in [same[0], *others]}) == 6
    assert sha256_of_tensors({"a": a}, 1) != sha256_of_tensors({"a": a}, 2) != sha256_of_tensors({"a": a})
    assert sha256_of_tensors({"a": a.to(torch.bfloat16)}) != sha256_of_tensors({"a": a.to(torch.float16)})
    assert sha256_of([1, "a"]) != sha256_of([1, "b"])
