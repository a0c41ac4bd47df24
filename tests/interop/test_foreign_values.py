"""Checkpoints of other projects with values that no project writes: one line, quickly, never a traceback."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from tests.support.composing import compose
from vqf.errors import UserError
from vqf.interop.export_model import write_tokenizer
from vqf.interop.import_model import import_checkpoint
from vqf.interop.key_tables import LAYOUTS
from vqf.models.tokenizer import build_tokenizer

TINY = [
    *("model=vqgan", "model/quantizer=vq_published", "model.quantizer.dim=4", "model.quantizer.codebook_size=8"),
    *("model.encoder.dim=4", "model.encoder.channels=32", "model.decoder.channels=32"),
    *("model.encoder.multipliers=[1,1]", "model.decoder.multipliers=[1,1]"),
    *("model.encoder.blocks=1", "model.decoder.blocks=1", "model.encoder.attention=[8]", "model.decoder.attention=[8]"),
]
FIRST = "encoder.conv_in.weight"


@pytest.fixture(scope="module")
def exported() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings of a small VQGAN in the names of taming-transformers."""
    written = write_tokenizer(build_tokenizer(compose(*TINY).model, 16), "vq", LAYOUTS["taming"])
    return dict(written.tensors), written.settings


def save(path: Path, tensors: dict[str, Any], settings: Any = None, **more: Any) -> Path:
    torch.save({"state_dict": tensors, **more}, path)
    if settings is not None:
        path.with_suffix(".yaml").write_text(OmegaConf.to_yaml(OmegaConf.create({"model": settings})))
    return path


def refused(path: Path) -> str:
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        import_checkpoint(path)
    assert time.monotonic() - start < 10
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_the_model_itself_is_imported(tmp_path: Path, exported: Any) -> None:
    found = import_checkpoint(save(tmp_path / "last.ckpt", *exported))
    assert found.image_size == (16, 16) and not found.nonfinite_tensors()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.complex64])
def test_numbers_of_another_kind(tmp_path: Path, exported: Any, dtype: torch.dtype) -> None:
    tensors, settings = exported
    path = save(tmp_path / "last.ckpt", {**tensors, FIRST: tensors[FIRST].to(dtype)}, settings)
    assert f"'{FIRST}' holds {str(dtype)[6:]}, not float32" in refused(path)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.0),
        torch.zeros(0),
        torch.zeros(0, 0, 0, 0),
        torch.zeros(1, 1, 1, 1, 1),
        torch.zeros(3, 3),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, 3, 3, 3, device="meta"),
        torch.zeros(1).expand(20_000, 20_000, 3, 3),
    ],
    ids=["scalar", "empty", "empty 4", "5", "matrix", "sparse", "meta", "expanded"],
)
def test_tensors_of_any_shape(tmp_path: Path, exported: Any, tensor: Tensor) -> None:
    tensors, settings = exported
    for name in (FIRST, "encoder.conv_out.weight", "quantize.embedding.weight", "encoder.down.0.block.0.conv1.weight"):
        assert name in tensors
        refused(save(tmp_path / "last.ckpt", {**tensors, name: tensor}, settings))


@pytest.mark.parametrize("side", [10**9, -16, 0.5, "large", [16]])
def test_a_size_of_any_value(tmp_path: Path, exported: Any, side: Any) -> None:
    tensors, settings = exported
    changed = OmegaConf.to_container(OmegaConf.create(settings))
    changed["params"]["ddconfig"]["resolution"] = side
    path = save(tmp_path / "last.ckpt", tensors, changed)
    if isinstance(side, int):
        assert f"images of {side} px in its settings; give image_size=" in refused(path)
    else:
        assert import_checkpoint(path).image_size == (256, 256)


LAUGHS = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 15))])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "more than 100,000 values, its aliases expanded"),
        ("[" * 5000, "or 100 levels"),
        ("version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        ("<!DOCTYPE html><html></html>", "a web page"),
    ],
)
def test_settings_of_any_text(tmp_path: Path, exported: Any, text: str, words: str) -> None:
    path = save(tmp_path / "last.ckpt", exported[0])
    path.with_suffix(".yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        import_checkpoint(path)


ADAM = {"state": {0: {"step": 3, "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}}, "param_groups": []}


@pytest.mark.parametrize(
    "states",
    [3, "text", [3], [[]], [{}], [{"state": 3, "param_groups": 3}], [{"state": [], "param_groups": [3]}], [ADAM]],
    ids=range(8),
)
def test_optimizer_states_of_any_structure_are_skipped(tmp_path: Path, exported: Any, states: Any) -> None:
    found = import_checkpoint(save(tmp_path / "last.ckpt", *exported, optimizer_states=states))
    assert found.tokenizer.optimizer_state is None
    assert any("optimizer state of the tokenizer" in note for note in found.report.notes)


@pytest.mark.parametrize("step", [-1, 10**30, "many", None, 1.5])
def test_a_step_of_any_value_is_0(tmp_path: Path, exported: Any, step: Any) -> None:
    assert import_checkpoint(save(tmp_path / "last.ckpt", *exported, global_step=step)).step == 0
