"""The feature cache: features are computed once for each hash of the pixels, and never mixed up."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from tests.metrics.sets import Linear, gaussians
from vqf.batch import Sample
from vqf.errors import UserError
from vqf.evaluation.evaluation_images import EvaluationImages, PixelHash
from vqf.evaluation.feature_cache import (
    FeatureStatisticsCache,
    extract_features,
    real_vs_real,
)
from vqf.networks.feature_set import feature_set
from vqf.protocols import Split
from vqf.registry import build

CPU = torch.device("cpu")


def emoji(**options: object) -> Split:
    return build("data", {"name": "emoji", **options}, image_size=16, seed=0).split("validation")


def make_images(split: Split, count: int = 20, rounding: str = "nearest", batch_size: int = 8) -> EvaluationImages:
    return EvaluationImages(split, split.fingerprint[:16], count, rounding, batch_size, 0, CPU)


def look(folder: Path, these: EvaluationImages, network: Linear) -> Tensor:
    """The mean that a folder of statistics gives for images."""
    return FeatureStatisticsCache(folder).from_split(these, {network.digest: network}).feature_sets[network.digest].mean


def test_images_are_looked_at_once(tmp_path: Path) -> None:
    network, these = Linear(), make_images(emoji())
    first = look(tmp_path, these, network)
    assert network.asked == 20
    again = look(tmp_path, make_images(emoji(), batch_size=3), network)
    assert network.asked == 20 and torch.equal(first, again)
    expected = network(torch.stack([emoji().item(0, i * len(emoji()) // 20).image for i in range(20)]))[0]
    torch.testing.assert_close(first, expected.double().mean(0), rtol=0, atol=1e-3)  # 8-bit pixels


@pytest.mark.parametrize(
    "other",
    [
        make_images(emoji(background="black")),
        make_images(emoji(), count=19),
        make_images(emoji(), rounding="none"),
        make_images(build("data", {"name": "emoji"}, image_size=24, seed=0).split("validation")),
    ],
    ids=["content", "count", "rounding", "size"],
)
def test_other_images_are_looked_at_anew(tmp_path: Path, other: EvaluationImages) -> None:
    network = Linear()
    first = look(tmp_path, make_images(emoji()), network)
    asked = network.asked
    assert not torch.equal(look(tmp_path, other, network), first)
    assert network.asked == asked + other.count


class Counted:
    """A split that counts how often its images are asked for."""

    def __init__(self, split: Split) -> None:
        self.split, self.fingerprint, self.asked = split, split.fingerprint, 0

    def __len__(self) -> int:
        return len(self.split)

    def item(self, epoch: int, index: int) -> Sample:
        self.asked += 1
        return self.split.item(epoch, index)


def test_new_images_are_decoded_once_and_known_ones_for_their_hash(tmp_path: Path) -> None:
    network, split = Linear(), Counted(emoji())
    for decoded in (20, 40):
        look(tmp_path, make_images(split), network)
        assert split.asked == decoded and network.asked == 20
    statistics = FeatureStatisticsCache(tmp_path)
    for _ in range(3):  # as one command does that measures several checkpoints
        statistics.from_split(make_images(split), {network.digest: network})
    assert split.asked == 60


def test_where_no_network_asks_known_images_are_not_decoded(tmp_path: Path) -> None:
    split = Counted(emoji())
    first, again = (FeatureStatisticsCache(tmp_path).from_split(make_images(split), {}) for _ in range(2))
    assert first == again and first.count == 20 and split.asked == 20
    looked = FeatureStatisticsCache(tmp_path).from_split(make_images(split), {"linear-1": Linear()})
    assert looked.digest == first.digest


def test_other_networks_look_for_themselves(tmp_path: Path) -> None:
    first, second, these = Linear(), Linear(), make_images(emoji())
    second.digest = "linear-2"
    for network in (first, second):
        look(tmp_path, these, network)
    assert first.asked == second.asked == 20


def test_an_image_that_changes_under_its_name_and_size_is_another(tmp_path: Path) -> None:
    """The pixels count, not what a file system says of them."""
    root = tmp_path / "images"
    root.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (i, 40, 90)).save(root / f"{i}.bmp")

    def held_out() -> EvaluationImages:
        node = {"name": "folder", "root": str(root), "validation_fraction": 1.0}
        return make_images(build("data", node, image_size=16, seed=0).split("validation"), 4)

    network = Linear()
    before, fingerprint = look(tmp_path, held_out(), network), held_out().split.fingerprint
    Image.new("RGB", (16, 16), (200, 40, 90)).save(root / "2.bmp")
    assert held_out().split.fingerprint == fingerprint, "the data source does not see it"
    assert not torch.equal(look(tmp_path, held_out(), network), before)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [damage, lambda path: path.write_bytes(b"half"), lambda path: path.write_bytes(b"")])
def test_a_damaged_file_is_made_anew(tmp_path: Path, harm: object) -> None:
    network = Linear()
    first = look(tmp_path, make_images(emoji()), network)
    (file,) = tmp_path.glob("*.safetensors")
    harm(file)
    assert torch.equal(look(tmp_path, make_images(emoji()), network), first)
    assert network.asked == 40
    with safe_open(file, "pt") as found:
        assert found.metadata()["count"] == "20"


def test_hashes_depend_on_pixels_and_their_order_not_on_batches() -> None:
    images = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def hashed(*parts: Tensor, rounding: str = "nearest") -> str:
        pixels = PixelHash(rounding)
        for part in parts:
            pixels.update(part)
        return pixels.hexdigest()

    whole = hashed(images)
    assert hashed(*images.split(1)) == hashed(images[:4], images[4:]) == whole
    assert hashed(images + 1e-7) == whole != hashed(images + 1e-7, rounding="none")
    assert len({whole, hashed(images.flip(0)), hashed(images[:5]), hashed(images.reshape(6, 3, 2, 8))}) == 4


def test_the_floor_compares_disjoint_real_images() -> None:
    whole = feature_set(torch.arange(40.0).view(20, 2), torch.arange(20.0).view(20, 1))
    for count, taken in ((6, 6), (500, 10)):
        pair = real_vs_real(whole, count, seed=0)
        assert pair is not None
        rest, some = pair
        assert (some.count, rest.count) == (taken, 20 - taken)
        assert sorted([*rest.features[:, 0].tolist(), *some.features[:, 0].tolist()]) == [2.0 * i for i in range(20)]
        assert some.logits is not None
        assert torch.equal(some.logits[:, 0] * 2, some.features[:, 0]), "logits stay with their images"
        torch.testing.assert_close(rest.mean, rest.features.double().mean(0))
    drawn = [real_vs_real(whole, 6, seed) for seed in (0, 0, 1)]
    features = [pair[1].features for pair in drawn if pair]
    assert torch.equal(features[0], features[1]) and not torch.equal(features[0], features[2])
    assert real_vs_real(gaussians(3), 3, 0) is None


def test_of_a_set_too_large_to_keep_the_floor_takes_all_moments() -> None:
    kept = gaussians(30)
    kept.count, kept.mean = 1000, kept.mean + 7
    pair = real_vs_real(kept, 10, 0)
    assert pair is not None
    assert torch.equal(pair[0].mean, kept.mean) and pair[0].count == 1000 and len(pair[0].features) == 20


def npz(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)
    return path


def test_a_reference_batch_gives_moments_images_or_both(tmp_path: Path) -> None:
    network = Linear()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    statistics, networks = FeatureStatisticsCache(tmp_path / "cache"), {network.digest: network}
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = extract_features([images], networks, 12)[network.digest]
    seen = statistics.from_npz(npz(tmp_path / "a.npz", arr_0=pixels), networks, 5, CPU)
    torch.testing.assert_close(seen.feature_sets[network.digest].covariance, expected.covariance)
    assert seen.count == 12
    network.name = "inception"  # whose moments reference batches hold
    moments = {"mu": np.arange(6.0), "sigma": np.diag(np.arange(1.0, 7))}
    alone = statistics.from_npz(npz(tmp_path / "b.npz", **moments), networks, 5, CPU)
    both = statistics.from_npz(npz(tmp_path / "c.npz", **moments, arr_0=pixels), networks, 5, CPU)
    for found, features in ((alone, 0), (both, 12)):
        one = found.feature_sets[network.digest]
        assert found.count is None and one.count is None and len(one.features) == features
        np.testing.assert_array_equal(one.mean, moments["mu"])
        np.testing.assert_array_equal(one.covariance, moments["sigma"])
    assert len({seen.digest, alone.digest, both.digest}) == 3


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.zeros(6)}, "needs mu and sigma, or images as arr_0"),
        ({"arr_0": np.zeros((3, 16, 16, 3))}, "arr_0 must be uint8"),
        ({"mu": np.zeros(6), "sigma": np.zeros((5, 5))}, "do not fit each other"),
        ({"mu": np.zeros(4), "sigma": np.zeros((4, 4)), "arr_0": np.zeros((3, 8, 8, 3), np.uint8)}, "or the network"),
        ({"mu": np.array([Path("x")], dtype=object), "sigma": np.zeros((1, 1))}, "not a readable .npz file"),
    ],
)
def test_a_reference_batch_that_cannot_be_used_is_one_line(
    tmp_path: Path, arrays: dict[str, object], words: str
) -> None:
    network = Linear()
    network.name = "inception"
    with pytest.raises(UserError, match=words) as error:
        FeatureStatisticsCache(tmp_path).from_npz(npz(tmp_path / "a.npz", **arrays), {network.digest: network}, 5, CPU)
    assert "\n" not in str(error.value)


def test_moments_of_inception_say_nothing_to_other_networks(tmp_path: Path) -> None:
    network, path = Linear(), npz(tmp_path / "a.npz", mu=np.zeros(6), sigma=np.eye(6))
    with pytest.raises(UserError, match=r"has no images .arr_0. for the network linear"):
        FeatureStatisticsCache(tmp_path).from_npz(path, {network.digest: network}, 5, CPU)


def test_a_pointer_in_place_of_a_reference_batch_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    network = Linear()
    with pytest.raises(UserError, match=r"not a readable \.npz file \(a pointer of Git LFS.*git lfs pull"):
        FeatureStatisticsCache(tmp_path).from_npz(tmp_path / "a.npz", {network.digest: network}, 5, CPU)
