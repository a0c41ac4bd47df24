"""Gradients of whole models in float32: how far each side is from the truth, the reference's classes in float64."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parity import test_gpt, test_patchgan, test_stage2, test_tokenizer
from tests.parity.comparisons import compares, gradients
from tests.parity.mapping import from_gpt, from_vq_model
from tests.parity.peers import play
from tests.parity.stages import Sides, watch
from vqf.batch import Batch

RELATIVE = "gradients beside the truth"

float32_only = pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"])

Named = Mapping[str, Tensor]


def three(
    ours: nn.Module, theirs: nn.Module, loss: Callable[[Any, torch.dtype], Tensor], named: Callable[..., Any]
) -> Any:
    """Return the gradients of `loss(module, dtype)`: ours and theirs in float32, and theirs in float64."""
    loss(ours, torch.float32).backward()
    loss(theirs, torch.float32).backward()
    found = gradients(ours), named(gradients(theirs))
    theirs.zero_grad(set_to_none=True)
    loss(theirs.double(), torch.float64).backward()
    return *found, named(gradients(theirs))


@compares("`Tokenizer`", "taming `VQModel`", RELATIVE)
@float32_only
def test_tokenizer_of_an_image(dtype: torch.dtype, record_rounding: Any) -> None:
    """The pass of `Tokenizer` above, 16 x 16 pixels; all weights as one vector, by its length."""
    theirs, ours, images = test_tokenizer.pair(dtype)
    pull = torch.randn_like(images)

    def loss(module: Any, dtype: torch.dtype) -> Tensor:
        out = module(images.to(dtype))
        decoded, codebook = out if isinstance(out, tuple) else (out.reconstructions, out.quantized.loss)
        return (decoded * pull.to(dtype)).sum() + codebook

    record_rounding(*three(ours, theirs, loss, from_vq_model))


@compares("prior `gpt`", "taming `GPT`", RELATIVE)
@float32_only
def test_gpt_with_a_prefix(dtype: torch.dtype, record_rounding: Any) -> None:
    """Tokens behind a prefix whose tokens see each other, as above."""
    theirs, ours = test_gpt.pair(dtype, unmasked=test_gpt.M)
    tokens, prefix = test_gpt.sequences()

    def loss(module: Any, dtype: torch.dtype) -> Tensor:
        if module is ours:
            return module.loss(tokens, prefix)
        logits = module(torch.cat((prefix, tokens), dim=1)[:, :-1])[0][:, test_gpt.M - 1 :]
        return nn.functional.cross_entropy(logits.reshape(-1, test_gpt.V), tokens.reshape(-1))

    record_rounding(*three(ours, theirs, loss, from_gpt))


@compares("discriminator `patchgan`", "taming `NLayerDiscriminator`", RELATIVE)
@float32_only
def test_patchgan_with_three_layers(dtype: torch.dtype, record_rounding: Any) -> None:
    """Batch statistics, 64 x 48 pixels."""
    theirs, ours = test_patchgan.pair(dtype, layers=3)
    images = torch.randn(3, 3, 64, 48)
    pull = torch.randn_like(ours(images))
    record_rounding(
        *three(ours, theirs, lambda each, dtype: (each(images.to(dtype)) * pull.to(dtype)).sum(), lambda found: found)
    )


@compares("pipeline `stage1`", "taming `VQModel.training_step`", "gradients of both players beside the truth")
@float32_only
def test_a_step_of_stage1(dtype: torch.dtype, vgg_file: str, record_rounding: Any) -> None:
    """One step of both players with the adaptive weight, as above."""
    found = []
    for each in (dtype, torch.float64):
        torch.manual_seed(0)
        sides = Sides(vgg_file, dtype=each)
        images, (optimizers, _) = sides.images(), sides.theirs.configure_optimizers()
        for player in (0, 1):
            play(sides.theirs, optimizers, {"image": images}, player)
        judged = {f"loss.discriminator.{name}": g for name, g in gradients(sides.theirs.loss.discriminator).items()}
        trained = {name: p.grad for name, p in sides.theirs.named_parameters() if not name.startswith("loss.")}
        found.append({**from_vq_model(trained), **judged})
    torch.manual_seed(0)
    sides = Sides(vgg_file, dtype=dtype)
    at_tokenizer = watch(sides.ours.model, sides.ours.optimizers["model"])
    at_discriminator = watch(sides.discriminator, sides.ours.optimizers["discriminator"])
    sides.step(0, sides.images())
    ours = {**at_tokenizer, **{f"loss.discriminator.{name}": each for name, each in at_discriminator.items()}}
    record_rounding(ours, *found)


@compares("pipeline `stage2` with a label", "taming `shared_step`, `Labelator`", RELATIVE)
@float32_only
def test_a_step_of_stage2(dtype: torch.dtype, record_rounding: Any) -> None:
    """The class as a token in front, as above."""
    model, labels, images = (
        test_stage2.reference(test_stage2.LABELLED, 1, dtype),
        torch.tensor([0, 3, 4, 3]),
        test_stage2.make_images(dtype),
    )
    stage = test_stage2.stage_of(model, "model/conditioner=label")
    batch = Batch(tokens=stage.generator.tokenizer.encode_tokens(images), labels=labels)
    stage.model.loss(batch.tokens, stage.generator.conditioner(batch)).backward()
    found = []
    for each in (dtype, torch.float64):
        model.to(each).zero_grad(set_to_none=True)
        model.shared_step({"image": images.to(each), "condition": labels}, 0).backward()
        found.append(from_gpt(gradients(model.transformer)))
    record_rounding(gradients(stage.model), *found)
