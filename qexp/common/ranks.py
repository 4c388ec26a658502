"""Rank and world size of the processes of one run.

Rank 0 owns the run's folder, logs and writes. `torchrun`, or `common.launch`, sets the environment
variables that are read here.
"""

import os


class Done(Exception):
    """Raised in a rank other than 0 whose run has ended before it could join."""


def rank() -> int:
    """Rank of this process among all processes; 0 where there is one."""
    return int(os.environ.get("RANK", local_rank())) if world() > 1 else 0


def local_rank() -> int:
    """Rank of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) if world() > 1 else 0


def world() -> int:
    """Number of processes on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def nodes() -> int:
    """Number of machines."""
    return max(world() // int(os.environ.get("LOCAL_WORLD_SIZE", world())), 1)
