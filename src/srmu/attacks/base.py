"""What every attack gets and gives: a model, texts and questions; right answers and numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from srmu.engine.hooks import decoder_blocks
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


@dataclass(frozen=True, kw_only=True)
class Attack(ABC):
    """A way to get at what a model should have forgotten; its fields are its constants.

    `id` is its number in the literature list of docs/attacks.md, `tier` the first one at which it
    runs. With `recovers`, its answers are answers to the exam and count for K*.
    """

    id: ClassVar[str]
    name: ClassVar[str]
    tier: ClassVar[Tier]
    recovers: ClassVar[bool] = True

    @classmethod
    def at_tier(cls, tier: Tier) -> Self:
        """The attack with the constants that it has at a tier."""
        return cls()

    def cost(self, model: Subject) -> str:
        """What the attack takes, in words, where that is hours; it is asked for before it runs."""
        return ""

    @abstractmethod
    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        """Attack the model, and leave it as it was. NotApplicable where the attack says nothing."""


def ask_exam(model: Subject, exam: Exam, setting: str) -> Setting:
    """The exam under the setting that the model is in now."""
    right = mark_answers(model, (*exam.val, *exam.test))
    return Setting(setting, right[: len(exam.val)], right[len(exam.val) :])


def find_matrices(module: PreTrainedModel) -> dict[str, bool]:
    """The linear matrices of the decoder layers, by name: whether they are (inputs, outputs).

    All experts' too, which a module may stack: (experts, outputs, inputs). Not the embeddings, nor
    the head.
    """
    layers = decoder_blocks(module)
    prefix = next(name for name, part in module.named_modules() if part is layers)
    turned = {}
    for name, part in layers.named_modules(prefix=prefix):
        if isinstance(part, nn.Linear | Conv1D):
            turned[f"{name}.weight"] = isinstance(part, Conv1D)
        elif not isinstance(part, nn.Conv1d):
            for key, parameter in part.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    turned[f"{name}.{key}"] = getattr(part, "is_transposed", False)
    return turned


def view_matrices(weight: Tensor, turned: bool) -> Tensor:
    """A view of a weight as (experts, outputs, inputs); `turned` as `find_matrices` says."""
    weight = weight.mT if turned else weight
    return weight if weight.ndim == 3 else weight[None]


def ask_changed(model: Subject, exam: Exam, setting: str, change: Callable[[Tensor], Tensor]) -> Setting:
    """The exam when each linear matrix is what `change` makes of it: (outputs, inputs), float32."""
    turned = find_matrices(model.module)
    with model.editable(*turned) as edited:
        for name, parameter in edited.trained.items():
            for matrix in view_matrices(parameter.data, turned[name]):
                matrix.copy_(change(matrix.float()))
        return ask_exam(model, exam, setting)
