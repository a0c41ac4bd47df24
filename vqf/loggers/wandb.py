"""Weights & Biases, https://docs.wandb.ai."""

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

ID_FILE = "wandb.json"  # in the run's folder: under which id it is known


@register("logger", "wandb")
class WandbLogger:
    """Sends a run to Weights & Biases, or keeps it in the run's folder for `wandb sync`.

    The parts of pipeline=full are one run, its numbers under `stage1/` and `stage2/`; a run that is resumed goes on
    under its id. Whatever goes wrong is said once, and the training goes on without it. The key comes from
    `wandb login` or the environment, never from the config, which is logged unresolved.

    Args:
        run_dir: The run's folder.
        config: Logged as it is.
        subrun: What the folder is of the run in the folder above.
        mode: `auto` is online where there is a key, and offline where there is none; WANDB_MODE decides before it.
        project: Where the run is filed.
        entity: Whose project it is; by default that of the key.
        group: Runs of one group are shown together.
        tags: Words to find the run by.
        checkpoints: Keep the newest checkpoint as an artifact, too, when the run ends.
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
        where: dict[str, Any] = {"project": project, "entity": entity, "group": group, "tags": list(tags) or None}
        self._try(lambda: self._init_run(config, {"mode": _resolve_mode(mode), **where}))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers."""
        self._try(lambda: self._log(step, values))

    def images(self, step: int, name: str, images: Tensor) -> None:
        """Log a grid of images."""

        def send() -> None:
            import wandb

            self._log(step, {name: wandb.Image(make_grid(images))})

        self._try(send)

    def close(self) -> None:
        """Keep the codes' table as an artifact, and finish the run, unless this is a part of one."""
        self._try(self._finish)
        self.disabled = True

    def _init_run(self, config: DictConfig, init_options: Mapping[str, Any]) -> None:
        import wandb

        root = self.run_dir.absolute().parent if self.subrun else self.run_dir.absolute()
        root.mkdir(parents=True, exist_ok=True)
        plain: Any = OmegaConf.to_container(config, resolve=False)
        memory, active = root / ID_FILE, wandb.run
        known = _read_run_id(memory)
        if active is not None and active.id == known:  # the part before this one
            self.run = active
            self.run.config.update(plain, allow_val_change=True)
            return
        goes_on = known is not None and plain.get("resume", False) is not False
        name = known if goes_on else uuid.uuid4().hex[:8]
        self.run = wandb.init(
            **init_options,
            id=name,
            resume="allow",
            reinit="finish_previous",
            name="/".join(root.parts[-2:]),
            dir=str(root),
            config=plain,
            settings=wandb.Settings(silent=True, console="off"),
        )
        memory.write_text(
            json.dumps({"id": name, "project": init_options["project"], "entity": init_options["entity"]})
        )

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        # wandb's own counter refuses to go back, as after resuming, and to be written twice.
        axis = f"{self.prefix}step"
        named = {f"{self.prefix}{key}": value for key, value in values.items()}
        if not self.defined_metrics:
            self.run.define_metric(axis, hidden=True)
        for key in named.keys() - self.defined_metrics:
            self.run.define_metric(key, step_metric=axis)
        self.defined_metrics |= named.keys()
        self.run.log({axis: step, **named})

    def _finish(self) -> None:
        import wandb

        counts = _code_counts(self.run_dir / "details.json")
        if counts:
            total = sum(counts) or 1
            rows = [[code, count, count / total] for code, count in enumerate(counts)]
            artifact = wandb.Artifact(self._artifact_name("codes"), "codes")
            artifact.add(wandb.Table(columns=["code", "count", "share"], data=rows), "codes")
            self.run.log_artifact(artifact)
        folders = sorted((self.run_dir / "checkpoints").glob("step-*")) if self.checkpoints else []
        for folder in folders[-1:]:
            artifact = wandb.Artifact(
                self._artifact_name("checkpoint"), "model", metadata={"step": int(folder.name[5:])}
            )
            for file in sorted(folder.iterdir()):
                artifact.add_file(str(file))
            self.run.log_artifact(artifact)
        if not self.subrun:
            self.run.finish()

    def _artifact_name(self, kind: str) -> str:
        return "-".join(filter(None, [self.run.id, self.subrun, kind]))

    def _try(self, action: Callable[[], Any]) -> None:
        if self.disabled:
            return
        try:
            action()
        except Exception as error:
            self.disabled = True
            logging.getLogger("vqf").warning("wandb stopped, the run goes on without it: %s", error)


def _resolve_mode(mode: str) -> str:
    if mode != "auto":
        return mode
    return os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")


def _has_key() -> bool:
    """Tell whether `wandb login` or the environment left a key; asking wandb itself could wait for an answer."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _read_run_id(path: Path) -> str | None:
    try:
        return json.loads(path.read_text())["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _code_counts(path: Path) -> list[int]:
    """Return how often held-out images chose every code, where that was counted."""
    try:
        return json.loads(path.read_text())["codes"]["counts"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
