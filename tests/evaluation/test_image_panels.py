"""Best and worst images, and the mosaic of the codes, against plain loops."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.layouts import raster
from vqf.evaluation import image_panels as module
from vqf.evaluation.image_panels import ImagePanels
from vqf.protocols import Reconstruction
from vqf.tokens.layout import TokenLayout

CPU = torch.device("cpu")


GRID = raster((2, 2), 7)


def batches(count: int = 23, size: int = 5) -> list[Reconstruction]:
    random = torch.Generator().manual_seed(0)
    images, noise = (torch.rand(count, 3, 8, 8, generator=random) * 2 - 1 for _ in range(2))
    strength = torch.rand(count, 1, 1, 1, generator=random)
    decoded = (images + strength * noise).clamp(-1, 1)
    tokens = torch.randint(5, (count, 4), generator=random)  # the last two codes are never used
    parts = (each.split(size) for each in (images, decoded, tokens))
    return [Reconstruction(*each) for each in zip(*parts, strict=True)]


def filled(found: list[Reconstruction], layout: TokenLayout = GRID, **options: int) -> ImagePanels:
    panels = ImagePanels(layout, CPU, **options)
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
        for image, codes in zip(batch.reconstructions, batch.tokens, strict=True):
            for i in range(2):
                for j in range(2):
                    cell = image[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
                    cells.setdefault(int(codes[2 * i + j]), []).append(cell)
    assert panels.details()["codes"]["counts"] == [len(cells.get(code, [])) for code in range(7)]
    order = sorted(range(7), key=lambda code: -len(cells.get(code, [])))
    white = torch.ones(3, 4, 4)
    expected = [torch.stack(cells[code]).mean(0) if code in cells else white for code in order]
    torch.testing.assert_close(panels.images()["codes"], torch.cat(expected, dim=2)[None])


@pytest.mark.parametrize(
    "layout",
    [TokenLayout(((1, 1),), (3, 3), 4), TokenLayout(((1, 1), (1, 1)), (3,), 4), TokenLayout(((1, 2),), (3,), None)],
)
def test_codes_that_are_no_patches_are_left_alone(layout: TokenLayout) -> None:
    """Those of several codebooks, of scales, and without places."""
    images = torch.zeros(2, 3, 4, 4)
    panels = filled([Reconstruction(images, images, torch.tensor([[0, 1], [1, 2]]))], layout)
    assert "codes" not in panels.details()
    assert set(panels.images()) == {"best", "worst"}


def test_codes_that_lie_on_no_squares_are_counted_alone() -> None:
    images = torch.zeros(2, 3, 4, 4)
    panels = filled([Reconstruction(images, images, torch.zeros(2, 4).long())], raster((1, 4), 3))
    assert panels.details()["codes"]["counts"] == [8, 0, 0]
    assert "codes" not in panels.images()


def test_huge_vocabularies_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    panels = filled(batches(), raster((2, 2), 2**40))
    assert "codes" not in panels.details()
    assert set(panels.images()) == {"best", "worst"}
    monkeypatch.setattr(module, "MAX_MOSAIC_ELEMENTS", 7 * 48 - 1)
    assert "codes" not in filled(batches()).images()
    assert "codes" in filled(batches()).details()


def test_maps_of_classes_are_judged_by_wrong_pixels() -> None:
    truth = torch.nn.functional.one_hot(torch.arange(16).view(1, 4, 4) % 5, 5).permute(0, 3, 1, 2).float()
    decoded = truth.clone()
    decoded[:, :, 0, :2] = decoded[:, :, 0, [1, 0]]
    panels = filled([Reconstruction(truth, decoded, torch.zeros(1, 1).long())], raster((1, 1), 1))
    assert panels.details()["worst"]["captions"] == ["12.5 % wrong"]
    assert panels.images()["worst"].shape == (2, 3, 4, 4)


def test_an_album_of_nothing_is_empty() -> None:
    panels = ImagePanels(raster((2, 2), 4), CPU)
    assert panels.images() == {}
    assert panels.details() == {"codes": {"counts": [0, 0, 0, 0]}}
    assert panels.compute() == {}
