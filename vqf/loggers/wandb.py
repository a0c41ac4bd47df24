"""Weights & Biases, https://docs.wandb.ai."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from vqf.loggers.pictures import grid
from vqf.registry import register


@register("logger", "wandb")
class WandB:
    """Sends numbers and pictures to Weights & Biases, or keeps them in the run's folder for `wandb sync`.

    Whatever goes wrong in it is said once, and the run goes on without it. The key comes from `wandb login` or
    the environment, never from the config, which is logged unresolved.
    """

    def __init__(
        self,
        run_dir: Path,
        config: DictConfig,
        *,
        mode: Literal["offline", "online", "disabled"] = "offline",
        project: str = "vqf",
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        self.run: Any = None
        self.quiet = False
        where: dict[str, Any] = {"project": project, "entity": entity, "group": group, "tags": list(tags) or None}
        self._try(lambda: self._begin(run_dir, config, {"mode": mode, **where}))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers."""
        self._try(lambda: self.run.log({"step": step, **values}))

    def images(self, step: int, name: str, images: Tensor) -> None:
        """Log a grid of pictures."""

        def send() -> None:
            import wandb

            self.run.log({"step": step, name: wandb.Image(grid(images))})

        self._try(send)

    def close(self) -> None:
        """Finish the run."""
        self._try(lambda: self.run.finish())
        self.quiet = True

    def _begin(self, run_dir: Path, config: DictConfig, where: Mapping[str, Any]) -> None:
        import wandb

        plain: Any = OmegaConf.to_container(config, resolve=False)
        run_dir.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            **where,
            name="/".join(run_dir.absolute().parts[-2:]),
            dir=str(run_dir),
            config=plain,
            settings=wandb.Settings(silent=True, console="off"),
        )
        # wandb's own counter refuses to go back, as after resuming, and to be written twice.
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")

    def _try(self, action: Callable[[], Any]) -> None:
        if self.quiet:
            return
        try:
            action()
        except Exception as error:
            self.quiet = True
            logging.getLogger("vqf").warning("wandb stopped, the run goes on without it: %s", error)
