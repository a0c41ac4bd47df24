"""Stage 2 conditioned on maps: three trainings in one command, and sampling from a map of any size."""

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
    """Images with one-hot class maps."""

    def __init__(self, image_size: tuple[int, int], seed: int, *, zones: int = CLASSES) -> None:
        self.size, self.classes, self.zones = image_size, (), zones

    @staticmethod
    def condition_reader(zones: int = CLASSES) -> MapDecoder:
        return MapDecoder("labels", zones)

    def split(self, name: str) -> "Zones":
        self.fingerprint = name
        return self

    def __len__(self) -> int:
        return 16

    def item(self, epoch: int, index: int) -> Shown:
        zones = (torch.arange(self.size[0])[:, None] // 5 + torch.arange(self.size[1]) // 7 + index) % self.zones
        zones = torch.nn.functional.one_hot(zones, self.zones).permute(2, 0, 1).float()
        return Shown(zones[:3] * 2 - 1, condition=zones)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earth") / "run"
    Full(compose(*FULL), folder).run()
    return folder


def set_cli_keys(monkeypatch: pytest.MonkeyPatch, *keys: str) -> None:
    """Pretend that the command line sets these keys, since there is no Hydra job."""
    monkeypatch.setattr("vqf.config.inherit.cli_keys", lambda: list(keys))


def make_map(path: Path, width: int, height: int, mode: str = "RGB") -> Path:
    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).convert(mode).save(path)
    return path


def sample(run: Path, folder: Path, *words: str, **options: object) -> Path:
    SamplePipeline(compose("pipeline=sample", f"run={run}", "logger=[]", *words), folder, **options).run()  # type: ignore[arg-type]
    return folder / "samples"


def test_one_command_trains_both_tokenizers_and_the_prior(run: Path) -> None:
    maps, images, generator = vqf.load(run / "maps"), vqf.load(run / "stage1"), vqf.load(run)
    assert isinstance(maps, Tokenizer) and isinstance(images, Tokenizer) and isinstance(generator, Generator)
    assert maps.fingerprint() != images.fingerprint()
    spatial = generator.conditioner.conditioners["spatial"]
    assert spatial.tokenizer.fingerprint() == maps.fingerprint()  # type: ignore[attr-defined]
    assert latest_checkpoint(run / "maps").step == 3  # type: ignore[union-attr]


def test_a_sample_has_the_size_of_its_map(run: Path, tmp_path: Path) -> None:
    path = make_map(tmp_path / "map.png", 40, 24)
    first = sample(run, tmp_path / "first", condition=str(path), count=2)
    assert sorted(each.name for each in first.iterdir()) == ["map-000000.png", "map-000001.png"]
    assert Image.open(first / "map-000000.png").size == (40, 24)
    again = sample(run, tmp_path / "again", "batch_size=1", condition=str(path), count=2)
    assert [(again / each.name).read_bytes() == each.read_bytes() for each in first.iterdir()] == [True, True]
    generator = vqf.load(run)
    assert isinstance(generator, Generator)
    image = generator.sample(1, conditions=read_image(path))
    saved = read_image(first / "map-000000.png")
    torch.testing.assert_close(image[0], saved, rtol=0, atol=1 / 255)


@pytest.mark.parametrize("size", [(37, 29), (16, 16), (9, 30), (5, 3)])
def test_a_map_of_any_size_gives_a_sample_of_that_size(run: Path, tmp_path: Path, size: Size) -> None:
    """Maps are padded by their edge to multiples of the stride and at least a window; samples are cropped again."""
    path = make_map(tmp_path / "map.png", *size)
    samples = sample(run, tmp_path / "out", condition=str(path))
    assert Image.open(samples / "map-000000.png").size == size
    generator, condition = vqf.load(run), read_image(path)
    assert isinstance(generator, Generator)
    sides = [max(-(-side // 8) * 8, 16) for side in condition.shape[1:]]
    rows, columns = (
        torch.arange(side).clamp(max=old - 1) for side, old in zip(sides, condition.shape[1:], strict=True)
    )
    padded = generator.sample(1, conditions=condition[:, rows][:, :, columns])
    assert torch.equal(generator.sample(1, conditions=condition), padded[..., : size[1], : size[0]])


def test_a_folder_of_maps_gives_an_image_for_each(run: Path, tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    for name in "ab":
        make_map(tmp_path / "maps" / f"{name}.png", 16, 16, "P" if name == "a" else "L")
    (tmp_path / "maps" / ".DS_Store").write_bytes(b"\0")
    (tmp_path / "maps" / "notes.txt").write_text("not a map")
    samples = sample(run, tmp_path / "out", condition=str(tmp_path / "maps"))
    assert sorted(each.name for each in samples.iterdir()) == ["a-000000.png", "b-000000.png"]
    make_map(tmp_path / "maps" / "a.bmp", 16, 24)
    samples = sample(run, tmp_path / "two", condition=str(tmp_path / "maps"))
    assert sorted(each.name for each in samples.iterdir()) == [f"{name}-000000.png" for name in ("a.bmp", "a.png", "b")]


def test_without_a_map_validation_maps_take_turns(run: Path, tmp_path: Path) -> None:
    assert len(list(sample(run, tmp_path / "out", count=3).iterdir())) == 3


def test_a_checkpoint_contains_the_tokenizer_of_maps(run: Path, tmp_path: Path) -> None:
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


def test_cached_condition_indices_are_those_of_each_images_map(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache holds what encoding on the fly gives; other conditioners do not fit the cache."""
    from safetensors.torch import load_file

    columns = load_file(run / "stage2" / "tokens" / "validation-00000.safetensors")
    generator = vqf.load(run)
    assert isinstance(generator, Generator)
    config = compose(*EARTH)
    split = build("data", config.data, image_size=(16, 16), seed=config.seed).split("validation")
    for index in (0, len(split) - 1):
        sample = split.item(0, index)
        assert sample.condition is not None
        indices = generator.conditioner.conditioners["spatial"].tokenizer.encode(sample.condition[None])  # type: ignore[attr-defined]
        assert torch.equal(columns["condition_indices.spatial"][index].long(), indices[0])
        assert torch.equal(columns["tokens"][index].long(), generator.tokenizer.encode_tokens(sample.image[None])[0])
    set_cli_keys(monkeypatch, "model.conditioner")
    words = [f"run={run}", f"tokens.root={run / 'stage2' / 'tokens'}", "model/conditioner=none", "pipeline=stage2"]
    with pytest.raises(UserError, match=r"was made with conditions \w+, this run has \w+"):
        Stage2(compose(*TINY, "data=earth", "data.crops=32", *words), tmp_path / "other").run()


@pytest.fixture(scope="module")
def many(run: Path) -> Path:
    """A prior conditioned on maps, crop boxes and low-resolution images."""
    folder, words = run.parent / "many", [f"run={run / 'stage1'}", f"model.conditioner.spatial.run={run / 'maps'}"]
    conditioners = ["model/conditioner=[spatial,coordinates,image]", "model.conditioner.spatial.dropout=0.3"]
    config = compose(
        *EARTH[:-1], *conditioners, "model.conditioner.image.factor=2", *words, "pipeline=stage2", "steps=2"
    )
    with pytest.MonkeyPatch.context() as patch:
        set_cli_keys(patch, "model.conditioner", "steps")
        Stage2(config, folder).run()
    return folder


def validation_batch(count: int) -> Batch:
    data = build("data", compose(*EARTH).data, image_size=(16, 16), seed=0).split("validation")
    return Batch.collate([data.item(0, i * len(data) // count) for i in range(count)])


@pytest.fixture
def conditions_seen(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Record the conditions of every sampled batch."""
    seen: list[Batch] = []
    sample_tokens = Generator.sample_tokens

    def recording(self: Generator, batch: Batch, **options: Any) -> torch.Tensor:
        seen.append(batch)
        return sample_tokens(self, batch, **options)

    monkeypatch.setattr(Generator, "sample_tokens", recording)
    return seen


def test_several_conditions_are_a_file_each(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_cli_keys(monkeypatch, "sampler")
    generator = vqf.load(many)
    assert isinstance(generator, Generator) and generator.conditioner.spec.length == 4 + 4 + 1
    make_map(tmp_path / "m.png", 32, 24), make_map(tmp_path / "p.jpg", 32, 24)
    both = {"spatial": str(tmp_path / "m.png"), "image": str(tmp_path / "p.jpg")}
    words = ["sampler=sliding_window", "sampler.guidance=3"]
    samples = sample(many, tmp_path / "out", *words, condition=both)
    assert Image.open(samples / "m-000000.png").size == (32, 24)
    for condition, message in (
        (both["spatial"], r"has 2 image conditioners; give 'condition=\{spatial:spatial.png,image:image.png\}'"),
        ({"spatial": both["spatial"]}, "the image for conditioner 'image' is missing"),
        ({**both, "map": both["spatial"]}, r"condition\.map: this prior has no image conditioner of that name"),
        ({**both, "spatial": str(make_map(tmp_path / "s.png", 16, 16))}, "images of 16 x 16 and 24 x 32 pixels"),
    ):
        with pytest.raises(UserError, match=message):
            sample(many, tmp_path / "wrong", *words, condition=condition)
    assert not (tmp_path / "wrong").exists()


def test_validation_samples_supply_all_conditions(many: Path, tmp_path: Path, conditions_seen: list[Batch]) -> None:
    """Map, image and crop box of the same validation sample."""
    sample(many, tmp_path / "out", count=3)
    expected = validation_batch(3)
    assert len(conditions_seen) == 1 and (expected.crop_boxes[:, 2] - expected.crop_boxes[:, 0] < 0.1).all()  # type: ignore[index]
    for name in ("images", "conditions", "crop_boxes"):
        assert torch.equal(getattr(conditions_seen[0], name), getattr(expected, name))


def test_place_is_the_crop_box_of_a_condition(many: Path, tmp_path: Path, conditions_seen: list[Batch]) -> None:
    both = {"spatial": str(make_map(tmp_path / "m.png", 24, 20)), "image": str(make_map(tmp_path / "p.png", 24, 20))}
    with pytest.MonkeyPatch.context() as patch:
        set_cli_keys(patch, "sampler")
        sample(many, tmp_path / "out", "sampler=sliding_window", condition=both, place=[0.2, 0.0, 0.4, 1.0])
    # 20 rows and 24 columns are padded to 32: the box grows so that the unpadded part keeps its crop box.
    torch.testing.assert_close(conditions_seen[0].crop_boxes, torch.tensor([[0.2, 0.0, 0.2 + 0.2 * 32 / 20, 32 / 24]]))
    with pytest.raises(UserError, match=r"place=\[0\.5,0\.2\]: must be null or a list of 4"):
        sample(many, tmp_path / "wrong", condition=both, place=[0.5, 0.2])


def test_completion_has_the_conditions_of_training(
    many: Path, tmp_path: Path, conditions_seen: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_cli_keys(monkeypatch, "batch_size")
    config = compose("pipeline=complete", f"run={many}", "logger=[]", "batch_size=2")
    Complete(config, tmp_path, count=4).run()
    expected = validation_batch(4)
    assert [len(each) for each in conditions_seen] == [2, 2]
    for name in ("images", "conditions", "crop_boxes"):
        assert torch.equal(torch.cat([getattr(each, name) for each in conditions_seen]), getattr(expected, name))
    assert len(list((tmp_path / "completions").iterdir())) == 4
    with pytest.raises(UserError, match="images: this prior is also conditioned on maps; give images with maps"):
        Complete(config, tmp_path / "own", images=str(tmp_path / "completions")).run()


def test_a_resumed_stage2_is_exact_bit_for_bit(run: Path, tmp_path: Path) -> None:
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
@pytest.mark.parametrize("zones", [CLASSES, 3])
def test_class_maps_have_a_channel_per_class(zones: int, tmp_path: Path) -> None:
    """Class maps, of three classes too, are trained on, reconstructed, shown in color, and sampled from as a file."""
    register("data", "zones")(Zones)
    words = [each for each in FULL if not each.startswith("data")]
    Full(compose(*words, "data=zones", f"data.zones={zones}", "evaluate.count=4"), tmp_path / "run").run()
    maps = vqf.load(tmp_path / "run" / "maps")
    assert isinstance(maps, Tokenizer) and maps.channels == zones and maps.output == "logits"
    with torch.no_grad():
        maps.decoder.last_layer.bias += 3.0  # type: ignore[operator]
    logits = maps.decode(torch.zeros(1, 2, 2, dtype=torch.int64))
    assert logits.max() > 1, "logits are not clamped"
    generator = vqf.load(tmp_path / "run" / "stage2")
    assert isinstance(generator, Generator)
    batch = generator.conditioner.prepare(Batch(conditions=Zones((16, 16), 0, zones=zones).item(0, 0).condition[None]))
    (colors,) = generator.conditioner.render(batch).values()
    palette = {
        tuple(color) for color in to_rgb(torch.eye(zones)[..., None, None], is_class_map=True)[..., 0, 0].tolist()
    }
    assert {tuple(color) for color in colors[0].flatten(1).T.tolist()} <= palette
    config = compose("pipeline=reconstruct", f"run={tmp_path / 'run' / 'maps'}", "metric=[psnr]", "logger=[]")
    Reconstruct(config, tmp_path / "back", count=2).run()
    assert len(list((tmp_path / "back" / "reconstructions").iterdir())) == 2
    pages = [np.asarray(Image.open(path)) for path in (tmp_path / "back" / "reconstructions").iterdir()]
    shown = {tuple(color) for page in pages for color in page.reshape(-1, 3).tolist()}
    assert shown <= {tuple(round((each + 1) * 127.5) for each in color) for color in palette}
    numbers = Image.fromarray((torch.arange(24 * 24).reshape(24, 24) % zones).to(torch.uint8).numpy())
    numbers.save(tmp_path / "numbers.png")
    samples = sample(tmp_path / "run", tmp_path / "out", condition=str(tmp_path / "numbers.png"))
    assert Image.open(samples / "numbers-000000.png").size == (24, 24)
    Image.new("L", (16, 16), zones).save(tmp_path / "wrong.png")
    with pytest.raises(UserError, match=rf"the label {zones} is not below data\.labels={zones}"):
        sample(tmp_path / "run", tmp_path / "wrong", condition=str(tmp_path / "wrong.png"))


def pixels_of(maps: str, labels: int) -> np.ndarray:
    """Return the pixels (12, 16, ...) of a map file; labels cover every class, and 255 for unlabelled."""
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
    """A file is read alike in `data=pairs` and as a condition to sample from, and as its format defines."""
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
def test_data_without_a_condition_reader_is_refused(tmp_path: Path) -> None:
    register("data", "mute")(type("Mute", (Zones,), {"condition_reader": None}))
    words = [each for each in FULL if not each.startswith("data")]
    Full(compose(*words, "data=mute", "evaluate.count=4"), tmp_path / "run").run()
    with pytest.raises(UserError, match="data 'mute' does not say how it reads a map from a file"):
        sample(tmp_path / "run", tmp_path / "out", condition=str(make_map(tmp_path / "a.png", 16, 16, "L")))
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


def test_stage2_without_a_map_tokenizer_or_maps_is_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_cli_keys(monkeypatch, "model.conditioner", "data")
    words = [*TINY, "data=emoji", "pipeline=stage2", f"run={run / 'stage1'}", "model/conditioner=spatial"]
    with pytest.raises(UserError, match=r"model\.conditioner\.spatial\.run: give the run of the condition map's"):
        Stage2(compose(*words), tmp_path / "a").run()
    with pytest.raises(UserError, match=r"^model\.conditioner\.spatial\.run=/nowhere: no such folder; give the run of"):
        Stage2(compose(*words, "model.conditioner.spatial.run=/nowhere"), tmp_path / "c").run()
    with pytest.raises(UserError, match="the data has no condition maps"):
        Stage2(compose(*words, f"model.conditioner.spatial.run={run / 'maps'}"), tmp_path / "b").run()


def test_invalid_conditions_are_one_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    for condition, words in (
        ("nowhere.png", "no such file or folder"),
        ("empty", "no images .* in this folder"),
        ("text.png", "not a readable image"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            sample(run, tmp_path / "out", condition=str(tmp_path / condition))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="an image is as large as its condition"):
        sample(run, tmp_path / "out", condition="a.png", size=64)
    with pytest.raises(UserError, match=r"size=32: this prior is conditioned on images \(spatial\), .* condition=FILE"):
        sample(run, tmp_path / "out", size=32)
    words = r"sampler.window=\[1,1\]: this prior reads conditions of windows of 2 x 2 tokens, as in training; leave"
    monkeypatch.setattr("vqf.config.inherit.cli_keys", lambda: ["sampler"])
    with pytest.raises(UserError, match=words):
        sample(run, tmp_path / "out", "sampler=sliding_window", "sampler.window=1", count=1)
    with pytest.raises(UserError, match="place: this prior is not conditioned on crop boxes"):
        sample(run, tmp_path / "out", condition=str(make_map(tmp_path / "map.png", 16, 16)), place=[0, 0, 1, 1])
    assert not (tmp_path / "out").exists()
