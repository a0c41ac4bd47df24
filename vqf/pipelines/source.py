"""Which state of the user's own code a run was started in."""

import os
import subprocess


def commit() -> dict[str, str]:
    """Return the commit of the working directory as `commit`; nothing where git or a repository is absent.

    Whether files have changed since is not asked: to answer, git runs the filters that the folder's own config names,
    and the folder may be somebody else's.
    """
    quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    command = ["git", "-c", "core.fsmonitor=false", "rev-parse", "--verify", "--quiet", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, env=quiet)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": found.stdout.strip()} if found.returncode == 0 and found.stdout.strip() else {}
