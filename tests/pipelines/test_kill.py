"""A run killed with SIGKILL at random moments, again and again, ends with the same results as one that was not."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.data.packing import pack, png
from vqf.runs.checkpoint import latest_checkpoint

STEPS, KILLS = 24, 20
ROOT = Path(__file__).parents[2]

# Everything with state: GAN, EMA codebook, LeCam's averages, EMA, schedule, micro-batches, augmentation.
WORDS = [
    "model=small",
    "image_size=16",
    "batch_size=8",
    "accumulate=2",
    f"steps={STEPS}",
    "ema=0.9",
    "clip=1.0",
    "optimizer.lr=1e-3",
    "schedule=cosine",
    "model.encoder.channels=8",
    "model.decoder.channels=8",
    "model/quantizer=ema",
    "model.quantizer.dim=4",
    "model.quantizer.codebook_size=16",
    "model/loss=[l1]",
    "model.discriminator.channels=8",
    "model.adversary.start=5",
    "+model/regularizer=[lecam]",
    "model/conditioner=[label]",
    "model.prior.layers=1",
    "model.prior.heads=2",
    "model.prior.dim=16",
    "logger=[images]",
    "metric=[psnr,usage]",
    "evaluate.every=9",
    "log.every=1",
    "checkpoint.every=5",
    "checkpoint.keep=3",
    "checkpoint.best=psnr",
]
SECOND = ["pipeline=stage2", "checkpoint.best=nats_per_token", "tokens.augmentations=2"]


def images(folder: Path) -> dict[str, str]:
    """Write the same images as files and as tar shards; returns the root of each by data source."""
    for part, count in (("train", 40), ("val", 8)):
        members = []
        for i in range(count):
            content = png((i * 5 % 256, i * 11 % 256, 40 * (i % 5)), (18 + i % 3, 20))
            path = folder / "files" / part / f"class{i % 2}" / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            members += [(f"{i:03}.cls", str(i % 2).encode()), (f"{i:03}.png", content)]
        name = {"train": "train", "val": "validation"}[part]
        half = len(members) // 4 * 2
        pack(folder / "tars" / f"{name}-0.tar", members[:half])
        pack(folder / "tars" / f"{name}-1.tar", members[half:])
    return {"folder": str(folder / "files"), "shards": str(folder / "tars")}


def kill(folder: Path, jobs: list[dict[str, object]]) -> dict[str, list[str]]:
    """Run jobs, see `killing`; returns what each kill of a job interrupted."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.pipelines.killing", json.dumps(jobs), str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {each["name"]: each["killed"] for each in map(json.loads, done.stdout.splitlines())}


def outputs(run: Path) -> dict[str, object]:
    """The files of a finished run, without times and without its config, which names the folder."""
    checkpoint = latest_checkpoint(run)
    assert checkpoint and checkpoint.step == STEPS
    files = [*checkpoint.path.iterdir(), *(run / "images").iterdir()]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "log": [{key: value for key, value in line.items() if key != "time"} for line in lines],
        "optimizers": dict(flat(checkpoint.load_optimizers())),
        **{file.name: file.read_bytes() for file in files if file.suffix in (".safetensors", ".png")},
        "state": checkpoint.state,
    }


def flat(tree: object, key_path: str = "") -> Iterator[tuple[str, object]]:
    """Flatten nested containers, since equal ones may have different pickles."""
    if isinstance(tree, dict | list):
        for key, each in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from flat(each, f"{key_path}/{key}")
    else:
        yield key_path, (tree.dtype, tree.shape, tree.tolist()) if isinstance(tree, torch.Tensor) else tree


def compare(folder: Path, name: str) -> None:
    """Compare the outputs of the killed run with those of the uninterrupted one."""
    killed, uninterrupted = outputs(folder / name), outputs(folder / f"{name}-whole")
    assert killed.keys() == uninterrupted.keys()
    assert {"model.safetensors", "ema.safetensors"} < uninterrupted.keys()
    for key, value in uninterrupted.items():
        assert killed[key] == value, key
    steps = [line["step"] for line in uninterrupted["log"] if "loss" in line]  # type: ignore[attr-defined]
    assert steps == list(range(1, STEPS + 1))


def test_a_run_killed_three_times_has_the_same_results(tmp_path: Path) -> None:
    data = ["data=folder", f"data.root={images(tmp_path)['folder']}"]
    job = {"name": "run", "command": [*WORDS, *data], "steps": STEPS, "kills": 3, "seed": 1, "whole": False}
    assert len(kill(tmp_path, [job])["run"]) == 3
    compare(tmp_path, "run")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", ["folder", "shards"])
def test_runs_killed_twenty_times_have_the_same_results(tmp_path: Path, source: str, workers: int) -> None:
    data = [f"data={source}", f"data.root={images(tmp_path)[source]}", f"workers={workers}"]
    rest = {"steps": STEPS, "kills": KILLS, "whole": source == "folder" and workers == 0}
    first = {"name": "first", "command": [*WORDS, *data], "seed": workers, **rest}
    on = [*WORDS, *data, *SECOND, f"run={tmp_path / 'first-whole'}"]
    killed = kill(tmp_path, [first, {"name": "second", "command": on, "seed": 10 + workers, **rest}])
    for name, moments in killed.items():
        counts = Counter(each.split(" at ")[0] for each in moments)
        assert len(moments) == KILLS and 3 <= counts["save"] <= KILLS - 3, counts
        compare(tmp_path, name)
