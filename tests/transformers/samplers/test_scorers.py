"""Scorers, and the choice of the best candidate."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.support.composing import compose
from tests.training.test_trainer import TINY
from vqf.errors import UserError
from vqf.models.generator import Generator
from vqf.models.tokenizer import build_tokenizer
from vqf.networks.perceptual import LITE_SCALE, LITE_SHIFT, efficientnet_lite_classifier
from vqf.pipelines.sample import SamplePipeline
from vqf.pipelines.stage1 import Stage1
from vqf.pipelines.stage2 import Stage2
from vqf.protocols import ScoredSamples
from vqf.registry import build
from vqf.runs.load import build_generator
from vqf.seeding import hash_seed

CLASSES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def generator() -> Generator:
    config = compose(*TINY, "model/conditioner=label")
    torch.manual_seed(0)
    made = build_generator(config, build_tokenizer(config.model, 16), CLASSES).eval()
    for parameter in made.prior.parameters():  # type: ignore[attr-defined]
        torch.nn.init.normal_(parameter, std=0.3)
    return made


class Red:
    """Scores an image by its red channel."""

    def __call__(self, samples: ScoredSamples) -> torch.Tensor:
        return samples.images[:, 0].mean((1, 2))


def test_likelihood_is_the_prior_s_own(generator: Generator) -> None:
    labels = torch.tensor([0, 2])
    tokens, prefix = torch.randint(16, (2, 4)), labels[:, None]
    scores = build("scorer", {"name": "likelihood"})(
        ScoredSamples(torch.zeros(2, 3, 16, 16), tokens, generator.prior, prefix, labels, CLASSES)
    )
    for b in range(2):
        total = 0.0
        for n in range(4):
            logits = generator.prior(tokens[b : b + 1], prefix[b : b + 1])[0, n].double()
            total += float((logits[tokens[b, n]] - logits.logsumexp(0)).detach())
        assert float(scores[b]) == pytest.approx(total / 4, rel=1e-5)


def test_the_best_of_all_candidates_is_kept(generator: Generator) -> None:
    generator.scorer = Red()
    best = generator.sample(3, seed=5, candidates=4)
    candidates = [generator.sample(3, seed=hash_seed(5, "candidate", c) if c else 5) for c in range(4)]
    scores = torch.stack([each[:, 0].mean((1, 2)) for each in candidates])
    for b in range(3):
        assert torch.equal(best[b], candidates[int(scores[:, b].argmax())][b])
    assert len(set(scores.argmax(0).tolist())) > 1 or scores.argmax(0)[0] > 0, (
        "the first was best everywhere: no choice seen"
    )
    torch.testing.assert_close(generator.sample(1, seed=5, first=2, candidates=4, label=2), best[2:])


def test_a_choice_needs_a_scorer(generator: Generator) -> None:
    generator.scorer = None
    with pytest.raises(UserError, match="needs a scorer to choose the best; add scorer=likelihood"):
        generator.sample(1, candidates=2)


def test_an_image_larger_than_the_prior_has_no_likelihood(generator: Generator) -> None:
    sliding = build("sampler", {"name": "sliding_window"})
    wide = Generator(generator.tokenizer, generator.conditioner, generator.prior, sliding, CLASSES)
    wide.scorer = build("scorer", {"name": "likelihood"})
    with pytest.raises(UserError, match="larger than those that the prior was trained on"):
        wide.sample(1, size=(16, 32), candidates=2)


def test_imagenet_scores_are_log_probabilities_of_the_label() -> None:
    images = torch.rand(2, 3, 260, 260) * 2 - 1
    labels = torch.tensor([3, 977])
    scorer, names = build("scorer", {"name": "imagenet"}), [str(i) for i in range(1000)]
    scores = scorer(ScoredSamples(images, torch.zeros(2, 1), None, None, labels, names))
    with torch.no_grad():
        logits = efficientnet_lite_classifier("lite2")(images * LITE_SCALE + LITE_SHIFT).double()
    expected = logits.softmax(-1)[torch.arange(2), labels].log()
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="the prior has 3 classes, not ImageNet's 1,000"):
        scorer(ScoredSamples(images, torch.zeros(2, 1), None, None, labels, CLASSES))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    Stage1(compose(*TINY, "steps=2"), folder / "stage1").run()
    Stage2(compose(*TINY, "pipeline=stage2", f"run={folder / 'stage1'}", "steps=2"), folder / "stage2").run()
    return folder


def test_the_command_chooses_among_candidates(run: Path, tmp_path: Path) -> None:
    config = compose("pipeline=sample", f"run={run}", "scorer=likelihood", "logger=[]")
    SamplePipeline(config, tmp_path / "best", count=2, candidates=3).run()
    assert len(list((tmp_path / "best" / "samples").iterdir())) == 2


def test_what_was_drawn_is_not_drawn_again(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after the first batch and resumed: the same images, and only the missing ones are sampled."""
    words = ["pipeline=sample", f"run={run}", "logger=[]"]  # in batches of 8, as in the run
    SamplePipeline(compose(*words), tmp_path / "whole", count=30).run()
    first_indices: list[int] = []
    draw = Generator.sample

    def counted(self: Generator, count: int, **options: Any) -> torch.Tensor:
        if len(first_indices) == 2:
            raise KeyboardInterrupt
        first_indices.append(options["first"])
        return draw(self, count, **options)

    monkeypatch.setattr(Generator, "sample", counted)
    with pytest.raises(KeyboardInterrupt):
        SamplePipeline(compose(*words), tmp_path / "cut", count=30).run()
    assert first_indices == [0, 8] and len(list((tmp_path / "cut" / "samples").glob("*.png"))) == 16
    first_indices.clear()
    monkeypatch.setattr(
        Generator,
        "sample",
        lambda self, count, **options: first_indices.append(options["first"]) or draw(self, count, **options),
    )
    SamplePipeline(compose(*words, "resume=true"), tmp_path / "cut", count=30).run()
    assert first_indices == [16, 24]
    for path in (tmp_path / "whole" / "samples").iterdir():
        assert Image.open(path).tobytes() == Image.open(tmp_path / "cut" / "samples" / path.name).tobytes()
