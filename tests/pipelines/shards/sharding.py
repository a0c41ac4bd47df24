"""Shards to write and read in tests."""

import json

from tests.data.packing import png
from tests.support.composing import compose
from vqf.pipelines.shard import Shard
from vqf.registry import build


def make_images(root):
    """Make twenty training and three validation images in two classes; the red of one is its number."""
    for i in range(23):
        path = root / ("train" if i < 20 else "val") / ("ant", "bee")[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png((i, 0, 0), (40, 30)))
    return root


def configured(root, *words, workers=0):
    return compose("data=folder", f"data.root={root}", "image_size=16", f"workers={workers}", "data.flip=false", *words)


def written(config, out, **options):
    """Write shards and return their manifest."""
    Shard(config, out.parent, out=str(out), **options).run()
    return json.loads((out / "manifest.json").read_text())


def read(out, part="train", **options):
    data = build("data", {"name": "shards", "root": str(out), "flip": False, **options}, image_size=16, seed=0)
    return data, data.split(part)


def files(out):
    """Return the files of a folder but for sidecar indexes and the lock."""
    return {each.name: each.read_bytes() for each in out.iterdir() if each.suffix != ".idx" and each.name != ".lock"}
