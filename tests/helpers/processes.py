"""Programs in real processes that need not load the libraries for eight seconds first: one server loads them once and
forks itself for each program.

python -m helpers.processes      the server; it reads a line of JSON a request from stdin, and answers each with one
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# what the programs of tests need most
LOADED = (
    "torch.distributed.run",
    "transformers.models.llama.modeling_llama",
    "helpers.rank_worker",
    "srmu.attacks.suite",
    "srmu.cli.main",
    "srmu.evals.score",
)


@dataclass
class Process:
    """A program that was started, with some of what `subprocess.Popen` has."""

    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = ask(poll=self.pid)
        return self.returncode

    def wait(self, seconds: float = 300) -> int:
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                self.send_signal(9)
                raise TimeoutError(f"a program took more than {seconds} seconds")
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


@cache
def server() -> Any:
    words = [sys.executable, "-m", "helpers.processes"]
    found = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(found.terminate)
    return found


def ask(**request: Any) -> Any:
    server().stdin.write(json.dumps(request) + "\n")
    server().stdin.flush()
    return json.loads(server().stdout.readline())


def start(*words: str, out: Path | str = os.devnull, err: Path | str = os.devnull, ranks: int = 0) -> Process:
    """What `python WORDS` starts: `-m MODULE ...`, `-c CODE ...` or a file; `torchrun` with as many ranks."""
    given = {"words": words, "out": str(out), "err": str(err), "ranks": ranks}
    return Process(ask(**given, cwd=str(Path.cwd()), environment=dict(os.environ)))


def run_program(words: list[str]) -> None:
    first, *rest = words
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<code>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(first, run_name="__main__")


def run_ranks(words: list[str], count: int) -> None:
    """As `torchrun --standalone` does, but that ranks are forks."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    where = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": str(os.getpid())}
    config = LaunchConfig(1, 1, count, max_restarts=0, start_method="fork", **where)
    elastic_launch(config, run_program)(words)


def become(request: dict[str, Any]) -> None:
    """The program, in a process that was just forked; it does not return."""
    code = 1
    try:
        for number, path in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
            opened = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(opened, number)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["cwd"])
        if request["ranks"]:
            run_ranks(request["words"], request["ranks"])
        else:
            run_program(request["words"])
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    for name in LOADED:
        importlib.import_module(name)

    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                become(request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
