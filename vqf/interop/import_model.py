"""A checkpoint of another project as a run of vqf's: which models, of which sizes, with which weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vqf.batch import Size
from vqf.errors import UserError
from vqf.interop import source_config
from vqf.interop.checkpoint_file import Contents, open_file
from vqf.interop.import_report import Report
from vqf.interop.key_tables import Layout
from vqf.interop.meta_models import Nodes, Prefix, blank_tokenizer
from vqf.interop.priors import PREFIX, Asked, classes_of, condition_length, read_prior
from vqf.interop.tokenizers import ENTRANCE, Part, find_layout, find_prefix, read_discriminator, read_tokenizer

FIRST, CONDITION, PERMUTER = "first_stage_model.", "cond_stage_model.", "permuter.forward_shuffle_idx"


@dataclass
class Read:
    """What a checkpoint holds."""

    tokenizer: Part
    report: Report
    image_size: Size
    step: int
    discriminator: Part | None = None
    prior: Part | None = None
    condition: "Read | None" = None  # the tokenizer of a prior's condition
    adversary: dict[str, Any] = field(default_factory=dict)
    decay: float | None = None  # of the averaged weights
    classes: Sequence[str] = ()

    @property
    def kind(self) -> str:
        """The kind of run it makes: "stage1" or "stage2"."""
        return "stage1" if self.prior is None else "stage2"

    @property
    def nodes(self) -> Nodes:
        """The config nodes of every model in it."""
        return {key: node for part in self._parts for key, node in part.nodes.items()}

    def broken(self) -> list[str]:
        """Name the tensors that hold numbers which are not finite, by vqf's names."""
        return [
            name
            for part in self._parts
            for name, each in part.weights.items()
            if each.is_floating_point() and not each.isfinite().all()
        ]

    @property
    def _parts(self) -> list[Part]:
        return [each for each in (self.tokenizer, self.discriminator, self.prior) if each]


def read(
    path: Path, *, source: str = "auto", yaml: Path | None = None, size: Size | None = None, asked: Asked | None = None
) -> Read:
    """Read a checkpoint.

    Args:
        path: A file, or the folder of a model of diffusers or transformers.
        source: Whose layout it has; "auto" tells by the names.
        yaml: The settings that describe it; by default a file beside it under a usual name.
        size: Height and width of the pictures that its tokenizer is for, in pixels.
        asked: What is not in the file about its prior.

    Raises:
        UserError: In one line, if it cannot be read whole.
    """
    contents = open_file(path, yaml)
    layout = find_layout(contents, source)
    report = Report(path, layout.name)
    if contents.settings_path:
        report.note(f"settings from {contents.settings_path}")
    staged = f"{PREFIX}tok_emb.weight" in contents.tensors
    prefix = FIRST if staged else find_prefix(contents)
    frozen = replace(contents, optimizers=[]) if staged else contents
    tokenizer = read_tokenizer(frozen, prefix, layout, size, report)
    result = Read(tokenizer, report, tokenizer.image_size, contents.step)
    if staged:
        _read_second_stage(contents, layout, result, asked or Asked())
    else:
        result.discriminator = read_discriminator(contents, prefix, report)
        result.adversary = source_config.adversary(contents.settings)
        result.decay = _decay(contents)
    report.close(contents.tensors)
    return result


def _read_second_stage(contents: Contents, layout: Layout, result: Read, asked: Asked) -> None:
    _check_order(contents)
    blank = blank_tokenizer(result.tokenizer.nodes, result.image_size, result.tokenizer.channels)
    result.condition = _read_condition(contents, layout, result)
    result.classes = [str(i) for i in range(classes_of(contents, asked))]
    length = _condition_tokens(contents, result.condition) or condition_length(contents, blank.grid[0] * blank.grid[1])
    node = _conditioner(contents, result) if length == 1 or result.condition else None
    codes = result.condition.tokenizer.nodes["quantizer"]["codebook_size"] if result.condition else blank.vocab_size
    prefix = Prefix(len(result.classes) or 1, 1) if length == 1 else Prefix(codes, length)
    result.prior = read_prior(contents, blank, prefix, asked, result.report)
    result.prior.nodes["conditioner"] = node
    if node is None:
        result.report.note(
            f"the prior reads {length} tokens of a condition that the file does not hold: it is kept in the run, "
            "which can reconstruct but not sample"
        )


def _conditioner(contents: Contents, result: Read) -> Nodes:
    """Return the nodes of the condition; which run holds the tokenizer of a map is not known yet."""
    if result.condition is None:
        name = "label" if result.classes else "none"
        return {name: {"name": name}}
    small = source_config.condition_size(contents.settings)
    downsample = result.image_size[0] // small if small else 1
    return {"spatial": {"name": "spatial", "run": None, "downsample": downsample}}


def _condition_tokens(contents: Contents, condition: Read | None) -> int | None:
    if condition is None:
        return None
    small = source_config.condition_size(contents.settings)
    stride = blank_tokenizer(condition.tokenizer.nodes, condition.image_size, condition.tokenizer.channels).stride
    height, width = (small, small) if small else condition.image_size
    return (height // stride) * (width // stride)


def _read_condition(contents: Contents, layout: Layout, result: Read) -> Read | None:
    """Read the tokenizer of the condition; None, with a note, where it is none or none that vqf can build."""
    if f"{CONDITION}{ENTRANCE}" not in contents.tensors:
        return None
    report, frozen = Report(contents.path, layout.name), replace(contents, optimizers=[])
    try:
        part = read_tokenizer(frozen, CONDITION, layout, result.image_size, report)
    except UserError as error:
        reason = str(error).removeprefix(f"{contents.path}: ")
        result.report.note(f"the tokenizer of the condition is left: {reason}")
        return None
    result.report.taken |= report.taken
    return Read(part, report, result.image_size, contents.step)


def _check_order(contents: Contents) -> None:
    order = contents.tensors.get(PERMUTER)
    if order is not None and order.tolist() != list(range(len(order))):
        raise UserError(f"{contents.path}: its prior reads the codes in an order of its own; vqf's read row by row")


def _decay(contents: Contents) -> float | None:
    decay: Tensor | None = contents.tensors.get("model_ema.decay")
    if not contents.average:
        return None
    return 0.9999 if decay is None else float(decay)
