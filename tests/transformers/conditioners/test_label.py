"""Conditioners without images, and condition dropout."""

from typing import Any

import pytest
import torch

from vqf.batch import Batch
from vqf.models.conditioning import ConditionerStack
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
    label = build("conditioner", {"name": "label"}, num_classes=7)
    assert (label.vocab_size, label.length, label.null_class) == (7, 1, None)
    labels = torch.tensor([6, 0, 3])
    for mode in (True, False):
        prefix = label.train(mode)(Batch(labels=labels))
        assert prefix.dtype == torch.int64
        assert prefix.tolist() == [[6], [0], [3]]


def label(drop: float, classes: int = 7) -> Any:
    return build("conditioner", {"name": "label", "dropout": drop}, num_classes=classes)


def test_labels_are_dropped_in_training_only_at_the_rate_asked_for() -> None:
    stack = ConditionerStack({"label": label(0.2)})
    assert stack.spec.vocab_size == 8
    labels = torch.arange(20_000) % 7
    torch.manual_seed(0)
    prefix = stack.train()(Batch(labels=labels)).ids[:, 0]
    dropped = prefix == 7
    assert dropped.double().mean().item() == pytest.approx(0.2, abs=5 * (0.16 / 20_000) ** 0.5)
    assert torch.equal(prefix[~dropped], labels[~dropped])
    assert torch.equal(stack.eval()(Batch(labels=labels)).ids[:, 0], labels)
    assert labels.max() == 6  # the batch itself is unchanged


def test_several_conditions_are_dropped_together() -> None:
    """Each at its own rate, and all of them together at the smallest rate: the unconditional case of guidance."""
    drops, count = (0.1, 0.3, 0.0, 0.1), 40_000
    stack = ConditionerStack({str(k): label(drop) for k, drop in enumerate(drops)})
    batch = Batch(labels=torch.zeros(count, dtype=torch.int64))
    torch.manual_seed(0)
    prefix = stack.train()(batch).ids
    absent = prefix == stack.null_prefix(batch).ids
    absent[:, 2] = prefix[:, 2] != stack.eval()(batch).ids[:, 2]
    for k, drop in enumerate(drops):
        assert absent[:, k].double().mean().item() == pytest.approx(drop, abs=5 * (drop * (1 - drop) / count) ** 0.5)
    assert torch.equal(absent[:, 0], absent[:, 3])
    assert not (absent[:, 0] & ~absent[:, 1]).any()
    without = (prefix == stack.null_prefix(batch).ids).all(1)
    assert torch.equal(without, absent[:, 0])


def test_only_a_class_that_training_saw_stands_for_no_condition() -> None:
    batch = Batch(labels=torch.tensor([6, 0, 3]))
    assert build("conditioner", {"name": "label"}, num_classes=7).null_prefix(batch) is None
    null = build("conditioner", {"name": "label", "dropout": 0.1}, num_classes=7).null_prefix(batch)
    assert null.dtype == torch.int64
    assert null.tolist() == [[7], [7], [7]]


def test_the_default_generator_decides_which_labels_are_dropped() -> None:
    stack = ConditionerStack({"label": label(0.5)})
    batch = Batch(labels=torch.arange(64) % 7)
    torch.manual_seed(3)
    first = stack(batch).ids
    torch.manual_seed(3)
    assert torch.equal(stack(batch).ids, first)
    assert not torch.equal(stack(batch).ids, first)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    ConditionerStack({"label": label(0.0)})(batch)
    assert torch.equal(torch.get_rng_state(), before)  # no random number is used if nothing can be dropped


@pytest.mark.parametrize(
    ("options", "classes", "words"),
    [
        ({}, 0, "the data has no labels; choose model/conditioner=none"),
        ({"dropout": 1.0}, 7, r"conditioner.dropout=1.0: must be a number in \[0, 1\)"),
    ],
)
def test_mistakes_take_one_line(options: dict, classes: int, words: str) -> None:
    with pytest.raises(RegistryError, match=words) as caught:
        build("conditioner", {"name": "label", **options}, num_classes=classes)
    assert "\n" not in str(caught.value)


def test_a_batch_without_labels_is_refused() -> None:
    label = build("conditioner", {"name": "label"}, num_classes=7)
    with pytest.raises(ValueError, match="the batch has no labels"):
        label(Batch(images=torch.rand(2, 3, 8, 8)))
