"""PDU: its loss against a loop, the weight that follows the limit, and what it promises."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.models import pico_module, topic
from srmu.engine.losses import average_means, is_predicted, mean_nll
from srmu.engine.model import EditableModel
from srmu.engine.train import TrainOptions
from srmu.errors import SrmuError
from srmu.methods.base import Batch, Session, State, Terms
from srmu.methods.logits import LogitObjective
from srmu.methods.pdu import PDU

LABELS = torch.tensor([[-100, -100, 4, 2, 0], [1, 3, -100, -100, -100]])


class Logits:
    """A model that is its logits."""

    def __init__(self) -> None:
        self.values = 3 * torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))

    def logits(self, batch: Any) -> Tensor:
        return self.values


class Taught(LogitObjective):
    """Teaches retain texts."""

    name = "taught"

    def loss(self, model: EditableModel, state: State, forget: Batch, retain: Batch, step: int) -> Terms:
        return Terms({"retain": mean_nll(model.logits(retain), retain["labels"])}, {})


@torch.no_grad()
def retain_cost(model: EditableModel) -> float:
    return average_means([mean_nll(model.logits(batch), batch["labels"]) for batch in topic().retain])


def fit(method: Any, steps: int, module: Any = None) -> tuple[EditableModel, list[dict[str, Any]], Any]:
    model = EditableModel(module or pico_module(), ("*",))
    rows: list[dict[str, Any]] = []
    train = TrainOptions(learning_rate=1e-3, max_steps=steps)
    outcome = method.apply(model, [topic()], Session(train, lambda step, row: rows.append(row)))
    return model, rows, outcome.states["bio"]


def test_the_loss_equals_a_loop_over_counted_tokens() -> None:
    """(open-unlearning flattens prompts and padding too.)"""
    model, state = Logits(), State(numbers={"limit": 9.0}, memory={"alpha": 7.0})
    found = PDU().loss(model, state, {"labels": LABELS}, {"labels": LABELS}, 0)  # type: ignore[arg-type]
    margins, costs = [], []
    for row, labels in zip(model.values.tolist(), LABELS.tolist(), strict=True):
        for scores, token in zip(row, labels[1:], strict=False):
            if token != -100:
                margins.append((max(scores) - sum(scores) / 6) ** 2)
                costs.append(math.log(sum(map(math.exp, scores))) - scores[token])
    values = {name: float(value) for name, value in found.loss_values.items()}
    assert values == pytest.approx({"forget": sum(margins) / 4, "retain": 7 * sum(costs) / 4}, rel=1e-5)
    assert is_predicted(LABELS).sum() == len(costs) == 4


def test_flat_logits_are_the_least_loss() -> None:
    """Equal logits cost nothing; a constant added to all changes nothing."""
    model, state = Logits(), State(numbers={"limit": 9.0}, memory={"alpha": 1.0})
    first, moved = (float(PDU().loss(model, state, {"labels": LABELS}, {"labels": LABELS}, 0).loss_values["forget"])  # type: ignore[arg-type]
                    for model.values in (model.values, model.values + 5))  # fmt: skip
    assert first == pytest.approx(moved, rel=1e-4)
    model.values = torch.full((2, 5, 6), 3.0)
    assert PDU().loss(model, state, {"labels": LABELS}, {"labels": LABELS}, 0).loss_values["forget"] == 0  # type: ignore[arg-type]


def test_the_weight_follows_the_cost() -> None:
    """Each step changes it by rate times what retain texts cost above the limit; a topic has its own."""
    method = PDU(alpha=20.0, rate=0.5)
    _, rows, state = fit(method, 12)
    weight = 20.0
    for row in rows:
        assert row["alpha"] == pytest.approx(weight, rel=1e-5)
        cost = row["retain"] / weight
        weight = max(0.0, weight + 0.5 * (cost - state.numbers["limit"]))
    assert state.memory["alpha"] == pytest.approx(weight, rel=1e-4)


def test_the_limit_is_relative_to_the_original() -> None:
    before = retain_cost(EditableModel(pico_module(), ("*",)))
    _, _, state = fit(PDU(slack=0.25), 1)
    assert state.numbers["limit"] == pytest.approx(1.25 * before, rel=1e-5)


def test_a_weight_that_is_zero_stays_zero_below_the_limit() -> None:
    _, rows, state = fit(PDU(alpha=0.0, slack=50.0), 3)
    assert [row["alpha"] for row in rows] == [0.0, 0.0, 0.0]
    assert state.memory["alpha"] == 0


def test_retain_texts_come_back_to_their_limit() -> None:
    """With no weight they suffer; where it follows, forget texts are flattened all the same, and the limit holds."""
    taught = fit(Taught(), 60)[0].module
    free, _, _ = fit(PDU(alpha=0.0, rate=0.0), 60, copy.deepcopy(taught))
    held, rows, state = fit(PDU(alpha=10.0, rate=10.0), 60, taught)
    assert retain_cost(held) <= 1.1 * state.numbers["limit"] < 0.5 * retain_cost(free)
    assert rows[-1]["forget"] < 0.8 * rows[0]["forget"]


@pytest.mark.parametrize("option", ["slack", "alpha", "rate"])
def test_options_that_make_no_sense(option: str) -> None:
    with pytest.raises(SrmuError, match=rf"method\.{option}=-1"):
        PDU(**{option: -1.0})


def test_retain_texts_are_needed() -> None:
    with pytest.raises(SrmuError, match=r"method pdu needs retain texts"):
        PDU().check([replace(topic(), retain=[])], TrainOptions())
