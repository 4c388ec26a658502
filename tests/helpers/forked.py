"""Commands of qexp in forks of one process that has imported everything, so that a start is cheap.

As a program it reads one JSON object a line: `commands` (lists of arguments, run at the same time),
`kill` (seconds after which all of them are killed, or null), `folders` (of runs that there must be
before those seconds begin) and `environment`; it answers with their exit codes. What they say goes
to `said.log`.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Forks:
    """Such a program, working in a folder of its own."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        settings |= {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.program = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, **settings, **environment},
        )

    def run(
        self,
        *commands: list[str],
        kill: float | None = None,
        folders: int = 0,
        **environment: str,
    ) -> list[int]:
        """Exit codes; -9 for what was killed."""
        request = {"commands": commands, "kill": kill, "folders": folders}
        request["environment"] = environment
        assert self.program.stdin is not None and self.program.stdout is not None
        print(json.dumps(request), file=self.program.stdin, flush=True)
        return json.loads(self.program.stdout.readline())

    def end(self) -> None:
        with self.program:  # closes the pipes, which ends it, and waits
            pass

    @property
    def said(self) -> str:
        return (self.folder / "said.log").read_text()


def _fork(command: list[str], environment: dict[str, str]) -> int:
    from qexp import cli

    if (child := os.fork()) != 0:
        return child
    code = 1
    try:
        log = os.open("said.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= environment
        if limit := environment.get("FILE_BYTES"):  # every larger file meets a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
        sys.argv = ["qexp", *command]
        cli.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    finally:
        os._exit(code)


def _run(children: list[int]) -> bool:
    """Whether any of them does still."""
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return any(os.waitid(os.P_PID, child, ended) is None for child in children)


def _serve() -> None:
    import torch

    from qexp import (
        pipeline,  # noqa: F401
    )

    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        children = [_fork(command, request["environment"]) for command in request["commands"]]
        if request["kill"] is not None:
            while len(list(Path("outputs").glob("[!.]*"))) < request["folders"] and _run(children):
                time.sleep(0.01)
            time.sleep(request["kill"])
            for child in children:
                os.kill(child, signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    _serve()
