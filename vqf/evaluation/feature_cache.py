"""What feature networks see in sets of real images: computed once, kept in a folder under the hash of the pixels."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqf import terminal
from vqf.atomic import atomic_path, atomic_write_text, write_weights
from vqf.batch import Batch
from vqf.dataloading.loader import DEFAULT_TIMEOUT, sequential_batches
from vqf.distributed import comm
from vqf.errors import UserError
from vqf.evaluation.preprocessing import round_to_8bit, to_uint8
from vqf.hashing import sha256_of_file, sha256_of_tensors
from vqf.networks.feature_extractors import INCEPTION
from vqf.networks.feature_set import FeatureAccumulator, feature_set
from vqf.protocols import FeatureNetwork, FeatureSet, Split
from vqf.seeding import seeded_generator
from vqf.terminal import log

Networks = Mapping[str, FeatureNetwork]  # by their digests
FeatureSets = dict[str, FeatureSet]  # by the digest of the network that saw it


@dataclass(frozen=True)
class EvaluationImages:
    """Real images as a protocol shows them."""

    split: Split
    source_hash: (
        str  # hashes which files they are of, as far as that is known without opening them, and how they are cropped
    )
    count: int
    rounding: str
    batch_size: int
    workers: int
    device: torch.device
    timeout: float = DEFAULT_TIMEOUT

    def local_batches(self, description: str) -> Iterator[tuple[Batch, int]]:
        """Yield this process's part of every batch on the device, and how many images the whole batch has.

        They are as the protocol shows them. A progress bar says `description` is done with them.
        """
        with terminal.progress(description, self.count) as bar:
            batches = sequential_batches(
                self.split, self.batch_size, count=self.count, workers=self.workers, timeout=self.timeout
            )
            for batch in batches:
                now = min(len(batch) * comm.world_size(), bar.remaining)
                yield round_real_images(batch.to(self.device), self.rounding), now
                bar.advance(now)

    def gathered_batches(self, description: str) -> Iterator[Tensor]:
        """Yield the images (B, C, H, W) of whole batches, in the first process; every process must call it."""
        for batch, count in self.local_batches(description):
            assert batch.images is not None
            whole = comm.gather_rows(batch.images, count)
            if whole is not None:
                yield whole

    def hashed_batches(self, pixel_hash: "PixelHash", description: str) -> Iterator[Tensor]:
        """Yield their images, each batch hashed."""
        for images in self.gathered_batches(description):
            pixel_hash.update(images)
            yield images


def round_real_images(batch: Batch, rounding: str) -> Batch:
    """Return real images as a protocol shows them: to the nearest pixel even where generated ones are cut."""
    assert batch.images is not None
    return replace(batch, images=round_to_8bit(batch.images, "none" if rounding == "none" else "nearest"))


class PixelHash:
    """Hashes images in their order, however they are cut into batches: their pixels, or numbers if not rounded."""

    def __init__(self, rounding: str) -> None:
        self.hasher, self.unrounded, self.started = hashlib.sha256(), rounding == "none", False

    def update(self, images: Tensor) -> None:
        """Hash images (B, C, H, W) in [-1, 1]."""
        if not self.started:
            self.hasher.update(repr(tuple(images.shape[1:])).encode())
            self.started = True
        content = images.float() if self.unrounded else to_uint8(images)
        self.hasher.update(content.cpu().contiguous().numpy().tobytes())

    def hexdigest(self) -> str:
        """Return the hash, to 16 digits."""
        return self.hasher.hexdigest()[:16]


@dataclass(frozen=True)
class ReferenceSet:
    """A set of real images, or a file about one."""

    digest: str  # of the pixels, or of the file
    count: int | None  # images; None where the file does not say
    feature_sets: FeatureSets


class FeatureStatisticsCache:
    """A folder of what networks saw, a file for each set of images and network.

    A file that cannot be read is made anew.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.verified = set[str]()  # the parts of data whose pixels were looked at since this was made

    def from_split(self, images: EvaluationImages, networks: Networks) -> ReferenceSet:
        """Return what networks see in images whose pixels are not hashed yet.

        Images that are new are decoded once, for the hash and for the networks. Of known ones the hash is taken
        first, and where no network asks, it is taken to be that of the last time.
        """
        name = f"{images.source_hash}-{images.count}-{images.rounding}"
        memory, pixels = self.folder / f"{name}.txt", PixelHash(images.rounding)
        known = comm.broadcast_object(memory.read_text().strip() if memory.is_file() else "")
        if known and (name in self.verified or not networks):
            return self.from_images(images, known, networks)
        if known:
            for _ in images.hashed_batches(pixels, "hash the reference"):
                pass
            found = self.from_images(images, pixels.hexdigest(), networks)
        else:
            sets = extract_features(images.hashed_batches(pixels, "look at the reference"), networks, images.count)
            found = ReferenceSet(pixels.hexdigest(), images.count, sets)
            self._save_all(found.digest, networks, sets)
        self.verified.add(name)
        if comm.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write_text(memory, found.digest)
        return found

    def from_images(self, images: EvaluationImages, digest: str, networks: Networks) -> ReferenceSet:
        """Return what networks see in images whose pixels have a hash."""
        sets = self._load_or_extract(
            digest, networks, lambda: images.gathered_batches("look at the reference"), images.count
        )
        return ReferenceSet(digest, images.count, sets)

    def from_npz(self, path: Path, networks: Networks, batch_size: int, device: torch.device) -> ReferenceSet:
        """Return what a reference batch says: moments of Inception's features as `mu` and `sigma`, images as `arr_0`.

        Raises:
            UserError: If the file cannot be read, or lacks what a network needs.
        """
        arrays = _load_npz(path)
        digest, images = sha256_of_file(path)[:16], arrays.get("arr_0")
        sets: FeatureSets = {}
        if images is not None and networks:
            sets = self._load_or_extract(
                digest, networks, lambda: _npz_batches(images, batch_size, device), len(images)
            )
        for key, network in networks.items() if comm.is_main() else ():
            if network.name == INCEPTION and "mu" in arrays:
                sets[key] = _with_moments(sets.get(key), arrays, path)
            elif key not in sets:
                raise UserError(
                    f"protocol.reference={path}: has no images (arr_0) for {network.name} to look at; its moments "
                    "are of the Inception network, metric=[fid]"
                )
        return ReferenceSet(digest, None if "mu" in arrays or images is None else len(images), sets)

    def _load_or_extract(
        self, digest: str, networks: Networks, batches: Callable[[], Iterable[Tensor]], count: int
    ) -> FeatureSets:
        paths = {key: self._path(digest, network) for key, network in networks.items()}
        sets = {
            key: found for key, path in paths.items() if comm.is_main() and (found := _load_features(path)) is not None
        }
        absent = comm.broadcast_object([key for key in networks if key not in sets])
        missing = {key: networks[key] for key in absent}
        if missing:
            new = extract_features(batches(), missing, count)
            self._save_all(digest, missing, new)
            sets |= new
        return sets

    def _save_all(self, digest: str, networks: Networks, feature_sets: FeatureSets) -> None:
        for key, found in feature_sets.items():
            _save_features(self._path(digest, networks[key]), found)

    def _path(self, digest: str, network: FeatureNetwork) -> Path:
        return self.folder / f"{digest}-{network.name}-{network.digest}.safetensors"


def extract_features(batches: Iterable[Tensor], networks: Networks, count: int) -> FeatureSets:
    """Look at images with every network, in the first process."""
    collectors = {key: FeatureAccumulator(network, count) for key, network in networks.items()}
    for images in batches:
        for collector in collectors.values():
            collector.update(images)
    return {key: collector.compute() for key, collector in collectors.items()} if comm.is_main() else {}


def real_vs_real(features: FeatureSet, count: int, seed: int) -> tuple[FeatureSet, FeatureSet] | None:
    """Return real images in place of the reference and of the generated ones; None if too few are known.

    `count` of them, at most half, are taken out at random and compared with the others; where the moments are of more
    images than are kept, with the moments of all.
    """
    known = len(features.features)
    taken = min(count, known // 2)
    if taken < 2:
        return None
    order = torch.randperm(known, generator=seeded_generator(seed, "floor"))
    rest, some = _subset(features, order[taken:]), _subset(features, order[:taken])
    if features.count != known:
        rest = replace(rest, count=features.count, mean=features.mean, covariance=features.covariance)
    return rest, some


def _subset(features: FeatureSet, indices: Tensor) -> FeatureSet:
    return feature_set(features.features[indices], None if features.logits is None else features.logits[indices])


def _with_moments(inception_features: FeatureSet | None, arrays: Mapping[str, np.ndarray], path: Path) -> FeatureSet:
    mean, covariance = (torch.from_numpy(np.asarray(arrays[key], dtype=np.float64)) for key in ("mu", "sigma"))
    if covariance.shape != (len(mean), len(mean)) or (
        inception_features is not None and inception_features.features.shape[1] != len(mean)
    ):
        raise UserError(f"protocol.reference={path}: mu and sigma do not fit each other, or the network")
    features = inception_features.features if inception_features is not None else torch.zeros(0, len(mean))
    return FeatureSet(
        None, mean, covariance, features, None if inception_features is None else inception_features.logits
    )


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("mu", "sigma", "arr_0") if key in file.files}
    except Exception as error:  # a zip file of anything
        raise UserError(f"protocol.reference={path}: not an .npz file that can be read ({error})") from error
    if ("mu" in arrays) != ("sigma" in arrays) or not arrays:
        raise UserError(f"protocol.reference={path}: needs mu and sigma, or images as arr_0")
    if "arr_0" in arrays and (arrays["arr_0"].ndim != 4 or arrays["arr_0"].dtype != np.uint8):
        raise UserError(f"protocol.reference={path}: arr_0 must be uint8 (N, H, W, 3)")
    return arrays


def _npz_batches(images: np.ndarray, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    with terminal.progress("look at the reference", len(images)) as bar:
        for i in range(0, len(images), batch_size) if comm.is_main() else ():
            pixels = torch.from_numpy(images[i : i + batch_size]).to(device)
            yield pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
            bar.advance(len(pixels))


def _save_features(path: Path, features: FeatureSet) -> None:
    tensors = {"mean": features.mean, "covariance": features.covariance, "features": features.features}
    if features.logits is not None:
        tensors["logits"] = features.logits
    with atomic_path(path) as temporary:
        write_weights(tensors, temporary, {"count": str(features.count), "sha256": sha256_of_tensors(tensors)})


def _load_features(path: Path) -> FeatureSet | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = file.metadata()
        if facts["sha256"] != sha256_of_tensors(tensors):
            raise ValueError("not what was written")
        return FeatureSet(int(facts["count"]), **tensors)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        log.warning("%s: %s; made anew", path, error)
        return None
