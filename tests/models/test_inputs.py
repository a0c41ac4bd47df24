"""What callers pass to the six methods of a loaded model: each input is read right, or refused with what to write."""

import copy
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tests.support.tiny_models import LAYOUTS, generator_of, make_images, tokenizer_of
from vqf.batch import Batch
from vqf.errors import UserError

MASK = torch.arange(16)[:, None].expand(16, 16) < 8


def refuse(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def follow(message: str, **names: Any) -> Any:
    """Evaluate what a message says to write."""
    written = re.search(r"; write (.*?)(?: to crop them)?$", message)
    assert written, message
    return eval(written[1], {"torch": torch, "numpy": numpy, "random": random, **names})


BYTES = ((make_images() + 1) * 127.5).round().byte()
LAST = BYTES.permute(0, 2, 3, 1)
EXPECTED = BYTES / 127.5 - 1

# What is passed, how the message describes it, and the images that it stands for.
WRONG_IMAGES: dict[str, tuple[Any, str, Tensor]] = {
    "uint8": (BYTES, "(3, 3, 16, 16) uint8", EXPECTED),
    "int64": (BYTES.long(), "(3, 3, 16, 16) int64", EXPECTED),
    "uint16": (torch.from_numpy(BYTES.numpy().astype("uint16") * 257), "(3, 3, 16, 16) uint16", EXPECTED),
    "bool": (make_images() > 0, "(3, 3, 16, 16) bool", (make_images() > 0) * 2.0 - 1),
    "0 to 255": (BYTES.float(), "(3, 3, 16, 16) float32 from 0 to 255", EXPECTED),
    "0 to 255 in float16": (BYTES.half(), "(3, 3, 16, 16) float16 from 0 to 255", BYTES.half() / 127.5 - 1),
    "0 to 65535": (BYTES.float() * 257, "(3, 3, 16, 16) float32 from 0 to 6.554e+04", EXPECTED),
    "NaN": (make_images().masked_fill(MASK, torch.nan), "float32 with NaN", make_images().masked_fill(MASK, 0)),
    "inf": (make_images().masked_fill(MASK, torch.inf), "float32 with NaN or inf", make_images().masked_fill(MASK, 1)),
    "channels last": (LAST, "(3, 16, 16, 3) uint8", EXPECTED),
    "channels last, float": (make_images().permute(0, 2, 3, 1), "(3, 16, 16, 3) float32", make_images()),
    "no batch": (make_images()[0], "(3, 16, 16) float32", make_images(1)),
    "no batch, channels last": (LAST[0], "(16, 16, 3) uint8", EXPECTED[:1]),
    "one gray image": (BYTES[0, 0], "(16, 16) uint8", EXPECTED[:1, :1].expand(1, 3, 16, 16)),
    "gray images": (make_images()[:, :1], "(3, 1, 16, 16)", make_images()[:, :1].expand(3, 3, 16, 16)),
    "opacity": (torch.cat([EXPECTED, EXPECTED[:, :1]], 1), "(3, 4, 16, 16)", EXPECTED),
    "array": (LAST.numpy(), "(3, 16, 16, 3) uint8, a numpy array", EXPECTED),
    "flipped array": (LAST.numpy()[:, ::-1], "(3, 16, 16, 3) uint8, a numpy array", EXPECTED.flip(2)),
    "PIL image": (Image.fromarray(LAST[0].numpy()), "(16, 16, 3) uint8, a PIL image", EXPECTED[:1]),
    "PIL images": ([Image.fromarray(each.numpy()) for each in LAST], "(3, 16, 16, 3) uint8, a list", EXPECTED),
    "list of tensors": (list(make_images()), "(3, 3, 16, 16) float32, a list", make_images()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", WRONG_IMAGES)
def test_wrong_images_are_refused_with_the_conversion(layout: str, case: str) -> None:
    tokenizer, (images, given, expected) = tokenizer_of(layout), WRONG_IMAGES[case]
    for method in (tokenizer.encode, tokenizer.encode_tokens):
        message = refuse(lambda method=method: method(images))
        assert message.startswith("images must be (B, 3, H, W) in [-1, 1], not (") and given in message
        torch.testing.assert_close(method(follow(message, images=images)), method(expected))


def test_the_message_in_the_readme_is_the_one_that_is_raised() -> None:
    images = numpy.zeros((8, 64, 64, 3), numpy.uint8)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert f"\nUserError: {refuse(lambda: tokenizer_of('raster').encode(images))}\n" in readme


@pytest.mark.parametrize("layout", ["raster", "two codebooks"])
@pytest.mark.parametrize("case", WRONG_IMAGES)
def test_wrong_images_are_not_completed(layout: str, case: str) -> None:
    generator, (images, given, expected) = generator_of(layout), WRONG_IMAGES[case]
    message = refuse(lambda: generator.complete(images, MASK))
    assert given in message
    completed = generator.complete(follow(message, images=images), MASK)
    torch.testing.assert_close(completed, generator.complete(expected, MASK))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (make_images() * 2.6, "as in (images * std + mean) * 2 - 1"),
        (torch.zeros(2, 5, 16, 16), "not (2, 5, 16, 16) float32"),
        (torch.zeros(5), "not (5,) float32"),
        ("a.png", "images must be a tensor, not str"),
        (None, "images must be a tensor, not NoneType"),
        (numpy.array(["a.png"]), "images must be a tensor, not ndarray"),
    ],
)
def test_images_without_a_sure_conversion_are_refused(images: Any, words: str) -> None:
    for call in (tokenizer_of("raster").encode, lambda each: generator_of("raster").complete(each, MASK)):
        assert words in refuse(lambda call=call: call(images))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_of_any_precision_are_encoded(layout: str) -> None:
    tokenizer, images = tokenizer_of(layout), make_images()
    for each in (images.double(), images.half(), images.bfloat16(), (images + 1) / 2, images * 1.3):
        assert torch.equal(tokenizer.encode(each), tokenizer.encode(each.float()))
    assert tokenizer.encode(images[:0]).shape == (0, *tokenizer.encode(images).shape[1:])
    assert tokenizer.encode_tokens(images[:0]).shape == (0, tokenizer.layout.length)
    assert "none to complete" in refuse(lambda: generator_of("raster").complete(images[:0], MASK))


def test_sizes_that_do_not_fit_are_cropped_or_resized() -> None:
    images = torch.zeros(1, 3, 23, 37)
    message = refuse(lambda: tokenizer_of("raster").encode(images))
    assert "not 23 x 37" in message
    assert tokenizer_of("raster").encode(follow(message, images=images)).shape == (1, 2, 4)
    assert "must be multiples" in refuse(lambda: tokenizer_of("raster").encode(images[..., :3]))
    message = refuse(lambda: tokenizer_of("no places").encode(images))
    assert tokenizer_of("no places").encode(follow(message, images=images)).shape == (1, 1, 5)


INTEGERS = (torch.int32, torch.int16, torch.uint8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_of_any_integer_type_are_decoded(layout: str) -> None:
    tokenizer = tokenizer_of(layout)
    indices, tokens = tokenizer.encode(make_images()), tokenizer.encode_tokens(make_images())
    for dtype in INTEGERS:
        assert torch.equal(tokenizer.decode(indices.to(dtype)), tokenizer.decode(indices))
        assert torch.equal(tokenizer.decode_tokens(tokens.to(dtype)), tokenizer.decode(indices))
        if LAYOUTS[layout].completes:
            whole = torch.ones(16, 16)
            completed = generator_of(layout).complete(indices.to(dtype), whole)
            torch.testing.assert_close(completed, tokenizer.decode(indices))
    assert tokenizer.decode(indices[:0]).shape == (0, 3, 16, 16)
    assert tokenizer.decode_tokens(tokens[:0]).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["float", "bool", "array", "list", "no batch", "tokens", "float tokens"])
def test_wrong_indices_are_refused_with_the_conversion(layout: str, form: str) -> None:
    generator, tokenizer = generator_of(layout), tokenizer_of(layout)
    indices = tokenizer.encode(make_images()).clamp(max=1 if form == "bool" else None, min=0)
    given, expected = other_forms(indices)[form], tokenizer.decode(indices[:1] if form == "no batch" else indices)
    if form == "tokens" and tokenizer.layout.unflatten(given).shape == given.shape:
        return  # of a pyramid, both are one
    message = refuse(lambda: tokenizer.decode(given))
    assert message.startswith("indices must be (B, ")
    written = follow(message, indices=given, tokenizer=tokenizer)
    torch.testing.assert_close(written if written.is_floating_point() else tokenizer.decode(written), expected)
    if LAYOUTS[layout].completes and form != "no batch":
        message = refuse(lambda: generator.complete(given, torch.ones(16, 16)))
        written = follow(message, images=given, generator=generator)
        torch.testing.assert_close(generator.complete(written, torch.ones(16, 16)), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["float", "bool", "array", "list", "no batch", "indices", "float indices"])
def test_wrong_tokens_are_refused_with_the_conversion(layout: str, form: str) -> None:
    tokenizer = tokenizer_of(layout)
    indices = tokenizer.encode(make_images()).clamp(max=1 if form == "bool" else None, min=0)
    tokens = tokenizer.layout.flatten(indices)
    given = {**other_forms(tokens), "indices": indices, "float indices": indices.float()}[form]
    expected = tokenizer.decode(indices[:1] if form == "no batch" else indices)
    if form == "indices" and indices.shape == tokens.shape:
        return
    message = refuse(lambda: tokenizer.decode_tokens(given))
    assert message.startswith(f"tokens must be (B, {tokenizer.layout.length}) integers, not ")
    written = follow(message, tokens=given, tokenizer=tokenizer)
    torch.testing.assert_close(written if written.is_floating_point() else tokenizer.decode_tokens(written), expected)


def other_forms(codes: Tensor) -> dict[str, Any]:
    rows = codes.flatten(1)
    forms = {"float": codes.float(), "bool": codes.bool(), "array": codes.numpy(), "list": codes.tolist()}
    return {**forms, "no batch": codes[0], "tokens": rows, "float tokens": rows.float()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_that_are_no_codes_are_refused(layout: str) -> None:
    tokenizer = tokenizer_of(layout)
    for shape in ((), (3,), (1, 2, 2, 2, 2), (1, 3, 3) if layout == "no places" else (2, 3)):
        message = refuse(lambda shape=shape: tokenizer.decode(torch.zeros(shape, dtype=torch.int64)))
        assert "integers, not (" in message
        assert "tokens must be" in refuse(
            lambda shape=shape: tokenizer.decode_tokens(torch.zeros(shape, dtype=torch.int64))
        )
    assert "must be a tensor, not str" in refuse(lambda: tokenizer.decode("0"))  # type: ignore[arg-type]


def test_rows_that_may_be_one_grid_are_refused_with_both_readings() -> None:
    tokenizer, images = tokenizer_of("raster"), make_images().repeat(1, 1, 2, 2)
    tokens = tokenizer.encode_tokens(images)  # (3, 16), and those of training are (B, 4)
    generator = generator_of("raster")
    calls = {"indices": tokenizer.decode, "images": lambda each: generator.complete(each, MASK)}
    for name, call in calls.items():
        message = refuse(lambda call=call: call(tokens))
        assert f"not (3, 16) int64; write {name}[None] if this is one grid, " in message
        written = re.search("one grid, (.*) if these are tokens$", message)[1]  # type: ignore[index]
        values = {name: tokens, "tokenizer": tokenizer, "generator": generator, "rows": 4, "columns": 4}
        expected = tokenizer.decode(tokenizer.encode(images)) if name == "indices" else tokenizer.encode(images)
        assert torch.equal(eval(written, values), expected)


def test_the_first_codebooks_and_scales_are_decoded_alone() -> None:
    two, pyramid = tokenizer_of("two codebooks"), tokenizer_of("pyramid")
    assert two.decode(two.encode(make_images())[..., :1]).shape == (3, 3, 16, 16)
    assert pyramid.decode(pyramid.encode(make_images())[:, :1]).shape == (3, 3, 16, 16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_outside_of_their_codebook_are_refused(layout: str) -> None:
    generator, tokenizer = generator_of(layout), tokenizer_of(layout)
    sizes = tokenizer.layout.vocab_sizes
    for book, size in enumerate(sizes):
        codes = "codes" if len(sizes) == 1 else f"codes of codebook {book}"
        for code, reason in ((size, "another tokenizer"), (-1, "generator.complete"), (-5, "another tokenizer")):
            tokens = tokenizer.encode_tokens(make_images())
            tokens[1, len(sizes) + book] = code  # of the second cell
            indices = tokenizer.layout.unflatten(tokens)
            expected = f"{codes} are 0 to {size - 1}, not {code}; "
            for name, call in (("tokens", tokenizer.decode_tokens), ("indices", tokenizer.decode)):
                message = refuse(lambda call=call, given={"tokens": tokens, "indices": indices}[name]: call(given))
                assert message.startswith(f"{name}: {expected}") and reason in message
            if LAYOUTS[layout].completes:
                assert expected in refuse(lambda given=indices: generator.complete(given, MASK))
                unknown = torch.zeros(2, 2, dtype=torch.bool)  # nothing reads the code of an unknown cell
                assert generator.complete(indices, unknown).isfinite().all()


NUMBERS = [
    ({"count": 0}, "count=0: must be a whole number of at least 1; write count=1"),
    ({"count": -1}, "count=-1: must be a whole number of at least 1; write count=1"),
    ({"count": "3"}, "count='3': must be a whole number of at least 1; write count=3"),
    ({"count": 2.0}, "count=2.0: must be a whole number of at least 1; write count=2"),
    ({"count": None}, "count=None: must be a whole number of at least 1; write count=1"),
    ({"batch_size": 0}, "batch_size=0: must be a whole number of at least 1; write batch_size=1"),
    ({"candidates": 0}, "candidates=0: must be a whole number of at least 1; write candidates=1"),
    ({"tile": 0}, "tile=0: must be a whole number of at least 1; write tile=1"),
    ({"first": -1}, "first=-1: must be a whole number of at least 0; write first=0"),
    ({"first": 1.5}, "first=1.5: must be a whole number of at least 0; write first=0"),
    ({"seed": -1}, "seed=-1: must be a whole number from 0 to 2**64 - 1"),
    ({"seed": 2**64}, f"seed={2**64}: must be a whole number from 0 to 2**64 - 1"),
    ({"seed": 1.0}, "seed=1.0: must be a whole number from 0 to 2**64 - 1"),
    ({"seed": None}, "seed=None: must be a whole number from 0 to 2**64 - 1; write seed=0, or "),
    ({"size": 0}, "size=[0,0]: height and width must be at least 1"),
    ({"size": "16"}, "size=16: must be one number, or height and width as size=[512,768]"),
    ({"size": (16.5, 16)}, "size=(16.5, 16): must be one number, or height and width as size=[512,768]"),
    ({"label": 9}, "label=9: unknown class '9'"),
    ({"label": -1}, "label=-1: unknown class '-1'"),
    ({"label": ["cat", "dog"]}, "label=['cat', 'dog']: must be the name or the index of a class; write labels="),
    ({"label": 1.5}, "label=1.5: must be the name or the index of a class"),
    ({"labels": "cat"}, "labels='cat': must be one class for each image; write label='cat' for one for all"),
    ({"labels": 1}, "labels=1: must be one class for each image; write label=1 for one for all"),
    ({"labels": torch.tensor(1)}, "labels=tensor(1): must be one class for each image"),
    ({"labels": [0, 1, 2]}, "labels: 3 labels for 2 images; give one for each"),
    ({"labels": []}, "labels: 0 labels for 2 images; give one for each"),
    ({"labels": [0, 4]}, "labels: classes are numbered 0 to 3, not 4"),
    ({"labels": [-1, 0]}, "labels: classes are numbered 0 to 3, not -1"),
    ({"labels": ["cat", "cow"]}, "label=cow: unknown class 'cow'"),
    ({"labels": [0.5, 1]}, "labels=0.5: must be the name or the index of a class"),
    ({"labels": torch.tensor([0.0, 1.0])}, "labels must be (B,) integers, not (2,) float32; write labels.long()"),
    ({"labels": torch.tensor([[0], [1]])}, "labels must be (B,) integers, not (2, 1) int64; write labels.flatten()"),
    ({"label": 0, "labels": [0, 1]}, "label and labels: both say the class; leave one out"),
]


@pytest.mark.parametrize(("arguments", "words"), NUMBERS, ids=lambda each: str(each)[:40])
def test_wrong_numbers_classes_and_sizes_are_refused(arguments: dict[str, Any], words: str) -> None:
    generator = generator_of("raster")
    assert refuse(lambda: generator.sample(**{"count": 2, **arguments})).startswith(words)
    if not {"count", "size", "candidates", "tile", "label"} & set(arguments):
        assert refuse(lambda: generator.complete(make_images(2), MASK, **arguments)).startswith(words)


@pytest.mark.parametrize(
    ("arguments", "same"),
    [
        ({"count": numpy.int64(2), "seed": numpy.uint8(3), "first": torch.tensor(1)}, {"seed": 3, "first": 1}),
        ({"label": numpy.int64(1)}, {"label": "dog"}),
        ({"label": torch.tensor(1)}, {"label": "dog"}),
        ({"labels": ["dog", "owl"]}, {"labels": [1, 2]}),
        ({"labels": ["dog", 2]}, {"labels": [1, 2]}),
        ({"labels": ("7", numpy.int32(0))}, {"labels": [3, 0]}),
        ({"labels": numpy.array([1, 2])}, {"labels": [1, 2]}),
        ({"labels": numpy.array(["dog", "owl"])}, {"labels": [1, 2]}),
        ({"labels": torch.tensor([1, 2], dtype=torch.uint8)}, {"labels": [1, 2]}),
        ({"size": torch.tensor([16, 16])}, {}),
        ({"size": torch.tensor(16)}, {}),
        ({"size": numpy.int64(16)}, {}),
        ({"size": [numpy.int64(16), 16]}, {}),
    ],
    ids=lambda each: str(each)[:40],
)
def test_numbers_of_any_library_are_read(arguments: dict[str, Any], same: dict[str, Any]) -> None:
    generator = generator_of("raster")
    assert torch.equal(generator.sample(**{"count": 2, **arguments}), generator.sample(2, **same))


def test_the_largest_seeds_are_not_the_smallest() -> None:
    generator = generator_of("raster")
    drawn = [generator.sample(4, seed=seed) for seed in (0, 1, 2**32, 2**63, 2**64 - 1)]
    assert not any(torch.equal(a, b) for n, a in enumerate(drawn) for b in drawn[:n])


@pytest.mark.parametrize(
    ("mask", "known"),
    [
        (MASK.float(), MASK),
        (MASK.byte() * 255, MASK),
        (MASK[None], MASK),
        (MASK.expand(3, 16, 16), MASK),
        (MASK[::8, ::8], MASK),
        (torch.zeros(16, 16, dtype=torch.uint8), torch.zeros(16, 16, dtype=torch.bool)),
        (torch.ones(16, 16), torch.ones(16, 16, dtype=torch.bool)),
    ],
)
@pytest.mark.parametrize("layout", ["raster", "two codebooks"])
def test_masks_of_two_values_are_read(layout: str, mask: Tensor, known: Tensor) -> None:
    generator, images = generator_of(layout), make_images()
    completed = generator.complete(images, mask, seed=1)
    torch.testing.assert_close(completed, generator.complete(images, known, seed=1))
    if not known.any():
        torch.testing.assert_close(completed, generator.sample(3, seed=1))
    if known.all():
        torch.testing.assert_close(completed, generator.tokenizer.decode(generator.tokenizer.encode(images)))


@pytest.mark.parametrize(
    ("mask", "given"),
    [
        (MASK * 2.0 - 1, "(16, 16) float32"),
        (torch.where(MASK, 250, 3).byte(), "(16, 16) uint8"),
        (torch.where(MASK, 0.9, 0.1), "(16, 16) float32"),
        (MASK.expand(3, 1, 16, 16), "(3, 1, 16, 16) bool"),
        (MASK.expand(3, 1, 16, 16) * 2.0 - 1, "(3, 1, 16, 16) float32"),
        (MASK.numpy(), "(16, 16) bool, a numpy array"),
        (MASK.tolist(), "(16, 16) bool, a list"),
        (Image.fromarray(MASK.numpy()), "(16, 16) uint8, a PIL image"),
    ],
)
def test_wrong_masks_are_refused_with_the_conversion(mask: Any, given: str) -> None:
    generator, images = generator_of("raster"), make_images()
    message = refuse(lambda: generator.complete(images, mask))
    assert message.startswith(f"mask must be (H, W) or (B, H, W), True where an image is known, not {given}; write ")
    completed = generator.complete(images, follow(message, mask=mask))
    torch.testing.assert_close(completed, generator.complete(images, MASK))


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (MASK.expand(2, 16, 16), "mask: 2 masks for 3 images"),
        (MASK[:5], "the mask must be"),
        (torch.tensor(True), "mask must be (H, W) or (B, H, W)"),
        (torch.full((16, 16), torch.nan), "mask must be (H, W) or (B, H, W)"),
        (None, "mask must be a tensor, not NoneType"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        generator_of("raster").complete(make_images(), mask)
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)


VIEW = ("model/conditioner=image", "model.conditioner.image.factor=1")


@pytest.mark.parametrize("case", [each for each in WRONG_IMAGES if each not in ("no batch", "gray images", "opacity")])
def test_wrong_conditions_are_refused_with_the_conversion(case: str) -> None:
    generator, (images, given, expected) = generator_of("raster", *VIEW), WRONG_IMAGES[case]
    message = refuse(lambda: generator.sample(len(expected), conditions=images))
    assert message.startswith("conditions must be (B, 3, H, W) in [-1, 1], not (") and given in message
    drawn = generator.sample(len(expected), conditions=follow(message, conditions=images))
    torch.testing.assert_close(drawn, generator.sample(len(expected), conditions=expected))


def test_conditions_of_any_precision_are_read() -> None:
    generator, images = generator_of("raster", *VIEW), make_images()
    expected = generator.sample(3, conditions=images)
    assert torch.equal(generator.sample(3, conditions=images.double()), expected)
    assert torch.equal(generator.sample(3, conditions=Batch(images=images.double())), expected)
    assert torch.equal(generator.sample(2, conditions=images[0]), generator.sample(2, conditions=images[:1]))
    assert "3 of them for 2 images" in refuse(lambda: generator.sample(2, conditions=images))
    assert "not trained on" in refuse(lambda: generator_of("raster").sample(3, conditions=images))


def test_codes_move_to_the_device_of_the_model() -> None:
    tokenizer = copy.deepcopy(tokenizer_of("raster"))
    indices, tokens = tokenizer.encode(make_images()), tokenizer.encode_tokens(make_images())
    tokenizer.to("meta")
    for made in (tokenizer.decode(indices), tokenizer.decode_tokens(tokens)):
        assert made.device.type == "meta"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unchecked_methods_read_no_value(layout: str) -> None:
    """Fake tensors have no values: what reads one, for which the host waits for a GPU, raises."""
    tokenizer = tokenizer_of(layout)
    with FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.zeros(3, 3, 16, 16)
        indices = tokenizer.encode_unchecked(images)
        assert tokenizer.decode_unchecked(indices).shape == (3, 3, 16, 16)
        for reads in (lambda: tokenizer.encode(images), lambda: tokenizer.decode(indices)):
            with pytest.raises(DataDependentOutputException):
                reads()


def test_sampling_checks_no_token_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("check_codes", "check_images", "check_tokens", "check_indices"):
        monkeypatch.setattr(f"vqf.models.tokenizer.{name}", None)
    assert generator_of("two codebooks").sample(3, batch_size=1).shape == (3, 3, 16, 16)
    assert generator_of("raster").complete(torch.zeros(3, 2, 2, dtype=torch.int64), MASK).shape == (3, 3, 16, 16)
