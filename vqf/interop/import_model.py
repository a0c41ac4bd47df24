"""Imports a checkpoint of another project."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vqf.batch import Size
from vqf.errors import UserError
from vqf.interop import source_config
from vqf.interop.checkpoint_file import CheckpointContents, open_checkpoint_file
from vqf.interop.import_report import ImportReport
from vqf.interop.key_tables import CheckpointLayout
from vqf.interop.meta_models import Nodes, meta_tokenizer
from vqf.interop.priors import TRANSFORMER_PREFIX, ImportOptions, condition_length, num_classes, read_prior
from vqf.interop.tokenizers import (
    FIRST_CONV_KEY,
    ImportedModule,
    find_layout,
    find_prefix,
    read_discriminator,
    read_tokenizer,
)
from vqf.networks.weights import nonfinite_names
from vqf.tokens.prefix import PrefixSpec

FIRST_STAGE_PREFIX = "first_stage_model."  # of the tokenizer in a prior's checkpoint
CONDITION_STAGE_PREFIX = "cond_stage_model."  # of the tokenizer of its condition
PERMUTER_KEY = "permuter.forward_shuffle_idx"


@dataclass
class ImportedCheckpoint:
    """The models of a checkpoint in vqf's terms."""

    tokenizer: ImportedModule
    report: ImportReport
    image_size: Size
    step: int
    discriminator: ImportedModule | None = None
    prior: ImportedModule | None = None
    condition: "ImportedCheckpoint | None" = None  # tokenizer of the prior's condition maps
    adversary: dict[str, Any] = field(default_factory=dict)  # options
    ema_decay: float | None = None  # None: the file has no EMA weights
    classes: Sequence[str] = ()

    @property
    def kind(self) -> str:
        """ "stage1" or "stage2"."""
        return "stage1" if self.prior is None else "stage2"

    @property
    def nodes(self) -> Nodes:
        return {key: node for module in self._modules for key, node in module.nodes.items()}

    def nonfinite_tensors(self) -> list[str]:
        """Names of the tensors with NaN or infinity."""
        return [name for module in self._modules for name in nonfinite_names(module.weights)]

    @property
    def _modules(self) -> list[ImportedModule]:
        return [each for each in (self.tokenizer, self.discriminator, self.prior) if each]


def import_checkpoint(
    path: Path,
    *,
    source: str = "auto",
    yaml: Path | None = None,
    size: Size | None = None,
    options: ImportOptions | None = None,
) -> ImportedCheckpoint:
    """Import a checkpoint, or the folder of a diffusers or transformers model.

    Args:
        source: A name in `LAYOUTS`; "auto" infers it.
        yaml: Its config; by default a file beside it.
        size: Height and width of training images in pixels; None: from the config.

    Raises:
        UserError: If a tensor is missing or does not fit, or vqf cannot build such a model.
    """
    try:
        return _import(open_checkpoint_file(path, yaml), source, size, options or ImportOptions())
    except (LookupError, ArithmeticError, RuntimeError, TypeError) as error:  # tensors and settings may be anything
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{path}: cannot be imported, a tensor or setting is not as in any known model ({type(error).__name__}: "
            f"{reason})"
        ) from error


def _import(contents: CheckpointContents, source: str, size: Size | None, options: ImportOptions) -> ImportedCheckpoint:
    path = contents.path
    layout = find_layout(contents, source)
    report = ImportReport(path, layout.name)
    if contents.settings_path:
        report.note(f"settings from {contents.settings_path}")
    has_prior = f"{TRANSFORMER_PREFIX}tok_emb.weight" in contents.tensors
    prefix = FIRST_STAGE_PREFIX if has_prior else find_prefix(contents)
    frozen = replace(contents, optimizers=[]) if has_prior else contents  # its optimizer state is the prior's
    tokenizer = read_tokenizer(frozen, prefix, layout, size, report)
    result = ImportedCheckpoint(tokenizer, report, tokenizer.image_size, contents.step)
    if has_prior:
        _read_second_stage(contents, layout, result, options)
    else:
        result.discriminator = read_discriminator(contents, prefix, report)
        result.adversary = source_config.adversary(contents.settings)
        result.ema_decay = _ema_decay(contents)
    report.finalize(contents.tensors)
    return result


def _read_second_stage(
    contents: CheckpointContents, layout: CheckpointLayout, result: ImportedCheckpoint, options: ImportOptions
) -> None:
    _check_order(contents)
    blank = meta_tokenizer(result.tokenizer.nodes, result.image_size, result.tokenizer.channels)
    result.condition = _read_condition(contents, layout, result)
    result.classes = [str(i) for i in range(num_classes(contents, options))]
    length = _condition_tokens(contents, result.condition) or condition_length(contents, blank.layout.length)
    node = _conditioner(contents, result) if length == 1 or result.condition else None
    codes = blank.layout.vocab_size
    if result.condition:
        codes = result.condition.tokenizer.nodes["quantizer"]["codebook_size"]
    prefix = PrefixSpec(len(result.classes) or 1, 1) if length == 1 else PrefixSpec(codes, length)
    result.prior = read_prior(contents, blank, prefix, options, result.report)
    result.prior.nodes["conditioner"] = node
    if node is None:
        result.report.note(
            f"the file does not hold the tokenizer of the prior's condition ({length} tokens): the run "
            "can reconstruct but not sample"
        )


def _conditioner(contents: CheckpointContents, result: ImportedCheckpoint) -> Nodes:
    if result.condition is None:
        name = "label" if result.classes else "none"
        return {name: {"name": name}}
    map_size = source_config.condition_size(contents.settings)
    downsample = result.image_size[0] // map_size if map_size else 1
    return {"spatial": {"name": "spatial", "run": None, "downsample": downsample}}


def _condition_tokens(contents: CheckpointContents, condition: ImportedCheckpoint | None) -> int | None:
    if condition is None:
        return None
    map_size = source_config.condition_size(contents.settings)
    blank = meta_tokenizer(condition.tokenizer.nodes, condition.image_size, condition.tokenizer.channels)
    stride = blank.stride or 1
    height, width = (map_size, map_size) if map_size else condition.image_size
    return (height // stride) * (width // stride)


def _read_condition(
    contents: CheckpointContents, layout: CheckpointLayout, result: ImportedCheckpoint
) -> ImportedCheckpoint | None:
    if f"{CONDITION_STAGE_PREFIX}{FIRST_CONV_KEY}" not in contents.tensors:
        return None
    report, frozen = ImportReport(contents.path, layout.name), replace(contents, optimizers=[])
    try:
        tokenizer = read_tokenizer(frozen, CONDITION_STAGE_PREFIX, layout, result.image_size, report)
    except UserError as error:
        reason = str(error).removeprefix(f"{contents.path}: ")
        result.report.note(f"the tokenizer of the condition is skipped: {reason}")
        return None
    result.report.loaded |= report.loaded
    return ImportedCheckpoint(tokenizer, report, result.image_size, contents.step)


def _check_order(contents: CheckpointContents) -> None:
    order = contents.tensors.get(PERMUTER_KEY)
    if order is not None and order.tolist() != list(range(len(order))):
        raise UserError(f"{contents.path}: its prior reads the codes in an order of its own; vqf's read row by row")


def _ema_decay(contents: CheckpointContents) -> float | None:
    decay: Tensor | None = contents.tensors.get("model_ema.decay")
    if not contents.ema_tensors:
        return None
    return 0.9999 if decay is None else float(decay)
