"""What every attack gets and gives: a model, texts and questions; right answers and numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from srmu.engine.loading import find_layers
from srmu.evals.statistics import Estimate
from srmu.evals.subject import Question, Subject, mark_answers

Tier = Literal["smoke", "standard", "deep"]  # minutes on the testbed; an hour; a night


@dataclass(frozen=True)
class Exam:
    """Questions on what is to be forgotten, in two halves that share no fact, and on what is not.

    Settings of an attack are chosen on `val`; results are those on `test`.
    """

    test: tuple[Question, ...]
    val: tuple[Question, ...]
    utility: Mapping[str, tuple[Question, ...]] = field(default_factory=dict)  # by task


@dataclass(frozen=True)
class Texts:
    """Forget texts, harmless ones far from them, and unknown ones that are like the forget set."""

    forget: tuple[str, ...]
    neutral: tuple[str, ...]
    holdout: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """One setting of an attack: 1 for each question answered rightly under it, else 0.

    `val` may be of a part of the validation half; `test` may be empty but for the best setting.
    """

    setting: str
    val: tuple[float, ...]
    test: tuple[float, ...]


@dataclass(frozen=True)
class AttackResult:
    """What an attack brought back: its settings, other numbers by name, and what it spent."""

    ways: tuple[Setting, ...] = ()
    metrics: Mapping[str, Estimate] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)


def ask_exam(model: Subject, exam: Exam, setting: str) -> Setting:
    """The exam under the setting that the model is in now."""
    got = mark_answers(model, (*exam.val, *exam.test))
    return Setting(setting, got[: len(exam.val)], got[len(exam.val) :])


def find_matrices(module: PreTrainedModel) -> dict[str, bool]:
    """The linear matrices of the decoder layers, by name: whether they are (inputs, outputs).

    All experts' too, which a module may stack: (experts, outputs, inputs). Not the embeddings, nor
    the head.
    """
    owner, attribute = find_layers(module)
    layers = getattr(owner, attribute)
    prefix = next(name for name, part in module.named_modules() if part is layers)
    found = {}
    for name, part in layers.named_modules(prefix=prefix):
        if isinstance(part, nn.Linear | Conv1D):
            found[f"{name}.weight"] = isinstance(part, Conv1D)
        elif not isinstance(part, nn.Conv1d):
            for key, parameter in part.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    found[f"{name}.{key}"] = getattr(part, "is_transposed", False)
    return found


def view_matrices(weight: Tensor, turned: bool) -> Tensor:
    """A view of a linear matrix as (experts, outputs, inputs); `turned` as `matrices` says."""
    weight = weight.mT if turned else weight
    return weight if weight.ndim == 3 else weight[None]


def ask_changed(
    model: Subject, exam: Exam, setting: str, change: Callable[[Tensor], Tensor]
) -> Setting:
    """The exam when each linear matrix is what `change` makes of it: (outputs, inputs), float32."""
    turned = find_matrices(model.module)
    with model.editable(*turned) as edited:
        for name, parameter in edited.trained.items():
            for matrix in view_matrices(parameter.data, turned[name]):
                matrix.copy_(change(matrix.float()))
        return ask_exam(model, exam, setting)
