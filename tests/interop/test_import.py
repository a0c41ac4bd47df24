"""`pipeline=import`: a checkpoint written by the reference's classes becomes a run that other pipelines accept."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer

import vqf
from tests.interop.composing import run
from tests.interop.models import images, run_vqgan
from tests.parity.comparisons import difference
from tests.parity.mapping import from_vq_model
from tests.parity.peers import NOMINAL, lightning_step, spread_codes, taming_lpips, vq_model
from vqf.errors import UserError
from vqf.models.tokenizer import Tokenizer
from vqf.runs.checkpoint import latest_checkpoint
from vqf.runs.load import load_tokenizer

GAME = {"disc_start": 3, "disc_weight": 0.6, "disc_ndf": 8, "disc_num_layers": 2}
STEPS = 4
TINY = ["batch_size=4", "evaluate.count=4"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Optimizer], Path]:
    """The reference's model after four steps of both optimizers, the optimizers, and a file as Lightning writes it."""
    torch.manual_seed(0)
    taming_lpips()
    target = "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
    model = vq_model(torch.float32, {"target": target, "params": GAME})
    spread_codes(model, images())
    model.learning_rate = 1e-3
    optimizers, _ = model.configure_optimizers()
    for _ in range(STEPS):
        lightning_step(model, optimizers, {"image": torch.rand(2, 3, NOMINAL, NOMINAL) * 2 - 1})
    path = tmp_path_factory.mktemp("logs") / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    torch.save(
        {
            "epoch": 0,
            "global_step": STEPS,
            "pytorch-lightning_version": "1.0.8",
            "state_dict": model.state_dict(),
            "optimizer_states": [each.state_dict() for each in optimizers],
            "lr_schedulers": [],
        },
        path,
    )
    (path.parent.parent / "configs").mkdir()
    yaml = {"model": {"params": {"ddconfig": {"resolution": NOMINAL}, "lossconfig": {"params": GAME}}}}
    OmegaConf.save(yaml, path.parent.parent / "configs" / "2021-project.yaml")
    return model.eval(), optimizers, path


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(20):
        pixels = torch.randint(256, (NOMINAL, NOMINAL, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def imported(trained: Any, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "imported"
    data = ["data=folder", f"data.root={image_folder}", "data.validation_fraction=0.4"]
    prior = ["model.prior.layers=1", "model.prior.heads=2", "model.prior.dim=16"]
    run(folder, "pipeline=import", f"path={trained[2]}", *data, *prior)
    return folder


def test_vqf_load_gives_the_reference_s_codes_and_images(trained: Any, imported: Path) -> None:
    tokenizer = vqf.load(imported)
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.image_size == (NOMINAL, NOMINAL)
    x = images()
    with torch.no_grad():
        indices, expected = run_vqgan(trained[0], x)
        assert torch.equal(tokenizer.encode(x), indices)
        assert difference(tokenizer.decode(indices), expected.clamp(-1, 1)) <= 1e-5


def test_the_run_has_config_and_report(trained: Any, imported: Path) -> None:
    found = latest_checkpoint(imported)
    assert found is not None
    assert (found.kind, found.step, found.state["image_size"]) == ("stage1", STEPS, [NOMINAL, NOMINAL])
    model = found.config.model
    assert model.discriminator == {"name": "patchgan", "channels": 8, "layers": 2, "norm": "batch"}
    assert (model.adversary.name, model.adversary.start, model.adversary.weight) == ("hinge", 3, 0.6)
    assert found.config.pipeline.name == "stage1" and "path" not in found.config
    assert found.config.optimizer.name == "adam" and found.config.optimizer.lr == 1e-3
    assert list(found.config.optimizer.betas) == [0.5, 0.9]
    text = (imported / "import-report.txt").read_text()
    for name in trained[0].state_dict():
        assert f"\n  {name}" in text
    assert "loss.perceptual_loss.lin0.model.1.weight: LPIPS: calibrated heads" in text
    assert "unknown" not in text


def optimizer_over(module: nn.Module, saved: dict[str, Any]) -> torch.optim.Adam:
    optimizer = torch.optim.Adam(module.parameters())
    optimizer.load_state_dict(saved)
    return optimizer


def test_both_optimizers_take_the_step_that_the_reference_s_take(trained: Any, imported: Path) -> None:
    """The same gradients by name on both sides: every weight ends where the reference's does."""
    theirs, optimizers, path = trained
    theirs.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    found = latest_checkpoint(imported)
    assert found is not None
    tokenizer = load_tokenizer(found).requires_grad_(True)
    judge = theirs.loss.discriminator
    ours = type(judge)(ndf=8, n_layers=2)
    ours.load_state_dict(
        {name.removeprefix("discriminator."): each for name, each in found.load_weights("discriminator").items()}
    )
    saved = found.load_optimizers()["optimizers"]
    pairs = [(tokenizer, "model", optimizers[0]), (ours, "discriminator", optimizers[1])]
    named = {**from_vq_model(dict(theirs.named_parameters())), **dict(judge.named_parameters())}
    for module, name, optimizer in pairs:
        mine = optimizer_over(module, saved[name])
        for key, parameter in module.named_parameters():
            named[key].grad = torch.randn_like(parameter)
            parameter.grad = named[key].grad.clone()
        before = {key: each.detach().clone() for key, each in module.named_parameters()}
        mine.step(), optimizer.step()
        for key, parameter in module.named_parameters():
            assert not torch.equal(parameter, before[key]), key
            torch.testing.assert_close(parameter, named[key], rtol=0, atol=1e-7, msg=key)


def test_training_continues(imported: Path, image_folder: Path) -> None:
    """By the presets in the run's folder, as `--config-dir` finds them."""
    conf = f"hydra.searchpath=[file://{imported}/conf]"
    words = ["experiment=imported", "model/loss=[l1]", f"steps={STEPS + 2}", "checkpoint.keep=0"]
    data = ["data=folder", f"data.root={image_folder}", "data.validation_fraction=0.4"]
    run(imported, conf, *words, *data, *TINY, f"resume={imported}", "log.every=1")
    found = latest_checkpoint(imported)
    assert found is not None
    assert found.step == STEPS + 2
    state = found.load_optimizers()["optimizers"]
    assert {float(each["step"]) for each in state["model"]["state"].values()} == {STEPS + 2}
    assert {float(each["step"]) for each in state["discriminator"]["state"].values()} == {STEPS + 2}
    assert state["model"]["param_groups"][0]["lr"] == 1e-3


def test_reconstruct_and_stage2_accept_it(imported: Path, tmp_path: Path) -> None:
    run(tmp_path / "r", "pipeline=reconstruct", f"run={imported}", "count=2", *TINY)
    assert len(list((tmp_path / "r" / "reconstructions").glob("*.png"))) == 2
    run(tmp_path / "s", "pipeline=stage2", f"run={imported}", "steps=1", *TINY)
    run(tmp_path / "t", "pipeline=sample", f"run={tmp_path / 's'}", "count=2")
    assert len(list((tmp_path / "t" / "samples").glob("*.png"))) == 2


def weights_only(path: Path, **changes: Tensor) -> Path:
    model = vq_model(torch.float32)
    torch.save({"state_dict": {**model.state_dict(), **changes}}, path)
    return path


def test_missing_optimizers_and_discriminator_are_initialized(tmp_path: Path) -> None:
    path = weights_only(tmp_path / "weights.ckpt")
    run(tmp_path / "run", "pipeline=import", f"path={path}")
    text = (tmp_path / "run" / "import-report.txt").read_text()
    assert "no optimizer state of the tokenizer in the file; a resumed run initializes it" in text
    assert "no discriminator in the checkpoint: the run has a newly initialized one" in text
    assert "256 px assumed, give image_size= if it is another" in text
    found = latest_checkpoint(tmp_path / "run")
    assert found is not None
    assert found.step == 0 and found.has_weights("discriminator")
    assert found.load_optimizers()["optimizers"]["model"]["state"] == {}


def test_names_that_ddp_has_wrapped(tmp_path: Path) -> None:
    state = vq_model(torch.float32).state_dict()
    torch.save({"state_dict": {f"module.{name}": each for name, each in state.items()}}, tmp_path / "last.ckpt")
    run(tmp_path / "run", "pipeline=import", f"path={tmp_path / 'last.ckpt'}")
    tokenizer: Any = vqf.load(tmp_path / "run")
    assert torch.equal(tokenizer.last_layer.weight, state["decoder.conv_out.weight"])


def test_nonfinite_tensors_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bias = torch.tensor([0.0, float("nan"), 0.0])
    path = weights_only(tmp_path / "last.ckpt", **{"decoder.conv_out.bias": bias})
    run(tmp_path / "run", "pipeline=import", f"path={path}")
    (line,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert line.startswith("'decoder.last_layer.bias': not all values are finite")


@pytest.mark.parametrize("taken", ["run", "run-condition"])
def test_a_run_is_not_mixed_with_another(taken: str, tmp_path: Path) -> None:
    first, second = (weights_only(tmp_path / name) for name in ("first.ckpt", "second.ckpt"))
    run(tmp_path / taken, "pipeline=import", f"path={first}")
    before = {path: path.read_bytes() for path in (tmp_path / taken).rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=rf"run_dir=.*{taken}: holds a run at step 0; .* another run_dir for a new run"):
        run(tmp_path / "run", "pipeline=import", f"path={second}")
    assert {path: path.read_bytes() for path in (tmp_path / taken).rglob("*") if path.is_file()} == before


def test_ema_weights_are_imported(tmp_path: Path) -> None:
    state = vq_model(torch.float32).state_dict()
    path = tmp_path / "last.ckpt"
    average = {f"model_ema.{name.replace('.', '')}": each + 1 for name, each in state.items()}
    torch.save({"state_dict": {**state, **average, "model_ema.decay": torch.tensor(0.9)}}, path)
    run(tmp_path / "run", "pipeline=import", "model=vqvae", f"path={path}")
    found = latest_checkpoint(tmp_path / "run")
    assert found is not None
    assert found.config.ema == pytest.approx(0.9)
    assert not found.has_weights("discriminator")
    tokenizer = vqf.load(tmp_path / "run")
    assert isinstance(tokenizer, Tokenizer)
    assert torch.equal(tokenizer.quantizer.codebook.weight, state["quantize.embedding.weight"] + 1)


def test_an_unknown_discriminator_is_skipped_by_name(tmp_path: Path) -> None:
    path = weights_only(tmp_path / "last.ckpt", **{"loss.discriminator.main.0.weight": torch.zeros(8, 3, 4, 4)})
    run(tmp_path / "run", "pipeline=import", f"path={path}")
    text = (tmp_path / "run" / "import-report.txt").read_text()
    assert "loss.discriminator.main.0.weight: a discriminator other than PatchGAN with batch norm" in text


def test_a_foreign_optimizer_state_is_skipped_with_a_reason(trained: Any, tmp_path: Path) -> None:
    whole = torch.load(trained[2], weights_only=True)
    whole["optimizer_states"][0]["param_groups"][0]["params"].pop()
    whole["optimizer_states"][1]["state"][0]["exp_avg"] = torch.zeros(1)
    torch.save(whole, tmp_path / "last.ckpt")
    run(tmp_path / "run", "pipeline=import", f"path={tmp_path / 'last.ckpt'}")
    text = (tmp_path / "run" / "import-report.txt").read_text()
    assert "the optimizer state of the tokenizer is skipped: it is of" in text
    assert "the optimizer state of the discriminator is skipped: its 'exp_avg' of" in text


@pytest.mark.parametrize(("version", "step"), [("1.0.8", 40), ("1.5.10", 40), ("1.6.0", 20), ("1.9.4", 20), (None, 40)])
def test_steps_are_counted_as_that_version_of_lightning_did(
    trained: Any, version: str, step: int, tmp_path: Path
) -> None:
    from vqf.interop.import_model import import_checkpoint

    whole = torch.load(trained[2], weights_only=True)
    torch.save({**whole, "global_step": 40, "pytorch-lightning_version": version}, tmp_path / "last.ckpt")
    assert import_checkpoint(tmp_path / "last.ckpt").step == step


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["path=nowhere.ckpt"], "path=nowhere.ckpt: no such file or folder"),
        ([], "path: pipeline 'import' .* needs a value; give path=..."),
        (["path=x", "source=tamming"], "unknown value 'tamming'. Did you mean 'taming'"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", "pipeline=import", *words)
