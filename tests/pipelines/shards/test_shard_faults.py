"""What goes wrong while shards are written, or has gone wrong before: nothing that was done is lost."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from tests.data.packing import png
from tests.pipelines.shards.sharding import configured, files, make_pictures, written
from tests.support.composing import compose
from vqf.errors import UserError
from vqf.hashing import sha256
from vqf.pipelines import shard
from vqf.pipelines.shard import Shard


@pytest.fixture
def pictures(tmp_path):
    return make_pictures(tmp_path / "pictures")


def test_pictures_that_cannot_be_read_are_left_out_and_named(pictures, tmp_path, caplog):
    (pictures / "train" / "ant" / "04.png").write_bytes(b"broken")
    (pictures / "train" / "bee" / "05.png").write_bytes(png()[:60])
    manifest = written(configured(pictures, "data.max_bad=0.1"), tmp_path / "shards", shard_size=100)
    first = manifest["shards"][0]
    assert first["pictures"] == 18
    assert {each["name"]: each["why"].split(" (")[0] for each in first["left_out"]} == {
        "train/ant/04.png": "not a picture of a known format",
        "train/bee/05.png": "image file is truncated",
    }
    assert "left out: 'train/ant/04.png' (not a picture of a known format" in caplog.text


def test_too_many_that_cannot_be_read_stop_it_and_it_goes_on_when_more_may_be(pictures, tmp_path):
    """A disk that gives nothing but errors must not become shards of nothing."""
    for i in (4, 8, 12):
        (pictures / "train" / "ant" / f"{i:02}.png").write_bytes(b"broken")
    to = tmp_path / "shards"
    with pytest.raises(UserError) as caught:
        written(configured(pictures), to, shard_size=6, shuffle=False)
    assert str(caught.value) == (
        "data.max_bad: 2 of the 20 train pictures cannot be read, where 1 may be left out; the last is "
        "'train/ant/08.png' (not a picture of a known format (JPEG, PNG, WEBP, BMP, GIF, PPM, TIFF)), "
        f"'{to / 'manifest.json'}' names all. What is written stays, and the same command with a larger max_bad goes on"
    )
    before = (to / "train-000000.tar").stat().st_mtime_ns
    with pytest.raises(UserError, match="2 of the 20 train"):
        written(configured(pictures), to, shard_size=6, shuffle=False)
    manifest = written(configured(pictures, "data.max_bad=0.15"), to, shard_size=6, shuffle=False)
    assert manifest["finished"] and manifest["pictures"] == {"train": 17, "validation": 3}
    assert (to / "train-000000.tar").stat().st_mtime_ns == before


def test_finished_shards_are_kept_and_damaged_ones_written_again(pictures, tmp_path, monkeypatch, caplog):
    to, config = tmp_path / "shards", configured(pictures)
    written(config, to, shard_size=6)
    before = files(to)
    (to / "train-000001.tar").unlink()
    with (to / "train-000002.tar").open("r+b") as file:
        file.seek(600)
        file.write(b"damage")
    (to / ".train-000003.tar.4711.partial").write_bytes(b"half")
    (to / ".film.partial").write_bytes(b"of somebody else")
    made = []
    whole = shard.Writer.__call__
    monkeypatch.setattr(shard.Writer, "__call__", lambda self, task: made.append(task.name) or whole(self, task))
    written(config, to, shard_size=6)
    assert made == ["train-000001.tar", "train-000002.tar"]
    assert files(to) == {**before, ".film.partial": b"of somebody else"}
    assert f"'{to / 'train-000002.tar'}' is not what manifest.json says; it is written again" in caplog.text


SCRIPT = """
import sys, time
from pathlib import Path
from vqf.pipelines import shard
from tests.pipelines.shards.sharding import configured
from tests.pipelines.shards.sharding import written
picture = shard.Writer._members
shard.Writer._members = lambda *given: time.sleep(0.05) or picture(*given)
written(configured(sys.argv[1], workers=int(sys.argv[3])), Path(sys.argv[2]), shard_size=4)
"""


def started(pictures, to, ready, workers=0):
    """Start to write, in a process of its own and a group of its own, and return it as soon as that is so."""
    command = [sys.executable, "-c", SCRIPT, str(pictures), str(to), str(workers)]
    process = subprocess.Popen(command, start_new_session=True)
    while not ready():
        assert process.poll() is None
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_leaves_no_half_shard_and_goes_on(pictures, tmp_path, workers):
    to = tmp_path / "shards"
    process = started(pictures, to, lambda: any(to.glob("*.tar")), workers)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = sorted(to.glob("*.tar"))
    assert 0 < len(finished) < 6
    hashes = {path.name: sha256(path) for path in finished}
    manifest = written(configured(pictures), to, shard_size=4)
    assert not list(to.glob(".*.partial"))
    assert {each["name"]: each["sha256"] for each in manifest["shards"]}.items() >= hashes.items()
    written(configured(pictures), tmp_path / "whole", shard_size=4)
    assert files(to) == files(tmp_path / "whole")


def test_nothing_of_anybody_else_is_written_over(pictures, tmp_path):
    """As shards from elsewhere would be, which have the same names, where `to` is their own folder."""
    written(configured(pictures), tmp_path / "ours", shard_size=6)
    for path in tmp_path.glob("ours/*"):
        path.rename(path.with_name("train-000000.tar")) if path.name == "train-000001.tar" else path.unlink()
    before = {path: path.read_bytes() for path in tmp_path.glob("ours/*.tar")}
    config = compose("data=shards", f"data.root={tmp_path / 'ours'}", "image_size=16")
    with pytest.raises(UserError) as caught:
        written(config, tmp_path / "ours", format="jpg", size=8)
    assert str(caught.value) == (
        f"to={tmp_path / 'ours'}: holds 'train-000000.tar', and no manifest.json of pipeline=shard beside it; choose "
        "another folder"
    )
    assert {path: path.read_bytes() for path in tmp_path.glob("ours/*.tar")} == before
    assert not (tmp_path / "ours" / ".lock").exists()
    with pytest.raises(ValueError, match=r"^to is empty; name a folder, or leave it out$"):
        Shard(config, tmp_path, to="")


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_of_a_run_that_was_killed_end_and_the_next_goes_on_at_once(pictures, tmp_path, workers):
    to = tmp_path / "shards"
    process = started(pictures, to, lambda: any(to.glob("*.partial")), workers)
    process.kill()  # and not its workers
    process.wait()
    written(configured(pictures), to, shard_size=4)
    written(configured(pictures), tmp_path / "whole", shard_size=4)
    until = time.monotonic() + 20
    while subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, check=False).stdout:
        assert time.monotonic() < until, "a worker goes on"
        time.sleep(0.1)
    assert files(to) == files(tmp_path / "whole")


def test_two_cannot_write_into_one_folder(pictures, tmp_path):
    to = tmp_path / "shards"
    process = started(pictures, to, lambda: any(to.glob("*.partial")))
    with pytest.raises(UserError, match=r"^to=.*: process \d+ on .* is running there; wait until it ends, or give"):
        written(configured(pictures), to, shard_size=4)
    with pytest.raises(UserError, match="with other options"):
        written(configured(pictures), to, format="png")
    assert process.wait() == 0
    manifest = json.loads((to / "manifest.json").read_text())
    assert manifest["finished"]
    assert all(sha256(to / each["name"]) == each["sha256"] for each in manifest["shards"])


def test_what_is_refused_leaves_a_folder_as_it_is(pictures, tmp_path):
    to = tmp_path / "shards"
    written(configured(pictures), to)
    for name in (".film.partial", ".train-000000.tar.12.partial"):
        (to / name).write_bytes(b"half")
    before = files(to)
    with pytest.raises(UserError, match="with other options"):
        written(configured(pictures), to, format="png")
    assert files(to) == before


def test_what_can_be_read_again_is_put_back(pictures, tmp_path, monkeypatch, caplog):
    """A network disk that was gone for a moment costs no picture."""
    path, to = pictures / "train" / "ant" / "04.png", tmp_path / "shards"
    state, content = path.stat(), path.read_bytes()
    path.write_bytes(bytes(len(content)))  # of the same size: a folder takes it for the same picture
    manifest = written(configured(pictures), to, shard_size=6)
    (lost,) = (each for each in manifest["shards"] if each["left_out"])
    assert written(configured(pictures), to, shard_size=6) == manifest
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    made, whole = [], shard.Writer.__call__
    monkeypatch.setattr(shard.Writer, "__call__", lambda self, task: made.append(task.name) or whole(self, task))
    caplog.set_level("INFO", "vqf")
    assert written(configured(pictures), to, shard_size=6)["pictures"]["train"] == 20
    assert made == [lost["name"]]
    assert f"'{lost['name']}' is written again: something was missing from it" in caplog.text


def test_looking_again_never_leaves_less(pictures, tmp_path):
    """One picture can be read again, and three others of its shard no more: what is there stays."""
    path, to = pictures / "train" / "ant" / "04.png", tmp_path / "shards"
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    manifest = written(configured(pictures), to, shuffle=False)
    before = files(to)
    path.write_bytes(content)
    for i in (8, 10, 12):
        other = pictures / "train" / "ant" / f"{i:02}.png"
        other.write_bytes(bytes(other.stat().st_size))
    assert written(configured(pictures), to, shuffle=False) == manifest
    assert files(to) == before


def test_finished_shards_survive_whatever_ends_the_run(pictures, tmp_path):
    """They are in the manifest as soon as they are there, as long as there are not very many."""
    to = tmp_path / "shards"
    process = started(pictures, to, lambda: len([*to.glob("*.tar")]) >= 4)
    process.kill()
    process.wait()
    assert len(json.loads((to / "manifest.json").read_text())["shards"]) >= 3


def test_a_refusal_unfinishes_nothing(pictures, tmp_path):
    (pictures / "train" / "ant" / "04.png").write_bytes(b"broken")
    to = tmp_path / "shards"
    written(configured(pictures), to)
    before = files(to)
    with pytest.raises(UserError, match=r"^data\.max_bad: 1 of the 20 train pictures"):
        written(configured(pictures, "data.max_bad=0"), to)
    assert files(to) == before


def test_a_disk_that_fills_up_is_not_filled_with_halves(pictures, tmp_path, monkeypatch):
    to, whole = tmp_path / "shards", shard.Writer._fill

    def full(self, file, task):
        if task.name == "train-000002.tar":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(self, file, task)

    monkeypatch.setattr(shard.Writer, "_fill", full)
    with pytest.raises(UserError) as caught:
        written(configured(pictures), to, shard_size=6)
    assert str(caught.value) == (
        f"to={to}: cannot be written (No space left on device); make room there, or give another to"
    )
    assert not [*to.glob("*.partial"), *to.glob(".*.partial")]
    monkeypatch.undo()
    written(configured(pictures), to, shard_size=6)
    written(configured(pictures), tmp_path / "whole", shard_size=6)
    assert files(to) == files(tmp_path / "whole")


def test_a_file_of_somebody_else_is_no_lock(pictures, tmp_path):
    to, victim = tmp_path / "shards", tmp_path / "victim"
    to.mkdir()
    (to / ".lock").write_text("my precious")
    with pytest.raises(UserError, match=r"^to=.*: its file '\.lock' is none of vqf's; give another to$"):
        written(configured(pictures), to)
    assert (to / ".lock").read_text() == "my precious"
    (to / ".lock").unlink()
    victim.write_text("important")
    (to / ".lock").symlink_to(victim)
    with pytest.raises(UserError, match=r"^to=.*: cannot be written \(Too many levels of symbolic links\); give"):
        written(configured(pictures), to)
    assert victim.read_text() == "important"


@pytest.mark.parametrize("max_bad", [0.01, 1])
def test_a_source_of_which_nothing_can_be_read_becomes_no_shards(pictures, tmp_path, max_bad):
    for path in pictures.glob("val/*/*"):
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"^data: none of its 3 validation pictures can be read; the last is 'val/"):
        written(configured(pictures, f"data.max_bad={max_bad}"), tmp_path / "shards")
    assert not json.loads((tmp_path / "shards" / "manifest.json").read_text())["finished"]


def test_a_part_that_is_not_as_it_should_be_is_no_empty_part(pictures, tmp_path):
    """An empty one is gone without, and that is all."""
    root = pictures / "train" / "ant"
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "18.png").write_bytes(png())
    words = [f"data.root={root}", "data.images=.", f"data.conditions={tmp_path / 'maps'}", "data.validation_last=1"]
    config = compose("data=pairs", *words, "image_size=16")
    with pytest.raises(UserError, match=r"^data\.conditions: 9 of the 9 pictures in .* have no map in "):
        written(config, tmp_path / "shards")
    alone = compose("data=folder", f"data.root={root}", "data.validation_share=0", "image_size=16")
    assert written(alone, tmp_path / "alone")["pictures"] == {"train": 10}


@pytest.mark.parametrize(("kind", "side"), [("jpg", 65_501), ("webp", 16_384)])
def test_a_picture_that_a_format_has_no_room_for_is_left_out(pictures, tmp_path, kind, side):
    Image.new("RGB", (side, 4)).save(pictures / "train" / "ant" / "04.png")
    manifest = written(configured(pictures), tmp_path / "shards", format=kind)
    (lost,) = manifest["shards"][0]["left_out"]
    assert (lost["name"], lost["why"]) == (
        "train/ant/04.png",
        f"{side} x 4 pixels, more than a {kind} has room for",
    )
    assert written(configured(pictures), tmp_path / "small", format=kind, size=2)["pictures"]["train"] == 20


def test_a_name_of_two_lines_is_written_on_one(pictures, tmp_path):
    (pictures / "train" / "ant" / "new\nline\x1b.png").write_bytes(b"broken")
    with pytest.raises(UserError) as caught:
        written(configured(pictures, "data.max_bad=0"), tmp_path / "shards")
    assert "the last is 'train/ant/new\\nline\\x1b.png' (not a picture" in str(caught.value)
    assert str(caught.value).isprintable()


ENTRY = {"name": "train-000000.tar", "pictures": 1, "bytes": 1, "sha256": "", "left_out": [], "broken": ""}
LOST = {"key": "00000001", "name": "a", "why": "b"}


@pytest.mark.parametrize(
    "entry",
    [
        *({**ENTRY, key: value} for key in ENTRY for value in (None, {}, 1.5)),
        *({**ENTRY, "left_out": [each]} for each in (1, "a", {}, {**LOST, "key": "x"}, {**LOST, "why": None})),
        {**ENTRY, "name": "../a-1.tar"},
        {**ENTRY, "name": "train-1.tar\n"},
        {},
        [],
        None,
    ],
)
def test_a_manifest_that_somebody_wrote_is_one_line(pictures, tmp_path, entry):
    to = tmp_path / "shards"
    manifest = written(configured(pictures), to)
    (to / "manifest.json").write_text(json.dumps({**manifest, "shards": [entry]}))
    with pytest.raises(UserError) as caught:
        written(configured(pictures), to)
    assert str(caught.value) == (f"to={to}: its manifest.json is not one of pipeline=shard; choose another folder")


def test_a_manifest_of_another_kind(pictures, tmp_path):
    to = tmp_path / "shards"
    manifest = written(configured(pictures), to)
    for text, words in (
        ("[" * 100_000, "is not one of pipeline=shard"),
        (json.dumps({**manifest, "version": 1}), "holds shards of another version of vqf"),
        (json.dumps({**manifest, "maps": {"maps": "rgb"}}), "with other options"),
    ):
        (to / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=words):
            written(configured(pictures), to)
    stranger = {**ENTRY, "name": "train-000009.tar"}
    (to / "manifest.json").write_text(json.dumps({**manifest, "shards": [*manifest["shards"], stranger]}))
    assert written(configured(pictures), to) == manifest
    for key in ("00000001-000002", "99999999"):
        first = {**manifest["shards"][0], "left_out": [{**LOST, "key": key}]}
        (to / "manifest.json").write_text(json.dumps({**manifest, "shards": [first, *manifest["shards"][1:]]}))
        assert written(configured(pictures), to) == manifest


def test_the_tolerance_of_a_source_is_its_own(pictures, tmp_path):
    """Two that may lose one each cannot lose two of one."""
    parts = [
        f"data.parts.{kind}={{name:folder,root:{pictures}/train/{kind},validation_last:2}}" for kind in ("ant", "bee")
    ]
    config = compose("data=union", "+data.parts={}", *(f"+{part}" for part in parts), "image_size=16")
    for kind, name in (("ant", "04.png"), ("bee", "05.png")):
        (pictures / "train" / kind / name).write_bytes(b"broken")
    assert written(config, tmp_path / "one", shuffle=False)["pictures"]["train"] == 14
    (pictures / "train" / "ant" / "06.png").write_bytes(b"broken")
    with pytest.raises(
        UserError, match=r"^data\.parts\.ant\.max_bad: 2 of the 8 train pictures cannot be read, where 1 may be left"
    ):
        written(config, tmp_path / "two", shuffle=False)


def test_mistakes_are_worded(pictures, tmp_path):
    def worded(*words, to="shards", **options):
        with pytest.raises(UserError) as caught:
            written(configured(pictures, *words), tmp_path / to, **options)
        return str(caught.value)

    written(configured(pictures), tmp_path / "shards")
    assert worded(shard_size=3) == (
        f"to={tmp_path / 'shards'}: holds shards of other pictures, or with other options; choose another folder"
    )
    png_of_another = pictures / "train" / "ant" / "00.png"
    png_of_another.write_bytes(png((1, 2, 3), (50, 50)))
    assert "holds shards of other pictures" in worded()
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "manifest.json").write_text('{"version": 1}')
    assert worded(to="strange") == (
        f"to={tmp_path / 'strange'}: its manifest.json is not one of pipeline=shard; choose another folder"
    )
    (tmp_path / "file").write_text("")
    assert worded(to="file") == (f"to={tmp_path / 'file'}: cannot be written (File exists); give another to")
    both = "both are numbers of at least 1"
    for options, words in (
        ({"size": 0}, f"size=0 and shard_size=5000: {both}"),
        ({"shard_size": 0}, f"size=None and shard_size=0: {both}"),
        ({"quality": 101}, "quality=101 is not in [1, 100]"),
        ({"size": 8, "format": "original"}, "size=8: a copied file keeps its size; give format=jpg, png or webp"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
            Shard(configured(pictures), tmp_path, **options)
