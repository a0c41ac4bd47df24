"""Images with condition maps, written into shards and read back with `data=shard_pairs`."""

import io

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.test_pairs import save
from tests.pipelines.shards import sharding
from tests.support.composing import compose
from vqf.batch import Sample
from vqf.data.images.maps import MapDecoder
from vqf.errors import UserError
from vqf.registry import _components, build, register

RNG = np.random.default_rng(3)
KINDS = {
    "rgb": [],
    "grey": ["data.maps=grey"],
    "palette": ["data.maps=palette"],
    "labels": ["data.maps=labels", "data.labels=6", "data.unlabelled=255"],
}


@pytest.fixture
def root(tmp_path):
    """Eleven pairs; the maps have several formats, and all can be read as labels."""
    for i in range(11):
        save(tmp_path / "images" / f"{i % 2}" / f"{i:02}.png", RNG.integers(256, size=(40, 60, 3)))
        numbers = RNG.choice([0, 1, 2, 3, 4, 255], size=(40, 60)).astype(np.uint8)
        map_image = Image.fromarray(numbers)
        if i % 3 == 1:
            map_image.putpalette([each for j in range(256) for each in (j, 255 - j, 7)])  # what counts is its index
        path = tmp_path / "conditions" / f"{i % 2}" / f"{i:02}.{('png', 'bmp', 'tif')[i % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        map_image.save(path)
    return tmp_path


def configured(root, *words, workers=0):
    given = ["data=pairs", f"data.root={root}", "data.validation_last=3", "data.flip=false", "image_size=16"]
    return compose(*given, f"workers={workers}", *words)


def written(config, to, **options):
    return sharding.written(config, to, **{"shuffle": False, **options})


def read(to, manifest, part="train", **options):
    node = {"name": "shard_pairs", "root": str(to), "flip": False, **manifest["maps"], **options}
    return build("data", node, image_size=16, seed=0).split(part)


def source(config, part="train"):
    return build("data", config.data, image_size=16, seed=0).split(part)


def same(one, other, atol=0.0):
    for field in ("image", "condition"):
        torch.testing.assert_close(getattr(one, field), getattr(other, field), rtol=0, atol=atol)
    assert one.label == other.label


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("how", "workers"), [("original", 0), ("png", 2)])
def test_pairs_are_read_back_exactly(root, kind, how, workers):
    """Bit for bit in either format: PNG is lossless, and neither scales."""
    config = configured(root, *KINDS[kind], workers=workers)
    manifest = written(config, root / "shards", format=how, shard_size=3)
    assert manifest["finished"] and manifest["images"] == {"train": 8, "validation": 3}
    for part, count in (("train", 8), ("validation", 3)):
        actual, expected = read(root / "shards", manifest, part), source(config, part)
        assert len(actual) == count
        for i in range(count):
            same(actual.item(2, i), expected.item(2, i))


def test_originals_are_copied_byte_by_byte(root):
    manifest = written(configured(root), root / "shards", format="original")
    split = read(root / "shards", manifest)
    for i, path in enumerate(sorted((root / "images").rglob("*.png"))[:8]):
        found = split.file(i)
        (map_path,) = (root / "conditions" / path.parent.name).glob(f"{path.stem}.*")
        assert found.read_bytes() == path.read_bytes()
        assert found.read_map()[0] == map_path.read_bytes()
        assert split.map_names[i] == f"{i:08}.condition{map_path.suffix}"


def test_webdataset_reads_them(root):
    import webdataset

    written(configured(root, *KINDS["labels"]), root / "shards", format="png")
    expected = list(webdataset.WebDataset(str(root / "shards" / "train-000000.tar"), shardshuffle=False).decode("pil"))
    assert len(expected) == 8
    for each in expected:
        name = each["json"]["name"]
        assert np.array_equal(each["png"], Image.open(root / "images" / name))
        (path,) = (root / "conditions").glob(name.replace(".png", ".*"))
        numbers = np.asarray(Image.open(path))
        assert np.array_equal(np.asarray(each["condition.png"].convert("L")), np.where(numbers == 255, 0, numbers + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_scaled_with_their_images_and_labels_not_interpolated(root, kind):
    save(root / "conditions" / "0" / "00.png", np.tile(np.repeat([[0, 4]], 3, axis=1), (80, 20)))
    config = configured(root, *KINDS[kind])
    manifest = written(config, root / "shards", format="jpg", size=20)
    split = read(root / "shards", manifest)
    found = split.file(0)
    assert found.load_image().size == (30, 20)
    scaled = Image.open(io.BytesIO(found.read_map()[0]))
    assert scaled.size == (30, 20)
    values = {*np.unique(np.asarray(scaled)).tolist()}
    assert values == {1, 5} if kind == "labels" else (values == {0, 4}) == (kind == "palette")


DEEP = {
    "labels above a byte": (np.uint16, 0, 300, ["data.maps=labels", "data.labels=300"]),
    "a negative number": (np.int32, -1, 3, ["data.maps=labels", "data.labels=4", "data.unlabelled=-1"]),
    "a number above two bytes": (np.int32, 69_998, 70_001, ["data.maps=labels", "data.labels=70002"]),
    "16 bits of grey": (np.uint16, 0, 2**16, ["data.maps=grey"]),
}


@pytest.mark.parametrize("case", DEEP)
@pytest.mark.parametrize("how", ["original", "png"])
def test_labels_above_a_byte_are_kept(root, case, how):
    kind, low, high, words = DEEP[case]
    for path in (root / "conditions").rglob("*.*"):
        path.unlink()
        Image.fromarray(RNG.integers(low, high, size=(40, 60)).astype(kind)).save(path.with_suffix(".tif"))
    config = configured(root, *words)
    if case == "a number above two bytes" and how == "png":
        with pytest.raises(UserError, match=r"^data\.labels=70002: a PNG holds numbers below 65536; format=original"):
            written(config, root / "shards", format=how)
        return
    manifest = written(config, root / "shards", format=how)
    actual, expected = read(root / "shards", manifest), source(config)
    for i in range(2):
        same(actual.item(0, i), expected.item(0, i))


@pytest.fixture(scope="module")
def scaled_pair():
    """The config of every example; composing it takes longer than writing and reading its pair."""
    return configured("of each example", "data.validation_last=0")


@given(st.tuples(*[st.integers(20, 90)] * 3), st.integers(-2, 2), st.integers(5, 60))
@example((45, 77, 41), -1, 40)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_scaled_pairs_stay_valid_pairs(tmp_path_factory, scaled_pair, sides, off, size):
    """Sides are rounded, and a map may already differ from its image's aspect ratio as far as is allowed."""
    width, height, other = sides
    map_width = round(other * width / height) + off
    assume(map_width > 0 and abs(map_width * height - other * width) <= max(*sides, map_width))
    root = tmp_path_factory.mktemp("pairs")
    save(root / "images" / "a.png", np.zeros((height, width, 3)))
    save(root / "conditions" / "a.png", np.zeros((other, map_width, 3)))
    scaled_pair.data.root = str(root)
    assert written(scaled_pair, root / "shards", format="png", size=size)["images"] == {"train": 1}
    assert read(root / "shards", {"maps": {}}).item(0, 0).condition.shape == (3, 16, 16)


@pytest.mark.parametrize("how", ["original", "png"])
def test_unreadable_pairs_are_skipped_and_listed(root, how):
    (root / "conditions" / "0" / "02.tif").write_bytes(b"broken")
    save(root / "conditions" / "0" / "04.bmp", np.zeros((30, 30)))
    (root / "conditions" / "0" / "06.png").unlink()
    manifest = written(configured(root, "data.max_unreadable=0.5"), root / "shards", format=how)
    assert {each["name"]: each["reason"] for each in manifest["shards"][0]["skipped"]} == {
        "0/02.png": "its map '0/02.tif': not an image of a known format (JPEG, PNG, WEBP, BMP, GIF, PPM, TIFF)",
        "0/04.png": "its map '0/04.bmp' has another shape: 30 x 30 and 60 x 40",
        "0/06.png": "no map",
    }
    assert len(read(root / "shards", manifest)) == 5


def test_the_name_of_a_map_is_written_on_one_line(root):
    (root / "conditions" / "0" / "02.tif").rename(root / "conditions" / "0" / "04\n\x1b.png")
    (root / "images" / "0" / "04.png").rename(root / "images" / "0" / "04\n\x1b.png")
    (root / "conditions" / "0" / "04\n\x1b.png").write_bytes(b"broken")
    with pytest.raises(UserError) as caught:
        written(configured(root, "data.max_unreadable=0"), root / "shards")
    assert str(caught.value).isprintable()


def test_images_only(root, tmp_path):
    config = configured(root)
    manifest = written(config, tmp_path / "alone", images_only=True)
    assert manifest["maps"] is None
    data = build("data", {"name": "shards", "root": str(tmp_path / "alone")}, image_size=16, seed=0)
    assert data.split("train").item(0, 0).condition is None
    with pytest.raises(UserError, match="holds shards of other images, or with other options"):
        written(config, tmp_path / "alone")


def test_a_source_without_files_is_rendered_with_its_maps(tmp_path):
    """`earth` has no files: its crops of epoch 0 are written, and water in the maps is still exactly blue."""
    config = compose("data=earth", "data.crops=12", "image_size=16")
    with pytest.raises(UserError, match="format=original: data 'earth' has no files to copy; give format=png"):
        written(config, tmp_path / "shards")
    manifest = written(config, tmp_path / "shards", format="png")
    assert manifest["maps"] == {"maps": "palette"}
    actual, expected = read(tmp_path / "shards", manifest), source(config)
    blue = torch.tensor([-1.0, -1.0, 1.0]).view(3, 1, 1)
    waters = 0
    for i in range(12):
        one, other = actual.item(0, i), expected.item(0, i)
        same(one, other, atol=0.5 / 127.5 + 1e-6)
        assert torch.equal((one.condition == blue).all(0), (other.condition == blue).all(0))
        waters += int((one.condition == blue).all(0).sum())
    assert waters > 500


def test_a_union_keeps_source_and_map(root, tmp_path):
    parts = f"{{a:{{name:pairs,root:{root},validation_last:3}},b:{{name:pairs,root:{root},validation_last:2}}}}"
    config = compose("data=union", f"+data.parts={parts}", "image_size=16")
    manifest = written(config, tmp_path / "shards")
    split = read(tmp_path / "shards", manifest)
    assert manifest["maps"] == {"maps": "rgb"} and manifest["classes"] == ["a", "b"]
    assert split.labels.tolist() == [0] * 8 + [1] * 9
    alone = source(configured(root, "data.crop=center"))
    still = read(tmp_path / "shards", manifest, crop="center")
    for i in range(8):
        one, other = still.item(0, i), alone.item(0, i)
        assert torch.equal(one.condition, other.condition) and torch.equal(one.image, other.image)


def test_maps_of_several_kinds_are_refused(root, tmp_path):
    parts = f"{{a:{{name:pairs,root:{root}}},b:{{name:pairs,root:{root},maps:grey}}}}"
    config = compose("data=union", f"+data.parts={parts}", "image_size=16")
    with pytest.raises(UserError) as caught:
        written(config, tmp_path / "shards")
    assert str(caught.value) == (
        "data.parts: 'a' and 'b' have condition maps of different kinds, or only one has maps; "
        "images_only=true writes the "
        "images alone"
    )
    assert not (tmp_path / "shards").exists()
    assert written(config, tmp_path / "shards", images_only=True)["finished"]


@pytest.mark.parametrize("mixed", ["abc", "cab", "bca"])
def test_maps_of_only_some_sources_are_refused(root, tmp_path, mixed):
    save(root / "alone" / "x.png", np.zeros((20, 20, 3)))
    folder = f"{{name:folder,root:{root / 'alone'},validation_fraction:0}}"
    nodes = {"a": folder, "b": f"{{name:pairs,root:{root}}}", "c": folder}
    config = compose(
        "data=union", f"+data.parts={{{','.join(f'{each}:{nodes[each]}' for each in mixed)}}}", "image_size=16"
    )
    with pytest.raises(UserError) as caught:
        written(config, tmp_path / "shards")
    assert str(caught.value) == (
        "data 'union' has maps in only some of its sources; images_only=true writes the images alone"
    )


class Made:
    """A data source of a plugin without files, with maps of `channels` channels."""

    def __init__(self, image_size, seed, *, channels: int = 1, broken: int = 0) -> None:
        self.channels, self.size, self.broken, self.classes = channels, image_size, broken, ["one"]

    def split(self, name):
        self.fingerprint = name
        return self

    def __len__(self):
        return 4

    def item(self, epoch, index):
        if index < self.broken:
            raise OSError(2, "Nowhere")
        values = torch.linspace(-1, 1, 256).repeat(self.channels).view(self.channels, 16, 16).roll(index, -1)
        return Sample(torch.full((3, 16, 16), -1.0), label=0, condition=values)


class Zoned(Made):
    """Its maps are class maps, which its `condition_reader` declares."""

    @staticmethod
    def condition_reader():
        return MapDecoder("labels", 5, 9)

    def item(self, epoch, index):
        zones = torch.nn.functional.one_hot(torch.arange(256).view(16, 16) % 5, 5).permute(2, 0, 1).float()
        return Sample(torch.full((3, 16, 16), -1.0), label=0, condition=zones)


@pytest.fixture
def own():
    register("data", "made")(Made)
    register("data", "zoned")(Zoned)
    yield
    for name in ("made", "zoned"):
        del _components["data"][name]


@pytest.mark.usefixtures("own")
def test_data_sources_of_a_plugin(tmp_path):
    def node(name, **options):
        config = compose("data=emoji", "image_size=16")
        config.data = {"name": name, **options}
        return config

    for channels, kind in ((1, "grey"), (3, "rgb")):
        to = tmp_path / kind
        manifest = written(node("made", channels=channels), to, format="png")
        assert manifest["maps"] == {"maps": kind}
        for i in range(4):
            same(read(to, manifest).item(0, i), Made(16, 0, channels=channels).item(0, i), atol=0.5 / 127.5 + 1e-6)
    with pytest.raises(UserError) as caught:
        written(node("made", channels=5), tmp_path / "five", format="png")
    assert str(caught.value) == (
        "data 'made' has maps of 5 channels, and no function condition_reader says what they are (vqf.protocols.Data); "
        "images_only=true writes the images alone"
    )
    with pytest.raises(UserError, match=r"^data: none of its 4 train images can be read; the last is '3' \(nowhere\)"):
        written(node("made", broken=4), tmp_path / "none", format="png")
    assert written(node("made", broken=1), tmp_path / "one", format="png")["maps"] == {"maps": "grey"}
    both = node("union", parts={"a": {"name": "made", "channels": 1}, "b": {"name": "made", "channels": 3}})
    with pytest.raises(
        UserError, match=r"^data 'union' has maps of 1 and 3 channels, and no function condition_reader"
    ):
        written(both, tmp_path / "both", format="png")
    manifest = written(node("zoned"), tmp_path / "zoned", format="png")
    assert manifest["maps"] == {"maps": "labels", "labels": 5, "unlabelled": None}
    same(read(tmp_path / "zoned", manifest).item(0, 0), Zoned(16, 0).item(0, 0))
