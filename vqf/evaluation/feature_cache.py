"""What feature networks see in sets of real pictures: computed once, kept in a folder under the hash of the pixels."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vqf import terminal
from vqf.atomic import write_text
from vqf.batch import Batch
from vqf.dataloading.loader import TIMEOUT, sequential
from vqf.distributed import comm
from vqf.errors import UserError
from vqf.evaluation.preprocessing import rounded, to_pixels
from vqf.networks.feature_extractors import INCEPTION
from vqf.networks.feature_set import Collector, set_of
from vqf.networks.weights import sha256
from vqf.protocols import FeatureNetwork, FeatureSet, Split
from vqf.seeding import generator
from vqf.terminal import log

Networks = Mapping[str, FeatureNetwork]  # by their digests
Sets = dict[str, FeatureSet]  # by the digest of the network that saw it


@dataclass(frozen=True)
class Pictures:
    """Real pictures as a protocol shows them."""

    split: Split
    seen: str  # hashes which files they are of, as far as that is known without opening them, and how they are cropped
    count: int
    rounding: str
    batch_size: int
    workers: int
    device: torch.device
    timeout: float = TIMEOUT

    def parts(self, what: str) -> Iterator[tuple[Batch, int]]:
        """Yield this process's part of every batch on the device, and how many pictures the whole batch has.

        They are as the protocol shows them. A progress bar says `what` is done with them.
        """
        with terminal.progress(what, self.count) as bar:
            batches = sequential(
                self.split, self.batch_size, count=self.count, workers=self.workers, timeout=self.timeout
            )
            for batch in batches:
                now = min(len(batch) * comm.world(), bar.left)
                yield shown(batch.to(self.device), self.rounding), now
                bar.advance(now)

    def images(self, what: str) -> Iterator[Tensor]:
        """Yield the images (B, C, H, W) of whole batches, in the first process; every process must call it."""
        for batch, count in self.parts(what):
            assert batch.images is not None
            whole = comm.collect(batch.images, count)
            if whole is not None:
                yield whole

    def hashed(self, pixels: "PixelHash", what: str) -> Iterator[Tensor]:
        """Yield their images, each batch hashed."""
        for images in self.images(what):
            pixels.add(images)
            yield images


def shown(batch: Batch, rounding: str) -> Batch:
    """Return real pictures as a protocol shows them: to the nearest pixel even where generated ones are cut."""
    assert batch.images is not None
    return replace(batch, images=rounded(batch.images, "none" if rounding == "none" else "nearest"))


class PixelHash:
    """Hashes pictures in their order, however they are cut into batches: their pixels, or numbers if not rounded."""

    def __init__(self, rounding: str) -> None:
        self.digest, self.exact, self.started = hashlib.sha256(), rounding == "none", False

    def add(self, images: Tensor) -> None:
        """Hash images (B, C, H, W) in [-1, 1]."""
        if not self.started:
            self.digest.update(repr(tuple(images.shape[1:])).encode())
            self.started = True
        content = images.float() if self.exact else to_pixels(images)
        self.digest.update(content.cpu().contiguous().numpy().tobytes())

    def result(self) -> str:
        """Return the hash, to 16 digits."""
        return self.digest.hexdigest()[:16]


@dataclass(frozen=True)
class Reference:
    """A set of real pictures, or a file about one."""

    digest: str  # of the pixels, or of the file
    count: int | None  # pictures; None where the file does not say
    sets: Sets


class Statistics:
    """A folder of what networks saw, a file for each set of pictures and network.

    A file that cannot be read is made anew.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hashed = set[str]()  # the parts of data whose pixels were looked at since this was made

    def of_part(self, pictures: Pictures, networks: Networks) -> Reference:
        """Return what networks see in pictures whose pixels are not hashed yet.

        Pictures that are new are decoded once, for the hash and for the networks. Of known ones the hash is taken
        first, and where no network asks, it is taken to be that of the last time.
        """
        name = f"{pictures.seen}-{pictures.count}-{pictures.rounding}"
        memory, pixels = self.folder / f"{name}.txt", PixelHash(pictures.rounding)
        known = comm.same(memory.read_text().strip() if memory.is_file() else "")
        if known and (name in self.hashed or not networks):
            return self.of_pictures(pictures, known, networks)
        if known:
            for _ in pictures.hashed(pixels, "hash the reference"):
                pass
            found = self.of_pictures(pictures, pixels.result(), networks)
        else:
            sets = collect(pictures.hashed(pixels, "look at the reference"), networks, pictures.count)
            found = Reference(pixels.result(), pictures.count, sets)
            self._keep(found.digest, networks, sets)
        self.hashed.add(name)
        if comm.first():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(memory, found.digest)
        return found

    def of_pictures(self, pictures: Pictures, digest: str, networks: Networks) -> Reference:
        """Return what networks see in pictures whose pixels have a hash."""
        sets = self._sets(digest, networks, lambda: pictures.images("look at the reference"), pictures.count)
        return Reference(digest, pictures.count, sets)

    def of_file(self, path: Path, networks: Networks, batch_size: int, device: torch.device) -> Reference:
        """Return what a reference batch says: moments of Inception's features as `mu` and `sigma`, pictures as `arr_0`.

        Raises:
            UserError: If the file cannot be read, or lacks what a network needs.
        """
        arrays = _load(path)
        digest, pictures = sha256(path)[:16], arrays.get("arr_0")
        sets: Sets = {}
        if pictures is not None and networks:
            sets = self._sets(digest, networks, lambda: _batches(pictures, batch_size, device), len(pictures))
        for key, network in networks.items() if comm.first() else ():
            if network.name == INCEPTION and "mu" in arrays:
                sets[key] = _with_moments(sets.get(key), arrays, path)
            elif key not in sets:
                raise UserError(
                    f"protocol.reference={path}: has no pictures (arr_0) for {network.name} to look at; its moments "
                    "are of the Inception network, metric=[fid]"
                )
        return Reference(digest, None if "mu" in arrays or pictures is None else len(pictures), sets)

    def _sets(self, digest: str, networks: Networks, batches: Callable[[], Iterable[Tensor]], count: int) -> Sets:
        paths = {key: self._path(digest, network) for key, network in networks.items()}
        sets = {key: found for key, path in paths.items() if comm.first() and (found := _read(path)) is not None}
        absent = comm.same([key for key in networks if key not in sets])
        missing = {key: networks[key] for key in absent}
        if missing:
            new = collect(batches(), missing, count)
            self._keep(digest, missing, new)
            sets |= new
        return sets

    def _keep(self, digest: str, networks: Networks, sets: Sets) -> None:
        for key, found in sets.items():
            _write(self._path(digest, networks[key]), found)

    def _path(self, digest: str, network: FeatureNetwork) -> Path:
        return self.folder / f"{digest}-{network.name}-{network.digest}.safetensors"


def collect(batches: Iterable[Tensor], networks: Networks, count: int) -> Sets:
    """Look at pictures with every network, in the first process."""
    collectors = {key: Collector(network, count) for key, network in networks.items()}
    for images in batches:
        for collector in collectors.values():
            collector.add(images)
    return {key: collector.result() for key, collector in collectors.items()} if comm.first() else {}


def floor_sets(whole: FeatureSet, count: int, seed: int) -> tuple[FeatureSet, FeatureSet] | None:
    """Return real pictures in place of the reference and of the generated ones; None if too few are known.

    `count` of them, at most half, are taken out at random and compared with the others; where the moments are of more
    pictures than are kept, with the moments of all.
    """
    known = len(whole.features)
    taken = min(count, known // 2)
    if taken < 2:
        return None
    order = torch.randperm(known, generator=generator(seed, "floor"))
    rest, some = _pick(whole, order[taken:]), _pick(whole, order[:taken])
    if whole.count != known:
        rest = replace(rest, count=whole.count, mean=whole.mean, covariance=whole.covariance)
    return rest, some


def _pick(whole: FeatureSet, numbers: Tensor) -> FeatureSet:
    return set_of(whole.features[numbers], None if whole.logits is None else whole.logits[numbers])


def _with_moments(seen: FeatureSet | None, arrays: Mapping[str, np.ndarray], path: Path) -> FeatureSet:
    mean, covariance = (torch.from_numpy(np.asarray(arrays[key], dtype=np.float64)) for key in ("mu", "sigma"))
    if covariance.shape != (len(mean), len(mean)) or (seen is not None and seen.features.shape[1] != len(mean)):
        raise UserError(f"protocol.reference={path}: mu and sigma do not fit each other, or the network")
    features = seen.features if seen is not None else torch.zeros(0, len(mean))
    return FeatureSet(None, mean, covariance, features, None if seen is None else seen.logits)


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("mu", "sigma", "arr_0") if key in file.files}
    except Exception as error:  # a zip file of anything
        raise UserError(f"protocol.reference={path}: not an .npz file that can be read ({error})") from error
    if ("mu" in arrays) != ("sigma" in arrays) or not arrays:
        raise UserError(f"protocol.reference={path}: needs mu and sigma, or pictures as arr_0")
    if "arr_0" in arrays and (arrays["arr_0"].ndim != 4 or arrays["arr_0"].dtype != np.uint8):
        raise UserError(f"protocol.reference={path}: arr_0 must be uint8 (N, H, W, 3)")
    return arrays


def _batches(pictures: np.ndarray, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    with terminal.progress("look at the reference", len(pictures)) as bar:
        for i in range(0, len(pictures), batch_size) if comm.first() else ():
            pixels = torch.from_numpy(pictures[i : i + batch_size]).to(device)
            yield pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
            bar.advance(len(pixels))


def _write(path: Path, found: FeatureSet) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"mean": found.mean, "covariance": found.covariance, "features": found.features}
    if found.logits is not None:
        tensors["logits"] = found.logits
    temporary = path.with_suffix(f".tmp-{os.getpid()}")
    tensors = {key: each.contiguous() for key, each in tensors.items()}
    save_file(tensors, temporary, {"count": str(found.count), "sha256": _content(tensors)})
    temporary.rename(path)


def _content(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> FeatureSet | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            facts = file.metadata()
        if facts["sha256"] != _content(tensors):
            raise ValueError("not what was written")
        return FeatureSet(int(facts["count"]), **tensors)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        log.warning("%s: %s; made anew", path, error)
        return None
