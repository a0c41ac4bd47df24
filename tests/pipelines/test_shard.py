import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from tests.composing import compose
from tests.data.packing import png, red
from vqf.errors import UserError
from vqf.pipelines import shard
from vqf.pipelines.shard import Shard
from vqf.pipelines.shard_manifest import sha256
from vqf.registry import build


@pytest.fixture
def pictures(tmp_path):
    """Twenty training and three validation pictures in two classes; the red of one is its number."""
    for i in range(23):
        path = tmp_path / "pictures" / ("train" if i < 20 else "val") / ("ant", "bee")[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png((i, 0, 0), (40, 30)))
    return tmp_path / "pictures"


def configured(root, *words, workers=0):
    return compose("data=folder", f"data.root={root}", "image_size=16", f"workers={workers}", "data.flip=false", *words)


def written(config, to, **options):
    Shard(config, to.parent, to=str(to), **options).run()
    return json.loads((to / "manifest.json").read_text())


def read(to, part="train", **options):
    data = build("data", {"name": "shards", "root": str(to), "flip": False, **options}, image_size=16, seed=0)
    return data, data.split(part)


def files(to):
    return {each.name: each.read_bytes() for each in to.iterdir() if not each.name.endswith(".idx")}


@pytest.mark.parametrize("workers", [0, 2])
def test_originals_come_back_byte_by_byte(pictures, tmp_path, workers):
    to = tmp_path / "shards"
    manifest = written(configured(pictures, workers=workers), to, shard_size=6)
    assert manifest["finished"]
    assert manifest["pictures"] == {"train": 20, "validation": 3}
    assert [each["pictures"] for each in manifest["shards"]] == [6, 6, 6, 2, 3]
    for each in manifest["shards"]:
        content = (to / each["name"]).read_bytes()
        assert (each["bytes"], each["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    data, split = read(to)
    assert data.classes == ["ant", "bee"]
    names = sorted(path for path in pictures.glob("train/*/*.png"))
    for i in range(20):
        original = names[int(split.names[i].split("/")[1][:8])]
        assert split.file(i).stored() == original.read_bytes()
        assert data.classes[split.item(0, i).label] == original.parent.name
    assert sorted(red(split.item(0, i)) for i in range(20)) == list(range(20))
    assert [red(split.item(0, i)) for i in range(20)] != list(range(20))


def test_webdataset_reads_what_is_written(pictures, tmp_path):
    import webdataset

    to = tmp_path / "shards"
    written(configured(pictures), to, shard_size=50)
    theirs = list(webdataset.WebDataset(str(to / "train-000000.tar"), shardshuffle=False).decode("pil"))
    assert len(theirs) == 20
    for each in theirs:
        assert (pictures / each["json"]["name"]).is_file()
        assert each["cls"] == ("ant", "bee").index(each["json"]["name"].split("/")[1])
        assert each["png"].getpixel((0, 0))[0] == int(each["json"]["name"][-6:-4])


def test_the_same_command_writes_the_same_bytes(pictures, tmp_path):
    for name, workers in (("a", 0), ("b", 2)):
        written(configured(pictures, workers=workers), tmp_path / name, format="jpg", shard_size=7)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    written(configured(pictures, "seed=1"), tmp_path / "c", format="jpg", shard_size=7)
    assert files(tmp_path / "a").keys() == files(tmp_path / "c").keys()
    assert files(tmp_path / "a") != files(tmp_path / "c")


@pytest.mark.parametrize(("kind", "name"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_formats_and_sizes(pictures, tmp_path, kind, name):
    for path in list(pictures.glob("train/*/*"))[1:]:
        path.unlink()
    (path,) = pictures.glob("train/*/*")
    Image.new("RGBA", (100, 60), (10, 200, 30, 0)).save(path)
    to = tmp_path / "shards"
    written(configured(pictures), to, format=kind, size=20, shuffle=False)
    _, split = read(to)
    image = Image.open(io.BytesIO(split.file(0).stored()))
    assert (image.format, image.mode, image.size) == (name, "RGB", (33, 20))
    assert all(abs(each - 255) <= 2 for each in split.file(0).picture().getpixel((5, 5)))  # transparency is white
    _, small = read(to, "validation")
    assert split.names[0].endswith(f".{kind}")
    assert small.file(0).picture().size == (27, 20)
    written(configured(pictures), tmp_path / "large", format=kind, size=500)
    assert read(tmp_path / "large", "validation")[1].file(0).picture().size == (40, 30)


def test_a_source_without_files_is_written_as_it_looks(tmp_path):
    config = compose("data=emoji", "image_size=16")
    to = tmp_path / "shards"
    with pytest.raises(UserError, match=r"^format=original: data 'emoji' has no files to copy; give format=png$"):
        written(config, to)
    manifest = written(config, to, format="png", shuffle=False)
    assert manifest["pictures"] == {"train": 1400, "validation": 236}
    data = build("data", {"name": "shards", "root": str(to), "flip": False}, image_size=16, seed=0)
    emoji = build("data", {"name": "emoji"}, image_size=16, seed=0)
    assert data.classes == emoji.classes
    for part in ("train", "validation"):
        ours, theirs = data.split(part), emoji.split(part)
        for i in range(0, len(ours), 80):
            assert (ours.item(0, i).image - theirs.item(0, i).image).abs().max() <= 0.5 / 127.5 + 1e-5
        assert ours.labels.tolist() == list(theirs.labels)


def test_pictures_that_cannot_be_read_are_left_out_and_named(pictures, tmp_path, caplog):
    (pictures / "train" / "ant" / "04.png").write_bytes(b"broken")
    (pictures / "train" / "bee" / "05.png").write_bytes(png()[:60])
    manifest = written(configured(pictures, "data.max_bad=0.1"), tmp_path / "shards", shard_size=100)
    first = manifest["shards"][0]
    assert first["pictures"] == 18
    assert set(first["left_out"]) == {"train/ant/04.png", "train/bee/05.png"}
    assert first["left_out"]["train/bee/05.png"] == "image file is truncated"
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


def test_the_picture_of_a_phone_is_copied_as_the_jpeg_that_it_is(pictures, tmp_path):
    frames = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
    path = pictures / "val" / "ant" / "20.png"
    frames[0].save(path, "MPO", save_all=True, append_images=frames[1:])
    written(configured(pictures), tmp_path / "shards")
    _, split = read(tmp_path / "shards", "validation")
    assert split.names[0].endswith("00000000.jpg")
    assert split.file(0).stored() == path.read_bytes()
    assert split.file(0).picture().getpixel((5, 5))[0] > 250


def test_finished_shards_are_kept_and_damaged_ones_written_again(pictures, tmp_path, monkeypatch, caplog):
    to, config = tmp_path / "shards", configured(pictures)
    written(config, to, shard_size=6)
    before = files(to)
    (to / "train-000001.tar").unlink()
    with (to / "train-000002.tar").open("r+b") as file:
        file.seek(600)
        file.write(b"damage")
    (to / ".train-000003.tar.partial").write_bytes(b"half")
    made = []
    whole = shard.Writer.__call__
    monkeypatch.setattr(shard.Writer, "__call__", lambda self, task: made.append(task.name) or whole(self, task))
    written(config, to, shard_size=6)
    assert made == ["train-000001.tar", "train-000002.tar"]
    assert files(to) == before
    assert f"'{to / 'train-000002.tar'}' is not what manifest.json says; it is written again" in caplog.text


SCRIPT = """
import sys, time
from pathlib import Path
from vqf.pipelines import shard
from tests.pipelines.test_shard import configured, written
picture = shard.Writer._members
shard.Writer._members = lambda *given: time.sleep(0.05) or picture(*given)
written(configured(sys.argv[1], workers=int(sys.argv[3])), Path(sys.argv[2]), shard_size=4)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_leaves_no_half_shard_and_goes_on(pictures, tmp_path, workers):
    to = tmp_path / "shards"
    command = [sys.executable, "-c", SCRIPT, str(pictures), str(to), str(workers)]
    process = subprocess.Popen(command, start_new_session=True)
    while not any(to.glob("*.tar")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = sorted(to.glob("*.tar"))
    assert 0 < len(finished) < 6
    hashes = {path.name: sha256(path) for path in finished}
    manifest = written(configured(pictures), to, shard_size=4)
    assert not list(to.glob(".*"))
    assert {each["name"]: each["sha256"] for each in manifest["shards"]}.items() >= hashes.items()
    written(configured(pictures), tmp_path / "whole", shard_size=4)
    assert files(to) == files(tmp_path / "whole")


def test_a_union_is_copied_file_by_file(pictures, tmp_path, caplog):
    """Whole pictures, not what the union shows of them; a broken one is no copy of its neighbour."""
    (pictures / "train" / "ant" / "04.png").write_bytes(b"broken")
    parts = [
        f"data.parts.{kind}={{name:folder,root:{pictures}/train/{kind},validation_last:2}}" for kind in ("ant", "bee")
    ]
    config = compose("data=union", "+data.parts={}", *(f"+{part}" for part in parts), "image_size=16")
    manifest = written(config, tmp_path / "shards", shuffle=False)
    assert manifest["classes"] == ["ant", "bee"]
    assert [each["pictures"] for each in manifest["shards"]] == [15, 4]
    assert list(manifest["shards"][0]["left_out"]) == ["ant/04.png"]
    assert "15 pictures" not in caplog.text
    _, split = read(tmp_path / "shards")
    originals = [path for kind in ("ant", "bee") for path in sorted(pictures.glob(f"train/{kind}/*"))[:8]]
    originals = [path for path in originals if path.name != "04.png"]
    assert [split.file(i).stored() for i in range(15)] == [path.read_bytes() for path in originals]
    assert split.labels.tolist() == [0] * 7 + [1] * 8


def test_a_union_with_a_source_that_draws_keeps_the_files_of_the_other_whole(pictures, tmp_path):
    """Not crops of them, and a broken one is no copy of its neighbour."""
    (pictures / "train" / "ant" / "04.png").write_bytes(b"broken")
    parts = [f"{{name:folder,root:{pictures}/train/ant,validation_last:2}}", "{name:emoji}"]
    words = [f"+data.parts={{ants:{parts[0]},emoji:{parts[1]}}}", "image_size=16"]
    config = compose("data=union", *words)
    with pytest.raises(UserError, match="data 'union' has no files to copy"):
        written(config, tmp_path / "shards")
    manifest = written(config, tmp_path / "shards", format="png", shuffle=False)
    assert manifest["shards"][0]["left_out"].keys() == {"ants/04.png"}
    _, split = read(tmp_path / "shards")
    assert [split.file(i).picture().size for i in range(8)] == [(40, 30)] * 7 + [(16, 16)]
    assert [red(split.item(0, i)) for i in range(7)] == [0, 2, 6, 8, 10, 12, 14]
    assert split.labels.tolist() == [0] * 7 + [1] * 1400


def test_shards_of_shards(pictures, tmp_path):
    written(configured(pictures), tmp_path / "first", shuffle=False)
    config = compose("data=shards", f"data.root={tmp_path / 'first'}", "image_size=16")
    written(config, tmp_path / "second", shard_size=3, shuffle=False)
    one, two = (read(tmp_path / each)[1] for each in ("first", "second"))
    assert [one.file(i).stored() for i in range(20)] == [two.file(i).stored() for i in range(20)]
    assert torch.equal(one.labels, two.labels)


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
    assert worded(to="file") == f"to={tmp_path / 'file'}: cannot be written (file exists)"
    for options in ({"size": 0}, {"shard_size": 0}, {"quality": 101}, {"size": 8, "format": "original"}):
        with pytest.raises(ValueError, match=r"=.*: |is not in"):
            Shard(configured(pictures), tmp_path, **options)
