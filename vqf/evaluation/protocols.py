"""Protocols: what is measured on which images. Every line of one goes into the result, and into its hash.

Two numbers under one name differ by far more than two models when the crop, the rounding or the reference differ; the
presets here are the ones that papers use.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from vqf.errors import UserError
from vqf.registry import register

Crop = Literal["source", "center", "adm"]
ResizeFilter = Literal["bicubic", "bilinear", "lanczos", "box", "linear"]
Rounding = Literal["nearest", "truncate", "none"]
SplitName = Literal["validation", "train"]

ORIGINALS = "originals"


@register("protocol", "reconstruction")
@dataclass(frozen=True)
class ReconstructionProtocol:
    """All held-out images against their reconstructions, cropped as the data source does.

    Args:
        part: Of the data: what is reconstructed.
        count: So many images, spread evenly; all by default.
        crop: `source` takes images as the data source gives them; `center` scales the shorter side to the image size
            and cuts off both ends of the longer one; `adm` halves the image with a box filter as often as it can,
            then does the same, as guided-diffusion's center_crop_arr.
        resize: The filter of `crop=center`: one of Pillow's, with antialiasing, or `linear`, without.
        rounding: How reconstructions become 8-bit pixels: `nearest`, `truncate` as guided-diffusion and
            taming-transformers save theirs, or `none`. Real images are rounded to the nearest, or not at all.
        reference: What reconstructions are compared with as a set: the `originals`, a part of the data, or an .npz
            file with `mu` and `sigma`, images as `arr_0`, or both.
        seed: Of whatever is drawn: what a data source varies, and the halves of the floor.
    """

    part: SplitName = "validation"
    count: int | None = None
    crop: Crop = "source"
    resize: ResizeFilter = "bicubic"
    rounding: Rounding = "nearest"
    reference: str = ORIGINALS
    seed: int = 0

    task: ClassVar[str] = "reconstruction"

    def __post_init__(self) -> None:
        _check(self)


@register("protocol", "rfid_val")
@dataclass(frozen=True)
class RFIDValProtocol(ReconstructionProtocol):
    """rFID as tokenizer papers report it: all validation images, each at one crop against its reconstruction.

    1d-tokenizer crops as here, LlamaGen with `protocol.crop=adm`; originals of another crop cost whole points
    (https://github.com/showlab/D-AR/issues/3).
    """

    crop: Crop = "center"


@register("protocol", "rfid_train")
@dataclass(frozen=True)
class RFIDTrainProtocol(ReconstructionProtocol):
    """Reconstructions of the validation images against the training images, with taming-transformers' resizing.

    One checkpoint has 10.54 so and 7.94 with `protocol.reference=originals`
    (https://github.com/CompVis/taming-transformers).
    """

    crop: Crop = "center"
    resize: ResizeFilter = "linear"
    reference: str = "train"


@register("protocol", "generation")
@dataclass(frozen=True)
class GenerationProtocol:
    """Samples of a prior against the training images, as many as there are of those, at most 50,000.

    Args:
        part: The held-out part of the data: nats per token are of its images.
        count: Samples.
        crop: Of real images: `source`, `center` or `adm`; see the protocol `reconstruction`.
        resize: The filter of `crop=center`; see the protocol `reconstruction`.
        rounding: How samples become 8-bit pixels: `nearest`, `truncate` or `none`.
        reference: What samples are compared with: a part of the data, or an .npz file with `mu` and `sigma`, images
            as `arr_0`, or both. With `crop=source`, training images are as the data source varies them in epoch 0.
        labels: What samples are told: `balanced`, classes take turns; `uniform`, a class drawn for each; `images`,
            whatever the images of `part` come with: labels, maps, ...
        seed: Of the samples, the classes, whatever a data source varies, and the halves of the floor.
    """

    part: SplitName = "validation"
    count: int | None = None
    crop: Crop = "source"
    resize: ResizeFilter = "bicubic"
    rounding: Rounding = "nearest"
    reference: str = "train"
    labels: Literal["balanced", "uniform", "images"] = "balanced"
    seed: int = 0

    task: ClassVar[str] = "generation"

    def __post_init__(self) -> None:
        _check(self)
        if self.reference == ORIGINALS:
            raise UserError("protocol.reference=originals: samples have none; give a part of the data, or an .npz file")


@register("protocol", "small")
@dataclass(frozen=True)
class SmallGenerationProtocol(GenerationProtocol):
    """256 samples, told what held-out images are, against the training images: for small data and one CPU."""

    count: int | None = 256
    labels: Literal["balanced", "uniform", "images"] = "images"


@register("protocol", "gfid_train")
@dataclass(frozen=True)
class GFIDTrainProtocol(GenerationProtocol):
    """50,000 samples, as many of each class, against all training images at one crop.

    The FID of taming-transformers (https://github.com/CompVis/taming-transformers/issues/155).
    """

    count: int | None = 50_000
    crop: Crop = "center"


@register("protocol", "gfid_adm")
@dataclass(frozen=True)
class GFIDADMProtocol(GenerationProtocol):
    """50,000 samples of uniformly drawn classes against a reference batch of ADM's evaluation, pixels cut as it does.

    Diffusion Models Beat GANs on Image Synthesis, https://arxiv.org/abs/2105.05233. Its batches, such as
    VIRTUAL_imagenet256_labeled.npz (https://github.com/openai/guided-diffusion/tree/main/evaluations), hold moments of
    the whole training set, and 10,000 images for precision and recall. sFID is not offered.

    Args:
        reference: The .npz file.
    """

    count: int | None = 50_000
    crop: Crop = "adm"
    rounding: Rounding = "truncate"
    labels: Literal["balanced", "uniform", "images"] = "uniform"
    reference: str = field(kw_only=True)


def stable_hash(facts: Mapping[str, Any]) -> str:
    """Hash every line of a protocol, in any order, to 16 digits."""
    lines = json.dumps({key: value for key, value in facts.items() if key != "hash"}, sort_keys=True)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def preprocessing_lines(crop: str, resize: str) -> dict[str, str]:
    """Word how images come to their size; only what has an effect."""
    return {"crop": crop, "resize": {"source": "by the data source", "adm": "box, bicubic"}.get(crop, resize)}


def _check(protocol: ReconstructionProtocol | GenerationProtocol) -> None:
    if protocol.count is not None and protocol.count < 2:
        raise UserError(f"protocol.count={protocol.count}: a set of images needs at least two")
    if protocol.seed < 0:
        raise UserError(f"protocol.seed={protocol.seed} is negative")
