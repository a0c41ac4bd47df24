"""A device that this machine does not have, or that no machine has, is one line with the cure."""

from pathlib import Path

import pytest
import torch

import vqf
from vqf.distributed.devices import find_device
from vqf.errors import UserError

ABSENT = [
    *("mps", "xpu", "hpu", "xla", "vulkan", "lazy", "mtia", "opengl", "privateuseone", "meta", "cuda:99"),
    *(["cuda", "cuda:0"] if not torch.cuda.is_available() else []),
]
UNKNOWN = ["", "gpu", "CUDA", "cuda:x", "cuda:-1", "0", "cpu:99999999999"]


@pytest.mark.parametrize("name", [*ABSENT, *UNKNOWN])
def test_an_absent_or_unknown_device_is_one_line(name: str) -> None:
    with pytest.raises(UserError) as caught:
        find_device(name)
    line = str(caught.value)
    assert line.startswith(f"device={name}: ") and line.isprintable()
    assert "device=cpu always works" in line if name in ABSENT else f"unknown device '{name}'." in line


def test_there_is_always_a_device() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert torch.ones(2, device=find_device("auto")).sum() == 2


def test_load_checks_the_device_before_the_run() -> None:
    with pytest.raises(UserError, match=r"^device=meta: it holds no numbers; device=auto uses a GPU"):
        vqf.load(Path("nowhere"), device="meta")
    with pytest.raises(UserError, match=r"^run=nowhere: no such folder"):
        vqf.load(Path("nowhere"), device=torch.device("cpu"))
