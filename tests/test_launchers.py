"""Sweeps whose jobs are processes of a launcher, and the examples for SLURM. Plugins load again inside each job."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf

from tests.support.processes import free_port
from vqf.config.compose import Composer, check_command

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TOY = ROOT / "tests" / "support" / "toy.py"
LAUNCHERS = {
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"],
    "ray": ["hydra/launcher=ray", "+hydra.launcher.ray.init.include_dashboard=false"],
}
SMALL = [
    *("model=small", "image_size=16", "batch_size=2", "evaluate.count=2", "device=cpu", "logger=[]", "metric=[psnr]"),
    *("model.encoder.channels=8", "model.decoder.channels=8", "model/loss=[charbonnier]", "workers=0"),
]

pytestmark = pytest.mark.slow


@pytest.fixture(params=LAUNCHERS)
def launcher(request: pytest.FixtureRequest) -> str:
    """A launcher; ray's is an extra of its own."""
    if request.param == "ray" and not find_spec("hydra_plugins.hydra_ray_launcher"):
        pytest.skip('pip install -e ".[ray]"')
    return request.param


def started(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command with vqf on the path."""
    home = {
        "HOME": str(folder),
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{ROOT}:{EXAMPLES}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(command, cwd=folder, env=home | variables, capture_output=True, text=True, timeout=500)


def vqf(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return started([sys.executable, "-m", "vqf.run", *arguments], folder)


def steps_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def test_a_sweep_with_plugins_trains_and_resumes(launcher: str, tmp_path: Path) -> None:
    plugins = f"plugins=[{EXAMPLES}/lattice.py,my_components.losses]"
    sweep = ["-m", *LAUNCHERS[launcher], plugins, "model/quantizer=lattice", "model.quantizer.levels=3,5", *SMALL]
    first = vqf(*sweep, "run_dir=sweep", "steps=2", folder=tmp_path)
    assert first.returncode == 0, first.stderr
    for job, levels in (("0", 3), ("1", 5)):
        run = tmp_path / "sweep" / job
        assert steps_of(run) == ["step-00000002"]
        config = OmegaConf.load(run / "checkpoints" / "step-00000002" / "config.yaml")
        assert config.model.quantizer == {"name": "lattice", "dim": 4, "levels": levels}
        assert list(config.model.loss) == ["charbonnier"]
    again = vqf(*sweep, "run_dir=sweep", "steps=4", "resume=true", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    for job in ("0", "1"):
        run = tmp_path / "sweep" / job
        assert steps_of(run) == ["step-00000002", "step-00000004"]
        assert "resuming from" in (run / "log.txt").read_text()


def test_a_job_that_fails_is_named_and_takes_no_other_with_it(launcher: str, tmp_path: Path) -> None:
    """A plugin reaches the processes of all three jobs, and the folder is where a sweep goes unless told otherwise."""
    toy = [f"plugins=[{TOY}]", "pipeline=toy", "do=refuse", "count=1,2,3"]
    done = vqf("-m", *LAUNCHERS[launcher], *toy, folder=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    job = f"#1 plugins=[{TOY}] pipeline=toy do=refuse count=2"
    assert done.stderr.splitlines()[-1] == f"{job}: count=2: the toy wants another"
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert [(sweep / job / "count").read_text() for job in "012"] == ["1", "2", "3"]


def test_the_launcher_for_slurm_is_what_it_says() -> None:
    arguments = ["--config-dir", str(EXAMPLES / "slurm"), "hydra/launcher=cluster", "seed=1,2"]
    check_command(["-m", *arguments])
    launcher = Composer(get_args_parser().parse_args(arguments[:2])).compose(arguments[2:3]).hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.partition, launcher.gpus_per_node, launcher.max_num_timeout) == ("gpu", 1, 20)


def test_the_page_shows_the_script_for_slurm_as_it_is() -> None:
    script = (EXAMPLES / "slurm" / "train.sbatch").read_text()
    assert f"```bash\n{script}```\n" in (ROOT / "docs" / "scale.md").read_text()


def test_the_script_for_slurm_trains_and_resumes(tmp_path: Path) -> None:
    """On one node of two processes, with stand-ins for the two commands of SLURM that it calls."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, line in (
        ("srun", '[[ $1 == --kill-on-bad-exit=1 ]] && shift; exec "$@"'),
        ("scontrol", "echo localhost"),
    ):
        (commands / name).write_text(f"#!/bin/bash\n{line}\n")
        (commands / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n[1]", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": "7"}
    path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    model = ["plugins=[my_components.losses]", *SMALL, "model/quantizer=vq", "model.quantizer.codebook_size=16"]
    for steps in (2, 4):
        script = ["bash", str(EXAMPLES / "slurm" / "train.sbatch"), *model, "run_dir=run", f"steps={steps}"]
        done = started(script, tmp_path, **slurm, PATH=path, MASTER_PORT=str(free_port()))
        assert done.returncode == 0, done.stderr
    assert steps_of(tmp_path / "run") == ["step-00000002", "step-00000004"]
    assert (tmp_path / "run" / "log.txt").read_text().count("resuming from") == 1
