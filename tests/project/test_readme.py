"""The README is a promise: its code runs, its commands compose, its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from tests.support.composing import compose
from vqf.config.settings import check_config, fill_missing_groups
from vqf.registry import build

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.usefixtures("isolated")
def test_the_component_in_ten_lines_works() -> None:
    (code,) = [block for block in blocks("python") if "@register" in block]
    exec(code, {"__name__": "mine"})
    signs = build("quantizer", {"name": "signs", "dim": 4}).eval()
    latents = torch.randn(2, 4, 3, 5, requires_grad=True)
    quantized = signs(latents)
    torch.testing.assert_close(signs.lookup(quantized.indices), quantized.latents)
    assert quantized.indices.max() < signs.vocab_size == 16
    quantized.latents.sum().backward()
    assert latents.grad is not None


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).splitlines()
    found = [line.split("python -m vqf.run ", 1)[1] for line in lines if "python -m vqf.run" in line]
    return [" ".join(shlex.quote(word) for word in shlex.split(line, comments=True)) for line in found]


@pytest.mark.parametrize("command", [each for each in commands() if "signs" not in each])
def test_the_commands_compose(command: str) -> None:
    words = [word for word in shlex.split(command) if word != "-m"]
    singles = [re.sub(r"=(\[[^]]*\]|[^,\[]+),.*", r"=\1", word) for word in words]  # the first choice of a sweep
    config = fill_missing_groups(
        compose(*(word.replace("outputs/small-emoji/...", ".").replace("run=runs/earth", "run=.") for word in singles))
    )
    check_config(config)
    assert config.pipeline.name in ("full", "stage1", "sample")


def test_links_lead_to_files() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README) + re.findall(r'src="(?!https?:)([^"]+)"', README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
