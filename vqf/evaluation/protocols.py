"""Evaluation protocols: what is measured on which images.

Crop, rounding and reference change an FID by more than two models differ.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from vqf.errors import UserError
from vqf.options.ranges import NonNegativeInt
from vqf.registry import register

Crop = Literal["source", "center", "adm"]
ResizeFilter = Literal["bicubic", "bilinear", "lanczos", "box", "linear"]
Rounding = Literal["nearest", "truncate", "none"]
SplitName = Literal["validation", "train"]

ORIGINALS = "originals"


@register("protocol", "reconstruction")
@dataclass(frozen=True)
class ReconstructionProtocol:
    """All validation images against their reconstructions, cropped by the data source.

    Args:
        part: Split to reconstruct: `validation` or `train`.
        count: Number of images, spread evenly over the split; all by default.
        crop: `source` keeps the crop of the data source; `center` resizes the shorter side to the image size and crops
            the center; `adm` crops as guided-diffusion's center_crop_arr, which first halves large images.
        resize: The filter of `crop=center`: one of Pillow's, with antialiasing, or `linear`, without.
        rounding: How reconstructions become 8-bit pixels: `nearest`, `truncate` as guided-diffusion and
            taming-transformers, or `none`. Real images are rounded to the nearest, or with `none` not at all.
        reference: The set that reconstructions are compared with: the `originals`, a split (`validation`, `train`), or
            an .npz file with `mu` and `sigma`, images as `arr_0`, or both.
        seed: Seed of augmentations of the data source and of the halves of the floor.
    """

    part: SplitName = "validation"
    count: Annotated[int, Ge(2)] | None = None
    crop: Crop = "source"
    resize: ResizeFilter = "bicubic"
    rounding: Rounding = "nearest"
    reference: str = ORIGINALS
    seed: NonNegativeInt = 0

    task: ClassVar[str] = "reconstruction"


@register("protocol", "rfid_val")
@dataclass(frozen=True)
class RFIDValProtocol(ReconstructionProtocol):
    """rFID as tokenizer papers report it: all validation images, center-cropped, against their reconstructions.

    1d-tokenizer crops as here, LlamaGen with `protocol.crop=adm` (https://github.com/showlab/D-AR/issues/3).
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
    """Samples of a prior against the training images.

    Args:
        part: Split for nats per token, `validation` or `train`.
        count: Number of samples; by default as many as the reference has images, at most 50,000.
        crop: Of real images: `source`, `center` or `adm`; see the protocol `reconstruction`.
        resize: The filter of `crop=center`; see the protocol `reconstruction`.
        rounding: How samples become 8-bit pixels: `nearest`, `truncate` or `none`.
        reference: The set that samples are compared with: a split (`validation`, `train`), or an .npz file with `mu`
            and `sigma`, images as `arr_0`, or both. With `crop=source`, training images are augmented as in epoch 0.
        labels: Conditions of the samples: `balanced`, all classes in turn; `uniform`, a random class for each;
            `images`, the conditions of images of `part`: labels, maps, ...
        seed: Seed of samples, classes, augmentations of the data source and the halves of the floor.
    """

    part: SplitName = "validation"
    count: Annotated[int, Ge(2)] | None = None
    crop: Crop = "source"
    resize: ResizeFilter = "bicubic"
    rounding: Rounding = "nearest"
    reference: str = "train"
    labels: Literal["balanced", "uniform", "images"] = "balanced"
    seed: NonNegativeInt = 0

    task: ClassVar[str] = "generation"

    def __post_init__(self) -> None:
        if self.reference == ORIGINALS:
            raise UserError("protocol.reference=originals: samples have none; give train, validation or an .npz file")


@register("protocol", "small")
@dataclass(frozen=True)
class SmallGenerationProtocol(GenerationProtocol):
    """256 samples, conditioned as validation images are, against the training images: for small data and one CPU."""

    count: Annotated[int, Ge(2)] | None = 256
    labels: Literal["balanced", "uniform", "images"] = "images"


@register("protocol", "gfid_train")
@dataclass(frozen=True)
class GFIDTrainProtocol(GenerationProtocol):
    """50,000 samples with balanced classes against all training images, center-cropped.

    The FID of taming-transformers (https://github.com/CompVis/taming-transformers/issues/155).
    """

    count: Annotated[int, Ge(2)] | None = 50_000
    crop: Crop = "center"


@register("protocol", "gfid_adm")
@dataclass(frozen=True)
class GFIDADMProtocol(GenerationProtocol):
    """50,000 samples of uniformly drawn classes against a reference batch of ADM, with pixels truncated as there.

    Diffusion Models Beat GANs on Image Synthesis, https://arxiv.org/abs/2105.05233, whose batches
    (https://github.com/openai/guided-diffusion/tree/main/evaluations) hold moments of the full training set and
    10,000 images.

    Args:
        reference: The .npz file.
    """

    count: Annotated[int, Ge(2)] | None = 50_000
    crop: Crop = "adm"
    rounding: Rounding = "truncate"
    labels: Literal["balanced", "uniform", "images"] = "uniform"
    reference: str = field(kw_only=True)


def stable_hash(facts: Mapping[str, Any]) -> str:
    """Hash lines in any order to 16 hexadecimal digits."""
    lines = json.dumps({key: value for key, value in facts.items() if key != "hash"}, sort_keys=True)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def preprocessing_lines(crop: str, resize: str) -> dict[str, str]:
    """Return the lines for crop and resize filter."""
    return {"crop": crop, "resize": {"source": "by the data source", "adm": "box, bicubic"}.get(crop, resize)}
