"""Registers components, offers their options to Hydra, checks config nodes and builds them.

A component is any callable. Of its parameters,

* a positional one without a default is *wired*: the pipeline passes it to `build`;
* every other is an *option* of the config, `???` if it has no default;
* `**options` stands for those of the base class.

So `@register("quantizer", "fsq")` on a class with `levels=(8, 5, 5, 5)` is all that
`model/quantizer=fsq "model.quantizer.levels=[8,8,8]"` needs.
"""

import inspect
import re
import shlex
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce, wraps
from typing import Any, TypeVar

from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vqf.errors import UserError, closest_match, unknown_message
from vqf.options.ranges import convert, mismatch
from vqf.options.typed_nodes import literal_choices, parameters_of, to_cli, type_hints_of, typed_node

T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True)
class Kind:
    """Where the config holds the components of one kind.

    Args:
        group: "model/quantizer" for the node `model.quantizer`.
        multiple: Several at once: `metric=[psnr,ssim]` gives `metric.psnr` and `metric.ssim`.
        flat: Options are top-level keys, as in `pipeline=sample count=16`.
    """

    group: str
    multiple: bool = False
    flat: bool = False

    @property
    def key(self) -> str:
        return self.group.replace("/", ".")


KINDS = {
    "encoder": Kind("model/encoder"),
    "decoder": Kind("model/decoder"),
    "quantizer": Kind("model/quantizer"),
    "loss": Kind("model/loss", multiple=True),
    "discriminator": Kind("model/discriminator"),
    "adversary": Kind("model/adversary"),
    "regularizer": Kind("model/regularizer", multiple=True),
    "conditioner": Kind("model/conditioner", multiple=True),
    "prior": Kind("model/prior"),
    "sampler": Kind("sampler"),
    "scorer": Kind("scorer"),
    "data": Kind("data"),
    "metric": Kind("metric", multiple=True),
    "protocol": Kind("protocol"),
    "logger": Kind("logger", multiple=True),
    "optimizer": Kind("optimizer"),
    "schedule": Kind("schedule"),
    "pipeline": Kind("pipeline", flat=True),
}


class RegistryError(UserError):
    """A component is registered, named or configured wrongly."""


@dataclass(frozen=True)
class Component:
    """A registered callable.

    Args:
        options: Parameters by name, annotated with types.
        hints: Their annotations with ranges.
    """

    kind: str
    name: str
    target: Callable[..., Any]
    wired: tuple[str, ...]
    options: dict[str, inspect.Parameter]
    hints: dict[str, Any]

    def __str__(self) -> str:
        qualname = getattr(self.target, "__qualname__", type(self.target).__qualname__)
        return f"{self.kind} '{self.name}' ({self.target.__module__}.{qualname})"

    @property
    def signature(self) -> str:
        line = ", ".join(str(parameter) for parameter in self.options.values()) or "none"
        return re.sub(r"\b(?:\w+\.)+(?=[A-Z])", "", line)  # Sequence, not collections.abc.Sequence


_components: dict[str, dict[str, Component]] = {kind: {} for kind in KINDS}


def register(kind: str, name: str, *, defaults: Sequence[Any] = ()) -> Callable[[T], T]:
    """Decorator: register a class or function under a name in lower_snake_case.

    Args:
        kind: One of `KINDS`.
        defaults: Hydra defaults list that comes with it.

    Raises:
        RegistryError: For an unknown kind, an unusable name or signature, or a taken name.
    """
    if kind not in KINDS:
        raise RegistryError(unknown_message("component kind", kind, KINDS))
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise RegistryError(f"{kind} name '{name}' is not lower_snake_case")

    def decorator(target: T) -> T:
        component = _parse_signature(kind, name, target)
        taken = _components[kind].get(name)
        if taken and str(taken) != str(component):  # a notebook that reloads a module registers the same class again
            raise RegistryError(f"{component} clashes with {taken}; pick another name")
        _components[kind][name] = component
        _store_in_hydra(component, defaults)
        return typing.cast(T, _check_calls(component))

    return decorator


def component_names(kind: str) -> list[str]:
    """Sorted names of a kind."""
    return sorted(_components[kind])


def components(kind: str) -> list[Component]:
    """Components of a kind by name."""
    return [_components[kind][name] for name in component_names(kind)]


def check_options(kind: str, config: Mapping[str, Any] | DictConfig, where: str | None = None) -> dict[str, Any]:
    """Check and return the options of a config node, tuples where the default is one.

    Raises:
        RegistryError: Naming the key (`where`) and the closest match.
    """
    config = _as_node(kind, config, where)
    where = where or config._get_full_key(None) or kind
    component = find_component(kind, config.get("name"), where)
    for key in config:
        _check_key(component, str(key), where)
    for key, parameter in component.options.items():
        absent = key not in config and parameter.default is parameter.empty
        if absent or OmegaConf.is_missing(config, key):
            option_key = _option_key(component, key, where)
            raise RegistryError(f"{option_key}: {component} needs a value; give {option_key}=...")
    try:
        options = typing.cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        raise RegistryError(f"{where}: {str(error).splitlines()[0]}") from error
    del options["name"]
    return {
        key: _check_value(component, key, value, _option_key(component, key, where)) for key, value in options.items()
    }


def find_component(kind: str, name: Any, where: str | None = None) -> Component:
    """The component of a name.

    Raises:
        RegistryError: If there is none.
    """
    if name not in _components[kind]:
        raise RegistryError(f"{where or kind}: {unknown_message(kind, name, component_names(kind))}")
    return _components[kind][name]


def build(kind: str, config: Mapping[str, Any] | DictConfig, /, **wired: Any) -> Any:
    """Build the component of a config node, with the `wired` values in its signature.

    Raises:
        RegistryError: If the node is wrong, the component raises a `ValueError`, or memory does not suffice.
    """
    options = check_options(kind, config)
    component = find_component(kind, config["name"])
    if absent := [key for key in component.wired if key not in wired]:
        offered = ", ".join(wired) or "nothing"
        raise RegistryError(f"{component}: parameter '{absent[0]}' has no default; a {kind} is built with {offered}")
    try:
        return component.target(**{key: wired[key] for key in component.wired}, **options)
    except UserError:
        raise
    except ValueError as error:
        raise RegistryError(f"{kind} '{component.name}': {error}") from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):  # torch has no class for it
            raise
        raise RegistryError(_oom_message(kind, component, options)) from error


def call_static(kind: str, config: Mapping[str, Any] | DictConfig, method: str, where: str | None = None) -> Any:
    """Call a static method of a component's class; None if there is none.

    Raises:
        RegistryError: If the node is wrong.
    """
    function = getattr(find_component(kind, config.get("name"), where).target, method, None)
    if function is None:
        return None
    options = check_options(kind, config, where)
    return function(**{key: options[key] for key in inspect.signature(function).parameters if key in options})


def _oom_message(kind: str, component: Component, options: Mapping[str, Any]) -> str:
    sizes = {key: value for key, value in options.items() if isinstance(value, int) and not isinstance(value, bool)}
    largest = max(sizes, key=sizes.__getitem__, default=None)
    cure = "" if largest is None else f"; lower {_option_key(component, largest, KINDS[kind].key)}={sizes[largest]}"
    return f"{component} does not fit into memory{cure}"


def flat_component(kind: str, config: DictConfig) -> DictConfig:
    """Collect the node of a flat kind."""
    name = config[kind]["name"]
    component = find_component(kind, name, kind)
    options = {key: config[key] for key in component.options if key in config and not OmegaConf.is_missing(config, key)}
    return OmegaConf.create({"name": name, **options})


def chosen_components(config: DictConfig) -> Iterator[tuple[str, DictConfig, str]]:
    """Yield (kind, node, dotted key) of every chosen component."""
    for name, kind in KINDS.items():
        node = OmegaConf.select(config, kind.key)
        if node is None:
            continue
        if kind.flat:
            yield name, flat_component(name, config), kind.key
        elif kind.multiple and isinstance(node, DictConfig):
            yield from ((name, child, f"{kind.key}.{key!s}") for key, child in node.items() if child is not None)
        else:
            yield name, node, kind.key


def config_errors(config: DictConfig, prefix: str = "") -> list[str]:
    """Check every chosen component without building it; one line for each mistake.

    `prefix` is the dotted key of the section `config`, ending in a dot.
    """
    errors = []
    for kind, node, key in chosen_components(config):
        try:
            check_options(kind, node, prefix + key)
        except RegistryError as error:
            errors.append(str(error))
    return errors


def _as_node(kind: str, config: Any, where: str | None) -> DictConfig:
    group = KINDS[kind].group
    if config is None or (isinstance(config, Mapping) and config.get("name") is None):
        known = ", ".join(component_names(kind))
        raise RegistryError(f"{where or kind}: no {kind} is chosen; choose one with {group}=NAME. Known: {known}.")
    if not isinstance(config, Mapping):
        raise RegistryError(f"{where or kind}={config}: a {kind} is chosen with {group}={config}")
    return config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))


def _parse_signature(kind: str, name: str, target: Callable[..., Any]) -> Component:
    wired, options, types = [], {}, type_hints_of(target)
    for parameter in parameters_of(target).values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise RegistryError(f"{kind} '{name}': *{parameter.name} is not possible; name every parameter")
        if parameter.name in ("name", "defaults"):
            raise RegistryError(f"{kind} '{name}': '{parameter.name}' is reserved; rename the parameter")
        if parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY:
            wired.append(parameter.name)
        else:
            options[parameter.name] = parameter.replace(annotation=types.get(parameter.name, parameter.annotation))
    ranges = type_hints_of(target, ranges=True)
    return Component(kind, name, target, tuple(wired), options, {key: ranges.get(key, Any) for key in options})


def _store_in_hydra(component: Component, defaults: Sequence[Any]) -> None:
    kind = KINDS[component.kind]
    content = _typed_options(component)
    package = f"{kind.key}.{component.name}" if kind.multiple else None
    if kind.flat:
        content = {kind.key: {"name": component.name}, **content}
        package = "_global_"
    else:
        content = {"name": component.name, **content}
    if defaults:
        content = {"defaults": [*defaults, "_self_"], **content}
    # Not struct, so that an unknown key reaches `check_options`, which can name the component.
    node = DictConfig(content, flags={"struct": False})
    provider = component.target.__module__
    store = ConfigStore.instance()
    store.store(group=kind.group, name=component.name, node=node, package=package, provider=provider)
    folder = reduce(lambda parent, name: parent[name], kind.group.split("/"), store.repo)
    folder[f"{component.name}.yaml"] = _SharedNode(**vars(folder[f"{component.name}.yaml"]))


class _SharedNode(ConfigNode):
    """A node that deep copies share: Hydra copies the content before it composes."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_SharedNode":
        return self


def _typed_options(component: Component) -> dict[str, Any]:
    """Not a generated dataclass, which worker processes could not unpickle."""
    content: dict[str, Any] = {}
    for key, parameter in component.options.items():
        default = MISSING if parameter.default is parameter.empty else parameter.default
        try:
            content[key] = typed_node(parameter.annotation, default)
        except OmegaConfBaseException as error:
            raise RegistryError(f"{component}: '{key}' cannot be written in a config: {error}") from error
    return content


def _check_key(component: Component, key: str, where: str) -> None:
    if key in component.wired:
        raise RegistryError(f"{where}.{key}: the pipeline sets '{key}' of {component}")
    if key != "name" and key not in component.options:
        owners = [each.name for each in components(component.kind) if key in each.options]
        close = closest_match(key, component.options)
        hint = f"{KINDS[component.kind].group}={' or '.join(owners)} has it." if owners else ""
        hint = hint or (f"Did you mean '{close}'?" if close else "")
        takes = f"{component} takes: {component.signature}"
        raise RegistryError(" ".join(filter(None, [f"{where}.{key}: unknown option '{key}'.", hint, takes])))


def _check_value(component: Component, key: str, value: Any, full_key: str) -> Any:
    hint = component.hints[key]
    choices = literal_choices(hint)
    if choices and value is not None and value not in choices:
        raise RegistryError(f"{full_key}: {unknown_message('value', value, choices)}")
    if message := mismatch(hint, value):
        raise RegistryError(f"{full_key}={to_cli(value)}: {message}{_cure(component.options[key], full_key, message)}")
    is_tuple = isinstance(value, list) and isinstance(component.options[key].default, tuple)
    return convert(hint, tuple(value) if is_tuple else value)


def _cure(option: inspect.Parameter, full_key: str, message: str) -> str:
    if "a mapping" in message:
        return f"; write it as '{full_key}={{a:1,b:2}}'"
    default = f"{full_key}={to_cli(option.default)}"
    return "" if option.default is option.empty else f"; the default is {shlex.quote(default)}"


def _check_calls(component: Component) -> Callable[..., Any]:
    """Let calls of a component check its options as `build` does, if its signature states ranges."""
    target, types = component.target, {key: each.annotation for key, each in component.options.items()}
    if types == {key: component.hints[key] for key in types}:
        return target
    if not inspect.isclass(target):
        return _with_checks(target, component)
    owner: Any = next(each for each in target.__mro__ if "__init__" in vars(each))
    if not hasattr(owner.__init__, "__wrapped__"):
        owner.__init__ = _with_checks(owner.__init__, component)
    return target


def _with_checks(function: Callable[..., Any], component: Component) -> Callable[..., Any]:
    @wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        for key in options.keys() & component.options.keys():
            options[key] = _check_value(component, key, options[key], _option_key(component, key, component.kind))
        return function(*args, **options)

    return checked


def _option_key(component: Component, key: str, where: str) -> str:
    return key if KINDS[component.kind].flat else f"{where}.{key}"
