"""Can a direction be chosen before training? Numbers of the original model that might predict what a direction does.

    python benchmarks/directions.py OUT [COUNT]

SRMU runs with COUNT directions (12) on the entangled texts of `srmu reproduce table3 --world atlas --out OUT`, whose
runs are used again, at one strength. Before any training each target is measured on the original model: its cosine
with the activations of both kinds of texts, the share of the retain activations' square along it, and what a token of
either kind costs more when its activations are moved a part of the way there. Printed are these numbers beside what
the runs forgot and lost, with their rank correlations, and how the runs' ranks agree between halves of the questions.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from torch import Tensor

from srmu.data.sources import Source, read_texts
from srmu.engine import losses, sites
from srmu.engine.progress import show_progress
from srmu.evals.analyses import open_model, prepare_sets
from srmu.evals.results import read_metrics
from srmu.reproduce.experiment import PlannedRow, run_experiment
from srmu.reproduce.paper import plan_paper
from srmu.runs.run import Run

KAPPA, REGIME, REGION = 9.0, "high", "Africa"
MOVED = {"forget": 0.4, "retain": 0.05}  # of the way to the target, about as far as runs move them
HALVES = ("", "_val")


def main(out: Path, count: int) -> None:
    plan = plan_paper(out, world="atlas")
    tasks = tuple(f"testbed_{kind}{half}" for kind in ("hazard", "neighbour") for half in HALVES)
    plan = replace(plan, seeds=tuple(range(count)), tasks=tasks)
    row = PlannedRow("SRMU", "SRMU", f"{REGIME} {REGION}", (f"method.kappa={KAPPA}",))
    (made,) = run_experiment(plan, [row], show_progress).values()
    if made.why:
        raise SystemExit(made.why)
    outcomes = [measure_outcome(run) for run in made.runs]
    foretold = foretell([Run.open(run) for run in made.runs])
    names, wanted = [*foretold[0]], [*outcomes[0]]
    print("| direction |", " | ".join(wanted + names), "|\n|" + "---|" * (1 + len(wanted) + len(names)))
    for seed, (outcome, numbers) in enumerate(zip(outcomes, foretold, strict=True)):
        print(f"| {seed} |", " | ".join(f"{v:.3g}" for v in (*outcome.values(), *numbers.values())), "|")
    print("\n| rank correlation with |", " | ".join(wanted), "|\n|" + "---|" * (1 + len(wanted)))
    for name in names:
        print(f"| {name} |", " | ".join(correlate(foretold, name, outcomes, one) for one in wanted), "|")
    print()
    for kind in ("forgotten", "lost beside"):
        both = correlate(outcomes, f"{kind}, test", outcomes, f"{kind}, val")
        print(f"ranks of {kind}, one half of the questions and the other: {both}")
    print("ranks of forgotten and lost beside:", correlate(outcomes, "forgotten, test", outcomes, "lost beside, test"))
    gains = [dict(zip(("test", "val"), one, strict=True)) for one in measure_gains(outcomes)]
    print("ranks of forgotten beyond what the loss explains, both halves:", correlate(gains, "test", gains, "val"))


def measure_gains(outcomes: Sequence[dict[str, float]]) -> list[tuple[float, ...]]:
    """By run and half: what is forgotten above the line of least squares through what is lost beside."""
    halves = []
    for half in ("test", "val"):
        x, y = (np.array([one[f"{kind}, {half}"] for one in outcomes]) for kind in ("lost beside", "forgotten"))
        halves.append(y - np.polyval(np.polyfit(x, y, 1), x))
    return [*zip(*halves, strict=True)]


def correlate(rows: Sequence[Any], name: str, others: Sequence[Any], other: str) -> str:
    found: Any = spearmanr([row[name] for row in rows], [row[other] for row in others])
    return f"{found.statistic:+.2f} (p {found.pvalue:.2f})"


def measure_outcome(run: Path) -> dict[str, float]:
    """Points of accuracy that a run forgot, and lost beside, on either half of the questions."""
    scores = read_metrics(run)
    fell = {
        (kind, half): 100
        * (
            scores["before"][f"testbed_{kind}{half}/acc"]["value"]
            - scores["after"][f"testbed_{kind}{half}/acc"]["value"]
        )
        for kind in ("hazard", "neighbour")
        for half in HALVES
    }
    words = {"hazard": "forgotten", "neighbour": "lost beside"}
    return {f"{words[kind]}, {half.strip('_') or 'test'}": value for (kind, half), value in fell.items()}


@torch.no_grad()
def foretell(runs: Sequence[Run]) -> list[dict[str, float]]:
    """What the original model alone says of the target of each run."""
    model, tokenizer = open_model(runs[0].base)
    topic = runs[0].config.topics["topic"]
    paths = {"forget": topic.forget, "retain": topic.retain}
    texts = {role: read_texts([Source(path=str(one.path)) for one in some]) for role, some in paths.items()}
    sets = prepare_sets(model, texts, tokenizer, 32)
    layer = runs[0].config.method.layer
    hidden = {
        role: torch.cat(
            [model.hidden(b, sites.Site(layer))[losses.without_first(losses.is_counted(b["labels"]))] for b in batches]
        )
        for role, batches in sets.items()
    }
    plain = {role: cost_texts(model, batches, layer, torch.zeros(1), 0.0) for role, batches in sets.items()}
    rows = []
    for run in runs:
        target = load_file(run.folder / "state.safetensors")["topic.target"].float()
        unit = target / target.norm()
        along = (hidden["retain"].float() @ unit).square().mean() / hidden["retain"].float().square().sum(-1).mean()
        rows.append(
            {
                f"cosine, {role}": float(torch.cosine_similarity(some.float(), target, dim=-1).mean())
                for role, some in hidden.items()
            }
            | {"retain along it, x D": float(along) * len(target)}
            | {
                f"{role} costs more, nats": cost_texts(model, batches, layer, target, MOVED[role]) - plain[role]
                for role, batches in sets.items()
            }
        )
    return rows


def cost_texts(model: Any, batches: Sequence[Any], layer: int, target: Tensor, share: float) -> float:
    """Nats a token, with a layer's output moved a share of the way to a target, but for each text's first token."""
    nats = []
    for batch in batches:
        mask = losses.without_first(losses.is_counted(batch["labels"]))[..., None]

        def move(value: Tensor, mask: Tensor = mask) -> Tensor:
            return torch.where(mask, torch.lerp(value.float(), target, share).to(value.dtype), value)

        with sites.edit_outputs({model.layers[layer]: move}):
            nll = losses.token_nll(model.logits(batch), batch["labels"])
        nats.append(nll[losses.is_predicted(batch["labels"])])
    return float(torch.cat(nats).mean())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 12)
