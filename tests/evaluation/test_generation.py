"""Samples of an evaluation do not depend on batch size or processes, and are cached until it is done."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.processes import run_processes
from vqf.batch import Batch, Sample
from vqf.distributed import comm
from vqf.distributed.engine import Engine
from vqf.evaluation import generation
from vqf.evaluation.evaluation_images import EvaluationImages
from vqf.evaluation.generation import GeneratedBatch, SampleCache

COUNT = 11
CPU = torch.device("cpu")


class Split:
    """Black images whose label says which they are."""

    fingerprint = "none"

    def __len__(self) -> int:
        return 7

    def item(self, epoch: int, index: int) -> Sample:
        return Sample(torch.zeros(3, 4, 4), label=index)


class Generator:
    """Returns the index of a sample and its label as tokens, counts samples, and fails after `limit`."""

    classes = ("one", "two", "three")

    def __init__(self, limit: int = 10**6) -> None:
        self.sampled, self.limit = 0, limit
        self.tokenizer = SimpleNamespace(decode_tokens=self.decode_tokens)

    def sample_tokens(self, batch: Batch, *, seed: int, first: int) -> Tensor:
        self.sampled += len(batch)
        if self.sampled > self.limit:
            raise KeyboardInterrupt
        assert batch.labels is not None
        return torch.stack([torch.arange(len(batch)) + first, batch.labels], dim=1)

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        return tokens[:, None, None].expand(-1, 3, -1, -1).float()


def generate(generator: Any, labels: str, cache: SampleCache, batch_size: int = 4) -> Iterator[GeneratedBatch]:
    images = EvaluationImages(Split(), "none", 7, "nearest", batch_size, 0, CPU)
    protocol = SimpleNamespace(labels=labels, seed=3)
    return generation.generate(protocol, generator, images, COUNT, Engine(CPU, torch.float32), cache)


def codes(labels: str, folder: Path, batch_size: int = 4) -> list[list[int]]:
    """Tokens of all samples, in the main process."""
    batches = list(generate(Generator(), labels, SampleCache(folder / str(comm.rank()), {}), batch_size))
    return torch.cat([each.tokens for each in batches]).tolist() if batches else []


EXPECTED_LABELS = {"balanced": [i % 3 for i in range(COUNT)], "images": [i % 7 for i in range(COUNT)]}


@pytest.mark.parametrize("labels", ["balanced", "images"])
def test_samples_have_an_index_and_a_label_in_turn(tmp_path: Path, labels: str) -> None:
    expected = [[i, label] for i, label in enumerate(EXPECTED_LABELS[labels])]
    for batch_size in (1, 4, 64):
        assert codes(labels, tmp_path / str(batch_size), batch_size) == expected


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_draw_the_samples_of_one(tmp_path: Path, world: int) -> None:
    for labels, expected in EXPECTED_LABELS.items():
        first, *others = run_processes(world, codes, labels, tmp_path / labels)
        assert first == [[i, label] for i, label in enumerate(expected)]
        assert others == [[]] * (world - 1)


def test_an_interrupted_sampling_resumes(tmp_path: Path) -> None:
    uninterrupted = [each.tokens for each in generate(Generator(), "balanced", SampleCache(tmp_path / "other", {}))]
    facts = {"checkpoint": "a", "sampler.top_k": None}
    killed, after = Generator(limit=8), Generator()
    with pytest.raises(KeyboardInterrupt):
        list(generate(killed, "balanced", SampleCache(tmp_path, facts)))
    batches = list(generate(after, "balanced", SampleCache(tmp_path, facts)))
    assert after.sampled == COUNT - 8, "two batches of four were there already"
    assert all(map(torch.equal, [each.tokens for each in batches], uninterrupted))
    assert torch.equal(batches[0].images, Generator().decode_tokens(uninterrupted[0]))
    other = Generator()
    list(generate(other, "balanced", SampleCache(tmp_path, facts | {"checkpoint": "b"})))
    assert other.sampled == COUNT, "nothing is taken from another checkpoint"


def test_a_damaged_cache_is_a_miss_and_a_full_disk_stops_nothing(tmp_path: Path) -> None:
    cache = SampleCache(tmp_path, {})
    cache.put(0, torch.tensor([[1]]))
    (file,) = tmp_path.glob("*/*")
    file.write_bytes(b"half")
    assert cache.get(0) is None and cache.get(1) is None
    cache.clear()
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    SampleCache(tmp_path / "file", {}).put(0, torch.tensor([[1]]))
