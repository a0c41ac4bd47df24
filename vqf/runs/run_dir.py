"""Chooses the folder of a run: `outputs/<model>-<data>/<time>`, or that of the run it resumes.

It registers the OmegaConf resolver `vqf.run_dir`.
"""

from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vqf.config.untrusted import check_symlinks
from vqf.errors import UserError
from vqf.run_files.aside import make_way, set_aside
from vqf.run_files.yaml_file import read_yaml
from vqf.runs.checkpoint import CHECKPOINTS_FOLDER, run_dir_of

OUTPUTS = Path("outputs")
TIME_FORMAT = "%Y-%m-%d_%H-%M-%S-%f"  # with microseconds: two runs may start in the same second
HYDRA_FILE = Path(".hydra") / "hydra.yaml"
STANDALONE_PIPELINES = {"compare"}  # without a model or data to name the folder by


def choose_run_dir(run_dir: str | None, run: str | None, resume: bool | str, name: str, pipeline: str) -> str:
    """Choose the folder that a run writes.

    Args:
        run_dir: Value of `run_dir=`; overrides everything else.
        run: Value of `run=`; the new folder is made beside it.
        resume: A run's folder, a checkpoint, or True: the newest run of this name and pipeline.

    Raises:
        UserError: If a symbolic link leads out of the folder.
    """
    chosen = _resolve_run_dir(run_dir, run, resume, name, pipeline)
    check_symlinks(chosen.expanduser())
    return str(chosen)


def _resolve_run_dir(run_dir: str | None, run: str | None, resume: bool | str, name: str, pipeline: str) -> Path:
    if run_dir is not None:
        return Path(run_dir).expanduser()
    if isinstance(resume, str):
        return run_dir_of(Path(resume).expanduser())
    # The name comes from the names of preset files, which may be somebody else's.
    name = "/".join(part for part in name.split("/") if part not in ("", ".."))
    parent = OUTPUTS / (_sibling_name(run) or (pipeline if pipeline in STANDALONE_PIPELINES else name))
    newest = _latest_run(parent, pipeline) if resume else None
    return newest or parent / datetime.now().strftime(TIME_FORMAT)


def check_same_pipeline(folder: Path, pipeline: str) -> None:
    """Refuse a folder of another pipeline.

    Raises:
        UserError: If `.hydra` or a checkpoint names one.
    """
    other = next(_recorded_pipelines(folder), None)
    if other not in (None, pipeline):
        raise UserError(
            f"run_dir={folder}: holds a run of pipeline={other}, which pipeline={pipeline} would overwrite; "
            "give another run_dir, or none to get a new folder"
        )


def repair_hydra_folder(run_dir: Path) -> None:
    """Set aside what keeps Hydra from writing its files into the folder of a run."""
    folder = run_dir / HYDRA_FILE.parent
    if folder.exists() and not folder.is_dir():
        set_aside(folder, "is no folder")
    for path in folder.glob("*.yaml"):
        make_way(path)


def hydra_output_dir() -> Path:
    """Output folder of the current Hydra job."""
    return Path(HydraConfig.get().runtime.output_dir)


def _sibling_name(run: str | None) -> str | None:
    if run is None:
        return None
    folder = run_dir_of(Path(run).expanduser().resolve())
    return folder.parent.name if folder.parent.parent.name == OUTPUTS.name else None


def _latest_run(folder: Path, pipeline: str) -> Path | None:
    runs = sorted(folder.glob("*/"), reverse=True)
    return next((run for run in runs if next(_recorded_pipelines(run), None) == pipeline), None)


def _recorded_pipelines(run: Path) -> Iterator[str]:
    yield from _recorded_value(run / HYDRA_FILE, "hydra.runtime.choices.pipeline")
    for path in run.rglob(f"{CHECKPOINTS_FOLDER}/step-*/config.yaml"):
        yield from _recorded_value(path, "pipeline.name")


def _recorded_value(path: Path, config_key: str) -> Iterator[str]:
    with suppress(OSError, ValueError, OmegaConfBaseException):
        if (value := OmegaConf.select(read_yaml(path), config_key)) is not None:
            yield str(value)


# Cached per config, so that the time is read once per run, or once per sweep.
OmegaConf.register_new_resolver("vqf.run_dir", choose_run_dir, use_cache=True, replace=True)
