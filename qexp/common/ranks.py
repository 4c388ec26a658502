"""Which of the processes that train one run together this one is.

The first, of rank 0, holds the run's folder, evaluates and writes; the others are done when
training is. `torchrun`, or `processes`, says in the environment who is who.
"""

import os


class Done(Exception):
    """Nothing is left to do for a process that is not the first."""


def rank() -> int:
    """Which of the processes this is; 0 where there is one."""
    return int(os.environ.get("RANK", local_rank())) if world() > 1 else 0


def local_rank() -> int:
    """Which of those on this machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) if world() > 1 else 0


def world() -> int:
    """How many there are, on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def nodes() -> int:
    """How many machines they are on."""
    return max(world() // int(os.environ.get("LOCAL_WORLD_SIZE", world())), 1)
