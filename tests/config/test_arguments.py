"""Any text arrives as it was given, or one line says what to type instead."""

import re
import shlex
import subprocess

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import vqf  # noqa: F401  (registers the components)
from vqf.config.arguments import is_text_option, parse, quote_text_options, quote_unreadable, shell_word
from vqf.config.syntax_messages import sweep_hint, syntax_hint
from vqf.registry import components

TEXT_OPTIONS = ("run", "run_dir", "tokens.root", "data.root", "path", "label", "images", "mask", "metric.fid.weights")
SPECIAL = "=~&,'\"[]{}()$%#!\\:;|<>`^*?@+-./ \tüß日😀1e_"
TEXTS = st.text(st.one_of(st.sampled_from(SPECIAL), st.characters(exclude_categories=["C"])), max_size=12)
NAMES = ["Food & Drink", "~/pictures", "logs/epoch=12-step=999.ckpt", "/home/jürgen/bilder", "photo (1).png", "it's"]
# What Hydra's documentation gives a meaning of its own.
HYDRAS = re.compile(
    r"""null|\?\?\?|\s*(["']).*\1\s*|.*\\.*|.*\$\{.*\}.*|\s*(int|float|str|bool|json_str)\s*\(.*\)\s*""", re.I
)


def read(argument: str, *, multirun: bool = False) -> tuple[Override | None, str]:
    """The override that Hydra gets, or the message about the argument."""
    (argument,) = quote_text_options(quote_unreadable([argument]))
    override = parse(argument)
    if override is None:
        return None, syntax_hint(argument, None, {}, multirun)
    if override.is_sweep_override():
        return None, sweep_hint(override)
    return override, ""


def value_of(override: Override | None) -> object:
    """The value in a composed config."""
    assert override is not None
    return OmegaConf.create({"key": override.value()})["key"]


def typed(word: str) -> str:
    """The argument that a shell makes of a word."""
    return by_bash(word) if word.startswith("$") else shlex.split(word)[0]


def by_bash(word: str) -> str:
    command = ["bash", "-c", f"printf %s {word}"]
    return subprocess.run(command, capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}).stdout.decode()


def hydras_own(argument: str) -> object:
    try:
        return OverridesParser.create().parse_overrides([argument])[0].value()
    except OverrideParseException:
        return None


@settings(max_examples=400, deadline=None)
@given(key=st.sampled_from(TEXT_OPTIONS), text=st.one_of(TEXTS, st.sampled_from(NAMES)))
@example(key="path", text="[draft]")
@example(key="path", text="{a}")
@example(key="run_dir", text="1_000")
@example(key="label", text="1.10")
@example(key="label", text="true")
@example(key="label", text=" a ")
@example(key="path", text="photo(1)")
@example(key="path", text="a${b")
@example(key="path", text="Smith, John/a=1")
@example(key="path", text="-x")
def test_a_text_arrives_or_the_cure_in_the_message_does(key: str, text: str) -> None:
    argument = f"{key}={text}"
    override, message = read(argument)
    if HYDRAS.fullmatch(text) and hydras_own(argument) is not None:
        assert override is None or override.value() == hydras_own(argument)
    elif override is None:
        assert "," in text and "\n" not in message
        assert value_of(read(typed(message.rpartition("; as one text, type ")[2]))[0]) == text
    elif text.lower() not in ("null", "???"):
        assert value_of(override) == text


@given(st.lists(st.sampled_from(["a=1", "Food & Drink", "~/x", "ü", "b c", "d"]), min_size=2, max_size=4))
def test_the_cure_of_a_sweep_sweeps(values: list[str]) -> None:
    override, message = read(f"label={','.join(values)}", multirun=True)
    assert override is None
    if found := re.search(r"as the values of a sweep, type (.+); as one text", message):
        (cure,) = shlex.split(found[1])
        sweep = parse(cure)
        assert sweep is not None and sweep.is_sweep_override()
        assert [parse(f"label={each}").value() for each in sweep.sweep_string_iterator()] == values  # type: ignore[union-attr]
    else:
        assert parse(f"label={','.join(values)}") is not None  # as Hydra reads it


@pytest.mark.parametrize(
    "text", ["Smith, John", 'it\'s, "ok"', "$HOME, `ls`, !1, \\x", "ü, ~, #, &, {a,b}", "a\tb,c", "日, 😀"]
)
def test_bash_passes_the_cure_on_as_it_was_meant(text: str) -> None:
    _, message = read(f"path={text}")
    assert value_of(read(by_bash(message.rpartition("; as one text, type ")[2]))[0]) == text


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8))
@settings(max_examples=20, deadline=None)
def test_a_word_of_the_shell_is_one_line_and_is_what_was_meant(text: str) -> None:
    word = shell_word(text)
    assert word.isprintable() and by_bash(word) == text


def test_a_text_option_is_one_that_holds_nothing_else() -> None:
    texts = {"run", "run_dir", "tokens.root", "data.root", "path", "label", "metric.fid.weights", "+run_dir"}
    others = {"resume", "plugins", "size", "condition", "data.extensions", "model.quantizer.levels", "steps", "nothing"}
    assert all(map(is_text_option, texts)) and not any(map(is_text_option, others))
    assert any("label" in each.options for each in components("pipeline"))


@pytest.mark.parametrize(
    "argument",
    [
        *("seed=1,2", "model/quantizer=vq,fsq", "seed=range(1,3)", "lr=interval(0,1)", "model/quantizer=glob(*)"),
        *("image_size=[64,128]", "condition={a:b.png}", "run=null", "run='a=b'", 'run="a=b"', "run=${run_dir}"),
        *("steps=1_000", "run=a\\,b", "label=str(3)", "~run", "~run=3", "run=choice(a,b)", "metric=[psnr,ssim]"),
    ],
)
def test_hydras_grammar_stays(argument: str) -> None:
    assert quote_text_options(quote_unreadable([argument])) == [argument]


def test_flags_stay() -> None:
    flags = ["-m", "--config-dir", "a=b", "--cfg", "job"]
    assert quote_unreadable([*flags, "path=a=b"]) == [*flags, 'path="a=b"']


def test_an_interpolation_beside_other_characters_stays_one() -> None:
    (argument,) = quote_unreadable(["run_dir=out/seed=${seed}"])
    override = parse(argument)
    assert override is not None
    assert OmegaConf.create({"seed": 3, "run_dir": override.value()}).run_dir == "out/seed=3"
