"""`pipeline=evaluate` on miniature runs of both stages: metrics, provenance and files."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor

import vqf
from tests.metrics.sets import Linear, frechet
from tests.support.composing import compose
from tests.support.processes import run_processes
from tests.training.test_trainer import TINY
from vqf.batch import Batch
from vqf.config.settings import fill_missing_groups
from vqf.errors import UserError
from vqf.evaluation.feature_cache import real_vs_real
from vqf.evaluation.generation import class_counts
from vqf.evaluation.preprocessing import to_uint8
from vqf.evaluation.protocols import stable_hash
from vqf.models.generator import Generator
from vqf.models.tokenizer import Tokenizer
from vqf.networks.feature_set import feature_set
from vqf.pipelines.evaluate import Evaluate
from vqf.pipelines.full import Full
from vqf.registry import build, component_names, find_component, flat_component, register

TRAINED, HELD_OUT = 24, 12
CODES = {"usage": {"name": "usage"}}
PRDC = ("precision", "recall", "density", "coverage")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small data sets of two classes that differ in one pixel, and two equal reference batches."""
    root = tmp_path_factory.mktemp("folders")
    pixels = np.random.default_rng(0).integers(0, 256, (TRAINED + HELD_OUT, 3, 4, 3), dtype=np.uint8)
    for name in ("one", "other"):
        pixels[TRAINED, 1, 1, 0] ^= 64
        for i, image in enumerate(pixels):
            place = root / name / ("train" if i < TRAINED else "val") / f"class{i % 2}" / f"{i:02d}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).resize((28, 20), Image.Resampling.BICUBIC).save(place)
        np.savez(root / f"{name}.npz", arr_0=pixels[:10].repeat(4, 1).repeat(4, 2), name=np.array(name))
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, folders: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "full"
    words = ("data=folder", f"data.root={folders / 'one'}", "data.flip=false", "data.crop=center")
    words = (*words, "checkpoint.every=3", "checkpoint.keep=0")
    config = compose(*TINY, *words, "pipeline=full", "stage2.steps=4", "stage2.batch_size=8", "model/conditioner=label")
    config.model.conditioner.label.dropout = 0.1  # allows classifier-free guidance
    pipeline: Full = build("pipeline", flat_component("pipeline", config), config=config, run_dir=folder)
    pipeline.run()
    return folder


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    return fill_missing_groups(compose("pipeline=evaluate", "logger=[]", "metric=[psnr,usage,fd]"))


@pytest.fixture
def evaluate(run: Path, composed: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Evaluate with options set as on the command line, and read the written file."""

    def evaluated(where: str = ".", **places: Any) -> dict[str, Any]:
        places = {key.replace("__", "."): value for key, value in places.items()}
        config = OmegaConf.merge(composed, {"run": str(run / where)})
        every = places.pop("all", False)
        for place, value in places.items():
            OmegaConf.update(config, place, value, merge=False, force_add=True)
        monkeypatch.setattr("vqf.config.inherit.cli_keys", lambda: list(places))
        options: Any = {"statistics": str(tmp_path / "statistics"), "checkpoints": "all" if every else "one"}
        Evaluate(config, tmp_path / "own", **options).run()
        return json.loads((tmp_path / "own" / "metrics.json").read_text())

    return evaluated


@pytest.fixture(autouse=True)
def linear(monkeypatch: pytest.MonkeyPatch) -> Linear:
    network = Linear()
    monkeypatch.setattr("vqf.metrics.set_metric.feature_network", lambda *_: network)
    return network


def make_images(folders: Path, part: str) -> Tensor:
    node = {"name": "folder", "root": str(folders / "one"), "crop": "center", "flip": False}
    split = build("data", node, image_size=16, seed=0).split(part)
    return torch.stack([split.item(0, i).image for i in range(len(split))])


def on_8_bits(images: Tensor) -> Tensor:
    return torch.floor((images + 1) * 127.5 + 0.5).clamp(0, 255) / 127.5 - 1


def test_reconstruction_metrics_by_hand(run: Path, folders: Path, evaluate: Any, linear: Linear) -> None:
    found = evaluate("stage1")
    tokenizer = vqf.load(run / "stage1")
    assert isinstance(tokenizer, Tokenizer)
    originals = make_images(folders, "validation")
    codes = tokenizer.encode(originals)
    drawn = on_8_bits(tokenizer.decode(codes))
    pairs = zip(originals, drawn, strict=True)
    each = [peak_signal_noise_ratio(to_uint8(x).numpy(), to_uint8(y).numpy()) for x, y in pairs]
    assert found["values"]["psnr"] == pytest.approx(np.mean(each), abs=1e-4)
    low, high = found["intervals"]["psnr"]
    assert low < np.mean(each) < high and high - low == pytest.approx(4 * np.std(each) / HELD_OUT**0.5, rel=0.2)
    assert found["values"]["usage"] == len(codes.unique()) / 16
    real, generated = (feature_set(*linear(images)) for images in (originals, drawn))
    assert found["values"]["rfd_linear"] == pytest.approx(frechet(real, generated), rel=1e-3)
    assert found["checkpoint"]["kind"] == "stage1" and found["checkpoint"]["step"] == 6


def test_sample_metrics_by_hand(run: Path, folders: Path, evaluate: Any, linear: Linear) -> None:
    found = evaluate(protocol={"name": "generation", "count": 20})
    generator = vqf.load(run)
    assert isinstance(generator, Generator)
    tokens = generator.sample_tokens(Batch(labels=torch.arange(20) % 2), seed=0)
    drawn = on_8_bits(generator.tokenizer.decode_tokens(tokens))
    real, generated = (feature_set(*linear(each)) for each in (make_images(folders, "train"), drawn))
    assert found["values"]["fd_linear"] == pytest.approx(frechet(real, generated), rel=1e-3)
    assert found["values"]["usage"] == len(tokens.unique()) / 16
    assert "psnr" not in found["values"], "a sample has no original"
    assert found["protocol"]["samples_per_class"] == "10" and found["protocol"]["reference_count"] == TRAINED
    lines = map(json.loads, (run / "stage2" / "metrics.jsonl").read_text().splitlines())
    seen = [line["validation/nats_per_token"] for line in lines if "validation/nats_per_token" in line]
    assert found["values"]["nats_per_token"] == pytest.approx(seen[-1], rel=1e-4), "the number that training ends with"
    other = evaluate(protocol={"name": "generation", "count": 20, "seed": 1})
    assert other["values"]["fd_linear"] != found["values"]["fd_linear"], "another seed draws other samples"


def test_the_default_protocol_depends_on_the_kind_of_run(evaluate: Any) -> None:
    alone = evaluate("stage1")
    assert alone["protocol"]["name"] == "reconstruction"
    protocol = evaluate()["protocol"]
    assert protocol["name"] == "generation" and protocol["count"] == TRAINED, "as many samples as there are images"
    assert protocol["sampler"] == "autoregressive" and protocol["samples_per_class"] == "12"
    reconstructed = evaluate(protocol={"name": "reconstruction"})
    assert reconstructed["checkpoint"]["kind"] == "stage2", "a prior's run keeps its tokenizer"
    assert reconstructed["values"] == alone["values"] and reconstructed["protocol"] == alone["protocol"]


def test_the_file_has_everything_that_the_metrics_depend_on(evaluate: Any) -> None:
    metric = {"fd": {"name": "fd"}, "kd_lite2": {"name": "kid", "network": "lite2"}, "prdc": {"name": "prdc"}}
    found = evaluate("stage1", metric=metric, protocol={"name": "reconstruction", "seed": 3})
    assert found.keys() == {
        *("protocol", "values", "intervals", "floors", "settings", "higher_is_better", "checkpoint", "commands"),
    }
    protocol = found["protocol"]
    facts = {
        "name": "reconstruction", "task": "reconstruction", "data": "folder", "target": "image", "precision": "fp32",
        "part": "validation", "count": HELD_OUT, "image_size": "16 x 16", "crop": "source",
        "resize": "by the data source", "rounding": "nearest", "reference": "originals",
        "reference_count": HELD_OUT, "seed": 3,
    }  # fmt: skip
    assert {key: protocol[key] for key in facts} == facts
    assert protocol.keys() - facts.keys() == {"images", "reference_images", "hash"}
    assert protocol["images"] == protocol["reference_images"]
    assert protocol["hash"] == stable_hash(protocol)
    of_sets = {"rfd_linear", "kd_linear", *(f"{key}_linear" for key in PRDC)}
    assert found["settings"].keys() == found["values"].keys() == of_sets
    kid = {"name": "kid", "network": "lite2", "network_digest": "linear-1", "subset_size": HELD_OUT // 2}
    assert found["settings"]["kd_linear"] == kid, "the size that was possible, not the one that was asked for"
    assert found["floors"].keys() == of_sets, "real images against real ones beside every distance"
    better = {"rfd_linear": False, "kd_linear": False, **{f"{key}_linear": True for key in PRDC}}
    assert found["higher_is_better"] == better
    (made,) = found["commands"]
    assert made.keys() - {"commit"} == {"metrics", "command", "versions", "device", "seconds"}
    assert {"vqf", "torch", "torch-fidelity", "python"} <= made["versions"].keys() and made["device"] == "cpu"
    assert set(made["metrics"]) == of_sets


def kept(run: Path, found: dict[str, Any]) -> Path:
    """Return the path of an evaluation below its run."""
    protocol, checkpoint = found["protocol"], found["checkpoint"]
    weights = f"{checkpoint['kind']}-{checkpoint['step']:08d}"
    return run / "evaluations" / f"{protocol['name']}-{protocol['hash'][:8]}" / weights / "metrics.json"


def test_the_file_below_the_run_keeps_earlier_metrics(run: Path, evaluate: Any) -> None:
    protocol = {"name": "reconstruction", "count": 9}
    first = evaluate("stage1", protocol=protocol, metric={"psnr": {"name": "psnr"}})
    own = evaluate("stage1", protocol=protocol, metric={"usage": {"name": "usage"}})
    path = kept(run / "stage1", own)
    both = json.loads(path.read_text())
    assert both == own and {"psnr", "usage"} <= both["values"].keys()
    assert both["values"].items() >= first["values"].items()
    assert [sorted(each["metrics"]) for each in both["commands"]] == [
        ["psnr", "psnr_pooled"],
        ["dead_codes", "perplexity", "usage"],
    ]
    again = evaluate("stage1", protocol=protocol, metric={"psnr": {"name": "psnr"}})
    assert [sorted(each["metrics"]) for each in again["commands"]] == [
        ["dead_codes", "perplexity", "usage"],
        ["psnr", "psnr_pooled"],
    ], "of a number that was measured again, the command that gave the first is forgotten"
    both["checkpoint"]["sha256"] = "another"
    path.write_text(json.dumps(both))
    assert "psnr" not in evaluate("stage1", protocol=protocol, metric={"usage": {"name": "usage"}})["values"]


def test_metrics_of_another_checkpoint_are_kept(run: Path, evaluate: Any) -> None:
    protocol, metric = {"name": "reconstruction", "count": 8}, {"psnr": {"name": "psnr"}}
    steps = sorted(path.name for path in (run / "stage1" / "checkpoints").iterdir())
    early, late = (evaluate(f"stage1/checkpoints/{step}", protocol=protocol, metric=metric) for step in steps[-2:])
    assert early["checkpoint"]["step"] < late["checkpoint"]["step"] and early["values"] != late["values"]
    assert [json.loads(kept(run / "stage1", each).read_text()) for each in (early, late)] == [early, late]


def test_precision_is_a_line_of_the_protocol(evaluate: Any) -> None:
    protocol = {"name": "reconstruction", "count": 7}
    half = evaluate("stage1", protocol=protocol, metric={"psnr": {"name": "psnr"}}, precision="bf16")
    whole = evaluate("stage1", protocol=protocol, metric={"usage": {"name": "usage"}})
    assert half["protocol"]["precision"] == "bf16" and whole["protocol"]["precision"] == "fp32"
    assert "psnr" not in whole["values"], "a number of one precision never stands under another"


def test_all_checkpoints_of_a_run_share_one_protocol(run: Path, evaluate: Any, tmp_path: Path) -> None:
    metric = {"psnr": {"name": "psnr"}}
    found = evaluate("stage1", protocol={"name": "reconstruction", "count": 5}, metric=metric, all=True)
    steps = sorted(int(path.name[5:]) for path in (run / "stage1" / "checkpoints").iterdir())
    assert len(steps) > 1 and found["checkpoint"]["step"] == steps[-1]
    lines = [json.loads(line) for line in (tmp_path / "own" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == steps
    for line in lines:
        one = kept(run / "stage1", {**found, "checkpoint": {"kind": "stage1", "step": line["step"]}})
        assert json.loads(one.read_text())["values"]["psnr"] == line["evaluation/psnr"]


def test_the_reports_of_an_evaluation_and_of_its_run_show_the_metrics(run: Path, evaluate: Any, tmp_path: Path) -> None:
    (run / "stage1" / "report.html").write_text("an older page")
    protocol = {"name": "reconstruction", "count": 10}
    found = evaluate("stage1", protocol=protocol, logger={"report": {"name": "report"}})
    for page in (tmp_path / "own" / "report.html", run / "stage1" / "report.html"):
        text = page.read_text()
        assert f">{found['values']['psnr']:.4g}<" in text and ">rfd_linear<" in text
        assert found["protocol"]["hash"] in text and "<dt>rounding</dt><dd>nearest</dd>" in text
    assert "<h2>Curves</h2>" not in (tmp_path / "own" / "report.html").read_text()


def test_an_unwritable_folder_costs_no_metrics(evaluate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        if "evaluations" in path.parts:
            raise PermissionError(13, "permission denied")
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert evaluate("stage1", protocol={"name": "reconstruction", "count": 11})["protocol"]["count"] == 11


CHANGES: dict[str, Any] = {
    "precision": "bf16",
    "protocol.part": "train",
    "protocol.count": 5,
    "protocol.crop": "adm",
    "protocol.resize": "lanczos",
    "protocol.rounding": "truncate",
    "protocol.reference": "validation",
    "protocol.labels": "uniform",
    "protocol.seed": 5,
    "data.root": "other",
    "sampler.top_k": 3,
    "sampler.guidance": 2.0,
}
OF_SAMPLES = {"protocol.labels", "sampler.top_k", "sampler.guidance"}


@pytest.mark.parametrize(("name", "without"), [("reconstruction", OF_SAMPLES), ("generation", set())])
def test_every_line_changes_the_hash(folders: Path, evaluate: Any, name: str, without: set[str]) -> None:
    plain = {"name": name, "crop": "center", "count": 6}
    base = evaluate(protocol=plain, metric=CODES)["protocol"]
    assert evaluate(protocol=plain, metric=CODES)["protocol"] == base
    tried = CHANGES.keys() - without
    assert {f"protocol.{option}" for option in find_component("protocol", name).options} <= tried
    hashes = {base["hash"]}
    for place in tried:
        value = str(folders / "other") if place == "data.root" else CHANGES[place]
        changed = evaluate(protocol=plain, metric=CODES, **{place: value})["protocol"]
        assert changed["hash"] not in hashes, f"{place} changes nothing"
        hashes.add(changed["hash"])
    for line in base.keys() - {"hash"}:
        assert stable_hash({**base, line: "another"}) != stable_hash(base) == base["hash"]


def test_a_reference_batch_is_known_by_its_content(folders: Path, tmp_path: Path, evaluate: Any) -> None:
    found = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        shutil.copy(folders / f"{name}.npz", tmp_path / name / "batch.npz")
        protocol = {"name": "gfid_adm", "count": 6, "reference": str(tmp_path / name / "batch.npz")}
        found.append(evaluate(protocol=protocol, metric=CODES)["protocol"])
    first, second = found
    assert first["reference"] == second["reference"] == "batch.npz"
    assert {key for key in first if first[key] != second[key]} == {"reference_images", "hash"}
    assert first["rounding"] == "truncate" and first["crop"] == "adm" and first["labels"] == "uniform"


def test_speed_options_of_a_sampler_are_no_protocol_lines(evaluate: Any) -> None:
    plain = {"name": "small", "count": 6}
    fast, slow = (evaluate(protocol=plain, metric=CODES, sampler__cache=cache)["protocol"] for cache in (True, False))
    assert fast == slow and "sampler.cache" not in fast and fast["sampler.top_k"] is None


def test_validation_images_other_than_in_training_are_logged(
    folders: Path, evaluate: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def told(**places: Any) -> list[str]:
        caplog.clear()
        evaluate("stage1", metric=CODES, **places)
        return [each.getMessage() for each in caplog.records if "validation images are not those" in each.getMessage()]

    assert told() == []
    (line,) = told(data__root=str(folders / "other"))
    assert "\n" not in line


def test_a_set_of_one_image_is_refused(tmp_path: Path, folders: Path, evaluate: Any) -> None:
    shutil.copytree(folders / "one", tmp_path / "poor")
    for path in sorted((tmp_path / "poor" / "val").rglob("*.png"))[1:]:
        path.unlink()
    with pytest.raises(UserError, match=r"^data: 1 image for validation; an evaluation needs at least two$"):
        evaluate("stage1", metric=CODES, data__root=str(tmp_path / "poor"))


def test_no_two_protocols_have_one_hash(folders: Path, evaluate: Any) -> None:
    hashes = set()
    for name in component_names("protocol"):
        reference = {"reference": str(folders / "one.npz")} if name == "gfid_adm" else {}
        hashes.add(evaluate(protocol={"name": name, "count": 6, **reference}, metric=CODES)["protocol"]["hash"])
    assert len(hashes) == len(component_names("protocol"))


def test_floors_compare_real_images_with_real_ones(folders: Path, evaluate: Any, linear: Linear) -> None:
    found = evaluate(protocol={"name": "small", "count": 10}, metric={"fd": {"name": "fd"}, "is": {"name": "is"}})
    pair = real_vs_real(feature_set(*linear(make_images(folders, "train"))), 10, seed=0)
    assert pair is not None
    assert found["floors"]["fd_linear"] == pytest.approx(frechet(*pair), rel=1e-3)
    assert found["protocol"]["labels"] == "images"


def test_too_small_a_set_has_no_floor(evaluate: Any) -> None:
    found = evaluate("stage1", metric={"is": {"name": "is"}}, protocol={"name": "reconstruction", "seed": 4})
    assert found["values"].keys() == {"score_linear"} and found["floors"] == {}


@pytest.mark.parametrize(
    ("protocol", "places", "line"),
    [
        ({"name": "gfid_adm", "reference": "nowhere.npz"}, {}, "protocol.reference=nowhere.npz: no such file"),
        ({"name": "rfid_val"}, {"data": {"name": "emoji"}}, "use protocol.crop=source"),
        ({"name": "generation", "reference": "originals"}, {}, "samples have none"),
        ({"name": "small", "count": 1}, {}, "protocol.count=1: must be an integer of at least 2 or null; the default"),
        ({"name": "reconstruction"}, {"metric": {}}, "metric=[]: nothing to measure; give metric=[psnr,"),
    ],
)
def test_errors_are_one_line(evaluate: Any, protocol: dict[str, Any], places: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=re.escape(line)) as error:
        evaluate(protocol=protocol, **places)
    assert "\n" not in str(error.value)


def test_a_tokenizer_cannot_be_sampled(evaluate: Any) -> None:
    with pytest.raises(UserError, match="this needs the run of a prior"):
        evaluate("stage1", protocol={"name": "small"})


@pytest.mark.usefixtures("isolated")
def test_the_protocol_in_the_docs_can_be_registered(evaluate: Any) -> None:
    page = (Path(vqf.__file__).parents[1] / "docs" / "evaluation.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "@register" in block]
    exec(code, {"__name__": "mine", "register": register, "dataclass": dataclass, "ClassVar": ClassVar})
    found = evaluate(protocol={"name": "mine", "count": 4}, metric=CODES)["protocol"]
    facts = {"name": "mine", "task": "generation", "count": 4, "resize": "lanczos", "labels": "uniform", "seed": 7}
    assert found.items() >= facts.items()


def test_class_counts() -> None:
    assert class_counts(torch.arange(8) % 4, 4) == "2"
    assert class_counts(torch.tensor([0, 0, 2]), 3) == "0 to 2"
    assert class_counts(torch.zeros(5, dtype=torch.int64), 0) == "no classes"


def evaluate_on_a_rank(run: str, own: str, statistics: str, *words: str) -> dict[str, Any]:
    """Evaluate on one of several ranks, without a feature network; return the written file."""
    config = compose("pipeline=evaluate", f"run={run}", "logger=[]", "metric=[psnr,usage]", "batch_size=5", *words)
    Evaluate(fill_missing_groups(config), Path(own), statistics=statistics).run()
    found: dict[str, Any] = json.loads((Path(own) / "metrics.json").read_text())
    return {key: found[key] for key in ("protocol", "values", "intervals")}


@pytest.mark.slow
@pytest.mark.parametrize("words", [("protocol=reconstruction",), ("protocol=small", "protocol.count=13")])
def test_several_processes_measure_the_same_as_one(run: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    places = [str(tmp_path / each) for each in ("own", "statistics")]
    alone = evaluate_on_a_rank(str(run), *places, *words)
    first = run_processes(2, evaluate_on_a_rank, str(run), *places, *words)[0]
    assert first["protocol"] == alone["protocol"]
    assert first["values"] == pytest.approx(alone["values"], rel=1e-5)
    assert first["intervals"] == alone["intervals"]


@pytest.mark.slow
def test_the_default_metrics_need_no_download(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real EfficientNet-Lite2, reconstructions of a barely trained tokenizer are far from the originals."""
    monkeypatch.undo()
    config = compose("pipeline=evaluate", f"run={run / 'stage1'}", "logger=[]")
    Evaluate(fill_missing_groups(config), tmp_path, statistics=str(tmp_path)).run()
    found = json.loads((tmp_path / "metrics.json").read_text())
    expected = {"psnr", "ssim", "perceptual", "usage", "rfd_lite2", "kd_lite2", *(f"{key}_lite2" for key in PRDC)}
    assert expected <= found["values"].keys()
    assert found["values"]["kd_lite2"] > 3 * abs(found["floors"]["kd_lite2"])
