"""Best and worst images, and the mosaic of the codes, against plain loops."""

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
    decoded = (images + strength * noise).clamp(-1, 1)
    indices = torch.randint(vocab - 2, (count, 2, 2), generator=random)  # the last two are never used
    parts = (each.split(size) for each in (images, decoded, indices))
    return [Reconstruction(*each) for each in zip(*parts, strict=True)]


def filled(found: list[Reconstruction], vocab: int = 7, **options: int) -> ImagePanels:
    panels = ImagePanels(vocab, CPU, **options)
    for batch in found:
        panels.update(batch)
    return panels


def test_both_ends_are_found_and_named() -> None:
    found = batches()
    panels = filled(found, top_k=4)
    images, decoded = (torch.cat([getattr(each, name) for each in found]) for name in ("images", "reconstructions"))
    errors = [float(((a - b) / 2).square().mean()) for a, b in zip(images.double(), decoded.double(), strict=True)]
    order = np.argsort(errors)
    for name, expected in (("best", order[:4]), ("worst", order[::-1][:4])):
        pairs = panels.images()[name].unflatten(0, (4, 2))
        assert torch.equal(pairs[:, 0], images[expected.copy()])
        assert torch.equal(pairs[:, 1], decoded[expected.copy()])
        assert panels.details()[name]["captions"] == [f"{-10 * np.log10(errors[i]):.1f} dB" for i in expected]


def test_codes_are_counted_and_drawn_as_what_lies_under_them() -> None:
    found = batches()
    panels = filled(found)
    cells: dict[int, list[Tensor]] = {}
    for batch in found:
        for image, codes in zip(batch.reconstructions, batch.indices, strict=True):
            for i in range(2):
                for j in range(2):
                    cell = image[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
                    cells.setdefault(int(codes[i, j]), []).append(cell)
    assert panels.details()["codes"]["counts"] == [len(cells.get(code, [])) for code in range(7)]
    order = sorted(range(7), key=lambda code: -len(cells.get(code, [])))
    white = torch.ones(3, 4, 4)
    expected = [torch.stack(cells[code]).mean(0) if code in cells else white for code in order]
    torch.testing.assert_close(panels.images()["codes"], torch.cat(expected, dim=2)[None])


def test_several_codebooks_are_counted_together() -> None:
    images = torch.zeros(2, 3, 4, 4)
    indices = torch.tensor([0, 1, 1, 2]).view(2, 1, 1, 2)
    panels = filled([Reconstruction(images, images, indices)], vocab=3)
    assert panels.details()["codes"]["counts"] == [1, 2, 1]
    assert panels.images()["codes"].shape == (1, 3, 4, 12)


def test_codes_that_lie_on_no_squares_are_counted_alone() -> None:
    images = torch.zeros(2, 3, 4, 4)
    panels = filled([Reconstruction(images, images, torch.zeros(2, 1, 4).long())], vocab=3)
    assert panels.details()["codes"]["counts"] == [8, 0, 0]
    assert "codes" not in panels.images()


def test_huge_vocabularies_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    panels = filled(batches(), vocab=2**40)
    assert "codes" not in panels.details()
    assert set(panels.images()) == {"best", "worst"}
    monkeypatch.setattr(module, "MAX_MOSAIC_ELEMENTS", 7 * 48 - 1)
    assert "codes" not in filled(batches()).images()
    assert "codes" in filled(batches()).details()


def test_maps_of_classes_are_judged_by_wrong_pixels() -> None:
    truth = torch.nn.functional.one_hot(torch.arange(16).view(1, 4, 4) % 5, 5).permute(0, 3, 1, 2).float()
    decoded = truth.clone()
    decoded[:, :, 0, :2] = decoded[:, :, 0, [1, 0]]
    panels = filled([Reconstruction(truth, decoded, torch.zeros(1, 1, 1).long())], vocab=1)
    assert panels.details()["worst"]["captions"] == ["12.5 % wrong"]
    assert panels.images()["worst"].shape == (2, 3, 4, 4)


def test_an_album_of_nothing_is_empty() -> None:
    panels = ImagePanels(4, CPU)
    assert panels.images() == {}
    assert panels.details() == {"codes": {"counts": [0, 0, 0, 0]}}
    assert panels.compute() == {}
