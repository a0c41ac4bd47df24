"""A pipeline with run= takes the options of that run unless the command line sets them."""

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from vqf.config import inherit as module
from vqf.config.inherit import inherit

RUN = OmegaConf.create(
    {
        "image_size": 64,
        "data": {"name": "emoji", "flip": True},
        "model": {"prior": {"name": "gpt", "layers": 4, "dim": 64}},
    }
)
NOW = OmegaConf.create(
    {
        "image_size": 256,
        "data": {"name": "folder", "root": "x"},
        "model": {"prior": {"name": "gpt", "layers": 2, "dim": 1024}},
    }
)
PLACES = ["data", "image_size", "model.prior"]


@pytest.mark.parametrize(
    ("named", "size", "data", "prior"),
    [
        ([], 64, "emoji", (4, 64)),
        (["image_size"], 256, "emoji", (4, 64)),
        (["data", "data.root"], 64, "folder", (4, 64)),
        (["model.prior.layers"], 64, "emoji", (2, 64)),
        (["model.prior"], 64, "emoji", (2, 1024)),
        (["model"], 256, "folder", (2, 1024)),
        (["experiment"], 256, "folder", (2, 1024)),
        (["steps", "run"], 64, "emoji", (4, 64)),
    ],
)
def test_options_of_the_command_line_win(
    monkeypatch: pytest.MonkeyPatch, named: list[str], size: int, data: str, prior: tuple[int, int]
) -> None:
    monkeypatch.setattr(module, "cli_keys", lambda: named)
    result = inherit(NOW, RUN, PLACES)
    assert result.image_size == size
    assert result.data.name == data
    assert (result.model.prior.layers, result.model.prior.dim) == prior
    assert NOW.image_size == 256


def test_outside_a_job_no_option_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # another test may have run a job in this process
    assert module.cli_keys() == []
