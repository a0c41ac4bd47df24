"""Writes docs/components.md from the registry and the presets: `python docs/generate.py`. A test compares."""

import inspect
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import vqf  # noqa: F401  (registers the components)
from vqf.config.compose import config_dir
from vqf.registry import KINDS, Component, components

PAGE = Path(__file__).parent / "components.md"

LINK = r"https://\S*[\w/]"

HEAD = """# Components

Everything that a command can choose, written by `python docs/generate.py` from the registry. Choose with
`group=name`, set an option with `group.option=value` (dots instead of slashes), and add `--help` or `--cfg job` to
see the result. A preset is a component with numbers of its own. [examples/](../examples/README.md) adds yours.
"""


def page() -> str:
    """Return the page."""
    parts = [HEAD, *_whole("experiment", "a run with a name"), *_whole("model", "a choice of every part of a model")]
    return "\n".join([*parts, *(line for kind in KINDS for line in _kind(kind))]).rstrip() + "\n"


def _whole(group: str, what: str) -> Iterator[str]:
    """Yield the section of a group that has presets only."""
    yield f"## {group}\n\n`{group}=name`: {what}.\n\n| name | what it is | source |\n|---|---|---|"
    for name, comment in _presets(group):
        yield f"| `{name}` | {comment} | [yaml](../conf/{group}/{name}.yaml) |"
    yield ""


def _kind(kind: str) -> Iterator[str]:
    facts = KINDS[kind]
    yield f"## {kind}\n"
    choose = f"`{facts.group}=[a,b]`, several at once" if facts.multiple else f"`{facts.group}=name`"
    where = "; options are words of their own, `option=value`" if facts.flat else ""
    yield f"{choose}{where}.\n"
    yield "| name | what it is | source |\n|---|---|---|"
    for component in components(kind):
        yield f"| `{component.name}` | {_summary(component)} | {_source(component)} |"
    for name, comment in _presets(facts.group):
        yield f"| `{name}` (preset) | {comment} | [yaml](../conf/{facts.group}/{name}.yaml) |"
    yield ""
    for component in components(kind):
        yield from _options(component)


def _options(component: Component) -> Iterator[str]:
    wired = ", ".join(f"`{name}`" for name in component.wired)
    given = f", given {wired}" if wired else ""
    if not _ours(component):
        yield f"**{component.name}**{given}: the options of `{_path(component)}`.\n"
        return
    if not component.options:
        yield f"**{component.name}**{given}: no options.\n"
        return
    yield f"**{component.name}**{given}:\n\n| option | type | default | |\n|---|---|---|---|"
    words = _arguments(component)
    for name, parameter in component.options.items():
        hint = _plain(inspect.formatannotation(parameter.annotation))
        default = "required" if parameter.default is parameter.empty else f"`{_plain(repr(parameter.default))}`"
        yield f"| `{name}` | `{hint}` | {default} | {words.get(name, '')} |"
    yield ""


def _summary(component: Component) -> str:
    if not _ours(component):
        return f"`{_path(component)}`"
    return _cell(re.sub(rf",? *{LINK}", "", _docs(component)[0].split("\n\n")[0]))


def _source(component: Component) -> str:
    """Link what the class, or else its module, names first."""
    module = inspect.getdoc(sys.modules[component.target.__module__]) or ""
    links = re.findall(LINK, f"{_docs(component)[0]}\n{module}") if _ours(component) else []
    if not links:
        return ""
    site, _, paper = links[0].removeprefix("https://").partition("/abs/")
    return f"[{f'arXiv:{paper}' if paper else site.split('/')[0]}]({links[0]})"


def _arguments(component: Component) -> dict[str, str]:
    """Read the `Args:` of a docstring, and of those of the classes that it builds on."""
    words: dict[str, str] = {}
    for text in reversed(_docs(component)):
        _, _, listed = text.partition("Args:\n")
        found = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", listed.split("\n\n")[0], re.MULTILINE)
        words |= {name: _cell(each) for name, each in found}
    return words


def _docs(component: Component) -> list[str]:
    """Return the docstring of a component, then those of its bases."""
    bases = inspect.getmro(component.target) if inspect.isclass(component.target) else (component.target,)
    texts = [inspect.cleandoc(each.__doc__ or "") for each in bases if each.__module__.startswith("vqf.")]
    return texts or [""]


def _presets(group: str) -> Iterator[tuple[str, str]]:
    """Yield name and leading comment of the YAML files of a group."""
    for file in sorted((config_dir() / group).glob("*.yaml")):
        leading = itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
        comment = [line[1:].strip() for line in leading]
        yield file.stem, _cell(" ".join(line for line in comment if not line.startswith("@")))


def _ours(component: Component) -> bool:
    return component.target.__module__.split(".")[0] == "vqf"


def _path(component: Component) -> str:
    return f"{component.target.__module__.rpartition('.')[0]}.{component.target.__name__}"


def _plain(code: str) -> str:
    """Drop module names, and what would end a cell of a table."""
    return re.sub(r"\b(?:\w+\.)+(?=[A-Z])", "", code).replace("|", "\\|")


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
