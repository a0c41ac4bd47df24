"""No line of vqf opens a file in a way that could run code in it; checked in the source, for new lines, too."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "vqf"

NEVER = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "dill.load"),
    *("joblib.load", "shelve.open", "marshal.load", "marshal.loads", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("torch.jit.load", "torch.hub.load", "shutil.unpack_archive", "hydra.utils.instantiate", "instantiate"),
}
METHODS = {"extractall"}  # of whatever object
WITH = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "Image.open": ("formats", None),
    "subprocess.run": ("shell", ...),
    "subprocess.Popen": ("shell", ...),
}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def faults(source: str) -> Iterator[str]:
    """Yield the unsafe calls of a source."""
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = dotted(call.func)
        if name in NEVER or (name.rpartition(".")[2] in METHODS and name.count(".")):
            yield f"{name} in line {call.lineno}"
        if name in WITH:
            keyword, wanted = WITH[name]
            found = [each.value for each in call.keywords if each.arg == keyword]
            if wanted is ... and found:
                yield f"{name}({keyword}=) in line {call.lineno}"
            value = found[0].value if found and isinstance(found[0], ast.Constant) else None
            if wanted is not ... and (not found or (wanted is not None and value is not wanted)):
                yield f"{name} without {keyword} in line {call.lineno}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_source_has_no_unsafe_calls(path: Path) -> None:
    assert list(faults(path.read_text())) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("torch.load(p)", 1),
        ("torch.load(p, weights_only=False)", 1),
        ("torch.load(p, weights_only=True)", 0),
        ("Image.open(p)", 1),
        ("Image.open(p, formats=FORMATS)", 0),
        ("np.load(p, allow_pickle=True)", 1),
        ("os.system('x'); pickle.loads(b)", 2),
        ("tar.extractall()", 1),
        ("subprocess.run('x', shell=True)", 1),
        ("model.eval(); re.compile('x')", 0),
    ],
)
def test_unsafe_calls_are_found(source: str, count: int) -> None:
    assert len(list(faults(source))) == count
