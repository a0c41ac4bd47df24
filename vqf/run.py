"""Train, sample, evaluate: `python -m vqf.run model=vqgan data=ffhq`."""

import logging
import os
import sys
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from vqf import folders
from vqf.command import check_command, config_dir, ordered
from vqf.errors import UserError
from vqf.plugins import load_plugins, requested
from vqf.registry import build, flat_node
from vqf.settings import check_config, complete

MISTAKE, INTERRUPTED = 2, 130  # exit status

# Under torchrun every process composes the config; only the first may write Hydra's files.
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
        config = complete(config)
        pipeline = build("pipeline", flat_node("pipeline", config), config=config, run_dir=folders.output_dir())
        return pipeline.run()
    except UserError as error:
        _stop(error)


def main() -> None:
    """Run the command line; a mistake of the user's ends it with one line and status 2."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # a bug keeps its whole traceback
    sys.argv[1:] = arguments = [*ordered(sys.argv[1:]), *(FOLLOWER if _follows() else ())]
    try:
        load_plugins(requested(arguments))
        check_command(arguments)
        run()
    except UserError as error:
        if not _follows():  # all processes make the same mistake
            print(error, file=sys.stderr)
        sys.exit(MISTAKE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _stop(error: UserError) -> NoReturn:
    """End a job whose mistake showed only while it ran."""
    job = HydraConfig.get()
    where = f"#{job.job.num} {' '.join(job.overrides.task)}: " if job.mode == RunMode.MULTIRUN else ""
    logging.getLogger("vqf.failure").error("%s", error)  # for log.txt alone
    print(f"{where}{error}", file=sys.stderr)
    sys.exit(MISTAKE)


def _follows() -> bool:
    return int(os.environ.get("RANK", 0)) > 0


if __name__ == "__main__":
    main()
