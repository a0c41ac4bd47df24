import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqf.data.images.augment import CENTER, COLORS, View, Views, recolored
from vqf.seeding import generator

WILD = Views("resized", (0.1, 0.9), (0.5, 2.0), True, (0.4, 0.3, 0.2, 0.1))
GREY = np.array([0.2989, 0.587, 0.114])  # of ITU-R 601, as torchvision rounds them


def picture(seed=0, channels=3):
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
@given(st.sampled_from(COLORS), st.floats(0, 1), st.integers(0, 99))
def test_colors_change_by_the_formulas(name, share, seed):
    factor = share - 0.5 if name == "hue" else 2 * share
    found = unit(recolored(picture(seed), [(name, factor)]))
    np.testing.assert_allclose(found, FORMULAS[name](unit(picture(seed)), factor), atol=2e-4)


def test_changes_follow_each_other():
    colors = [("contrast", 1.7), ("hue", 0.3)]
    expected = turned(FORMULAS["contrast"](unit(picture()), 1.7), 0.3)
    np.testing.assert_allclose(unit(recolored(picture(), colors)), expected, atol=2e-4)


def test_only_the_first_three_channels_are_recolored_and_all_are_mirrored():
    whole = picture(channels=5)
    finished = View(mirrored=True, colors=(("brightness", 0.5),)).finish(whole)
    assert torch.equal(finished[3:], whole[3:].flip(-1))
    torch.testing.assert_close(finished[:3], ((whole[:3] + 1) / 2 - 1).flip(-1))
    assert torch.equal(CENTER.finish(whole), whole)


@given(st.integers(0, 2**40), st.integers(0, 1000), st.integers(0, 2**31))
def test_a_view_is_a_function_of_seed_epoch_and_index(seed, epoch, index):
    assert WILD.draw(generator(seed, epoch, index)) == WILD.draw(generator(seed, epoch, index))
    assert WILD.draw(generator(seed, epoch, index)) != WILD.draw(generator(seed, epoch, index + 1))


def drawn(views, count=400):
    return [views.draw(generator(0, 0, i)) for i in range(count)]


def test_what_is_drawn_lies_within_the_options():
    views = drawn(WILD)
    assert all(0 <= view.across < 1 and 0 <= view.down < 1 for view in views)
    regions = [region for view in views for region in view.regions]
    assert all(0.1 <= area <= 0.9 and 0.5 <= ratio <= 2 for area, ratio in regions)
    assert abs(np.mean([area for area, _ in regions]) - 0.5) < 0.02
    assert abs(np.mean(np.log([ratio for _, ratio in regions]))) < 0.03
    assert abs(np.mean([view.mirrored for view in views]) - 0.5) < 0.1
    for name, most in zip(COLORS, WILD.jitter, strict=True):
        factors = [dict(view.colors)[name] - (name != "hue") for view in views]
        assert -most <= min(factors) < -0.9 * most
        assert 0.9 * most < max(factors) <= most
    assert len({tuple(name for name, _ in view.colors) for view in views}) == 24


def test_a_factor_is_not_negative():
    factors = [factor for view in drawn(Views(jitter=(3.0, 0, 0, 0))) for _, factor in view.colors]
    assert 0 <= min(factors) < 0.1
    assert 3.9 < max(factors) <= 4


def test_what_is_turned_off_does_not_happen():
    assert drawn(Views(), 20) == [CENTER] * 20
    assert not Views().random
    assert WILD.still() == Views(area=WILD.area, ratio=WILD.ratio)
    assert {view.regions for view in drawn(Views("random"), 20)} == {()}
    assert {name for view in drawn(Views(jitter=(0, 0, 0.5, 0))) for name, _ in view.colors} == {"saturation"}


def test_more_options_leave_crop_and_flip_alone():
    plain, wild = drawn(Views("random", flip=True), 30), drawn(Views("random", flip=True, jitter=(1, 1, 1, 0.5)), 30)
    for each in ("across", "down", "mirrored"):
        assert [getattr(view, each) for view in plain] == [getattr(view, each) for view in wild]


def test_the_facts_are_those_that_change_pictures():
    assert Views(area=(0.5, 1)).facts == Views().facts
    different = [Views(), Views("random"), Views("resized"), Views("resized", (0.5, 1)), Views(flip=True)]
    different += [Views(jitter=(0, 0, 0, 0.1)), Views(resize="cv2"), Views("resized", ratio=(1, 1))]
    assert len({each.facts for each in different}) == len(different)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"area": (0.0, 1.0)}, "crop_area=[0.0, 1.0] is not two shares of a picture, the smaller one first"),
        ({"area": (0.9, 0.5)}, "crop_area=[0.9, 0.5] is not two shares of a picture, the smaller one first"),
        ({"area": (0.5,)}, "crop_area=[0.5] is not two shares of a picture, the smaller one first"),
        ({"ratio": (2, 1)}, "crop_ratio=[2, 1] is not two positive numbers, the smaller one first"),
        ({"ratio": (0, 1)}, "crop_ratio=[0, 1] is not two positive numbers, the smaller one first"),
        (
            {"jitter": (1, 1, 1)},
            "jitter=[1, 1, 1] is not four numbers from 0 on: brightness, contrast, saturation, hue, the last at most "
            "0.5",
        ),
        (
            {"jitter": (1, 1, 1, 0.6)},
            "jitter=[1, 1, 1, 0.6] is not four numbers from 0 on: brightness, contrast, saturation, hue, the last at "
            "most 0.5",
        ),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError) as caught:
        Views(**options)
    assert str(caught.value) == message
