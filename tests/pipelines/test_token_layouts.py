"""Both stages, and what follows them, for tokens of every shape and a prior that is not autoregressive."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import tests.support.shelf  # noqa: F401
import vqf
from tests.support.composing import compose
from tests.training.test_trainer import TINY, KilledError, interrupt_after, lines, weights
from vqf.errors import UserError
from vqf.evaluation import class_accuracy
from vqf.models.generator import Generator
from vqf.pipelines.complete import Complete
from vqf.pipelines.evaluate import Evaluate
from vqf.pipelines.full import Full
from vqf.pipelines.reconstruct import Reconstruct
from vqf.pipelines.sample import SamplePipeline
from vqf.pipelines.stage1 import Stage1
from vqf.pipelines.stage2 import Stage2
from vqf.pipelines.tokenize import Tokenize
from vqf.registry import build
from vqf.runs.load import find_generator_checkpoint, load_generator

NO_CODEBOOK_SIZE = [each for each in TINY if not each.startswith("model.quantizer")]


@dataclass(frozen=True)
class Shape:
    """A kind of tokens: the options that choose it, and what it gives for images of 16 pixels."""

    options: tuple[str, ...]
    length: int
    completes: bool  # whether a part of the image has tokens of its own
    tokenizer: bool = True  # whether the tokenizer is another


SHAPES = {
    "two codebooks": Shape(
        (
            *("model/quantizer=residual", "model.quantizer.base={name:ema,dim:4,codebook_size:12}"),
            *("model.quantizer.depth=2", "model.quantizer.shared=false", "model.quantizer.dropout=0.25"),
            "model.prior.layers=2",
        ),
        2 * 2 * 2,
        completes=True,
    ),
    "groups of channels": Shape(
        (
            *("model/quantizer=product", "model.quantizer.base={name:fsq,levels:[4,3]}"),
            *("model.quantizer.groups=2", "model.prior.layers=2"),
        ),
        2 * 2 * 2,
        completes=True,
    ),
    "pyramid": Shape(
        (
            *("model/quantizer=multiscale", "model.quantizer.sizes=[1,2]"),
            *("model.quantizer.dim=4", "model.quantizer.codebook_size=12", "model.quantizer.init=latents"),
        ),
        1 + 4,
        completes=False,
    ),
    "no places": Shape(
        (
            *("model/encoder=toy_queries", "model/decoder=toy_queries", "model/quantizer=vq"),
            *("model.quantizer.dim=4", "model.quantizer.codebook_size=16", "model.projection=3"),
        ),
        5,
        completes=False,
    ),
    "masked": Shape(
        ("model.quantizer.dim=4", "model.quantizer.codebook_size=16", "model/prior=toy_masked"), 4, completes=True
    ),
}


def options(shape: Shape, *more: str) -> list[str]:
    """A tiny run; options of components that were replaced are left out."""
    chosen = {each.partition("=")[0] for each in shape.options}
    replaced = tuple(f"{each.replace('/', '.')}." for each in chosen if each.startswith("model/"))
    kept = [each for each in NO_CODEBOOK_SIZE if not each.startswith(replaced) and each.partition("=")[0] not in chosen]
    return [*kept, *shape.options, *more]


@pytest.fixture(scope="module", autouse=True)
def few_images_for_the_classifier() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_accuracy, "MAX_TRAIN_IMAGES", 64)
        yield


@pytest.fixture(scope="module", params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[request.param]


@pytest.fixture(scope="module")
def run(shape: Shape, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages with all their files."""
    folder = tmp_path_factory.mktemp("full")
    Full(compose(*options(shape, "pipeline=full", "logger=[images,report]", "evaluate.samples=16")), folder).run()
    return folder


@pytest.fixture
def generator(run: Path) -> Generator:
    loaded = vqf.load(run / "stage2")
    assert isinstance(loaded, Generator)
    return loaded


def test_both_stages_write_their_numbers_and_the_report(shape: Shape, run: Path, generator: Generator) -> None:
    numbers, layout = json.loads((run / "metrics.json").read_text()), generator.tokenizer.layout
    assert layout.length == shape.length and generator.prior.layout == layout
    assert {"psnr", "usage", "perplexity", "dead_codes"} <= set(numbers["validation images"])
    each = {f"usage/{k}" for k in range(layout.codebooks)}
    assert (each <= set(numbers["validation images"])) == (layout.codebooks > 1)
    if generator.prior.likelihood:
        assert numbers["codes"]["uniform_nats"] == pytest.approx(layout.uniform_nats)
        assert 0 < numbers["codes"]["nats_per_token"] < 10
    else:
        assert "nats_per_token" not in (run / "report.html").read_text() and 0 < numbers["codes"]["loss"] < 10
    page = (run / "report.html").read_text()
    assert ("<h2>Completions" in page) == shape.completes
    assert re.findall("<h2>(Samples|Reconstructions)", page) == ["Reconstructions", "Samples"]


def test_both_stages_resume_to_the_bit(
    shape: Shape, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage, pipeline, source in (("stage1", Stage1, None), ("stage2", Stage2, run / "stage1")):
        words = options(shape, f"pipeline={stage}", *([f"run={source}"] if source else []))
        with monkeypatch.context() as patch:
            interrupt_after(3, patch, stage)
            with pytest.raises(KilledError):
                pipeline(compose(*words), tmp_path / stage).run()
        torch.manual_seed(12345)
        pipeline(compose(*words, "resume=true"), tmp_path / stage).run()
        pipeline(compose(*words), tmp_path / f"{stage}-uninterrupted").run()
        assert lines(tmp_path / stage) == lines(tmp_path / f"{stage}-uninterrupted")
        assert weights(tmp_path / stage) == weights(tmp_path / f"{stage}-uninterrupted")


def test_tokens_in_shards_are_those_of_the_images(run: Path, tmp_path: Path, generator: Generator) -> None:
    config = compose("pipeline=tokenize", f"run={run / 'stage1'}", "batch_size=8", "model/conditioner=label")
    Tokenize(config, tmp_path).run()
    (path,) = tmp_path.rglob("validation-*.safetensors")
    columns = load_file(path)
    data = build("data", config.data, image_size=16, seed=0)
    images = torch.stack([data.split("validation").item(0, i).image for i in range(8)])
    tokens = generator.tokenizer.encode_tokens(images)
    assert torch.equal(columns["tokens"][:8].long(), tokens)
    decoded = generator.tokenizer.decode_tokens(tokens)
    assert torch.equal(decoded, generator.tokenizer.decode(generator.tokenizer.encode(images)))


def test_a_sample_depends_on_seed_and_number_alone(generator: Generator) -> None:
    images = generator.sample(5, label=1, seed=3)
    torch.testing.assert_close(generator.sample(5, label=1, seed=3, batch_size=2), images)
    torch.testing.assert_close(generator.sample(2, label=1, seed=3, first=3), images[3:])
    assert not torch.equal(generator.sample(5, label=1, seed=4), images)


def test_a_mask_has_a_meaning_or_one_line(shape: Shape, generator: Generator) -> None:
    images, mask = torch.rand(3, 3, 16, 16) * 2 - 1, torch.zeros(16, 16, dtype=torch.bool)
    mask[:8] = True
    if not shape.completes:
        with pytest.raises(UserError, match=r"^mask: the .*tokens of this tokenizer (have no places|are a pyramid)"):
            generator.complete(images, mask)
        return
    indices = generator.tokenizer.encode(images)
    completed = generator.complete(indices, mask, seed=1)
    torch.testing.assert_close(generator.complete(indices, mask, seed=1, batch_size=2), completed)
    assert not torch.equal(generator.complete(indices, mask, seed=2), completed)
    everything = generator.complete(indices, torch.ones_like(mask))
    torch.testing.assert_close(everything, generator.tokenizer.decode(indices))


def test_pipelines_on_a_run(shape: Shape, run: Path, tmp_path: Path) -> None:
    words = [f"run={run / 'stage2'}", "logger=[images,report]", "metric=[psnr,usage]"]
    SamplePipeline(compose("pipeline=sample", *words), tmp_path / "s", count=4).run()
    assert len(list((tmp_path / "s" / "samples").glob("*.png"))) == 4
    Reconstruct(compose("pipeline=reconstruct", *words), tmp_path / "r", count=4).run()
    if shape.completes:
        Complete(compose("pipeline=complete", *words), tmp_path / "c", count=2).run()
        assert len(list((tmp_path / "c" / "completions").glob("*.png"))) == 2
    else:
        with pytest.raises(UserError, match=r"^keep: the .*tokens of this tokenizer"):
            Complete(compose("pipeline=complete", *words), tmp_path / "c", count=2).run()


def test_evaluation_of_samples(run: Path, tmp_path: Path, generator: Generator) -> None:
    words = ["pipeline=evaluate", f"run={run / 'stage2'}", "protocol=generation", "protocol.count=8", "metric=[usage]"]
    Evaluate(compose(*words), tmp_path / "e").run()
    values = json.loads((tmp_path / "e" / "metrics.json").read_text())["values"]
    assert ("nats_per_token" in values) == generator.prior.likelihood
    assert "usage" in values


def test_what_has_no_meaning_is_one_line(run: Path, generator: Generator) -> None:
    with pytest.raises(UserError, match=r"^size"):
        generator.sample(1, label=0, size=32)
    sliding = OmegaConf.create({"name": "sliding_window"})
    if generator.prior.likelihood:
        generator.sampler = build("sampler", sliding)
        with pytest.raises(UserError, match=r"^sampler=sliding_window: (the|draws one)"):
            generator.sample(1, label=0)
        return
    with pytest.raises(UserError, match=r"draws from priors that are causal, .*'toy_masked' is masked"):
        load_generator(find_generator_checkpoint(run / "stage2"), sliding)
    generator.scorer = build("scorer", {"name": "likelihood"})
    with pytest.raises(UserError, match=r"^scorer=likelihood: this prior has no likelihood"):
        generator.sample(1, label=0, candidates=2)


def test_a_spatial_condition_needs_places(tmp_path: Path) -> None:
    shape = replace(SHAPES["no places"], options=(*SHAPES["no places"].options, "model/conditioner=coordinates"))
    with pytest.raises(UserError, match=r"^model.conditioner.coordinates: needs to know where tokens are, and the 5"):
        Full(compose(*options(shape, "pipeline=full")), tmp_path).run()
