"""New runs that start from the weights of others: what is loaded, what starts anew, what stays frozen."""

import logging
from pathlib import Path

import pytest
import torch

from tests.support.composing import compose
from tests.training.test_trainer import TINY, KilledError, interrupt_after, lines, weights
from vqf.errors import UserError
from vqf.pipelines.stage1 import Stage1
from vqf.pipelines.stage2 import Stage2
from vqf.runs.checkpoint import Checkpoint, latest_checkpoint

FAST = [*TINY, "evaluate.every=100", "checkpoint.every=100"]
EMA_CODES = ["model/quantizer=ema", "model.quantizer.dim=4", "model.quantizer.codebook_size=16"]


def newest(run: Path) -> Checkpoint:
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    return checkpoint


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Stage1(compose(*FAST, *EMA_CODES), folder).run()
    return folder


@pytest.fixture(scope="module")
def prior(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prior")
    Stage2(compose(*FAST, "pipeline=stage2", f"run={tokenizer}"), folder).run()
    return folder


@pytest.fixture(autouse=True)
def typed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The dotted keys that the command line sets, since there is no Hydra job; they precede those of a run."""
    keys: set[str] = set()
    monkeypatch.setattr("vqf.config.inherit.cli_keys", lambda: list(keys))
    return keys


def finetune(source: Path, folder: Path, *words: str, **options: object) -> Path:
    Stage1(compose(*FAST, f"run={source}", *words), folder, **options).run()  # type: ignore[arg-type]
    return folder


def test_no_step_leaves_the_averaged_weights_and_the_discriminator(tokenizer: Path, tmp_path: Path) -> None:
    run = finetune(tokenizer, tmp_path / "kept", "steps=0")
    source, result = newest(tokenizer), newest(run)
    for name, theirs in (("model", "ema"), ("ema", "ema"), ("discriminator", "discriminator")):
        before, after = source.load_weights(theirs), result.load_weights(name)
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before), name
    anew = newest(finetune(tokenizer, tmp_path / "anew", "steps=0", keep_discriminator=False))
    before, after = source.load_weights("discriminator"), anew.load_weights("discriminator")
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_a_run_continues_on_other_images_of_another_size(
    tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, typed: set[str]
) -> None:
    typed.update({"image_size", "data", "data.crops"})
    with caplog.at_level(logging.INFO, "vqf"):
        run = finetune(tokenizer, tmp_path, "image_size=32", "data=earth", "data.crops=16")
    assert newest(run).image_size == (32, 32)
    (line,) = [each for each in caplog.text.splitlines() if "ema.safetensors: " in each]
    loaded, total = [int(word) for word in line.rpartition(":")[2].split() if word.isdigit()]
    assert loaded == total > 50


def test_the_decoder_alone_learns_behind_a_frozen_codebook(tokenizer: Path, tmp_path: Path) -> None:
    """Not even the averages of an EMA codebook move."""
    frozen = ("encoder", "quant_conv", "quantizer")
    run = finetune(tokenizer, tmp_path, "steps=4", freeze=frozen)
    before, after = newest(tokenizer).load_weights("ema"), newest(run).load_weights("model")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved and all(key.startswith(("decoder.", "post_quant_conv.")) for key in moved)
    assert {key.split(".")[0] for key in moved} == {"decoder", "post_quant_conv"}


def test_what_does_not_fit_is_said_tensor_by_tensor(
    tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, typed: set[str]
) -> None:
    typed.add("model.quantizer.codebook_size")
    with caplog.at_level(logging.INFO, "vqf"):
        finetune(tokenizer, tmp_path, "steps=1", "model.quantizer.codebook_size=24")
    messages = [each.getMessage().strip() for each in caplog.records]
    assert "quantizer.codebook: 16 x 4 in the file, 24 x 4 here, so it starts anew" in messages


def test_a_fine_tuned_run_resumes_to_the_bit(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["checkpoint.every=2", "evaluate.every=2"]
    whole = finetune(tokenizer, tmp_path / "whole", *words, freeze=("encoder",))
    with monkeypatch.context() as patch:
        interrupt_after(3, patch, "stage1")
        with pytest.raises(KilledError):
            finetune(tokenizer, tmp_path / "cut", *words, freeze=("encoder",))
    finetune(tokenizer, tmp_path / "cut", *words, "resume=true", freeze=("encoder",))
    assert lines(tmp_path / "cut") == lines(whole)
    assert weights(tmp_path / "cut") == weights(whole)


def test_a_prior_starts_from_another_and_learns_new_classes(
    tokenizer: Path, prior: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, typed: set[str]
) -> None:
    words = [*FAST, "pipeline=stage2", f"run={tokenizer}", "steps=0"]
    Stage2(compose(*words), tmp_path / "same", init=str(prior)).run()
    before, after = newest(prior).load_weights("ema"), newest(tmp_path / "same").load_weights("model")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert "another tokenizer" not in caplog.text
    typed.add("model.conditioner.label.dropout")
    with caplog.at_level(logging.INFO, "vqf"):
        new = [*words, "model.conditioner.label.dropout=0.1"]  # one more class
        Stage2(compose(*new), tmp_path / "new", init=str(prior)).run()
    after = newest(tmp_path / "new").load_weights("model")
    assert {key for key in before if not torch.equal(before[key], after[key])} == {"prefix_embedding.weight"}
    assert "prefix_embedding.weight: 8 x 16 in the file, 9 x 16 here, so it starts anew" in caplog.text


def test_a_prior_of_another_tokenizer_is_said(
    tokenizer: Path, prior: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = finetune(tokenizer, tmp_path / "other", "steps=1")
    words = [*FAST, "pipeline=stage2", f"run={other}", "steps=1"]
    Stage2(compose(*words), tmp_path / "prior", init=str(prior), freeze=("blocks",)).run()
    assert f"init={prior}: its prior was trained on the tokens of another tokenizer" in caplog.text
    before, after = newest(prior).load_weights("ema"), newest(tmp_path / "prior").load_weights("model")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved and not any(key.startswith("blocks") for key in moved)


def test_a_wrong_source_is_one_line(tokenizer: Path, prior: Path, tmp_path: Path, typed: set[str]) -> None:
    with pytest.raises(UserError, match=r"^run=.*nowhere"):
        finetune(tmp_path / "nowhere", tmp_path / "a")
    typed.add("model.prior")
    words = [*(each for each in FAST if "model.prior" not in each), "pipeline=stage2", f"run={tokenizer}"]
    words += ["model/prior=llama", "model.prior.layers=1", "model.prior.dim=24", "model.prior.heads=2"]
    with pytest.raises(UserError, match=r"none of its \d+ tensors fits this model"):
        Stage2(compose(*words), tmp_path / "b", init=str(prior)).run()
