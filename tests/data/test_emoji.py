import hashlib

import pytest
import torch

from vqf.data.emoji import ASSETS, Emoji, atlas, catalogue
from vqf.errors import UserError


@pytest.fixture(scope="module")
def splits():
    data = Emoji(64, 0)
    return data.split("train"), data.split("validation")


def test_the_split_is_frozen(splits):
    train, validation = splits
    assert (len(train), len(validation)) == (1400, 236)
    codes = [catalogue()[cell]["codepoint"] for cell in validation.cells]
    assert hashlib.sha256(" ".join(codes).encode()).hexdigest()[:16] == "bd5e6aa8c23e0f74"
    assert validation.names[1] == "FACE WITH STUCK-OUT TONGUE AND WINKING EYE"


def test_splits_are_disjoint_and_twins_are_in_the_same_split(splits):
    train, validation = splits
    assert sorted(train.cells + validation.cells) == list(range(1636))
    sides = [{tuple(atlas()[cell].flatten().tolist()) for cell in split.cells} for split in splits]
    assert not sides[0] & sides[1]
    assert len(sides[0]) + len(sides[1]) == 1631  # five look exactly like another


def test_labels_are_the_categories(splits):
    train, _ = splits
    data = Emoji(64, 0)
    assert data.classes == [
        "Activities",
        "Animals & Nature",
        "Food & Drink",
        "Objects",
        "People & Body",
        "Smileys & Emotion",
        "Symbols",
        "Travel & Places",
    ]
    assert train.names[0] == "GRINNING FACE"
    assert data.classes[train.item(0, 0).label] == "Smileys & Emotion"
    index = train.names.index("HAMBURGER")
    assert data.classes[train.item(0, index).label] == "Food & Drink"


@pytest.mark.parametrize(("background", "color"), [("white", 1.0), ("black", 0.0), ("grey", 0.5)])
def test_compositing_is_the_formula(background, color):
    split = Emoji(64, 0, background=background).split("validation")
    for index in range(0, len(split), 40):
        pixels = atlas()[split.cells[index]].double() / 255
        expected = (pixels[:3] * pixels[3:] + color * (1 - pixels[3:])) * 2 - 1
        sample = split.item(0, index)
        torch.testing.assert_close(sample.image.double(), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(sample.mask.double(), pixels[3:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [16, 32, 100, (48, 96)])
def test_any_size_keeps_shape_range_and_opacity(size):
    split = Emoji(size, 0, background="black").split("validation")
    height, width = (size, size) if isinstance(size, int) else size
    for index in range(0, len(split), 60):
        sample = split.item(0, index)
        assert sample.image.shape == (3, height, width)
        assert sample.mask.shape == (1, height, width)
        assert -1 <= sample.image.min() <= sample.image.max() <= 1
        assert ((sample.image + 1) / 2 <= sample.mask + 1e-6).all()  # on black, no colour exceeds its opacity
        area = min(height, width) ** 2 / 64**2
        drawn = atlas()[split.cells[index], 3].float().sum().item() / 255
        assert sample.mask.sum().item() == pytest.approx(drawn * area, rel=0.02)


def test_halving_the_size_leaves_no_dark_fringe():
    split = Emoji(32, 0).split("validation")
    index = split.names.index(next(name for name in split.names if "HEART" in name))
    big = Emoji(64, 0).split("validation").item(0, index)
    small = split.item(0, index)
    averaged = torch.nn.functional.avg_pool2d(big.image, 2)
    assert (small.image - averaged).abs().mean() < 0.02


def test_random_backgrounds_differ_by_image_and_epoch_but_repeat():
    data = Emoji(64, 3, background="random")
    train, validation = data.split("train"), data.split("validation")
    corner = lambda split, epoch, index: tuple(split.item(epoch, index).image[:, 0, 0].tolist())  # noqa: E731
    corners = {corner(train, epoch, index) for epoch in range(4) for index in range(4)}
    assert len(corners) == 16
    assert corner(train, 2, 1) == corner(Emoji(64, 3, background="random").split("train"), 2, 1)
    assert corner(train, 2, 1) != corner(Emoji(64, 4, background="random").split("train"), 2, 1)
    assert corner(validation, 0, 0) == corner(validation, 5, 0) == (1, 1, 1)


def test_shift_moves_the_whole_image_within_its_limit():
    moved = Emoji(64, 0, shift=3).split("train")
    plain = Emoji(64, 0).split("train")
    seen = set()
    for epoch in range(40):
        mask, still = moved.item(epoch, 0).mask[0], plain.item(epoch, 0).mask[0]
        padded = torch.nn.functional.pad(still, (3, 3, 3, 3))
        places = [(y, x) for y in range(7) for x in range(7) if torch.equal(mask, padded[y : y + 64, x : x + 64])]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 20
    assert {y for y, _ in seen} == {x for _, x in seen} == set(range(7))


def test_flip_mirrors_about_half_of_the_epochs():
    flipped, plain = Emoji(64, 0, flip=True).split("train"), Emoji(64, 0).split("train")
    index = 40
    mirrored = 0
    for epoch in range(60):
        image, still = flipped.item(epoch, index).image, plain.item(epoch, index).image
        assert torch.equal(image, still) != torch.equal(image, still.flip(-1))
        mirrored += torch.equal(image, still.flip(-1))
    assert 15 < mirrored < 45


def test_the_fingerprint_follows_the_pixels():
    fingerprint = lambda name="train", seed=0, size=64, **options: Emoji(size, seed, **options).split(name).fingerprint  # noqa: E731
    assert fingerprint() == fingerprint(seed=1)
    different = [
        fingerprint(),
        fingerprint("validation"),
        fingerprint(size=32),
        fingerprint(background="black"),
        fingerprint(shift=1),
        fingerprint(flip=True),
        fingerprint(flip=True, seed=1),
    ]
    assert len(set(different)) == len(different)
    assert fingerprint("validation", background="random", seed=1) == fingerprint("validation")


def test_mistakes_are_worded():
    with pytest.raises(UserError, match=r"^unknown split 'valid'\. Did you mean 'validation'"):
        Emoji(64, 0).split("valid")


def test_licence_and_notice_lie_beside_the_atlas():
    assert "Apache License" in (ASSETS / "LICENSE").read_text()
    assert "emoji-datasource-google 16.0.0" in (ASSETS / "NOTICE").read_text()
