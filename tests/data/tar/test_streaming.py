"""Streamed shards (files, commands, a local web server) against the same shards in a folder."""

import contextlib
import functools
import gzip
import http.server
import itertools
import json
import logging
import os
import pickle
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.data.packing import pack, png, red, shard
from tests.support.composing import compose
from tests.training.test_trainer import TINY
from vqf.data.shards import Shards
from vqf.data.tar import remote_io
from vqf.data.tar.remote_io import RawSample, is_url, redact_url
from vqf.data.tar.replay import ReplayableStream
from vqf.dataloading.loader import keyed_batches, sequential_batches, train_batches
from vqf.dataloading.order import ShuffledBatches
from vqf.errors import UserError
from vqf.pipelines.shard import Shard
from vqf.pipelines.stage1 import Stage1
from vqf.registry import build

PLAIN = {"crop": "center", "flip": False, "validation": None}
SHARDS, EACH = 20, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty training shards of six images, one validation shard of five; the red of an image is its number."""
    root = tmp_path_factory.mktemp("shards")
    for i in range(SHARDS):
        shard(root / f"train-{i:02}.tar", range(EACH * i, EACH * i + EACH), cls=lambda each: f"{each % 4}\n")
    shard(root / "validation-00.tar", range(200, 205), cls=lambda each: "3")
    return root


@pytest.fixture
def private(folder, tmp_path):
    """A copy of the shards that a test may damage."""
    return shutil.copytree(folder, tmp_path / "private")


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    """Serve a folder; return its URL."""
    servers = []

    def start(folder, handler=Handler):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def streamed(train=None, size=16, seed=0, **options):
    given = {**PLAIN, "train_images": SHARDS * EACH, "classes": 4, **options}
    return Shards(size, seed, train=train or "train-{00..19}.tar", **given)


def exact(root, **options):
    return Shards(16, 0, root=str(root), **{**PLAIN, **options})


def worded(action):
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


def reds(samples):
    return [red(each) for each in samples]


def of_batches(batches):
    return [round(float(image[0].mean() + 1) * 127.5) for batch in batches for image in batch.images]


@pytest.fixture(params=["file", "pipe", "http", "gzip"])
def source(request, folder, serve, monkeypatch, tmp_path):
    """The same shards, four ways."""
    if request.param == "file":
        return streamed(root=f"file:{folder}")
    if request.param == "pipe":
        monkeypatch.setenv(remote_io.ALLOW_PIPES_VARIABLE, "1")
        return streamed(f"pipe:cat {folder}/train-{{00..19}}.tar")
    if request.param == "http":
        return streamed(root=serve(folder))
    for path in folder.glob("train-*.tar"):
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
    return streamed(f"{serve(tmp_path)}/train-{{00..19}}.tar.gz")


def test_in_order_a_stream_is_what_the_folder_is(source, folder):
    ours, theirs = source.split("train"), exact(folder).split("train")
    assert len(ours) == len(theirs) == SHARDS * EACH
    for i in (*range(0, 120, 13), 119, 3, 3, 4):
        one, other = ours.item(2, i), theirs.item(2, i)
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.crop_box, other.crop_box)
        assert one.label == other.label


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_is_read_in_order(serve, folder, workers):
    split = streamed(root=serve(folder), validation="validation-00.tar", validation_images=5).split("validation")
    for _ in range(2):
        assert of_batches(sequential_batches(split, 2, workers=workers)) == [200, 201, 202, 203, 204]
    assert of_batches(sequential_batches(split, 2, count=2, workers=workers)) == [200, 202]


def test_augmentations_in_order_are_those_of_the_folder(serve, folder):
    options = {"crop": "resized", "flip": True, "jitter": (0.2, 0.2, 0.2, 0.1)}
    ours = streamed(root=serve(folder), **options).split("train")
    theirs = exact(folder, **options).split("train")
    for key in ((0, 0), (0, 5), (3, 5), (1, 7)):
        assert torch.equal(ours.item(*key).image, theirs.item(*key).image)
        assert torch.equal(ours.item(*key).crop_box, theirs.item(*key).crop_box)
    assert not torch.equal(ours.item(0, 7).image, ours.item(1, 7).image)


def seen_by(split, ranks, workers, start=0, steps=10):
    """The images of every rank, in batches of 12 over all ranks."""
    orders = [ShuffledBatches(len(split), 12, 0, rank, ranks) for rank in range(ranks)]
    return [
        of_batches(train_batches(split, each, start=start, steps=start + steps, workers=workers)) for each in orders
    ]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 0), (2, 1), (2, 3)])
def test_every_process_reads_its_shards_once_before_it_reads_one_again(folder, ranks, workers):
    """Twenty shards over ranks and workers: the counts of images that one process reads differ by one at most."""
    split = streamed(root=f"file:{folder}", buffer=5).split("train")
    steps = 40  # four times as many images as there are
    parts = seen_by(split, ranks, workers, steps=steps)
    assert [len(part) for part in parts] == [12 * steps // ranks] * ranks
    assert not set(parts[0]) & set(parts[-1]) or ranks == 1
    counts = Counter(itertools.chain(*parts))
    assert set(counts) == set(range(SHARDS * EACH))
    shares = [range(SHARDS)[i :: ranks * max(workers, 1)] for i in range(ranks * max(workers, 1))]
    for share in shares:
        of_share = [counts[EACH * s + i] for s in share for i in range(EACH)]
        assert max(of_share) - min(of_share) <= 1


def test_one_process_sees_every_image_once_in_each_reading(folder):
    stream = streamed(root=f"file:{folder}").split("train").stream(0, 0, 1)
    for _ in range(3):
        assert sorted(reds(itertools.islice(stream, 120))) == list(range(120))


def test_images_are_shuffled_anew_in_each_reading_and_for_every_seed_and_start(folder):
    def first(seed=0, start=0, rank=0, **options):
        split = streamed(root=f"file:{folder}", seed=seed, buffer=30, **options).split("train")
        return tuple(reds(itertools.islice(split.stream(start, rank, 2), 60)))

    assert first() == first()
    orders = [first(), first(seed=1), first(start=7), first(rank=1)]
    assert len(set(orders)) == 4
    assert all(list(each) != sorted(each) for each in orders)
    shards = [number // EACH for number in first()[:12]]
    assert len(set(shards)) > 4


def test_how_an_image_is_varied_depends_on_its_name_and_the_reading_alone(tmp_path):
    ramp = [(f"{i}.png", png((i, 0, 0), (40, 16))) for i in range(4)]
    for i in range(4):
        pack(tmp_path / f"train-{i}.tar", ramp)
    data = streamed("train-{0..3}.tar", root=f"file:{tmp_path}", crop="random", flip=True, classes=0, buffer=1)
    split = data.split("train")

    def places(rank, world):
        return Counter(
            tuple(each.crop_box.tolist()) for each in itertools.islice(split.stream(0, rank, world), 16 // world)
        )

    assert places(0, 1) == places(0, 2) + places(1, 2) == sum((places(i, 4) for i in range(4)), Counter())
    assert len(places(0, 1)) > 8


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_has_another_order(folder, workers):
    split = streamed(root=f"file:{folder}").split("train")
    (whole,), (rest,) = (seen_by(split, 1, workers, start, steps) for start, steps in ((0, 6), (3, 3)))
    assert len(rest) == 36
    assert rest != whole[36:]
    assert seen_by(split, 1, workers, 3, 3) == [rest]


def test_more_readers_than_shards(folder):
    few = streamed("train-0{0,1}.tar", root=f"file:{folder}", train_images=12).split("train")
    assert set(of_batches(train_batches(few, ShuffledBatches(12, 4, 0), start=0, steps=6, workers=5))) == set(range(12))
    message = worded(lambda: next(train_batches(few, ShuffledBatches(12, 12, 0, 0, 3), start=0, steps=1, workers=0)))
    assert message == "data.train: 2 shards cannot be shared by 3 processes"


def test_the_manifest_says_what_there_is(folder, tmp_path, serve):
    config = compose("data=shards", f"data.root={folder}", "image_size=16")
    to = tmp_path / "written"
    Shard(config, tmp_path, out=str(to), shard_size=50, shuffle=False).run()
    data = Shards(16, 0, root=serve(to), crop="center", flip=False)
    train, validation = data.split("train"), data.split("validation")
    assert (len(train), len(validation), data.classes) == (120, 5, ["0", "1", "2", "3"])
    assert train.urls == [f"{data.remote.root}/train-{i:06}.tar" for i in range(3)]
    assert reds(train.item(0, i) for i in range(120)) == list(range(120))
    assert [validation.item(0, i).label for i in range(5)] == [3] * 5
    assert Shards(16, 0, root=serve(to), labels=False).split("train").item(0, 0).label is None
    before = train.fingerprint
    manifest = json.loads((to / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    manifest["shards"] += [{"name": "../train-x.tar", "images": 9}, "junk", {"name": "train-y.tar"}]
    (to / "manifest.json").write_text(json.dumps(manifest))
    again = Shards(16, 0, root=data.remote.root, crop="center", flip=False).split("train")
    assert (len(again), again.urls) == (120, train.urls)
    assert again.fingerprint != before


def test_without_a_manifest_the_missing_options_are_named(folder, serve, caplog):
    root = serve(folder)
    assert worded(lambda: Shards(16, 0, root=root)) == (
        f"data.train=train-*.tar: '{root}' cannot be searched; name the shards as in train-{{0000..0146}}.tar "
        "(data.train=null for none), or put the manifest.json of pipeline=shard there"
    )
    assert worded(lambda: streamed(root=root, train_images=None)) == (
        "data.train=train-{00..19}.tar: streamed shards do not say how many images they hold; give "
        "data.train_images=..., or put the manifest.json of pipeline=shard beside them"
    )
    with caplog.at_level(logging.INFO, "vqf"):
        assert streamed(root=root, classes=None).split("train").item(0, 0).label is None
    assert "data.classes: not given, so the streamed images have no labels" in caplog.text
    assert worded(lambda: streamed(root=root).split("validation")) == (
        "data.validation: no validation shards are named or listed"
    )
    assert worded(lambda: Shards(16, 0, root=root, train=None, validation=None)).startswith("data.root: no folder")
    assert worded(lambda: Shards(16, 0)) == "data.root: give the folder of the shards, or its URL"


def test_a_url_without_a_manifest_says_why(folder, serve, caplog):
    root = serve(folder)
    with caplog.at_level(logging.INFO, "vqf"):
        streamed(root=root)
    assert f"no manifest.json at '{root}' (the command that fetches it ended with status 22)" in caplog.text


def test_a_stream_cannot_be_one_of_several_sources(folder):
    node = {
        "name": "shards",
        "root": f"file:{folder}",
        "train": "train-00.tar",
        "train_images": 6,
        "validation": None,
    }
    data = build("data", {"name": "union", "parts": {"far": node}}, image_size=16, seed=0)
    assert worded(lambda: data.split("train")) == (
        "data.parts.far: a stream cannot be one of several sources; copy its shards to a folder"
    )


def test_a_label_that_cannot_be(folder):
    data = streamed(root=f"file:{folder}", classes=2)
    assert worded(lambda: [data.split("train").item(0, i) for i in range(4)]) == (
        "data.root: the label beside 'train-00.tar/0002.png' is 2, not below 2"
    )
    pack(folder / "none.tar", [("a.png", png())])
    assert worded(lambda: streamed("none.tar", root=f"file:{folder}").split("train").item(0, 0)) == (
        "data.root: 'none.tar/a.png' has no label beside it; data.classes=0 trains without labels"
    )


def test_a_broken_image_is_replaced_by_the_next_and_named_once(private, caplog):
    members = [(f"{i:02}.png", png((i, 0, 0)) if i not in (2, 3, 5) else b"broken") for i in range(6)]
    pack(private / "train-19.tar", members)
    split = streamed(
        "train-{18..19}.tar", root=f"file:{private}", classes=0, train_images=12, max_unreadable=0.3
    ).split("train")
    for _ in range(2):
        found = reds(split.item(0, i) for i in range(12))
        assert found == [108, 109, 110, 111, 112, 113, 0, 1, 4, 4, 4, 108]
    assert [each.getMessage().split(" (")[0] for each in caplog.records] == [
        f"data.root: cannot read 'train-19.tar/{i:02}.png'" for i in (2, 3, 5)
    ]
    assert Counter(reds(itertools.islice(split.stream(0, 0, 1), 18)))[0] == 2
    strict = streamed("train-{18..19}.tar", root=f"file:{private}", classes=0, train_images=12, max_unreadable=0.1)
    assert worded(lambda: [strict.split("train").item(0, i) for i in range(12)]).startswith(
        "data.max_unreadable=0.1: 2 of the 12 train images cannot be read; the last is 'train-19.tar/03.png' "
        "(not an image"
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_counted_once_however_often_it_is_read(private, workers, caplog):
    members = [(f"{i:02}.png", png((i, 0, 0)) if i != 3 else b"") for i in range(6)]
    pack(private / "train-00.tar", members)
    split = streamed("train-00.tar", root=f"file:{private}", classes=0, train_images=6, max_unreadable=0.2).split(
        "train"
    )
    for _ in range(3):
        assert of_batches(sequential_batches(split, 4, workers=workers)) == [0, 1, 2, 4, 4, 5]
    assert int(split.image_errors.flags.sum()) == 1
    assert len(caplog.records) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_worker_tells_of_broken_images(private, workers, caplog):
    members = [(f"{i:02}.png", png((i, 0, 0)) if i != 3 else b"") for i in range(6)]
    pack(private / "train-00.tar", members)
    split = streamed(root=f"file:{private}", classes=0).split("train")
    assert 3 not in of_batches(train_batches(split, ShuffledBatches(120, 12, 0), start=0, steps=30, workers=workers))
    assert sum("cannot read 'train-00.tar/03.png'" in each.getMessage() for each in caplog.records) == 1


SAMPLE = 4 * 512  # bytes: two headers, a label and a small image


@pytest.mark.parametrize("kind", ["file", "pipe", "http"])
@pytest.mark.parametrize("damage", ["cut", "block", "missing", "junk"])
def test_a_truncated_or_missing_shard(private, serve, monkeypatch, caplog, kind, damage):
    path = private / "train-01.tar"
    if damage == "cut":
        os.truncate(path, 3 * SAMPLE + 700)
    elif damage == "block":  # what tarfile takes for an end
        os.truncate(path, 4 * SAMPLE)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(os.urandom(5000))
    monkeypatch.setenv(remote_io.ALLOW_PIPES_VARIABLE, "1")
    root = {"file": f"file:{private}", "pipe": f"pipe:cat {private}", "http": serve(private)}[kind]
    make = lambda **options: streamed(f"{root}/train-{{00..02}}.tar", train_images=18, **options).split("train")  # noqa: E731
    split = make(max_unreadable=0.4)
    found = reds(split.item(0, i) for i in range(18))
    assert found[:6] == [0, 1, 2, 3, 4, 5]
    lost = {"cut": 3, "block": 3, "missing": 6, "junk": 6}[damage]
    expected = [*range(6), *range(6, 12 - lost), *range(12, 18)]
    assert found == (expected * 2)[:18]
    (record,) = caplog.records
    assert record.getMessage().startswith(f"data.root: cannot read the shard '{root}/train-01.tar' to its end (")
    reason = {
        "cut": "unexpected end of data",
        "block": "it is truncated",
        "missing": "no such file" if kind == "file" else "the command that fetches it ended with status",
        "junk": "",
    }[damage]
    assert reason in record.getMessage()
    trained = Counter(reds(itertools.islice(split.stream(0, 0, 1), 60)))
    assert set(trained) == set(expected)
    assert worded(lambda: [make(max_unreadable=0).item(0, i) for i in range(18)]).startswith(
        "data.max_unreadable=0: 1 of the 3 train shards cannot be read to their end; the last is "
    )


def test_fewer_images_than_the_option_says(folder):
    split = streamed(root=f"file:{folder}", train_images=130).split("train")
    assert worded(lambda: [split.item(0, i) for i in range(130)]) == (
        "data.train_images=130: its 20 shards hold 120 images"
    )
    few = streamed(root=f"file:{folder}", train_images=121).split("train")
    assert red(few.item(0, 120)) == 0


def test_no_readable_image(private):
    for path in private.glob("train-*"):
        path.unlink()
    split = streamed(root=f"file:{private}", max_unreadable=1).split("train")
    last = f"file:{private}/train-19.tar"
    expected = f"data.train: no image in 20 shards can be read; the last is '{last}'"
    assert worded(lambda: split.item(0, 0)) == expected
    assert worded(lambda: next(split.stream(0, 0, 1))) == expected
    pack(private / "train-19.tar", [("a.png", b"broken")])
    assert worded(lambda: next(split.stream(0, 0, 1))) == expected
    for workers in (0, 1):
        assert (
            worded(
                lambda n=workers: next(train_batches(split, ShuffledBatches(120, 2, 0), start=0, steps=1, workers=n))
            )
            == expected
        )


def test_unsafe_member_names_are_refused(private):
    pack(private / "train-00.tar", [("fine.png", png()), ("../x.png", png())])
    message = worded(lambda: streamed(root=f"file:{private}", classes=0).split("train").item(0, 0))
    assert message == (
        f"data.root: the shard 'file:{private}/train-00.tar' has a member with the unsafe name '../x.png'"
    )
    pack(private / "train-00.tar", [("a.png", png()), ("a.png", png())])
    message = worded(lambda: streamed(root=f"file:{private}", classes=0).split("train").item(0, 0))
    assert message == f"data.root: the shard 'file:{private}/train-00.tar' holds 'a.png' twice"


def test_a_huge_member_is_not_read(private, monkeypatch, caplog):
    monkeypatch.setattr(remote_io, "MAX_MEMBER_BYTES", 50)
    split = streamed("train-00.tar", root=f"file:{private}", train_images=6, max_unreadable=1).split("train")
    assert worded(lambda: split.item(0, 0)).startswith("data.train: no image in 1 shards can be read")
    assert "bytes, more than 50" in caplog.text


def test_which_member_is_the_image(tmp_path):
    members = [
        ("a.left.png", png((1, 0, 0))),
        ("a.right.png", png((2, 0, 0))),
        ("a.json", b'{"kind": 1}'),
        ("b.txt", b""),
    ]
    pack(tmp_path / "train-0.tar", members)
    options = {"root": f"file:{tmp_path}", "train_images": 1, "classes": 2, "label_key": "kind"}
    assert red(streamed("train-0.tar", **options).split("train").item(0, 0)) == 1
    right = streamed("train-0.tar", image="right.png", **options).split("train").item(0, 0)
    assert (red(right), right.label) == (2, 1)


def test_a_command_runs_only_if_it_is_allowed(folder, monkeypatch, tmp_path):
    monkeypatch.delenv(remote_io.ALLOW_PIPES_VARIABLE, raising=False)
    command = f"pipe:touch {tmp_path}/ran; cat {folder}/train-00.tar"
    assert worded(lambda: streamed(command)) == (
        f"data.train={command}: pipe: runs a shell command; if you trust it, set the environment variable "
        "VQF_ALLOW_PIPES=1 first"
    )
    assert "VQF_ALLOW_PIPES=1" in worded(lambda: streamed(root=command))
    assert not (tmp_path / "ran").exists()
    monkeypatch.setenv(remote_io.ALLOW_PIPES_VARIABLE, "1")
    assert red(streamed(command, train_images=6).split("train").item(0, 0)) == 0
    assert (tmp_path / "ran").exists()


def test_urls_that_nothing_opens():
    assert worded(lambda: streamed("s3://bucket/{0..3}.tar")).startswith(
        "data.train=s3://bucket/0.tar: webdataset cannot open s3: (only ais, file, ftps, gs, hf, htgs, http, https, "
        "pipe, "
    )
    split = streamed("http://127.0.0.1:9/a.tar", max_unreadable=1).split("train")  # nobody listens there
    assert worded(lambda: split.item(0, 0)).startswith("data.train: no image in 1 shards can be read")


def test_no_password_or_token_is_shown(caplog):
    url = "http://user:secret@127.0.0.1:9/a/b.tar?token=hidden"
    split = streamed(url, max_unreadable=1).split("train")
    message = worded(lambda: split.item(0, 0))
    assert "http://127.0.0.1:9/a/b.tar" in message and "http://127.0.0.1:9/a/b.tar" in caplog.text
    assert not any(word in message + caplog.text for word in ("secret", "hidden"))
    assert redact_url("pipe:cat a b") == "pipe:cat a b"


@pytest.mark.parametrize(("name", "expected"), [("C:/a.tar", False), ("a:b.tar", False), ("file:a", True)])
def test_what_is_a_url(name, expected):
    assert is_url(name) is expected


class Stalling(Handler):
    """A server that sends half a shard, then nothing."""

    def do_GET(self):
        path = self.translate_path(self.path)
        if not path.endswith(".tar"):
            return super().do_GET()
        content = Path(path).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        self.connection.settimeout(60)
        with contextlib.suppress(OSError):
            self.connection.recv(1)
        return None


def test_a_server_that_stops_talking_does_not_hold_up_the_end(tmp_path, serve):
    shard(tmp_path / "train-00.tar", range(60), cls=lambda each: "1")
    split = streamed("train-00.tar", root=serve(tmp_path, Stalling)).split("train")
    assert red(split.item(0, 0)) == 0
    began = time.monotonic()
    split.replay = None  # as when the run ends: the command is stopped, not waited for
    assert time.monotonic() - began < 10


def test_worker_processes_do_not_go_on_with_the_file_of_their_parent(serve, folder):
    split = streamed(root=serve(folder)).split("train")
    assert red(split.item(0, 0)) == 0
    assert of_batches(keyed_batches(split, [[(0, i)] for i in range(1, 40)], workers=1)) == list(range(1, 40))
    assert reds(split.item(0, i) for i in range(1, 40)) == list(range(1, 40))
    again = pickle.loads(pickle.dumps(split))
    assert reds(again.item(0, i) for i in range(5)) == list(range(5))


def test_the_fingerprint_follows_what_is_known(folder, serve):
    def fingerprint(part="train", **options):
        validation = {"validation": "validation-00.tar", "validation_images": 5}
        return streamed(root=f"file:{folder}", **{**validation, **options}).split(part).fingerprint

    different = [fingerprint(), fingerprint("validation"), fingerprint(size=8), fingerprint(crop="random")]
    different += [fingerprint(train_images=119), fingerprint(train="train-{01..19}.tar"), fingerprint(classes=0)]
    assert len(set(different)) == len(different)
    assert fingerprint() == fingerprint(seed=3) == fingerprint(buffer=7)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tokenizer_is_trained_on_a_stream(folder, serve, tmp_path, workers, caplog):
    words = [*(each for each in TINY if not each.startswith("data=")), "data=shards", f"workers={workers}"]
    words += [f"data.root={serve(folder)}", "data.train='train-{00..19}.tar'", "data.train_images=120"]
    words += ["data.validation=validation-00.tar", "data.validation_images=5", "evaluate.count=5"]
    Stage1(compose(*words, "steps=4"), tmp_path).run()
    with caplog.at_level(logging.INFO, "vqf"):
        Stage1(compose(*words, "resume=true"), tmp_path).run()
    assert "data.train: a stream has no exact order; the resumed run reads it in another order" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == set(range(1, 7))
    assert all(torch.isfinite(torch.tensor(line["l1"])) for line in lines if "l1" in line)


@given(st.integers(1, 12), st.lists(st.integers(0, 30), max_size=12))
def test_a_replayable_stream_equals_a_list(length, indices):
    begun = []
    raws = [RawSample(str(i), b"", None) for i in range(length)]
    tape = ReplayableStream(lambda: begun.append(1) or iter(raws))
    for index in indices:
        found = list(tape.iter_from(index))
        if tape.length is None or index < length or found:
            assert found == raws[index % length :] or (index >= length and found == [])
        assert tape.length == length
    if indices == sorted(indices) and max(indices, default=0) < length:
        assert len(begun) == 1 + sum(a != a for a in indices)
