"""The generated page says what is registered."""

import importlib.util
import re
from pathlib import Path

from vqf.registry import KINDS, components

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_of_components_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec and spec.loader
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert (DOCS / "components.md").read_text() == generate.page(), "run python docs/generate.py"


def test_the_page_has_every_component_and_its_options() -> None:
    page = (DOCS / "components.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    for kind in KINDS:
        for component in components(kind):
            assert f"\n| `{component.name}` | " in sections[kind]
            (listed,) = re.findall(
                rf"^\*\*{component.name}\*\*(.*?)(?=^\*\*|\Z)", sections[kind], re.MULTILINE | re.DOTALL
            )
            assert all(f"`{name}`" in listed.split("\n")[0] for name in component.wired)
            if component.target.__module__.startswith("vqf."):
                assert re.findall(r"^\| `(\w+)` ", listed, re.MULTILINE) == list(component.options)
