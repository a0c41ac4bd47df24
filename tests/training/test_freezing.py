"""Frozen parts are named or matched, stay in eval mode, and a pattern that matches nothing is one line."""

import pytest
import torch
from torch import nn

from vqf.errors import UserError
from vqf.training.freezing import FrozenParts


class Net(nn.Module):
    """Two modules of layers, a normalization, and a module with buffers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))])
        self.encoder_head = nn.Linear(2, 2)
        self.averages = nn.Module()
        self.averages.register_buffer("codebook", torch.zeros(3))


def trained(net: nn.Module) -> set[str]:
    return {name for name, parameter in net.named_parameters() if parameter.requires_grad}


def in_eval_mode(net: nn.Module, frozen: FrozenParts) -> set[str]:
    net.train()
    frozen.eval()
    return {name for name, module in net.named_modules() if not module.training}


def test_a_name_stands_for_all_that_is_in_it_and_not_for_its_namesakes() -> None:
    net = Net()
    frozen = FrozenParts(net, ["encoder"])
    assert trained(net) == {"encoder_head.weight", "encoder_head.bias"}
    assert in_eval_mode(net, frozen) == {"encoder", "encoder.0", "encoder.1", "encoder.1.0", "encoder.1.1"}
    assert net.encoder in frozen and net.encoder_head not in frozen


@pytest.mark.parametrize("pattern", ["encoder.[1-9]", "encoder.1.*", "encoder.1"])
def test_a_pattern_matches_parts_of_a_module(pattern: str) -> None:
    net = Net()
    frozen = FrozenParts(net, [pattern])
    assert {name for name, _ in net.named_parameters()} - trained(net) == {
        *("encoder.1.0.weight", "encoder.1.0.bias", "encoder.1.1.weight", "encoder.1.1.bias")
    }
    assert in_eval_mode(net, frozen) == {"encoder.1", "encoder.1.0", "encoder.1.1"}


def test_a_module_of_buffers_alone_is_frozen_by_its_name() -> None:
    net = Net()
    frozen = FrozenParts(net, ["averages"])
    assert trained(net) == {name for name, _ in net.named_parameters()}
    assert net.averages in frozen and in_eval_mode(net, frozen) == {"averages"}


def test_nothing_is_frozen_by_default() -> None:
    net = Net()
    assert in_eval_mode(net, FrozenParts(net, [])) == set()
    assert trained(net) == {name for name, _ in net.named_parameters()}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["encodr"],
            "freeze=encodr: unknown part of the model 'encodr'. Did you mean 'encoder'? Known: averages",
        ),
        (["encoder.7"], "freeze=encoder.7: unknown part of the model"),
        (["enc*"], "freeze=[enc*]: nothing is left to train"),
    ],
)
def test_a_mistake_is_one_line(patterns: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        FrozenParts(Net(), patterns)
    assert str(caught.value).startswith(message)
