"""A checkpoint of another project, in as a run of vqf's; `export` is the way out."""

from pathlib import Path
from typing import Literal

from omegaconf import DictConfig, open_dict

from vqf.interop.priors import Asked
from vqf.interop.reading import Read, read
from vqf.pipelines.common import DEFAULT_IMAGE_SIZE, image_size
from vqf.pipelines.imported import PRESETS, beside, save_run
from vqf.pipelines.inherit import given
from vqf.pipelines.resume import refuse_to_overwrite
from vqf.protocols import Size, pair
from vqf.registry import find, register
from vqf.terminal import log

REPORT = "import-report.txt"


@register("pipeline", "import")
class Import:
    """Turn a checkpoint of another project into a run that sample, reconstruct, stage2 and vqf.load accept.

    Args:
        path: A file, or the folder of a model of diffusers or transformers.
        source: Whose layout it has; auto tells by the names of its tensors.
        yaml: The settings that describe it, read as data; by default a file beside it under a usual name.
        heads: Of its transformer, where those settings do not say; 16 by default.
        classes: Of its class-conditional transformer, where those settings do not say; none by default.
    """

    def __init__(
        self,
        config: DictConfig,
        run_dir: Path,
        *,
        path: str,
        source: Literal["auto", "taming", "ldm", "llamagen", "diffusers", "janus"] = "auto",
        yaml: str | None = None,
        heads: int | None = None,
        classes: int | None = None,
    ) -> None:
        self.config, self.run_dir, self.source = config, run_dir, source
        self.path = Path(path).expanduser()
        self.yaml = None if yaml is None else Path(yaml).expanduser()
        self.asked = Asked(heads, classes)

    def run(self) -> None:
        """Write the run, a report on every tensor, and a run beside it for the tokenizer of a condition.

        Raises:
            UserError: If either folder holds a run already.
        """
        refuse_to_overwrite(self.run_dir)
        refuse_to_overwrite(beside(self.run_dir))
        found = read(self.path, source=self.source, yaml=self.yaml, size=self._size(), asked=self.asked)
        config = self._without_options()
        save_run(found, config, self.run_dir)
        (self.run_dir / REPORT).write_text(found.report.text())
        self._tell(found)

    def _tell(self, found: Read) -> None:
        for line in found.report.summary():
            log.info("%s", line)
        if found.report.strange:
            log.warning("%d tensors that vqf does not know were left", len(found.report.strange))
        if broken := found.broken():
            more = f" and {len(broken) - 1} more" if broken[1:] else ""
            log.warning(
                "'%s'%s: not all numbers in it are finite; what it computes will not be, either", broken[0], more
            )
        log.info("a %s run in %s; what became of every tensor in %s", found.kind, self.run_dir, REPORT)
        if found.kind == "stage1":
            words = f"--config-dir {self.run_dir / PRESETS} experiment=imported resume={self.run_dir}"
            log.info("to train it on: python -m vqf.run %s steps=... data=...", words)

    def _size(self) -> Size | None:
        """Return the size of pictures that the user chose; None where it is the default of the command line."""
        size = image_size(self.config)
        return size if "image_size" in given() or size != pair(DEFAULT_IMAGE_SIZE) else None

    def _without_options(self) -> DictConfig:
        config = self.config.copy()
        with open_dict(config):
            for option in find("pipeline", "import").options:
                config.pop(option, None)
        return config
