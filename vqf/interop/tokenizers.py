"""Reads a tokenizer, and the discriminator that it was trained against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vqf.batch import Size
from vqf.errors import UserError
from vqf.interop import infer_config, source_config
from vqf.interop.checkpoint_file import DISCRIMINATOR_PREFIX, CheckpointContents
from vqf.interop.import_report import ImportReport
from vqf.interop.key_mapping import KeyMapping, KeyRule
from vqf.interop.key_tables import DISCRIMINATOR_RULES, LAYOUTS, CheckpointLayout
from vqf.interop.meta_models import (
    Nodes,
    Weights,
    check_shapes,
    convert_tensor,
    meta_discriminator,
    meta_tokenizer,
    shapes_of,
)
from vqf.interop.optimizers import OptimizerState, name_state
from vqf.models.tokenizer import Tokenizer

FIRST_CONV_KEY = "encoder.conv_in.weight"  # every layout has it
# In the order in which taming-transformers and its relatives hand their parameters to Adam.
PARAMETER_PREFIXES = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
STEP_COUNTER = "quantizer.steps"  # of a temperature, which no file keeps
ASSUMED_IMAGE_SIZE = 256  # pixels, where nothing says otherwise


@dataclass
class ImportedModule:
    """One model that was read."""

    nodes: Nodes
    weights: Weights
    ema_weights: Weights = field(default_factory=dict)
    optimizer_state: OptimizerState | None = None  # of its optimizer
    image_size: Size = (ASSUMED_IMAGE_SIZE, ASSUMED_IMAGE_SIZE)
    channels: int = 3  # of its images


def find_layout(contents: CheckpointContents, source: str) -> CheckpointLayout:
    """Tell whose names these are.

    Raises:
        UserError: If nobody's that vqf knows, or not those of `source`.
    """
    found = next((each for each in LAYOUTS.values() if any(each.marker in name for name in contents.tensors)), None)
    if found is None:
        shown = ", ".join(list(contents.tensors)[:3])
        raise UserError(
            f"{contents.path}: no tokenizer in it whose layout vqf knows ({', '.join(LAYOUTS)}); "
            f"its tensors begin with {shown}"
        )
    wanted = found if source == "auto" else LAYOUTS[source]
    if wanted.rules is not found.rules:
        raise UserError(f"source={source}: the names in {contents.path} are those of '{found.name}'")
    return wanted


def find_prefix(contents: CheckpointContents) -> str:
    """Find what stands in front of the names of the one tokenizer in a file.

    Raises:
        UserError: If there are several.
    """
    found = [name.removesuffix(FIRST_CONV_KEY) for name in contents.tensors if name.endswith(FIRST_CONV_KEY)]
    if len(found) != 1:
        several = f"several tokenizers ({', '.join(found)})" if found else f"no '{FIRST_CONV_KEY}'"
        raise UserError(f"{contents.path}: {several} in it")
    return found[0]


def read_tokenizer(
    contents: CheckpointContents, prefix: str, layout: CheckpointLayout, size: Size | None, report: ImportReport
) -> ImportedModule:
    """Read the tokenizer whose names begin with `prefix`.

    Args:
        contents: Of the file.
        prefix: In front of its names.
        layout: Of its names.
        size: Of the images it was made for; None: what the settings beside the file say, else 256.
        report: Where to note what became of every tensor.

    Raises:
        UserError: If a tensor is missing or has another shape, or vqf cannot build such a tokenizer.
    """
    names = [name.removeprefix(prefix) for name in contents.tensors if name.startswith(prefix)]
    kind, rules = _quantizer(layout, names, contents)
    table = KeyMapping.for_import([*layout.rules, *rules], names)
    moved = {name: found for name in names if (found := table.to_vqf(name))}
    weights = {new: convert_tensor(contents.tensors[prefix + name], rule) for name, (new, rule) in moved.items()}
    try:
        size = size or _size(contents, weights, report)
        nodes = _nodes(contents, kind, weights, min(size))
        channels = infer_config.image_channels(shapes_of(weights))
        blank = meta_tokenizer(nodes, size, channels)
    except UserError as error:
        raise UserError(f"{contents.path}: {error}") from error
    _check_norms(contents, blank)
    if STEP_COUNTER in blank.state_dict():
        weights[STEP_COUNTER] = torch.tensor(contents.step)
    check_shapes(contents.path, weights, blank, table)
    for name, (new, _) in moved.items():
        report.add_taken(prefix + name, new)
    renamed = {name: new for name, (new, _) in moved.items()}
    ordered = [name for start in PARAMETER_PREFIXES for name in renamed if name.startswith(start)]
    state = read_optimizer_state(contents, 0, [ordered], renamed, blank, "tokenizer", report)
    return ImportedModule(nodes, weights, _ema_weights(contents, prefix, moved, weights), state, size, channels)


def read_discriminator(contents: CheckpointContents, prefix: str, report: ImportReport) -> ImportedModule | None:
    """Read the discriminator beside a tokenizer; None where there is none that vqf has."""
    names = [name.removeprefix(prefix) for name in contents.tensors if name.startswith(prefix + DISCRIMINATOR_PREFIX)]
    table = KeyMapping.for_import(DISCRIMINATOR_RULES, names)
    renamed = {name: found[0] for name in names if (found := table.to_vqf(name))}
    weights = {new: convert_tensor(contents.tensors[prefix + name]) for name, new in renamed.items()}
    node = infer_config.discriminator_node(shapes_of(weights))
    blank = None if node is None else meta_discriminator(node, weights["discriminator.main.0.weight"].shape[1])
    if node is None or blank is None or shapes_of(blank.state_dict()) != shapes_of(weights):
        for name in names:
            report.add_skipped(prefix + name, "a discriminator that is no PatchGAN with batch norm")
        return None
    for name, new in renamed.items():
        report.add_taken(prefix + name, new)
    state = read_optimizer_state(contents, 1, [list(renamed)], renamed, blank, "discriminator", report)
    return ImportedModule({"discriminator": node}, weights, optimizer_state=state)


def read_optimizer_state(
    contents: CheckpointContents,
    index: int,
    groups: Sequence[Sequence[str]],
    renamed: Mapping[str, str],
    blank: nn.Module,
    what: str,
    report: ImportReport,
) -> OptimizerState | None:
    """Return the state of a file's optimizer by vqf's names; None, with a note, where there is none that fits.

    Args:
        contents: Of the file.
        index: Of the optimizer in it.
        groups: Names in the order in which the optimizer knows them; those of buffers are passed over.
        renamed: From those names to vqf's.
        blank: The model that is optimized.
        what: What the note calls it.
        report: Where to note it.
    """
    parameters = shapes_of(dict(blank.named_parameters()))
    if index >= len(contents.optimizers):
        report.note(f"no optimizer state of the {what} in the file; a resumed run starts it afresh")
        return None
    trained = [[name for name in group if renamed[name] in parameters] for group in groups]
    try:
        return name_state(contents.optimizers[index], trained, renamed, parameters)
    except ValueError as error:
        report.note(f"the optimizer state of the {what} is left: {error}; a resumed run starts it afresh")
        return None


def _size(contents: CheckpointContents, weights: Weights, report: ImportReport) -> Size:
    stride = 2 ** (infer_config.count_blocks(weights, "encoder.down") - 1)
    told = source_config.image_size(contents.settings, stride)
    if told is None:
        report.note(
            f"nothing says which size of images it is for: {ASSUMED_IMAGE_SIZE} px assumed, image_size= says otherwise"
        )
    return told or ASSUMED_IMAGE_SIZE, told or ASSUMED_IMAGE_SIZE


def _nodes(contents: CheckpointContents, kind: str, weights: Weights, nominal: int) -> Nodes:
    found = shapes_of(weights)
    return {
        "encoder": infer_config.encoder_node(found, nominal),
        "decoder": infer_config.decoder_node(found, nominal),
        "quantizer": {**infer_config.quantizer_node(found, kind), **_options(kind, contents)},
    }


def _options(kind: str, contents: CheckpointContents) -> dict[str, Any]:
    if kind == "vq":
        return {"beta_placement": "codebook"}  # as all of these projects train
    return source_config.quantizer(contents.settings) if kind == "gumbel" else {}


def _quantizer(
    layout: CheckpointLayout, names: Sequence[str], contents: CheckpointContents
) -> tuple[str, Sequence[KeyRule]]:
    for kind, rules in layout.quantizers.items():
        table = KeyMapping.for_import(rules, names)
        if len([name for name in names if table.to_vqf(name)]) >= len(rules):
            return kind, rules
    if any(name.startswith("quantize.") for name in names):
        raise UserError(f"{contents.path}: a quantizer that '{layout.name}' does not have")
    raise UserError(f"{contents.path}: no codebook in it; is it an autoencoder without codes?")


def _ema_weights(
    contents: CheckpointContents, prefix: str, moved: Mapping[str, tuple[str, KeyRule]], weights: Weights
) -> Weights:
    """Return the averaged weights, if the file has them; buffers are not averaged."""
    found = {new: (prefix + name, rule) for name, (new, rule) in moved.items() if prefix + name in contents.ema_tensors}
    average = {new: convert_tensor(contents.ema_tensors[name], rule) for new, (name, rule) in found.items()}
    return {**weights, **average} if average else {}


def _check_norms(contents: CheckpointContents, blank: Tokenizer) -> None:
    told = source_config.num_norm_groups(contents.settings)
    found = {each.num_groups for each in blank.modules() if isinstance(each, nn.GroupNorm)}
    if found - {told}:
        raise UserError(
            f"{contents.path}: group norms of {told} groups, where vqf has {max(found - {told})} for these widths"
        )
    source_config.check_activation(contents.settings)
