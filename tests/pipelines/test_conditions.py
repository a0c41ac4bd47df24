"""Stage 2 told by maps: three trainings in one command, and images drawn by a map of any size."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vqf
from tests.support.composing import compose
from tests.training.test_trainer import TINY
from vqf.batch import Batch, Size
from vqf.batch import Sample as Shown
from vqf.data.images.maps import MapDecoder
from vqf.errors import UserError
from vqf.images import condition_map_reader, condition_reader, read_image, to_rgb
from vqf.models.generator import Generator
from vqf.models.tokenizer import Tokenizer
from vqf.pipelines.complete import Complete
from vqf.pipelines.full import Full
from vqf.pipelines.reconstruct import Reconstruct
from vqf.pipelines.sample import SamplePipeline
from vqf.pipelines.stage1 import Stage1
from vqf.pipelines.stage2 import Stage2
from vqf.registry import build, register
from vqf.runs.checkpoint import latest_checkpoint

EARTH = [*TINY, "data=earth", "data.crops=32", "evaluate.count=4", "model/conditioner=spatial"]
FULL = [*EARTH, "pipeline=full", "sampler=sliding_window", "stage2.steps=4", "maps.steps=3", "maps.batch_size=4"]
CLASSES = 5


class Zones:
    """Images whose map says which of five classes every pixel is of, one-hot."""

    def __init__(self, image_size: tuple[int, int], seed: int) -> None:
        self.size, self.classes = image_size, ()

    @staticmethod
    def condition_reader() -> MapDecoder:
        return MapDecoder("labels", CLASSES)

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
    monkeypatch.setattr("vqf.config.inherit.cli_keys", lambda: list(places))


def a_map(path: Path, width: int, height: int, mode: str = "RGB") -> Path:
    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).convert(mode).save(path)
    return path


def drawn(run: Path, folder: Path, *words: str, **options: object) -> Path:
    SamplePipeline(compose("pipeline=sample", f"run={run}", "logger=[]", *words), folder, **options).run()  # type: ignore[arg-type]
    return folder / "samples"


def test_one_command_trains_both_tokenizers_and_the_prior(run: Path) -> None:
    maps, images, generator = vqf.load(run / "maps"), vqf.load(run / "stage1"), vqf.load(run)
    assert isinstance(maps, Tokenizer) and isinstance(images, Tokenizer) and isinstance(generator, Generator)
    assert maps.fingerprint() != images.fingerprint()
    told = generator.conditioner.conditioners["spatial"]
    assert told.tokenizer.fingerprint() == maps.fingerprint()  # type: ignore[attr-defined]
    assert latest_checkpoint(run / "maps").step == 3  # type: ignore[union-attr]


def test_a_drawn_map_becomes_an_image_of_its_size(run: Path, tmp_path: Path) -> None:
    path = a_map(tmp_path / "map.png", 40, 24)
    first = drawn(run, tmp_path / "first", condition=str(path), count=2)
    assert sorted(each.name for each in first.iterdir()) == ["map-000000.png", "map-000001.png"]
    assert Image.open(first / "map-000000.png").size == (40, 24)
    again = drawn(run, tmp_path / "again", "batch_size=1", condition=str(path), count=2)
    assert [(again / each.name).read_bytes() == each.read_bytes() for each in first.iterdir()] == [True, True]
    generator = vqf.load(run)
    assert isinstance(generator, Generator)
    image = generator.sample(1, conditions=read_image(path))
    saved = read_image(first / "map-000000.png")
    torch.testing.assert_close(image[0], saved, rtol=0, atol=1 / 255)


@pytest.mark.parametrize("size", [(37, 29), (16, 16), (9, 30), (5, 3)])
def test_a_map_of_any_size_gives_an_image_of_exactly_that_size(run: Path, tmp_path: Path, size: Size) -> None:
    """What the stride does not divide, or is smaller than a window, is continued by its edge, and cut off again."""
    path = a_map(tmp_path / "map.png", *size)
    samples = drawn(run, tmp_path / "out", condition=str(path))
    assert Image.open(samples / "map-000000.png").size == size
    generator, whole = vqf.load(run), read_image(path)
    assert isinstance(generator, Generator)
    sides = [max(-(-side // 8) * 8, 16) for side in whole.shape[1:]]
    rows, columns = (torch.arange(side).clamp(max=old - 1) for side, old in zip(sides, whole.shape[1:], strict=True))
    enlarged = generator.sample(1, conditions=whole[:, rows][:, :, columns])
    assert torch.equal(generator.sample(1, conditions=whole), enlarged[..., : size[1], : size[0]])


def test_a_folder_of_maps_gives_an_image_for_each(run: Path, tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    for name in "ab":
        a_map(tmp_path / "maps" / f"{name}.png", 16, 16, "P" if name == "a" else "L")
    (tmp_path / "maps" / ".DS_Store").write_bytes(b"\0")
    (tmp_path / "maps" / "notes.txt").write_text("not a map")
    samples = drawn(run, tmp_path / "out", condition=str(tmp_path / "maps"))
    assert sorted(each.name for each in samples.iterdir()) == ["a-000000.png", "b-000000.png"]
    a_map(tmp_path / "maps" / "a.bmp", 16, 24)
    samples = drawn(run, tmp_path / "two", condition=str(tmp_path / "maps"))
    assert sorted(each.name for each in samples.iterdir()) == [f"{name}-000000.png" for name in ("a.bmp", "a.png", "b")]


def test_without_a_map_held_out_ones_take_turns(run: Path, tmp_path: Path) -> None:
    assert len(list(drawn(run, tmp_path / "out", count=3).iterdir())) == 3


def test_the_run_needs_no_other_folder(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "stage2", tmp_path / "alone")
    first, alone = vqf.load(run), vqf.load(tmp_path / "alone")
    assert isinstance(first, Generator) and isinstance(alone, Generator)
    config = latest_checkpoint(tmp_path / "alone").config  # type: ignore[union-attr]
    shutil.move(config.model.conditioner.spatial.run, tmp_path / "gone")
    try:
        alone = vqf.load(tmp_path / "alone")
        maps = torch.rand(3, 16, 16) * 2 - 1
        assert torch.equal(first.sample(2, conditions=maps), alone.sample(2, conditions=maps))  # type: ignore[union-attr]
    finally:
        shutil.move(tmp_path / "gone", config.model.conditioner.spatial.run)


def test_cached_codes_are_those_of_the_map_beside_each_image(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training on the cache sees the prefix that encoding on the fly gives; other conditions do not fit the cache."""
    from safetensors.torch import load_file

    kept = load_file(run / "stage2" / "tokens" / "validation-00000.safetensors")
    generator = vqf.load(run)
    assert isinstance(generator, Generator)
    config = compose(*EARTH)
    split = build("data", config.data, image_size=(16, 16), seed=config.seed).split("validation")
    for index in (0, len(split) - 1):
        sample = split.item(0, index)
        assert sample.condition is not None
        codes = generator.conditioner.conditioners["spatial"].tokenizer.encode(sample.condition[None])  # type: ignore[attr-defined]
        assert torch.equal(kept["condition_indices.spatial"][index].long(), codes[0])
        assert torch.equal(kept["tokens"][index].long(), generator.tokenizer.encode_tokens(sample.image[None])[0])
    named(monkeypatch, "model.conditioner")
    words = [f"run={run}", f"tokens.root={run / 'stage2' / 'tokens'}", "model/conditioner=none", "pipeline=stage2"]
    with pytest.raises(UserError, match=r"was made with conditions \w+, this run has \w+"):
        Stage2(compose(*TINY, "data=earth", "data.crops=32", *words), tmp_path / "other").run()


@pytest.fixture(scope="module")
def many(run: Path) -> Path:
    """A prior that is told maps, places and poorer images."""
    folder, words = run.parent / "many", [f"run={run / 'stage1'}", f"model.conditioner.spatial.run={run / 'maps'}"]
    conditioners = ["model/conditioner=[spatial,coordinates,image]", "model.conditioner.spatial.dropout=0.3"]
    config = compose(
        *EARTH[:-1], *conditioners, "model.conditioner.image.factor=2", *words, "pipeline=stage2", "steps=2"
    )
    with pytest.MonkeyPatch.context() as patch:
        named(patch, "model.conditioner", "steps")
        Stage2(config, folder).run()
    return folder


def held_out(count: int) -> Batch:
    data = build("data", compose(*EARTH).data, image_size=(16, 16), seed=0).split("validation")
    return Batch.collate([data.item(0, i * len(data) // count) for i in range(count)])


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Take notes of what every prior is told."""
    notes: list[Batch] = []
    sample_tokens = Generator.sample_tokens

    def noting(self: Generator, told: Batch, **options: Any) -> torch.Tensor:
        notes.append(told)
        return sample_tokens(self, told, **options)

    monkeypatch.setattr(Generator, "sample_tokens", noting)
    return notes


def test_several_conditions_are_a_file_each(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named(monkeypatch, "sampler")
    generator = vqf.load(many)
    assert isinstance(generator, Generator) and generator.conditioner.length == 4 + 4 + 1
    a_map(tmp_path / "m.png", 32, 24), a_map(tmp_path / "p.jpg", 32, 24)
    both = {"spatial": str(tmp_path / "m.png"), "image": str(tmp_path / "p.jpg")}
    words = ["sampler=sliding_window", "sampler.guidance=3"]
    samples = drawn(many, tmp_path / "out", *words, condition=both)
    assert Image.open(samples / "m-000000.png").size == (32, 24)
    for condition, message in (
        (both["spatial"], r"has 2 image conditioners; give condition=\{spatial:spatial.png,image:image.png\}"),
        ({"spatial": both["spatial"]}, "the image for conditioner 'image' is missing"),
        ({**both, "map": both["spatial"]}, r"condition\.map: this prior has no image conditioner of that name"),
        ({**both, "spatial": str(a_map(tmp_path / "s.png", 16, 16))}, "images of 16 x 16 and 24 x 32 pixels"),
    ):
        with pytest.raises(UserError, match=message):
            drawn(many, tmp_path / "wrong", *words, condition=condition)
    assert not (tmp_path / "wrong").exists()


def test_held_out_samples_tell_all_that_they_have(many: Path, tmp_path: Path, told: list[Batch]) -> None:
    """Map, image and place, those of the sample that training would have shown."""
    drawn(many, tmp_path / "out", count=3)
    expected = held_out(3)
    assert len(told) == 1 and (expected.crop_boxes[:, 2] - expected.crop_boxes[:, 0] < 0.1).all()  # type: ignore[index]
    for name in ("images", "conditions", "crop_boxes"):
        assert torch.equal(getattr(told[0], name), getattr(expected, name))


def test_a_place_says_where_a_drawn_map_lies(many: Path, tmp_path: Path, told: list[Batch]) -> None:
    both = {"spatial": str(a_map(tmp_path / "m.png", 24, 20)), "image": str(a_map(tmp_path / "p.png", 24, 20))}
    with pytest.MonkeyPatch.context() as patch:
        named(patch, "sampler")
        drawn(many, tmp_path / "out", "sampler=sliding_window", condition=both, place=[0.2, 0.0, 0.4, 1.0])
    # 20 rows are continued to 32, 24 columns to 32: the part that is kept still lies where it was said.
    torch.testing.assert_close(told[0].crop_boxes, torch.tensor([[0.2, 0.0, 0.2 + 0.2 * 32 / 20, 32 / 24]]))
    with pytest.raises(UserError, match=r"place=\[0\.5, 0\.2\]: give top, left, bottom and right"):
        drawn(many, tmp_path / "wrong", condition=both, place=[0.5, 0.2])


def test_completion_is_told_what_training_was(
    many: Path, tmp_path: Path, told: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    named(monkeypatch, "batch_size")
    config = compose("pipeline=complete", f"run={many}", "logger=[]", "batch_size=2")
    Complete(config, tmp_path, count=4).run()
    expected = held_out(4)
    assert [len(each) for each in told] == [2, 2]
    for name in ("images", "conditions", "crop_boxes"):
        assert torch.equal(torch.cat([getattr(each, name) for each in told]), getattr(expected, name))
    assert len(list((tmp_path / "completions").iterdir())) == 4
    with pytest.raises(UserError, match="images: this prior is also conditioned on maps; give images with maps"):
        Complete(config, tmp_path / "own", images=str(tmp_path / "completions")).run()


def test_a_resumed_stage2_goes_on_bit_for_bit(run: Path, tmp_path: Path) -> None:
    words = [*EARTH, f"run={run / 'stage1'}", f"model.conditioner.spatial.run={run / 'maps'}", "pipeline=stage2"]
    Stage2(compose(*words), tmp_path / "whole").run()
    folder = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (4, 6):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")
    Stage2(compose(*words, "resume=true"), folder).run()
    for name in ("model", "conditioner", "ema"):
        whole, cut = (latest_checkpoint(each).load_weights(name) for each in (tmp_path / "whole", folder))  # type: ignore[union-attr]
        assert all(torch.equal(whole[key], cut[key]) for key in whole)


@pytest.mark.usefixtures("isolated")
def test_maps_of_classes_have_a_channel_for_each(tmp_path: Path) -> None:
    """Segmentations: trained, reconstructed, shown in colours, and drawn by from an image of class numbers."""
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
    with pytest.raises(UserError, match=r"the label 5 is not below data\.labels=5"):
        drawn(tmp_path / "run", tmp_path / "wrong", condition=str(tmp_path / "wrong.png"))


def pixels_of(maps: str, labels: int) -> np.ndarray:
    """Return pixels (12, 16, ...) of a map of a kind, as a file has them: every class occurs, and 255 for none."""
    random = np.random.default_rng(0)
    if maps == "labels":
        return np.append(np.arange(192 - 20) % (labels - 1), [255] * 20).reshape(12, 16).astype(np.uint8)
    if maps == "grey16":
        return random.integers(2**16, size=(12, 16)).astype(np.uint16)
    return random.integers(256, size=(12, 16, 3) if maps in ("rgb", "palette") else (12, 16)).astype(np.uint8)


@pytest.mark.parametrize(
    ("maps", "labels"),
    [("rgb", 0), ("palette", 0), ("grey", 0), ("grey16", 0), ("labels", 2), ("labels", 3), ("labels", 5)],
)
def test_sampling_reads_a_map_as_training_does(maps: str, labels: int, tmp_path: Path) -> None:
    """The same file, beside its image in `data=pairs`, and handed in to draw by; and as the format defines it."""
    pixels = pixels_of(maps, labels)
    for name in ("images", "conditions"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (16, 12)).save(tmp_path / "images" / "a.png")
    Image.fromarray(pixels).save(tmp_path / "conditions" / "a.png")
    words = [f"data.maps={'grey' if maps == 'grey16' else maps}", f"data.root={tmp_path}"]
    words += [f"data.labels={labels}", "data.unlabelled=255"] if labels else []
    config = compose("data=pairs", *words, "data.validation_fraction=0", "data.flip=false")
    trained = build("data", config.data, image_size=(12, 16), seed=0).split("train").item(0, 0).condition
    sampled = condition_map_reader(config.data)(tmp_path / "conditions" / "a.png")
    assert torch.equal(trained, sampled)
    if labels:
        moved = torch.from_numpy(np.where(pixels == 255, 0, pixels.astype(int) + 1))
        assert torch.equal(sampled, torch.nn.functional.one_hot(moved, labels).permute(2, 0, 1).float())
        assert len(to_rgb(sampled[None]).flatten(2).unique(dim=2)[0].T) == labels
    else:
        levels = torch.from_numpy(pixels.reshape(12, 16, -1).astype(np.float64)).permute(2, 0, 1)
        step = 65535 if maps == "grey16" else 255
        torch.testing.assert_close(sampled.double(), levels / step * 2 - 1, rtol=0, atol=1 / 255)
    reader = condition_reader(config.data)
    assert reader is not None and reader.num_classes == labels


@pytest.mark.usefixtures("isolated")
def test_data_that_does_not_say_how_it_reads_maps_is_not_guessed_at(tmp_path: Path) -> None:
    register("data", "mute")(type("Mute", (Zones,), {"condition_reader": None}))
    words = [each for each in FULL if not each.startswith("data")]
    Full(compose(*words, "data=mute", "evaluate.count=4"), tmp_path / "run").run()
    with pytest.raises(UserError, match="data 'mute' does not say how it reads a map from a file"):
        drawn(tmp_path / "run", tmp_path / "out", condition=str(a_map(tmp_path / "a.png", 16, 16, "L")))
    assert not (tmp_path / "out" / "report.html").exists()


def refusals() -> list[tuple[list[str], str]]:
    return [
        (["data=earth", "target=maps"], "target=maps: unknown target 'maps'"),
        (["data=emoji", "target=condition"], "data 'emoji' has no maps beside its images"),
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
    with pytest.raises(UserError, match=r"^model\.conditioner\.spatial\.run=/nowhere: no such folder; give the run of"):
        Stage2(compose(*words, "model.conditioner.spatial.run=/nowhere"), tmp_path / "c").run()
    with pytest.raises(UserError, match="the data has no maps beside its images"):
        Stage2(compose(*words, f"model.conditioner.spatial.run={run / 'maps'}"), tmp_path / "b").run()


def test_what_cannot_be_drawn_by_is_one_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    for condition, words in (
        ("nowhere.png", "no such file or folder"),
        ("empty", "no images .* in this folder"),
        ("text.png", "no image that can be read"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            drawn(run, tmp_path / "out", condition=str(tmp_path / condition))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="an image is as large as its condition"):
        drawn(run, tmp_path / "out", condition="a.png", size=64)
    with pytest.raises(UserError, match=r"size=32: this prior is conditioned on images \(spatial\), .* condition=FILE"):
        drawn(run, tmp_path / "out", size=32)
    words = r"sampler.window=\[1,1\]: this prior is told conditions of windows of 2 x 2 codes, as in training; leave"
    monkeypatch.setattr("vqf.config.inherit.cli_keys", lambda: ["sampler"])
    with pytest.raises(UserError, match=words):
        drawn(run, tmp_path / "out", "sampler=sliding_window", "sampler.window=1", count=1)
    with pytest.raises(UserError, match="place: this prior is not conditioned on crop boxes"):
        drawn(run, tmp_path / "out", condition=str(a_map(tmp_path / "map.png", 16, 16)), place=[0, 0, 1, 1])
    assert not (tmp_path / "out").exists()
