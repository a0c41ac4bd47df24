"""Every preset composes, is of its published size, and trains: two steps of each stage, shrunk by a few rules."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from tests.support.composing import compose
from tests.support.layouts import raster
from vqf.batch import Batch
from vqf.config.settings import check_config, fill_missing_groups
from vqf.distributed.engine import make_engine
from vqf.losses import perceptual
from vqf.models.tokenizer import Tokenizer, build_tokenizer
from vqf.networks.perceptual import PerceptualDistance
from vqf.registry import build
from vqf.run import config_dir
from vqf.runs.load import build_generator
from vqf.tokens.prefix import PrefixSpec
from vqf.training.prior_task import PriorTask
from vqf.training.tokenizer_task import build_tokenizer_task

MODELS = sorted(path.stem for path in (config_dir() / "model").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml"))
PRESETS = [f"model={name}" for name in MODELS] + [f"experiment={name}" for name in EXPERIMENTS]

# What an option shrinks to, wherever a component has it; lists keep their length, so that strides stay.
SMALL = {"channels": 8, "blocks": 1, "codebook_size": 12, "layers": 2, "heads": 2, "dim": 8, "head_channels": 4}
PRIOR = {"dim": 16}

# Tokenizer: parameters and tensors, from the authors' own numbers or counted in their code (docs/checkpoints.md).
TOKENIZERS = {
    "vqgan": (72_141_699, 343),
    "vqgan_paper": (72_141_699, 343),
    "vqgan_f16_1024": (72_141_699, 343),
    "vqgan_f16_16384": (76_073_859, 343),
    "vqgan_gumbel_f8": (68_995_971, 301),
    "ldm_vq_f4": (55_322_782, 205),
    "ldm_vq_f4_noattn": (53_219_486, 185),
    "ldm_vq_f8": (67_717_295, 299),
    "ldm_vq_f16": (69_593_371, 343),
    "llamagen_vq16": (71_883_403, 343),
    "llamagen_vq8": (70_109_835, 299),
}
DISCRIMINATORS = {  # of images of three channels
    "vqgan": 2_765_633,
    "vqgan_f16_16384": 663_361,
    "ldm_vq_f4": 2_765_633,
    "ldm_vq_f8": 663_361,
    "ldm_vq_f16": 663_361,
    "llamagen_vq16": 2_765_633,
}
PRIORS = {
    ("vqgan_f16_1024", "gpt_ffhq"): 801_798_400,
    ("vqgan_f16_16384", "gpt_cin"): 1_410_640_896,
}
# Published transformers behind a longer condition: codes, tokens of condition, layers, width, parameters, and tensors:
# 16 a layer and 5, without the reference's causal masks.
CONDITIONED = {
    "D-RIN, FacesHQ, S-FLCKR": (1024, 256, 24, 1024, 304_932_864, 389),
    "COCO scenes": (8192, 92, 40, 1408, 975_876_352, 645),
    "Open Images scenes": (8192, 92, 36, 1536, 1_045_638_144, 581),
}


@pytest.fixture
def _no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """LPIPS on a small frozen network instead of VGG16."""

    class Network(nn.Conv2d):
        def forward(self, images: Any) -> Any:
            return [super().forward(images)]

    def distance(*_: object) -> PerceptualDistance:
        return PerceptualDistance(Network(3, 4, 3).requires_grad_(False))  # type: ignore[arg-type]

    monkeypatch.setattr(perceptual, "vgg16_features", lambda *_: None)
    monkeypatch.setattr(perceptual, "lpips_heads", lambda *_: None)
    monkeypatch.setattr(perceptual, "PerceptualDistance", distance)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def blank(config: DictConfig) -> Tokenizer:
    with torch.device("meta"):
        return build_tokenizer(config.model, 256)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_published_sizes(name: str) -> None:
    tokenizer = blank(compose(f"model={name}"))
    tensors = [key for key in tokenizer.state_dict() if key != "quantizer.steps"]
    assert (count(tokenizer), len(tensors)) == TOKENIZERS[name]


@pytest.mark.parametrize(
    ("maps", "channels", "parameters"),
    [("depth", 1, 72_137_089), ("182 classes", 182, 72_554_294), ("183 classes", 183, 72_556_599)],
)
def test_published_tokenizers_of_maps(maps: str, channels: int, parameters: int) -> None:
    """Of depth (`drin_transformer`), of COCO-Stuff's and ADE20K's segmentations: f16, 1,024 codes of 256."""
    with torch.device("meta"):
        tokenizer = build_tokenizer(compose("model=vqgan").model, 256, channels)
    assert (count(tokenizer), len(tokenizer.state_dict())) == (parameters, 343)


@pytest.mark.parametrize(("quantizer", "parameters"), [("8192", 73_976_707), ("256", 67_652_783)])
def test_other_codebooks_of_published_sizes(quantizer: str, parameters: int) -> None:
    model = "vqgan" if quantizer == "8192" else "ldm_vq_f8"
    assert count(blank(compose(f"model={model}", f"model.quantizer.codebook_size={quantizer}"))) == parameters


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_published_discriminators(name: str) -> None:
    node = compose(f"model={name}").model.discriminator
    assert count(build("discriminator", node, in_channels=3, image_size=(256, 256))) == DISCRIMINATORS[name]


def test_a_published_discriminator_of_depth() -> None:
    node = compose("model=vqgan").model.discriminator
    assert count(build("discriminator", node, in_channels=1, image_size=(256, 256))) == 2_763_585


@pytest.mark.parametrize(("model", "prior"), PRIORS)
def test_published_priors(model: str, prior: str) -> None:
    config = compose(f"model={model}", f"model/prior={prior}")
    classes = [str(i) for i in range(1000)]
    with torch.device("meta"):
        generator = build_generator(config, blank(config), classes)
    assert isinstance(generator.prior, nn.Module)
    assert count(generator.prior) == PRIORS[model, prior]


@pytest.mark.parametrize("name", CONDITIONED)
def test_published_priors_behind_a_condition(name: str) -> None:
    """The published ones have one position more, at which no token ever stands."""
    codes, prefix, layers, dim, parameters, tensors = CONDITIONED[name]
    node = {"name": "gpt", "layers": layers, "dim": dim, "shared_vocabulary": True}
    wired = {"layout": raster((16, 16), codes), "prefix": PrefixSpec(codes, prefix)}
    with torch.device("meta"):
        prior = build("prior", node, **wired)
    assert (count(prior), len(prior.state_dict())) == (parameters - dim, tensors)


@pytest.mark.parametrize("choice", PRESETS)
def test_it_composes_and_says_what_it_is(choice: str) -> None:
    check_config(fill_missing_groups(compose(choice)))
    group, _, name = choice.partition("=")
    text = (config_dir() / group / f"{name}.yaml").read_text()
    comments = [line for line in text.split("defaults:")[0].splitlines() if line.startswith("#")]
    assert len(" ".join(each for each in comments if "@package" not in each)) > 80, "what it reproduces, and the cost"


def numbers(path: Path) -> list[str]:
    return [key for key in OmegaConf.load(path) if key != "defaults"]


@pytest.mark.parametrize("name", MODELS)
def test_a_preset_only_chooses(name: str) -> None:
    """Its numbers stand in variants of the components, or swapping one of those would leave numbers behind."""
    path = config_dir() / "model" / f"{name}.yaml"
    preset = OmegaConf.load(path)
    assert preset.defaults[0] == "_self_"
    assert [key for key in numbers(path) if preset[key] is not None] == []


def shrunk(config: DictConfig) -> DictConfig:
    """Make everything about a config small that its options allow, and nothing else."""
    config = fill_missing_groups(config)
    nodes = {key: node for key, node in config.model.items() if isinstance(node, DictConfig) and "name" in node}
    stride = 1
    with open_dict(config):
        for key, node in nodes.items():
            for option, value in {**SMALL, **(PRIOR if key == "prior" else {})}.items():
                if option in node:
                    node[option] = value
            if "multipliers" in node:
                node.multipliers = [1] * len(node.multipliers)
                stride = node.get("patch_size", 1) * 2 ** (len(node.multipliers) - 1)
            if node.get("attention"):
                node.attention = [2]
            if node.get("start") and "delta" in node:
                node.start = 1
        if "spatial" in (config.model.conditioner or {}):  # needs a run of its own: tests/pipelines/test_conditions.py
            config.model.conditioner = {"none": {"name": "none"}}
        config.image_size = max(2 * stride, 16)
        config.data = OmegaConf.create({"name": "emoji"})
        config.update({"steps": 2, "batch_size": 4, "accumulate": 1, "device": "cpu", "precision": "fp32"})
    return config


@pytest.mark.usefixtures("_no_download")
@pytest.mark.parametrize("choice", PRESETS)
def test_two_steps_of_both_stages(choice: str) -> None:
    config = shrunk(compose(choice))
    engine, data = make_engine(config), build("data", config.data, image_size=config.image_size, seed=0)
    stage = build_tokenizer_task(config, data, engine)
    batch = Batch.collate([data.split("train").item(0, i) for i in range(4)])
    players = {name: stage.modules[name] for name in stage.optimizers}
    assert changes(players, lambda: [stage.step(step, batch) for step in range(2)])
    if config.model.prior is None:
        return
    generator = build_generator(config, stage.model.eval(), data.classes)
    assert batch.images is not None
    tokens = Batch(tokens=stage.model.encode_tokens(batch.images), labels=batch.labels)
    second = PriorTask(generator, None, {}, with_second(config), engine)  # type: ignore[arg-type]
    assert changes({"model": second.model}, lambda: [second.step(step, tokens) for step in range(2)])


def with_second(config: DictConfig) -> DictConfig:
    """Take the second stage's own words, as `pipeline=full` does."""
    config = config.copy()
    with open_dict(config):
        config.optimizer = config.stage2.optimizer
        config.clip = config.stage2.clip
    return config


def changes(modules: Any, steps: Any) -> bool:
    """Take steps; tell whether every module moved, and all that was logged is finite."""
    before = {name: [each.detach().clone() for each in module.parameters()] for name, module in modules.items()}
    logged = steps()
    assert all(torch.isfinite(value).all() for values in logged for value in values.values())
    return all(
        any(not torch.equal(old, new) for old, new in zip(before[name], module.parameters(), strict=True))
        for name, module in modules.items()
    )
