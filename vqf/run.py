"""Train, sample, evaluate: `python -m vqf.run model=vqgan data=ffhq`."""

import errno
import logging
import os
import sys
import warnings
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import InterpolationResolutionError

from vqf import folders, ranks
from vqf.command import check_command, config_dir, ordered
from vqf.errors import UserError
from vqf.pipelines.faults import pass_on
from vqf.plugins import load_plugins, requested
from vqf.registry import build, flat_node
from vqf.settings import check_config, complete

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


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
def run(config: DictConfig) -> float | None:
    """Run the pipeline that a composed config chooses."""
    try:
        load_plugins(config.plugins)  # a launcher may have started this job in a fresh process
        check_config(config)
        with ranks.together():
            return _pipeline(complete(config)).run()
    except UserError as error:
        _stop(str(error))
    except OSError as error:
        if error.errno not in FULL:
            raise
        _stop(f"no room left on the disk: {error}; make some, and go on with resume=true")
    except RuntimeError:
        if words := ranks.overheard():  # what broke is the connection to the process that said so
            _stop(words)
        raise


def main() -> None:
    """Run the command line; a mistake of the user's ends it with one line and status 2."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # a bug keeps its whole traceback
    try:
        with ranks.together():
            sys.argv[1:] = arguments = _arguments()
            load_plugins(requested(arguments))
            check_command(arguments)
            run()
    except UserError as error:
        _end(MISTAKE, str(error))
    except InterpolationResolutionError as error:
        if mistake := _within(error):  # of the folder that Hydra asks for
            _end(MISTAKE, str(mistake))
        raise
    except KeyboardInterrupt:
        _end(INTERRUPTED, "interrupted")


def _within(error: BaseException | None) -> UserError | None:
    """Find the mistake that is behind an error of OmegaConf's."""
    while error is not None and not isinstance(error, UserError):
        error = error.__context__
    return error


def _arguments() -> list[str]:
    """Return the command line as Hydra wants it."""
    given = ordered(sys.argv[1:])
    if ranks.world() > 1 and {"-m", "--multirun"} & {*given}:
        raise UserError("-m: the jobs of a sweep start processes of their own; start it without torchrun")
    if ranks.first():
        return given
    _quieten()
    return [*given, *FOLLOWER]


def _pipeline(config: DictConfig) -> Any:
    if not ranks.first():
        _quieten()
    pipeline = build("pipeline", flat_node("pipeline", config), config=config, run_dir=ranks.same(folders.output_dir()))
    if ranks.world() > 1 and not getattr(pipeline, "parallel", False):
        raise UserError(f"pipeline={config.pipeline.name} works in one process; start it without torchrun")
    return pipeline


def _quieten() -> None:
    """Let this process say nothing but warnings of its own, to the terminal."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    warnings.simplefilter("ignore")  # the first process shows them
    log, said = logging.getLogger("vqf"), logging.StreamHandler()
    said.setFormatter(logging.Formatter(f"[process {ranks.rank()}] %(message)s"))
    log.handlers, log.propagate, log.disabled = [said], False, False
    log.setLevel(logging.WARNING)


def _stop(words: str) -> NoReturn:
    """End a job whose mistake showed only while it ran."""
    job = HydraConfig.get()
    where = f"#{job.job.num} {' '.join(job.overrides.task)}: " if job.mode == RunMode.MULTIRUN else ""
    if ranks.first():
        pass_on()  # what led to it, in the others
        logging.getLogger("vqf.failure").error("%s", words)  # for log.txt alone
    if where and job.launcher._target_ != OWN_PROCESS:
        raise UserError(f"{where}{words}")  # which the launcher carries to the process that said -m
    _end(MISTAKE, words, where)


def _end(status: int, words: str, where: str = "") -> NoReturn:
    """Say why a command ends, in the first process that comes here."""
    ranks.once(lambda: print(f"{where}{words}", file=sys.stderr, flush=True), words)
    sys.exit(status)


if __name__ == "__main__":
    main()
