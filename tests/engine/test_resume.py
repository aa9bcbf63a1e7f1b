"""A run that was killed goes on from its checkpoint and ends with the same bits."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import processes
from helpers.models import both_ways, fill
from srmu.engine.resume import Checkpoints, pack_memory, unpack_memory
from srmu.errors import SrmuError
from srmu.methods import METHODS
from srmu.runs import run as runs
from srmu.runs.config import Config, build_config
from srmu.runs.record import DELTA, STATE
from srmu.runs.run import Run, unlearn_config
from srmu.runs.training import CHECKPOINTS

STEPS = 7
# Each hands something else from step to step.
CASES: dict[str, dict[str, Any]] = {
    "srmu": {"name": "srmu", "layer": 2},
    "srmu, a running map": {"name": "srmu", "layer": 2, "map_mode": "ema"},
    "srmu, new signs": {"name": "srmu", "layer": 2, "direction": "resampled"},
    "srmu, random anchors": {"name": "srmu", "layer": 2, "anchors": "random"},
    "srmu, own anchors": {"name": "srmu", "layer": 2, "anchors": "self", "own_texts": 90},
    "srmu, some columns": {"name": "srmu", "layer": 2, "columns": 0.25},
    "adaptive_rmu": {"name": "adaptive_rmu", "layer": 2, "norm_source": "updated"},
    "rna": {"name": "rna", "layer": 2},
    "npo": {"name": "npo", "retain": "kl"},
    "npo, LoRA": {"name": "npo", "lora_rank": 2},
    "scrub": {"name": "scrub", "ascent_steps": 1},
    "quark": {"name": "quark", "sample_every": 2, "quantiles": 2, "response": 3},
    "undial": {"name": "undial"},
    "refusal": {"name": "refusal", "objective": "dpo"},
    "pdu": {"name": "pdu"},
    "altpo": {"name": "altpo", "alternatives": 2, "response": 3},
    "whp": {"name": "whp", "teacher_steps": 2},
    "rename_scrub": {
        "name": "rename_scrub",
        "names": str(Path(__file__).parents[1] / "helpers" / "names.txt"),
        "own_texts": 12,
        "own_tokens": 10,
        "prompt": 2,
        "renamings": 3,
        "keep_rows": 2,
        "held_out": 2,
        "noise": 0.1,
    },
    "undo": {"name": "undo", "teacher_steps": 2, "own_texts": 5, "own_tokens": 4},
    "tar": {"name": "tar", "teacher_steps": 2, "adversary_steps": 2},
    "iterated": {"name": "iterated", "teacher_steps": 2, "rounds": 1, "relearn_steps": 2},
    "rmu_lat": {"name": "rmu_lat", "layer": 2, "adversary_steps": 2},
    "multi_site": {"name": "multi_site"},
}


class Killed(BaseException):
    """Stands for a kill: nothing of ours may catch it."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("workplace"), 12)


def config(folder: Path, method: dict[str, Any], runs_dir: str, *overrides: str) -> Config:
    tree = {
        "model": str(folder / "model"),
        "method": method,
        "topics": both_ways(folder),
        "train": {"max_steps": STEPS, "learning_rate": 1e-2, "checkpoint_seconds": 0},
        "runs_dir": str(folder / runs_dir),
        "cache": "none",
    }
    return build_config(tree, overrides)


def killed_at(step: int) -> Callable[..., Any]:
    """A `Watch` that ends the process, as it were, when a step is done."""
    from contextlib import contextmanager

    @contextmanager
    def watch(label: str, total: int) -> Any:
        done = 0

        def tick(text: str) -> None:
            nonlocal done
            done += 1
            if total == STEPS and done == step:
                raise Killed

        yield tick

    return watch


def files(run: Run) -> dict[str, bytes]:
    found = {name: (run.folder / name) for name in (DELTA, STATE) if (run.folder / name).exists()}
    return {name: path.read_bytes() for name, path in found.items()}


def losses(run: Run) -> list[Any]:
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").open()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_uninterrupted(workplace: Path, case: str) -> None:
    name = case.replace(" ", "-")
    endless = ["train.forget_ceiling=.inf"] if METHODS[str(CASES[case]["name"])].endless else []
    whole = unlearn_config(config(workplace, CASES[case], f"{name}-whole", *endless))
    again = config(workplace, CASES[case], f"{name}-again", *endless)
    for step in (3, 6):
        with pytest.raises(Killed):
            unlearn_config(again, watch=killed_at(step))
    resumed = unlearn_config(again)
    assert resumed.record["resumed_at"] == 5
    assert files(resumed) == files(whole)
    assert losses(resumed) == losses(whole)
    assert not (resumed.folder / CHECKPOINTS).exists()


@pytest.fixture
def begun(workplace: Path, tmp_path: Path) -> Config:
    """A run that was killed after five steps, with its checkpoint of the fourth."""
    made = config(workplace, CASES["srmu"], str(tmp_path / "runs"))
    with pytest.raises(Killed):
        unlearn_config(made, watch=killed_at(5))
    return made


def folder_of(made: Config) -> Path:
    return runs.plan_run(made).folder


def checkpoint(made: Config) -> Path:
    (found,) = (folder_of(made) / CHECKPOINTS).iterdir()
    return found


def spoil(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "a byte is another":
        data[-1] ^= 1
    elif how == "cut short":
        del data[100:]
    elif how == "half a header":
        del data[20:]
    elif how == "no mark":
        data = data.replace(b'"mark"', b'"marx"')
    elif how == "of other texts":
        digest = data.index(b'data\\":') + 12
        data[digest] ^= 1
    path.write_bytes(data)


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("how", ["a byte is another", "cut short", "no mark", "half a header", "of other texts"])
def test_a_damaged_checkpoint_does_not_count(begun: Config, workplace: Path, tmp_path: Path, how: str) -> None:
    spoil(checkpoint(begun), how)
    again = unlearn_config(begun)
    assert again.record["resumed_at"] == 0
    whole = unlearn_config(config(workplace, CASES["srmu"], str(tmp_path / "whole")))
    assert files(again) == files(whole)
    assert losses(again) == losses(whole)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_another_cache_folder(
    begun: Config, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path / "other"))
    again = unlearn_config(begun)
    assert again.record["resumed_at"] == 4
    assert files(again) == files(unlearn_config(config(workplace, CASES["srmu"], str(tmp_path / "whole"))))


def test_the_newest_checkpoint_counts(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path / "c")
    assert kept.load() is None
    kept.save(1, {"x": torch.ones(2)}, {"a": 1})
    kept.save(10, {"x": torch.zeros(2)}, {"a": 2})
    assert len([*(tmp_path / "c").iterdir()]) == 1
    step, tensors, numbers = kept.load() or (0, {}, {})
    assert (step, tensors["x"].tolist(), numbers) == (10, [0, 0], {"a": 2})
    assert Checkpoints(tmp_path / "c", belongs={"run": "another"}).load() is None


def test_checkpoints_come_when_they_are_due(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path / "c", seconds=1000)
    assert not kept.due()
    kept.last -= 1001
    assert kept.due()
    kept.save(1, {"x": torch.ones(1)}, {})
    assert not kept.due()
    assert not Checkpoints(None, 0).due()


@pytest.mark.slow
def test_a_full_disk_costs_the_checkpoint_and_not_the_run(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    whole = unlearn_config(config(workplace, CASES["srmu"], str(tmp_path / "whole")))
    monkeypatch.setattr("srmu.engine.resume.save_file", full)
    run = unlearn_config(config(workplace, CASES["srmu"], str(tmp_path / "runs")))
    assert files(run) == files(whole)
    assert "No space left" in run.record["checkpoint_failed"]
    assert [p.name for p in tmp_path.rglob(".state*")] == []


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(begun: Config) -> None:
    folder = folder_of(begun)
    code = "import sys; from srmu.runs.run import hold_folder; from pathlib import Path\n"
    code += "with hold_folder(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(SrmuError, match="written by another process"):
            unlearn_config(begun)
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert unlearn_config(begun).record["resumed_at"] == 4  # a lock does not outlive its process


def test_a_checkpoint_does_not_change_the_id(workplace: Path) -> None:
    one, other = (config(workplace, CASES["srmu"], "runs", f"train.checkpoint_seconds={s}") for s in (0, 60))
    assert one.id == other.id


def test_what_is_packed_comes_back() -> None:
    class Pool:
        def __init__(self) -> None:
            self.seen = [1]

        def state_dict(self) -> Any:
            return self.seen

        def load_state_dict(self, state: Any) -> None:
            self.seen = state

    def fresh() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        fixed = {"x": torch.ones(1)}
        return {"g": generator, "t": torch.ones(2), "n": 3, "pool": Pool(), "fixed": fixed}

    held, again = fresh(), fresh()
    torch.rand(5, generator=held["g"])
    held["t"], held["n"], held["new"], held["pool"].seen = torch.zeros(2), 4, torch.ones(3), [1, 2]
    tensors, numbers = pack_memory(held)
    unpack_memory(again, tensors, json.loads(json.dumps(numbers)))
    assert torch.equal(torch.rand(3, generator=again["g"]), torch.rand(3, generator=held["g"]))
    assert again["t"].tolist() == [0, 0]
    assert (again["n"], again["new"].tolist(), again["pool"].seen) == (4, [1, 1, 1], [1, 2])
    assert set(tensors) == {"g", "t", "new"}


def command(made: Config) -> list[str]:
    return ["-m", "srmu", "unlearn", made.runs_dir + ".yaml"]


def kill_until_done(made: Config, rng: random.Random, kills: int) -> tuple[Run, int]:
    """Run the command, kill it at random moments, start it again; the run, and kills survived."""
    Path(made.runs_dir + ".yaml").write_text(made.to_yaml())
    survived = 0
    for _ in range(kills):
        started = processes.start(*command(made))
        folder = folder_of(made)
        while started.poll() is None and not (folder / "metrics.jsonl").exists():
            time.sleep(0.01)  # before that there is nothing to lose
        time.sleep(rng.uniform(0, 0.4))
        started.send_signal(signal.SIGKILL)
        survived += started.wait() == -signal.SIGKILL
    assert processes.start(*command(made)).wait() == 0
    return Run.open(folder_of(made)), survived


def killed_run(workplace: Path, tmp_path: Path, kills: int) -> tuple[Run, Run, int]:
    steps = ["train.max_steps=150", "train.learning_rate=1e-3"]
    whole = unlearn_config(config(workplace, CASES["srmu"], str(tmp_path / "whole"), *steps))
    made = config(workplace, CASES["srmu"], str(tmp_path / "killed"), *steps)
    again, survived = kill_until_done(made, random.Random(kills), kills)
    return whole, again, survived


@pytest.mark.slow
def test_real_processes_killed_at_random_moments(workplace: Path, tmp_path: Path) -> None:
    whole, again, survived = killed_run(workplace, tmp_path, 3)
    assert survived >= 1
    assert files(again) == files(whole)
    assert losses(again) == losses(whole)


@pytest.mark.full
def test_real_processes_killed_twenty_times(workplace: Path, tmp_path: Path) -> None:
    total = 0
    for attempt in range(8):
        whole, again, survived = killed_run(workplace, tmp_path / str(attempt), 4)
        total += survived
        assert files(again) == files(whole)
        assert losses(again) == losses(whole)
    assert total >= 20
