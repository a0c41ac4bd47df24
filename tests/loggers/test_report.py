"""The report shows all files of a run, and loads nothing from elsewhere."""

import base64
import io
import json
import logging
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from tests.loggers.made_up import CLASSES, EVIL, LONG, make_run
from vqf.loggers.image_grid import split_grid
from vqf.loggers.report import page as report_page
from vqf.loggers.report.codebook import usage_heatmap
from vqf.loggers.report.curve_points import Curve
from vqf.loggers.report.curves import plot_curves
from vqf.loggers.report.metric_descriptions import describe_metric
from vqf.loggers.report.page import write_report
from vqf.loggers.report.run_parts import latest_images, read_parts
from vqf.loggers.report.summary import cost_line
from vqf.loggers.report.tables import format_metric
from vqf.registry import build

VOID = {"meta", "img", "link", "br", "hr", "input"}


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


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def test_nothing_is_loaded_from_elsewhere(run: Path) -> None:
    path = write_report(run)
    page = Page(path)
    assert path == run / "report.html"
    for name in ("src", "href", "xlink:href", "action", "srcset", "data"):
        assert all(value.startswith(("data:image/webp;base64,", "#")) for value in page.values(name)), name
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    source = path.read_text()
    assert "@import" not in source
    assert all(each.startswith("#") for each in re.findall(r"url\(([^)]*)\)", source))
    addresses = set(re.findall(r"https?://[^\s&<\"']+", source))
    assert addresses == {"https://evil.example/x.js", "https://example.org"}  # the text of the config, no more


def test_words_of_the_run_stay_words(run: Path) -> None:
    page = Page(write_report(run))
    # Folder, number, caption, class over samples, in the table (name and title), under a completion, config.
    assert page.text.count("alert(1)") >= 7
    assert EVIL in page.text
    assert "<b>bold</b>" in page.text
    assert "b" not in page.tags


def test_everything_a_run_has_is_shown(run: Path) -> None:
    page = Page(write_report(run))
    for words in (
        "21.99",
        "22.0\u00a0dB",
        "99.5\u00a0%",
        "Validation images",
        "Stage 1, the tokenizer",
        "Stage 2, the prior",
        "nats_per_token",
        "python -m vqf.run experiment=quickstart 'model/loss=[l1,features]'",
        "seed: 3",
        "torch",
        "Took 9 min 10 s",
        "emoji, 64 × 64 pixels",
        "conv encoder, ema quantizer, conv decoder",
        "l1 + features + patchgan hinge",
        "gpt conditioned on label",
        "2,200 of 8 images, then 900 of 8 images",
        "16 codes in all, 4 different ones of 6",
        "50.0\u00a0% of the samples",
    ):
        assert words in page.text, words
    # stage 1: loss, psnr, the bold one, lr; stage 2: loss, nats, lr; how often codes are used
    assert page.tags.count("svg") == 8
    assert len(page.values("id")) == len(set(page.values("id")))


def test_every_image_is_shown_once_and_by_itself(run: Path) -> None:
    page = Page(write_report(run))
    # The run's own reconstructions and those of stage 1 are the same file. The codes come with a map of their use.
    assert page.tags.count("img") == 16 + 4 + 4 + 12 + 9 + 1 + 1
    shown = [_decoded(uri) for uri in page.values("src")]
    grid = run / "stage1" / "images" / "reconstructions-latest.png"
    for i, expected in enumerate(split_grid(grid)):
        assert np.array_equal(np.array(shown[i]), np.array(expected))
    assert {image.size for image in shown} == {(16, 16), (3, 2)}


def _decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")


def test_samples_stand_under_their_classes(run: Path) -> None:
    page = Page(write_report(run))
    places = [page.text.index(name) for name in ("Samples", CLASSES[0], LONG, "Class accuracy of samples")]
    assert places == sorted(places)
    source = (run / "report.html").read_text()
    samples = source[source.index("<h2>Samples") : source.index("<h2>Class accuracy")]
    assert [group.count("<img") for group in samples.split("<h3>")[1:]] == [3, 3, 3, 3]
    row = source[source.index("3 Donau") :].split("</tr>")[0]
    assert re.findall(r"--share: (\d+)", row) == ["33", "33", "33", "0"]  # of three samples, one in each


def test_a_sample_of_every_class_is_named_beneath(run: Path) -> None:
    details = run / "stage2" / "details.json"
    labels = [f"class {i}" for i in range(12)]
    details.write_text(json.dumps({"samples": {"labels": labels}}))
    page = Page(write_report(run))
    assert all(label in page.text for label in labels)
    assert "Class accuracy of samples" not in page.text


def test_a_measurement_shows_its_protocol_intervals_and_floors(tmp_path: Path) -> None:
    content = {
        "protocol": {"name": "reconstruction", "crop": "center", "count": 236},
        "values": {"psnr": 22.0625, "rfd_lite2": 12.5},
        "intervals": {"psnr": [21.75, 22.5]},
        "floors": {"rfd_lite2": 3.25},
    }
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    page = Page(write_report(tmp_path))
    for words in ("22.06", "95 %: 21.75 to 22.5", "real against real: 3.25", "crop", "center"):
        assert words in page.text, words
    assert "reconstructions: Frechet distance to real images, on other features than FID's" in page.text


def test_a_run_on_another_run_does_not_describe_a_model_of_its_own(run: Path) -> None:
    path = run / ".hydra" / "config.yaml"
    config = OmegaConf.merge(OmegaConf.load(path), {"pipeline": {"name": "sample"}, "run": "outputs/first"})
    OmegaConf.save(config, path)
    page = Page(write_report(run))
    assert "outputs/first" in page.text
    assert "drawn by a trained prior" in page.text
    assert "conv encoder" not in page.text


def test_the_price_is_told(run: Path) -> None:
    summary = {
        "wall_seconds": 7260,
        "processor_seconds": 14400,
        "processor": "Some Processor",
        "threads": 2,
        "processes": 1,
        "peak_memory_bytes": 3 * 2**29,
    }
    (run / "summary.json").write_text(json.dumps(summary))
    page = Page(write_report(run))
    for words in ("Took 2 h 1 min on Some Processor, 2 threads", "4 CPU hours", "1.5 GiB"):
        assert words in page.text, words
    (run / "summary.json").write_text(json.dumps({**summary, "accelerator": "A GPU", "processes": 8}))
    page = Page(write_report(run))
    for words in ("on 8 × A GPU", "16.1 GPU hours, 4 CPU hours"):
        assert words in page.text, words


def test_the_map_of_the_codes_tells_used_from_dead() -> None:
    image = np.array(usage_heatmap([5, 0, 1, 500, 0]))
    assert image.shape == (2, 3, 4)
    assert image[0, 1].tolist() == image[1, 1].tolist() == [214, 69, 65, 255]
    light = image[..., :3].sum(2).astype(int)
    assert light[0, 2] < light[0, 0] < light[1, 0]
    assert image[1, 2, 3] == 0  # there is no sixth code


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
    (part,) = read_parts(tmp_path)
    assert {key: curve.points for key, curve in part.training.items()} == {"loss": [(1, 2.0), (2, 4.0)]}


def test_time_adds_up_over_processes_and_keys_are_in_order(tmp_path: Path) -> None:
    times = [1.0, 5.0, 0.5, 2.5]
    lines = [
        {"step": i, "time": now, "lr/model": 1, "loss": 1, "validation/psnr": 1, "inf": "inf"}
        for i, now in enumerate(times)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (part,) = read_parts(tmp_path)
    assert part.seconds == 7.5
    assert part.keys == ["loss", "psnr", "lr/model"]


def test_newest_images_are_found(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("samples-00000100", "samples-00000200", "samples-latest", "chart"):
        (tmp_path / "images" / f"{name}.png").write_bytes(b"")
    assert {name: path.stem for name, path in latest_images(tmp_path).items()} == {
        "samples": "samples-latest",
        "chart": "chart",
    }


def test_curves_take_the_ink_of_the_page_and_share_no_names() -> None:
    validation = Curve([(9, 1.0)])
    training = [Curve((i, i * k) for i in range(200)) for k in (1, 2)]
    drawn = [plot_curves({"training": each, "validation": validation}) for each in training]
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
    assert format_metric("psnr", value) == words


def test_every_number_of_a_metric_has_a_meaning() -> None:
    named = [
        "psnr",
        "ssim",
        "perceptual",
        "lpips",
        "usage",
        "dead_codes",
        "fid",
        "rfid",
        "kid",
        "is",
        "recall",
        "rdensity_lite2",
    ]
    assert [key for key in named if not describe_metric(key)] == []
    assert describe_metric("rusage") == describe_metric("something") == ""
    assert describe_metric("rfd_lite2") == f"reconstructions: {describe_metric('fd_lite2')}"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, ""), (5.2, "5 s"), (65, "1 min 5 s"), (7265, "2 h 1 min"), (None, "")]
)
def test_durations_are_words(seconds: float | None, words: str) -> None:
    assert cost_line({}, seconds) == words


def test_closing_the_logger_writes_the_page(run: Path) -> None:
    logger = build("logger", {"name": "report"}, run_dir=run, config=None)
    logger.scalars(1, {"loss": 1.0})
    logger.images(1, "samples", torch.zeros(1, 3, 4, 4))
    assert not (run / "report.html").exists()
    logger.close()
    assert (run / "report.html").is_file()


def test_a_run_that_goes_on_has_a_page_that_costs_little(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, written = [0.0], list[float]()

    def write(_: Path) -> Path:
        written.append(clock[0])
        clock[0] += 2  # seconds that a page takes
        return run

    monkeypatch.setattr(report_page.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(report_page, "write_report", write)
    logger = build("logger", {"name": "report"}, run_dir=run, config=None)
    while clock[0] < 1000:
        clock[0] += 10
        logger.scalars(1, {"loss": 1.0})
        if clock[0] % 50 < 10:
            logger.images(1, "samples", torch.zeros(1, 3, 4, 4))
    assert 5 <= len(written) and len(written) * 2 <= 0.02 * 1000 + 2, "a fiftieth of the time"
    assert written[0] >= 60


def test_losses_come_first_and_variants_unfold(tmp_path: Path) -> None:
    keys = ["psnr", "psnr_pooled", "psnr_masked", "ssim", "usage", "perplexity", "perceptual", "dead_codes"]
    lines = [{"step": i, "loss": 1.0, "l1": 2.0, "lr/model": 3.0} for i in range(3)]
    lines += [{"step": i, **{f"validation/{key}": 1.0 for key in keys}} for i in range(3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = write_report(tmp_path).read_text()
    shown, others = source[source.index("<h2>Curves") :].split("<details>")[:2]
    drawn = [re.findall(r"<figcaption>([^<]*)</figcaption>", each) for each in (shown, others)]
    assert drawn[0] == ["loss", "psnr", "ssim", "usage", "perplexity", "perceptual"]
    assert drawn[1] == ["psnr_pooled", "psnr_masked", "dead_codes", "l1", "lr/model"]


def test_a_run_shows_what_evaluations_measured_of_it(run: Path) -> None:
    for step, value in ((4, 11.125), (8, 12.375)):
        content = {
            "protocol": {"name": "rfid_val", "count": 236, "rounding": "nearest", "hash": "0123456789abcdef"},
            "values": {"rfid": value},
            "checkpoint": {"kind": "stage1", "step": step},
        }
        place = run / "stage1" / "evaluations" / "rfid_val-01234567" / f"stage1-{step:08d}" / "metrics.json"
        place.parent.mkdir(parents=True)
        place.write_text(json.dumps(content))
    page = Page(write_report(run))
    for words in ("Measured by the protocol rfid_val, 236 images, step 8", "12.38", "0123456789abcdef", "rFID"):
        assert words in page.text, words
    assert "11.13" not in page.text and "Checkpoints by rfid_val" in page.text
    assert page.tags.count("svg") == 9, "one more curve, over the steps"


@pytest.mark.parametrize("error", [KeyError("a bug"), PermissionError(13, "Permission denied")])
def test_a_page_that_fails_does_not_take_the_run_down(
    run: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Path) -> None:
        raise error

    monkeypatch.setattr(report_page, "write_report", fail)
    logger = build("logger", {"name": "report"}, run_dir=run, config=None)
    with caplog.at_level(logging.WARNING, logger="vqf"):
        logger.close()
    (record,) = caplog.records
    if isinstance(error, KeyError):
        assert record.exc_info, "a bug keeps its traceback"
    else:
        assert record.getMessage() == f"{run / 'report.html'} cannot be written: Permission denied"
        assert not record.exc_info
