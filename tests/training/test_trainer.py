"""The trainer: a resumed run equals an uninterrupted one bit for bit."""

import json
from pathlib import Path

import pytest
import torch

from tests.support.composing import compose
from vqf.errors import UserError
from vqf.pipelines.stage1 import Stage1
from vqf.pipelines.stage2 import Stage2
from vqf.runs.checkpoint import latest_checkpoint

TINY = [
    "model=small",
    "data=emoji",
    "image_size=16",
    "batch_size=8",
    "steps=6",
    "ema=0.9",
    "clip=1.0",
    "optimizer.lr=1e-3",
    "schedule=cosine",
    "model.encoder.channels=8",
    "model.decoder.channels=8",
    "model.quantizer.dim=4",
    "model.quantizer.codebook_size=16",
    "model/loss=[l1]",
    "model.discriminator.channels=8",
    "model.adversary.start=3",
    "model.prior.layers=1",
    "model.prior.heads=2",
    "model.prior.dim=16",
    "logger=[]",
    "metric=[psnr,usage]",
    "evaluate.count=16",
    "evaluate.samples=0",
    "log.every=1",
    "checkpoint.every=2",
    "checkpoint.keep=9",
]


def lines(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in (run / "metrics.jsonl").open()]


def weights(run: Path) -> dict[str, bytes]:
    found = latest_checkpoint(run)
    assert found
    return {f.name: f.read_bytes() for f in found.path.iterdir() if f.suffix == ".safetensors"}


class KilledError(Exception):
    """Stands for a process that ends here."""


def interrupt_after(steps: int, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    module = __import__(f"vqf.pipelines.{stage}", fromlist=["x"])
    cls = module.TokenizerTask if stage == "stage1" else module.PriorTask
    original = cls.step

    def step(self: object, number: int, batch: object) -> object:
        if number == steps:
            raise KilledError
        return original(self, number, batch)

    monkeypatch.setattr(cls, "step", step)


@pytest.mark.parametrize("at", [1, 3, 5])
def test_stage1_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    Stage1(compose(*TINY), uninterrupted).run()
    with monkeypatch.context() as patch:
        interrupt_after(at, patch, "stage1")
        with pytest.raises(KilledError):
            Stage1(compose(*TINY), resumed).run()
    torch.manual_seed(12345)  # another process, another state of the generator
    Stage1(compose(*TINY, "resume=true"), resumed).run()
    assert lines(resumed) == lines(uninterrupted)
    assert weights(resumed) == weights(uninterrupted)


def test_stage2_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tmp_path / "tokenizer"
    Stage1(compose(*TINY), tokenizer).run()
    options = [*TINY, "pipeline=stage2", f"run={tokenizer}"]
    Stage2(compose(*options), tmp_path / "uninterrupted").run()
    with monkeypatch.context() as patch:
        interrupt_after(3, patch, "stage2")
        with pytest.raises(KilledError):
            Stage2(compose(*options), tmp_path / "resumed").run()
    Stage2(compose(*options, "resume=true"), tmp_path / "resumed").run()
    assert lines(tmp_path / "resumed") == lines(tmp_path / "uninterrupted")
    assert weights(tmp_path / "resumed") == weights(tmp_path / "uninterrupted")


def test_a_non_finite_loss_stops_the_run_with_one_line(tmp_path: Path) -> None:
    words = r"^stage1, step \d: 'l1' is (nan|inf|-inf) \(.*loss.*too\); the newest checkpoint is kept\. Lower opt"
    with pytest.raises(UserError, match=words):
        Stage1(compose(*TINY, "optimizer.lr=1e30", "clip=null", "schedule=constant"), tmp_path).run()


def test_resuming_from_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no intact checkpoint there"):
        Stage1(compose(*TINY, f"resume={tmp_path}"), tmp_path / "run").run()
