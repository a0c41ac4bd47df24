"""Reads the transformer of taming-transformers that models codes."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from vqf.errors import UserError
from vqf.interop import infer_config, source_config
from vqf.interop.checkpoint_file import CheckpointContents
from vqf.interop.import_report import ImportReport
from vqf.interop.key_mapping import KeyMapping, KeyRule, matches
from vqf.interop.key_tables import CAUSAL_MASK_KEY, GPT_RULES
from vqf.interop.meta_models import PrefixSpec, Weights, check_shapes, convert_tensor, meta_prior, shapes_of
from vqf.interop.optimizers import OptimizerState
from vqf.interop.tokenizers import ImportedModule, read_optimizer_state
from vqf.models.tokenizer import Tokenizer

TRANSFORMER_PREFIX = "transformer."
DEFAULT_HEADS = 16  # of all but one published transformer; nothing in the weights tells


@dataclass(frozen=True)
class ImportOptions:
    """What the user says of a prior, where neither weights nor settings do."""

    heads: int | None = None
    classes: int | None = None


def condition_length(contents: CheckpointContents, tokens: int) -> int:
    """Tell from the number of positions how many tokens stand in front of the codes of an image.

    The published transformers have as many positions as there are tokens of condition and image, and none for a
    single token in front, since the last code is never read.
    """
    return max(_position_embedding(contents).shape[1] - tokens, 1)


def num_classes(contents: CheckpointContents, asked: ImportOptions) -> int:
    """Return the number of classes that the prior was conditioned on; 0 where it was not."""
    told = source_config.num_classes(contents.settings)
    return (told or 0) if asked.classes is None else asked.classes


def read_prior(
    contents: CheckpointContents, tokenizer: Tokenizer, prefix: PrefixSpec, asked: ImportOptions, report: ImportReport
) -> ImportedModule:
    """Read the transformer of a file.

    Args:
        contents: Of the file.
        tokenizer: Whose codes it models.
        prefix: Of its condition.
        asked: What only the user can tell.
        report: Where to note what became of every tensor.

    Raises:
        UserError: If a tensor is missing or has another shape.
    """
    names = [name.removeprefix(TRANSFORMER_PREFIX) for name in contents.tensors if name.startswith(TRANSFORMER_PREFIX)]
    table = KeyMapping.for_import(GPT_RULES, names)
    moved = {name: found for name in names if (found := table.to_vqf(name)) and not matches(CAUSAL_MASK_KEY, name)}
    weights = {
        new: convert_tensor(contents.tensors[TRANSFORMER_PREFIX + name], rule) for name, (new, rule) in moved.items()
    }
    node = _node(contents, weights, asked, report)
    _start_token(contents, weights, node, prefix)
    try:
        blank = meta_prior(node, tokenizer.vocab_size, tokenizer.grid, prefix)
    except UserError as error:
        raise UserError(f"{contents.path}: {error}") from error
    assert isinstance(blank, nn.Module)
    wanted = blank.state_dict()["position_embedding"].shape
    _check_positions(contents, weights["position_embedding"].shape[1], wanted[1], tokenizer)
    weights["position_embedding"] = _trim_positions(weights["position_embedding"], wanted[1], report)
    check_shapes(contents.path, weights, blank, table)
    for name, (new, _) in moved.items():
        report.add_taken(TRANSFORMER_PREFIX + name, new)
    return ImportedModule(
        {"prior": node}, weights, optimizer_state=_named_optimizer_state(contents, moved, blank, report)
    )


def _node(
    contents: CheckpointContents, weights: Weights, asked: ImportOptions, report: ImportReport
) -> infer_config.Node:
    told = source_config.prior(contents.settings)
    if asked.heads is None and "heads" not in told:
        report.note(
            f"nothing says how many heads the transformer has: {DEFAULT_HEADS} are assumed, heads= says otherwise"
        )
    heads = asked.heads or told.get("heads", DEFAULT_HEADS)
    return {
        **infer_config.prior_node(shapes_of(weights), heads),
        **{key: value for key, value in told.items() if key != "heads"},
        "unmasked_prefix": _bidirectional_prefix_length(contents),
        "shared_vocabulary": True,
    }


def _bidirectional_prefix_length(contents: CheckpointContents) -> int:
    """Read off the causal mask how many tokens of the condition see all of each other."""
    mask = contents.tensors.get(f"{TRANSFORMER_PREFIX}blocks.0.attn.mask")
    first = 1 if mask is None else int(mask.reshape(mask.shape[-2:])[0].sum())
    return first if first > 1 else 0


def _start_token(contents: CheckpointContents, weights: Weights, node: infer_config.Node, prefix: PrefixSpec) -> None:
    """Give a start token other than 0 an embedding of its own."""
    token = source_config.start_token(contents.settings)
    if token and prefix.vocab_size == 1:
        node["shared_vocabulary"] = False
        weights["prefix_embedding.weight"] = weights["token_embedding.weight"][token : token + 1].clone()


def _trim_positions(positions: Tensor, rows: int, report: ImportReport) -> Tensor:
    if positions.shape[1] > rows:
        report.note(
            f"{positions.shape[1] - rows} of {positions.shape[1]} positions are left: no token ever stands there"
        )
    return positions[:, :rows].clone()


def _check_positions(contents: CheckpointContents, found: int, wanted: int, tokenizer: Tokenizer) -> None:
    if found < wanted:
        height, width = tokenizer.image_size
        raise UserError(
            f"{contents.path}: its prior has {found} positions, and images of {height} x {width} px need {wanted}: "
            "give image_size= as it was trained"
        )


def _position_embedding(contents: CheckpointContents) -> Tensor:
    name = f"{TRANSFORMER_PREFIX}pos_emb"
    if name not in contents.tensors:
        raise UserError(f"{contents.path}: '{name}' is missing")
    return contents.tensors[name]


def optimizer_groups(prior: nn.Module, renamed: Mapping[str, str]) -> list[list[str]]:
    """Return the reference's names of a prior's parameters as its AdamW has them.

    First the weights of linear layers, which decay, and then all others; both sorted by name.

    Args:
        prior: Ours.
        renamed: From the reference's names to ours.
    """
    linear = {f"{name}.weight" for name, each in prior.named_modules() if isinstance(each, nn.Linear)}
    decayed = sorted(name for name, new in renamed.items() if new in linear)
    return [decayed, sorted(name for name in renamed if name not in decayed)]


def _named_optimizer_state(
    contents: CheckpointContents, moved: Mapping[str, tuple[str, KeyRule]], blank: nn.Module, report: ImportReport
) -> OptimizerState | None:
    renamed = {name: new for name, (new, _) in moved.items()}
    return read_optimizer_state(contents, 0, optimizer_groups(blank, renamed), renamed, blank, "prior", report)
