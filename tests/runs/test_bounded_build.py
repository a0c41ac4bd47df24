"""Models of untrusted configs are counted while they are built, without memory for them."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from vqf.runs.bounded_build import ModelTooLargeError, build_blank, build_bounded, limited_size
from vqf.runs.checkpoint import Checkpoint
from vqf.runs.checkpoint_files import BrokenCheckpointError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """A checkpoint of two small tensors."""
    save_file({"a": torch.zeros(3), "b": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    return Checkpoint(tmp_path, {}, OmegaConf.create())


def test_the_headers_are_counted(checkpoint: Checkpoint) -> None:
    assert checkpoint.count_stored() == (2, 7)


def test_what_is_within_the_limit_is_built(checkpoint: Checkpoint) -> None:
    assert build_blank(checkpoint, lambda: nn.Linear(3, 4)).weight.device.type == "meta"
    assert build_bounded(checkpoint, lambda: nn.Linear(3, 4)).weight.device.type == "cpu"


def test_numbers_of_parameters_and_buffers_are_limited() -> None:
    with limited_size(10, 20):
        nn.Linear(4, 4)
    with pytest.raises(ModelTooLargeError, match="more than 19 numbers"), limited_size(10, 19):
        nn.Linear(4, 4)
    with pytest.raises(ModelTooLargeError, match="more than 8 numbers"), limited_size(10, 8):
        nn.Module().register_buffer("mask", torch.zeros(9), persistent=False)


def test_layers_without_parameters_are_limited() -> None:
    with pytest.raises(ModelTooLargeError, match="more than 40 layers"), limited_size(10, 100):
        nn.ModuleList(nn.Identity() for _ in range(10**9))


def test_the_limit_ends_with_the_block() -> None:
    with pytest.raises(ModelTooLargeError), limited_size(1, 1):
        nn.Linear(4, 4)
    nn.Sequential(*(nn.Linear(4, 4) for _ in range(100)))


def test_a_component_that_needs_numbers_is_built_with_them(checkpoint: Checkpoint) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.count = int(torch.arange(4).sum())  # has no value on the meta device

    assert build_blank(checkpoint, Counts).count == 6


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("by zero"), KeyError("dim"), OverflowError("too big"), TypeError("two\nlines")]
)
def test_any_failure_is_one_line(checkpoint: Checkpoint, error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(BrokenCheckpointError, match=rf"cannot be built \({type(error).__name__}") as caught:
        build_blank(checkpoint, fail)
    assert "\n" not in str(caught.value) and caught.value.__cause__ is error
