"""Samples of an evaluation: numbered whatever the batches and processes, and kept while they are drawn."""

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
    """Draws a sample's number and what it was told, and counts how many it has drawn."""

    classes = ("one", "two", "three")

    def __init__(self, most: int = 10**6) -> None:
        self.drawn, self.most = 0, most
        self.tokenizer = SimpleNamespace(grid=(1, 2), decode=self.decode)

    def sample_tokens(self, told: Batch, *, seed: int, first: int) -> Tensor:
        self.drawn += len(told)
        if self.drawn > self.most:
            raise KeyboardInterrupt
        assert told.labels is not None
        return torch.stack([torch.arange(len(told)) + first, told.labels], dim=1)

    def decode(self, indices: Tensor) -> Tensor:
        return indices[:, None].expand(-1, 3, -1, -1).float()


def drawn(generator: Any, labels: str, shelf: SampleCache, batch_size: int = 4) -> Iterator[GeneratedBatch]:
    held_out = EvaluationImages(Split(), "none", 7, "nearest", batch_size, 0, CPU)
    protocol = SimpleNamespace(labels=labels, seed=3)
    return generation.generate(protocol, generator, held_out, COUNT, Engine(CPU, torch.float32), shelf)


def codes(labels: str, folder: Path, batch_size: int = 4) -> list[list[int]]:
    """The numbers and labels of all samples, as the first process has them."""
    found = list(drawn(Generator(), labels, SampleCache(folder / str(comm.rank()), {}), batch_size))
    return torch.cat([each.indices.flatten(1) for each in found]).tolist() if found else []


TOLD = {"balanced": [i % 3 for i in range(COUNT)], "images": [i % 7 for i in range(COUNT)]}


@pytest.mark.parametrize("labels", ["balanced", "images"])
def test_samples_are_numbered_and_told_in_turn(tmp_path: Path, labels: str) -> None:
    expected = [[i, told] for i, told in enumerate(TOLD[labels])]
    for batch_size in (1, 4, 64):
        assert codes(labels, tmp_path / str(batch_size), batch_size) == expected


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_draw_the_samples_of_one(tmp_path: Path, world: int) -> None:
    for labels, told in TOLD.items():
        first, *others = run_processes(world, codes, labels, tmp_path / labels)
        assert first == [[i, each] for i, each in enumerate(told)]
        assert others == [[]] * (world - 1)


def test_a_killed_sampling_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = [each.indices for each in drawn(Generator(), "balanced", SampleCache(tmp_path / "whole", {}))]
    facts = {"checkpoint": "a", "sampler.top_k": None}
    killed, after = Generator(most=8), Generator()
    with pytest.raises(KeyboardInterrupt):
        list(drawn(killed, "balanced", SampleCache(tmp_path, facts)))
    found = list(drawn(after, "balanced", SampleCache(tmp_path, facts)))
    assert after.drawn == COUNT - 8, "two batches of four were there already"
    assert all(map(torch.equal, [each.indices for each in found], whole))
    assert torch.equal(found[0].images, Generator().decode(whole[0]))
    other = Generator()
    list(drawn(other, "balanced", SampleCache(tmp_path, facts | {"checkpoint": "b"})))
    assert other.drawn == COUNT, "nothing is taken from another checkpoint"


def test_a_damaged_shelf_is_filled_anew_and_a_full_disk_stops_nothing(tmp_path: Path) -> None:
    shelf = SampleCache(tmp_path, {})
    shelf.put(0, torch.tensor([[1]]))
    (file,) = tmp_path.glob("*/*")
    file.write_bytes(b"half")
    assert shelf.get(0) is None and shelf.get(1) is None
    shelf.clear()
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    SampleCache(tmp_path / "file", {}).put(0, torch.tensor([[1]]))
