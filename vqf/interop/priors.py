"""Reads the transformer of taming-transformers that models codes."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from vqf.errors import UserError
from vqf.interop import infer_config, source_config
from vqf.interop.checkpoint_file import Contents
from vqf.interop.import_report import Report
from vqf.interop.key_mapping import Rule, Table, fits
from vqf.interop.key_tables import GPT, MASK
from vqf.interop.meta_models import Prefix, Weights, blank_prior, check_shapes, shapes, take
from vqf.interop.optimizers import State
from vqf.interop.tokenizers import Part, read_state
from vqf.models.tokenizer import Tokenizer

PREFIX = "transformer."
HEADS = 16  # of all but one published transformer; nothing in the weights tells


@dataclass(frozen=True)
class Asked:
    """What the user says of a prior, where neither weights nor settings do."""

    heads: int | None = None
    classes: int | None = None


def condition_length(contents: Contents, tokens: int) -> int:
    """Tell from the number of positions how many tokens stand in front of the codes of a picture.

    The published transformers have as many positions as there are tokens of condition and picture, and none for a
    single token in front, since the last code is never read.
    """
    return max(_position(contents).shape[1] - tokens, 1)


def classes_of(contents: Contents, asked: Asked) -> int:
    """Return the number of classes that the prior was conditioned on; 0 where it was not."""
    told = source_config.classes(contents.settings)
    return (told or 0) if asked.classes is None else asked.classes


def read_prior(contents: Contents, tokenizer: Tokenizer, prefix: Prefix, asked: Asked, report: Report) -> Part:
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
    names = [name.removeprefix(PREFIX) for name in contents.tensors if name.startswith(PREFIX)]
    table = Table.reading(GPT, names)
    moved = {name: found for name in names if (found := table.ours(name)) and not fits(MASK, name)}
    weights = {new: take(contents.tensors[PREFIX + name], rule) for name, (new, rule) in moved.items()}
    node = _node(contents, weights, asked, report)
    _start_token(contents, weights, node, prefix)
    try:
        blank = blank_prior(node, tokenizer.vocab_size, tokenizer.grid, prefix)
    except UserError as error:
        raise UserError(f"{contents.path}: {error}") from error
    assert isinstance(blank, nn.Module)
    wanted = blank.state_dict()["position_embedding"].shape
    _check_positions(contents, weights["position_embedding"].shape[1], wanted[1], tokenizer)
    weights["position_embedding"] = _cut(weights["position_embedding"], wanted[1], report)
    check_shapes(contents.path, weights, blank, table)
    for name, (new, _) in moved.items():
        report.take(PREFIX + name, new)
    return Part({"prior": node}, weights, state=_state(contents, moved, blank, report))


def _node(contents: Contents, weights: Weights, asked: Asked, report: Report) -> infer_config.Node:
    told = source_config.prior(contents.settings)
    if asked.heads is None and "heads" not in told:
        report.note(f"nothing says how many heads the transformer has: {HEADS} are assumed, heads= says otherwise")
    heads = asked.heads or told.get("heads", HEADS)
    return {
        **infer_config.prior_node(shapes(weights), heads),
        **{key: value for key, value in told.items() if key != "heads"},
        "unmasked_prefix": _unmasked(contents),
        "shared_vocabulary": True,
    }


def _unmasked(contents: Contents) -> int:
    """Read off the causal mask how many tokens of the condition see all of each other."""
    mask = contents.tensors.get(f"{PREFIX}blocks.0.attn.mask")
    first = 1 if mask is None else int(mask.reshape(mask.shape[-2:])[0].sum())
    return first if first > 1 else 0


def _start_token(contents: Contents, weights: Weights, node: infer_config.Node, prefix: Prefix) -> None:
    """Give a start token other than 0 an embedding of its own."""
    token = source_config.start_token(contents.settings)
    if token and prefix.vocab_size == 1:
        node["shared_vocabulary"] = False
        weights["prefix_embedding.weight"] = weights["token_embedding.weight"][token : token + 1].clone()


def _cut(positions: Tensor, rows: int, report: Report) -> Tensor:
    if positions.shape[1] > rows:
        report.note(
            f"{positions.shape[1] - rows} of {positions.shape[1]} positions are left: no token ever stands there"
        )
    return positions[:, :rows].clone()


def _check_positions(contents: Contents, found: int, wanted: int, tokenizer: Tokenizer) -> None:
    if found < wanted:
        height, width = tokenizer.image_size
        raise UserError(
            f"{contents.path}: its prior has {found} positions, and pictures of {height} x {width} px need {wanted}: "
            "give image_size= as it was trained"
        )


def _position(contents: Contents) -> Tensor:
    name = f"{PREFIX}pos_emb"
    if name not in contents.tensors:
        raise UserError(f"{contents.path}: '{name}' is missing")
    return contents.tensors[name]


def in_groups(prior: nn.Module, renamed: Mapping[str, str]) -> list[list[str]]:
    """Return the reference's names of a prior's parameters as its AdamW has them.

    First the weights of linear layers, which decay, and then all others; both sorted by name.

    Args:
        prior: Ours.
        renamed: From the reference's names to ours.
    """
    linear = {f"{name}.weight" for name, each in prior.named_modules() if isinstance(each, nn.Linear)}
    decayed = sorted(name for name, new in renamed.items() if new in linear)
    return [decayed, sorted(name for name in renamed if name not in decayed)]


def _state(contents: Contents, moved: Mapping[str, tuple[str, Rule]], blank: nn.Module, report: Report) -> State | None:
    renamed = {name: new for name, (new, _) in moved.items()}
    return read_state(contents, 0, in_groups(blank, renamed), renamed, blank, "prior", report)
