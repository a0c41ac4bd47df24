"""Writes docs/components.md from the registry and the presets: `python docs/generate.py`. A test compares."""

import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import vqf  # noqa: F401  (registers the components)
from vqf.config.compose import config_dir
from vqf.options.ranges import describe
from vqf.options.typed_nodes import to_cli
from vqf.registry import KINDS, Component, components

PAGE = Path(__file__).parent / "components.md"

TABLE = "| option | type | default | |\n|---|---|---|---|"
LINK = r"https://\S*[\w/]"

HEAD = """# Components

All components and presets, written by `python docs/generate.py` from the registry. Choose a component with
`group=name`, set an option with `group.option=value` (dots instead of slashes), and add `--help` or `--cfg job` to
see the result. A preset is a component with its own option values. "given" lists the arguments that vqf passes.
[extending.md](extending.md) shows how to add your own.
"""


def page() -> str:
    """The text of docs/components.md."""
    contents = " · ".join(f"[{name}](#{name})" for name in ("experiment", "model", *KINDS))
    groups = [*_preset_group("experiment", "a named run"), *_preset_group("model", "all components of a model")]
    kinds = [line for kind in KINDS for line in _kind(kind)]
    return "\n".join([HEAD, textwrap.fill(contents, 120) + "\n", *groups, *kinds]).rstrip() + "\n"


def _preset_group(group: str, description: str) -> Iterator[str]:
    """Yield the section of a config group that has presets only."""
    yield f"## {group}\n\n`{group}=name`: {description}.\n\n| name | what it is | source |\n|---|---|---|"
    for name, comment in _presets(group):
        yield f"| `{name}` | {comment} | [yaml](../conf/{group}/{name}.yaml) |"
    yield ""


def _kind(kind: str) -> Iterator[str]:
    facts = KINDS[kind]
    yield f"## {kind}\n"
    choose = f"`{facts.group}=[a,b]`, several at once" if facts.multiple else f"`{facts.group}=name`"
    flat = "; options stand at the top level, `option=value`" if facts.flat else ""
    yield f"{choose}{flat}.\n"
    yield "| name | what it is | source |\n|---|---|---|"
    for component in components(kind):
        yield f"| `{component.name}` | {_summary(component)} | {_source(component)} |"
    for name, comment in _presets(facts.group):
        yield f"| `{name}` (preset) | {comment} | [yaml](../conf/{facts.group}/{name}.yaml) |"
    yield ""
    yield from _option_tables(components(kind))


def _option_tables(group: list[Component]) -> Iterator[str]:
    """Yield the options of the components of a kind; a row that several of them share is written once."""
    rows = {component.name: _rows(component) for component in group if _ours(component)}
    bases = _bases([component for component in group if _ours(component)], rows)
    shared = _shared_rows([component for component in group if component.name in rows and not bases[component.name]])
    for names, options in shared.items():
        yield f"**shared by {', '.join(f'`{name}`' for name in names)}**:\n\n{TABLE}"
        yield from (rows[names[0]][option] for option in options)
        yield ""
    for component in group:
        wired = ", ".join(f"`{name}`" for name in component.wired)
        head = f"**{component.name}**" + (f", given {wired}" if wired else "")
        if not _ours(component):
            yield f"{head}: the options of `{_path(component)}`.\n"
            continue
        base, own = bases[component.name], rows[component.name]
        common = next((options for names, options in shared.items() if component.name in names), [])
        inherited = [f"the options of `{base}`"] if base else ["the shared options"] if common else []
        own = {option: row for option, row in own.items() if option not in common and row not in _values(rows, base)}
        if not own:
            yield f"{head}: {(inherited or ['no options'])[0]}.\n"
            continue
        yield f"{head}: {inherited[0]}, and" if inherited else f"{head}:"
        yield f"\n{TABLE}"
        yield from own.values()
        yield ""


def _rows(component: Component) -> dict[str, str]:
    """The table row of each option."""
    texts, rows = _arguments(component), {}
    for name, parameter in component.options.items():
        hint = describe(component.hints[name])
        default = "required" if parameter.default is parameter.empty else f"`{to_cli(parameter.default) or ' '}`"
        rows[name] = f"| `{name}` | {hint} | {default} | {texts.get(name, '')} |"
    return rows


def _bases(group: list[Component], rows: dict[str, dict[str, str]]) -> dict[str, str | None]:
    """For each component, the name of the one whose table it extends, if any.

    A base has a subset of the options, and at least half of its rows in the same words unless it is a base class.
    Of several, the one with the most rows in the same words wins. A base has no base itself.
    """
    bases: dict[str, str | None] = {}
    roots: list[Component] = []
    for component in sorted(group, key=lambda each: (len(_classes(each)), len(each.options), each.name)):
        own = rows[component.name].items()
        equal = {base.name: len(own & rows[base.name].items()) for base in roots}
        candidates = [
            base.name
            for base in roots
            if rows[base.name].keys() <= rows[component.name].keys()
            and equal[base.name] >= (2 if base.target in _classes(component) else max(2, len(rows[base.name]) / 2))
        ]
        bases[component.name] = max(candidates, key=equal.__getitem__, default=None)
        if not candidates:
            roots.append(component)
    return bases


def _shared_rows(group: list[Component]) -> dict[tuple[str, ...], list[str]]:
    """Options that several components inherit from a class that is no component: component names -> option names."""
    users: dict[type, list[Component]] = {}
    for component in group:
        for option in component.options:
            owner = _owner(component, option)
            if owner not in (None, component.target) and component not in users.setdefault(owner, []):
                users[owner].append(component)
    shared = {tuple(each.name for each in found): (owner, found[0]) for owner, found in users.items() if found[1:]}
    return {
        names: [option for option in first.options if _owner(first, option) is owner]
        for names, (owner, first) in shared.items()
    }


def _owner(component: Component, option: str) -> type | None:
    """The class whose constructor declares an option."""
    for owner in _classes(component):
        if "__init__" in vars(owner) and option in inspect.signature(owner.__init__).parameters:
            return owner
    return None


def _classes(component: Component) -> list[type]:
    """A component's class and its base classes in vqf; none for a function."""
    target = component.target
    return (
        [each for each in inspect.getmro(target) if each.__module__.startswith("vqf.")]
        if inspect.isclass(target)
        else []
    )


def _values(rows: dict[str, dict[str, str]], name: str | None) -> set[str]:
    return set(rows[name].values()) if name else set()


def _summary(component: Component) -> str:
    if not _ours(component):
        return f"`{_path(component)}`"
    return _cell(re.sub(rf",? *{LINK}", "", _docs(component)[0].split("\n\n")[0]))


def _source(component: Component) -> str:
    """Link to the first address in the docstring of the class, or else of its module."""
    module = inspect.getdoc(sys.modules[component.target.__module__]) or ""
    links = re.findall(LINK, f"{_docs(component)[0]}\n{module}") if _ours(component) else []
    if not links:
        return ""
    site, _, paper = links[0].removeprefix("https://").partition("/abs/")
    return f"[{f'arXiv:{paper}' if paper else site.split('/')[0]}]({links[0]})"


def _arguments(component: Component) -> dict[str, str]:
    """The texts of the `Args:` of a component's docstring, and of those of its base classes."""
    texts: dict[str, str] = {}
    for docstring in reversed(_docs(component)):
        _, _, listed = docstring.partition("Args:\n")
        entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", listed.split("\n\n")[0], re.MULTILINE)
        texts |= {name: _cell(text) for name, text in entries}
    return texts


def _docs(component: Component) -> list[str]:
    """The docstring of a component, then those of its base classes."""
    texts = [inspect.cleandoc(each.__doc__ or "") for each in _classes(component) or [component.target]]
    return texts or [""]


def _presets(group: str) -> Iterator[tuple[str, str]]:
    """Yield name and leading comment of each YAML file of a group."""
    for file in sorted((config_dir() / group).glob("*.yaml")):
        leading = itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
        comment = [line[1:].strip() for line in leading]
        yield file.stem, _cell(" ".join(line for line in comment if not line.startswith("@")))


def _ours(component: Component) -> bool:
    return component.target.__module__.split(".")[0] == "vqf"


def _path(component: Component) -> str:
    return f"{component.target.__module__.rpartition('.')[0]}.{component.target.__name__}"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
