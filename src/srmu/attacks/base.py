"""What every attack gets and gives: a model, texts and questions; right answers and numbers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, ClassVar, Literal, Self, dataclass_transform

from srmu.evals.statistics import Estimate
from srmu.evals.subject import NotApplicable, Question, Subject, mark_answers

Marker = Callable[[Sequence[Question]], Sequence[float]]  # 1 for each question that is answered rightly, else 0
Tier = Literal["smoke", "standard", "deep"]  # minutes on the testbed; an hour; a night


@dataclass(frozen=True)
class Setting:
    """One setting of an attack: 1 for each question answered rightly under it, else 0."""

    setting: str
    val: tuple[float, ...]  # of the validation half, or a part of it
    test: tuple[float, ...]  # may be empty but for the best setting; `val` may be where the exam has an `only`


@dataclass(frozen=True)
class Exam:
    """Questions on what is to be forgotten, in two halves that share no fact, and on what is not."""

    test: tuple[Question, ...]
    val: tuple[Question, ...]  # on which settings of an attack are chosen
    utility: Mapping[str, tuple[Question, ...]] = field(default_factory=dict)  # by task
    only: str = ""  # the one setting to ask, and of the test half alone: another model has chosen it
    run_test: tuple[Question, ...] = ()  # the test half of that model, where this one is another

    @property
    def both(self) -> tuple[Question, ...]:
        return (*self.val, *self.test)

    def split_right(self, setting: str, right: Sequence[float]) -> Setting:
        return Setting(setting, tuple(right[: len(self.val)]), tuple(right[len(self.val) :]))


@dataclass(frozen=True)
class Texts:
    """Forget texts, harmless ones far from them, and unknown ones that are like the forget set."""

    forget: tuple[str, ...]
    neutral: tuple[str, ...]
    holdout: tuple[str, ...] = ()


@dataclass(frozen=True)
class Price:
    """What it takes to bring a share of the original's knowledge back; None: more than was tried."""

    share: float
    steps: float | None
    low: float | None  # of the 95 % interval of the steps
    high: float | None
    tried: int  # steps, the most
    tokens: float | None = None
    flop: float | None = None


@dataclass(frozen=True)
class AttackResult:
    """What an attack brought back: its settings, other numbers by name, and what it spent beside its constants."""

    ways: Sequence[Setting] = ()
    metrics: Mapping[str, Estimate] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)
    price: Sequence[Price] = ()  # of bringing knowledge back by the best setting
    status: Literal["done", "does not apply", "failed"] = "done"
    why: str = ""  # the reason, where it is not done


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Attack(ABC):
    """A way to get at what a model should have forgotten: each subclass is a frozen dataclass of its constants."""

    id: ClassVar[str]  # in docs/attacks.md
    name: ClassVar[str]
    tier: ClassVar[Tier]  # the first one at which it runs
    by_tier: ClassVar[Mapping[Tier, Mapping[str, Any]]]  # constants that differ at a tier

    def __init_subclass__(cls, id: str, name: str, tier: Tier, by_tier: Mapping[Tier, Mapping[str, Any]] = {}) -> None:
        cls.id, cls.name, cls.tier, cls.by_tier = id, name, tier, by_tier
        dataclass(frozen=True, kw_only=True)(cls)

    @classmethod
    def at_tier(cls, tier: Tier) -> Self:
        return cls(**cls.by_tier.get(tier, {}))

    def cost(self, model: Subject) -> tuple[str, float]:
        """What the attack takes, in words and in seconds, where that is hours; it is asked for before it runs."""
        return "", 0.0

    @abstractmethod
    def run(self, model: Subject, texts: Texts, exam: Exam, seed: int) -> AttackResult:
        """Attack the model, and leave it as it was. NotApplicable where the attack says nothing."""


def guess_share(questions: Sequence[Question]) -> float:
    """The accuracy of guessing."""
    return fmean(1 / len(q.options) for q in questions)


def ask_exam(model: Subject, exam: Exam, setting: str) -> Setting:
    """The exam under the setting that the model is in now; the test half alone where another model chose it."""
    exam = replace(exam, val=()) if exam.only else exam
    return exam.split_right(setting, mark_answers(model, exam.both))


def choose_setting(exam: Exam, settings: Mapping[str, Marker]) -> list[Setting]:
    """The validation half under each setting, and the test half under the best of them, the first of equals.

    A setting marks questions of either half. Where the exam has an `only`, that one marks the test half.
    """
    if exam.only:
        if exam.only not in settings:
            raise NotApplicable("the setting chosen for the run does not exist on the original")
        return [Setting(exam.only, (), (*settings[exam.only](exam.test),))]
    ways = {name: Setting(name, (*ask(exam.val),), ()) for name, ask in settings.items()}
    best = max(ways.values(), key=lambda way: sum(way.val))
    return [*(ways | {best.setting: replace(best, test=(*settings[best.setting](exam.test),))}).values()]
