"""Named pipes, sockets and devices are unreadable files, wherever a file is named. None of these tests may hang."""

import faulthandler
import logging
import os
import re

import pytest

from tests.data.packing import pack, png, shard
from tests.support.special_files import SPECIAL_FILES, make_fifo
from vqf.data.folder import Folder
from vqf.data.images.maps import MapDecoder
from vqf.data.pairs import Pairs
from vqf.data.shards import Shards
from vqf.errors import UserError
from vqf.images import image_files, read_image

SECONDS = 60  # after which a test that waits for a pipe ends the process, with its stack


@pytest.fixture(autouse=True)
def no_waiting():
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def paint(folder, count=4):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}.png").write_bytes(png((i, 0, 0)))
    return folder


@pytest.mark.parametrize(("reason", "make"), SPECIAL_FILES.items())
def test_in_a_folder_the_next_image_takes_the_place(tmp_path, caplog, reason, make):
    (paint(tmp_path / "p") / "1.png").unlink()
    os.chdir("p")  # the path of a socket must be short
    make("1.png")
    split = Folder(16, 0, root=".", validation_fraction=0, crop="center", flip=False).split("train")
    with caplog.at_level(logging.WARNING, "vqf"):
        assert round(float(split.item(0, 1).image[0].mean() + 1) * 127.5) == 2
    assert f"data.root: cannot read '1.png' ({reason}); the next image takes its place" in caplog.text
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
        split.file(1).read_bytes()


def test_in_a_list_and_as_the_list(tmp_path, caplog):
    paint(tmp_path)
    make_fifo(tmp_path / "pipe.png")
    (tmp_path / "list.txt").write_text("0.png\npipe.png\n1.png\n2.png\n")
    split = Folder(16, 0, root=".", train="list.txt").split("train")
    split.item(0, 1)
    assert "cannot read 'pipe.png' (a named pipe (fifo), not a file)" in caplog.text
    make_fifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=r"^data\.train: cannot read the list 'pipe\.txt' \(a named pipe \(fifo\)"):
        Folder(16, 0, root=".", train="pipe.txt")


def test_as_a_condition_map(tmp_path, caplog):
    paint(tmp_path / "images")
    (paint(tmp_path / "conditions") / "1.png").unlink()
    make_fifo(tmp_path / "conditions" / "1.png")
    Pairs(16, 0, root=".", validation_fraction=0).split("train").item(0, 1)
    assert "cannot read '1.png' (its map '1.png': a named pipe (fifo), not a file)" in caplog.text


def test_as_condition_image_and_mask_of_the_command_line(tmp_path, caplog):
    paint(tmp_path / "some")
    (tmp_path / "some" / "notes.txt").touch()
    make_fifo(tmp_path / "some" / "pipe.png")
    caplog.set_level(logging.INFO, "vqf")
    listed = image_files(tmp_path / "some")
    assert [path.name for path in listed] == ["0.png", "1.png", "2.png", "3.png", "pipe.png"]
    assert "1 files are no images by their endings, such as 'notes.txt'" in caplog.text
    with pytest.raises(UserError, match=r"pipe\.png: not a readable image \(a named pipe \(fifo\), not a file\)$"):
        read_image(listed[-1])  # the mask and conditions of images are read by this
    with pytest.raises(ValueError, match=r"^a named pipe \(fifo\), not a file$"):
        MapDecoder("grey")(listed[-1])


def test_as_a_shard_its_index_or_the_manifest(tmp_path):
    make_fifo(tmp_path / "train-0.tar")
    with pytest.raises(UserError, match=r"^data\.root: cannot read the shard 'train-0\.tar' \(a named pipe \(fifo\)"):
        Shards(16, 0, root=".")
    (tmp_path / "train-0.tar").unlink()
    shard(tmp_path / "train-0.tar", range(3))
    make_fifo(tmp_path / "train-0.tar.idx")
    make_fifo(tmp_path / "manifest.json")
    split = Shards(16, 0, root=".", index=str(tmp_path / "elsewhere")).split("train")
    assert len(Shards(16, 0, root=".").split("train")) == len(split) == 3
    (tmp_path / "train-0.tar").unlink()
    make_fifo(tmp_path / "train-0.tar")
    with pytest.raises(ValueError, match=r"train-0\.tar: a named pipe \(fifo\), not a file"):
        split.file(0).read_bytes()


def test_as_a_streamed_shard(tmp_path, caplog):
    pack(tmp_path / "train-1.tar", [("a.png", png()), ("b.png", png())])
    make_fifo(tmp_path / "train-0.tar")
    data = Shards(
        16, 0, root=f"file:{tmp_path}", train="train-{0..1}.tar", validation=None, train_images=2, max_unreadable=0.5
    )
    data.split("train").item(0, 0)
    assert "to its end (a named pipe (fifo), not a file)" in caplog.text
