"""`pipeline=full` at miniature size, and the pipelines that act on a finished run."""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import vqf
from tests.support.composing import compose
from tests.training.test_trainer import TINY
from vqf.errors import UserError
from vqf.evaluation import class_accuracy
from vqf.models.generator import Generator
from vqf.models.tokenizer import Tokenizer
from vqf.pipelines.complete import Complete
from vqf.pipelines.full import Full
from vqf.pipelines.reconstruct import Reconstruct
from vqf.pipelines.sample import SamplePipeline
from vqf.pipelines.stage2 import Stage2
from vqf.registry import build, flat_component

OPTIONS = [*TINY, "pipeline=full", "stage2.steps=4", "stage2.batch_size=8", "logger=[images,report]"]
CLASSIFIED = 16  # samples for the class accuracy


@pytest.fixture(scope="module", autouse=True)
def few_images_for_the_classifier() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_accuracy, "MAX_TRAIN_IMAGES", 64)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, few_images_for_the_classifier: None) -> Path:
    folder = tmp_path_factory.mktemp("full")
    config = compose(*OPTIONS, f"evaluate.samples={CLASSIFIED}")
    pipeline: Full = build("pipeline", flat_component("pipeline", config), config=config, run_dir=folder)
    pipeline.run()
    return folder


def test_files_of_a_run(run: Path) -> None:
    numbers = json.loads((run / "metrics.json").read_text())
    assert {"psnr", "usage", "perplexity"} <= set(numbers["validation images"])
    assert 0 < numbers["codes"]["nats_per_token"] < 10
    assert numbers["codes"]["uniform_nats"] == pytest.approx(2.7726, abs=1e-4)
    assert "<html" in (run / "report.html").read_text()
    assert not list(run.glob("stage*/report.html"))
    for name in ("reconstructions-latest.png", "samples-latest.png"):
        assert Image.open(run / "images" / name).size[0] > 64


def test_class_accuracy_is_measured_once_at_the_end(run: Path) -> None:
    numbers = json.loads((run / "metrics.json").read_text())["codes"]
    assert numbers["class_accuracy_chance"] == 1 / 8
    assert all(0 <= numbers[f"class_accuracy{each}"] <= 1 for each in ("", "_real", "_decoded"))
    lines = [json.loads(line) for line in (run / "stage2" / "metrics.jsonl").open()]
    (line,) = [line for line in lines if "validation/class_accuracy" in line]
    assert line["step"] == 4
    assert line["validation/class_accuracy"] == numbers["class_accuracy"]
    confusion = json.loads((run / "stage2" / "details.json").read_text())["classes"]["confusion"]
    assert [sum(row) for row in confusion] == [CLASSIFIED // 8] * 8


def test_the_report_has_all_sections(run: Path) -> None:
    page = (run / "report.html").read_text()
    titles = re.findall(r"<h2>([^<]*)", page)
    assert titles == [
        *("Reconstructions", "Best reconstructions", "Worst reconstructions", "Codebook usage", "Samples"),
        *("Class accuracy of samples", "Completions", "Metrics", "Curves", "How it was made"),
    ]
    samples = page[page.index("<h2>Samples") : page.index("<h2>Class accuracy")]
    assert re.findall(r"<h3>([^<]*)", samples)[:2] == ["Activities", "Animals &amp; Nature"]
    assert samples.count("<img") == 32
    details = json.loads((run / "stage1" / "details.json").read_text())
    assert sum(details["codes"]["counts"]) == 16 * 4  # validation images of 2 x 2 codes
    ends = [float(details[end]["captions"][0].split()[0]) for end in ("worst", "best")]
    assert ends[0] < ends[1]


def test_pipelines_on_a_run_write_their_own_report(run: Path, tmp_path: Path) -> None:
    words = [f"run={run}", "logger=[images,report]", "metric=[psnr]"]
    SamplePipeline(compose("pipeline=sample", *words), tmp_path / "s", count=9).run()
    Complete(compose("pipeline=complete", *words), tmp_path / "c", count=3).run()
    Reconstruct(compose("pipeline=reconstruct", *words), tmp_path / "r", count=5).run()
    pages = {name: (tmp_path / name / "report.html").read_text() for name in "scr"}
    assert pages["s"].count("<img") == 9
    assert "<h3>Activities" in pages["s"]
    assert pages["c"].count("<img") == 9
    captions = re.findall(r"<figcaption>([^<]*)", pages["c"])
    assert set(captions) <= {html.escape(each) for each in vqf.load(run).classes}  # type: ignore[union-attr]
    assert "Worst reconstructions" in pages["r"]
    assert "Codebook usage" in pages["r"]


def test_load_gives_a_generator_and_a_tokenizer(run: Path) -> None:
    generator, tokenizer = vqf.load(run), vqf.load(run / "stage1")
    assert isinstance(generator, Generator)
    assert isinstance(tokenizer, Tokenizer)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(tokenizer.encode(images), generator.tokenizer.encode(images))
    assert tokenizer.decode(tokenizer.encode(images)).shape == images.shape
    assert generator.classes[0] == "Activities"


def test_an_image_depends_on_seed_number_and_label_alone(run: Path) -> None:
    generator = vqf.load(run)
    assert isinstance(generator, Generator)
    one_call = generator.sample(5, seed=3)
    two_calls = torch.cat([generator.sample(2, seed=3), generator.sample(3, seed=3, first=2, batch_size=2)])
    torch.testing.assert_close(one_call, two_calls)
    assert not torch.equal(one_call, generator.sample(5, seed=4))
    assert torch.equal(generator.sample(1, label=2, seed=1), generator.sample(1, label=generator.classes[2], seed=1))


@pytest.mark.parametrize(
    ("label", "words"),
    [("Actvities", "Did you mean 'Activities'?"), (8, "label=8: unknown class '8'. Known: 0, 1, 2, 3, 4, 5, 6, 7.")],
)
def test_a_class_that_does_not_exist(run: Path, label: object, words: str) -> None:
    generator = vqf.load(run)
    assert isinstance(generator, Generator)
    with pytest.raises(UserError, match=re.escape(words)):
        generator.sample(1, label=label)  # type: ignore[arg-type]


def test_sample_writes_images(run: Path, tmp_path: Path) -> None:
    SamplePipeline(
        compose("pipeline=sample", f"run={run}", "logger=[images]"), tmp_path, count=3, label="Objects"
    ).run()
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["000000.png", "000001.png", "000002.png"]
    assert Image.open(tmp_path / "samples" / "000000.png").size == (16, 16)


def test_reconstruct_takes_a_folder_of_images(run: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        Image.new("RGB", (20 + i, 30), (80 * i, 10, 200)).save(images / f"{i}.png")
    config = compose("pipeline=reconstruct", f"run={run}", "logger=[]", "metric=[psnr]")
    Reconstruct(config, tmp_path / "folder", images=str(images)).run()
    assert len(list((tmp_path / "folder" / "reconstructions").iterdir())) == 3
    numbers = json.loads((tmp_path / "folder" / "metrics.json").read_text())
    assert numbers["reconstruction of 3 images at their own size"]["psnr"] > 0


def test_stage2_needs_nothing_but_the_run(run: Path, tmp_path: Path) -> None:
    """Model, data and image size come from the run, not from the defaults of the command line."""
    config = compose(
        "pipeline=stage2", f"run={run / 'stage1'}", "steps=1", "batch_size=4", "logger=[]", "model.prior.layers=1",
        "model.prior.dim=16", "model.prior.heads=2", "model/conditioner=none", "image_size=16",
    )  # fmt: skip
    Stage2(config, tmp_path).run()
    generator = vqf.load(tmp_path)
    assert isinstance(generator, Generator)
    assert generator.tokenizer.layout.vocab_size == 16


def test_stage2_needs_equal_micro_batches(run: Path, tmp_path: Path) -> None:
    config = compose(*TINY, "pipeline=stage2", f"run={run / 'stage1'}", "accumulate=3")
    with pytest.raises(UserError) as caught:
        Stage2(config, tmp_path).run()
    assert str(caught.value) == "accumulate=3 must divide batch_size=8"


def test_tokens_of_another_tokenizer_are_refused(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    config = compose(*OPTIONS, "seed=1")
    Full(config, other).run()
    options = [*TINY, "pipeline=stage2", f"run={other / 'stage1'}", f"tokens.root={run / 'stage2' / 'tokens'}"]
    with pytest.raises(UserError, match=r"was made with tokenizer \w+, this run has \w+"):
        Stage2(compose(*options), tmp_path / "second").run()


def test_a_tokenizer_cannot_be_sampled(run: Path, tmp_path: Path) -> None:
    stage1 = run / "stage1"
    with pytest.raises(UserError) as caught:
        SamplePipeline(compose("pipeline=sample", f"run={stage1}"), tmp_path).run()
    assert str(caught.value) == (
        f"run={stage1} holds a stage1 run, but this needs the run of a prior; "
        f"python -m vqf.run pipeline=stage2 run={stage1} trains one on its tokenizer"
    )
