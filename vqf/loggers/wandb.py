"""The Weights & Biases logger, https://docs.wandb.ai."""

import json
import logging
import netrc
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from vqf.loggers.image_grid import make_grid
from vqf.registry import register
from vqf.run_files.records import read_record
from vqf.run_files.shapes import DETAILS, is_text

ID_FILE = "wandb.json"  # in the run's folder: the id of the run at wandb


@register("logger", "wandb")
class WandbLogger:
    """Sends a run to Weights & Biases, or keeps it in the run's folder for `wandb sync`.

    The stages of pipeline=full share one run. After an error of wandb, the run continues without it. The config never
    holds the API key.

    Args:
        run_dir: The run's folder.
        config: Logged unresolved.
        subrun: Name of the stage, if `run_dir` is one of a run in the folder above; else empty.
        mode: `auto` takes WANDB_MODE, or else is online with an API key and offline without.
        project: Project of the run.
        entity: User or team that owns the project; by default the key's.
        group: Name under which wandb groups runs.
        tags: Tags of the run.
        checkpoints: Upload the newest checkpoint as an artifact when the run ends.
    """

    def __init__(
        self,
        run_dir: Path,
        config: DictConfig,
        subrun: str,
        *,
        mode: Literal["auto", "offline", "online", "disabled"] = "auto",
        project: str = "vqf",
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        checkpoints: bool = False,
    ) -> None:
        self.run_dir, self.subrun, self.checkpoints = run_dir, subrun, checkpoints
        self.prefix = f"{subrun}/" if subrun else ""
        self.run: Any = None
        self.disabled = False
        self.defined_metrics = set[str]()
        init_options: dict[str, Any] = {
            "project": project,
            "entity": entity,
            "group": group,
            "tags": list(tags) or None,
        }
        self._try(lambda: self._init_run(config, {"mode": _resolve_mode(mode), **init_options}))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._try(lambda: self._log(step, values))

    def images(self, step: int, name: str, images: Tensor) -> None:
        def send() -> None:
            import wandb

            self._log(step, {name: wandb.Image(make_grid(images))})

        self._try(send)

    def close(self) -> None:
        """Finish the run, unless other stages follow."""
        self._try(self._finish)
        self.disabled = True

    def _init_run(self, config: DictConfig, init_options: Mapping[str, Any]) -> None:
        import wandb

        root = self.run_dir.absolute().parent if self.subrun else self.run_dir.absolute()
        root.mkdir(parents=True, exist_ok=True)
        container: Any = OmegaConf.to_container(config, resolve=False)
        known_id = read_record(root / ID_FILE, {"id": is_text}).get("id")
        if wandb.run is not None and wandb.run.id == known_id:  # opened by the stage before this one
            self.run = wandb.run
            self.run.config.update(container, allow_val_change=True)
            return
        resumed = known_id is not None and container.get("resume", False) is not False
        run_id = known_id if resumed else uuid.uuid4().hex[:8]
        self.run = wandb.init(
            **init_options,
            id=run_id,
            resume="allow",
            reinit="finish_previous",
            name="/".join(root.parts[-2:]),
            dir=str(root),
            config=container,
            settings=wandb.Settings(silent=True, console="off"),
        )
        content = {"id": run_id, "project": init_options["project"], "entity": init_options["entity"]}
        (root / ID_FILE).write_text(json.dumps(content))

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        # wandb's own step must increase, and images and scalars come in two calls; so the step is a metric itself.
        axis = f"{self.prefix}step"
        prefixed = {f"{self.prefix}{key}": value for key, value in values.items()}
        if not self.defined_metrics:
            self.run.define_metric(axis, hidden=True)
        for key in prefixed.keys() - self.defined_metrics:
            self.run.define_metric(key, step_metric=axis)
        self.defined_metrics |= prefixed.keys()
        self.run.log({axis: step, **prefixed})

    def _finish(self) -> None:
        self._log_code_counts()
        if self.checkpoints:
            self._log_checkpoint()
        if not self.subrun:
            self.run.finish()

    def _log_code_counts(self) -> None:
        import wandb

        counts = _code_counts(self.run_dir / "details.json")
        if counts:
            total = sum(counts) or 1
            rows = [[code, count, count / total] for code, count in enumerate(counts)]
            artifact = wandb.Artifact(self._artifact_name("codes"), "codes")
            artifact.add(wandb.Table(columns=["code", "count", "share"], data=rows), "codes")
            self.run.log_artifact(artifact)

    def _log_checkpoint(self) -> None:
        import wandb

        folder = max((self.run_dir / "checkpoints").glob("step-*"), default=None)
        if folder is not None:
            step = int(folder.name.removeprefix("step-"))
            artifact = wandb.Artifact(self._artifact_name("checkpoint"), "model", metadata={"step": step})
            for file in sorted(folder.iterdir()):
                artifact.add_file(str(file))
            self.run.log_artifact(artifact)

    def _artifact_name(self, kind: str) -> str:
        return "-".join(filter(None, [self.run.id, self.subrun, kind]))

    def _try(self, action: Callable[[], Any]) -> None:
        if self.disabled:
            return
        try:
            action()
        except Exception as error:
            self.disabled = True
            logging.getLogger("vqf").warning("wandb failed, the run continues without it: %s", error)


def _resolve_mode(mode: str) -> str:
    if mode != "auto":
        return mode
    return os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _code_counts(path: Path) -> list[int]:
    return read_record(path, DETAILS).get("codes", {}).get("counts", [])
