"""Imports the GPT prior of taming-transformers."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from vqf.errors import UserError
from vqf.interop import infer_config, source_config
from vqf.interop.checkpoint_file import CheckpointContents
from vqf.interop.import_report import ImportReport
from vqf.interop.key_mapping import KeyMapping, KeyRule, matches
from vqf.interop.key_tables import CAUSAL_MASK_KEY, GPT_RULES
from vqf.interop.meta_models import Weights, check_shapes, convert_tensor, meta_prior, shapes_of
from vqf.interop.optimizers import OptimizerState
from vqf.interop.tokenizers import ImportedModule, read_optimizer_state
from vqf.models.tokenizer import Tokenizer
from vqf.tokens.prefix import PrefixSpec

TRANSFORMER_PREFIX = "transformer."
DEFAULT_HEADS = 16  # as in all published transformers but one; the weights do not tell


@dataclass(frozen=True)
class ImportOptions:
    """Facts about a prior that neither weights nor config tell."""

    heads: int | None = None
    classes: int | None = None


def condition_length(contents: CheckpointContents, tokens: int) -> int:
    """Number of condition tokens, from the positions.

    A single condition token leaves one position less: the last code is never an input.
    """
    return max(_position_embedding(contents).shape[1] - tokens, 1)


def num_classes(contents: CheckpointContents, options: ImportOptions) -> int:
    """Number of classes of the prior's condition, or 0.

    Raises:
        UserError: If there are more than rows in its embedding table.
    """
    count = source_config.num_classes(contents.settings) or 0 if options.classes is None else options.classes
    rows = len(contents.tensors[f"{TRANSFORMER_PREFIX}tok_emb.weight"])
    if not 0 <= count <= rows:
        raise UserError(f"{contents.path}: {count} classes, but its prior embeds {rows} tokens; give classes=")
    return count


def read_prior(
    contents: CheckpointContents, tokenizer: Tokenizer, prefix: PrefixSpec, options: ImportOptions, report: ImportReport
) -> ImportedModule:
    """Import the transformer of a file.

    Raises:
        UserError: If a tensor is missing or has another shape.
    """
    tensors = contents.tensors
    names = [name.removeprefix(TRANSFORMER_PREFIX) for name in tensors if name.startswith(TRANSFORMER_PREFIX)]
    table = KeyMapping.for_import(GPT_RULES, names)
    translated = {name: match for name in names if (match := table.to_vqf(name)) and not matches(CAUSAL_MASK_KEY, name)}
    weights = {
        new: convert_tensor(contents.tensors[TRANSFORMER_PREFIX + name], rule)
        for name, (new, rule) in translated.items()
    }
    node = _node(contents, weights, options, report)
    _start_token(contents, weights, node, prefix)
    try:
        blank = meta_prior(node, tokenizer, prefix)
    except UserError as error:
        raise UserError(f"{contents.path}: {error}") from error
    assert isinstance(blank, nn.Module)
    positions = blank.state_dict()["position_embedding"].shape[1]
    _check_positions(contents, weights["position_embedding"].shape[1], positions, tokenizer)
    weights["position_embedding"] = _trim_positions(weights["position_embedding"], positions, report)
    check_shapes(contents.path, weights, blank, table)
    for name, (new, _) in translated.items():
        report.add_loaded(TRANSFORMER_PREFIX + name, new)
    return ImportedModule(
        {"prior": node}, weights, optimizer_state=_named_optimizer_state(contents, translated, blank, report)
    )


def _node(
    contents: CheckpointContents, weights: Weights, options: ImportOptions, report: ImportReport
) -> infer_config.Node:
    configured = source_config.prior(contents.settings)
    if options.heads is None and "heads" not in configured:
        report.note(f"number of attention heads unknown: {DEFAULT_HEADS} assumed, give heads= if it is another")
    heads = options.heads or configured.get("heads", DEFAULT_HEADS)
    return {
        **infer_config.prior_node(shapes_of(weights), heads),
        **{key: value for key, value in configured.items() if key != "heads"},
        "unmasked_prefix": _bidirectional_prefix_length(contents),
        "shared_vocabulary": True,
    }


def _bidirectional_prefix_length(contents: CheckpointContents) -> int:
    mask = contents.tensors.get(f"{TRANSFORMER_PREFIX}blocks.0.attn.mask")
    first = 1 if mask is None else int(mask.reshape(mask.shape[-2:])[0].sum())
    return first if first > 1 else 0


def _start_token(contents: CheckpointContents, weights: Weights, node: infer_config.Node, prefix: PrefixSpec) -> None:
    """A start token other than 0 needs an embedding table."""
    token = source_config.start_token(contents.settings)
    if token and prefix.vocab_size == 1:
        node["shared_vocabulary"] = False
        weights["prefix_embedding.weight"] = weights["token_embedding.weight"][token : token + 1].clone()


def _trim_positions(positions: Tensor, rows: int, report: ImportReport) -> Tensor:
    if positions.shape[1] > rows:
        report.note(
            f"{positions.shape[1] - rows} of {positions.shape[1]} positions are skipped: no token is ever there"
        )
    return positions[:, :rows].clone()


def _check_positions(contents: CheckpointContents, actual: int, expected: int, tokenizer: Tokenizer) -> None:
    if actual < expected:
        height, width = tokenizer.image_size
        raise UserError(
            f"{contents.path}: its prior has {actual} positions, but images of {height} x {width} px need {expected}; "
            "give image_size= as in its training"
        )


def _position_embedding(contents: CheckpointContents) -> Tensor:
    name = f"{TRANSFORMER_PREFIX}pos_emb"
    if name not in contents.tensors:
        raise UserError(f"{contents.path}: '{name}' is missing")
    return contents.tensors[name]


def optimizer_groups(prior: nn.Module, renamed: Mapping[str, str]) -> list[list[str]]:
    """Source names of a prior's parameters in the order of taming-transformers' AdamW.

    Weights of linear layers come first; each group is sorted by name.
    """
    linear = {f"{name}.weight" for name, each in prior.named_modules() if isinstance(each, nn.Linear)}
    decayed = sorted(name for name, new in renamed.items() if new in linear)
    return [decayed, sorted(name for name in renamed if name not in decayed)]


def _named_optimizer_state(
    contents: CheckpointContents, translated: Mapping[str, tuple[str, KeyRule]], blank: nn.Module, report: ImportReport
) -> OptimizerState | None:
    renamed = {name: new for name, (new, _) in translated.items()}
    return read_optimizer_state(contents, 0, optimizer_groups(blank, renamed), renamed, blank, "prior", report)
