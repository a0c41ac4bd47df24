"""What `vqf.protocols` promises of each kind, asked of every component that is registered."""

import copy
import math
import shutil
import tarfile
from dataclasses import FrozenInstanceError, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import tests.support.shelf  # noqa: F401  (components of every shape of tokens)
from tests.metrics.sets import Linear, gaussians
from tests.support.composing import compose
from tests.support.layouts import raster
from vqf import registry
from vqf.batch import Batch
from vqf.dataloading.splits import SPLITS
from vqf.distributed.engine import make_engine
from vqf.errors import UserError
from vqf.models.conditioning import ConditionerStack
from vqf.models.generator import Generator
from vqf.models.sample_request import check_pair
from vqf.models.tokenizer import Tokenizer
from vqf.options.typed_nodes import to_cli
from vqf.protocols import (
    Causal,
    DiscriminatorOutput,
    Embedded,
    ExpectsLogits,
    Layered,
    Masked,
    RaggedChunks,
    RaggedDecoding,
    Reconstruction,
    ScoredSamples,
    SetMetric,
    Updates,
    Windowed,
)
from vqf.registry import KINDS, component_names, components
from vqf.run import config_dir
from vqf.runs.load import build_generator
from vqf.tokens.layout import MAX_COUNTED, TokenLayout
from vqf.tokens.prefix import Prefix, PrefixSpec
from vqf.training.tokenizer_task import build_tokenizer_task

CODES = {"dim": 4, "codebook_size": 12}
CONV = {"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": [16]}
MAGVIT = {"channels": 8, "multipliers": [1, 2], "blocks": 1}
VIT = {"patch_size": 2, "width": 16, "layers": 1, "heads": 2}

# Options for components that need one to be built, or are large without. "{...}" names a fixture's file or folder.
TINY: dict[tuple[str, str], dict[str, Any]] = {
    ("encoder", "conv"): {"dim": 6, **CONV},
    ("decoder", "conv"): CONV,
    ("encoder", "magvit"): {"dim": 6, **MAGVIT},
    ("decoder", "magvit"): MAGVIT,
    ("encoder", "timm"): {"dim": 6, "network": "test_resnet", "stride": 2, "pretrained": False},
    ("encoder", "titok"): {"dim": 6, "num_latents": 5, **VIT},
    ("decoder", "titok"): VIT,
    ("encoder", "vit"): {"dim": 6, **VIT},
    ("decoder", "vit"): VIT,
    ("quantizer", "bsq"): {"dim": 5, "factors": [2, 3]},
    ("quantizer", "cosine"): CODES,
    ("quantizer", "ema"): CODES,
    ("quantizer", "fsq"): {"levels": [5, 4, 3], "factors": [2, 1]},
    ("quantizer", "gumbel"): {**CODES, "temperature_end": 0.1, "anneal_steps": 10},
    ("quantizer", "ibq"): CODES,
    ("quantizer", "lfq"): {"dim": 5, "factors": [2, 3]},
    ("quantizer", "multiscale"): {**CODES, "sizes": [1, 2, 4, 8], "phis": 2, "init": "latents"},
    ("quantizer", "product"): {"base": {"name": "vq", **CODES}, "groups": 2},
    ("quantizer", "residual"): {"base": {"name": "ema", **CODES}, "depth": 3, "shared": False, "dropout": 0.5},
    ("quantizer", "rotation"): CODES,
    ("quantizer", "simvq"): CODES,
    ("quantizer", "vq"): CODES,
    ("loss", "lpips"): {"weights": "{vgg}"},
    ("discriminator", "patchgan"): {"channels": 8, "layers": 2},
    ("conditioner", "spatial"): {"run": "somewhere"},
    ("prior", "gpt"): {"layers": 2, "heads": 2, "dim": 16},
    ("prior", "llama"): {"layers": 2, "heads": 2, "dim": 16, "multiple_of": 8},
    ("data", "folder"): {"root": "{images}"},
    ("data", "pairs"): {"root": "{pairs}"},
    ("data", "shard_pairs"): {"root": "{shard_pairs}"},
    ("data", "shards"): {"root": "{shards}"},
    ("data", "union"): {"parts": {"one": {"name": "emoji"}, "other": {"name": "emoji", "flip": True}}},
    ("metric", "lpips"): {"weights": "{vgg}"},
    ("metric", "is"): {"splits": 2},
    ("protocol", "gfid_adm"): {"reference": "reference.npz"},
    ("logger", "wandb"): {"mode": "disabled"},
    ("conditioner", "toy_embedding"): {},
    ("pipeline", "compare"): {"runs": "somewhere"},
    ("pipeline", "export"): {"path": "somewhere"},
    ("pipeline", "import"): {"path": "somewhere"},
}
PATHS = {"vgg": "vgg.safetensors", "images": "images", "pairs": "pairs", "shards": "shards"}
PATHS["shard_pairs"] = "shards"  # samples with condition maps, which `data=shards` ignores
MAX_PARAMETERS = 200_000  # trained ones; a larger component needs smaller options in the table
SIZE = 32  # pixels

every = {kind: pytest.mark.parametrize("name", component_names(kind)) for kind in KINDS}
every_conditioner = pytest.mark.parametrize("conditioner", component_names("conditioner"))
every_sampler = pytest.mark.parametrize("sampler", component_names("sampler"))


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files and folders for the table's options in braces: random weights of VGG16, images in two classes, shards."""
    from torchvision.models.vgg import cfgs, make_layers

    folder = tmp_path_factory.mktemp("contracts")
    torch.manual_seed(0)
    vgg = make_layers(cfgs["D"]).state_dict()
    save_file({f"features.{key}": value for key, value in vgg.items()}, folder / "vgg.safetensors")
    for i in range(24):
        path = folder / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (20 + i, 50 - i, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    for subfolder in ("images", "conditions"):
        shutil.copytree(folder / "images", folder / "pairs" / subfolder)
    (folder / "shards").mkdir()
    for split_name, first in (("train", 0), ("validation", 16)):
        with tarfile.open(folder / "shards" / f"{split_name}-000000.tar", "w:") as tar:
            for i in range(first, first + 8):
                for extension in ("png", "condition.png"):
                    tar.add(folder / "images" / f"class{i % 2}" / f"{i}.png", f"{i}.{extension}")
    return {f"{{{name}}}": str(folder / file) for name, file in PATHS.items()}


@pytest.fixture
def build(paths: dict[str, str]) -> Any:
    """Build a component with the table's options."""

    def built(kind: str, name: str, **wired: Any) -> Any:
        torch.manual_seed(0)
        options = {key: paths.get(str(value), value) for key, value in TINY.get((kind, name), {}).items()}
        component = registry.build(kind, {"name": name, **options}, **wired)
        if isinstance(component, nn.Module):
            count = sum(parameter.numel() for parameter in component.parameters() if parameter.requires_grad)
            assert count < MAX_PARAMETERS, (
                f"{kind} '{name}' has {count} parameters here: give it smaller options in TINY"
            )
        return component

    return built


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_images(count: int = 2, seed: int = 0, size: int = SIZE) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def is_number(value: Tensor) -> bool:
    return value.ndim == 0 and bool(value.isfinite())


def gradient(output: Tensor, source: Tensor) -> Tensor:
    """The gradient of a random linear function of `output`, at `source`."""
    (grad,) = torch.autograd.grad((output * noise(*output.shape, seed=9).to(output.dtype)).sum(), source)
    assert grad.isfinite().all()
    return grad


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_table_has_what_every_component_needs() -> None:
    registered = {(kind, each.name): each for kind in KINDS for each in components(kind)}
    assert TINY.keys() <= registered.keys(), "the table has a component that is not registered"
    for key, component in registered.items():
        needed = {name for name, parameter in component.options.items() if parameter.default is parameter.empty}
        assert needed <= TINY.get(key, {}).keys(), f"{component} cannot be built without options in TINY"


def test_every_kind_has_a_contract() -> None:
    assert [kind for kind in KINDS if not any(test.startswith(f"test_{kind}_") for test in globals())] == []


def latent_grid(coder: Any) -> tuple[int, int]:
    """Height and width of the latents of an image of `SIZE` pixels; of one without places, those of its encoder."""
    return (1, coder.num_latents) if coder.stride is None else (SIZE // coder.stride, SIZE // coder.stride)


@every["encoder"]
def test_encoder_contract(build: Any, name: str) -> None:
    encoder = build("encoder", name, in_channels=3, image_size=(SIZE, SIZE)).eval()
    images = make_images(3).requires_grad_()
    latents = encoder(images)
    assert latents.shape == (3, encoder.dim, *latent_grid(encoder))
    assert (gradient(latents, images).flatten(1).norm(dim=1) > 0).all()
    torch.testing.assert_close(encoder(images[1:2]), latents[1:2])


@every["decoder"]
def test_decoder_contract(build: Any, name: str) -> None:
    decoder = build("decoder", name, dim=6, out_channels=3, image_size=(SIZE, SIZE)).eval()
    grid = latent_grid(decoder if decoder.stride else build("encoder", name, in_channels=3, image_size=(SIZE, SIZE)))
    latents = noise(3, 6, *grid).requires_grad_()
    images = decoder(latents)
    assert images.shape == (3, 3, SIZE, SIZE)
    assert torch.equal(images, decoder.last_layer(decoder.features(latents)))
    assert isinstance(decoder.last_layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
    assert any(decoder.last_layer.weight is parameter for parameter in decoder.parameters())
    assert (gradient(images, latents).flatten(1).norm(dim=1) > 0).all()
    torch.testing.assert_close(decoder(latents[1:2]), images[1:2])


class IdentityCoder(nn.Module):
    """An encoder and decoder that returns its input."""

    dim, stride = 3, 1

    def forward(self, images: Tensor) -> Tensor:
        return images


SQUARE_ONLY = {"multiscale"}  # quantizers of latents of one size: 8 x 8


def latents_for(quantizer: Any, name: str, seed: int = 0) -> Tensor:
    return noise(4, quantizer.dim, *latents_grid(name), seed=seed)


def latents_grid(name: str) -> tuple[int, int]:
    return (8, 8) if name in SQUARE_ONLY else (5, 6)


def layout_for(quantizer: Any, name: str) -> TokenLayout:
    grid = latents_grid(name)
    return quantizer.layout(grid, 8) if isinstance(quantizer, Layered) else raster(grid, quantizer.vocab_size)


def trained(build: Any, name: str) -> Any:
    """A quantizer after three training batches, in eval mode."""
    quantizer = build("quantizer", name)
    for seed in range(3):
        quantizer(latents_for(quantizer, name, seed))
        if isinstance(quantizer, Updates):
            assert all(is_number(value) for value in quantizer.update().values())
    return quantizer.eval()


@every["quantizer"]
@pytest.mark.parametrize("training", [True, False])
def test_quantizer_gives_codes_a_loss_and_a_gradient(build: Any, name: str, training: bool) -> None:
    quantizer = trained(build, name).train(training)
    z = latents_for(quantizer, name).requires_grad_()
    q, layout = quantizer(z), layout_for(quantizer, name)
    assert q.latents.shape == z.shape and q.latents.dtype == z.dtype
    assert q.indices.dtype == torch.int64 and quantizer.vocab_size == layout.vocab_size
    tokens = layout.flatten(q.indices)
    assert tokens.shape == (4, layout.length) and torch.equal(layout.unflatten(tokens), q.indices)
    assert q.indices.min() >= 0
    assert (layout.by_codebook(tokens) < torch.tensor(layout.vocab_sizes)).all()
    assert is_number(q.loss)
    assert all(is_number(value) and not value.requires_grad for value in q.stats.values())
    assert (gradient(q.latents, z).norm(dim=1) > 0).all()


@every["quantizer"]
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quantizer_looks_up_in_eval_mode_what_it_gave(build: Any, name: str, dtype: torch.dtype) -> None:
    quantizer = trained(build, name).to(dtype)
    z = latents_for(quantizer, name, 5).to(dtype)
    q = quantizer(z)
    assert q.latents.dtype == q.loss.dtype == dtype
    assert torch.equal(quantizer.lookup(q.indices), q.latents)
    assert torch.equal(quantizer(z).indices, q.indices)
    assert torch.equal(quantizer(z[1:2]).indices, q.indices[1:2])
    layout = layout_for(quantizer, name)
    if layout.codebooks == len(layout.scales) == 1 and quantizer.vocab_size <= MAX_COUNTED:
        every_code = torch.arange(quantizer.vocab_size).view(1, 1, -1)
        assert quantizer.lookup(every_code).shape == (1, quantizer.dim, 1, quantizer.vocab_size)


@every["quantizer"]
def test_quantizer_looks_up_the_first_scales_or_codebooks(build: Any, name: str) -> None:
    """Each one more changes the latents, and brings them nearer to what was quantized."""
    quantizer = trained(build, name)
    if not isinstance(quantizer, Layered):
        return  # nothing is promised
    z, layout = latents_for(quantizer, name, 5), layout_for(quantizer, name)
    indices = quantizer(z).indices
    if len(layout.scales) > 1:
        ends = torch.tensor(layout.groups()).cumsum(0).tolist()
        coarse = [quantizer.lookup(indices[:, :end]) for end in ends]
    else:
        assert layout.codebooks > 1, "give it options in TINY with which it has several"
        coarse = [quantizer.lookup(indices[..., :k]) for k in range(1, layout.codebooks + 1)]
    assert all(each.shape == z.shape for each in coarse)
    assert torch.equal(coarse[-1], quantizer.lookup(indices))
    assert all(not torch.equal(first, second) for first, second in pairwise(coarse))


@every["quantizer"]
def test_quantizer_keeps_its_state(build: Any, name: str) -> None:
    quantizer = trained(build, name)
    before = copy.deepcopy(quantizer.state_dict())
    z = latents_for(quantizer, name, 5)
    with torch.no_grad():
        q = quantizer(z)
    assert same(quantizer.state_dict(), before)
    other = build("quantizer", name).eval()
    other.load_state_dict(before)
    assert torch.equal(other(z).indices, q.indices) and torch.equal(other(z).latents, q.latents)
    torch.manual_seed(1)
    expected = quantizer.train()(z)
    torch.manual_seed(1)
    resumed = other.train()(z)
    assert torch.equal(expected.indices, resumed.indices) and torch.equal(expected.loss, resumed.loss)
    assert same(quantizer.state_dict(), other.state_dict())


@every["quantizer"]
def test_quantizer_searches_in_float32_under_autocast(build: Any, name: str) -> None:
    quantizer, images = trained(build, name), make_images(size=max(latents_grid(name)))
    size = (images.shape[2], images.shape[3])
    tokenizer = Tokenizer(IdentityCoder(), quantizer, IdentityCoder(), size).eval()  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        q = tokenizer.quantize(images)
        latents = tokenizer.quant_conv(images)
    assert latents.dtype == torch.bfloat16
    expected = tokenizer.quantizer(latents.float())
    assert torch.equal(q.indices, expected.indices) and torch.equal(q.latents, expected.latents)


@every["loss"]
def test_loss_contract(build: Any, name: str) -> None:
    loss, images = build("loss", name), make_images()
    assert isinstance(loss.weight, float)
    equal = images.clone()
    if isinstance(loss, ExpectsLogits):  # reconstructions are logits of maps of 0 and 1
        images = (images > 0).float()
        equal = images * 40 - 20
    equal.requires_grad_()
    nothing = loss(equal, images)
    assert is_number(nothing) and 0 <= float(nothing.detach()) < 1e-6
    gradient(nothing, equal)
    other = make_images(seed=1).requires_grad_()
    something = loss(other, images)
    assert is_number(something) and float(something.detach()) > 1e-3
    (downhill,) = torch.autograd.grad(-something, other)
    assert (downhill.flatten(1).norm(dim=1) > 0).all()
    nearer = other + 0.1 * something * downhill / downhill.square().sum()
    assert float(loss(nearer, images).detach()) < float(something.detach())


@every["discriminator"]
def test_discriminator_contract(build: Any, name: str) -> None:
    discriminator = build("discriminator", name, in_channels=3, image_size=(SIZE, SIZE))
    images = make_images(3).requires_grad_()
    logits = discriminator(images)
    assert len(logits) == 3 and logits.isfinite().all()
    assert (gradient(logits, images).flatten(1).norm(dim=1) > 0).all()


@every["adversary"]
def test_adversary_contract(build: Any, name: str) -> None:
    adversary = build("adversary", name, steps=100)
    assert isinstance(adversary.start_step, int) and 0 <= adversary.start_step <= 100
    assert isinstance(adversary.refresh_fakes, bool)
    ramp = [adversary.weight_at(step) for step in range(100)]
    assert ramp == sorted(ramp) and 0 <= ramp[0] and ramp[-1] <= 1
    assert not any(ramp[: adversary.start_step]) and ramp[-1] > 0
    logits = noise(4, 1, 3, 3)
    gaps = (-0.4, 0, 0.4)  # at most 1 apart, the distance of the targets of least squares
    judged = [float(adversary.discriminator_loss(logits + gap, logits - gap)) for gap in gaps]
    assert judged[0] > judged[1] > judged[2]
    fooling = [float(adversary.generator_loss(logits + gap)) for gap in gaps]
    assert fooling[0] > fooling[1] > fooling[2]
    for value in (adversary.discriminator_loss(logits, -logits), adversary.generator_loss(logits)):
        assert is_number(value)
    for first, second in ((noise(5), noise(5, seed=1)), (noise(5), torch.zeros(5)), (torch.zeros(5), noise(5))):
        weight = adversary.adaptive_weight(first, second)
        assert is_number(weight) and weight >= 0


@every["regularizer"]
def test_regularizer_contract(build: Any, name: str) -> None:
    regularizer = build("regularizer", name)
    assert isinstance(regularizer.weight, float)
    discriminator = build("discriminator", "patchgan", in_channels=3, image_size=(SIZE, SIZE))
    for step in range(3):
        real, fake = discriminator(torch.cat([make_images(), make_images(seed=1)])).chunk(2)
        term = regularizer(DiscriminatorOutput(discriminator, make_images(), real, fake, step))
        assert is_number(term) and term >= 0
        if step == 0:
            grads = torch.autograd.grad(term, list(discriminator.parameters()), allow_unused=True)
            assert any(grad is not None and grad.isfinite().all() and grad.norm() > 0 for grad in grads)
    fresh = build("regularizer", name)
    fresh.load_state_dict(regularizer.state_dict())
    output = DiscriminatorOutput(discriminator, make_images(), real.detach(), fake.detach(), 3)
    assert torch.equal(fresh(output), regularizer(output))


def a_batch(count: int = 4) -> Batch:
    return Batch(
        images=make_images(count),
        labels=torch.arange(count) % 3,
        masks=torch.ones(count, 1, SIZE, SIZE),
        tokens=torch.arange(12).expand(count, 12),
        conditions=make_images(count, seed=7),
        crop_boxes=torch.tensor([0.25, 0.0, 0.5, 0.5]).expand(count, 4),
    )


CELL = 4  # pixels per token and side


class Brightness:
    """A tokenizer without weights: the index of a cell is its brightness."""

    layout, channels = raster((SIZE // CELL, SIZE // CELL), 9, CELL), 3

    def encode(self, images: Tensor) -> Tensor:
        gray = torch.nn.functional.avg_pool2d(images.mean(1), CELL)
        return ((gray + 1) / 2 * 9).long().clamp(0, 8)

    def decode(self, indices: Tensor) -> Tensor:
        gray = indices.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2) / 9 * 2 - 1
        return gray[:, None].expand(-1, 3, -1, -1)

    def to_rgb(self, images: Tensor) -> Tensor:
        return images


def a_conditioner(build: Any, name: str) -> Any:
    wired = {"num_classes": 3, "layout": Brightness.layout, "tokenizer": Brightness()}
    return build("conditioner", name, open_tokenizer=lambda _: Brightness(), **wired)


@every["conditioner"]
def test_conditioner_contract(build: Any, name: str) -> None:
    conditioner = a_conditioner(build, name)
    for training in (True, False):
        if isinstance(conditioner, nn.Module):
            conditioner.train(training)
        prefix = conditioner(a_batch())
        if isinstance(conditioner, Embedded):
            assert prefix.shape == (4, conditioner.length, conditioner.embedding_dim) and prefix.isfinite().all()
            assert conditioner.vocab_size == 0
        else:
            assert prefix.shape == (4, conditioner.length) and prefix.dtype == torch.int64
            assert prefix.min() >= 0 and prefix.max() < conditioner.vocab_size
    assert torch.equal(conditioner(a_batch()), prefix)
    assert torch.equal(conditioner(a_batch(2)), prefix[:2])


@every["conditioner"]
def test_a_prepared_condition_gives_the_same_prefix_and_is_cropped_to_windows(build: Any, name: str) -> None:
    conditioner = ConditionerStack({name: a_conditioner(build, name)}).eval()
    batch = a_batch()
    prepared = conditioner.prepare(batch)
    assert equal(conditioner(prepared), conditioner(batch))
    full = prepared.window((0, 0), (8, 8), (8, 8))
    assert equal(conditioner(full), conditioner(batch))
    wide = replace(batch, images=make_images(4).repeat(1, 1, 1, 2), conditions=make_images(4, 7).repeat(1, 1, 1, 2))
    for left in (0, 8):  # both halves are the same image, so that only coordinates may differ
        half = conditioner(conditioner.prepare(wide).window((0, left), (8, 8), (8, 16)))
        assert name == "coordinates" or equal(half, conditioner(batch))
        assert half.ids.shape == (4, conditioner.spec.length) and half.ids.max() < conditioner.spec.vocab_size


def equal(first: Prefix, second: Prefix) -> bool:
    if first.embeddings is not None and second.embeddings is not None:
        return torch.equal(first.ids, second.ids) and torch.equal(first.embeddings, second.embeddings)
    return torch.equal(first.ids, second.ids) and first.embeddings is second.embeddings


@every["prior"]
@every_conditioner
@every_sampler
def test_every_prior_samples_with_every_conditioner_and_sampler(
    build: Any, name: str, conditioner: str, sampler: str
) -> None:
    """On a wider grid, if the sampler can, and again with another seed; a pair that does not fit is one line."""
    stack = ConditionerStack({conditioner: a_conditioner(build, conditioner)}).eval()
    grid = (SIZE // CELL, SIZE // CELL)
    prior = build("prior", name, layout=raster(grid, V, CELL), prefix=stack.spec, quantizer=None).eval()
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.3)
    built_sampler = build("sampler", sampler)
    if not isinstance(prior, built_sampler.draws):
        with pytest.raises(UserError, match=f"sampler={sampler}: .*; choose sampler="):
            check_pair(built_sampler, prior, (sampler, name))
        return
    generator = Generator(FakeTokenizer(grid), stack, prior, built_sampler, ["a", "b", "c"])  # type: ignore[arg-type]
    wide = isinstance(built_sampler, Windowed)
    shape = (grid[0], grid[1] + 2) if wide else grid
    layout = raster(shape, V, CELL)
    batch = replace(a_batch(2), tokens=None, images=make_images(2).repeat(1, 1, 1, 2)[..., : CELL * shape[1]])
    batch = replace(batch, conditions=batch.images, masks=None)
    tokens = generator.sample_tokens(batch, seed=1, layout=layout)
    assert tokens.shape == (2, shape[0] * shape[1]) and 0 <= tokens.min() and tokens.max() < V
    alone = generator.sample_tokens(batch.map(lambda each: each[1:]), seed=1, first=1, layout=layout)
    assert torch.equal(alone, tokens[1:])
    assert not torch.equal(generator.sample_tokens(batch, seed=2, layout=layout), tokens)
    if built_sampler.keeps_known:
        known = torch.where(torch.arange(layout.length) % 3 > 0, tokens, -1)
        kept = generator.sample_tokens(batch, seed=2, layout=layout, known=known)
        assert torch.equal(kept[known >= 0], tokens[known >= 0]) and kept.min() >= 0


COPIED, SQUARE = 16, (4, 4)  # vocabulary and grid of a condition map whose tokens are those of the image


def least_nats_without_positions(tokens: Tensor) -> float:
    """Nats per token if the counts of the tokens are known, but not their positions: log(N! / prod n_v!) / N."""
    counts = torch.nn.functional.one_hot(tokens, COPIED).sum(1).double()
    return float((math.lgamma(tokens.shape[1] + 1) - (counts + 1).lgamma().sum(1)).mean()) / tokens.shape[1]


@every["prior"]
def test_a_prior_copies_a_condition_map_token_by_token(name: str) -> None:
    """It learns which token of the prefix is at the same position: its loss is far below that without positions."""
    torch.manual_seed(0)
    positions = [(float(i), float(j)) for i in range(SQUARE[0]) for j in range(SQUARE[1])]
    small = {"layers": 2, "heads": 4, "dim": 32, "dropout": 0.0, "multiple_of": 8}
    options = {key: value for key, value in small.items() if key in registry.find_component("prior", name).options}
    wired = {"layout": raster(SQUARE, COPIED), "prefix": PrefixSpec(COPIED, 16, positions), "quantizer": None}
    prior = registry.build("prior", {"name": name, **options}, **wired)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=4e-3)
    for _ in range(250):
        maps = torch.randint(COPIED, (32, 16))
        optimizer.zero_grad()
        prior.loss(maps, maps).backward()
        optimizer.step()
    maps = torch.randint(COPIED, (256, 16))
    assert isinstance(prior, Causal | Masked)
    assert prior.eval().loss(maps, maps).item() < least_nats_without_positions(maps) / 4


class FakeTokenizer(nn.Module):
    """The attributes of a tokenizer that a generator reads to sample tokens."""

    channels = 3

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.layout, self.weight = raster(grid, V, CELL), nn.Parameter(torch.zeros(1))


V, GRID, P, M = 11, (3, 4), 5, 2  # vocabulary and grid of the tokens, vocabulary and length of the prefix
N = GRID[0] * GRID[1]


LAYOUT = raster(GRID, V)
LAYOUTS = {
    "raster": LAYOUT,
    "codebooks": TokenLayout(((2, 3),), (7, V), 8),
    "scales": TokenLayout(((1, 1), (2, 2), (3, 3)), (V,), 8),
    "no places": TokenLayout(((1, 6),), (V,), None),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def a_prior(build: Any, name: str, layout: TokenLayout = LAYOUT) -> Any:
    prefix = PrefixSpec(P, M, [None, (1.0, 1.5)])
    prior = build("prior", name, layout=layout, prefix=prefix, quantizer=None).eval()
    for parameter in prior.parameters():  # large, so that every input matters
        nn.init.normal_(parameter, std=0.3)
    return prior


def sequences(count: int = 5, layout: TokenLayout = LAYOUT) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = torch.tensor(layout.vocab_sizes).repeat(layout.length // layout.codebooks)
    tokens = torch.randint(V, (count, layout.length), generator=generator) % sizes
    return tokens, torch.randint(P, (count, M), generator=generator)


@every["prior"]
@every_layout
def test_prior_contract(build: Any, name: str, layout: TokenLayout) -> None:
    prior, (tokens, prefix) = a_prior(build, name, layout), sequences(layout=layout)
    assert prior.layout == layout
    assert isinstance(prior, Causal | Masked)
    loss = prior.loss(tokens, prefix)
    assert is_number(loss)
    if prior.likelihood:
        nats = -prior(tokens, prefix).log_softmax(-1).gather(-1, tokens[..., None]).mean()
        torch.testing.assert_close(loss, nats)
    grads = torch.autograd.grad(loss, [param for param in prior.parameters() if param.requires_grad], allow_unused=True)
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    prior.train()
    assert is_number(prior.loss(tokens, prefix))


def beyond_vocabulary(layout: TokenLayout) -> Tensor:
    """Which of the logits (T, V) belong to no code."""
    sizes = torch.tensor(layout.vocab_sizes).repeat(layout.length // layout.codebooks)
    return torch.arange(layout.vocab_size) >= sizes[:, None]


@every["prior"]
@every_layout
def test_causal_prior_sees_earlier_groups_alone_with_a_cache_as_without(
    build: Any, name: str, layout: TokenLayout
) -> None:
    prior, (tokens, prefix) = a_prior(build, name, layout), sequences(layout=layout)
    if not isinstance(prior, Causal):
        return  # nothing is promised
    assert sum(prior.groups) == layout.length
    with torch.no_grad():
        expected = prior(tokens, prefix)
        assert expected.shape == (5, layout.length, layout.vocab_size)
        assert torch.equal(expected.isneginf(), beyond_vocabulary(layout).expand_as(expected))
        logits, cache = prior.prefill(prefix)
        start = 0
        for group in prior.groups:
            end = start + group
            unknown = torch.cat([tokens[:, :start], torch.full((5, group), -1)], dim=1)
            torch.testing.assert_close(logits, expected[:, start:end], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(prior(unknown, prefix)[:, start:], logits, rtol=1e-4, atol=1e-5)
            if end < layout.length:
                logits = prior.decode(tokens[:, start:end], cache)
            start = end


@every["prior"]
@every_layout
def test_masked_prior_sees_known_tokens_on_both_sides(build: Any, name: str, layout: TokenLayout) -> None:
    prior, (tokens, prefix) = a_prior(build, name, layout), sequences(layout=layout)
    if not isinstance(prior, Masked):
        return  # nothing is promised
    middle, last = layout.length // 2, layout.length - 1
    unknown = tokens.clone()
    unknown[:, middle] = -1
    with torch.no_grad():
        logits = prior.predict(unknown, prefix)
        assert torch.equal(logits.isneginf(), beyond_vocabulary(layout).expand_as(logits))
        for other in (0, last):
            changed = unknown.clone()
            changed[:, other] = (changed[:, other] + 1) % min(layout.vocab_sizes)
            assert not torch.equal(prior.predict(changed, prefix)[:, middle], logits[:, middle])
            changed[:, other] = -1
            for code in (0, int(unknown[0, other])):
                shown = torch.where(changed < 0, code, changed)
                masked, told = (prior.predict(each, prefix)[:, middle] for each in (changed, shown))
                assert not torch.equal(masked, told), "an unknown token is no code"


@every["prior"]
def test_prior_reads_a_prefix_of_embeddings_and_ids(build: Any, name: str) -> None:
    parts = {each: a_conditioner(build, each) for each in ("label", "toy_embedding")}
    stack, (tokens, _) = ConditionerStack(parts).eval(), sequences(3)
    prior = build("prior", name, layout=LAYOUT, prefix=stack.spec, quantizer=None).eval()
    for parameter in prior.parameters():
        nn.init.normal_(parameter, std=0.3)
    losses = []
    for labels in ([0, 1, 2], [1, 1, 2]):
        prefix = stack(Batch(labels=torch.tensor(labels)))
        for each in (prefix, Prefix(torch.zeros_like(prefix.ids).where(prefix.ids >= 0, -1), prefix.embeddings)):
            torch.manual_seed(0)
            losses.append(float(prior.loss(tokens, each).detach()))
    assert len(set(losses)) == 4, "both parts of the prefix matter"


@every["prior"]
def test_prior_decodes_ragged_chunks_as_full_sequences(build: Any, name: str) -> None:
    """Passes over three of five sequences, each by a random number of positions: the logits are those of one pass."""
    prior, (tokens, prefix) = a_prior(build, name), sequences()
    if not isinstance(prior, RaggedDecoding):
        return  # nothing is promised
    assert isinstance(prior, Causal)
    rng, read, size = np.random.default_rng(0), dict.fromkeys(range(5), 0), M + N - 1
    cache, ids = prior.allocate_cache(7), torch.cat([prefix, tokens], dim=1)
    with torch.no_grad():
        expected = prior(tokens, prefix)
        while left := [b for b in read if read[b] < size]:
            sequence = rng.permutation(left)[:3].tolist()
            ends = [int(rng.integers(max(read[b] + 1, M), size + 1)) for b in sequence]
            cells = [(k, b, n) for k, b in enumerate(sequence) for n in range(read[b], ends[k])]
            chunk_indices, rows, positions = torch.tensor(cells).T
            counts = torch.tensor([end - read[b] for b, end in zip(sequence, ends, strict=True)])
            slots = torch.tensor([6 - b for b in sequence])
            chunks = RaggedChunks(
                ids[rows, positions], positions, chunk_indices, counts.cumsum(0) - 1, slots, max(counts), max(ends)
            )
            logits = prior.decode_chunks(chunks, cache)
            for k, (b, end) in enumerate(zip(sequence, ends, strict=True)):
                torch.testing.assert_close(logits[k], expected[b, end - M], rtol=1e-4, atol=1e-5)
                read[b] = end


def sampler_for(prior: Any) -> str:
    return "autoregressive" if isinstance(prior, Causal) else "toy_masked"


@every["sampler"]
def test_sampler_contract(build: Any, name: str) -> None:
    sampler = build("sampler", name)
    assert sampler.draws in (Causal, Masked)
    prior, prefix = a_prior(build, "gpt" if sampler.draws is Causal else "toy_masked"), sequences()[1]
    tokens = sampler(prior, prefix, LAYOUT, seed=1)
    assert tokens.shape == (5, N) and tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < V
    assert torch.equal(sampler(prior, prefix, LAYOUT, seed=1), tokens)
    assert torch.equal(sampler(prior, prefix[3:], LAYOUT, seed=1, first=3), tokens[3:])
    assert not torch.equal(sampler(prior, prefix, LAYOUT, seed=2), tokens)


@every["scorer"]
def test_scorer_contract(build: Any, name: str) -> None:
    """A score for each image, independent of the others."""
    scorer, prior, (tokens, prefix) = build("scorer", name), a_prior(build, "gpt"), sequences(3)
    labels, classes = torch.tensor([5, 0, 999]), [str(i) for i in range(1000)]
    scores = scorer(ScoredSamples(make_images(3), tokens, prior, prefix, labels, classes))
    assert scores.shape == (3,) and scores.isfinite().all() and not scores.requires_grad
    last = ScoredSamples(make_images(3)[2:], tokens[2:], prior, prefix[2:], labels[2:], classes)
    torch.testing.assert_close(scorer(last), scores[2:], rtol=1e-4, atol=1e-5)


@every["data"]
@pytest.mark.parametrize("part", ["train", "validation"])
def test_data_contract(build: Any, name: str, part: str) -> None:
    data, again = (build("data", name, image_size=16, seed=0) for _ in range(2))
    split = data.split(part)
    assert len(split) > 0
    assert isinstance(split.fingerprint, str) and split.fingerprint == again.split(part).fingerprint
    assert split.fingerprint != build("data", name, image_size=24, seed=0).split(part).fingerprint
    assert data.split("train").fingerprint != data.split("validation").fingerprint
    for epoch, index in ((0, 0), (3, len(split) - 1)):
        sample, other = split.item(epoch, index), again.split(part).item(epoch, index)
        assert sample.image.shape == (3, 16, 16) and sample.image.dtype == torch.float32
        assert sample.image.min() >= -1 and sample.image.max() <= 1
        assert (sample.label is None) == (len(data.classes) == 0)
        assert sample.label is None or 0 <= sample.label < len(data.classes)
        assert torch.equal(sample.image, other.image) and sample.label == other.label
        if sample.mask is not None and other.mask is not None:
            assert sample.mask.shape == (1, 16, 16) and 0 <= sample.mask.min() and sample.mask.max() <= 1
            assert torch.equal(sample.mask, other.mask)
        if sample.condition is not None and other.condition is not None:
            assert sample.condition.shape[1:] == (16, 16) and sample.condition.dtype == torch.float32
            assert sample.condition.min() >= -1 and sample.condition.max() <= 1
            assert torch.equal(sample.condition, other.condition)
        if sample.crop_box is not None and other.crop_box is not None:
            top, left, bottom, right = sample.crop_box.tolist()
            assert 0 <= top < bottom <= 1 and left != right
            assert torch.equal(sample.crop_box, other.crop_box)
    assert len(Batch.collate([split.item(0, i) for i in range(min(len(split), 3))])) == min(len(split), 3)


def measured(build: Any, name: str, spread: float, codes: int = 16, parts: int = 1) -> dict[str, float]:
    """A metric's numbers of reconstructions with noise of deviation `spread`, and `codes` codes, in `parts` batches."""
    metric = build("metric", name, layout=raster((4, 4), 16), device="cpu")
    images, masks = make_images(6) * 0.8, torch.ones(6, 1, SIZE, SIZE)
    wrong = (images + spread * noise(6, 3, SIZE, SIZE, seed=4)).clamp(-1, 1)
    tokens = torch.randint(codes, (6, 16), generator=torch.Generator().manual_seed(5))
    for part in zip(*(each.chunk(parts) for each in (images, wrong, tokens, masks)), strict=True):
        metric.update(Reconstruction(*part))
    return metric.compute()


def compared(metric: SetMetric, shift: float) -> dict[str, float]:
    """A set metric's numbers of a set that is shifted from the real one."""
    return metric.compare(gaussians(200), gaussians(200, shift, seed=1)).values


@every["metric"]
def test_metric_contract(build: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqf.metrics.set_metric.feature_network", lambda *_: Linear())
    metric = build("metric", name, layout=raster((4, 4), 16), device="cpu")
    if isinstance(metric, SetMetric):
        here, near, far = (compared(metric, shift) for shift in (0.0, 0.3, 1.0))
        assert here and here.keys() == near.keys() == far.keys()
        for key, best in here.items():
            assert math.isfinite(best)
            assert best > near[key] > far[key] or best < near[key] < far[key], key
        assert len(here) > 1 or measured(build, name, 0.3).keys() == {
            f"{metric.reconstruction_prefix}{key}" for key in here
        }
        return
    perfect, near, far = (measured(build, name, spread) for spread in (0.0, 0.05, 0.3))
    assert perfect and perfect.keys() == near.keys() == far.keys()
    few_codes = measured(build, name, 0.0, codes=3)
    for key, best in perfect.items():
        assert isinstance(best, float) and math.isfinite(best)
        of_codes = best == near[key] == far[key] and best != few_codes[key]
        assert of_codes or best > near[key] > far[key] or best < near[key] < far[key], key
    assert measured(build, name, 0.3, parts=3) == pytest.approx(far, rel=1e-5)


@every["protocol"]
def test_protocol_contract(build: Any, name: str) -> None:
    protocol = build("protocol", name)
    assert protocol.task in ("reconstruction", "generation")
    assert protocol.part in SPLITS
    assert protocol.count is None or protocol.count > 1
    assert (protocol.reference == "originals") <= (protocol.task == "reconstruction")
    options = registry.find_component("protocol", name).options
    assert {each.name for each in fields(protocol)} == options.keys(), "every line can be set"
    with pytest.raises(FrozenInstanceError):
        protocol.seed = 3


@every["logger"]
def test_logger_contract(build: Any, name: str, tmp_path: Path) -> None:
    logger = build("logger", name, run_dir=tmp_path, config=compose("model=small", "data=emoji"), subrun="")
    logger.scalars(1, {"loss": 0.5, "validation/psnr": 20.0})
    logger.images(1, "reconstructions", make_images(5))
    logger.scalars(2, {"loss": math.nan})
    logger.close()
    logger.close()


@every["optimizer"]
def test_optimizer_contract(build: Any, name: str) -> None:
    parameter = nn.Parameter(noise(4, 4))
    optimizer = build("optimizer", name, params=[parameter])
    before = float(parameter.detach().square().sum())
    parameter.square().sum().backward()
    optimizer.step()
    assert float(parameter.detach().square().sum()) < before
    fresh = build("optimizer", name, params=[nn.Parameter(noise(4, 4))])
    fresh.load_state_dict(optimizer.state_dict())
    groups = build("optimizer", name, params=[{"params": [nn.Parameter(noise(2))], "weight_decay": 0.25}]).param_groups
    assert groups[0]["weight_decay"] == 0.25


@every["schedule"]
def test_schedule_contract(build: Any, name: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(noise(2))], lr=0.5)
    schedule = build("schedule", name, optimizer=optimizer, steps=20)
    multipliers = []
    for _ in range(20):
        multipliers.append(optimizer.param_groups[0]["lr"] / 0.5)
        optimizer.step()
        schedule.step()
    assert all(math.isfinite(each) and 0 <= each <= 1 for each in multipliers)
    assert max(multipliers) > 0.5
    assert schedule.get_last_lr() == [optimizer.param_groups[0]["lr"]]


@every["pipeline"]
def test_pipeline_contract(name: str, tmp_path: Path) -> None:
    component = registry.find_component("pipeline", name)
    assert set(component.wired) == {"config", "run_dir"}
    words = OmegaConf.load(config_dir() / "config.yaml").keys()
    assert not component.options.keys() & words, "its options would be words that mean something else already"
    node = {"name": name, **TINY.get(("pipeline", name), {})}
    built = registry.build("pipeline", node, config=compose(), run_dir=tmp_path / "run")
    assert callable(built.run)
    assert not (tmp_path / "run").exists(), "nothing is written before the run"


def overrides(kind: str, name: str) -> list[str]:
    """Choose a component with the table's options on the command line."""
    options = TINY.get((kind, name), {}).items()
    return [f"model/{kind}={name}", *(f"model.{kind}.{key}={to_cli(value)}" for key, value in options)]


@every["quantizer"]
def test_every_quantizer_trains_a_tokenizer_and_its_tokens_train_every_prior(build: Any, name: str) -> None:
    chosen = [each for kind in ("encoder", "decoder") for each in overrides(kind, "conv")]
    config = compose(
        *("model=vqvae", "data=emoji", "image_size=16", "batch_size=4", "steps=10", "device=cpu", "optimizer.lr=1e-3"),
        "model/conditioner=label",
        *chosen,
        *overrides("quantizer", name),
    )
    data = registry.build("data", config.data, image_size=16, seed=0)
    stage = build_tokenizer_task(config, data, make_engine(config))
    batch = Batch.collate([data.split("train").item(0, i) for i in range(4)])
    before = copy.deepcopy(dict(stage.model.encoder.named_parameters()))  # type: ignore[attr-defined]
    log = stage.step(0, batch)
    assert all(is_number(value) for value in log.values())
    after = dict(stage.model.encoder.named_parameters())  # type: ignore[attr-defined]
    assert all(not torch.equal(before[key], after[key]) for key in before)

    tokenizer = stage.model.eval()
    tokens = tokenizer.encode_tokens(batch.images)
    torch.testing.assert_close(tokenizer.decode_tokens(tokens), tokenizer(batch.images).reconstructions.clamp(-1, 1))
    for prior in component_names("prior"):
        node = OmegaConf.create({"name": prior, **TINY.get(("prior", prior), {})})
        OmegaConf.update(config, "model.prior", node, merge=False)
        sampler = OmegaConf.create({"name": sampler_for(a_prior(build, prior))})
        generator = build_generator(config, tokenizer, data.classes, sampler=sampler)
        prefix = generator.conditioner(batch)
        optimizer = torch.optim.Adam(generator.prior.parameters(), lr=1e-3)  # type: ignore[attr-defined]
        losses = []
        for _ in range(2):
            torch.manual_seed(0)
            loss = generator.prior.loss(tokens, prefix)
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
        if generator.prior.likelihood:
            assert losses[0] == pytest.approx(tokenizer.layout.uniform_nats, rel=0.2)
        assert losses[1] < losses[0]
        assert generator.sample(2, seed=0).shape == (2, 3, 16, 16)
