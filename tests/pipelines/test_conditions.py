"""Stage 2 told by maps: three trainings in one command, and pictures drawn by a map of any size."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import vqf
from tests.composing import compose
from tests.pipelines.test_loop import TINY
from vqf.errors import UserError
from vqf.generator import Generator
from vqf.pipelines.checkpoint import newest
from vqf.pipelines.full import Full
from vqf.pipelines.pictures import as_colours, read_picture
from vqf.pipelines.reconstruct import Reconstruct
from vqf.pipelines.sample import Sample
from vqf.pipelines.stage1 import Stage1
from vqf.pipelines.stage2 import Stage2
from vqf.protocols import Sample as Shown
from vqf.registry import register
from vqf.tokenizer import Tokenizer

EARTH = [*TINY, "data=earth", "data.crops=32", "evaluate.count=4", "model/conditioner=spatial"]
FULL = [*EARTH, "pipeline=full", "sampler=sliding_window", "stage2.steps=4", "maps.steps=3", "maps.batch_size=4"]
CLASSES = 5


class Zones:
    """Pictures whose map says which of five classes every pixel is of, one-hot."""

    def __init__(self, image_size: tuple[int, int], seed: int) -> None:
        self.size, self.classes = image_size, ()

    def split(self, name: str) -> "Zones":
        self.fingerprint = name
        return self

    def __len__(self) -> int:
        return 16

    def item(self, epoch: int, index: int) -> Shown:
        zones = (torch.arange(self.size[0])[:, None] // 5 + torch.arange(self.size[1]) // 7 + index) % CLASSES
        zones = torch.nn.functional.one_hot(zones, CLASSES).permute(2, 0, 1).float()
        return Shown(zones[:3] * 2 - 1, condition=zones)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earth") / "run"
    Full(compose(*FULL), folder).run()
    return folder


def named(monkeypatch: pytest.MonkeyPatch, *places: str) -> None:
    """Say what stands on the command line: outside of a Hydra job nobody else does."""
    monkeypatch.setattr("vqf.pipelines.inherit.given", lambda: list(places))


def a_map(path: Path, width: int, height: int, mode: str = "RGB") -> Path:
    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).convert(mode).save(path)
    return path


def drawn(run: Path, folder: Path, *words: str, **options: object) -> Path:
    Sample(compose("pipeline=sample", f"run={run}", "logger=[]", *words), folder, **options).run()  # type: ignore[arg-type]
    return folder / "samples"


def test_one_command_trains_both_tokenizers_and_the_prior(run: Path) -> None:
    maps, pictures, generator = vqf.load(run / "maps"), vqf.load(run / "stage1"), vqf.load(run)
    assert isinstance(maps, Tokenizer) and isinstance(pictures, Tokenizer) and isinstance(generator, Generator)
    assert maps.fingerprint() != pictures.fingerprint()
    told = generator.conditioner.parts["spatial"]
    assert told.tokenizer.fingerprint() == maps.fingerprint()  # type: ignore[attr-defined]
    assert newest(run / "maps").step == 3  # type: ignore[union-attr]


def test_a_drawn_map_becomes_a_picture_of_its_size(run: Path, tmp_path: Path) -> None:
    path = a_map(tmp_path / "map.png", 40, 24)
    first = drawn(run, tmp_path / "first", condition=str(path), count=2)
    assert sorted(each.name for each in first.iterdir()) == ["map-000000.png", "map-000001.png"]
    assert Image.open(first / "map-000000.png").size == (40, 24)
    again = drawn(run, tmp_path / "again", "batch_size=1", condition=str(path), count=2)
    assert [(again / each.name).read_bytes() == each.read_bytes() for each in first.iterdir()] == [True, True]
    generator = vqf.load(run)
    assert isinstance(generator, Generator)
    picture = generator.sample(1, conditions=read_picture(path, 3))
    assert picture.shape == (1, 3, 24, 40)


def test_sides_are_brought_to_what_the_stride_divides(run: Path, tmp_path: Path) -> None:
    samples = drawn(run, tmp_path / "out", condition=str(a_map(tmp_path / "map.png", 37, 29)))
    assert Image.open(samples / "map-000000.png").size == (40, 32)


def test_a_folder_of_maps_gives_a_picture_for_each(run: Path, tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    for name in "ab":
        a_map(tmp_path / "maps" / f"{name}.png", 16, 16, "P" if name == "a" else "L")
    samples = drawn(run, tmp_path / "out", condition=str(tmp_path / "maps"))
    assert sorted(each.name for each in samples.iterdir()) == ["a-000000.png", "b-000000.png"]


def test_without_a_map_held_out_ones_take_turns(run: Path, tmp_path: Path) -> None:
    assert len(list(drawn(run, tmp_path / "out", count=3).iterdir())) == 3


def test_the_run_needs_no_other_folder(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "stage2", tmp_path / "alone")
    first, alone = vqf.load(run), vqf.load(tmp_path / "alone")
    assert isinstance(first, Generator) and isinstance(alone, Generator)
    config = newest(tmp_path / "alone").config  # type: ignore[union-attr]
    shutil.move(config.model.conditioner.spatial.run, tmp_path / "gone")
    try:
        alone = vqf.load(tmp_path / "alone")
        maps = torch.rand(3, 16, 16) * 2 - 1
        assert torch.equal(first.sample(2, conditions=maps), alone.sample(2, conditions=maps))  # type: ignore[union-attr]
    finally:
        shutil.move(tmp_path / "gone", config.model.conditioner.spatial.run)


def test_cached_codes_are_those_of_the_map_beside_each_picture(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training on the cache sees the prefix that encoding on the fly gives; other conditions do not fit the cache."""
    from safetensors.torch import load_file

    kept = load_file(run / "stage2" / "tokens" / "validation-00000.safetensors")
    generator = vqf.load(run)
    assert isinstance(generator, Generator)
    from vqf.registry import build

    config = compose(*EARTH)
    split = build("data", config.data, image_size=(16, 16), seed=config.seed).split("validation")
    for index in (0, len(split) - 1):
        sample = split.item(0, index)
        assert sample.condition is not None
        codes = generator.conditioner.parts["spatial"].tokenizer.encode(sample.condition[None])  # type: ignore[attr-defined]
        assert torch.equal(kept["codes.spatial"][index].long(), codes[0])
        assert torch.equal(kept["tokens"][index].long(), generator.tokenizer.tokens(sample.image[None])[0])
    named(monkeypatch, "model.conditioner")
    words = [f"run={run}", f"tokens.root={run / 'stage2' / 'tokens'}", "model/conditioner=none", "pipeline=stage2"]
    with pytest.raises(UserError, match=r"was made with conditions \w+, this run has \w+"):
        Stage2(compose(*TINY, "data=earth", "data.crops=32", *words), tmp_path / "other").run()


def test_conditions_in_a_list_guide_together(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named(monkeypatch, "model.conditioner", "sampler", "steps")
    words = [f"run={run / 'stage1'}", f"model.conditioner.spatial.run={run / 'maps'}", "pipeline=stage2", "steps=2"]
    many = ["model/conditioner=[spatial,coordinates,image]", "model.conditioner.spatial.drop=0.3"]
    config = compose(*EARTH[:-1], *many, "model.conditioner.image.factor=2", *words, "sampler=sliding_window")
    Stage2(config, tmp_path / "many").run()
    generator = vqf.load(tmp_path / "many")
    assert isinstance(generator, Generator)
    assert generator.conditioner.length == 4 + 4 + 1
    samples = drawn(
        tmp_path / "many",
        tmp_path / "out",
        "sampler=sliding_window",
        "sampler.guidance=3",
        condition=str(a_map(tmp_path / "m.png", 32, 24)),
    )
    assert Image.open(samples / "m-000000.png").size == (
        32,
        32,
    )  # sides are multiples of 16: half the picture has codes, too


def test_a_resumed_stage2_goes_on_bit_for_bit(run: Path, tmp_path: Path) -> None:
    words = [*EARTH, f"run={run / 'stage1'}", f"model.conditioner.spatial.run={run / 'maps'}", "pipeline=stage2"]
    Stage2(compose(*words), tmp_path / "whole").run()
    folder = tmp_path / "cut"
    Stage2(compose(*words), folder).run()
    for step in (4, 6):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")
    Stage2(compose(*words, "resume=true"), folder).run()
    for name in ("model", "conditioner", "ema"):
        whole, cut = (newest(each).weights(name) for each in (tmp_path / "whole", folder))  # type: ignore[union-attr]
        assert all(torch.equal(whole[key], cut[key]) for key in whole)


@pytest.mark.usefixtures("isolated")
def test_maps_of_classes_have_a_channel_for_each(tmp_path: Path) -> None:
    """Segmentations: trained, reconstructed, shown in colours, and drawn by from a picture of class numbers."""
    register("data", "zones")(Zones)
    words = [each for each in FULL if not each.startswith("data")]
    Full(compose(*words, "data=zones", "evaluate.count=4"), tmp_path / "run").run()
    maps = vqf.load(tmp_path / "run" / "maps")
    assert isinstance(maps, Tokenizer) and maps.channels == CLASSES
    config = compose("pipeline=reconstruct", f"run={tmp_path / 'run' / 'maps'}", "metric=[psnr]", "logger=[]")
    Reconstruct(config, tmp_path / "back", count=2).run()
    assert len(list((tmp_path / "back" / "reconstructions").iterdir())) == 2
    numbers = Image.fromarray((torch.arange(24 * 24).reshape(24, 24) % CLASSES).to(torch.uint8).numpy())
    numbers.save(tmp_path / "numbers.png")
    samples = drawn(tmp_path / "run", tmp_path / "out", condition=str(tmp_path / "numbers.png"))
    assert Image.open(samples / "numbers-000000.png").size == (24, 24)
    Image.new("L", (16, 16), CLASSES).save(tmp_path / "wrong.png")
    with pytest.raises(UserError, match="a pixel is of class 5; there are 5, counted from 0"):
        drawn(tmp_path / "run", tmp_path / "wrong", condition=str(tmp_path / "wrong.png"))


@pytest.mark.parametrize("channels", [1, 3, 7])
def test_what_is_read_is_what_was_saved(channels: int, tmp_path: Path) -> None:
    numbers = torch.randint(7 if channels == 7 else 256, (12, 8, 3), dtype=torch.uint8)
    pixels: Tensor = numbers if channels == 3 else numbers[..., 0]
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    found = read_picture(tmp_path / "a.png", channels)
    assert found.shape == (channels, 12, 8)
    if channels == 7:
        assert torch.equal(found.argmax(0), pixels.long()) and torch.equal(found.sum(0), torch.ones(12, 8))
        assert len(as_colours(found[None]).flatten(2).unique(dim=2)[0].T) == 7
    else:
        assert torch.equal(((found + 1) * 127.5).round(), pixels.reshape(12, 8, -1).permute(2, 0, 1).float())
        assert as_colours(found[None]).shape == (1, 3, 12, 8)


def refusals() -> list[tuple[list[str], str]]:
    return [
        (["data=earth", "subject=maps"], "subject=maps: unknown subject 'maps'"),
        (["data=emoji", "subject=condition"], "data 'emoji' has no maps beside its pictures"),
    ]


@pytest.mark.parametrize(("words", "message"), refusals())
def test_a_tokenizer_of_maps_needs_maps(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        Stage1(compose(*TINY, *words), tmp_path).run()


def test_stage2_says_where_maps_would_come_from(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named(monkeypatch, "model.conditioner", "data")
    words = [*TINY, "data=emoji", "pipeline=stage2", f"run={run / 'stage1'}", "model/conditioner=spatial"]
    with pytest.raises(UserError, match=r"model\.conditioner\.spatial\.run: a map has a tokenizer of its own"):
        Stage2(compose(*words), tmp_path / "a").run()
    with pytest.raises(UserError, match="the data has no maps beside its pictures"):
        Stage2(compose(*words, f"model.conditioner.spatial.run={run / 'maps'}"), tmp_path / "b").run()


def test_what_cannot_be_drawn_by_is_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    for condition, words in (
        ("nowhere.png", "no such file or folder"),
        ("empty", "the folder is empty"),
        ("text.png", "no picture that can be read"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            drawn(run, tmp_path / "out", condition=str(tmp_path / condition))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="a picture is as large as its condition"):
        drawn(run, tmp_path / "out", condition="a.png", size=64)
    small = a_map(tmp_path / "small.png", 8, 8)
    with pytest.raises(
        UserError, match="a picture of 8 x 8 pixels is smaller than the 16 x 16 that the prior has learned"
    ):
        drawn(run, tmp_path / "out", condition=str(small))
