"""Reads a tokenizer, and the discriminator that it was trained against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vqf.batch import Size
from vqf.errors import UserError
from vqf.interop import infer_config, source_config
from vqf.interop.checkpoint_file import CRITIC, Contents
from vqf.interop.import_report import Report
from vqf.interop.key_mapping import Rule, Table
from vqf.interop.key_tables import DISCRIMINATOR, LAYOUTS, Layout
from vqf.interop.meta_models import Nodes, Weights, blank_discriminator, blank_tokenizer, check_shapes, shapes, take
from vqf.interop.optimizers import State, by_name
from vqf.models.tokenizer import Tokenizer

ENTRANCE = "encoder.conv_in.weight"  # every layout has it
# In the order in which taming-transformers and its relatives hand their parameters to Adam.
PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
CLOCK = "quantizer.steps"  # of a temperature, which no file keeps
ASSUMED = 256  # pixels, where nothing says otherwise


@dataclass
class Part:
    """One model that was read."""

    nodes: Nodes
    weights: Weights
    average: Weights = field(default_factory=dict)
    state: State | None = None  # of its optimizer
    image_size: Size = (ASSUMED, ASSUMED)
    channels: int = 3  # of its images


def find_layout(contents: Contents, source: str) -> Layout:
    """Tell whose names these are.

    Raises:
        UserError: If nobody's that vqf knows, or not those of `source`.
    """
    found = next((each for each in LAYOUTS.values() if any(each.sign in name for name in contents.tensors)), None)
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


def find_prefix(contents: Contents) -> str:
    """Find what stands in front of the names of the one tokenizer in a file.

    Raises:
        UserError: If there are several.
    """
    found = [name.removesuffix(ENTRANCE) for name in contents.tensors if name.endswith(ENTRANCE)]
    if len(found) != 1:
        several = f"several tokenizers ({', '.join(found)})" if found else f"no '{ENTRANCE}'"
        raise UserError(f"{contents.path}: {several} in it")
    return found[0]


def read_tokenizer(contents: Contents, prefix: str, layout: Layout, size: Size | None, report: Report) -> Part:
    """Read the tokenizer whose names begin with `prefix`.

    Args:
        contents: Of the file.
        prefix: In front of its names.
        layout: Of its names.
        size: Of the pictures it was made for; None: what the settings beside the file say, else 256.
        report: Where to note what became of every tensor.

    Raises:
        UserError: If a tensor is missing or has another shape, or vqf cannot build such a tokenizer.
    """
    names = [name.removeprefix(prefix) for name in contents.tensors if name.startswith(prefix)]
    kind, rules = _quantizer(layout, names, contents)
    table = Table.reading([*layout.rules, *rules], names)
    moved = {name: found for name in names if (found := table.ours(name))}
    weights = {new: take(contents.tensors[prefix + name], rule) for name, (new, rule) in moved.items()}
    try:
        size = size or _size(contents, weights, report)
        nodes = _nodes(contents, kind, weights, min(size))
        channels = infer_config.image_channels(shapes(weights))
        blank = blank_tokenizer(nodes, size, channels)
    except UserError as error:
        raise UserError(f"{contents.path}: {error}") from error
    _check_norms(contents, blank)
    if CLOCK in blank.state_dict():
        weights[CLOCK] = torch.tensor(contents.step)
    check_shapes(contents.path, weights, blank, table)
    for name, (new, _) in moved.items():
        report.take(prefix + name, new)
    renamed = {name: new for name, (new, _) in moved.items()}
    ordered = [name for start in PARTS for name in renamed if name.startswith(start)]
    state = read_state(contents, 0, [ordered], renamed, blank, "tokenizer", report)
    return Part(nodes, weights, _average(contents, prefix, moved, weights), state, size, channels)


def read_discriminator(contents: Contents, prefix: str, report: Report) -> Part | None:
    """Read the discriminator beside a tokenizer; None where there is none that vqf has."""
    names = [name.removeprefix(prefix) for name in contents.tensors if name.startswith(prefix + CRITIC)]
    table = Table.reading(DISCRIMINATOR, names)
    renamed = {name: found[0] for name in names if (found := table.ours(name))}
    weights = {new: take(contents.tensors[prefix + name]) for name, new in renamed.items()}
    node = infer_config.discriminator_node(shapes(weights))
    blank = None if node is None else blank_discriminator(node, weights["discriminator.main.0.weight"].shape[1])
    if node is None or blank is None or shapes(blank.state_dict()) != shapes(weights):
        for name in names:
            report.leave(prefix + name, "a discriminator that is no PatchGAN with batch norm")
        return None
    for name, new in renamed.items():
        report.take(prefix + name, new)
    state = read_state(contents, 1, [list(renamed)], renamed, blank, "discriminator", report)
    return Part({"discriminator": node}, weights, state=state)


def read_state(
    contents: Contents,
    index: int,
    groups: Sequence[Sequence[str]],
    renamed: Mapping[str, str],
    blank: nn.Module,
    what: str,
    report: Report,
) -> State | None:
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
    parameters = shapes(dict(blank.named_parameters()))
    if index >= len(contents.optimizers):
        report.note(f"no optimizer state of the {what} in the file; a resumed run starts it afresh")
        return None
    trained = [[name for name in group if renamed[name] in parameters] for group in groups]
    try:
        return by_name(contents.optimizers[index], trained, renamed, parameters)
    except ValueError as error:
        report.note(f"the optimizer state of the {what} is left: {error}; a resumed run starts it afresh")
        return None


def _size(contents: Contents, weights: Weights, report: Report) -> Size:
    stride = 2 ** (infer_config.count(weights, "encoder.down") - 1)
    told = source_config.image_size(contents.settings, stride)
    if told is None:
        report.note(f"nothing says which size of pictures it is for: {ASSUMED} px assumed, image_size= says otherwise")
    return told or ASSUMED, told or ASSUMED


def _nodes(contents: Contents, kind: str, weights: Weights, nominal: int) -> Nodes:
    found = shapes(weights)
    return {
        "encoder": infer_config.encoder_node(found, nominal),
        "decoder": infer_config.decoder_node(found, nominal),
        "quantizer": {**infer_config.quantizer_node(found, kind), **_options(kind, contents)},
    }


def _options(kind: str, contents: Contents) -> dict[str, Any]:
    if kind == "vq":
        return {"beta_on": "codebook"}  # as all of these projects train
    return source_config.quantizer(contents.settings) if kind == "gumbel" else {}


def _quantizer(layout: Layout, names: Sequence[str], contents: Contents) -> tuple[str, Sequence[Rule]]:
    for kind, rules in layout.quantizers.items():
        table = Table.reading(rules, names)
        if len([name for name in names if table.ours(name)]) >= len(rules):
            return kind, rules
    if any(name.startswith("quantize.") for name in names):
        raise UserError(f"{contents.path}: a quantizer that '{layout.name}' does not have")
    raise UserError(f"{contents.path}: no codebook in it; is it an autoencoder without codes?")


def _average(contents: Contents, prefix: str, moved: Mapping[str, tuple[str, Rule]], weights: Weights) -> Weights:
    """Return the averaged weights, if the file has them; buffers are not averaged."""
    found = {new: (prefix + name, rule) for name, (new, rule) in moved.items() if prefix + name in contents.average}
    average = {new: take(contents.average[name], rule) for new, (name, rule) in found.items()}
    return {**weights, **average} if average else {}


def _check_norms(contents: Contents, blank: Tokenizer) -> None:
    told = source_config.groups(contents.settings)
    found = {each.num_groups for each in blank.modules() if isinstance(each, nn.GroupNorm)}
    if found - {told}:
        raise UserError(
            f"{contents.path}: group norms of {told} groups, where vqf has {max(found - {told})} for these widths"
        )
    source_config.check_activation(contents.settings)
