"""Training stage 1: the reference's own `training_step` and losses against vqf's `TokenizerTask`."""

from typing import Any

import pytest
import torch

from tests.parity.comparisons import compares, gradients
from tests.parity.mapping import from_vq_model
from tests.parity.peers import lightning_step, play, shared_step
from tests.parity.stages import LR, Sides, configure, watch

TERMS = {  # vqf's name: the reference's
    "quantizer_loss": "quant_loss",
    "lpips": "p_loss",
    "g_loss": "g_loss",
    "gan_weight": "d_weight",
    "d_loss": "disc_loss",
    "logits_real": "logits_real",
    "logits_fake": "logits_fake",
}


@compares("pipeline `stage1`", "taming `VQModel.training_step`", "each term of the losses", "adaptive weight")
@compares(
    "pipeline `stage1`",
    "taming `VQModel.training_step`",
    *("gradients of the autoencoder", "gradients of the discriminator"),
    exact=True,
)
@pytest.mark.parametrize("objective", ["hinge", "vanilla"])
def test_gradients(dtype: torch.dtype, objective: str, vgg_file: str, record: Any) -> None:
    """One step of both players, hinge and vanilla, with the adaptive weight: the reference's two `autograd.grad`
    through the whole graph, vqf's cut at the reconstruction. Every parameter of both players."""
    sides = Sides(vgg_file, f"model/adversary={objective}", dtype=dtype, disc_loss=objective)
    images, theirs = sides.images(), sides.theirs
    optimizers, _ = theirs.configure_optimizers()
    for player in (0, 1):
        play(theirs, optimizers, {"image": images}, player)
    at_tokenizer = watch(sides.ours.model, sides.ours.optimizers["model"])
    at_discriminator = watch(sides.discriminator, sides.ours.optimizers["discriminator"])
    terms = sides.step(0, images)

    logged = {name.removeprefix("train/"): each for name, each in theirs.logged.items()}
    expected = {ours: logged[name] for ours, name in TERMS.items()} | {"l1": logged["nll_loss"] - logged["p_loss"]}
    record("each term of the losses", {name: terms[name].to(dtype) for name in expected}, expected)
    record("adaptive weight", terms["gan_weight"].to(dtype), logged["d_weight"])
    trained = {name: each.grad for name, each in theirs.named_parameters() if not name.startswith("loss.")}
    record("gradients of the autoencoder", at_tokenizer, from_vq_model(trained))
    record("gradients of the discriminator", at_discriminator, gradients(theirs.loss.discriminator))


@compares(
    "pipeline `stage1`",
    "taming modules, one forward for both players",
    "weights and running statistics after three steps",
    "Adam's averages after three steps",
)
def test_shared_forward(vgg_file: str, record: Any) -> None:
    """Three steps of both players on three batches. vqf shows the discriminator the reconstruction that the autoencoder
    was just trained on, so the reference's modules are driven by a loop that does so too."""
    sides = Sides(vgg_file)
    optimizers, _ = sides.theirs.configure_optimizers()
    for step in range(3):
        images = sides.images()
        shared_step(sides.theirs, optimizers, images)
        sides.step(step, images)
    record("weights and running statistics after three steps", *sides.weights())
    record("Adam's averages after three steps", *sides.moments(optimizers))


@compares(
    "pipeline `stage1` with `refresh_fakes`",
    "taming `VQModel.training_step`",
    "weights and running statistics after three steps",
    "Adam's averages after three steps",
)
def test_second_forward(vgg_file: str, record: Any) -> None:
    """Three steps exactly as the reference takes them: for the discriminator it runs the autoencoder again, with the
    weights that were just updated."""
    sides = Sides(vgg_file, "model.adversary.refresh_fakes=true")
    optimizers, _ = sides.theirs.configure_optimizers()
    for step in range(3):
        images = sides.images()
        lightning_step(sides.theirs, optimizers, {"image": images})
        sides.step(step, images)
    record("weights and running statistics after three steps", *sides.weights())
    record("Adam's averages after three steps", *sides.moments(optimizers))


@compares("pipeline `stage1`", "taming `VQModel.training_step` before `disc_start`", "weights of the autoencoder")
def test_before_the_discriminator_starts(vgg_file: str, record: Any) -> None:
    """Two steps before the start and the first of the game. Until then the reference computes the discriminator all the
    same: its weights stay, but its running statistics and its Adam's count of steps move, so that its first real steps
    have another length. vqf leaves it alone; the autoencoder is the same."""
    options = ("model.adversary.start=2", "model.adversary.refresh_fakes=true")
    sides = Sides(vgg_file, *options, disc_start=2)
    optimizers, _ = sides.theirs.configure_optimizers()
    before = {name: each.clone() for name, each in sides.discriminator.state_dict().items()}
    for step in range(3):
        images = sides.images()
        lightning_step(sides.theirs, optimizers, {"image": images})
        sides.step(step, images)
        if step == 1:
            published = sides.theirs.loss.discriminator.state_dict()
            for name, each in sides.discriminator.state_dict().items():
                assert torch.equal(each, before[name])
                assert torch.equal(published[name], each) == ("running" not in name and "num_batches" not in name)
    ours, theirs = sides.weights()
    record("weights of the autoencoder", *(_tokenizer(each) for each in (ours, theirs)))
    moved = (ours["discriminator.main.0.weight"] - before["main.0.weight"]).abs()
    published_moved = (theirs["discriminator.main.0.weight"] - before["main.0.weight"]).abs()
    assert moved.median().item() == pytest.approx(LR, rel=1e-4)  # Adam's first step
    third = (1 - 0.5) / (1 - 0.5**3) / ((1 - 0.9) / (1 - 0.9**3)) ** 0.5
    assert published_moved.median().item() == pytest.approx(third * LR, rel=1e-4)


def _tokenizer(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: each for name, each in weights.items() if not name.startswith("discriminator.")}


def test_which_weights_move(vgg_file: str) -> None:
    """Two Adams: encoder, decoder, codebook and both 1x1 convolutions; and the discriminator. The preset has the
    published betas and 4.5e-6 for every image of a batch of 12."""
    sides = Sides(vgg_file)
    published, _ = sides.theirs.configure_optimizers()
    modules = {"model": sides.ours.model, "discriminator": sides.discriminator}
    for (name, optimizer), expected in zip(sides.ours.optimizers.items(), published, strict=True):
        (ours,), (theirs,) = optimizer.param_groups, expected.param_groups
        assert {id(each) for each in ours["params"]} == {id(each) for each in modules[name].parameters()}
        assert sum(each.numel() for each in ours["params"]) == sum(each.numel() for each in theirs["params"])
        assert tuple(ours["betas"]) == theirs["betas"]
        assert all(ours[key] == theirs[key] for key in ("lr", "eps", "weight_decay", "amsgrad"))
    assert configure("model=vqgan").optimizer.lr == pytest.approx(12 * 4.5e-6)
