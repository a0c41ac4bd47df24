"""Imports a tokenizer and its discriminator."""

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
# Order in which taming-transformers and its descendants pass their parameters to Adam.
PARAMETER_PREFIXES = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
STEP_COUNTER = "quantizer.steps"  # of the Gumbel temperature; no file has it
ASSUMED_IMAGE_SIZE = 256  # pixels, if neither config nor user tells
MAX_IMAGE_SIZE = 2**16  # pixels, in a config that is to be believed


@dataclass
class ImportedModule:
    """One imported model in vqf's terms."""

    nodes: Nodes
    weights: Weights
    ema_weights: Weights = field(default_factory=dict)  # empty: none in the file
    optimizer_state: OptimizerState | None = None
    image_size: Size = (ASSUMED_IMAGE_SIZE, ASSUMED_IMAGE_SIZE)
    channels: int = 3  # of its images


def find_layout(contents: CheckpointContents, source: str) -> CheckpointLayout:
    """Find the layout of a file by its tensor names.

    Raises:
        UserError: If none matches, or another than `source`.
    """
    matching = (layout for layout in LAYOUTS.values() if any(layout.marker in name for name in contents.tensors))
    layout = next(matching, None)
    if layout is None:
        first_names = ", ".join(list(contents.tensors)[:3])
        raise UserError(
            f"{contents.path}: no tokenizer in it whose layout vqf knows ({', '.join(LAYOUTS)}); "
            f"its first tensors are {first_names}"
        )
    chosen = layout if source == "auto" else LAYOUTS[source]
    if chosen.rules is not layout.rules:
        raise UserError(f"source={source}: the names in {contents.path} are those of '{layout.name}'")
    return chosen


def find_prefix(contents: CheckpointContents) -> str:
    """Find the prefix of a tokenizer's tensor names.

    Raises:
        UserError: If there is not exactly one tokenizer.
    """
    prefixes = [name.removesuffix(FIRST_CONV_KEY) for name in contents.tensors if name.endswith(FIRST_CONV_KEY)]
    if len(prefixes) != 1:
        problem = f"several tokenizers ({', '.join(prefixes)})" if prefixes else f"no '{FIRST_CONV_KEY}'"
        raise UserError(f"{contents.path}: {problem} in it")
    return prefixes[0]


def read_tokenizer(
    contents: CheckpointContents, prefix: str, layout: CheckpointLayout, size: Size | None, report: ImportReport
) -> ImportedModule:
    """Import the tokenizer with a prefix.

    Args:
        size: Height and width of its training images; None: from the config, else 256.

    Raises:
        UserError: If a tensor does not fit, or vqf cannot build it.
    """
    names = [name.removeprefix(prefix) for name in contents.tensors if name.startswith(prefix)]
    kind, rules = _quantizer(layout, names, contents)
    table = KeyMapping.for_import([*layout.rules, *rules], names)
    translated = {name: match for name in names if (match := table.to_vqf(name))}
    weights = {new: convert_tensor(contents.tensors[prefix + name], rule) for name, (new, rule) in translated.items()}
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
    for name, (new, _) in translated.items():
        report.add_loaded(prefix + name, new)
    renamed = {name: new for name, (new, _) in translated.items()}
    order = [name for start in PARAMETER_PREFIXES for name in renamed if name.startswith(start)]
    state = read_optimizer_state(contents, 0, [order], renamed, blank, "tokenizer", report)
    return ImportedModule(nodes, weights, _ema_weights(contents, prefix, translated, weights), state, size, channels)


def read_discriminator(contents: CheckpointContents, prefix: str, report: ImportReport) -> ImportedModule | None:
    """Import a discriminator; None if vqf cannot build it."""
    names = [name.removeprefix(prefix) for name in contents.tensors if name.startswith(prefix + DISCRIMINATOR_PREFIX)]
    table = KeyMapping.for_import(DISCRIMINATOR_RULES, names)
    renamed = {name: match[0] for name in names if (match := table.to_vqf(name))}
    weights = {new: convert_tensor(contents.tensors[prefix + name]) for name, new in renamed.items()}
    node = infer_config.discriminator_node(shapes_of(weights))
    blank = None if node is None else meta_discriminator(node, weights["discriminator.main.0.weight"].shape[1])
    if node is None or blank is None or shapes_of(blank.state_dict()) != shapes_of(weights):
        for name in names:
            report.add_skipped(prefix + name, "a discriminator other than PatchGAN with batch norm")
        return None
    for name, new in renamed.items():
        report.add_loaded(prefix + name, new)
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
    """Import the state of an optimizer; None, with a note, if none fits.

    Args:
        groups: Source names, ordered as in the optimizer; buffers are ignored.
        renamed: vqf's name of each.
    """
    parameters = shapes_of(dict(blank.named_parameters()))
    if index >= len(contents.optimizers):
        report.note(f"no optimizer state of the {what} in the file; a resumed run initializes it")
        return None
    trained = [[name for name in group if renamed[name] in parameters] for group in groups]
    try:
        return name_state(contents.optimizers[index], trained, renamed, parameters)
    except ValueError as error:
        report.note(f"the optimizer state of the {what} is skipped: {error}; a resumed run initializes it")
        return None


def _size(contents: CheckpointContents, weights: Weights, report: ImportReport) -> Size:
    stride = 2 ** (infer_config.count_blocks(weights, "encoder.down") - 1)
    side = source_config.image_size(contents.settings, stride)
    if side is not None and not 0 < side <= MAX_IMAGE_SIZE:
        raise UserError(f"images of {side} px in its settings; give image_size=")
    if side is None:
        report.note(f"image size unknown: {ASSUMED_IMAGE_SIZE} px assumed, give image_size= if it is another")
    return side or ASSUMED_IMAGE_SIZE, side or ASSUMED_IMAGE_SIZE


def _nodes(contents: CheckpointContents, kind: str, weights: Weights, image_size: int) -> Nodes:
    shapes = shapes_of(weights)
    return {
        "encoder": infer_config.encoder_node(shapes, image_size),
        "decoder": infer_config.decoder_node(shapes, image_size),
        "quantizer": {**infer_config.quantizer_node(shapes, kind), **_options(kind, contents)},
    }


def _options(kind: str, contents: CheckpointContents) -> dict[str, Any]:
    if kind == "vq":
        return {"beta_placement": "codebook"}  # of all these projects
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
    raise UserError(f"{contents.path}: no codebook in it; is it an autoencoder without a quantizer?")


def _ema_weights(
    contents: CheckpointContents, prefix: str, translated: Mapping[str, tuple[str, KeyRule]], weights: Weights
) -> Weights:
    """Buffers come from `weights`; empty without EMA."""
    ema_weights = {
        new: convert_tensor(contents.ema_tensors[prefix + name], rule)
        for name, (new, rule) in translated.items()
        if prefix + name in contents.ema_tensors
    }
    return {**weights, **ema_weights} if ema_weights else {}


def _check_norms(contents: CheckpointContents, blank: Tokenizer) -> None:
    theirs = source_config.num_norm_groups(contents.settings)
    ours = {each.num_groups for each in blank.modules() if isinstance(each, nn.GroupNorm)}
    if ours - {theirs}:
        raise UserError(
            f"{contents.path}: group norms of {theirs} groups, but vqf has {max(ours - {theirs})} for these widths"
        )
    source_config.check_activation(contents.settings)
