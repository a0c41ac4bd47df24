"""Failures while shards are written: finished shards are never lost."""

import errno
import json
import os
import re
import signal
import subprocess
import time

import pytest
from PIL import Image

from tests.data.packing import png
from tests.pipelines.shards.sharding import configured, files, make_images, written
from tests.support.composing import compose
from tests.support.processes import start_process
from vqf.errors import UserError
from vqf.hashing import sha256_of_file
from vqf.pipelines import shard
from vqf.pipelines.shard import Shard


@pytest.fixture
def image_folder(tmp_path):
    return make_images(tmp_path / "images")


def test_unreadable_images_are_skipped_and_listed(image_folder, tmp_path, caplog):
    (image_folder / "train" / "ant" / "04.png").write_bytes(b"broken")
    (image_folder / "train" / "bee" / "05.png").write_bytes(png()[:60])
    manifest = written(configured(image_folder, "data.max_unreadable=0.1"), tmp_path / "shards", shard_size=100)
    first = manifest["shards"][0]
    assert first["images"] == 18
    assert {each["name"]: each["reason"].split(" (")[0] for each in first["skipped"]} == {
        "train/ant/04.png": "not an image of a known format",
        "train/bee/05.png": "image file is truncated",
    }
    assert "skipped: 'train/ant/04.png' (not an image of a known format" in caplog.text


def test_too_many_unreadable_images_stop_the_run_until_the_limit_is_raised(image_folder, tmp_path):
    """A failing disk must not become empty shards."""
    for i in (4, 8, 12):
        (image_folder / "train" / "ant" / f"{i:02}.png").write_bytes(b"broken")
    to = tmp_path / "shards"
    with pytest.raises(UserError) as caught:
        written(configured(image_folder), to, shard_size=6, shuffle=False)
    assert str(caught.value) == (
        "data.max_unreadable: 2 of the 20 train images cannot be read, more than the 1 allowed; the last is "
        "'train/ant/08.png' (not an image of a known format (JPEG, PNG, WEBP, BMP, GIF, PPM, TIFF)), "
        f"'{to / 'manifest.json'}' lists all. Finished shards are kept: run the same command with a larger "
        f"max_unreadable to continue"
    )
    before = (to / "train-000000.tar").stat().st_mtime_ns
    with pytest.raises(UserError, match="2 of the 20 train"):
        written(configured(image_folder), to, shard_size=6, shuffle=False)
    manifest = written(configured(image_folder, "data.max_unreadable=0.15"), to, shard_size=6, shuffle=False)
    assert manifest["finished"] and manifest["images"] == {"train": 17, "validation": 3}
    assert (to / "train-000000.tar").stat().st_mtime_ns == before


def test_finished_shards_are_kept_and_damaged_ones_rewritten(image_folder, tmp_path, monkeypatch, caplog):
    to, config = tmp_path / "shards", configured(image_folder)
    written(config, to, shard_size=6)
    before = files(to)
    (to / "train-000001.tar").unlink()
    with (to / "train-000002.tar").open("r+b") as file:
        file.seek(600)
        file.write(b"damage")
    (to / ".train-000003.tar.4711.tmp").write_bytes(b"half")
    (to / ".film.tmp").write_bytes(b"of somebody else")
    made = []
    whole = shard.ShardWriter.__call__
    monkeypatch.setattr(shard.ShardWriter, "__call__", lambda self, task: made.append(task.name) or whole(self, task))
    written(config, to, shard_size=6)
    assert made == ["train-000001.tar", "train-000002.tar"]
    assert files(to) == {**before, ".film.tmp": b"of somebody else"}
    assert f"'{to / 'train-000002.tar'}' differs from its hash in manifest.json; writing it again" in caplog.text


def write_slowly(image_folder, to, workers):
    members = shard.ShardWriter._members
    shard.ShardWriter._members = lambda *given: time.sleep(0.05) or members(*given)
    written(configured(image_folder, workers=workers), to, shard_size=4)


def started(image_folder, to, ready, workers=0):
    """Start writing in a process of its own group, and return the process as soon as `ready()`."""
    process = start_process(write_slowly, image_folder, to, workers)
    while not ready():
        assert process.is_alive()
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_leaves_no_partial_shard_and_resumes(image_folder, tmp_path, workers):
    to = tmp_path / "shards"
    process = started(image_folder, to, lambda: any(to.glob("*.tar")), workers)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    finished = sorted(to.glob("*.tar"))
    assert 0 < len(finished) < 6
    hashes = {path.name: sha256_of_file(path) for path in finished}
    manifest = written(configured(image_folder), to, shard_size=4)
    assert not list(to.glob(".*.tmp"))
    assert {each["name"]: each["sha256"] for each in manifest["shards"]}.items() >= hashes.items()
    written(configured(image_folder), tmp_path / "whole", shard_size=4)
    assert files(to) == files(tmp_path / "whole")


def test_shards_of_others_are_not_overwritten(image_folder, tmp_path):
    """Shards from elsewhere have the same names, and `out` may be their folder."""
    written(configured(image_folder), tmp_path / "ours", shard_size=6)
    for path in tmp_path.glob("ours/*"):
        path.rename(path.with_name("train-000000.tar")) if path.name == "train-000001.tar" else path.unlink()
    before = {path: path.read_bytes() for path in tmp_path.glob("ours/*.tar")}
    config = compose("data=shards", f"data.root={tmp_path / 'ours'}", "image_size=16")
    with pytest.raises(UserError) as caught:
        written(config, tmp_path / "ours", format="jpg", size=8)
    assert str(caught.value) == (
        f"out={tmp_path / 'ours'}: holds 'train-000000.tar', and no manifest.json of pipeline=shard beside it; choose "
        "another folder"
    )
    assert {path: path.read_bytes() for path in tmp_path.glob("ours/*.tar")} == before
    assert not (tmp_path / "ours" / ".lock").exists()
    with pytest.raises(ValueError, match=r"^out is empty; name a folder, or leave it out$"):
        Shard(config, tmp_path, out="")


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_of_a_killed_run_exit_and_the_next_run_resumes_at_once(image_folder, tmp_path, workers):
    to = tmp_path / "shards"
    process = started(image_folder, to, lambda: any(to.glob("*.tmp")), workers)
    process.kill()  # and not its workers
    process.join()
    written(configured(image_folder), to, shard_size=4)
    written(configured(image_folder), tmp_path / "whole", shard_size=4)
    until = time.monotonic() + 20
    while subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, check=False).stdout:
        assert time.monotonic() < until, "a worker is still running"
        time.sleep(0.1)
    assert files(to) == files(tmp_path / "whole")


def test_two_runs_cannot_write_into_one_folder(image_folder, tmp_path):
    to = tmp_path / "shards"
    process = started(image_folder, to, lambda: any(to.glob("*.tmp")))
    with pytest.raises(UserError, match=r"^out=.*: process \d+ on .* is running there; wait until it ends, or give"):
        written(configured(image_folder), to, shard_size=4)
    with pytest.raises(UserError, match="with other options"):
        written(configured(image_folder), to, format="png")
    process.join()
    assert process.exitcode == 0
    manifest = json.loads((to / "manifest.json").read_text())
    assert manifest["finished"]
    assert all(sha256_of_file(to / each["name"]) == each["sha256"] for each in manifest["shards"])


def test_a_refused_run_does_not_change_the_folder(image_folder, tmp_path):
    to = tmp_path / "shards"
    written(configured(image_folder), to)
    for name in (".film.tmp", ".train-000000.tar.12.tmp"):
        (to / name).write_bytes(b"half")
    before = files(to)
    with pytest.raises(UserError, match="with other options"):
        written(configured(image_folder), to, format="png")
    assert files(to) == before


def test_images_that_become_readable_are_added(image_folder, tmp_path, monkeypatch, caplog):
    """A short outage of a network disk costs no image."""
    path, to = image_folder / "train" / "ant" / "04.png", tmp_path / "shards"
    state, content = path.stat(), path.read_bytes()
    path.write_bytes(bytes(len(content)))  # of the same size, so that the folder's fingerprint does not change
    manifest = written(configured(image_folder), to, shard_size=6)
    (lost,) = (each for each in manifest["shards"] if each["skipped"])
    assert written(configured(image_folder), to, shard_size=6) == manifest
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    made, whole = [], shard.ShardWriter.__call__
    monkeypatch.setattr(shard.ShardWriter, "__call__", lambda self, task: made.append(task.name) or whole(self, task))
    caplog.set_level("INFO", "vqf")
    assert written(configured(image_folder), to, shard_size=6)["images"]["train"] == 20
    assert made == [lost["name"]]
    assert f"'{lost['name']}' is written again: it lacks images" in caplog.text


def test_a_retry_never_leaves_fewer_images(image_folder, tmp_path):
    """One image becomes readable, and three others of its shard unreadable: the shard stays as it is."""
    path, to = image_folder / "train" / "ant" / "04.png", tmp_path / "shards"
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    manifest = written(configured(image_folder), to, shuffle=False)
    before = files(to)
    path.write_bytes(content)
    for i in (8, 10, 12):
        other = image_folder / "train" / "ant" / f"{i:02}.png"
        other.write_bytes(bytes(other.stat().st_size))
    assert written(configured(image_folder), to, shuffle=False) == manifest
    assert files(to) == before


def test_finished_shards_survive_a_kill(image_folder, tmp_path):
    """The manifest is saved after every shard, as long as there are not very many."""
    to = tmp_path / "shards"
    process = started(image_folder, to, lambda: len([*to.glob("*.tar")]) >= 4)
    process.kill()
    process.join()
    assert len(json.loads((to / "manifest.json").read_text())["shards"]) >= 3


def test_a_lower_limit_does_not_change_finished_shards(image_folder, tmp_path):
    (image_folder / "train" / "ant" / "04.png").write_bytes(b"broken")
    to = tmp_path / "shards"
    written(configured(image_folder), to)
    before = files(to)
    with pytest.raises(UserError, match=r"^data\.max_unreadable: 1 of the 20 train images"):
        written(configured(image_folder, "data.max_unreadable=0"), to)
    assert files(to) == before


def test_a_full_disk_leaves_no_partial_shard(image_folder, tmp_path, monkeypatch):
    to, whole = tmp_path / "shards", shard.ShardWriter._write_samples

    def full(self, file, task):
        if task.name == "train-000002.tar":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(self, file, task)

    monkeypatch.setattr(shard.ShardWriter, "_write_samples", full)
    with pytest.raises(UserError) as caught:
        written(configured(image_folder), to, shard_size=6)
    assert str(caught.value) == (
        f"out={to}: cannot be written (No space left on device); free disk space, or give another out"
    )
    assert not [*to.glob("*.tmp"), *to.glob(".*.tmp")]
    monkeypatch.undo()
    written(configured(image_folder), to, shard_size=6)
    written(configured(image_folder), tmp_path / "whole", shard_size=6)
    assert files(to) == files(tmp_path / "whole")


def test_a_foreign_lock_file_is_not_overwritten(image_folder, tmp_path):
    to, victim = tmp_path / "shards", tmp_path / "victim"
    to.mkdir()
    (to / ".lock").write_text("my precious")
    with pytest.raises(UserError, match=r"^out=.*: its '\.lock' was not written by vqf; delete it, or give"):
        written(configured(image_folder), to)
    assert (to / ".lock").read_text() == "my precious"
    (to / ".lock").unlink()
    victim.write_text("important")
    (to / ".lock").symlink_to(victim)
    with pytest.raises(UserError, match=r"^out=.*: cannot be written \(Too many levels of symbolic links\); give"):
        written(configured(image_folder), to)
    assert victim.read_text() == "important"


@pytest.mark.parametrize("max_unreadable", [0.01, 1])
def test_a_source_without_a_readable_image_is_not_finished(image_folder, tmp_path, max_unreadable):
    for path in image_folder.glob("val/*/*"):
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"^data: none of its 3 validation images can be read; the last is 'val/"):
        written(configured(image_folder, f"data.max_unreadable={max_unreadable}"), tmp_path / "shards")
    assert not json.loads((tmp_path / "shards" / "manifest.json").read_text())["finished"]


def test_an_invalid_split_is_not_taken_for_an_empty_one(image_folder, tmp_path):
    """Only an empty split is left out."""
    root = image_folder / "train" / "ant"
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "18.png").write_bytes(png())
    words = [f"data.root={root}", "data.images=.", f"data.conditions={tmp_path / 'maps'}", "data.validation_last=1"]
    config = compose("data=pairs", *words, "image_size=16")
    with pytest.raises(UserError, match=r"^data\.conditions: 9 of the 9 images in .* have no map in "):
        written(config, tmp_path / "shards")
    alone = compose("data=folder", f"data.root={root}", "data.validation_fraction=0", "image_size=16")
    assert written(alone, tmp_path / "alone")["images"] == {"train": 10}


@pytest.mark.parametrize(("kind", "side"), [("jpg", 65_501), ("webp", 16_384)])
def test_an_image_too_large_for_its_format_is_skipped(image_folder, tmp_path, kind, side):
    Image.new("RGB", (side, 4)).save(image_folder / "train" / "ant" / "04.png")
    manifest = written(configured(image_folder), tmp_path / "shards", format=kind)
    (lost,) = manifest["shards"][0]["skipped"]
    assert (lost["name"], lost["reason"]) == (
        "train/ant/04.png",
        f"{side} x 4 pixels, more than a {kind} can store",
    )
    assert written(configured(image_folder), tmp_path / "small", format=kind, size=2)["images"]["train"] == 20


def test_a_name_of_two_lines_is_logged_on_one(image_folder, tmp_path):
    (image_folder / "train" / "ant" / "new\nline\x1b.png").write_bytes(b"broken")
    with pytest.raises(UserError) as caught:
        written(configured(image_folder, "data.max_unreadable=0"), tmp_path / "shards")
    assert "the last is 'train/ant/new\\nline\\x1b.png' (not an image" in str(caught.value)
    assert str(caught.value).isprintable()


ENTRY = {"name": "train-000000.tar", "images": 1, "bytes": 1, "sha256": "", "skipped": [], "broken": ""}
LOST = {"key": "00000001", "name": "a", "reason": "b"}


@pytest.mark.parametrize(
    "entry",
    [
        *({**ENTRY, key: value} for key in ENTRY for value in (None, {}, 1.5)),
        *({**ENTRY, "skipped": [each]} for each in (1, "a", {}, {**LOST, "key": "x"}, {**LOST, "reason": None})),
        {**ENTRY, "name": "../a-1.tar"},
        {**ENTRY, "name": "train-1.tar\n"},
        {},
        [],
        None,
    ],
)
def test_an_invalid_manifest_is_one_line(image_folder, tmp_path, entry):
    to = tmp_path / "shards"
    manifest = written(configured(image_folder), to)
    (to / "manifest.json").write_text(json.dumps({**manifest, "shards": [entry]}))
    with pytest.raises(UserError) as caught:
        written(configured(image_folder), to)
    assert str(caught.value) == (f"out={to}: its manifest.json is not one of pipeline=shard; choose another folder")


def test_a_manifest_of_another_kind(image_folder, tmp_path):
    to = tmp_path / "shards"
    manifest = written(configured(image_folder), to)
    for text, words in (
        ("[" * 100_000, "is not one of pipeline=shard"),
        (json.dumps({**manifest, "version": 1}), "holds shards of another version of vqf"),
        (json.dumps({**manifest, "maps": {"maps": "rgb"}}), "with other options"),
    ):
        (to / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=words):
            written(configured(image_folder), to)
    stranger = {**ENTRY, "name": "train-000009.tar"}
    (to / "manifest.json").write_text(json.dumps({**manifest, "shards": [*manifest["shards"], stranger]}))
    assert written(configured(image_folder), to) == manifest
    for key in ("00000001-000002", "99999999"):
        first = {**manifest["shards"][0], "skipped": [{**LOST, "key": key}]}
        (to / "manifest.json").write_text(json.dumps({**manifest, "shards": [first, *manifest["shards"][1:]]}))
        assert written(configured(image_folder), to) == manifest


def test_every_source_has_its_own_limit(image_folder, tmp_path):
    """Two sources that may each skip one image may not skip two of one source."""
    parts = [
        f"data.parts.{kind}={{name:folder,root:{image_folder}/train/{kind},validation_last:2}}"
        for kind in ("ant", "bee")
    ]
    config = compose("data=union", "+data.parts={}", *(f"+{part}" for part in parts), "image_size=16")
    for kind, name in (("ant", "04.png"), ("bee", "05.png")):
        (image_folder / "train" / kind / name).write_bytes(b"broken")
    assert written(config, tmp_path / "one", shuffle=False)["images"]["train"] == 14
    (image_folder / "train" / "ant" / "06.png").write_bytes(b"broken")
    with pytest.raises(
        UserError,
        match=r"^data\.parts\.ant\.max_unreadable: 2 of the 8 train images cannot be read, more than the 1 allowed",
    ):
        written(config, tmp_path / "two", shuffle=False)


def test_errors_are_one_line(image_folder, tmp_path):
    def worded(*words, to="shards", **options):
        with pytest.raises(UserError) as caught:
            written(configured(image_folder, *words), tmp_path / to, **options)
        return str(caught.value)

    written(configured(image_folder), tmp_path / "shards")
    assert worded(shard_size=3) == (
        f"out={tmp_path / 'shards'}: holds shards of other images, or with other options; choose another folder"
    )
    png_of_another = image_folder / "train" / "ant" / "00.png"
    png_of_another.write_bytes(png((1, 2, 3), (50, 50)))
    assert "holds shards of other images" in worded()
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "manifest.json").write_text('{"version": 1}')
    assert worded(to="strange") == (
        f"out={tmp_path / 'strange'}: its manifest.json is not one of pipeline=shard; choose another folder"
    )
    (tmp_path / "file").write_text("")
    assert worded(to="file") == (f"out={tmp_path / 'file'}: cannot be written (File exists); give another out")
    for options, words in (
        ({"size": 8, "format": "original"}, "size=8: a copied file keeps its size; give format=jpg, png or webp"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
            Shard(configured(image_folder), tmp_path, **options)
