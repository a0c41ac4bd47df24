"""The generated page lists every registered component with all its options, and each option has a text."""

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.composing import compose
from vqf.config.settings import check_config, fill_missing_groups
from vqf.registry import KINDS, Component, components

DOCS = Path(__file__).parents[2] / "docs"
NOT_HERE = ("components.md", "fidelity.md", "extending.md")  # the last: test_extending.py, with its plugins
PAGES = [page for page in sorted(DOCS.glob("*.md")) if page.name not in NOT_HERE]
UNKNOWN = {"data=...", "experiment=imported"}  # stand-ins, and what only an import's own --config-dir has


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec and spec.loader
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    vars(generate)["components"] = documented
    return generate


def documented(kind: str) -> list[Component]:
    """The components of a kind without those that tests register."""
    return [each for each in components(kind) if not each.target.__module__.startswith("tests.")]


def test_the_page_of_components_is_up_to_date() -> None:
    generate = load_generator()
    assert (DOCS / "components.md").read_text() == generate.page(), "run python docs/generate.py"


def test_the_page_has_every_component_and_its_options() -> None:
    page = (DOCS / "components.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    for kind in KINDS:
        for component in documented(kind):
            assert f"\n| `{component.name}` | " in sections[kind]
            head, options = table(sections[kind], component.name)
            assert all(f"`{name}`" in head for name in component.wired)
            if component.target.__module__.startswith("vqf."):
                assert options == component.options.keys()


def table(section: str, name: str) -> tuple[str, set[str]]:
    """Head and options of a component; those of the component or the shared table that it refers to are included."""
    (text,) = re.findall(rf"^\*\*{name}\*\*(.*?)(?=^\*\*|\Z)", section, re.MULTILINE | re.DOTALL)
    head, options = text.split("\n")[0], re.findall(r"^\| `(\w+)` ", text, re.MULTILINE)
    assert len(options) == len(set(options))
    if base := re.search(r": the options of `(\w+)`", head):
        options += table(section, base.group(1))[1]
    if "the shared options" in head:
        shared = re.findall(rf"^\*\*shared by [^*]*`{name}`.*?(?=^\*\*)", section, re.MULTILINE | re.DOTALL)
        options += re.findall(r"^\| `(\w+)` ", shared[0], re.MULTILINE)
    return head, set(options)


def test_options_stand_once_where_a_component_extends_another() -> None:
    page = (DOCS / "components.md").read_text()
    for name in (
        "start",
        "ramp_steps",
        "refresh_fakes",
        "sha256",
    ):  # hinge and vanilla; fid, and is, kid, prdc together
        assert len(re.findall(rf"^\| `{name}` ", page, re.MULTILINE)) == (2 if name == "sha256" else 1)


def test_every_option_has_a_text() -> None:
    generate = load_generator()
    missing = [
        f"{component}: {option}"
        for kind in KINDS
        for component in components(kind)
        if component.target.__module__.startswith("vqf.")
        for option in component.options
        if not generate._arguments(component).get(option)
    ]
    assert not missing, "describe these under `Args:`"


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `python -m vqf.run` in the code blocks of a page."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```(?:bash)?\n(.*?)^```|((?:^    .*\n)+)", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip() for fenced, indented in blocks for line in (fenced or indented).splitlines()]
    starts = r"(?:OMP_NUM_THREADS=1 )?(?:python|torchrun --nproc-per-node \d+) -m vqf\.run "
    return [shlex.split(found[1], comments=True) for line in lines if (found := re.fullmatch(f"{starts}(.*)", line))]


def first_of_a_sweep(word: str) -> str:
    return re.sub(r"=(\[[^]]*\]|[^,\[\]{}]+),.*", r"=\1", word)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_compose(page: Path) -> None:
    for words in commands(page):
        known = [word for word in words if ("=" in word and word not in UNKNOWN) or word.startswith("~")]
        overrides = [re.sub(r"^(run|resume)=(?!true).*", r"\1=.", first_of_a_sweep(word)) for word in known]
        check_config(fill_missing_groups(compose(*overrides)))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_files_and_headings() -> None:
    root, broken = DOCS.parent, []
    for page in (*root.glob("*.md"), *DOCS.glob("*.md"), root / "examples" / "README.md"):
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{page.relative_to(root)}: {link}")
    assert not broken


def test_there_are_commands() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 30
