"""`pipeline=compare`: the table, the images, and protocols that must not be mixed."""

import base64
import csv
import hashlib
import io
import json
import re
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import vqf
from tests import test_run
from tests.pipelines.test_full import OPTIONS
from tests.support.browser import WANTED, find_browser, open_browser
from tests.support.composing import compose
from tests.training.test_trainer import TINY, KilledError, interrupt_after
from vqf.config.diff import differing_options
from vqf.config.settings import fill_missing_groups
from vqf.errors import UserError
from vqf.evaluation.protocols import stable_hash
from vqf.models.tokenizer import Tokenizer
from vqf.pipelines.compare import Compare
from vqf.pipelines.comparison.metrics import MetricValue
from vqf.pipelines.comparison.ranking import LOWER_IS_BETTER, rank
from vqf.pipelines.comparison.runs import Run, find_runs, read_run
from vqf.pipelines.evaluate import Evaluate
from vqf.pipelines.full import Full
from vqf.pipelines.stage1 import Stage1
from vqf.pipelines.stage2 import Stage2
from vqf.protocols import Reconstruction
from vqf.registry import build, register

command_line = test_run.run  # a fixture

WITHOUT = ("model.discriminator", "model.adversary")  # a tokenizer without GAN
ALONE = [
    *(each for each in TINY if not each.startswith(WITHOUT)),
    *("~model/discriminator", "~model/adversary", "steps=3", "checkpoint.every=2"),
]
RUNS = {
    "0": ["model/quantizer=vq", "model/loss=[l1]", "model.quantizer.dim=4", "model.quantizer.codebook_size=16"],
    "1": ["model/quantizer=ema_small", "model/loss=[l1,l2]", "model.quantizer.dim=4", "steps=4"],
    "10": ["model/quantizer=ema_small", "model/loss=[l1,l2]", "model.quantizer.dim=4", "model.quantizer.decay=0.5"],
}
PROTOCOL = {"name": "reconstruction", "part": "validation", "count": 236, "crop": "source", "image_size": "16 x 16"}

BESIDE = (
    "intervals",
    "floors",
    "settings",
    "higher_is_better",
)  # what stands beside the protocol in a file of pipeline=evaluate


def train(folder: Path, *options: str) -> Path:
    """Train a tiny tokenizer as the command line would, its composed config included."""
    config = compose(*ALONE, *options)
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(config, folder / ".hydra" / "config.yaml")
    Stage1(config, folder).run()
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    for name, options in RUNS.items():
        train(folder / name, *options)
    return folder


@pytest.fixture
def sweep(trained: Path, tmp_path: Path) -> Path:
    """A copy of the runs that a test may change."""
    return shutil.copytree(trained, tmp_path / "sweep")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    for seed in (0, 1):
        Full(compose(*OPTIONS, f"seed={seed}", "logger=[]", "evaluate.samples=0"), folder / f"seed{seed}").run()
    return folder


def compare(where: Path, runs: str | Sequence[Path | str], **options: Any) -> dict[str, dict[str, str]]:
    """Compare runs; return the rows of the CSV file by run, in order."""
    given = str(runs) if isinstance(runs, str | Path) else [str(each) for each in runs]
    Compare(compose("pipeline=compare", "runs=x"), where, runs=given, **options).run()
    with (where / "comparison.csv").open(newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def last_validation(folder: Path) -> dict[str, float]:
    """Return the last validation of a run, read without vqf."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if any(key.startswith("validation/") for key in line)]
    return {k.removeprefix("validation/"): v for k, v in found[-1].items() if k.startswith("validation/")}


def evaluate(folder: Path, values: dict[str, float], /, step: int | None = None, **changes: Any) -> Path:
    """Write a result as pipeline=evaluate does."""
    protocol = PROTOCOL | {key: value for key, value in changes.items() if key not in BESIDE}
    protocol |= {"hash": stable_hash(protocol)}
    done = step or max(int(each.name[5:]) for each in (folder / "checkpoints").iterdir())
    place = folder / "evaluations" / f"{protocol['name']}-{protocol['hash'][:8]}" / f"stage1-{done:08d}"
    place.mkdir(parents=True)
    manifest = folder / "checkpoints" / f"step-{done:08d}" / "manifest.json"
    mark = hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else "gone"
    content = {"protocol": protocol, "values": values, "checkpoint": {"kind": "stage1", "step": done, "sha256": mark}}
    content |= {key: value for key, value in changes.items() if key in BESIDE}
    (place / "metrics.json").write_text(json.dumps(content))
    return place / "metrics.json"


def page(where: Path) -> str:
    return (where / "comparison.html").read_text()


def notes(where: Path) -> list[str]:
    return [line[2:] for line in (where / "comparison.md").read_text().splitlines() if line.startswith("* ")]


def test_the_table_has_the_metrics_of_the_runs_best_first(sweep: Path, tmp_path: Path) -> None:
    rows = compare(tmp_path / "out", sweep)
    assert sorted(rows) == ["0", "1", "10"]
    values = [float(row["training/psnr"]) for row in rows.values()]
    assert values == sorted(values, reverse=True)
    for name, row in rows.items():
        for metric, value in last_validation(sweep / name).items():
            assert float(row[f"training/{metric}"]) == value
        tokenizer = vqf.load(sweep / name)
        assert int(row["parameters"]) == sum(each.numel() for each in tokenizer.parameters())
        assert (row["step"], row["state"]) == ("4" if name == "1" else "3", "finished")
        summary = json.loads((sweep / name / "summary.json").read_text())
        assert float(row["processor_seconds"]) == summary["processor_seconds"]
        assert 0 < float(row["seconds"]) <= summary["wall_seconds"] + 0.1
    assert notes(tmp_path / "out")[0] == "Sorted by psnr, highest first."


def test_only_options_that_differ_have_a_column(sweep: Path, tmp_path: Path) -> None:
    rows = compare(tmp_path, sweep)
    known = ["run", "folder", "state", "step", "steps", "seconds", "processor_seconds", "parameters"]
    options = [key for key in rows["0"] if key not in known and not key.startswith("training/")]
    assert {key: [rows[name][key] for name in RUNS] for key in options} == {
        "model/quantizer": ["vq", "ema", "ema"],
        "model.quantizer.decay": ["–", "0.95", "0.5"],
        "model/loss": ["[l1]", "[l1,l2]", "[l1,l2]"],
    }


def test_markdown_and_page_hold_the_same_table_and_mark_the_best(sweep: Path, tmp_path: Path) -> None:
    rows = compare(tmp_path, sweep)
    best = next(iter(rows.values()))
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    header, first = ([cell.strip() for cell in lines[i].strip("|").split("|")] for i in (0, 2))
    assert first[header.index("psnr")] == f"**{float(best['training/psnr']):#.4g}**"
    assert first[header.index("run")] == best["run"]
    assert sum("**" in cell for line in lines[2:5] for cell in [line.split("|")[1 + header.index("psnr")]]) == 1
    cells = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", page(tmp_path))
    for line in lines[2:5]:
        assert [cell.strip().strip("*") for cell in line.strip("|").split("|")] == cells[: len(header)] or any(
            cells[i : i + len(header)] == [cell.strip().strip("*") for cell in line.strip("|").split("|")]
            for i in range(0, len(cells), len(header))
        )


class Page(HTMLParser):
    """Collects tags and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]
        assert not any(name.startswith("on") for name, _ in attributes)


def test_the_page_is_self_contained(sweep: Path, tmp_path: Path) -> None:
    config = sweep / "0" / "checkpoints" / "step-00000003" / "config.yaml"
    assert config.is_file()
    evil = sweep / "<img src=x onerror=alert(1)>"
    (sweep / "1").rename(evil)
    compare(tmp_path, sweep)
    found = Page(page(tmp_path))
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(found.tags)
    assert found.tags.count("img") == 4
    assert all(address.startswith("data:image/png;base64,") for address in found.addresses)
    assert "@import" not in page(tmp_path) and "url(" not in page(tmp_path)


@pytest.mark.slow
def test_the_page_fits_a_screen_a_phone_and_paper(sweep: Path, tmp_path: Path) -> None:
    program = find_browser()
    if program is None:
        pytest.skip(f"no Chromium is installed, nobody looks at the page; {WANTED}=chromium demands one")
    compare(tmp_path, sweep)
    with open_browser(program, tmp_path / "profile") as browser:
        for width, mobile, paper in ((1200, False, False), (390, True, False), (700, False, True)):
            browser.open(tmp_path / "comparison.html", width, mobile=mobile, paper=paper)
            assert browser.complaints == [] and browser.run("document.documentElement.scrollWidth") == width
            assert browser.run("[...document.images].every(each => each.complete && each.naturalWidth > 0)")
            browser.screenshot(tmp_path / f"comparison-{width}.png")
        lost = "[...document.querySelectorAll('td')].filter(each => each.getBoundingClientRect().right > 701).length"
        assert browser.run(lost) == 0  # paper cannot be scrolled


def strips(where: Path) -> list[np.ndarray]:
    """Decode the rows of images on a page."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page(where))
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in found]


def test_every_run_reconstructs_the_same_originals(sweep: Path, tmp_path: Path) -> None:
    rows = compare(tmp_path, sweep, count=5)
    split = build("data", {"name": "emoji"}, image_size=(16, 16), seed=0).split("validation")
    images = torch.stack([split.item(0, i * len(split) // 5).image for i in range(5)])
    expected = [images]
    for name in rows:
        tokenizer = vqf.load(sweep / name)
        assert isinstance(tokenizer, Tokenizer)
        expected.append(tokenizer.decode(tokenizer.encode(images)))
    found = strips(tmp_path)
    assert len(found) == len(expected) == 4
    for strip, expected_row in zip(found, expected, strict=True):
        for i, image in enumerate(expected_row):
            pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            assert np.array_equal(strip[:, 18 * i : 18 * i + 16], pixels)


def test_numbers_of_two_protocols_never_share_a_column(sweep: Path, tmp_path: Path) -> None:
    for name, count in (("0", 236), ("1", 236), ("10", 100)):
        evaluate(sweep / name, {"psnr": 20.0 + int(name), "rfid": 5.0}, count=count)
    rows = compare(tmp_path, sweep)
    columns = [key for key in rows["0"] if key.endswith("psnr")]
    assert columns == ["reconstruction/psnr"]
    assert [rows[name]["reconstruction/psnr"] for name in RUNS] == ["20.0", "21.0", ""]
    (apart,) = [line for line in notes(tmp_path) if line.startswith("Not comparable")]
    assert apart == ("Not comparable: 10: psnr 30, rfid 5 – not in one column with 0, 1: count: 100 and 236.")
    with pytest.raises(UserError) as caught:
        compare(tmp_path, [sweep / "0", sweep / "10"], sort="psnr")
    assert str(caught.value) == (
        "sort=psnr: two protocols measured it (0 by one, 10 by another); no column mixes them; "
        "they differ in count: 236 and 100; evaluate them by one protocol with pipeline=evaluate run=..."
    )


def test_two_shared_protocols_have_columns_side_by_side(sweep: Path, tmp_path: Path) -> None:
    for name in RUNS:
        evaluate(sweep / name, {"psnr": 30.0 - int(name)}, crop="source")
        evaluate(sweep / name, {"psnr": 20.0 + int(name)}, crop="center")
    with pytest.raises(UserError) as caught:
        compare(tmp_path, sweep, sort="psnr")
    first, second = re.findall(r"sort=(reconstruction-\w{8}/psnr)", str(caught.value))
    assert "they differ in crop: " in str(caught.value)
    for choice in (first, second):
        rows = compare(tmp_path, sweep, sort=choice)
        values = [float(row[choice]) for row in rows.values()]
        assert values == sorted(values, reverse=True) and len(values) == 3
    assert any(re.fullmatch(r"\S+ and \S+ differ in crop: \w+ and \w+\.", line) for line in notes(tmp_path))
    folders = {path.name for path in (sweep / "0" / "evaluations").iterdir()}
    assert {first.partition("/")[0], second.partition("/")[0]} == folders, "the hash is the one of the folder"


def test_settings_of_a_metric_are_lines_of_its_protocol(sweep: Path, tmp_path: Path) -> None:
    for name, net in (("0", "alex"), ("1", "alex"), ("10", "vgg")):
        settings = {"lpips": {"name": "lpips", "net": net}}
        evaluate(sweep / name, {"psnr": 20.0, "lpips": int(name) + 0.5}, settings=settings)
    rows = compare(tmp_path, sweep)
    assert [rows[name]["reconstruction/lpips"] for name in RUNS] == ["0.5", "1.5", ""]
    assert [rows[name]["reconstruction/psnr"] for name in RUNS] == ["20.0"] * 3
    assert any("metric.net: vgg and alex" in line for line in notes(tmp_path))


def test_protocols_are_named_only_if_they_measure_the_same_metric(sweep: Path, tmp_path: Path) -> None:
    for name in RUNS:
        for i, metric in enumerate(("psnr", "ssim", "rfid", "psnr", "psnr")):
            evaluate(sweep / name, {metric: 1.0 + i + int(name)}, seed=i)
    compare(tmp_path, sweep)
    told = [line for line in notes(tmp_path) if " differ in " in line]
    assert len(told) == 2, "three protocols measured psnr"
    assert all(set(re.findall(r"seed: (\d) and (\d)", line)[0]) <= {"0", "3", "4"} for line in told)


def test_two_settings_of_a_metric_that_runs_share_are_two_columns(sweep: Path, tmp_path: Path) -> None:
    for name, net in (("0", "alex"), ("1", "alex"), ("10", "vgg")):
        evaluate(sweep / name, {"lpips": int(name) + 0.5}, settings={"lpips": {"name": "lpips", "net": net}})
    shutil.copytree(sweep / "10", sweep / "11")
    rows = compare(tmp_path, sweep)
    names = [f"reconstruction/lpips (metric.net {net})" for net in ("alex", "vgg")]
    assert [[rows[name][key] for key in names] for name in ("0", "1", "10", "11")] == [
        *(["0.5", ""], ["1.5", ""], ["", "10.5"], ["", "10.5"])
    ]
    assert next(iter(compare(tmp_path, sweep, sort=f"-{names[0]}"))) == "1"


def test_the_recorded_direction_of_a_metric_is_used(sweep: Path, tmp_path: Path) -> None:
    for name in RUNS:
        evaluate(sweep / name, {"gap": 20.0 + int(name)}, higher_is_better={"gap": False})
    assert list(compare(tmp_path, sweep)) == ["0", "1", "10"]
    assert notes(tmp_path)[0] == "Sorted by gap, lowest first."


@pytest.mark.usefixtures("isolated")
def test_a_plugin_metric_is_ranked_by_its_direction(tmp_path: Path) -> None:
    @register("metric", "gap")
    class Gap:
        higher_is_better: ClassVar = {"gap": False}

        def __init__(self) -> None:
            self.total, self.count = 0.0, 0

        def update(self, batch: Reconstruction) -> None:
            self.total += float((batch.reconstructions - batch.images).abs().mean((1, 2, 3)).sum())
            self.count += len(batch.images)

        def compute(self) -> dict[str, float]:
            return {"gap": self.total / self.count}

    for seed in (0, 1):
        train(tmp_path / "runs" / str(seed), "metric=[gap]", f"seed={seed}")
    for evaluated in (False, True):
        rows = compare(tmp_path / "out", tmp_path / "runs")
        name = "reconstruction/gap" if evaluated else "training/gap"
        values = [float(row[name]) for row in rows.values()]
        assert values[0] < values[1]
        for seed in (0, 1):
            words = ["pipeline=evaluate", f"run={tmp_path / 'runs' / str(seed)}", "metric=[gap]", "logger=[]"]
            config = fill_missing_groups(compose(*words))
            Evaluate(config, tmp_path / "evaluated" / str(seed), statistics=str(tmp_path / "cache")).run()


def test_a_checkpoint_has_its_own_numbers_only(sweep: Path, tmp_path: Path) -> None:
    for step in (2, 4):
        evaluate(sweep / "1", {"psnr": 20.25 + step}, step=step)
    early, late = (sweep / "1" / "checkpoints" / f"step-0000000{step}" for step in (2, 4))
    rows = compare(tmp_path, [early, late])
    assert [rows[each.name]["reconstruction/psnr"] for each in (early, late)] == ["22.25", "24.25"]
    assert "step-00000002: psnr 22.25" in page(tmp_path), "the words under its images"
    assert read_run(sweep / "1").metrics["psnr"][-1].value == 24.25
    path = evaluate(sweep / "1", {"ssim": 0.5}, step=4, crop="center")
    path.write_text(path.read_text().replace('"sha256": "', '"sha256": "0'))
    evaluate(sweep / "1", {"usage": 0.5}, step=9, crop="center")
    known = read_run(sweep / "1").metrics
    for metric in ("ssim", "usage"):
        assert not [each for each in known.get(metric, []) if each.from_evaluation], (
            "of weights that are not there any more"
        )


def test_a_run_without_an_evaluation_is_compared_by_its_training(sweep: Path, tmp_path: Path) -> None:
    for name in ("0", "1"):
        evaluate(sweep / name, {"rfid": 5.0 + int(name)})
    rows = compare(tmp_path, sweep)
    assert all(row["training/psnr"] for row in rows.values())
    assert [rows[name]["reconstruction/rfid"] for name in RUNS] == ["5.0", "6.0", ""]
    evaluate(sweep / "10", {"rfid": 1.0})
    rows = compare(tmp_path, sweep)
    assert "training/psnr" not in rows["0"]
    assert list(rows) == ["10", "0", "1"]  # lower is better


def test_results_of_evaluate_are_read(sweep: Path, tmp_path: Path) -> None:
    values = {}
    for name in ("0", "1"):
        options = ["pipeline=evaluate", f"run={sweep / name}", "metric=[psnr]", "logger=[]", "protocol.count=6"]
        where = tmp_path / "evaluated" / name
        Evaluate(compose(*options, "protocol=reconstruction"), where, statistics=str(tmp_path / "cache")).run()
        values[name] = json.loads((where / "metrics.json").read_text())["values"]
    rows = compare(tmp_path / "out", [sweep / "0", sweep / "1"])
    assert {name: float(row["reconstruction/psnr"]) for name, row in rows.items()} == {
        name: found["psnr"] for name, found in values.items()
    }
    assert "training/psnr" not in rows["0"]


def test_validations_on_other_images_are_another_protocol(tmp_path: Path) -> None:
    train(tmp_path / "few", "evaluate.count=8")
    train(tmp_path / "more")
    rows = compare(tmp_path / "out", [tmp_path / "few", tmp_path / "more"])
    assert not [key for key in rows["few"] if key.startswith("training")]
    assert any("count: 8 and 16" in line for line in notes(tmp_path / "out"))


def test_intervals_floors_and_older_steps_are_shown(sweep: Path, tmp_path: Path) -> None:
    for name in RUNS:
        more: dict[str, Any] = {"intervals": {"fd_lite2": [4.25, 6.5]}, "floors": {"fd_lite2": 3.25}}
        evaluate(sweep / name, {"fd_lite2": 5.0 + int(name)}, step=2 if name == "0" else None, **more)
    rows = compare(tmp_path, sweep)
    assert list(rows) == ["0", "1", "10"]
    key = "reconstruction/fd_lite2"
    assert (rows["1"][f"{key} low"], rows["1"][f"{key} high"]) == ("4.25", "6.5")
    text = (tmp_path / "comparison.md").read_text()
    assert "**5 (4.25 to 6.5) at step 2**" in text
    assert [rows[name][f"{key} step"] for name in RUNS] == ["2", "4", "3"]
    assert "Real images against real ones: fd_lite2 3.25." in notes(tmp_path)


def test_nats_of_two_tokenizers_are_not_compared(full: Path, tmp_path: Path) -> None:
    rows = compare(tmp_path, full)
    assert set(rows) == {"seed0", "seed1"}
    assert not [key for key in rows["seed0"] if "nats" in key]
    assert [line for line in notes(tmp_path) if "nats_per_token" in line and "tokenizer: " in line]
    assert rows["seed0"]["step"] == "10" and rows["seed0"]["seed"] == "0"  # 6 steps of one stage, 4 of the other
    generator = vqf.load(full / "seed0")
    count = sum(each.numel() for part in ("tokenizer", "prior") for each in getattr(generator, part).parameters())
    assert int(rows["seed0"]["parameters"]) == count


def test_the_tokenizer_of_nats_does_not_make_a_protocol_of_its_own() -> None:
    lines = {"name": "generation", "count": "50"}
    runs = []
    for i in range(2):
        run = Run(Path(str(i)), Path(str(i)), name=str(i))
        nats = MetricValue(
            5.0 + i, lines | {"tokenizer": "abc"}, 4, from_evaluation=True, protocol_hash="0123456789abcdef"
        )
        run.metrics = {"nats_per_token": [nats], "usage": [MetricValue(0.5, lines, 4, from_evaluation=True)]}
        runs.append(run)
    ranking = rank(runs, [None, None], None)
    assert ranking.protocols == {"generation": lines}
    assert {each.name for each in ranking.columns} == {"generation/nats_per_token", "generation/usage"}
    assert ranking.protocol_differences() == [] and ranking.order == [0, 1]


def test_a_stage_of_a_full_run_is_a_run(full: Path, tmp_path: Path) -> None:
    rows = compare(tmp_path, [full / "seed0" / "stage1", full / "seed1" / "stage1"], sort="name")
    assert list(rows) == ["seed0/stage1", "seed1/stage1"]
    assert [row["state"] for row in rows.values()] == ["finished"] * 2


def test_failed_and_running_runs_are_listed(sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    composed = OmegaConf.to_yaml(compose(*ALONE))
    for name, log in (("2", "{0} INFO begins\n{0} ERROR lr=9: the loss is nan\n"), ("3", "{0} INFO begins\n")):
        (sweep / name / ".hydra").mkdir(parents=True)
        (sweep / name / ".hydra" / "config.yaml").write_text(composed)
        (sweep / name / "log.txt").write_text(log.format("2026-01-01 00:00:00,000"))
    with monkeypatch.context() as patch:
        interrupt_after(3, patch, "stage1")
        with pytest.raises(KilledError):
            train(sweep / "4", "steps=9", "evaluate.every=2")
    with (sweep / "4" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "validation/psnr": 99.0}\n{"step": 4, "vali')
    (sweep / "not-a-run").mkdir()
    (sweep / "sampled" / ".hydra").mkdir(parents=True)
    (sweep / "sampled" / ".hydra" / "config.yaml").write_text("pipeline: {name: sample}")
    rows = compare(tmp_path, sweep)
    assert set(rows) == {"0", "1", "10", "4"}
    assert rows["4"]["state"] == "2 of 9 steps" and float(rows["4"]["training/psnr"]) < 99
    left_out = [line for line in notes(tmp_path) if line.startswith("Left out")]
    assert left_out == ["Left out: 2, failed: lr=9: the loss is nan.", "Left out: 3, no checkpoint yet."]
    assert "2 of 9 steps" in page(tmp_path)


def test_a_broken_checkpoint_is_skipped(sweep: Path, tmp_path: Path) -> None:
    newest = sweep / "1" / "checkpoints" / "step-00000004" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    row = compare(tmp_path, sweep)["1"]
    assert (row["step"], row["state"]) == ("2", "2 of 4 steps")
    assert row["training/psnr"] == ""  # it was validated only later


def test_a_checkpoint_stands_for_its_run_at_that_step(sweep: Path, tmp_path: Path) -> None:
    early, late = (sweep / "1" / "checkpoints" / f"step-0000000{step}" for step in (2, 4))
    rows = compare(tmp_path, [early, late])
    assert {name: row["step"] for name, row in rows.items()} == {"step-00000002": "2", "step-00000004": "4"}
    assert len(strips(tmp_path)) == 3


def test_runs_of_other_data_have_a_panel_of_their_own(sweep: Path, tmp_path: Path) -> None:
    train(sweep / "grey", "data.background=grey")
    compare(tmp_path, sweep, count=2)
    abouts = re.findall(r"emoji, 236 validation images of 16 x 16 \(\w{8}\)", page(tmp_path))
    assert len(set(abouts)) == 2 and len(strips(tmp_path)) == 2 + 4


def test_missing_data_costs_only_the_images(sweep: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(40):
        Image.new("RGB", (20, 20), (6 * i, 9, 99)).save(images / f"{i}.png")
    folder = train(sweep / "folder", "data=folder", f"data.root={images}", "data.validation_fraction=0.5")
    for i in range(5):
        (images / f"{i}.png").unlink()
    rows = compare(tmp_path / "out", sweep)
    assert "folder" in rows and rows["folder"]["parameters"]
    assert "No images of folder: data 'folder' has changed since training." in notes(tmp_path / "out")
    shutil.rmtree(images)
    compare(tmp_path / "out", [sweep / "0", folder])
    assert any(line.startswith("No images of folder: ") for line in notes(tmp_path / "out"))


@pytest.mark.parametrize(
    ("sort", "names"), [("name", ["0", "1", "10"]), ("-step", ["1", "0", "10"]), ("parameters", ["1", "10", "0"])]
)
def test_sorting_by_other_columns(sweep: Path, tmp_path: Path, sort: str, names: list[str]) -> None:
    assert list(compare(tmp_path, sweep, sort=sort)) == names


def test_a_minus_reverses_the_order(sweep: Path, tmp_path: Path) -> None:
    there, back = (list(compare(tmp_path, sweep, sort=sort)) for sort in ("psnr_pooled", "-psnr_pooled"))
    assert there == back[::-1]


@pytest.mark.parametrize(
    ("metrics", "lower"),
    [
        ("fid rfid gfid fd_lite2 kd_lite2 kid lpips perceptual nats_per_token dead_codes l1 mse", True),
        ("psnr psnr_masked ssim is precision recall_lite2 density coverage usage perplexity class_accuracy", False),
    ],
)
def test_which_way_is_better(metrics: str, lower: bool) -> None:
    assert {bool(LOWER_IS_BETTER.search(metric)) for metric in metrics.split()} == {lower}


@pytest.mark.parametrize(
    ("runs", "options", "words"),
    [
        ("nowhere", {}, r"runs=nowhere: no such folder in .*"),
        ("{sweep}/0/.hydra", {}, r"runs=.*: neither a run nor a folder of runs.*"),
        ("{sweep}", {"sort": "pnsr"}, r"sort=pnsr: unknown column 'pnsr'\. Did you mean 'psnr'\? Known: psnr, .*"),
    ],
)
def test_errors_are_one_line(sweep: Path, tmp_path: Path, runs: str, options: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        compare(tmp_path / "out", runs.format(sweep=sweep), **options)
    assert re.fullmatch(words, str(caught.value))
    assert not (tmp_path / "out").exists()


def test_nothing_to_compare_gives_the_reason(tmp_path: Path) -> None:
    (tmp_path / "0" / ".hydra").mkdir(parents=True)
    (tmp_path / "0" / ".hydra" / "config.yaml").write_text("pipeline: {name: stage1}")
    with pytest.raises(UserError, match=r"^runs: nothing to compare yet \(0: no checkpoint yet\)$"):
        compare(tmp_path / "out", tmp_path)
    with pytest.raises(UserError, match=r"^runs=\[\]: give"):
        compare(tmp_path / "out", [])


def test_runs_are_found_in_the_order_of_their_numbers(sweep: Path) -> None:
    assert [path.name for path in find_runs(str(sweep))] == ["0", "1", "10"]
    assert [path.name for path in find_runs([str(sweep / "10"), str(sweep)])] == ["10", "0", "1"]


def test_time_adds_up_over_processes_and_processor_time_does_not(sweep: Path) -> None:
    lines = [{"step": i, "time": now} for i, now in enumerate((1.0, 5.0, 0.5, 2.5))]
    (sweep / "0" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = read_run(sweep / "0")
    assert found.seconds == 7.5 and found.processor_seconds is None


def test_options_of_two_components_are_never_compared_with_each_other() -> None:
    def quantizer(name: str, **options: float) -> Any:
        return OmegaConf.create({"model": {"quantizer": {"name": name, **options}}, "seed": 1})

    vq, ema = quantizer("vq", beta=0.25, weight=1.0), quantizer("ema", beta=1.0)
    assert differing_options([vq, ema]) == {"model/quantizer": ["vq", "ema"]}
    stronger = quantizer("vq", beta=0.5, weight=1.0)
    assert differing_options([vq, ema, stronger]) == {
        "model/quantizer": ["vq", "ema", "vq"],
        "model.quantizer.beta": ["0.25", "–", "0.5"],
    }
    assert differing_options([vq, vq, None]) == {}


def test_options_that_do_not_affect_the_model_are_no_difference() -> None:
    one, other = (
        compose(f"run_dir={each}", f"log.every={each}", f"workers={each}", f"steps={each}", "seed=0") for each in (1, 2)
    )
    assert differing_options([one, other]) == {}
    assert differing_options([one, compose("seed=5", "ema=0.9")]) == {"seed": ["0", "5"], "ema": ["null", "0.9"]}


def test_priors_on_one_tokenizer_are_ranked_by_their_nats(full: Path, tmp_path: Path) -> None:
    tokenizer, tokens = full / "seed0" / "stage1", full / "seed0" / "stage2" / "tokens"
    options = [*TINY, "pipeline=stage2", f"run={tokenizer}", f"tokens.root={tokens}", "evaluate.samples=0"]
    for rate in ("0.001", "0.02"):
        Stage2(compose(*options, f"optimizer.lr={rate}", "logger=[images]"), tmp_path / "priors" / rate).run()
    rows = compare(tmp_path / "out", tmp_path / "priors")
    values = [float(row["training-prior/nats_per_token"]) for row in rows.values()]
    assert values == sorted(values)
    for name, row in rows.items():
        assert (
            float(row["training-prior/nats_per_token"]) == last_validation(tmp_path / "priors" / name)["nats_per_token"]
        )
        assert row["optimizer.lr"] == name
    sheets = [(tmp_path / "priors" / name / "images" / "samples-latest.png").read_bytes() for name in rows]
    assert [base64.b64encode(each).decode() in page(tmp_path / "out") for each in sheets] == [True, True]


@pytest.mark.slow
def test_a_sweep_ends_with_one_table(command_line: test_run.Run, capsys: pytest.CaptureFixture[str]) -> None:
    command_line("-m", "pipeline=stage1", *ALONE, "model/loss=[l1],[l2]", "run_dir=all")
    said = capsys.readouterr().out
    assert "comparison" in said and "[l2]" in said
    with Path("all/comparison.csv").open(newline="") as file:
        assert {row["model/loss"] for row in csv.DictReader(file)} == {"[l1]", "[l2]"}
    page = Path("all/comparison.html").read_text()
    assert "pipeline=compare runs=all" in page and "model/loss=[l1],[l2]" in page
    command_line("pipeline=compare", "runs=all", "sort=perplexity")
    assert len(list(Path("outputs/compare").glob("*/comparison.md"))) == 1


def test_sweeps_of_other_pipelines_have_no_table(command_line: test_run.Run) -> None:
    command_line("-m", "pipeline=toy", "count=4,6", "run_dir=all")
    assert not list(Path().rglob("comparison*"))
