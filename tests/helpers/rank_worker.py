"""What a launcher starts in test_distributed.py: runs of pico models in several processes.

python rank_worker.py FOLDER RUNS_DIR {plain,sharded} CASE...      these runs
python rank_worker.py FOLDER RUNS_DIR {plain,sharded} --die CASE   one, whose rank 1 is killed
python rank_worker.py FOLDER RUNS_DIR {plain,sharded} --fail CASE  a command line, whose rank 1 errs
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from helpers.models import both_ways
from srmu.cli import main as cli
from srmu.engine import distributed
from srmu.engine.stopping import StopRules
from srmu.errors import SrmuError
from srmu.runs import run as runs
from srmu.runs.config import Config, build_config

STEPS = 5
DIES_AT = 3
# Texts come in batches of 3, the last of a topic being 1: then one of two processes has no row.
CASES: dict[str, dict[str, Any]] = {
    "srmu": {"name": "srmu", "layer": 2},
    "srmu, a running map": {"name": "srmu", "layer": 2, "map_mode": "ema"},
    "srmu, new signs, anchors": {
        "name": "srmu", "layer": 2, "direction": "resampled", "anchors": "random",
    },
    "rmu, inside the MLP": {"name": "rmu", "layer": 3, "stream": "mlp_post"},
    "adaptive_rmu": {"name": "adaptive_rmu", "layer": 2, "norm_when": "per_batch"},
    "adaptive_rmu, by text": {"name": "adaptive_rmu", "layer": 2, "norm_when": "per_sample"},
    "ga": {"name": "ga"},
    "graddiff": {"name": "graddiff"},
    "npo": {"name": "npo", "retain": "kl"},
    "simnpo": {"name": "simnpo", "retain": "nll"},
    "undial": {"name": "undial", "retain": "kl"},
    "wga": {"name": "wga"},
    "refusal": {"name": "refusal", "objective": "dpo"},
    "rklu": {"name": "rklu", "retain": "kl", "teacher_steps": 3},
    "scrub": {"name": "scrub", "ascent_steps": 1},
    "ssd": {"name": "ssd", "alpha": 1.0},
    "srmu, bf16": {"name": "srmu", "layer": 2},
    "npo, bf16": {"name": "npo", "retain": "kl"},
}  # fmt: skip


WHOLE = ("rmu, inside the MLP",)  # cases that cannot be sharded


def config(folder: Path, runs_dir: str, case: str) -> Config:
    topics = both_ways(folder)
    options = {"max_steps": STEPS, "learning_rate": 1e-3, "batch_size": 3, "checkpoint_seconds": 0}
    tree = {
        "model": str(folder / "model"),
        "method": CASES[case],
        # of all texts together SSD would find equal importances, and rounding would choose
        "topics": {"bio": topics["bio"]} if case == "ssd" else topics,
        "train": options | ({"max_grad_norm": 0.5} if case == "npo" else {}),
        "runs_dir": str(folder / runs_dir),
        "device": "cpu",
        "dtype": "bfloat16" if "bf16" in case else "auto",
    }
    return build_config(tree)


def main(folder: Path, runs_dir: str, kind: str, *cases: str) -> None:
    torch.set_num_threads(1)
    if cases[0] == "--die":
        save = distributed.agree_on

        def agreed(value: Any) -> Any:
            if distributed.get_rank() == 1 and (folder / "steps").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            return save(value)

        def log_step(step: int) -> None:
            if step == DIES_AT and distributed.is_first():
                (folder / "steps").touch()

        check = StopRules.check_step
        StopRules.check_step = lambda *args: (log_step(args[1]), check(*args))[1]  # type: ignore
        distributed.agree_on = agreed
        cases = cases[1:]
    if cases[0] == "--fail":
        plan = runs.plan_run

        def fail(config: Config, **options: Any) -> Any:
            if distributed.get_rank() == 1:
                raise SrmuError("its disk is not there")
            return plan(config, **options)

        runs.plan_run = fail
        path = folder / "failing.yaml"
        path.write_text(config(folder, runs_dir, cases[1]).to_yaml())
        sys.argv = ["srmu", "unlearn", str(path)]
        cli.main()
    for case in cases:
        if kind == "sharded" and case in WHOLE:
            continue
        runs.unlearn_config(config(folder, runs_dir, case), shard=kind == "sharded")
    distributed.leave_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
