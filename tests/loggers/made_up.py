"""A made-up run of both stages, with text in it that is meant to break the page."""

import json
from pathlib import Path

import torch
from omegaconf import OmegaConf

from vqf.registry import build

EVIL = '<script src="https://evil.example/x.js">alert(1)</script>'
LONG = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft"
CLASSES = ["Animals & Nature", EVIL, LONG, "Travel"]
TITLES = ["reconstructions", "best", "worst", "samples", "completions"]
COUNTS = [0, 9, 1, 0, 4, 2]


def write_metrics(folder: Path, steps: int, validation: dict[str, float]) -> None:
    """Write a `metrics.jsonl` with a line every 10 steps, half a second each, and a look every 50."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(10, steps + 1, 10):
        lines.append({"step": step, "time": step / 2, "loss": 1 / step, "lr/model": 1e-3, "oddity": "nan"})
        if step % 50 == 0:
            lines.append({"step": step, "time": step / 2, **{f"validation/{k}": v for k, v in validation.items()}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_images(folder: Path, counts: dict[str, int], size: int = 16) -> None:
    """Write grids of so many images, the same ones for the same name."""
    for seed, (name, count) in enumerate(counts.items()):
        images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        build("logger", {"name": "images"}, run_dir=folder, config=None, subrun="").images(500, name, images)


def make_run(folder: Path, name: str = EVIL.replace("/", "_")) -> Path:
    """Write everything that a run leaves on disk, but its checkpoints."""
    run_dir = folder / name
    write_metrics(run_dir / "stage1", 1000, {"psnr": 21.5, "loss": 0.25, "<b>bold</b>": 3.0})
    write_metrics(run_dir / "stage2", 100, {"nats_per_token": 4.5})
    write_images(run_dir / "stage1", {"reconstructions": 16, "best": 4, "worst": 4, "codes": 1})
    write_images(run_dir / "stage2", {"samples": 12, "completions": 9})
    write_images(run_dir, {"reconstructions": 16})
    first = {"best": {"captions": ["40.0 dB", "39.5 dB"]}, "worst": {"captions": ["9.0 dB", EVIL]}}
    (run_dir / "stage1" / "details.json").write_text(json.dumps({**first, "codes": {"counts": COUNTS}}))
    second = {
        "samples": {"labels": CLASSES * 3},
        "completions": {"captions": CLASSES[:3]},
        "classes": {"names": CLASSES, "confusion": [[3, 0, 0, 0], [0, 2, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]},
    }
    (run_dir / "stage2" / "details.json").write_text(json.dumps(second))
    accuracy = {"": 0.5, "_real": 0.75, "_decoded": 0.7, "_chance": 0.25}
    numbers = {
        "validation images": {"psnr": 21.98765, "usage": 0.995, EVIL: 1.0},
        "codes": {f"class_accuracy{key}": value for key, value in accuracy.items()},
    }
    (run_dir / "metrics.json").write_text(json.dumps(numbers))
    _describe(run_dir)
    return run_dir


def _describe(run_dir: Path) -> None:
    (run_dir / ".hydra").mkdir()
    config = {
        "pipeline": {"name": "full"},
        "run": None,
        "data": {"name": "emoji"},
        "image_size": 64,
        "seed": 3,
        "note": EVIL,
        "home": "https://example.org",
        "steps": 2200,
        "batch_size": 8,
        "stage2": {"steps": 900, "batch_size": "${batch_size}"},
        "model": {
            "encoder": {"name": "conv"},
            "quantizer": {"name": "ema"},
            "decoder": {"name": "conv"},
            "loss": {"l1": {"name": "l1"}, "features": {"name": "features"}, "lpips": None},
            "discriminator": {"name": "patchgan"},
            "adversary": {"name": "hinge"},
            "conditioner": {"label": {"name": "label"}},
            "prior": {"name": "gpt"},
        },
    }
    OmegaConf.save(OmegaConf.create(config), run_dir / ".hydra" / "config.yaml")
    (run_dir / ".hydra" / "overrides.yaml").write_text("- experiment=quickstart\n- model/loss=[l1,features]\n")
