"""The generator: sizes, completion, and the arguments of samplers."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from tests.support.composing import compose
from tests.training.test_trainer import TINY
from vqf.batch import Batch
from vqf.errors import UserError
from vqf.models.conditioning import ConditionerStack
from vqf.models.generator import Generator
from vqf.models.tokenizer import build_tokenizer
from vqf.pipelines.complete import Complete
from vqf.pipelines.sample import SamplePipeline
from vqf.pipelines.stage1 import Stage1
from vqf.pipelines.stage2 import Stage2
from vqf.protocols import Causal
from vqf.registry import build
from vqf.runs.load import build_generator
from vqf.tokens.layout import TokenLayout
from vqf.tokens.prefix import Prefix

CLASSES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def generator() -> Generator:
    """An untrained generator in float64, of 16 x 16 pixels, with label dropout."""
    config = compose(*TINY, "model/conditioner=label", "model.conditioner.label.dropout=0.5")
    torch.manual_seed(0)
    made = build_generator(config, build_tokenizer(config.model, 16), CLASSES).double().eval()
    for parameter in made.prior.parameters():  # type: ignore[attr-defined]
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def with_sampler(generator: Generator, name: str, **options: Any) -> Generator:
    parts = (generator.tokenizer, generator.conditioner, generator.prior)
    return Generator(*parts, build("sampler", {"name": name, **options}), generator.classes)


def make_images(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double() * 2 - 1


def test_larger_images_come_from_sliding_windows(generator: Generator) -> None:
    sliding = with_sampler(generator, "sliding_window")
    stride, (height, width) = generator.tokenizer.stride, generator.tokenizer.layout.grid
    size = (stride * (height + 3), stride * (width + 2))
    images = sliding.sample(3, size=size, seed=4)
    assert images.shape == (3, 3, *size)
    torch.testing.assert_close(sliding.sample(1, size=list(size), seed=4, first=2, label="owl"), images[2:])
    plain = with_sampler(generator, "sliding_window", cache=False, wavefront=False)
    assert torch.equal(plain.sample(3, size=size, seed=4), images)
    assert torch.equal(sliding.sample(3, seed=4), generator.sample(3, seed=4))


def test_a_size_that_a_sampler_cannot_draw_names_the_one_that_can(generator: Generator) -> None:
    words = "size: the prior was trained on images of 16 x 16 pixels, not 32 x 48; sampler=sliding_window samples"
    with pytest.raises(UserError, match=words) as caught:
        generator.sample(1, size=(32, 48))
    assert "\n" not in str(caught.value)
    stride, width = generator.tokenizer.stride, generator.tokenizer.layout.grid[1]
    with pytest.raises(UserError, match="the prior was trained on"):
        generator.sample(1, size=(16, 16 - stride))
    with pytest.raises(UserError, match="narrower than the window"):
        with_sampler(generator, "sliding_window").sample(1, size=(32, 16 - stride))
    fewer = generator.sample(1, size=(stride, 16), seed=2)  # one row of tokens: the start of a sequence
    tokens = generator.sample_tokens(Batch(labels=torch.tensor([0])), seed=2)
    assert torch.equal(
        fewer, generator.tokenizer.decode_tokens(tokens[:, :width], generator.tokenizer.layout_of((1, width)))
    )


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (15, "size=[15,15]: the tokenizer's stride {stride} must divide it; the nearest that fits is size=[16,16]"),
        ((16, 16, 16), "size=(16, 16, 16): must be one number, or height and width as size=[512,768]"),
        ("big", "size=big: must be one number, or height and width as size=[512,768]"),
        (-16, "size=[-16,-16]: height and width must be at least 1"),
    ],
)
def test_a_wrong_size_is_named(generator: Generator, size: Any, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words.format(stride=generator.tokenizer.stride))):
        generator.sample(1, size=size)


@pytest.mark.parametrize("sampler", ["autoregressive", "sliding_window"])
def test_completion_keeps_what_is_known_and_draws_the_rest(generator: Generator, sampler: str) -> None:
    made = with_sampler(generator, sampler)
    indices = made.tokenizer.encode(make_images())
    height, width = made.tokenizer.layout.grid
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[: height // 2] = True
    completed = made.complete(make_images(), mask, seed=1)
    tokens = made.sample_tokens(
        Batch(labels=torch.tensor([0, 1, 2])), seed=1, known=indices.masked_fill(~mask, -1).flatten(1)
    ).reshape(indices.shape)
    assert torch.equal(tokens[:, mask], indices[:, mask])
    assert not torch.equal(tokens, indices)
    assert torch.equal(completed, made.tokenizer.decode(tokens))
    assert torch.equal(made.complete(indices, mask, seed=1), completed)
    assert not torch.equal(made.complete(indices, mask, seed=2), completed)
    apart = [made.complete(indices[i : i + 1], mask, labels=[i], seed=1, first=i) for i in range(3)]
    torch.testing.assert_close(torch.cat(apart), completed)
    torch.testing.assert_close(made.complete(make_images(), mask, seed=1, batch_size=2), completed)


def test_a_mask_may_be_of_pixels_and_differ_between_images(generator: Generator) -> None:
    indices = generator.tokenizer.encode(make_images())
    codes = torch.rand(indices.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    stride = generator.tokenizer.stride
    pixels = codes.repeat_interleave(stride, 1).repeat_interleave(stride, 2)
    expected = generator.complete(indices, codes, seed=3)
    assert torch.equal(generator.complete(indices, pixels, seed=3), expected)
    some = codes.nonzero()[0]
    pixels[some[0], some[1] * stride + stride - 1, some[2] * stride] = (
        False  # one unknown pixel makes its token unknown
    )
    codes[tuple(some)] = False
    assert torch.equal(generator.complete(indices, pixels, seed=3), generator.complete(indices, codes, seed=3))
    with pytest.raises(ValueError, match=r"the mask must be .* not \(5, 5\)"):
        generator.complete(indices, torch.ones(5, 5, dtype=torch.bool))


def test_a_mask_that_hides_nothing_gives_the_reconstruction(generator: Generator) -> None:
    mask = torch.ones(16, 16, dtype=torch.bool)
    assert torch.equal(
        generator.complete(make_images(), mask), generator.tokenizer.decode(generator.tokenizer.encode(make_images()))
    )


def test_guidance_reaches_the_sampler_from_the_conditioner(generator: Generator) -> None:
    guided = with_sampler(generator, "autoregressive", guidance=6.0)
    labels = torch.tensor([0, 1, 2, 0])
    assert not torch.equal(guided.sample_tokens(Batch(labels=labels)), generator.sample_tokens(Batch(labels=labels)))
    null = torch.full((4, 1), 3)
    expected = guided.sampler(guided.prior, labels[:, None], guided.tokenizer.layout, seed=0, null_prefix=null)
    assert torch.equal(guided.sample_tokens(Batch(labels=labels)), expected)
    never = build("conditioner", {"name": "label"}, num_classes=3).eval()
    without = Generator(guided.tokenizer, ConditionerStack({"label": never}), guided.prior, guided.sampler, CLASSES)
    with pytest.raises(UserError, match=r"model\.conditioner\.label\.dropout"):
        without.sample(1)


class Zeros:
    """A sampler that cannot keep known tokens."""

    draws, keeps_known = Causal, False

    def __call__(self, prior: Any, prefix: Prefix, layout: TokenLayout, *, known: Tensor | None, **_: Any) -> Tensor:
        assert known is None
        return torch.zeros(len(prefix), layout.length, dtype=torch.int64)


def test_a_sampler_says_whether_it_keeps_known_tokens(generator: Generator) -> None:
    plain = Generator(generator.tokenizer, generator.conditioner, generator.prior, Zeros(), CLASSES)
    assert not plain.sample_tokens(Batch(labels=torch.tensor([0, 1]))).any()
    with pytest.raises(UserError, match="cannot keep known tokens; sampler=autoregressive does"):
        plain.complete(make_images(), torch.ones(16, 16, dtype=torch.bool))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generator")
    options = [*TINY, "steps=1", "logger=[]", "metric=[psnr]", "evaluate.count=4"]
    Stage1(compose(*options), folder / "stage1").run()
    Stage2(compose(*options, "pipeline=stage2", f"run={folder / 'stage1'}"), folder / "stage2").run()
    return folder / "stage2"


def test_the_pipeline_completes_held_out_images(run: Path, tmp_path: Path) -> None:
    config = compose("pipeline=complete", f"run={run}", "logger=[images]", "batch_size=4")
    build("pipeline", {"name": "complete", "count": 6, "keep": 0.5}, config=config, run_dir=tmp_path).run()
    files = sorted((tmp_path / "completions").iterdir())
    assert [each.name for each in files] == [f"{i:06d}.png" for i in range(6)]
    assert {Image.open(each).size for each in files} == {(16, 16)}
    assert list((tmp_path / "images").glob("completions*.png"))


def completed(run: Path, folder: Path, *words: str, **options: Any) -> dict[str, bytes]:
    Complete(compose("pipeline=complete", f"run={run}", "logger=[]", *words), folder, **options).run()
    return {each.name: each.read_bytes() for each in (folder / "completions").iterdir()}


def a_mask(path: Path, hidden: tuple[slice, slice], side: int) -> str:
    pixels = np.full((side, side), 255, np.uint8)
    pixels[hidden] = 0
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.mark.parametrize("side", [16, 64, 5])
def test_a_mask_of_any_size_says_what_is_drawn_anew(
    run: Path, tmp_path: Path, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask that is black in the lower right quarter: of 2 x 2 tokens only that one is sampled."""
    seen = []
    monkeypatch.setattr(Generator, "complete", lambda self, images, mask, **options: seen.append(mask) or images)
    middle = -(-side // 2)
    completed(
        run, tmp_path, mask=a_mask(tmp_path / "mask.png", (slice(middle, None), slice(middle, None)), side), count=2
    )
    assert seen[0].tolist() == [[True, True], [True, False]]
    with pytest.raises(UserError, match="no pixel is black, so there is nothing to sample"):
        completed(run, tmp_path / "b", mask=a_mask(tmp_path / "white.png", (slice(0), slice(0)), 9))
    with pytest.raises(UserError, match="keep and mask: both say what is kept"):
        completed(run, tmp_path / "b", mask=str(tmp_path / "mask.png"), keep=0.3)


def test_own_images_are_completed(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 50, 3)).astype(np.uint8)).save(
        tmp_path / "mine/a.png"
    )
    mask = a_mask(tmp_path / "mask.png", (slice(0, 8), slice(0, 8)), 16)
    first = completed(run, tmp_path / "a", images=str(tmp_path / "mine"), mask=mask, label="Objects")
    assert list(first) == ["000000.png"]
    assert first == completed(run, tmp_path / "b", images=str(tmp_path / "mine"), mask=mask, label="Objects")


def test_a_folder_that_is_gone_on_with_holds_the_same_images(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vqf.config.inherit.cli_keys", lambda: ["batch_size"])
    expected = completed(run, tmp_path / "whole", "batch_size=2", count=5)
    completed(run, tmp_path / "cut", "batch_size=2", count=5)
    for name in ("000003.png", "000004.png"):
        (tmp_path / "cut" / "completions" / name).unlink()
    times = {each: each.stat().st_mtime_ns for each in (tmp_path / "cut" / "completions").iterdir()}
    assert completed(run, tmp_path / "cut", "batch_size=2", "resume=true", count=5) == expected
    untouched = [each.name for each, time in times.items() if each.stat().st_mtime_ns == time]
    assert sorted(untouched) == ["000000.png", "000001.png"]
    mask = a_mask(tmp_path / "mask.png", (slice(0, 9), slice(0, 9)), 16)
    for words, options, difference in (
        (["seed=3"], {}, "seed 0 → 3"),
        ([], {"mask": mask}, r"kept \[1,1,0,0\] → \[0,0,0,0\]"),
        ([], {"label": "Objects"}, "label null → Objects, image"),
        ([], {"count": 4}, "image"),
    ):
        with pytest.raises(UserError, match=rf"00000\d\.png was sampled with other settings: {difference}"):
            completed(run, tmp_path / "cut", "resume=true", *words, **{"count": 5, **options})


SETTINGS: list[tuple[list[str], dict[str, Any], str]] = [
    (["seed=5", "sampler.temperature=3"], {}, "seed 0 → 5, sampler.temperature 1.0 → 3.0"),
    (["sampler=sliding_window"], {}, "sampler autoregressive → sliding_window"),
    ([], {"label": "Objects"}, "label null → Objects"),
    ([], {"size": [16, 16]}, r"size null → \[16,16\]"),
    (["scorer=likelihood"], {"candidates": 2}, "scorer null → likelihood, candidates 1 → 2"),
]


@pytest.mark.parametrize(("words", "options", "difference"), SETTINGS)
def test_samples_of_other_settings_are_not_mixed(
    run: Path,
    tmp_path: Path,
    words: list[str],
    options: dict[str, Any],
    difference: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def sample(*words: str, **options: Any) -> None:
        SamplePipeline(compose("pipeline=sample", f"run={run}", "logger=[]", *words), tmp_path, **options).run()

    monkeypatch.setattr("vqf.config.inherit.cli_keys", lambda: ["sampler"])
    sample(count=2)
    before = {each.name: each.read_bytes() for each in (tmp_path / "samples").iterdir()}
    sample("resume=true", count=3)  # one more image of the same run
    refusal = f"000000.png was sampled with other settings: {difference}; set them"
    with pytest.raises(UserError, match=refusal) as caught:
        sample("resume=true", *words, count=4, **options)
    assert "\n" not in str(caught.value)
    after = {each.name: each.read_bytes() for each in (tmp_path / "samples").iterdir()}
    assert sorted(after) == [f"00000{i}.png" for i in range(3)] and before.items() <= after.items()
    Image.new("RGB", (16, 16)).save(tmp_path / "samples" / "000001.png")
    with pytest.raises(UserError, match=r"000001\.png has no sampling settings in it"):
        sample("resume=true", count=3)


@pytest.mark.parametrize(("options", "words"), [({"keep": 1.0}, "keep=1.0: must be"), ({"count": 0}, "count=0: must")])
def test_complete_refuses_nonsense(options: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        Complete(OmegaConf.create(), tmp_path, **options)


def test_the_pipeline_samples_any_size(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose("pipeline=sample", f"run={run}", "logger=[]", "sampler=sliding_window", "batch_size=2")
    with monkeypatch.context() as patch:
        patch.setattr("vqf.config.inherit.cli_keys", lambda: ["sampler", "batch_size"])
        SamplePipeline(config, tmp_path, count=3, size=[32, 48]).run()
    sizes = {Image.open(each).size for each in (tmp_path / "samples").iterdir()}
    assert sizes == {(48, 32)}
    with pytest.raises(UserError, match="sampler=sliding_window"):
        SamplePipeline(compose("pipeline=sample", f"run={run}", "logger=[]"), tmp_path, count=3, size=32).run()


@pytest.mark.parametrize("prior", ["gpt", "llama"])
@pytest.mark.parametrize("sampler", ["autoregressive", "sliding_window"])
def test_eight_images_learned_by_heart_come_back_token_for_token(prior: str, sampler: str) -> None:
    """End to end: emoji, their tokens and labels, a prior trained on them, and the sampler."""
    words = [f"model/prior={prior}", "model/conditioner=label", "model/quantizer=ema"]
    config = compose(*TINY, *words, "model.prior.layers=2", "model.prior.heads=2", "model.prior.dim=32")
    torch.manual_seed(0)
    split = build("data", config.data, image_size=32, seed=0).split("train")
    shown = torch.stack([split.item(0, i * len(split) // 8).image for i in range(8)])
    tokenizer = build_tokenizer(config.model, 32)
    tokenizer(shown)  # initializes the codes to latents of the images
    tokens, labels = tokenizer.eval().encode_tokens(shown), torch.arange(8)
    assert len({tuple(each) for each in tokens.tolist()}) == 8, "the codes do not tell the images apart"
    made = build_generator(config, tokenizer, [str(each) for each in range(8)])
    optimizer = torch.optim.AdamW(made.prior.parameters(), lr=5e-3)  # type: ignore[attr-defined]
    for _ in range(300):
        optimizer.zero_grad()
        made.prior.loss(tokens, made.conditioner(Batch(labels=labels))).backward()
        optimizer.step()
    greedy = with_sampler(made, sampler, top_k=1)
    assert torch.equal(greedy.sample_tokens(Batch(labels=labels), seed=1), tokens)
    torch.testing.assert_close(greedy.sample(8, seed=1), tokenizer.decode_tokens(tokens))
