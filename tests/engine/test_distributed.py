"""One process = two that share batches = two that share weights, too; in real processes."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import attack_world as world
from helpers import processes
from helpers.benchmark_sets import write_sets
from helpers.models import Call, fill, texts
from helpers.rank_worker import CASES, DIES_AT, STEPS, WHOLE, config
from srmu.engine import distributed
from srmu.engine.losses import Mean, masked_mean, mean_nll, row_mean, token_mse
from srmu.engine.topic import Batch
from srmu.engine.train import divide_means
from srmu.engine.weights import list_shards, stored_tensor
from srmu.errors import SrmuError
from srmu.runs.plan import check_ranks, plan_run
from srmu.runs.record import DELTA
from srmu.runs.run import Run, unlearn_config

KINDS = ("plain", "sharded")
WORKER = str(Path(__file__).parents[1] / "helpers" / "rank_worker.py")
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# Sums over rows are taken in another order: by rank first. Their rounding is of 1e-7 of the
# gradient; Adam's first steps divide by its size, so that it shows where that is near 0.
LOSS, DELTA_SHARE = 1e-4, 1e-3
# Gradients of bf16 models are rounded to 3 digits before they are summed: the first losses agree
# so far, and steps of Adam go other ways where a gradient is small.
ROUNDED, ROUNDED_SHARE = 0.01, 0.5  # measured: 0.33 (srmu), 0.05 (npo)


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    """Two ranks that load the libraries, as a person starts them."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = [sys.executable, *LAUNCHER, *words]
    return subprocess.run(started, env=environment, capture_output=True, text=True, timeout=300)


def fork(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The same, but that the ranks have the libraries; what they say lies in a new folder of `place`."""
    said = Path(tempfile.mkdtemp(dir=place))
    out, err = said / "out", said / "err"
    code = processes.start(*words, out=out, err=err, ranks=2).wait()
    return subprocess.CompletedProcess(words, code, out.read_text(), err.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("ranks"), 10)


@pytest.fixture(scope="module")
def made(folder: Path) -> dict[str, Any]:
    """Runs of all cases: in one process, in two, in two with sharded weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SRMU_CACHE", str(folder / "cache"))
        for kind in KINDS:
            done = fork(folder, WORKER, str(folder), kind, kind, *CASES)
            assert done.returncode == 0, done.stderr[-3000:]
        return {case: unlearn_config(config(folder, "one", case)) for case in CASES}


def found(folder: Path, runs_dir: str, case: str) -> Run:
    return Run.open(plan_run(config(folder, runs_dir, case)).folder)


def rows(run: Run) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run.folder / "metrics.jsonl").open()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found]


def apart(run: Run, other: Run, base: Path) -> float:
    """How far two deltas are apart, as a share of what was changed."""
    where = list_shards(base)
    one, two = (load_file(r.folder / DELTA) for r in (run, other))
    assert set(one) == set(two)
    before = {name: stored_tensor(where[name], name) for name in one}
    pairs = [(float((one[k] - two[k]).norm()), float((one[k] - before[k]).norm())) for k in one]
    return sum(a**2 for a, _ in pairs) ** 0.5 / sum(b**2 for _, b in pairs) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("case", "kind"), [(c, k) for c in CASES for k in KINDS if k == "plain" or c not in WHOLE])
def test_two_processes_do_what_one_does(folder: Path, made: dict[str, Any], case: str, kind: str) -> None:
    one, two = made[case], found(folder, kind, case)
    assert two.record["processes"] == {"count": 2, "sharded": kind == "sharded"}
    pairs = list(zip(rows(one), rows(two), strict=True))
    assert len(pairs) == (0 if case == "ssd" else STEPS)
    half = "bf16" in case
    for alone, together in pairs[:1] if half else pairs:
        for key in ("topic", "step"):
            assert together.pop(key) == alone.pop(key)
        assert together == pytest.approx(alone, rel=ROUNDED if half else LOSS, abs=1e-6)
    assert apart(one, two, folder / "model") < (ROUNDED_SHARE if half else DELTA_SHARE)
    assert one.record["topics"].keys() == two.record["topics"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["srmu", "undial"])  # without clipping: norms are summed by rank
def test_sharded_weights_end_with_the_bits_of_whole_ones(folder: Path, made: dict[str, Any], case: str) -> None:
    plain, sharded = (found(folder, kind, case).folder / DELTA for kind in KINDS)
    one, two = load_file(plain), load_file(sharded)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_process_goes_on_where_two_were_killed(
    folder: Path, made: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SRMU_CACHE", str(folder / "cache"))
    name = f"died-{kind}"
    died = launch(WORKER, str(folder), name, kind, "--die", "npo")
    (folder / "steps").unlink()
    assert died.returncode != 0
    assert "rank" in died.stderr and "SIGKILL" in died.stderr
    wanted = config(folder, name, "npo")
    assert not (plan_run(wanted).folder / "record.json").exists()
    run = unlearn_config(wanted)
    assert run.record["resumed_at"] >= DIES_AT
    assert run.record["processes"] == {"count": 1, "sharded": False}
    assert len(rows(run)) == STEPS
    assert apart(made["npo"], run, folder / "model") < DELTA_SHARE


@pytest.mark.slow
def test_the_error_of_one_rank_is_named_and_ends_all(folder: Path) -> None:
    failed = fork(folder, WORKER, str(folder), "failed", "plain", "--fail", "srmu")
    assert failed.returncode != 0
    assert "srmu: rank 1 of 2: its disk is not there" in failed.stderr
    assert not (folder / "failed").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["sweep", "study"], "srmu sweep runs in one process"),
        (["verify", "run", "--rerun"], "srmu verify runs in one process"),
    ],
)
def test_what_several_processes_would_all_write_is_refused(
    call: Call, monkeypatch: pytest.MonkeyPatch, words: list[str], why: str
) -> None:
    monkeypatch.setattr(distributed, "get_size", lambda: 2)
    monkeypatch.setattr(distributed, "join_group", lambda: None)
    monkeypatch.setattr(distributed, "says_first", lambda message: True)
    answer = call(*words)
    assert answer.code == 2 and why in answer.err


@pytest.mark.slow
def test_a_mistake_is_said_once(folder: Path) -> None:
    words = ["unlearn", "--model", str(folder / "model"), "--forget", str(folder / "no.jsonl")]
    failed = launch("-m", "srmu", *words, "--retain", str(folder / "retain.jsonl"))
    assert failed.returncode != 0
    assert failed.stderr.count("srmu: rank") == 1
    assert "no.jsonl" in failed.stderr


@pytest.mark.slow
def test_the_command_line_speaks_once(folder: Path, tmp_path: Path) -> None:
    words = ["unlearn", "--model", str(folder / "model"), "--shard", "--json"]
    for role in ("forget", "retain"):
        words += [f"--{role}", str(folder / f"{role}.jsonl")]
    out = [f"runs_dir={tmp_path / 'runs'}", "method.layer=2", "train.max_steps=2"]
    done = launch("-m", "srmu", *words, *out)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["record"]["processes"] == {"count": 2, "sharded": True}


# --- evaluation and attacks ----------------------------------------------------------------------

ATTACKS = "forced_choice,format_shift,logit_lens,quantisation"


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world with a run in it; the folder of the run."""
    place = world.write(tmp_path_factory.mktemp("attacked"))
    return world.unlearned(place).folder


def asked(run: Path, verb: str, *words: str) -> list[str]:
    place = run.parents[1]
    return [verb, str(run), *words, "--tasks", "hazard", "--tasks-dir", str(place / "tasks")]


@pytest.mark.slow
def test_two_processes_score_what_one_does(
    attacked: Path, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path / "one"))
    alone = json.loads(call(*asked(attacked, "eval"), "--json").out)
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path / "two"))
    both = fork(tmp_path, "-m", "srmu", *asked(attacked, "eval"), "--json")
    assert both.returncode == 0, both.stderr
    assert json.loads(both.stdout) == alone
    assert alone["before"]["hazard/acc"] != alone["after"]["hazard/acc"]


@pytest.mark.slow
def test_two_processes_ask_a_suite_as_one_does(
    attacked: Path, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prompts = texts(70, seed=1, words=range(40))
    written = [{"prompt": text, "references": ["w41", "w42"]} for text in prompts]
    cut = [{"prompt": text, "targets": ["w41"], "generic": ["w42"]} for text in prompts[:9]]
    data = write_sets(tmp_path, {("completion", "test"): written, ("probability", "test"): cut})
    words = ["eval", str(attacked), "--tasks", "whp", "--data", str(data), "--json"]
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path / "one"))
    alone = json.loads(call(*words).out)
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path / "two"))
    both = fork(tmp_path, "-m", "srmu", *words)
    assert both.returncode == 0, both.stderr
    assert json.loads(both.stdout) == alone
    assert alone["before"] != alone["after"]
    assert alone["after"]["whp/completion_familiarity"]["n"] == 70


@pytest.mark.slow
def test_two_processes_attack_as_one_does(
    attacked: Path, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    more = ["--attacks", ATTACKS, "--oracle", str(attacked.parents[1] / "oracle"), "--json"]
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path / "one"))
    alone = json.loads(call(*asked(attacked, "attack", *more)).out)
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path / "two"))
    both = fork(tmp_path, "-m", "srmu", *asked(attacked, "attack", *more))
    assert both.returncode == 0, both.stderr
    found = json.loads(both.stdout)
    for report in (alone, found):
        for entry in report["attacks"].values():
            entry.pop("seconds")
    assert found == alone
    assert len([*(tmp_path / "two" / "attacks").iterdir()]) > len(ATTACKS.split(","))


@pytest.mark.slow
def test_what_fails_on_one_rank_ends_all(attacked: Path, tmp_path: Path) -> None:
    """One rank cannot attack; the others have done theirs."""
    script = tmp_path / "attack.py"
    script.write_text(
        "import sys\n"
        "from srmu.cli.main import main\n"
        "from srmu.attacks import suite\n"
        "from srmu.engine import distributed\n"
        "from srmu.errors import SrmuError\n"
        "try_attack, mine = suite.try_attack, distributed.get_rank()\n"
        "def fail(*given):\n"
        "    if mine == 1:\n"
        '        raise SrmuError("this rank cannot attack")\n'
        "    return try_attack(*given)\n"
        "suite.try_attack = fail\n"
        "main()\n"
    )
    failed = fork(tmp_path, str(script), *asked(attacked, "attack", "--attacks", "format_shift"))
    assert failed.returncode != 0
    assert "srmu: rank 1 of 2: this rank cannot attack" in failed.stderr


# --- without processes ---------------------------------------------------------------------------


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "nll": lambda b: mean_nll(b["logits"], b["labels"]),
    "mse": lambda b: token_mse(b["logits"], torch.ones(7), b["labels"] != -100),
    "rows": lambda b: row_mean(b["logits"].sum(dim=(1, 2)), b["labels"]),
}


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_shares_add_up(monkeypatch: pytest.MonkeyPatch, name: str, count: int) -> None:
    """To the loss of the whole batch, also where some process has no row."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (4, 6), generator=generator)
    labels[1, 3:] = labels[2, :2] = -100
    batch = Batch(labels=labels, logits=torch.randn(4, 6, 7, generator=generator))
    whole = float(FUNCTIONS[name](batch).value)
    monkeypatch.setattr(distributed, "get_size", lambda: count)
    means: list[Mean] = []
    for rank in range(count):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        means.append(FUNCTIONS[name](distributed.take_rows(batch)))
    every = torch.stack([mean.count for mean in means]).sum()
    monkeypatch.setattr(distributed, "sum_values", lambda counts: every.expand(len(counts)))
    parts = [divide_means({"loss": -2.0 * mean}, shared=True)["loss"] for mean in means]
    assert sum(map(float, parts)) == pytest.approx(-2 * whole, rel=1e-6)


def test_a_mean_over_nothing() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert masked_mean(torch.ones(2, 3), nothing).value.isnan()
    assert float(masked_mean(torch.ones(2, 3), nothing, least=1).value) == 0


@pytest.mark.parametrize("launched", [False, True])
def test_alone_it_is_all_of_them(monkeypatch: pytest.MonkeyPatch, launched: bool) -> None:
    for name in ("MASTER_ADDR", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    if launched:  # by Slurm, say, but for one process
        monkeypatch.setenv("WORLD_SIZE", "1")
        monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert (distributed.get_rank(), distributed.get_size(), distributed.is_first()) == (0, 1, True)
    assert torch.equal(distributed.sum_values(torch.ones(3)), torch.ones(3))
    assert distributed.agree_on("a") == "a" and distributed.gather_values(2) == [2]
    assert distributed.says_first("this") and distributed.says_first("this")
    assert distributed.take_rows(Batch()) == {}
    distributed.join_group()
    distributed.leave_group()


@pytest.mark.slow
def test_what_cannot_be_spread_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SrmuError, match="shard cuts the weights over several processes"):
        check_ranks(config(folder, "r", "srmu"), shard=True)
    monkeypatch.setattr(distributed, "get_size", lambda: 2)
    srmu = config(folder, "r", "srmu")
    check_ranks(srmu, shard=True)
    from srmu.methods import METHODS

    alone = srmu.model_copy(update={"method": METHODS["undo"]()})
    with pytest.raises(SrmuError, match="method undo runs in one process, but 2 were started"):
        check_ranks(alone, shard=False)
    adapted = srmu.model_copy(update={"method": METHODS["npo"](lora_rank=2)})
    with pytest.raises(SrmuError, match="do not go together"):
        check_ranks(adapted, shard=True)
    with pytest.raises(SrmuError, match="mlp_post lies inside a layer"):
        check_ranks(config(folder, "r", WHOLE[0]), shard=True)


@pytest.mark.slow
def test_one_process_cannot_shard(folder: Path, call: Call) -> None:
    words = ["unlearn", "--model", str(folder / "model"), "--shard"]
    for role in ("forget", "retain"):
        words += [f"--{role}", str(folder / f"{role}.jsonl")]
    answer = call(*words)
    assert answer.code == 2 and "torchrun --nproc-per-node 2 -m srmu unlearn" in answer.err


@pytest.mark.slow
def test_layers_left_on_disk_change_nothing(folder: Path, made: dict[str, Any]) -> None:
    for case in ("srmu", "adaptive_rmu"):
        wanted = config(folder, "offloaded", case).model_copy(update={"cache": "none"})
        run = unlearn_config(wanted, offload=True)
        one = unlearn_config(config(folder, "whole", case).model_copy(update={"cache": "none"}))
        assert (run.folder / DELTA).read_bytes() == (one.folder / DELTA).read_bytes()
    with pytest.raises(SrmuError, match="it goes with a method of one layer"):
        unlearn_config(config(folder, "offloaded", "npo"), offload=True)
