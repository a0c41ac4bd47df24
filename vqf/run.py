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

from vqf.config.compose import check_command, compose_job, config_dir, ordered
from vqf.config.settings import check_config, complete
from vqf.distributed import comm
from vqf.distributed.log_relay import pass_on
from vqf.errors import UserError
from vqf.plugins import load_plugins, requested
from vqf.registry import build, components, flat_node
from vqf.runs import run_dir
from vqf.runs.lock import held, unwritable
from vqf.terminal import silent

MISTAKE, INTERRUPTED = 2, 130  # exit status
FULL = {errno.ENOSPC, errno.EDQUOT}

OWN_PROCESS = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"  # the other launchers start processes

# Of several processes each composes the config; only the first may write Hydra's files.
FOLLOWER = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
)


_began = False  # whether Hydra has made its folder, and the job runs


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
def run(config: DictConfig) -> float | None:
    """Run the pipeline that a composed config chooses."""
    global _began
    _began = True
    try:
        load_plugins(config.plugins)  # a launcher may have started this job in a fresh process
        check_config(config)
        with comm.together():
            pipeline = _pipeline(complete(config), comm.same(run_dir.output_dir()))
            sweeps = HydraConfig.get().mode == RunMode.MULTIRUN  # a single run is admitted before Hydra begins
            with _admitted(pipeline if sweeps else None):
                return pipeline.run()
    except UserError as error:
        _stop(str(error))
    except OSError as error:
        if error.errno not in FULL:
            raise
        _stop(f"no room left on the disk: {error}; make some, and go on with resume=true")
    except RuntimeError:
        if words := comm.overheard():  # what broke is the connection to the process that said so
            _stop(words)
        raise


def main() -> None:
    """Run the command line; a mistake of the user's ends it with one line and status 2."""
    global _began
    _began = False
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # a bug keeps its whole traceback
    try:
        with comm.together():
            sys.argv[1:] = arguments = _arguments()
            load_plugins(requested(arguments))
            check_command(arguments)
            with _admitted(_early(arguments)):
                run()
    except UserError as error:
        _end(MISTAKE, str(error))
    except InterpolationResolutionError as error:
        if mistake := _within(error):  # of the folder that Hydra asks for
            _end(MISTAKE, str(mistake))
        raise
    except OSError as error:
        if _began:
            raise
        _end(MISTAKE, unwritable(error))
    except KeyboardInterrupt:
        _end(INTERRUPTED, "interrupted")


def _early(arguments: Sequence[str]) -> Any:
    """Build the pipeline of a command that may meet a run in its folder, before Hydra writes there."""
    config = compose_job(arguments)
    if config is None or (config.run_dir is None and config.resume is False):
        return None
    if not _refuses(config.pipeline.name):
        if config.run_dir is not None:
            run_dir.check_own(Path(config.run_dir).expanduser(), config.pipeline.name)
        return None
    HydraConfig.instance().set_config(config)  # which `hydra.run.dir` is composed from
    folder = comm.same(Path(config.hydra.run.dir))
    if config.run_dir is None and not folder.exists():
        return None  # a new one, named by the time
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return _pipeline(complete(own), folder)


def _refuses(name: str) -> bool:
    return any(each.name == name and hasattr(each.target, "refuse") for each in components("pipeline"))


@contextmanager
def _admitted(pipeline: Any) -> Iterator[None]:
    """Let a pipeline that trains have its folder for itself, and refuse what would spoil the run in it."""
    with ExitStack() as stack:
        if hasattr(pipeline, "refuse"):
            _hold(pipeline.run_dir, stack)
            with silent():  # the run says it again
                pipeline.refuse()
        yield


def _hold(folder: Path, stack: ExitStack) -> None:
    """Hold a folder in the first process; all end if it cannot."""
    words = None
    try:
        if comm.first():
            stack.enter_context(held(folder))
    except UserError as error:
        words = str(error)
    if words := comm.same(words):
        raise UserError(words)


def _within(error: BaseException | None) -> UserError | None:
    """Find the mistake that is behind an error of OmegaConf's."""
    while error is not None and not isinstance(error, UserError):
        error = error.__context__
    return error


def _arguments() -> list[str]:
    """Return the command line as Hydra wants it."""
    given = ordered(sys.argv[1:])
    if comm.world() > 1 and {"-m", "--multirun"} & {*given}:
        raise UserError("-m: the jobs of a sweep start processes of their own; start it without torchrun")
    if comm.first():
        return given
    _quieten()
    return [*given, *FOLLOWER]


def _pipeline(config: DictConfig, folder: Path) -> Any:
    if not comm.first():
        _quieten()
    pipeline = build("pipeline", flat_node("pipeline", config), config=config, run_dir=folder)
    if comm.world() > 1 and not getattr(pipeline, "parallel", False):
        raise UserError(f"pipeline={config.pipeline.name} works in one process; start it without torchrun")
    return pipeline


def _quieten() -> None:
    """Let this process say nothing but warnings of its own, to the terminal."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    warnings.simplefilter("ignore")  # the first process shows them
    log, said = logging.getLogger("vqf"), logging.StreamHandler()
    said.setFormatter(logging.Formatter(f"[process {comm.rank()}] %(message)s"))
    log.handlers, log.propagate, log.disabled = [said], False, False
    log.setLevel(logging.WARNING)


def _stop(words: str) -> NoReturn:
    """End a job whose mistake showed only while it ran."""
    job = HydraConfig.get()
    where = f"#{job.job.num} {' '.join(job.overrides.task)}: " if job.mode == RunMode.MULTIRUN else ""
    if comm.first():
        pass_on()  # what led to it, in the others
        logging.getLogger("vqf.failure").error("%s", words)  # for log.txt alone
    if where and job.launcher._target_ != OWN_PROCESS:
        raise UserError(f"{where}{words}")  # which the launcher carries to the process that said -m
    _end(MISTAKE, words, where)


def _end(status: int, words: str, where: str = "") -> NoReturn:
    """Say why a command ends, in the first process that comes here."""
    comm.once(lambda: print(f"{where}{words}", file=sys.stderr, flush=True), words)
    sys.exit(status)


if __name__ == "__main__":
    main()
