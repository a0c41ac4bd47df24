"""Untrusted weights, tars, indices and images: read safely or refused in one line."""

import importlib
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.security.canary import PAYLOADS, Canary
from tests.support.layouts import raster
from vqf.data.images import decode
from vqf.data.images.decode import UnreadableError
from vqf.dataloading.token_shards import TokenShardManifest
from vqf.errors import UserError
from vqf.evaluation.feature_cache import _load_npz as read_reference
from vqf.images import read_image
from vqf.interop import unpickle
from vqf.networks.weights import read_weights
from vqf.registry import build


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".safetensors"])
def test_weights_that_would_run_code(tmp_path: Path, canary: Canary, payload: str, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save({"state_dict": {"x": canary.payloads()[payload]}}, path)
    with pytest.raises(UserError):
        read_weights(path)
    with pytest.raises(UserError):
        unpickle.load_untrusted(path)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_every_option_that_takes_a_weight_file(tmp_path: Path, canary: Canary, payload: str) -> None:
    path = tmp_path / "vgg.pth"
    torch.save(canary.payloads()[payload], path)
    with pytest.raises(UserError):
        build("loss", {"name": "lpips", "weights": str(path)})
    with pytest.raises(UserError):
        build("metric", {"name": "lpips", "weights": str(path)}, layout=raster((2, 2), 4), device=torch.device("cpu"))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_statistics_that_would_run_code(tmp_path: Path, canary: Canary, payload: str) -> None:
    np.savez(tmp_path / "theirs.npz", mu=np.array([canary.payloads()[payload]], dtype=object), sigma=np.eye(1))
    with pytest.raises(UserError, match=r"not a readable \.npz file"):
        read_reference(tmp_path / "theirs.npz")


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, struct.pack("<Q", 2**60) + b"{}"])
def test_tokens_that_are_none(tmp_path: Path, content: bytes) -> None:
    manifest = TokenShardManifest(tmp_path, "train", {}, num_images=3, num_augmentations=1)
    manifest.shard_path(0).write_bytes(content)
    with pytest.raises(UserError):
        manifest.open_dataset()
    manifest.path.write_bytes(content)
    with pytest.raises(UserError):
        TokenShardManifest(tmp_path, "train", {}, num_images=3, num_augmentations=1)


def a_image(size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), "red").save(file, "PNG")
    return file.getvalue()


def pack(path: Path, *members: tuple[str, bytes, bytes, str]) -> None:
    """Write a tar of members: name, type, content, link target."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, content, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), link
            tar.addfile(info, io.BytesIO(content))


def shards(folder: Path, **options: Any) -> Any:
    return build("data", {"name": "shards", "root": str(folder), "validation": None, **options}, image_size=8, seed=0)


def everything_below(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


NAMES = ["/abs.png", "../up.png", "a/../../up.png", "..", "a\\..\\up.png", "C:/x.png", "x\n.png", "x\x1b[2J.png"]


@pytest.mark.parametrize("name", NAMES)
def test_a_member_that_leads_elsewhere(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    pack(folder / "train-0.tar", ("good.png", tarfile.REGTYPE, a_image(), ""), (name, tarfile.REGTYPE, a_image(), ""))
    before = everything_below(tmp_path)
    with pytest.raises(UserError, match="unsafe name") as caught:
        shards(folder)
    assert "\x1b" not in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert everything_below(tmp_path) == before


KINDS = {
    "symlink": tarfile.SYMTYPE,
    "hard link": tarfile.LNKTYPE,
    "device": tarfile.CHRTYPE,
    "block device": tarfile.BLKTYPE,
    "fifo": tarfile.FIFOTYPE,
    "folder": tarfile.DIRTYPE,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_in_a_tar_is_no_image(tmp_path: Path, kind: str) -> None:
    folder, secret = tmp_path / "data", tmp_path / "secret.png"
    folder.mkdir()
    secret.write_bytes(a_image(16))
    pack(
        folder / "train-0.tar",
        ("bad.png", KINDS[kind], b"", str(secret)),
        ("good.png", tarfile.REGTYPE, a_image(), ""),
    )
    before = everything_below(tmp_path) | {str(folder / "train-0.tar.idx")}
    split = shards(folder).split("train")
    assert list(split.names) == ["train-0.tar/good.png"]
    split.item(0, 0)
    assert everything_below(tmp_path) == before


@pytest.fixture
def indexed(tmp_path: Path) -> Path:
    """A folder with a shard and its index."""
    folder = tmp_path / "data"
    folder.mkdir()
    pack(folder / "train-0.tar", ("good.png", tarfile.REGTYPE, a_image(), ""))
    shards(folder)
    return folder


LIES: dict[str, Callable[[list[Any]], list[Any]]] = {
    "offset": lambda m: [*m[:2], 10**15, *m[3:]],
    "size": lambda m: [*m[:3], 2**62, *m[4:]],
    "a gigabyte": lambda m: [*m[:3], 2**30 + 1, *m[4:]],
    "header": lambda m: [*m[:2], 0, *m[3:]],
    "checksum": lambda m: [*m[:4], 0, *m[5:]],
}


def rewrite(place: Path, change: Callable[[dict[str, list[Any]]], Any]) -> None:
    """Change the columns of an index."""
    content = json.loads(place.read_text())
    content["members"] = change(content["members"])
    place.write_text(json.dumps(content))


def as_row(change: Callable[[list[Any]], list[Any]]) -> Callable[[dict[str, list[Any]]], Any]:
    """Apply a change of the single row to the columns."""
    return lambda columns: dict(zip(columns, ([v] for v in change([c[0] for c in columns.values()])), strict=True))


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies(indexed: Path, lie: str) -> None:
    rewrite(indexed / "train-0.tar.idx", as_row(LIES[lie]))
    with pytest.raises(UserError, match=r"data.max_unreadable|unreadable"):
        shards(indexed).split("train").item(0, 0)


ANYTHING: dict[str, Callable[[dict[str, list[Any]]], Any]] = {
    "rows": lambda columns: [[column[0] for column in columns.values()]],
    "a word": lambda columns: "x",
    "nothing": lambda columns: None,
    "no columns": lambda columns: {},
    "a number for a name": as_row(lambda m: [1, *m[1:]]),
    "below 0": as_row(lambda m: [*m[:2], -1, *m[3:]]),
    "a fraction": as_row(lambda m: [*m[:2], 1.5, *m[3:]]),
    "true": as_row(lambda m: [*m[:3], True, *m[4:]]),
    "another length": lambda columns: {**columns, "size": columns["size"] * 2},
    "no list": lambda columns: {**columns, "offset": columns["offset"][0]},
}


@pytest.mark.parametrize("content", ANYTHING)
def test_an_invalid_index_is_rebuilt(indexed: Path, content: str) -> None:
    place = indexed / "train-0.tar.idx"
    before = place.read_bytes()
    rewrite(place, ANYTHING[content])
    assert list(shards(indexed).split("train").names) == ["train-0.tar/good.png"]
    assert place.read_bytes() == before


@pytest.mark.parametrize("scheme", ["pipe:", "PIPE:", "Pipe:"])
def test_an_address_that_is_a_command_needs_an_option(
    canary: Canary, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VQF_ALLOW_PIPES", raising=False)
    for options in ({"root": scheme + canary.command}, {"root": "x", "train": scheme + canary.command}):
        with pytest.raises(UserError, match="runs a shell command"):
            build("data", {"name": "shards", "train_images": 1, "validation": None, **options}, image_size=8, seed=0)


def test_an_address_is_no_part_of_a_command(canary: Canary, monkeypatch: pytest.MonkeyPatch) -> None:
    """webdataset before 1.0 put it between quotes in a line for the shell."""
    started: list[tuple[Any, dict[str, Any]]] = []

    def noted(arguments: Any, **options: Any) -> Any:
        started.append((arguments, options))
        raise OSError("nothing is started in this test")

    importlib.import_module("webdataset.gopen")
    monkeypatch.setattr(sys.modules["webdataset.gopen"], "Popen", noted)  # the package has a function of that name
    for scheme in ("https", "http", "sftp", "gs", "ais"):
        url = f"{scheme}://host/'; {canary.command}; '"
        data = {"name": "shards", "root": url, "train": "a.tar", "validation": None, "train_images": 1}
        with pytest.raises(UserError):
            build("data", data, image_size=8, seed=0).split("train").item(0, 0)
    assert started
    assert all(isinstance(arguments, list) and not options.get("shell") for arguments, options in started)


def postscript(canary: Canary) -> bytes:
    return f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(%pipe%{canary.command}) (w) file\n%%EOF\n".encode()


def other_format(name: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, name)
    return file.getvalue()


def both_readers(content: bytes, path: Path) -> None:
    """Open a file as an image of a dataset and as one that a user gives."""
    path.write_bytes(content)
    with pytest.raises(UnreadableError):
        decode.read_crop(io.BytesIO(content), (8, 8), decode.CENTER_CROP)
    with pytest.raises(UserError) as caught:
        read_image(path)
    assert len(str(caught.value).splitlines()) == 1


def test_postscript_is_never_handed_to_ghostscript(
    tmp_path: Path, canary: Canary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a command was started"))
    both_readers(postscript(canary), tmp_path / "image.png")


@pytest.mark.parametrize("name", ["PCX", "TGA", "ICO", "PDF", "EPS", "SGI", "IM", "DDS", "JPEG2000", "AVIF"])
def test_other_image_formats_are_refused(tmp_path: Path, name: str) -> None:
    both_readers(other_format(name), tmp_path / "image.png")


def test_an_image_plugin_is_not_used(tmp_path: Path) -> None:
    """Other installed packages may register formats with Pillow."""
    asked = []

    def accept(prefix: bytes) -> bool:
        asked.append(prefix)
        return True

    Image.register_open("EVIL", lambda *_: pytest.fail("opened"), accept)
    try:
        both_readers(b"EVIL" * 16, tmp_path / "image.png")
    finally:
        Image.OPEN.pop("EVIL")
        Image.ID.remove("EVIL")
    assert not asked


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"".join(chunk(*each) for each in (*chunks, (b"IDAT", zlib.compress(bytes(64))), (b"IEND", b"")))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body


@pytest.mark.parametrize("side", [20_000, 60_000, 2**31 - 1])
def test_a_bomb_is_not_decoded(tmp_path: Path, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    both_readers(png(side, side), tmp_path / "image.png")


def test_text_that_unpacks_to_gigabytes(tmp_path: Path) -> None:
    text = b"Comment\0\0" + zlib.compress(bytes(2**27), 9)
    both_readers(png(8, 8, (b"zTXt", text)), tmp_path / "image.png")


def test_a_folder_of_images_reads_and_writes_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "a").mkdir(parents=True)
    for i in range(4):
        (folder / "a" / f"{i}.png").write_bytes(a_image())
    os.symlink(folder, folder / "a" / "loop")
    before = everything_below(folder)
    data = build("data", {"name": "folder", "root": str(folder)}, image_size=8, seed=0)
    names = [name for part in ("train", "validation") for name in data.split(part).names]
    assert sorted(names) == [f"a/{i}.png" for i in range(4)]
    assert everything_below(folder) == before
