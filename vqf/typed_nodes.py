"""The annotations of a component's options, and the typed nodes of OmegaConf that hold their values."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from omegaconf import (
    MISSING,
    AnyNode,
    BooleanNode,
    DictConfig,
    FloatNode,
    IntegerNode,
    ListConfig,
    Node,
    PathNode,
    StringNode,
)

LEAVES: dict[type, Callable[..., Node]] = {
    bool: BooleanNode,
    int: IntegerNode,
    float: FloatNode,
    str: StringNode,
    Path: PathNode,
}


def typed_node(hint: Any, default: Any) -> Node | ListConfig | DictConfig:
    """Hold an option's default in a node that refuses values of other types.

    Raises:
        OmegaConfBaseException: If no config can hold such a default.
    """
    hint, optional = strip_none(hint)
    optional = optional or default is None
    if choices := choices_of(hint):
        hint = type(choices[0])
    origin = typing.get_origin(hint) or hint
    args = [each for each in typing.get_args(hint) if each is not Ellipsis]
    if hint in LEAVES:
        return LEAVES[hint](default, is_optional=optional)
    if inspect.isclass(origin) and issubclass(origin, Sequence) and origin is not str:
        element: Any = args[0] if len(set(args)) == 1 and args[0] in LEAVES else Any
        content = list(default) if isinstance(default, Sequence) and default != MISSING else default
        return ListConfig(content, element_type=element, ref_type=list[element], is_optional=optional)
    if inspect.isclass(origin) and issubclass(origin, Mapping) and default is not None:
        element = args[1] if len(args) == 2 and args[1] in LEAVES else Any
        return DictConfig(default, element_type=element, ref_type=dict[str, element], is_optional=optional)
    return AnyNode(default)  # a mapping that is null, too: OmegaConf 2.3 cannot merge another into a typed one


def strip_none(hint: Any) -> tuple[Any, bool]:
    """Return what an annotation allows besides None, and whether it allows None."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint, False
    rest = [each for each in typing.get_args(hint) if each is not type(None)]
    return rest[0] if len(rest) == 1 else Any, len(rest) < len(typing.get_args(hint))


def choices_of(hint: Any) -> tuple[Any, ...]:
    """Return the values that a Literal lists; none for any other annotation."""
    hint, _ = strip_none(hint)
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def hints_of(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of a component's parameters."""
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except NameError:  # an annotation imported for type checkers only; its option goes untyped
        return {}
