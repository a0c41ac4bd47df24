import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.composing import compose
from vqf.data.folder import Folder
from vqf.data.pairs import Pairs
from vqf.errors import UserError
from vqf.registry import build

RNG = np.random.default_rng(0)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def smooth(height, width, phase=0.0):
    """An image of slow waves, in 8 bits of grey."""
    y, x = np.mgrid[:height, :width]
    return 127 + 100 * np.sin((x + 0.5) / width * 5 + phase) * np.cos((y + 0.5) / height * 4 + phase)


@pytest.fixture
def root(tmp_path):
    """Six images of random pixels, each its own map."""
    for i in range(6):
        pixels = RNG.integers(256, size=(24, 40 - i, 3))
        save(tmp_path / "images" / f"{i % 2}" / f"{i}.png", pixels)
        save(tmp_path / "conditions" / f"{i % 2}" / f"{i}.bmp", pixels)
    return tmp_path


def pairs(root, size=16, seed=0, **options):
    return Pairs(size, seed, root=str(root), **{"validation_fraction": 0, **options})


def items(data, part="train", epochs=3):
    split = data.split(part)
    return [split.item(epoch, index) for epoch in range(epochs) for index in range(len(split))]


def worded(action):
    with pytest.raises((UserError, ValueError)) as caught:
        action()
    return str(caught.value)


def alike(sample):
    """Whether image and map of random pixels agree, up to the rounding of two resizers."""
    return (sample.image - sample.condition).abs().mean() < 0.02


@pytest.mark.parametrize("crop", ["random", "center"])
@pytest.mark.parametrize("size", [16, 30, (8, 32)])
def test_a_map_is_cropped_and_flipped_with_its_image(root, size, crop):
    samples = items(pairs(root, size, crop=crop))
    assert all(alike(sample) for sample in samples)
    assert all(not alike(replace(sample, condition=sample.condition.roll(1, -1))) for sample in samples)
    assert all(sample.label is None and sample.crop_box is not None for sample in samples)
    still = items(pairs(root, size, crop=crop, flip=False))
    mirrored = [not torch.equal(a.image, b.image) for a, b in zip(samples, still, strict=True)]
    assert 0 < sum(mirrored) < len(mirrored)
    for a, b, differs in zip(samples, still, mirrored, strict=True):
        for one, other in ((a.image, b.image), (a.condition, b.condition)):
            assert torch.equal(one, other.flip(-1) if differs else other)


@pytest.mark.parametrize("maps", ["rgb", "palette"])
def test_without_resizing_a_crop_is_lossless(root, maps):
    samples = items(pairs(root, (24, 30), maps=maps), epochs=6)
    assert all(torch.equal(sample.image, sample.condition) for sample in samples)
    assert len({sample.image.numpy().tobytes() for sample in samples}) > 20


def test_a_map_keeps_its_colours_where_those_of_the_image_change(root):
    plain = items(pairs(root, 24))
    changed = items(pairs(root, 24, jitter=(0.4, 0.4, 0.4, 0.1)))
    for before, after in zip(plain, changed, strict=True):
        assert torch.equal(before.condition, after.condition)
        assert not torch.equal(before.image, after.image)


@pytest.mark.parametrize("maps", ["rgb", "palette"])
def test_the_image_is_the_one_that_a_folder_gives(root, maps):
    folder = Folder(24, 0, root=str(root / "images"), validation_fraction=0, labels=False)
    alone, together = folder.split("train"), pairs(root, 24, maps=maps).split("train")
    assert list(alone.names) == list(together.names)
    assert all(torch.equal(alone.item(1, i).image, together.item(1, i).image) for i in range(6))


@pytest.mark.parametrize("crop", ["random", "resized"])
@pytest.mark.parametrize("height", [60, 61, 200, 401])
def test_a_map_of_another_scale_lies_on_its_image(tmp_path, height, crop):
    """A large JPEG is decoded at a reduced size, its map in full, or it is smaller: both crops agree."""
    for i in range(4):
        waves = smooth(401, 613, i)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(waves.astype(np.uint8)).save(tmp_path / "images" / f"{i}.jpg", quality=98)
        save(tmp_path / "conditions" / f"{i}.png", smooth(height, round(613 * height / 401), i))
    for sample in items(pairs(tmp_path, 48, maps="grey", crop=crop), epochs=5):
        assert sample.condition.shape == (1, 48, 48)
        error = (sample.image.mean(0) - sample.condition[0]).abs().mean()
        shifted = (sample.image.mean(0)[:, 2:] - sample.condition[0][:, :-2]).abs().mean()
        assert error < 0.01 and error < shifted / 3


def test_a_map_lies_on_a_large_jpeg_of_odd_sides(tmp_path):
    """Such a JPEG is decoded at a fraction of its size, which is no whole number of pixels."""
    ramp = np.linspace(0, 255, 393)
    slopes = np.dstack([np.tile(ramp[:385], (393, 1)), np.tile(ramp[:, None], (1, 385)), np.full((393, 385), 99)])
    save(tmp_path / "conditions" / "a.png", slopes)
    (tmp_path / "images").mkdir()
    Image.fromarray(slopes.astype(np.uint8)).save(tmp_path / "images" / "a.jpg", quality=100, subsampling=0)
    for sample in items(pairs(tmp_path)):
        assert (sample.image - sample.condition).abs().max() <= 2.5 / 127.5  # a pixel of either is 0.65 levels


def test_labels_become_one_channel_per_class(tmp_path):
    numbers = RNG.integers(5, size=(32, 48))
    colours = RNG.integers(256, size=(5, 3))
    save(tmp_path / "images" / "a.png", colours[numbers])
    save(tmp_path / "conditions" / "a.png", numbers)
    for sample in items(pairs(tmp_path, 32, maps="labels", labels=5), epochs=6):
        assert sample.condition.shape == (5, 32, 32) and set(sample.condition.unique().tolist()) == {0, 1}
        assert torch.equal(sample.condition.sum(0), torch.ones(32, 32))
        drawn = colours[sample.condition.argmax(0).numpy()] / 127.5 - 1
        torch.testing.assert_close(sample.image.permute(1, 2, 0).double(), torch.from_numpy(drawn), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [8, 13, 50])
@pytest.mark.parametrize("maps", ["labels", "palette"])
def test_labels_and_palettes_are_never_mixed(tmp_path, size, maps):
    numbers = RNG.choice([0, 200], size=(30, 41))
    save(tmp_path / "images" / "a.png", numbers)
    image = Image.fromarray(numbers.astype(np.uint8)).convert("P")
    image.putpalette([value for i in range(256) for value in (i, 255 - i, 7)])
    (tmp_path / "conditions").mkdir()
    image.save(tmp_path / "conditions" / "a.png")
    options = {"labels": 201} if maps == "labels" else {}
    for sample in items(pairs(tmp_path, size, maps=maps, **options)):
        if maps == "labels":
            assert set(sample.condition.argmax(0).unique().tolist()) <= {0, 200}
        else:
            seen = ((sample.condition + 1) * 127.5).round().flatten(1).T.unique(dim=0).tolist()
            assert seen in ([[0, 255, 7], [200, 55, 7]], [[0, 255, 7]], [[200, 55, 7]])


@pytest.mark.parametrize(("pixel", "last"), [(np.uint8, 255), (np.uint16, 511), (bool, 1)])
def test_labels_of_every_depth(tmp_path, pixel, last):
    numbers = RNG.integers(2, size=(20, 20)) * last
    save(tmp_path / "images" / "a.png", np.zeros((20, 20)))
    (tmp_path / "conditions").mkdir()
    Image.fromarray(numbers.astype(pixel)).save(tmp_path / "conditions" / "a.png")
    (sample,) = items(pairs(tmp_path, 20, maps="labels", labels=600, flip=False), epochs=1)
    assert np.array_equal(sample.condition.argmax(0).numpy(), numbers)


def test_what_has_no_label_is_class_0(tmp_path):
    numbers = RNG.choice([0, 1, 181, 255], size=(20, 20))
    save(tmp_path / "images" / "a.png", numbers)
    save(tmp_path / "conditions" / "a.png", numbers)
    (sample,) = items(pairs(tmp_path, 20, maps="labels", labels=183, unlabelled=255, flip=False), epochs=1)
    reference = (numbers.astype(np.uint8) + np.uint8(1)).astype(int)  # taming-transformers lets 8 bits overflow
    assert np.array_equal(sample.condition.argmax(0).numpy(), reference)


def test_maps_beside_their_images(tmp_path):
    for i in range(30):
        save(tmp_path / f"{i}.png", np.full((16, 16), i))
        save(tmp_path / f"{i}_depth.png", np.full((16, 16), 100 + i))
    data = pairs(tmp_path, images=".", conditions=".", suffix="_depth", maps="grey", validation_fraction=0.3)
    samples = [*items(data, epochs=1), *items(data, "validation", epochs=1)]
    value = lambda image: round((float(image.mean()) + 1) * 127.5)  # noqa: E731
    assert sorted(value(sample.image) for sample in samples) == list(range(30))
    assert all(value(sample.condition) == value(sample.image) + 100 for sample in samples)
    assert len(data.split("validation")) > 1
    (tmp_path / "held_out.txt").write_text("3.png\n7.png\n")
    options = {"images": ".", "conditions": ".", "suffix": "_depth", "validation": str(tmp_path / "held_out.txt")}
    rest = pairs(tmp_path, **options).split("train")
    assert sorted(rest.names) == sorted(f"{i}.png" for i in range(30) if i not in (3, 7))


def test_images_and_maps_in_folders_of_any_name(root, tmp_path):
    (root / "conditions").rename(root.parent / "elsewhere")
    try:
        data = pairs(root, conditions=str(root.parent / "elsewhere"))
        assert all(alike(sample) for sample in items(data))
    finally:
        (root.parent / "elsewhere").rename(root / "conditions")


def test_lists_name_images(root):
    (root / "val.txt").write_text("1/3.png\n0/0.png\n")
    data = pairs(root, validation=str(root / "val.txt"))
    assert list(data.split("validation").names) == ["1/3.png", "0/0.png"]
    assert len(data.split("train")) == 4
    assert all(alike(sample) for sample in items(data, "validation"))


def spoil(path, how):
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:60])
    elif how == "another shape":
        save(path, np.zeros((24, 24)))
    elif how == "label 9":
        save(path, np.full((24, 38), 9))
    else:
        path.write_text("no image")


@pytest.mark.parametrize("how", ["missing", "truncated", "another shape", "no image", "label 9"])
def test_a_pair_with_a_bad_map_is_replaced_by_the_next_and_named_once(root, caplog, how):
    for path in (root / "conditions").rglob("*.bmp"):
        save(path, np.zeros(np.asarray(Image.open(path)).shape[:2]))
    spoil(root / "conditions" / "0" / "2.bmp", how)
    good = Pairs(16, 0, root=str(root), validation_fraction=0, maps="labels", labels=9, flip=False, crop="center")
    with caplog.at_level(logging.WARNING, "vqf"):
        split = good.split("train")
        first, again, following = split.item(0, 1), split.item(4, 1), split.item(0, 2)
    assert list(split.names)[1:3] == ["0/2.png", "0/4.png"]
    assert torch.equal(first.image, following.image) and torch.equal(again.image, following.image)
    assert sum("cannot read '0/2.png'" in record.message for record in caplog.records) == 1
    expected = {
        "missing": "no map",
        "truncated": "its map '0/2.bmp': ",
        "another shape": "its map '0/2.bmp' has another shape: 24 x 24 and 38 x 24",
        "label 9": "its map '0/2.bmp': the label 9 is not below data.labels=9",
        "no image": "its map '0/2.bmp': not an image",
    }
    assert expected[how] in caplog.text


def test_a_bad_image_is_replaced_too(root):
    (root / "images" / "0" / "2.png").write_text("no image")
    split = pairs(root, flip=False, crop="center").split("train")
    assert torch.equal(split.item(0, 1).image, split.item(0, 2).image)
    assert torch.equal(split.item(0, 1).condition, split.item(0, 2).condition)


def test_too_many_bad_maps_stop_the_run(root):
    for i in (2, 4):
        (root / "conditions" / "0" / f"{i}.bmp").write_text("no image")
    split = pairs(root).split("train")
    assert worded(lambda: split.item(0, 1)).startswith("data.max_unreadable=0.01: 2 of the 6 train images")


@pytest.mark.parametrize("count", [2, 6])
def test_many_images_without_a_map_stop_the_run_at_its_start(root, count):
    for i in range(count):
        (root / "conditions" / f"{i % 2}" / f"{i}.bmp").unlink()
    words = worded(lambda: pairs(root).split("train"))
    assert words.startswith(f"data.conditions: {count} of the 6 images in '{root / 'images'}' have no map in ")
    assert words.endswith("looked for '0/0' with any extension for '0/0.png'")


def test_a_pair_is_a_function_of_seed_epoch_and_index(root):
    first, second = pairs(root, 12).split("train"), pairs(root, 12).split("train")
    for index in reversed(range(6)):
        first.item(0, index)
        assert torch.equal(first.item(5, index).condition, second.item(5, index).condition)
    views = {first.item(epoch, 0).condition.numpy().tobytes() for epoch in range(12)}
    assert len(views) > 6
    other = pairs(root, 12, seed=1).split("train")
    assert any(not torch.equal(other.item(0, i).image, first.item(0, i).image) for i in range(6))


def test_the_fingerprint_follows_images_maps_and_how_they_are_read(root):
    fingerprint = lambda **options: pairs(root, **options).split("train").fingerprint  # noqa: E731
    prints = [fingerprint(), fingerprint(maps="grey"), fingerprint(maps="labels", labels=9)]
    prints += [fingerprint(maps="labels", labels=8), fingerprint(maps="labels", labels=9, unlabelled=8)]
    assert fingerprint() == prints[0]
    save(root / "conditions" / "0" / "0.bmp", np.zeros((3, 3)))
    prints.append(fingerprint())
    assert len(set(prints)) == len(prints)


def test_check_looks_at_the_maps_too(root):
    spoil(root / "conditions" / "0" / "2.bmp", "another shape")
    split = pairs(root).split("train")
    assert split.file(0).probe(split.file(0).read_bytes()).mode == "RGB"
    assert "has another shape" in worded(lambda: split.file(1).probe(split.file(1).read_bytes()))


def test_mistakes_are_worded(root):
    def said(**options):
        return worded(lambda: pairs(root, **options))

    assert said(conditions="maps") == f"data.conditions: no folder '{root / 'maps'}'; it holds the maps"
    assert said(images="photos").startswith(f"data.root: no folder '{root / 'photos'}'")
    assert said(images="conditions").startswith("images and conditions are both 'conditions'; give data.suffix")
    assert said(maps="labels").startswith("labels=0, but maps=labels needs the number of classes")
    assert said(labels=5) == "labels and unlabelled are for maps=labels, not for maps=rgb"
    (root / "conditions" / "0" / "0.png").write_bytes(b"")
    assert said() == "data.conditions: '0/0.bmp' and '0/0.png' are maps of the same image"


def test_a_colour_image_is_no_map_of_labels(root):
    words = worded(lambda: items(pairs(root, maps="labels", labels=256)))
    assert "RGB pixels; a map of labels is grayscale, or has a palette" in words


PRESETS = {
    "ade20k_pairs": ("images/{}/a{}.jpg", "annotations/{}/a{}.png", ("training", "validation"), 150),
    "coco_stuff_pairs": ("coco/{}/{:012}.jpg", "coco_stuffthingmaps/{}/{:012}.png", ("train2017", "val2017"), 181),
}


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_read_the_official_layout(tmp_path, name):
    image, condition, folders, last = PRESETS[name]
    for i in range(6):
        numbers = np.full((20, 30), last if i % 2 else 0)
        save(tmp_path / image.format(folders[i >= 4], i), numbers)
        save(tmp_path / condition.format(folders[i >= 4], i), numbers)
    node = compose(f"data={name}", f"data.root={tmp_path}", "data.validation_last=2").data
    data = build("data", node, image_size=16, seed=0)
    for part in ("train", "validation"):
        split = data.split(part)
        assert all(folders[part == "validation"] in each for each in split.names)
        classes = {int(split.item(0, i).condition.argmax(0)[0, 0]) for i in range(len(split))}
        assert classes == ({0, 150} if name.startswith("ade") else {1, 182})
        assert split.item(0, 0).condition.shape[0] == node.labels
