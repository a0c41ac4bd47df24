"""The canary file that an attack would create, and a run to attack with."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from tests.security.canary import Canary
from tests.support.composing import compose
from vqf.models.tokenizer import build_tokenizer
from vqf.runs import checkpoint_writer

TINY = [
    *("model=small", "image_size=16", "model.encoder.channels=8", "model.encoder.dim=8", "model.decoder.channels=8"),
    *("model/quantizer=vq", "model.quantizer.dim=4", "model.quantizer.codebook_size=16", "data=emoji"),
]


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Canary]:
    """Fails the test at its end if a payload has run."""
    watched = Canary(tmp_path)
    yield watched
    watched.check()


@pytest.fixture(scope="session")
def config() -> DictConfig:
    """The config of a small run."""
    return compose(*TINY)


MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path, config: DictConfig) -> MakeRun:
    """Write a run of a tokenizer and return its checkpoint, with a manifest that fits the changed files."""

    def made(name: str = "run", *, state: Any = None, optimizers: Any = None, **values: Any) -> Path:
        changed = config.copy()
        OmegaConf.set_struct(changed, False)
        for key, value in values.items():
            OmegaConf.update(changed, key.replace("__", "."), value, force_add=True)
        tokenizer = build_tokenizer(config.model, 16)
        facts = {"kind": "stage1", "step": 1, "seed": 0, "image_size": [16, 16], "classes": [], "data": "x"}
        return checkpoint_writer.write_checkpoint(
            tmp_path / name,
            state=facts | (state or {}),
            config=OmegaConf.create(OmegaConf.to_container(changed, resolve=True)),
            weights={"model": tokenizer.state_dict()},
            optimizers=optimizers or {},
            keep=0,
        )

    return made


def seal(checkpoint: Path) -> Path:
    """Rewrite the manifest of a checkpoint, as an attacker would."""
    (checkpoint / checkpoint_writer.MANIFEST).unlink(missing_ok=True)
    checkpoint_writer._write_manifest(checkpoint, {"kind": "stage1", "step": 1})
    return checkpoint
