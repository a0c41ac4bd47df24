r"""Names that are anybody's reach terminal, log, tables and pages only in printable form.

The attack: a name with an escape sequence, or with a line end and a line that looks like vqf's own. The forms that are
looked for in what is shown: "\x1b[2J", "\nERROR all is lost", and a right-to-left override.
"""

import ast
import json
import logging
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vqf
from tests.loggers import made_up
from tests.security.conftest import MakeRun
from tests.test_run import Run, run  # noqa: F401  (a fixture)
from vqf import terminal
from vqf.data.files import image_list
from vqf.errors import UserError, printable, quote_name
from vqf.interop.import_report import ImportReport
from vqf.loggers.report.page import write_report
from vqf.pipelines.comparison.ranking import rank
from vqf.pipelines.comparison.reconstructions import ReconstructionPanels
from vqf.pipelines.comparison.report import ComparisonReport
from vqf.pipelines.comparison.runs import Run as ComparedRun
from vqf.runs.load import load

PACKAGE = Path(vqf.__file__).parent
HOSTILE = "ant\x1b[2J\r\nERROR all is lost\u202egnp"
SHOWN = "ant\\x1b[2J\\r\\nERROR all is lost\\u202egnp"
BIDIRECTIONAL = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def acts(character: str) -> bool:
    """Tell, from the Unicode database, whether a character does something instead of showing."""
    classes = {"Cc", "Cs", "Zl", "Zp"}
    return unicodedata.category(character) in classes or unicodedata.bidirectional(character) in BIDIRECTIONAL


def check_shown(text: str) -> None:
    assert SHOWN in text
    assert not any(acts(character) for character in text.replace("\n", ""))
    assert not any(line.lstrip("| ").startswith("ERROR") for line in text.splitlines())


@given(st.text(st.characters(exclude_categories=[]) | st.sampled_from("\x1b\n\r\x07\x9b\x7f\u2028\u202e\u2066\udce9")))
def test_printable_text_holds_no_character_that_acts(text: str) -> None:
    shown = printable(text)
    assert not any(acts(character) for character in shown)
    assert printable(shown) == shown
    if not any(acts(character) for character in text):
        assert shown == text
    if "\\" not in text:
        assert shown.encode("ascii", "backslashreplace").decode("unicode_escape") == text


def test_kept_characters_stay() -> None:
    assert printable("a\tb\n\x1b", keep="\n\t") == "a\tb\n\\x1b"
    assert quote_name(HOSTILE) == f"'{SHOWN}'"
    assert printable("naïve 図 👩‍👧 שלום نمی‌خواهم") == "naïve 図 👩‍👧 שלום نمی‌خواهم"


def test_an_error_has_a_line_for_each_mistake() -> None:
    assert str(UserError(f"no class '{HOSTILE}'", "steps=-1: too few")).splitlines() == [
        f"no class '{SHOWN}'",
        "steps=-1: too few",
    ]
    assert str(UserError(f"again: {UserError(HOSTILE)}")) == f"again: {SHOWN}"


@pytest.fixture
def log_file(tmp_path: Path) -> terminal.LogFile:
    handler = terminal.LogFile(tmp_path / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    return handler


@pytest.mark.parametrize("template", [True, False])
def test_a_log_record_is_one_line(
    template: bool, log_file: terminal.LogFile, capsys: pytest.CaptureFixture[str]
) -> None:
    for handler in (handlers := [terminal.TerminalHandler(), log_file]):
        terminal.log.addHandler(handler)
    try:
        if template:
            terminal.log.warning("no class '%s'", HOSTILE)
        else:
            terminal.log.warning(f"no class '{HOSTILE}'")
    finally:
        for handler in handlers:
            terminal.log.removeHandler(handler)
    log_file.close()
    assert capsys.readouterr().out == f"no class '{SHOWN}'\n"
    assert Path(log_file.baseFilename).read_text() == f"WARNING no class '{SHOWN}'\n"


def test_a_traceback_keeps_its_lines_only(log_file: terminal.LogFile) -> None:
    try:
        raise RuntimeError("\x1b[2J")
    except RuntimeError as error:
        info = (RuntimeError, error, error.__traceback__)
        record = logging.LogRecord("elsewhere", logging.ERROR, "", 0, "a bug", (), info)
    log_file.emit(record)
    log_file.close()
    first, *_, last = Path(log_file.baseFilename).read_text().splitlines()
    assert (first, last) == ("ERROR a bug", "RuntimeError: \\x1b[2J")


def test_a_table_shows_names(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_table(HOSTILE, [HOSTILE], [[HOSTILE]])
    shown = capsys.readouterr().out
    assert shown.count(SHOWN) == 3
    check_shown(shown)


def test_a_progress_bar_shows_names(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "LOG_INTERVAL_SECONDS", -1.0)
    with caplog.at_level(logging.INFO, logger="vqf"):
        terminal.ProgressBar("training", 2, 0, None).advance(1, HOSTILE)
    check_shown(caplog.messages[0])


def test_choices_of_foreign_config_files(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    group = tmp_path / "theirs" / "experiment"
    group.mkdir(parents=True)
    (group / f"{HOSTILE}.yaml").write_text("# @package _global_\n")
    for argument in ("--help", "experiment=and"):
        with pytest.raises(SystemExit):
            run(f"--config-dir={group.parent}", argument)
        shown = capsys.readouterr()
        check_shown(shown.err)
        assert shown.out == ""


def test_the_composed_config_of_foreign_files(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    group = tmp_path / "theirs" / "experiment"
    group.mkdir(parents=True)
    (group / "x.yaml").write_text('# @package _global_\nrun: "\u202egnp"\n')
    run(f"--config-dir={group.parent}", "experiment=x", "--cfg", "job")
    shown = capsys.readouterr().out
    assert "\\u202egnp" in shown and "\u202e" not in shown and "\nsteps:" in shown


def test_components_of_a_foreign_checkpoint(make_run: MakeRun) -> None:
    checkpoint = make_run(model__quantizer={"name": HOSTILE})
    with pytest.raises(UserError) as caught:
        load(checkpoint)
    check_shown(str(caught.value))


def test_names_of_tensors_in_an_import() -> None:
    report = ImportReport(Path("model.ckpt"), "taming")
    report.add_loaded(HOSTILE, "encoder.weight")
    report.add_skipped(HOSTILE, "unknown")
    check_shown(report.text())


def test_lines_of_a_list(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("ant\x1b[2J\u202egnp.png\n")
    with pytest.raises(UserError, match=r"ant\\x1b\[2J\\u202egnp\.png") as caught:
        image_list.read_list(str(tmp_path / "list.txt"), tmp_path, "data.train", [".png"])
    assert not any(acts(character) for character in str(caught.value))


def test_pages_show_names(tmp_path: Path) -> None:
    run_dir = made_up.make_run(tmp_path, "run")
    (run_dir / "metrics.json").write_text(json.dumps({HOSTILE: {"psnr": 1.0, HOSTILE: 2.0}}))
    page = write_report(run_dir).read_text()
    assert "\\x1b[2J" in page and "\\u202egnp" in page
    assert not any(acts(character) for character in page.replace("\n", "").replace("\t", ""))


def test_a_comparison_shows_names() -> None:
    compared = [ComparedRun(Path(HOSTILE), Path(HOSTILE), name, status=HOSTILE) for name in (HOSTILE, "bee")]
    report = ComparisonReport(rank(compared, [1, 2], "name"), ReconstructionPanels(), [], [HOSTILE])
    check_shown(report.markdown())
    page = report.html()
    assert not any(acts(character) for character in page.replace("\n", "").replace("\t", ""))


def is_output(call: ast.Call) -> bool:
    return ast.unparse(call.func) in {"print", "console.print", "sys.stdout.write", "sys.stderr.write", "warnings.warn"}


def test_only_the_terminal_module_and_main_print() -> None:
    """Elsewhere only constants: every name goes through the log, an error or `print_table`."""
    printing = [
        f"{path.name}:{call.lineno}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path not in (PACKAGE / "terminal.py", PACKAGE / "run.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and is_output(call)
        if not all(isinstance(argument, ast.Constant) for argument in call.args)
    ]
    assert printing == []
