"""The best and the worst images, and what codes stand for: against plain loops."""

import numpy as np
import pytest
import torch
from torch import Tensor

from vqf.evaluation import image_panels as module
from vqf.evaluation.image_panels import ImagePanels
from vqf.protocols import Reconstruction

CPU = torch.device("cpu")


def batches(count: int = 23, size: int = 5, vocab: int = 7) -> list[Reconstruction]:
    random = torch.Generator().manual_seed(0)
    images, noise = (torch.rand(count, 3, 8, 8, generator=random) * 2 - 1 for _ in range(2))
    strength = torch.rand(count, 1, 1, 1, generator=random)
    drawn = (images + strength * noise).clamp(-1, 1)
    indices = torch.randint(vocab - 2, (count, 2, 2), generator=random)  # the last two are never used
    parts = (each.split(size) for each in (images, drawn, indices))
    return [Reconstruction(*each) for each in zip(*parts, strict=True)]


def filled(found: list[Reconstruction], vocab: int = 7, **options: int) -> ImagePanels:
    album = ImagePanels(vocab, CPU, **options)
    for batch in found:
        album.update(batch)
    return album


def test_both_ends_are_found_and_named() -> None:
    found = batches()
    album = filled(found, top_k=4)
    images, drawn = (torch.cat([getattr(each, name) for each in found]) for name in ("images", "reconstructions"))
    errors = [float(((a - b) / 2).square().mean()) for a, b in zip(images.double(), drawn.double(), strict=True)]
    order = np.argsort(errors)
    for name, expected in (("best", order[:4]), ("worst", order[::-1][:4])):
        pairs = album.images()[name].unflatten(0, (4, 2))
        assert torch.equal(pairs[:, 0], images[expected.copy()])
        assert torch.equal(pairs[:, 1], drawn[expected.copy()])
        assert album.details()[name]["captions"] == [f"{-10 * np.log10(errors[i]):.1f} dB" for i in expected]


def test_codes_are_counted_and_drawn_as_what_lies_under_them() -> None:
    found = batches()
    album = filled(found)
    cells: dict[int, list[Tensor]] = {}
    for batch in found:
        for image, codes in zip(batch.reconstructions, batch.indices, strict=True):
            for i in range(2):
                for j in range(2):
                    cell = image[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
                    cells.setdefault(int(codes[i, j]), []).append(cell)
    assert album.details()["codes"]["counts"] == [len(cells.get(code, [])) for code in range(7)]
    order = sorted(range(7), key=lambda code: -len(cells.get(code, [])))
    white = torch.ones(3, 4, 4)
    expected = [torch.stack(cells[code]).mean(0) if code in cells else white for code in order]
    torch.testing.assert_close(album.images()["codes"], torch.cat(expected, dim=2)[None])


def test_several_codebooks_are_counted_together() -> None:
    images = torch.zeros(2, 3, 4, 4)
    indices = torch.tensor([0, 1, 1, 2]).view(2, 1, 1, 2)
    album = filled([Reconstruction(images, images, indices)], vocab=3)
    assert album.details()["codes"]["counts"] == [1, 2, 1]
    assert album.images()["codes"].shape == (1, 3, 4, 12)


def test_codes_that_lie_on_no_squares_are_counted_alone() -> None:
    images = torch.zeros(2, 3, 4, 4)
    album = filled([Reconstruction(images, images, torch.zeros(2, 1, 4).long())], vocab=3)
    assert album.details()["codes"]["counts"] == [8, 0, 0]
    assert "codes" not in album.images()


def test_huge_vocabularies_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    album = filled(batches(), vocab=2**40)
    assert "codes" not in album.details()
    assert set(album.images()) == {"best", "worst"}
    monkeypatch.setattr(module, "MAX_MOSAIC_ELEMENTS", 7 * 48 - 1)
    assert "codes" not in filled(batches()).images()
    assert "codes" in filled(batches()).details()


def test_maps_of_classes_are_judged_by_wrong_pixels() -> None:
    truth = torch.nn.functional.one_hot(torch.arange(16).view(1, 4, 4) % 5, 5).permute(0, 3, 1, 2).float()
    drawn = truth.clone()
    drawn[:, :, 0, :2] = drawn[:, :, 0, [1, 0]]
    album = filled([Reconstruction(truth, drawn, torch.zeros(1, 1, 1).long())], vocab=1)
    assert album.details()["worst"]["captions"] == ["12.5 % wrong"]
    assert album.images()["worst"].shape == (2, 3, 4, 4)


def test_an_album_of_nothing_is_empty() -> None:
    album = ImagePanels(4, CPU)
    assert album.images() == {}
    assert album.details() == {"codes": {"counts": [0, 0, 0, 0]}}
    assert album.compute() == {}
