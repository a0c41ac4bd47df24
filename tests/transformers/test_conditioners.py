"""Conditioners: what stands in front of the tokens."""

import pytest
import torch

from vqf.protocols import Batch
from vqf.registry import RegistryError, build


def test_no_condition_is_one_start_token() -> None:
    none = build("conditioner", {"name": "none"})
    assert (none.vocab_size, none.length) == (1, 1)
    for batch in (
        Batch(images=torch.rand(3, 3, 8, 8)),
        Batch(labels=torch.tensor([4, 5, 6])),
        Batch(tokens=torch.ones(3, 7)),
    ):
        prefix = none(batch)
        assert prefix.dtype == torch.int64
        assert prefix.tolist() == [[0], [0], [0]]


def test_no_condition_follows_the_batch_to_its_device() -> None:
    none = build("conditioner", {"name": "none"})
    assert none(Batch(tokens=torch.ones(3, 7, device="meta"))).device.type == "meta"


def test_the_label_is_the_prefix() -> None:
    label = build("conditioner", {"name": "label"}, classes=7)
    assert (label.vocab_size, label.length, label.null_class) == (7, 1, None)
    labels = torch.tensor([6, 0, 3])
    for mode in (True, False):
        prefix = label.train(mode)(Batch(labels=labels))
        assert prefix.dtype == torch.int64
        assert prefix.tolist() == [[6], [0], [3]]


def test_labels_are_dropped_in_training_only_at_the_rate_asked_for() -> None:
    label = build("conditioner", {"name": "label", "drop": 0.2}, classes=7)
    assert (label.vocab_size, label.null_class) == (8, 7)
    labels = torch.arange(20_000) % 7
    torch.manual_seed(0)
    prefix = label.train()(Batch(labels=labels))[:, 0]
    dropped = prefix == 7
    assert dropped.double().mean().item() == pytest.approx(0.2, abs=5 * (0.16 / 20_000) ** 0.5)
    assert torch.equal(prefix[~dropped], labels[~dropped])
    assert torch.equal(label.eval()(Batch(labels=labels))[:, 0], labels)
    assert labels.max() == 6  # the batch itself is untouched


def test_only_a_class_that_training_saw_stands_for_no_condition() -> None:
    batch = Batch(labels=torch.tensor([6, 0, 3]))
    assert build("conditioner", {"name": "label"}, classes=7).null(batch) is None
    null = build("conditioner", {"name": "label", "drop": 0.1}, classes=7).null(batch)
    assert null.dtype == torch.int64
    assert null.tolist() == [[7], [7], [7]]


def test_the_default_generator_decides_which_labels_are_dropped() -> None:
    label = build("conditioner", {"name": "label", "drop": 0.5}, classes=7)
    batch = Batch(labels=torch.arange(64) % 7)
    torch.manual_seed(3)
    first = label(batch)
    torch.manual_seed(3)
    assert torch.equal(label(batch), first)
    assert not torch.equal(label(batch), first)


@pytest.mark.parametrize(
    ("options", "classes", "words"),
    [
        ({}, 0, "the data has no labels; choose model/conditioner=none"),
        ({"drop": 1.0}, 7, "drop must be in"),
        ({"drop": -0.1}, 7, "drop must be in"),
    ],
)
def test_mistakes_take_one_line(options: dict, classes: int, words: str) -> None:
    with pytest.raises(RegistryError, match=words) as caught:
        build("conditioner", {"name": "label", **options}, classes=classes)
    assert "\n" not in str(caught.value)


def test_a_batch_without_labels_is_refused() -> None:
    label = build("conditioner", {"name": "label"}, classes=7)
    with pytest.raises(ValueError, match="the batch has no labels"):
        label(Batch(images=torch.rand(2, 3, 8, 8)))
