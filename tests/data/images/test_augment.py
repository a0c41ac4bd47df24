import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqf.data.images.augment import CENTER_CROP, JITTER_PROPERTIES, Augmentation, ViewParams, adjust_colors
from vqf.seeding import seeded_generator

WILD = Augmentation("resized", (0.1, 0.9), (0.5, 2.0), True, (0.4, 0.3, 0.2, 0.1))
GREY = np.array([0.2989, 0.587, 0.114])  # of ITU-R 601, as torchvision rounds them


def image(seed=0, channels=3):
    return torch.rand(channels, 5, 7, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def unit(image):
    return ((image.double() + 1) / 2).permute(1, 2, 0).numpy()


def blend(values, other, factor):
    return (factor * values + (1 - factor) * other).clip(0, 1)


def turned(values, shift):
    flat = [colorsys.rgb_to_hsv(*color) for color in values.reshape(-1, 3)]
    return np.array([colorsys.hsv_to_rgb((h + shift) % 1, s, v) for h, s, v in flat]).reshape(values.shape)


FORMULAS = {
    "brightness": lambda values, factor: (values * factor).clip(0, 1),
    "contrast": lambda values, factor: blend(values, (values @ GREY).mean(), factor),
    "saturation": lambda values, factor: blend(values, (values @ GREY)[..., None], factor),
    "hue": turned,
}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(JITTER_PROPERTIES), st.floats(0, 1), st.integers(0, 99))
def test_colors_change_by_the_formulas(name, share, seed):
    factor = share - 0.5 if name == "hue" else 2 * share
    found = unit(adjust_colors(image(seed), [(name, factor)]))
    np.testing.assert_allclose(found, FORMULAS[name](unit(image(seed)), factor), atol=2e-4)


def test_changes_follow_each_other():
    colors = [("contrast", 1.7), ("hue", 0.3)]
    expected = turned(FORMULAS["contrast"](unit(image()), 1.7), 0.3)
    np.testing.assert_allclose(unit(adjust_colors(image(), colors)), expected, atol=2e-4)


def test_only_the_first_three_channels_are_recolored_and_all_are_mirrored():
    whole = image(channels=5)
    finished = ViewParams(flipped=True, color_factors=(("brightness", 0.5),)).apply(whole)
    assert torch.equal(finished[3:], whole[3:].flip(-1))
    torch.testing.assert_close(finished[:3], ((whole[:3] + 1) / 2 - 1).flip(-1))
    assert torch.equal(CENTER_CROP.apply(whole), whole)


@given(st.integers(0, 2**40), st.integers(0, 1000), st.integers(0, 2**31))
def test_a_view_is_a_function_of_seed_epoch_and_index(seed, epoch, index):
    assert WILD.sample(seeded_generator(seed, epoch, index)) == WILD.sample(seeded_generator(seed, epoch, index))
    assert WILD.sample(seeded_generator(seed, epoch, index)) != WILD.sample(seeded_generator(seed, epoch, index + 1))


def drawn(views, count=400):
    return [views.sample(seeded_generator(0, 0, i)) for i in range(count)]


def test_what_is_drawn_lies_within_the_options():
    views = drawn(WILD)
    assert all(0 <= view.crop_x < 1 and 0 <= view.crop_y < 1 for view in views)
    regions = [region for view in views for region in view.regions]
    assert all(0.1 <= area <= 0.9 and 0.5 <= ratio <= 2 for area, ratio in regions)
    assert abs(np.mean([area for area, _ in regions]) - 0.5) < 0.02
    assert abs(np.mean(np.log([ratio for _, ratio in regions]))) < 0.03
    assert abs(np.mean([view.flipped for view in views]) - 0.5) < 0.1
    for name, most in zip(JITTER_PROPERTIES, WILD.jitter, strict=True):
        factors = [dict(view.color_factors)[name] - (name != "hue") for view in views]
        assert -most <= min(factors) < -0.9 * most
        assert 0.9 * most < max(factors) <= most
    assert len({tuple(name for name, _ in view.color_factors) for view in views}) == 24


def test_a_factor_is_not_negative():
    factors = [factor for view in drawn(Augmentation(jitter=(3.0, 0, 0, 0))) for _, factor in view.color_factors]
    assert 0 <= min(factors) < 0.1
    assert 3.9 < max(factors) <= 4


def test_what_is_turned_off_does_not_happen():
    assert drawn(Augmentation(), 20) == [CENTER_CROP] * 20
    assert not Augmentation().is_random
    assert WILD.deterministic() == Augmentation(area=WILD.area, ratio=WILD.ratio)
    assert {view.regions for view in drawn(Augmentation("random"), 20)} == {()}
    assert {name for view in drawn(Augmentation(jitter=(0, 0, 0.5, 0))) for name, _ in view.color_factors} == {
        "saturation"
    }


def test_more_options_leave_crop_and_flip_alone():
    plain, wild = (
        drawn(Augmentation("random", flip=True), 30),
        drawn(Augmentation("random", flip=True, jitter=(1, 1, 1, 0.5)), 30),
    )
    for each in ("crop_x", "crop_y", "flipped"):
        assert [getattr(view, each) for view in plain] == [getattr(view, each) for view in wild]


def test_fingerprint_fields_are_those_that_change_images():
    assert Augmentation(area=(0.5, 1)).fingerprint_fields == Augmentation().fingerprint_fields
    different = [
        Augmentation(),
        Augmentation("random"),
        Augmentation("resized"),
        Augmentation("resized", (0.5, 1)),
        Augmentation(flip=True),
    ]
    different += [
        Augmentation(jitter=(0, 0, 0, 0.1)),
        Augmentation(resize="cv2"),
        Augmentation("resized", ratio=(1, 1)),
    ]
    assert len({each.fingerprint_fields for each in different}) == len(different)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"area": (0.9, 0.5)}, "crop_area=[0.9, 0.5]: give the smaller area first"),
        ({"ratio": (2, 1)}, "crop_ratio=[2, 1]: give the smaller ratio first"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError) as caught:
        Augmentation(**options)
    assert str(caught.value) == message
