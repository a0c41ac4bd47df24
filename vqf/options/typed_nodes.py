"""The annotations of options, and OmegaConf nodes for their values."""

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
from omegaconf.errors import ValidationError


class StrictBooleanNode(BooleanNode):
    """Takes no number but 0 and 1 for a bool."""

    def _validate_and_convert_impl(self, value: Any) -> bool:
        if isinstance(value, int) and value not in (0, 1):
            raise ValidationError("Value '$VALUE' is not a valid bool (type $VALUE_TYPE)")
        return super()._validate_and_convert_impl(value)

    def __deepcopy__(self, memo: dict[int, Any]) -> "StrictBooleanNode":
        copy = StrictBooleanNode()
        self._deepcopy_impl(copy, memo)
        return copy


NODE_TYPES: dict[type, Callable[..., Node]] = {
    bool: StrictBooleanNode,
    int: IntegerNode,
    float: FloatNode,
    str: StringNode,
    Path: PathNode,
}


def typed_node(hint: Any, default: Any) -> Node | ListConfig | DictConfig:
    """Hold a default in a node that refuses other types.

    Raises:
        OmegaConfBaseException: If no config can hold it.
    """
    hint, optional = strip_none(hint)
    optional = optional or default is None
    if choices := literal_choices(hint):
        hint = type(choices[0])
    origin = typing.get_origin(hint) or hint
    args = [each for each in typing.get_args(hint) if each is not Ellipsis]
    if hint in NODE_TYPES:
        return NODE_TYPES[hint](default, is_optional=optional)
    if inspect.isclass(origin) and issubclass(origin, Sequence) and origin is not str:
        element: Any = args[0] if len(set(args)) == 1 and args[0] in NODE_TYPES else Any
        content = list(default) if isinstance(default, Sequence) and default != MISSING else default
        return ListConfig(content, element_type=element, ref_type=list[element], is_optional=optional)
    if inspect.isclass(origin) and issubclass(origin, Mapping) and default is not None:
        element = args[1] if len(args) == 2 and args[1] in NODE_TYPES else Any
        return DictConfig(default, element_type=element, ref_type=dict[str, element], is_optional=optional)
    return AnyNode(default)  # a mapping that is null, too: OmegaConf 2.3 cannot merge another into a typed one


def strip_none(hint: Any) -> tuple[Any, bool]:
    """Remove None from an annotation, and tell whether it was there."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint, False
    rest = [each for each in typing.get_args(hint) if each is not type(None)]
    return rest[0] if len(rest) == 1 else Any, len(rest) < len(typing.get_args(hint))


def literal_choices(hint: Any) -> tuple[Any, ...]:
    """The values of a Literal; else empty."""
    hint, _ = strip_none(hint)
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def parameters_of(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a component, and those that its `**options` passes to its base class.

    `*args`, and `**options` that no base class takes, stay.
    """
    _, *bases = _constructors(target)
    parameters = dict(inspect.signature(target).parameters)
    for base in bases:
        parameters = {key: each for key, each in parameters.items() if each.kind is not each.VAR_KEYWORD}
        _, *inherited = inspect.signature(base).parameters.values()  # without self
        parameters |= {each.name: each for each in inherited if each.name not in parameters}
    return parameters


def type_hints_of(target: Callable[..., Any], ranges: bool = False) -> dict[str, Any]:
    """The annotations of `parameters_of(target)`, with or without `Annotated`."""
    hints: dict[str, Any] = {}
    for constructor in _constructors(target):
        try:
            hints = typing.get_type_hints(constructor, include_extras=ranges) | hints
        except NameError:  # an annotation imported for type checkers only; its option goes untyped
            continue
    return hints


def to_cli(value: Any) -> str:
    """Write a value as on the command line: null, true, [1,2], {a:1}."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{to_cli(each)}' for key, each in value.items())}}}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(map(to_cli, value))}]"
    return str(value)


def _constructors(target: Callable[..., Any]) -> list[Callable[..., Any]]:
    if not inspect.isclass(target):
        return [target]
    constructors: list[Callable[..., Any]] = []
    for owner in target.__mro__[:-1]:  # without object, which takes nothing
        if constructor := vars(owner).get("__init__"):
            constructors.append(constructor)
            if not any(each.kind is each.VAR_KEYWORD for each in inspect.signature(constructor).parameters.values()):
                break
    return constructors or [target.__init__]
