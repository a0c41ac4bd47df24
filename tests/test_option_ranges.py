"""Every numeric option there is refuses a value in one line that names it, or works with it; nothing in between."""

import math
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

import vqf
from tests import test_contracts as contracts
from tests.metrics.sets import Linear, gaussians
from tests.support.composing import compose
from tests.support.layouts import raster
from vqf import registry
from vqf.batch import Batch
from vqf.config.settings import OPTIONS, check_config
from vqf.distributed.engine import make_engine
from vqf.errors import UserError
from vqf.models.tokenizer import Tokenizer, build_tokenizer
from vqf.options.ranges import describe, fits
from vqf.protocols import Reconstruction, SetMetric
from vqf.registry import KINDS, Component, components
from vqf.runs.checkpoint_writer import write_checkpoint
from vqf.runs.load import build_generator
from vqf.training.tokenizer_task import build_tokenizer_task

SMALL = {"encoder": "conv", "decoder": "conv", "quantizer": "vq", "discriminator": "patchgan", "prior": "gpt"}
NUMBERS = (-1, 0, math.nan, math.inf, 10**21)
EVERY = [component for kind in KINDS for component in components(kind)]


def identify(component: Component) -> str:
    return f"{component.kind}-{component.name}"


every_component = pytest.mark.parametrize("component", EVERY, ids=identify)

paths = contracts.paths  # the fixture


def bad_values(hint: Any, default: Any) -> Iterator[Any]:
    """Values to try of an option that takes numbers; nothing for others."""
    words = describe(hint)
    if "number" not in words and "integer" not in words:
        return
    yield from NUMBERS
    if "a list" in words:
        length = len(default) if isinstance(default, list | tuple) else 1
        yield from ([], *([number] * count for number in NUMBERS for count in {1, 2, length}))


def node_of(component: Component, paths: Mapping[str, str]) -> dict[str, Any]:
    """The config node of a small component."""
    tiny = contracts.TINY.get((component.kind, component.name), {})
    return {"name": component.name, **{key: paths.get(str(value), value) for key, value in tiny.items()}}


def without_range(hint: Any) -> bool:
    """Whether an annotation has an int or float that is no `Annotated`."""
    if hasattr(hint, "__metadata__") and typing.get_args(hint)[0] in (int, float, int | float):
        return False
    return hint in (int, float) or any(map(without_range, typing.get_args(hint)))


def test_every_number_of_vqf_states_its_range() -> None:
    ours = {str(each): each.hints for each in EVERY if each.target.__module__.startswith("vqf.")}
    hints = {f"{name}: {key}": hint for name, options in ours.items() for key, hint in options.items()}
    assert [key for key, hint in {**hints, **OPTIONS}.items() if without_range(hint)] == []


@every_component
def test_what_an_option_cannot_be_is_one_line_with_its_key_and_range(
    component: Component, paths: dict[str, str]
) -> None:
    node, flat = node_of(component, paths), KINDS[component.kind].flat
    for key, hint in component.hints.items():
        for value in bad_values(hint, component.options[key].default):
            if fits(hint, value):
                continue
            with pytest.raises(UserError) as caught:
                registry.check_options(component.kind, {**node, key: value}, "there")
            line = str(caught.value)
            assert line.startswith(key if flat else f"there.{key}") and "\n" not in line
            assert describe(hint) in line


@every_component
def test_a_component_works_with_every_number_that_its_annotations_allow(
    component: Component, paths: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("vqf.metrics.set_metric.feature_network", lambda *_: Linear())
    node, use = node_of(component, paths), USES.get(component.kind, train)
    for key, hint in component.hints.items():
        for value in bad_values(hint, component.options[key].default):
            if not fits(hint, value):
                continue
            with one_line_or_nothing(f"{component}: {key}={value}"):
                use(component.kind, {**node, key: value}, tmp_path)


@contextmanager
def one_line_or_nothing(what: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        lines = str(error).splitlines()
    except Exception as error:
        raise AssertionError(f"{what} ends in a traceback") from error
    else:
        return
    assert len(lines) == 1, what


@cache
def base() -> DictConfig:
    """The config of a small model with everything in it."""
    small = [
        f"model.{kind}.{key}={value}".replace(" ", "")
        for kind, name in SMALL.items()
        for key, value in contracts.TINY[kind, name].items()
    ]
    return compose(
        *("model=vqgan", "data=emoji", "image_size=16", "batch_size=4", "steps=10", "device=cpu", "model/loss=[l1]"),
        *(*(f"model/{kind}={name}" for kind, name in SMALL.items()), "model/conditioner=label", *small),
        *("model.conditioner.label.dropout=0.1", "model.adversary.start=0"),
    )


@cache
def batch() -> Batch:
    split = registry.build("data", base().data, image_size=16, seed=0).split("train")
    return Batch.collate([split.item(0, i) for i in range(4)])


def config_with(kind: str, node: dict[str, Any]) -> DictConfig:
    config = base().copy()
    content = {node["name"]: node} if KINDS[kind].multiple else node
    OmegaConf.update(config, KINDS[kind].key, content, merge=False, force_add=True)
    return config


def train(kind: str, node: dict[str, Any], folder: Path) -> None:
    """Take one step of stage 1."""
    config = config_with(kind, node)
    data = registry.build("data", config.data, image_size=16, seed=0)
    stage = build_tokenizer_task(config, data, make_engine(config))
    stage.step(0, batch())


@cache
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return build_tokenizer(base().model, 16).eval()


def sample(kind: str, node: dict[str, Any], folder: Path) -> None:
    """Compute the loss of stage 2, and sample."""
    config = config_with(kind, node)
    generator = build_generator(config, tokenizer(), ["a", "b", "c"], lambda _: tokenizer())  # type: ignore[arg-type]
    images = contracts.make_images(2, size=16)
    given = Batch(images=images, labels=torch.tensor([0, 2]), conditions=images)
    prefix = generator.conditioner(given)
    generator.prior.loss(tokenizer().encode_tokens(images), prefix)
    generator.eval().sample_tokens(given, seed=0)


def read(kind: str, node: dict[str, Any], folder: Path) -> None:
    """Read an item of each split."""
    data = registry.build("data", node, image_size=16, seed=0)
    for split in (data.split("train"), data.split("validation")):
        split.item(0, len(split) - 1)


def measure(kind: str, node: dict[str, Any], folder: Path) -> None:
    """Compare images, or two sets of features."""
    metric = registry.build("metric", node, layout=raster((4, 4), 16), device="cpu")
    if isinstance(metric, SetMetric):
        metric.compare(gaussians(40), gaussians(40, seed=1))
    images = contracts.make_images(2)
    metric.update(Reconstruction(images, images, torch.zeros(2, 4, 4, dtype=torch.int64), torch.ones(2, 1, 32, 32)))
    metric.compute()


def log(kind: str, node: dict[str, Any], folder: Path) -> None:
    """Log numbers and images."""
    logger = registry.build("logger", node, run_dir=folder, config=base(), subrun="")
    logger.scalars(1, {"loss": 0.5})
    logger.images(1, "reconstructions", contracts.make_images(5))
    logger.close()


def optimize(kind: str, node: dict[str, Any], folder: Path) -> None:
    """Take a step."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = registry.build("optimizer", node, params=[parameter]) if kind == "optimizer" else None
    optimizer = optimizer or torch.optim.SGD([parameter])
    schedule = registry.build("schedule", node, optimizer=optimizer, steps=20) if kind == "schedule" else None
    parameter.square().sum().backward()
    optimizer.step()
    if schedule is not None:
        schedule.step()


def construct(kind: str, node: dict[str, Any], folder: Path) -> None:
    """Build it alone: what it does takes long."""
    registry.build(kind, node, config=base(), run_dir=folder)


USES: dict[str, Callable[[str, dict[str, Any], Path], None]] = {
    **dict.fromkeys(("prior", "conditioner", "sampler"), sample),
    **dict.fromkeys(("optimizer", "schedule"), optimize),
    **dict.fromkeys(("scorer", "protocol", "pipeline"), construct),
    "data": read,
    "metric": measure,
    "logger": log,
}


LOADED = ("encoder", "decoder", "quantizer", "conditioner", "prior", "sampler")


@pytest.mark.parametrize("component", [each for each in EVERY if each.kind in LOADED], ids=identify)
def test_the_config_of_a_foreign_checkpoint_gives_the_same_line(
    component: Component, paths: dict[str, str], tmp_path: Path
) -> None:
    node, key = node_of(component, paths), KINDS[component.kind].key
    where = f"{key}.{component.name}" if KINDS[component.kind].multiple else key
    for option, hint in component.hints.items():
        values = bad_values(hint, component.options[option].default)
        if (value := next((each for each in values if not fits(hint, each)), None)) is None:
            continue
        with pytest.raises(UserError) as here:
            registry.check_options(component.kind, {**node, option: value}, where)
        checkpoint = write_checkpoint(
            tmp_path,
            state={"kind": "stage2", "step": 1, "image_size": [16, 16], "classes": ["a"]},
            config=config_with(component.kind, {**node, option: value}),
            weights={"model": {"weight": torch.zeros(1)}},
            optimizers={},
            keep=1,
        )
        with pytest.raises(UserError) as there:
            vqf.load(checkpoint)
        assert str(there.value) == f"{checkpoint}: {here.value}"


@pytest.mark.parametrize("key", OPTIONS)
def test_a_number_of_every_run_is_refused_in_one_line(key: str) -> None:
    for value in bad_values(OPTIONS[key], None):
        config = base().copy()
        OmegaConf.update(config, key, value, merge=False)
        if fits(OPTIONS[key], value):
            check_config(config)
            continue
        with pytest.raises(UserError) as caught:
            check_config(config)
        line = str(caught.value)
        assert line.startswith(f"{key}=") and describe(OPTIONS[key]) in line and "\n" not in line
