"""Features of sets of real images, and their cache."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vqf import terminal
from vqf.atomic import atomic_path, atomic_write_text, write_weights
from vqf.distributed import comm
from vqf.errors import UserError
from vqf.evaluation.evaluation_images import EvaluationImages, PixelHash
from vqf.hashing import sha256_of_file, sha256_of_tensors
from vqf.networks.feature_extractors import INCEPTION
from vqf.networks.feature_set import FeatureAccumulator, feature_set
from vqf.networks.file_content import describe_substitute
from vqf.protocols import FeatureNetwork, FeatureSet
from vqf.seeding import seeded_generator
from vqf.terminal import log

Networks = Mapping[str, FeatureNetwork]  # by their digests
FeatureSets = dict[str, FeatureSet]  # by the digest of the network


@dataclass(frozen=True)
class ReferenceSet:
    """Features of a set of real images."""

    digest: str  # of the pixels, or of the .npz file
    count: int | None  # of images; None if an .npz file holds moments only
    feature_sets: FeatureSets


class FeatureStatisticsCache:
    """A folder with a file for each set and network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.verified = set[str]()  # sets whose pixels were hashed by this process

    def from_split(self, images: EvaluationImages, networks: Networks) -> ReferenceSet:
        """Return features of images whose pixel hash is unknown.

        Known images are hashed first, because files may have changed.
        """
        name = f"{images.source_hash}-{images.count}-{images.rounding}"
        hash_file, pixels = self.folder / f"{name}.txt", PixelHash(images.rounding)
        known = comm.broadcast_object(hash_file.read_text().strip() if hash_file.is_file() else "")
        if known and (name in self.verified or not networks):
            return self.from_images(images, known, networks)
        if known:
            for _ in images.hashed_batches(pixels, "hash the reference"):
                pass
            reference = self.from_images(images, pixels.hexdigest(), networks)
        else:
            sets = extract_features(images.hashed_batches(pixels, "reference features"), networks, images.count)
            reference = ReferenceSet(pixels.hexdigest(), images.count, sets)
            self._save_all(reference.digest, networks, sets)
        self.verified.add(name)
        if comm.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write_text(hash_file, reference.digest)
        return reference

    def from_images(self, images: EvaluationImages, digest: str, networks: Networks) -> ReferenceSet:
        sets = self._load_or_extract(
            digest, networks, lambda: images.gathered_batches("reference features"), images.count
        )
        return ReferenceSet(digest, images.count, sets)

    def from_npz(self, path: Path, networks: Networks, batch_size: int, device: torch.device) -> ReferenceSet:
        """Return features of an .npz file.

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
                    f"protocol.reference={path}: has no images (arr_0) for the network {network.name}; its moments are "
                    "of the Inception network, for metric=[fid]"
                )
        return ReferenceSet(digest, None if "mu" in arrays or images is None else len(images), sets)

    def _load_or_extract(
        self, digest: str, networks: Networks, batches: Callable[[], Iterable[Tensor]], count: int
    ) -> FeatureSets:
        paths = {key: self._path(digest, network) for key, network in networks.items()}
        sets = {
            key: features
            for key, path in paths.items()
            if comm.is_main() and (features := _load_features(path)) is not None
        }
        missing_keys = comm.broadcast_object([key for key in networks if key not in sets])
        missing = {key: networks[key] for key in missing_keys}
        if missing:
            new = extract_features(batches(), missing, count)
            self._save_all(digest, missing, new)
            sets |= new
        return sets

    def _save_all(self, digest: str, networks: Networks, feature_sets: FeatureSets) -> None:
        for key, features in feature_sets.items():
            _save_features(self._path(digest, networks[key]), features)

    def _path(self, digest: str, network: FeatureNetwork) -> Path:
        return self.folder / f"{digest}-{network.name}-{network.digest}.safetensors"


def extract_features(batches: Iterable[Tensor], networks: Networks, count: int) -> FeatureSets:
    """Extract features of images (B, C, H, W) in [-1, 1]; {} outside the main process, though all iterate."""
    accumulators = {key: FeatureAccumulator(network, count) for key, network in networks.items()}
    for images in batches:
        for accumulator in accumulators.values():
            accumulator.update(images)
    return {key: accumulator.compute() for key, accumulator in accumulators.items()} if comm.is_main() else {}


def real_vs_real(features: FeatureSet, count: int, seed: int) -> tuple[FeatureSet, FeatureSet] | None:
    """Split real images at random into a reference and a stand-in for `count` generated ones; None if too few."""
    kept = len(features.features)
    count = min(count, kept // 2)
    if count < 2:
        return None
    order = torch.randperm(kept, generator=seeded_generator(seed, "floor"))
    reference, stand_in = _subset(features, order[count:]), _subset(features, order[:count])
    if features.count != kept:
        reference = replace(reference, count=features.count, mean=features.mean, covariance=features.covariance)
    return reference, stand_in


def _subset(features: FeatureSet, indices: Tensor) -> FeatureSet:
    return feature_set(features.features[indices], None if features.logits is None else features.logits[indices])


def _with_moments(inception_features: FeatureSet | None, arrays: Mapping[str, np.ndarray], path: Path) -> FeatureSet:
    mean, covariance = (torch.from_numpy(np.asarray(arrays[key], dtype=np.float64)) for key in ("mu", "sigma"))
    features, logits = torch.zeros(0, len(mean)), None
    if inception_features is not None:
        features, logits = inception_features.features, inception_features.logits
    if covariance.shape != (len(mean), len(mean)) or features.shape[1] != len(mean):
        raise UserError(f"protocol.reference={path}: mu and sigma do not fit each other, or the network")
    return FeatureSet(None, mean, covariance, features, logits)


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("mu", "sigma", "arr_0") if key in file.files}
    except Exception as error:  # a zip file may fail in any way
        reason = describe_substitute(path) or error
        raise UserError(f"protocol.reference={path}: not a readable .npz file ({reason})") from error
    if ("mu" in arrays) != ("sigma" in arrays) or not arrays:
        raise UserError(f"protocol.reference={path}: needs mu and sigma, or images as arr_0")
    if "arr_0" in arrays and (arrays["arr_0"].ndim != 4 or arrays["arr_0"].dtype != np.uint8):
        raise UserError(f"protocol.reference={path}: arr_0 must be uint8 (N, H, W, 3)")
    return arrays


def _npz_batches(images: np.ndarray, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    with terminal.progress("reference features", len(images)) as bar:
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
            metadata = file.metadata()
        if metadata["sha256"] != sha256_of_tensors(tensors):
            raise ValueError("checksum mismatch")
        return FeatureSet(int(metadata["count"]), **tensors)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        log.warning("%s: %s; computing it again", path, error)
        return None
