"""Checkpoints are whole or not there: every fault is made for real."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from vqf.errors import UserError
from vqf.pipelines import checkpoint as checkpoints
from vqf.pipelines.checkpoint import BrokenCheckpointError, locate, newest, open_checkpoint

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)}


def save(run: Path, step: int, kind: str = "stage1", keep: int = 3) -> Path:
    return checkpoints.save(
        run,
        state={"kind": kind, "step": step},
        config=OmegaConf.create({"steps": 10}),
        weights={"model": WEIGHTS},
        optimizers={"optimizers": {"model": {"state": {0: {"step": torch.tensor(1.0)}}}}},
        keep=keep,
    )


def test_round_trip(tmp_path: Path) -> None:
    found = open_checkpoint(save(tmp_path, 7))
    assert (found.kind, found.step, found.config.steps) == ("stage1", 7, 10)
    assert found.has("model")
    assert not found.has("ema")
    for name, tensor in found.weights("model").items():
        assert torch.equal(tensor, WEIGHTS[name])
    assert found.optimizers()["optimizers"]["model"]["state"][0]["step"] == 1


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizers.pt", "state.json", "config.yaml", "manifest.json"])
@pytest.mark.parametrize("fault", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, name: str, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    data = bytearray(file.read_bytes())
    if fault == "flip":
        data[len(data) // 2] ^= 0xFF
        file.write_bytes(data)
    elif fault == "truncate":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.unlink()
    with pytest.raises(BrokenCheckpointError):
        open_checkpoint(file.parent)
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert "step-00000002" in caplog.text


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_flush", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert newest(tmp_path) is not None


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3)
    assert open_checkpoint(save(tmp_path, 3)).step == 3


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("state.json", "../state.json"))
    with pytest.raises(BrokenCheckpointError, match="is missing"):
        open_checkpoint(folder)


def find(path: object) -> checkpoints.Checkpoint:
    return locate(path, lambda each: each.kind == "stage2", "the run of a prior", "train one")  # type: ignore[arg-type]


def test_locate_takes_a_run_a_checkpoint_or_the_folder_of_both_stages(tmp_path: Path) -> None:
    save(tmp_path / "stage1", 1)
    inside = save(tmp_path / "stage2", 2, kind="stage2")
    assert find(tmp_path).path == find(tmp_path / "stage2").path == find(inside).path == inside


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: None, "run: give run=FOLDER, the run of a prior; train one"),
        (lambda root: root / "nowhere", "run={root}/nowhere: no such folder; give the run of a prior"),
        (lambda root: root, "run={root}: no whole checkpoint in it; give the run of a prior"),
        (
            lambda root: save(root, 1).parent.parent,
            "run={root} holds a stage1 run, but this needs the run of a prior; train one",
        ),
    ],
)
def test_locate_says_what_is_wrong(tmp_path: Path, make: object, words: str) -> None:
    with pytest.raises(UserError) as caught:
        find(make(tmp_path))  # type: ignore[operator]
    assert str(caught.value) == words.format(root=tmp_path)
