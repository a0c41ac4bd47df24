"""The checkpoint format: damaged, foreign and half-written checkpoints are found; nothing in one runs code."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from vqf import atomic
from vqf.errors import UserError
from vqf.runs import checkpoint as checkpoints
from vqf.runs import checkpoint_writer
from vqf.runs.checkpoint import find_checkpoint, latest_checkpoint, open_checkpoint
from vqf.runs.checkpoint_files import BrokenCheckpointError

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)}


def save(run: Path, step: int, kind: str = "stage1", keep: int = 3) -> Path:
    return checkpoint_writer.write_checkpoint(
        run,
        state={"kind": kind, "step": step},
        config=OmegaConf.create({"steps": 10}),
        weights={"model": WEIGHTS},
        optimizers={"optimizers": {"model": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}}},
        keep=keep,
    )


def test_round_trip(tmp_path: Path) -> None:
    found = open_checkpoint(save(tmp_path, 7))
    assert (found.kind, found.step, found.config.steps) == ("stage1", 7, 10)
    assert found.has_weights("model")
    assert not found.has_weights("ema")
    for name, tensor in found.load_weights("model").items():
        assert torch.equal(tensor, WEIGHTS[name])
    assert found.load_optimizers()["optimizers"]["model"]["state"][0]["step"] == 1


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizers.pt", "state.json", "config.yaml", "manifest.json"])
@pytest.mark.parametrize("fault", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_skipped(
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
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert "step-00000002" in caplog.text


@pytest.mark.parametrize("name", ["model.safetensors", "optimizers.pt", "manifest.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a pointer of Git LFS.*git lfs pull"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
        (b"", "an empty file; download or copy it again"),
    ],
)
def test_what_stands_in_place_of_a_file_is_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    file = save(tmp_path, 1) / name
    file.write_bytes(content)
    with pytest.raises(BrokenCheckpointError, match=words):
        open_checkpoint(file.parent)


def test_half_a_file_is_named_with_its_size(tmp_path: Path) -> None:
    file = save(tmp_path, 1) / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BrokenCheckpointError, match=f"model.safetensors was cut short: 100 of {size} bytes"):
        open_checkpoint(file.parent)


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert latest_checkpoint(tmp_path) is not None


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3)
    assert open_checkpoint(save(tmp_path, 3)).step == 3


def test_files_of_a_killed_writer_are_deleted(tmp_path: Path) -> None:
    save(tmp_path, 1)
    left = tmp_path / "checkpoints" / ".step-00000002.tmp-1234"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    found = latest_checkpoint(tmp_path)
    assert found and found.step == 1
    checkpoint_writer.archive_later(tmp_path, 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("killed_at", ["rename to its name", "delete what was there"])
def test_while_one_checkpoint_replaces_another_one_is_always_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
) -> None:
    """The only checkpoint, written again by a process that is killed."""
    save(tmp_path, 3, keep=1)

    def killed(self: Path, target: Path) -> Path:
        if killed_at == "rename to its name" and ".tmp-" in self.name:
            os._exit(9)
        renamed = rename(self, target)
        if ".tmp-" in self.name:
            os._exit(9)
        return renamed

    rename = Path.rename
    monkeypatch.setattr(Path, "rename", killed)
    if (child := os.fork()) == 0:
        save(tmp_path, 3, keep=1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    monkeypatch.undo()
    found = latest_checkpoint(tmp_path)
    assert found and found.step == 3
    checkpoint_writer.archive_later(tmp_path, 3)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    found = latest_checkpoint(tmp_path)
    assert found and torch.equal(found.load_weights("model")["a"], WEIGHTS["a"])


def test_checkpoints_after_a_step_are_archived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step)
    checkpoint_writer.archive_later(tmp_path, 4)
    names = [f"{name}0000000{step}" for name, step in (("aside-step-", 6), ("step-", 2), ("step-", 4))]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names
    assert "aside-step-00000006" in caplog.text
    found = latest_checkpoint(tmp_path, every=4)
    assert found and found.step == 4


def test_nothing_in_a_checkpoint_runs_code(tmp_path: Path) -> None:
    """Not even if the manifest fits the changed file."""

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path}/ran",)

    file = save(tmp_path, 1) / "optimizers.pt"
    torch.save({"optimizers": Evil()}, file)
    manifest = json.loads((file.parent / "manifest.json").read_text())
    content = file.read_bytes()
    manifest["files"][file.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (file.parent / "manifest.json").write_text(json.dumps(manifest))
    found = open_checkpoint(file.parent)
    with pytest.raises(UserError, match=r"optimizers\.pt has no optimizer states"):
        found.load_optimizers()
    assert not (tmp_path / "ran").exists()
    torch.load(file, weights_only=False)  # without weights_only it runs
    assert (tmp_path / "ran").exists()


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("state.json", "../state.json"))
    with pytest.raises(BrokenCheckpointError, match="is missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizers.pt", "state.json", "config.yaml"])
@pytest.mark.parametrize("there", [True, False])
def test_a_manifest_must_list_what_is_read(tmp_path: Path, name: str, there: bool) -> None:
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if not there:
        (folder / name).unlink()
    with pytest.raises(BrokenCheckpointError, match=f"{name} is not in its manifest"):
        open_checkpoint(folder)


def test_a_checkpoint_of_format_1_is_named_with_the_cure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In one line, both when it is opened by its path and when it is skipped."""
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    message = (
        f"{folder}: checkpoint format 1, but this version of vqf reads format 2; "
        "use the version of vqf that wrote it, or train again"
    )
    with pytest.raises(BrokenCheckpointError) as caught:
        open_checkpoint(folder)
    assert str(caught.value) == message
    with pytest.raises(UserError) as caught:
        find(folder)
    assert str(caught.value) == message
    assert latest_checkpoint(tmp_path) is None
    assert [record.getMessage() for record in caplog.records] == [f"skipping a broken checkpoint: {message}"]


def test_weights_that_are_not_in_the_manifest_are_not_read(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "ema.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(BrokenCheckpointError, match=r"ema\.safetensors is not in its manifest"):
        open_checkpoint(folder)


@pytest.mark.parametrize("size", [None, "large", [16], [16, 16.5], [16, 0], [True, True]])
def test_a_state_without_a_valid_image_size(tmp_path: Path, size: Any) -> None:
    found = checkpoints.Checkpoint(tmp_path, {"image_size": size}, OmegaConf.create({}))
    with pytest.raises(BrokenCheckpointError, match=r"state\.json has no valid image_size"):
        _ = found.image_size


@pytest.mark.parametrize(("key", "value"), [("channels", "3"), ("channels", 0), ("classes", None), ("classes", [1])])
def test_a_state_with_invalid_channels_or_classes(tmp_path: Path, key: str, value: Any) -> None:
    found = checkpoints.Checkpoint(tmp_path, {key: value}, OmegaConf.create({}))
    with pytest.raises(BrokenCheckpointError, match=r"state\.json has no valid"):
        getattr(found, key)


def find(path: object) -> checkpoints.Checkpoint:
    return find_checkpoint(path, lambda each: each.kind == "stage2", "the run of a prior", "train one")  # type: ignore[arg-type]


def test_find_takes_a_run_a_checkpoint_or_the_folder_of_both_stages(tmp_path: Path) -> None:
    save(tmp_path / "stage1", 1)
    inside = save(tmp_path / "stage2", 2, kind="stage2")
    assert find(tmp_path).path == find(tmp_path / "stage2").path == find(inside).path == inside


def touched(path: Path) -> Path:
    path.touch()
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: None, "run: give run=FOLDER, the run of a prior; train one"),
        (lambda root: root / "nowhere", "run={root}/nowhere: no such folder; give the run of a prior"),
        (
            lambda root: touched(root / "x y.pt"),
            "run={root}/x y.pt: a file, and this needs the folder of a run; a checkpoint of another project becomes "
            "one with python -m vqf.run pipeline=import 'path={root}/x y.pt' 'run_dir=runs/x y'",
        ),
        (
            lambda root: save(root, 1) / "model.safetensors",
            "run={root}/checkpoints/step-00000001/model.safetensors: a file of a checkpoint; give the folder, "
            "{root}/checkpoints/step-00000001",
        ),
        (
            lambda root: touched(root / "model.safetensors").parent,
            "run={root}: no intact checkpoint in it; give the run of a prior; python -m vqf.run pipeline=import "
            "path={root} run_dir=runs/{root.name} makes a run of another project's weights",
        ),
        (lambda root: root, "run={root}: no intact checkpoint in it; give the run of a prior"),
        (
            lambda root: save(root, 1).parent.parent,
            "run={root} holds a stage1 run, but this needs the run of a prior; train one",
        ),
    ],
)
def test_find_reports_what_is_wrong(tmp_path: Path, make: object, words: str) -> None:
    with pytest.raises(UserError) as caught:
        find(make(tmp_path))  # type: ignore[operator]
    assert str(caught.value) == words.format(root=tmp_path)
