"""Does forgetting survive rounding? Runs trained through a quantiser or not, asked as they are and rounded.

python benchmarks/rounding.py CONFIG [key=value ...]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from srmu.attacks.perturbations import mark_changed
from srmu.engine.rounding import QUANTISERS
from srmu.evals.lm_eval import load_questions
from srmu.evals.subject import Question, Subject
from srmu.runs.config import Config, load_config
from srmu.runs.run import open_target, unlearn_config

THROUGH = ("null", "q4_0", "nf4")  # what training sees
AFTER = ("", "q8_0", "q4_0", "nf4")  # what is asked


def keep_matrix(matrix: Tensor) -> Tensor:
    return matrix


def ask_rounded(config: Config, asked: dict[str, Sequence[Question]]) -> list[dict[str, float]]:
    """Accuracy in % by task, of the run's model as it is and rounded in each way."""
    opened = open_target(unlearn_config(config))
    with opened.after() as module:
        model, rows = Subject(module, opened.tokenizer), []
        for kind in AFTER:
            change = QUANTISERS[kind].round_matrix if kind else keep_matrix
            rows.append({task: 100 * float(np.mean(mark_changed(model, change, qs))) for task, qs in asked.items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    first = load_config(options.config, options.overrides)
    asked = {task: load_questions(task, Path(first.tasks_dir) if first.tasks_dir else None) for task in first.eval}
    print(f"| trained through | {' | '.join(kind or 'as it is' for kind in AFTER)} |\n|---|{'---|' * len(AFTER)}")
    for kind in THROUGH:
        config = load_config(options.config, [*options.overrides, f"train.quantise_aware={kind}"])
        cells = (", ".join(f"{value:.1f}" for value in row.values()) for row in ask_rounded(config, asked))
        print(f"| {kind.replace('null', 'none')} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
