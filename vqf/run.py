"""The command line: `python -m vqf.run model=vqgan data=ffhq pipeline=stage1`.

`main` checks arguments, locks the run's folder and calls Hydra, which calls `run` once per job.
"""

import errno
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from vqf.config.arguments import quote_text_options, quote_unreadable
from vqf.config.compose import check_command, compose_job, config_dir, flags_first, only_prints
from vqf.config.settings import check_config, fill_missing_groups
from vqf.distributed import comm
from vqf.distributed.log_relay import flush_relayed
from vqf.distributed.peer_errors import explain_lost_peers, peer_failure, report_once
from vqf.distributed.process_group import process_group
from vqf.errors import UserError, printable
from vqf.plugins import load_plugins, plugins_from_cli
from vqf.protocols import ChecksStart, Distributed
from vqf.registry import build, find_component, flat_component
from vqf.runs import run_dir
from vqf.runs.lock import folder_lock, unwritable_message
from vqf.terminal import ending_with_reader, muted, printable_stdout

EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 130  # exit codes
DISK_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT}

BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"  # runs jobs in this process

# Every process composes the config, but only the main one may write Hydra's files.
NON_MAIN_OVERRIDES = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
)


_job_started = False  # Hydra has made the folder of the job and called `run`


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
def run(config: DictConfig) -> float | None:
    """Build and run a pipeline."""
    global _job_started
    _job_started = True
    try:
        load_plugins(config.plugins)  # again: a launcher may run this job in a new process
        check_config(config)
        with process_group():
            pipeline = _build_pipeline(fill_missing_groups(config), comm.broadcast_object(run_dir.hydra_output_dir()))
            is_sweep = HydraConfig.get().mode == RunMode.MULTIRUN  # for a single run `main` holds the lock
            with _locked_run_dir(pipeline if is_sweep else None):
                return pipeline.run()
    except UserError as error:
        _fail_job(str(error))
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            raise
        _fail_job(f"disk full: {error}; free disk space and continue with resume=true")
    except RuntimeError as error:
        if message := _failure_of_peer(error):
            _fail_job(message)
        raise


@ending_with_reader()
def main() -> None:
    """Run the command line; a `UserError` ends it with one line and exit status 2."""
    global _job_started
    _job_started = False
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # a bug keeps its full traceback
    try:
        with process_group():
            arguments = quote_unreadable(_cli_arguments())
            load_plugins(plugins_from_cli(arguments))
            sys.argv[1:] = arguments = quote_text_options(arguments)  # those of plugins, too
            check_command(arguments)
            shown = printable_stdout() if only_prints(arguments) else nullcontext()
            with _locked_run_dir(_build_early(arguments)), shown:
                run()
    except UserError as error:
        _exit(EXIT_USER_ERROR, str(error))
    except InterpolationResolutionError as error:
        if user_error := _find_user_error(error):  # raised by the resolver of hydra.run.dir, `choose_run_dir`
            _exit(EXIT_USER_ERROR, str(user_error))
        raise
    except OSError as error:
        if _job_started:
            raise
        _exit(EXIT_USER_ERROR, unwritable_message(error))
    except KeyboardInterrupt:
        _exit(EXIT_INTERRUPTED, "interrupted")
    except RuntimeError as error:
        if message := _failure_of_peer(error):
            _exit(EXIT_USER_ERROR, message)
        raise


def _failure_of_peer(error: RuntimeError) -> str | None:
    """Why another process has ended, if a collective failed for that."""
    return peer_failure() or explain_lost_peers(error)


def _build_early(arguments: Sequence[str]) -> Any:
    """Build the pipeline before Hydra writes into its folder; None if there is nothing to check."""
    config = compose_job(arguments)
    if config is None or (config.run_dir is None and config.resume is False):
        return None
    if not _checks_start(find_component("pipeline", config.pipeline.name).target):
        if config.run_dir is not None:
            run_dir.check_same_pipeline(Path(config.run_dir).expanduser(), config.pipeline.name)
        return None
    HydraConfig.instance().set_config(config)  # `hydra.run.dir` is resolved from it
    folder = comm.broadcast_object(Path(config.hydra.run.dir))
    if config.run_dir is None and not folder.exists():
        return None  # a new folder, named by the time
    without_hydra = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return _build_pipeline(fill_missing_groups(without_hydra), folder)


def _checks_start(pipeline: object) -> bool:
    return isinstance(pipeline, ChecksStart)


@contextmanager
def _locked_run_dir(pipeline: Any) -> Iterator[None]:
    with ExitStack() as stack:
        if _checks_start(pipeline):
            _lock_on_main(pipeline.run_dir, stack)
            with muted():  # the same warnings are logged when the run starts
                pipeline.check_can_start()
            if comm.is_main():
                run_dir.repair_hydra_folder(pipeline.run_dir)
        yield


def _lock_on_main(folder: Path, stack: ExitStack) -> None:
    """A failure raises in all processes."""
    message = None
    try:
        if comm.is_main():
            stack.enter_context(folder_lock(folder))
    except UserError as error:
        message = str(error)
    if message := comm.broadcast_object(message):
        raise UserError(message)


def _find_user_error(error: BaseException | None) -> UserError | None:
    while error is not None and not isinstance(error, UserError):
        error = error.__context__
    return error


def _cli_arguments() -> list[str]:
    arguments = flags_first(sys.argv[1:])
    if comm.world_size() > 1 and {"-m", "--multirun"} & {*arguments}:
        raise UserError("-m: a sweep starts its own processes; run it without torchrun")
    if comm.is_main():
        return arguments
    _silence_process()
    return [*arguments, *NON_MAIN_OVERRIDES]


def _build_pipeline(config: DictConfig, folder: Path) -> Any:
    if not comm.is_main():
        _silence_process()
    pipeline = build("pipeline", flat_component("pipeline", config), config=config, run_dir=folder)
    if comm.world_size() > 1 and not isinstance(pipeline, Distributed):
        raise UserError(f"pipeline={config.pipeline.name} runs in one process; start it without torchrun")
    return pipeline


def _silence_process() -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    warnings.simplefilter("ignore")  # the main process shows them
    log, handler = logging.getLogger("vqf"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"[process {comm.rank()}] %(message)s"))
    log.handlers, log.propagate, log.disabled = [handler], False, False
    log.setLevel(logging.WARNING)


def _fail_job(message: str) -> NoReturn:
    job = HydraConfig.get()
    prefix = f"#{job.job.num} {' '.join(job.overrides.task)}: " if job.mode == RunMode.MULTIRUN else ""
    if comm.is_main():
        flush_relayed()  # log records of the other processes
        for line in message.splitlines():
            logging.getLogger("vqf.failure").error("%s", line)  # goes to log.txt only
    if prefix and job.launcher._target_ != BASIC_LAUNCHER:
        raise UserError(*f"{prefix}{message}".splitlines())  # the launcher re-raises it in the process of the sweep
    _exit(EXIT_USER_ERROR, message, prefix)


def _exit(status: int, message: str, prefix: str = "") -> NoReturn:
    """Only the first process that gets here prints."""
    text = printable(f"{prefix}{message}", keep="\n")
    report_once(lambda: print(text, file=sys.stderr, flush=True), message)
    sys.exit(status)


if __name__ == "__main__":
    main()
