"""Train, sample, evaluate: `python -m vqf.run model=vqgan data=ffhq`."""

import errno
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from vqf.config.compose import check_command, compose_job, config_dir, flags_first
from vqf.config.settings import check_config, fill_missing_groups
from vqf.distributed import comm
from vqf.distributed.log_relay import flush_relayed
from vqf.distributed.peer_errors import peer_failure, report_once
from vqf.distributed.process_group import process_group
from vqf.errors import UserError
from vqf.plugins import load_plugins, plugins_from_cli
from vqf.registry import build, components, flat_component
from vqf.runs import run_dir
from vqf.runs.lock import folder_lock, unwritable_message
from vqf.terminal import muted

EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130  # exit status
DISK_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT}

BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"  # the other launchers start processes

# Of several processes each composes the config; only the first may write Hydra's files.
NON_MAIN_OVERRIDES = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
)


_job_started = False  # whether Hydra has made its folder, and the job runs


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
def run(config: DictConfig) -> float | None:
    """Run the pipeline that a composed config chooses."""
    global _job_started
    _job_started = True
    try:
        load_plugins(config.plugins)  # a launcher may have started this job in a fresh process
        check_config(config)
        with process_group():
            pipeline = _build_pipeline(fill_missing_groups(config), comm.broadcast_object(run_dir.hydra_output_dir()))
            sweeps = HydraConfig.get().mode == RunMode.MULTIRUN  # a single run is admitted before Hydra begins
            with _locked_run_dir(pipeline if sweeps else None):
                return pipeline.run()
    except UserError as error:
        _fail_job(str(error))
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
        _fail_job(f"no room left on the disk: {error}; make some, and go on with resume=true")
    except RuntimeError:
        if words := peer_failure():  # what broke is the connection to the process that said so
            _fail_job(words)
        raise


def main() -> None:
    """Run the command line; a mistake of the user's ends it with one line and status 2."""
    global _job_started
    _job_started = False
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # a bug keeps its whole traceback
    try:
        with process_group():
            sys.argv[1:] = arguments = _cli_arguments()
            load_plugins(plugins_from_cli(arguments))
            check_command(arguments)
            with _locked_run_dir(_build_early(arguments)):
                run()
    except UserError as error:
        _exit(EXIT_USER_ERROR, str(error))
    except InterpolationResolutionError as error:
        if mistake := _find_user_error(error):  # of the folder that Hydra asks for
            _exit(EXIT_USER_ERROR, str(mistake))
        raise
    except OSError as error:
        if _job_started:
            raise
        _exit(EXIT_USER_ERROR, unwritable_message(error))
    except KeyboardInterrupt:
        _exit(EXIT_INTERRUPTED, "interrupted")


def _build_early(arguments: Sequence[str]) -> Any:
    """Build the pipeline of a command that may meet a run in its folder, before Hydra writes there."""
    config = compose_job(arguments)
    if config is None or (config.run_dir is None and config.resume is False):
        return None
    if not _checks_start(config.pipeline.name):
        if config.run_dir is not None:
            run_dir.check_same_pipeline(Path(config.run_dir).expanduser(), config.pipeline.name)
        return None
    HydraConfig.instance().set_config(config)  # which `hydra.run.dir` is composed from
    folder = comm.broadcast_object(Path(config.hydra.run.dir))
    if config.run_dir is None and not folder.exists():
        return None  # a new one, named by the time
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return _build_pipeline(fill_missing_groups(own), folder)


def _checks_start(name: str) -> bool:
    return any(each.name == name and hasattr(each.target, "check_can_start") for each in components("pipeline"))


@contextmanager
def _locked_run_dir(pipeline: Any) -> Iterator[None]:
    """Let a pipeline that trains have its folder for itself, and refuse what would spoil the run in it."""
    with ExitStack() as stack:
        if hasattr(pipeline, "check_can_start"):
            _lock_on_main(pipeline.run_dir, stack)
            with muted():  # the run says it again
                pipeline.check_can_start()
        yield


def _lock_on_main(folder: Path, stack: ExitStack) -> None:
    """Hold a folder in the first process; all end if it cannot."""
    words = None
    try:
        if comm.is_main():
            stack.enter_context(folder_lock(folder))
    except UserError as error:
        words = str(error)
    if words := comm.broadcast_object(words):
        raise UserError(words)


def _find_user_error(error: BaseException | None) -> UserError | None:
    """Find the mistake that is behind an error of OmegaConf's."""
    while error is not None and not isinstance(error, UserError):
        error = error.__context__
    return error


def _cli_arguments() -> list[str]:
    """Return the command line as Hydra wants it."""
    given = flags_first(sys.argv[1:])
    if comm.world_size() > 1 and {"-m", "--multirun"} & {*given}:
        raise UserError("-m: the jobs of a sweep start processes of their own; start it without torchrun")
    if comm.is_main():
        return given
    _silence_process()
    return [*given, *NON_MAIN_OVERRIDES]


def _build_pipeline(config: DictConfig, folder: Path) -> Any:
    if not comm.is_main():
        _silence_process()
    pipeline = build("pipeline", flat_component("pipeline", config), config=config, run_dir=folder)
    if comm.world_size() > 1 and not getattr(pipeline, "distributed", False):
        raise UserError(f"pipeline={config.pipeline.name} works in one process; start it without torchrun")
    return pipeline


def _silence_process() -> None:
    """Let this process say nothing but warnings of its own, to the terminal."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    warnings.simplefilter("ignore")  # the first process shows them
    log, said = logging.getLogger("vqf"), logging.StreamHandler()
    said.setFormatter(logging.Formatter(f"[process {comm.rank()}] %(message)s"))
    log.handlers, log.propagate, log.disabled = [said], False, False
    log.setLevel(logging.WARNING)


def _fail_job(message: str) -> NoReturn:
    """End a job whose mistake showed only while it ran."""
    job = HydraConfig.get()
    where = f"#{job.job.num} {' '.join(job.overrides.task)}: " if job.mode == RunMode.MULTIRUN else ""
    if comm.is_main():
        flush_relayed()  # what led to it, in the others
        logging.getLogger("vqf.failure").error("%s", message)  # for log.txt alone
    if where and job.launcher._target_ != BASIC_LAUNCHER:
        raise UserError(f"{where}{message}")  # which the launcher carries to the process that said -m
    _exit(EXIT_USER_ERROR, message, where)


def _exit(status: int, message: str, where: str = "") -> NoReturn:
    """Say why a command ends, in the first process that comes here."""
    report_once(lambda: print(f"{where}{message}", file=sys.stderr, flush=True), message)
    sys.exit(status)


if __name__ == "__main__":
    main()
