"""Turn a checkpoint of another project into a run."""

from pathlib import Path
from typing import Literal

from omegaconf import DictConfig, open_dict

from vqf.batch import Size, pair
from vqf.config.access import DEFAULT_IMAGE_SIZE, image_size
from vqf.config.inherit import cli_keys
from vqf.errors import name_first
from vqf.interop.import_model import ImportedCheckpoint, import_checkpoint
from vqf.interop.priors import ImportOptions
from vqf.options.ranges import PositiveInt
from vqf.pipelines.importing.presets import PRESETS_DIR
from vqf.pipelines.importing.run_writer import condition_run_dir, save_run
from vqf.registry import find_component, register
from vqf.runs.resume import check_not_overwriting
from vqf.terminal import log

REPORT_NAME = "import-report.txt"


@register("pipeline", "import")
class Import:
    """Turn a checkpoint of another project into a run that sample, reconstruct, stage2 and vqf.load accept.

    Args:
        path: Checkpoint file, or the folder of a diffusers or transformers model.
        source: Project whose layout the file has; auto recognizes it by the names of the tensors.
        yaml: Config file that describes the model, read as data; by default a file beside it with a usual name.
        heads: Attention heads of the transformer, if the config file does not say; 16 by default.
        classes: Number of classes of a class-conditional transformer, if the config file does not say; none by
            default.
    """

    def __init__(
        self,
        config: DictConfig,
        run_dir: Path,
        *,
        path: str,
        source: Literal["auto", "taming", "ldm", "llamagen", "diffusers", "janus"] = "auto",
        yaml: str | None = None,
        heads: PositiveInt | None = None,
        classes: PositiveInt | None = None,
    ) -> None:
        self.config, self.run_dir, self.source = config, run_dir, source
        self.path = Path(path).expanduser()
        self.yaml = None if yaml is None else Path(yaml).expanduser()
        self.options = ImportOptions(heads, classes)

    def run(self) -> None:
        """Write the run, a report, and the run of the condition maps' tokenizer.

        Raises:
            UserError: If a folder holds a run, or the import fails.
        """
        check_not_overwriting(self.run_dir)
        check_not_overwriting(condition_run_dir(self.run_dir))
        imported = import_checkpoint(
            self.path, source=self.source, yaml=self.yaml, size=self._size(), options=self.options
        )
        config = self._config_without_options()
        save_run(imported, config, self.run_dir)
        (self.run_dir / REPORT_NAME).write_text(imported.report.text())
        self._log_result(imported)

    def _log_result(self, imported: ImportedCheckpoint) -> None:
        for line in imported.report.summary():
            log.info("%s", line)
        if imported.report.unknown_tensors:
            log.warning("%d unknown tensors were not imported", len(imported.report.unknown_tensors))
        if nonfinite := imported.nonfinite_tensors():
            log.warning("%s: not all values are finite, nor will the model's outputs be", name_first(nonfinite))
        log.info("%s run in %s; %s lists every tensor", imported.kind, self.run_dir, REPORT_NAME)
        if imported.kind == "stage1":
            arguments = f"--config-dir {self.run_dir / PRESETS_DIR} experiment=imported resume={self.run_dir}"
            log.info("to continue training: python -m vqf.run %s steps=... data=...", arguments)

    def _size(self) -> Size | None:
        size = image_size(self.config)
        return size if "image_size" in cli_keys() or size != pair(DEFAULT_IMAGE_SIZE) else None

    def _config_without_options(self) -> DictConfig:
        config = self.config.copy()
        with open_dict(config):
            for option in find_component("pipeline", "import").options:
                config.pop(option, None)
        return config
