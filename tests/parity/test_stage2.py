"""Training stage 2: the reference's `Net2NetTransformer` on a frozen tokenizer against vqf's `PriorTask`."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parity.comparisons import compares, gradients
from tests.parity.mapping import from_gpt, from_vq_model
from tests.parity.peers import CODE_DIM, CODES, NOMINAL, SHAPE, spread_codes, stir, taming
from tests.parity.stages import ENGINE, LR, SMALL, configure
from vqf.batch import Batch
from vqf.models.tokenizer import Tokenizer, build_tokenizer
from vqf.runs.load import build_generator
from vqf.tokens.prefix import PrefixSpec
from vqf.training.prior_task import PriorTask, param_groups_weight_decay
from vqf.transformers.gpt import GPT

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16}
N, CLASSES = (NOMINAL // 4) ** 2, 5
LABELLED = {"target": "taming.modules.util.Labelator", "params": {"n_classes": CLASSES}}
OURS = [
    *("model=vqgan", "pipeline=stage2", "model/prior=gpt", *SMALL),
    *("model.prior.layers=2", "model.prior.heads=2", "model.prior.dim=16", "model.prior.shared_vocabulary=true"),
    f"optimizer.lr={LR}",
]


def reference(condition: Any, prefix: int, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """Build a Net2NetTransformer whose condition takes `prefix` tokens, with weights of its own, alike in any dtype."""
    nothing = {"target": "taming.modules.losses.vqperceptual.DummyLoss"}
    first = {"ddconfig": SHAPE, "lossconfig": nothing, "n_embed": CODES, "embed_dim": CODE_DIM}
    gpt = {"vocab_size": CODES, "block_size": prefix + N - 1, **SIZES}
    for name in ("models.vqgan", "modules.transformer.mingpt"):  # which it would import by itself, without our stubs
        taming(name)
    model = taming("models.cond_transformer").Net2NetTransformer(
        {"target": "taming.modules.transformer.mingpt.GPT", "params": gpt},
        {"target": "taming.models.vqgan.VQModel", "params": first},
        condition,
        **options,
    )
    model.get_xc = lambda batch: (batch["image"], batch["condition"])  # the original makes everything float32
    stir(model.first_stage_model)
    for parameter in model.transformer.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.double().train()
    spread_codes(model.first_stage_model, make_images())
    model.to(dtype)
    model.learning_rate = LR
    return model


def make_images(dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.rand(4, 3, NOMINAL, NOMINAL, dtype=torch.float64) * 2 - 1).to(dtype)


def tokenizer_of(model: Any) -> Tokenizer:
    ours = build_tokenizer(configure(*OURS).model, NOMINAL).to(dtype_of(model)).eval()
    ours.load_state_dict(from_vq_model(model.first_stage_model.state_dict()))
    return ours


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def stage_of(model: Any, *overrides: str) -> PriorTask:
    """Build vqf's stage 2 with the weights of a Net2NetTransformer."""
    config = configure(*OURS, *overrides)
    generator = build_generator(config, tokenizer_of(model), [str(i) for i in range(CLASSES)])
    stage = PriorTask(generator, None, {}, config, ENGINE)  # type: ignore[arg-type]
    stage.model.to(dtype_of(model)).load_state_dict(from_gpt(model.transformer.state_dict()))
    return stage


@compares("tokens of stage 2", "taming `encode_to_z`", "tokens of an image")
def test_tokens(dtype: torch.dtype, record: Any) -> None:
    """Codes of an image, row by row."""
    model = reference(LABELLED, 1, dtype)
    images = make_images(dtype)
    record("tokens of an image", tokenizer_of(model).encode_tokens(images), model.encode_to_z(images)[1])


@compares("pipeline `stage2` with a label", "taming `shared_step`, `Labelator`", "loss")
@compares("pipeline `stage2` with a label", "taming `shared_step`, `Labelator`", "gradients of all weights", exact=True)
def test_label(dtype: torch.dtype, record: Any) -> None:
    """The class as a token in front; class k is embedded like code k."""
    model, labels, images = reference(LABELLED, 1, dtype), torch.tensor([0, 3, 4, 3]), make_images(dtype)
    stage = stage_of(model, "model/conditioner=label")
    batch = Batch(tokens=stage.generator.tokenizer.encode_tokens(images), labels=labels)
    compare(model, {"image": images, "condition": labels}, stage, batch, record)


@compares("pipeline `stage2` without a condition", "taming `shared_step`, `SOSProvider`", "loss")
@compares(
    "pipeline `stage2` without a condition",
    "taming `shared_step`, `SOSProvider`",
    "gradients of all weights",
    exact=True,
)
def test_start_token(dtype: torch.dtype, record: Any) -> None:
    """A start token in front, which is embedded like code 0."""
    model, images = reference("__is_unconditional__", 1, dtype), make_images(dtype)
    stage = stage_of(model, "model/conditioner=none")
    batch = Batch(tokens=stage.generator.tokenizer.encode_tokens(images))
    compare(model, {"image": images, "condition": images}, stage, batch, record)


def compare(model: Any, published: dict[str, Tensor], stage: PriorTask, batch: Batch, record: Any) -> None:
    loss = model.shared_step(published, 0)
    loss.backward()
    prefix = stage.generator.conditioner(batch)
    found = stage.model.loss(batch.tokens, prefix)
    found.backward()
    record("loss", found, loss)
    record("gradients of all weights", gradients(stage.model), from_gpt(gradients(model.transformer)))


@compares("prior `gpt` with a spatial prefix", "taming `shared_step`, `__is_first_stage__`", "loss")
@compares(
    "prior `gpt` with a spatial prefix",
    "taming `shared_step`, `__is_first_stage__`",
    "gradients of all weights",
    exact=True,
)
def test_spatial_prefix(dtype: torch.dtype, record: Any) -> None:
    """A whole image as the condition: its codes, of the same tokenizer, in front of those of the image. The reference
    cannot do that as it comes, its indices are flat; it can with `sane_index_shape`."""
    model, images, conditions = reference("__is_first_stage__", N, dtype), make_images(dtype), make_images(dtype)
    batch = {"image": images, "condition": conditions}
    with pytest.raises(IndexError):
        model.shared_step(batch, 0)
    model.first_stage_model.quantize.sane_index_shape = True
    loss = model.shared_step(batch, 0)
    loss.backward()
    tokenizer = tokenizer_of(model)
    ours = GPT(tokenizer.layout, PrefixSpec(CODES, N), layers=2, heads=2, dim=16, shared_vocabulary=True).to(dtype)
    ours.load_state_dict(from_gpt(model.transformer.state_dict()))
    found = ours.loss(tokenizer.encode_tokens(images), tokenizer.encode_tokens(conditions))
    found.backward()
    record("loss", found, loss)
    record("gradients of all weights", gradients(ours), from_gpt(gradients(model.transformer)))


@compares("pipeline `stage2`", "taming `training_step`, `configure_optimizers`", "weights after three steps")
def test_three_steps(record: Any) -> None:
    """Three steps of AdamW from the preset, with its weight decay on linear layers alone, on labelled tokens."""
    model = reference(LABELLED, 1)
    optimizer, stage = model.configure_optimizers(), stage_of(model, "model/conditioner=label")
    for step in range(3):
        images, labels = make_images(), torch.randint(CLASSES, (4,))
        optimizer.zero_grad()
        model.training_step({"image": images, "condition": labels}, 0).backward()
        optimizer.step()
        stage.step(step, Batch(tokens=stage.generator.tokenizer.encode_tokens(images), labels=labels))
    record("weights after three steps", stage.model.state_dict(), from_gpt(model.transformer.state_dict()))


def test_which_weights_decay() -> None:
    """Weights of linear layers, and nothing else; the preset has the published learning rate's companions."""
    model = reference(LABELLED, 1)
    stage = stage_of(model, "model/conditioner=label")
    names = {id(each): name for name, each in stage.model.named_parameters()}
    published = {id(each): name for name, each in model.transformer.named_parameters()}
    expected = {
        group["weight_decay"]: set(from_gpt({published[id(each)]: each for each in group["params"]}))
        for group in model.configure_optimizers().param_groups
    }
    groups = stage.optimizers["model"].param_groups
    assert {group["weight_decay"]: {names[id(each)] for each in group["params"]} for group in groups} == expected
    assert sum(len(group["params"]) for group in param_groups_weight_decay(stage.model)) == len(names)
    for group, other in zip(groups, model.configure_optimizers().param_groups, strict=True):
        assert {key: group[key] for key in ("lr", "eps")} == {key: other[key] for key in ("lr", "eps")}
        assert tuple(group["betas"]) == other["betas"]
