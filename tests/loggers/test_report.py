"""The report: everything a made-up run left on disk, and nothing from anywhere else."""

import json
import logging
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from vqf.loggers.curves import curve
from vqf.loggers.records import parts, pictures
from vqf.loggers.report import duration, number, write_report
from vqf.registry import build

VOID = {"meta", "img", "link", "br", "hr", "input"}
EVIL = '<script src="https://evil.example/x.js">alert(1)</script>'


class Page(HTMLParser):
    """Collects text, attributes and tags, and sees that every element is closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(path.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.attributes if key == name]


def write_metrics(folder: Path, steps: int, validation: dict[str, float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(10, steps + 1, 10):
        lines.append({"step": step, "time": step / 2, "loss": 1 / step, "lr/model": 1e-3, "oddity": "nan"})
        if step % 50 == 0:
            lines.append({"step": step, "time": step / 2, **{f"validation/{k}": v for k, v in validation.items()}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of both stages, with words in it that are meant to break the page."""
    run_dir = tmp_path / f"{EVIL.replace('/', '_')}"
    write_metrics(run_dir / "stage1", 1000, {"psnr": 21.5, "loss": 0.25, "<b>bold</b>": 3.0})
    write_metrics(run_dir / "stage2", 100, {"nats_per_token": 4.5})
    (run_dir / ".hydra").mkdir()
    (run_dir / ".hydra" / "config.yaml").write_text(f"seed: 0\nnote: '{EVIL}'\nhome: https://example.org\n")
    (run_dir / ".hydra" / "overrides.yaml").write_text("- experiment=quickstart\n- model/loss=[l1,features]\n")
    (run_dir / "metrics.json").write_text(json.dumps({"held-out pictures": {"psnr": 21.98765, EVIL: 1.0}}))
    for folder, seed in ((run_dir, 0), (run_dir / "stage1", 0), (run_dir / "stage2", 1)):
        torch.manual_seed(seed)
        logger = build("logger", {"name": "images"}, run_dir=folder, config=None)
        for step in (500, 1000):
            logger.images(step, "reconstructions" if seed == 0 else "samples", torch.rand(4, 3, 8, 8))
    return run_dir


def test_nothing_is_loaded_from_elsewhere(run: Path) -> None:
    path = write_report(run)
    page = Page(path)
    assert path == run / "report.html"
    for name in ("src", "href", "xlink:href", "action", "srcset", "data"):
        assert all(value.startswith(("data:image/png;base64,", "#")) for value in page.values(name)), name
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    source = path.read_text()
    assert "@import" not in source
    assert all(each.startswith("#") for each in re.findall(r"url\(([^)]*)\)", source))
    addresses = set(re.findall(r"https?://[^\s&<\"']+", source))
    assert addresses == {"https://evil.example/x.js", "https://example.org"}  # the text of the config, no more


def test_words_of_the_run_stay_words(run: Path) -> None:
    page = Page(write_report(run))
    assert EVIL in page.text
    assert "<b>bold</b>" in page.text
    assert "b" not in page.tags


def test_everything_a_run_has_is_shown(run: Path) -> None:
    page = Page(write_report(run))
    for words in (
        "21.99",
        "held-out pictures",
        "Stage 1, the tokenizer",
        "Stage 2, the prior",
        "nats_per_token",
        "python -m vqf.run experiment=quickstart 'model/loss=[l1,features]'",
        "seed: 0",
        "torch",
        "took 9 min 10 s",
    ):
        assert words in page.text
    # stage 1: loss, psnr, the bold one, lr; stage 2: loss, nats, lr
    assert page.tags.count("svg") == 7
    assert len(page.values("id")) == len(set(page.values("id")))
    # The run's picture and stage 1's are the same file, and are shown once.
    assert len(page.values("src")) == 2


def test_numbers_fall_back_on_the_last_look_at_held_out_data(run: Path) -> None:
    (run / "metrics.json").unlink()
    page = Page(write_report(run))
    assert "Stage 1, the tokenizer, step 1,000" in page.text
    assert "21.5" in page.text


def test_a_summary_says_command_time_and_versions(run: Path) -> None:
    summary = {"command": ["python", "-m", "vqf.run", "steps=5 6"], "wall_seconds": 7260, "versions": {"vqf": "9.9"}}
    (run / "summary.json").write_text(json.dumps(summary))
    page = Page(write_report(run))
    for words in ("python -m vqf.run 'steps=5 6'", "2 h 1 min", "9.9"):
        assert words in page.text


def test_an_empty_folder_still_makes_a_page(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path))
    assert "h1" in page.tags
    assert "svg" not in page.tags


def test_broken_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.0}\n[1]\n{"loss": 3}\n{"step": 2, "loss": 4.0}\n{"st'
    )
    (tmp_path / "metrics.json").write_text("{")
    (tmp_path / "summary.json").write_text("[1, 2]")
    page = Page(write_report(tmp_path))
    assert page.tags.count("svg") == 1
    (part,) = parts(tmp_path)
    assert part.training == {"loss": [(1, 2.0), (2, 4.0)]}


def test_time_adds_up_over_processes_and_keys_are_in_order(tmp_path: Path) -> None:
    times = [1.0, 5.0, 0.5, 2.5]
    lines = [
        {"step": i, "time": now, "lr/model": 1, "loss": 1, "validation/psnr": 1, "inf": "inf"}
        for i, now in enumerate(times)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (part,) = parts(tmp_path)
    assert part.seconds == 7.5
    assert part.keys == ["psnr", "loss", "lr/model"]


def test_newest_pictures_are_found(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("samples-00000100", "samples-00000200", "samples-latest", "chart"):
        (tmp_path / "images" / f"{name}.png").write_bytes(b"")
    assert {name: path.stem for name, path in pictures(tmp_path).items()} == {
        "samples": "samples-latest",
        "chart": "chart",
    }


def test_curves_take_the_ink_of_the_page_and_share_no_names() -> None:
    drawn = [curve({"training": [(i, i * k) for i in range(200)], "validation": [(9, 1.0)]}) for k in (1, 2)]
    for svg in drawn:
        assert svg.startswith("<svg")
        assert "currentColor" in svg
        assert "#010203" not in svg
        assert "http" not in svg
        assert "font-family" not in svg
        assert "validation" in svg
        targets = re.findall(r'href="#([^"]*)"', svg) + re.findall(r"url\(#([^)]*)\)", svg)
        assert targets
        assert set(targets) <= set(re.findall(r' id="([^"]*)"', svg))
    names = [set(re.findall(r' id="([^"]*)"', svg)) for svg in drawn]
    assert names[0]
    assert not names[0] & names[1]


@pytest.mark.parametrize(
    ("value", "words"), [(21.98765, "21.99"), (4096.0, "4,096"), (0.00012346, "0.0001235"), (12345.6, "12,346")]
)
def test_numbers_are_short(value: float, words: str) -> None:
    assert number(value) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, ""), (5.2, "5 s"), (65, "1 min 5 s"), (7265, "2 h 1 min"), (None, "")]
)
def test_durations_are_words(seconds: float | None, words: str) -> None:
    assert duration(seconds) == words


def test_closing_the_logger_writes_the_page(run: Path) -> None:
    logger = build("logger", {"name": "report"}, run_dir=run, config=None)
    logger.scalars(1, {"loss": 1.0})
    logger.images(1, "samples", torch.zeros(1, 3, 4, 4))
    assert not (run / "report.html").exists()
    logger.close()
    assert (run / "report.html").is_file()


def test_a_page_that_fails_does_not_take_the_run_down(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "report.html").mkdir()
    logger = build("logger", {"name": "report"}, run_dir=run, config=None)
    with caplog.at_level(logging.WARNING, logger="vqf"):
        logger.close()
    assert len(caplog.records) == 1
    assert caplog.records[0].exc_info
