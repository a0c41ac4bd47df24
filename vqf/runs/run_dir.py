"""Which folder a run writes, `outputs/<model>-<data>/<time>` or the one that it goes on with, and that it does alone.

conf/config.yaml asks for it as `${vqf.run_dir:...}`; importing this module is what makes that word known.
"""

from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vqf.config.untrusted import check_symlinks
from vqf.errors import UserError
from vqf.runs.checkpoint import CHECKPOINTS_FOLDER, run_dir_of

OUTPUTS = Path("outputs")
TIME_FORMAT = "%Y-%m-%d_%H-%M-%S-%f"  # microseconds, or two runs of one second would share a folder
HYDRA_FILE = Path(".hydra") / "hydra.yaml"
STANDALONE_PIPELINES = {"compare"}  # pipelines that have no model or data of their own to name a folder by


def choose_run_dir(run_dir: str | None, run: str | None, resume: bool | str, name: str, pipeline: str) -> str:
    """Return the folder that a run writes.

    Args:
        run_dir: What the user named; wins over everything.
        run: A run that a pipeline acts on: the new folder lies beside it.
        resume: A folder or one of its checkpoints to go on with, or True for the newest of this name and pipeline.
        name: Names the folder of this and similar runs.
        pipeline: What runs; `resume=true` must not go on with a folder of samples.

    Raises:
        UserError: If there is a link in it that leads out of it.
    """
    chosen = _resolve_run_dir(run_dir, run, resume, name, pipeline)
    check_symlinks(chosen.expanduser())
    return str(chosen)


def _resolve_run_dir(run_dir: str | None, run: str | None, resume: bool | str, name: str, pipeline: str) -> Path:
    if run_dir is not None:
        return Path(run_dir)
    if isinstance(resume, str):
        return run_dir_of(Path(resume).expanduser())
    name = "/".join(part for part in name.split("/") if part not in ("", ".."))  # what a file of presets is called
    here = OUTPUTS / (_sibling_name(run) or (pipeline if pipeline in STANDALONE_PIPELINES else name))
    newest = _latest_run(here, pipeline) if resume else None
    return newest or here / datetime.now().strftime(TIME_FORMAT)


def check_same_pipeline(folder: Path, pipeline: str) -> None:
    """Refuse to let a pipeline write over the record of a run that another one made.

    Raises:
        UserError: If another pipeline made the run in the folder.
    """
    other = next(_recorded_pipelines(folder), None)
    if other not in (None, pipeline):
        raise UserError(
            f"run_dir={folder}: holds a run of pipeline={other}, whose record pipeline={pipeline} would overwrite; "
            "give another run_dir, or none for a new one"
        )


def hydra_output_dir() -> Path:
    """Return the folder of the Hydra job that runs."""
    return Path(HydraConfig.get().runtime.output_dir)


def _sibling_name(run: str | None) -> str | None:
    """Name the folder of runs that `run` lies in, if it is one of ours."""
    if run is None:
        return None
    folder = run_dir_of(Path(run).expanduser().resolve())
    return folder.parent.name if folder.parent.parent.name == OUTPUTS.name else None


def _latest_run(folder: Path, pipeline: str) -> Path | None:
    runs = sorted(folder.glob("*/"), reverse=True)
    return next((run for run in runs if next(_recorded_pipelines(run), None) == pipeline), None)


def _recorded_pipelines(run: Path) -> Iterator[str]:
    """Yield which pipeline made a run, as Hydra's file says, or as its checkpoints do.

    A process that was killed while it began again may have left half a file of Hydra's.
    """
    yield from _recorded_value(run / HYDRA_FILE, "hydra.runtime.choices.pipeline")
    for path in run.rglob(f"{CHECKPOINTS_FOLDER}/step-*/config.yaml"):
        yield from _recorded_value(path, "pipeline.name")


def _recorded_value(path: Path, config_key: str) -> Iterator[str]:
    with suppress(OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException):
        if (found := OmegaConf.select(OmegaConf.load(path), config_key)) is not None:
            yield str(found)


# Cached with the config that asks, so that the time is read once in a run and once in a sweep.
OmegaConf.register_new_resolver("vqf.run_dir", choose_run_dir, use_cache=True, replace=True)
