"""What a run measures at its end, and what it says of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

import srmu
from helpers.models import Call, pico_module, save_pico, texts, topic, word_tokenizer, write_jsonl
from srmu.engine.model import EditableModel
from srmu.engine.train import TrainOptions
from srmu.methods.base import Method, Session, State
from srmu.runs import in_memory
from srmu.runs.config import build_config
from srmu.runs.effect import LEARNED, explain_repetition, find_alpha, is_broken, judge_numbers, list_warnings
from srmu.runs.model_card import summarise_record
from srmu.runs.record import read_record
from srmu.runs.run import Run, unlearn_config

LAYER = 2
FORGET, RETAIN = texts(10, 1, range(30)), texts(7, 2, range(20, 60))
TRAIN: dict[str, Any] = {"max_steps": 3, "learning_rate": 1e-2}


def unlearn(**options: Any) -> Any:
    given = {"forget": FORGET, "retain": RETAIN, "method": srmu.SRMU(layer=LAYER), "train": TRAIN} | options
    return srmu.unlearn(pico_module(), word_tokenizer(), **given)


def measured(**options: Any) -> dict[str, float]:
    numbers: dict[str, float] = unlearn(**options)[1].record["effect"]["topics"]["topic"]
    return numbers


@torch.no_grad()
def activations(model: Any, text: str) -> torch.Tensor:
    """Of one text after the layer, without its first token."""
    ids = word_tokenizer()(text, return_tensors="pt")["input_ids"]
    return model(ids, output_hidden_states=True).hidden_states[LAYER + 1][0, 1:]


@torch.no_grad()
def token_costs(model: Any, text: str) -> list[float]:
    ids = word_tokenizer()(text, return_tensors="pt")["input_ids"]
    log_p = model(ids).logits[0].log_softmax(-1)
    return [-float(log_p[i, token]) for i, token in enumerate(ids[0, 1:])]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# --- the numbers


def test_activations_against_a_plain_loop() -> None:
    """On the way from where they were (0) to the target (1), in norms, and how far retain ones left their place."""
    model, result = unlearn()
    before, target = pico_module(), result.state["topic.target"]
    ways, shifts, drifts = [], [], []
    for text in FORGET:
        for was, now in zip(activations(before, text), activations(model, text), strict=True):
            whole, left = float((target - was).norm()), float((target - now).norm())
            ways.append(1 - left / whole)
            shifts.append((whole - left) / float(was.norm()))
    for text in RETAIN:
        for was, now in zip(activations(before, text), activations(model, text), strict=True):
            drifts.append(float((now - was).norm() / was.norm()))
    expected = {"forget_moved": mean(ways), "forget_shift": mean(shifts), "retain_moved": mean(drifts)}
    assert result.record["effect"]["topics"]["topic"] == pytest.approx(expected, rel=1e-4)
    assert mean(shifts) > 0.005 and mean(drifts) > 0.1


def test_likelihoods_against_a_plain_loop() -> None:
    for method in (srmu.NPO(retain="nll"), srmu.SSD()):
        model, result = unlearn(method=method)
        expected = {
            f"{role}_nll_{when}": mean([cost for text in part for cost in token_costs(which, text)])
            for role, part in (("forget", FORGET), ("retain", RETAIN))
            for when, which in (("before", pico_module()), ("after", model))
        }
        assert result.record["effect"]["topics"]["topic"] == pytest.approx(expected, rel=1e-4)
        assert abs(expected["forget_nll_after"] - expected["forget_nll_before"]) > 1e-3


def test_without_retain_texts_nothing_is_said_of_them() -> None:
    assert set(measured(method=srmu.GA(), retain=())) == {"forget_nll_before", "forget_nll_after"}


def test_several_layers_are_averaged() -> None:
    method = srmu.MultiSite(layers=(0, 2), window=1)
    model = EditableModel(pico_module(), method.trainable, method.depth)
    state = method.apply(model, [topic()], Session(TrainOptions(**TRAIN), lambda *step: None)).states["bio"]
    with torch.no_grad():
        whole = method.measure_effect(model, topic(), state)
        each = [method.part(i).measure_effect(model, topic(), part) for i, part in state.memory["parts"].items()]
    assert whole == pytest.approx({key: (each[0][key] + each[1][key]) / 2 for key in whole})
    assert each[0] != each[1] and whole["forget_moved"] > 0


def test_the_weights_change_relative_to_their_norm() -> None:
    _, result = unlearn()
    before = pico_module()
    moved = [tensor - before.get_parameter(name).data for name, tensor in result.delta.items()]
    size = sum(float(before.get_parameter(name).data.square().sum()) for name in result.delta)
    expected = (sum(float(change.square().sum()) for change in moved) / size) ** 0.5
    assert result.record["effect"]["weights"] == pytest.approx(expected, rel=1e-5)
    assert expected > 1e-3


@pytest.mark.parametrize(
    "method",
    [
        srmu.SRMU(layer=LAYER, direction="resampled", map_mode="ema"),
        srmu.SRMU(layer=LAYER, map_mode="per_batch", target_mode="additive"),
        srmu.AdaptiveRMU(layer=LAYER, norm_source="updated", norm_when="per_batch"),
        srmu.AdaptiveRMU(layer=LAYER, norm_when="per_token"),
        srmu.RNA(layer=LAYER),
        srmu.NPO(),
    ],
)
def test_measuring_changes_nothing(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the tensors, bit for bit, nor what the method drew, measured and recorded."""
    model, result = unlearn(method=method)
    monkeypatch.setattr(in_memory, "measure_effect", lambda *args: {})
    other, plain = unlearn(method=method)
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in model.state_dict().items())
    for one, two in ((result.delta, plain.delta), (result.state, plain.state)):
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert result.record["topics"] == plain.record["topics"]


@pytest.mark.parametrize("cls", [srmu.SRMU, srmu.RMU, srmu.AdaptiveRMU])
def test_the_default_rate_moves_forget_activations(cls: Any) -> None:
    """Where no retain loss holds them, by what a run does not call little, whatever the width; 5e-5 does not."""
    rates = {"default": {}, "of a 7B model": {"learning_rate": 5e-5}}
    shifts = {name: measured(method=cls(layer=LAYER, alpha=0.0), train=given) for name, given in rates.items()}
    assert shifts["default"]["forget_shift"] > LEARNED["forget_shift"] > shifts["of a 7B model"]["forget_shift"]


# --- the sentence


def moved(shift: float, drift: float = 0.01, way: float = 0.1) -> dict[str, float]:
    return {"forget_moved": way, "forget_shift": shift, "retain_moved": drift}


def nats(forget: float, retain: float = 0.0) -> dict[str, float]:
    rises = {"forget": forget, "retain": retain}
    return {f"{role}_nll_{when}": 2.0 + rise * (when == "after")
            for role, rise in rises.items() for when in ("before", "after")}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "numbers", "says"),
    [
        (srmu.SRMU(), moved(0.2), "little was learned; try train.learning_rate=0.0005, or srmu auto"),
        (srmu.SRMU(), moved(1e-9), "little was learned; try train.learning_rate=0.001, or srmu auto"),
        (srmu.SRMU(), moved(0.4, way=0.9), "little was asked for; try method.kappa=8"),
        (srmu.SRMU(), moved(3.0, drift=1.0), "the retain texts suffered; try train.learning_rate=1e-05"),
        (srmu.SRMU(), moved(3.0, drift=10.5), "the model is broken; try train.learning_rate=3e-06"),
        (srmu.SRMU(), moved(float("nan")), "the model is broken; try train.learning_rate=3e-06"),
        (srmu.SRMU(), moved(3.0), "srmu eval and srmu attack say what is left of the knowledge"),
        (srmu.NPO(), nats(0.05), "little was learned; try train.learning_rate=0.001, or srmu auto"),
        (srmu.NPO(), nats(1.0, 2.0), "the retain texts suffered; try train.learning_rate=6e-06"),
        (srmu.NPO(), nats(float("inf")), "the model is broken; try train.learning_rate=3e-06"),
        (srmu.NPO(), nats(1.0), "srmu eval and srmu attack say what is left of the knowledge"),
        (srmu.RenameScrub(), nats(0.27), "srmu eval and srmu attack say what is left of the knowledge"),
        (srmu.SSD(), nats(0.1), "little was learned; see its options: srmu info methods ssd"),
        (srmu.SSD(), nats(2.0, 2.0), "the retain texts suffered; see its options: srmu info methods ssd"),
    ],
)
def test_what_the_numbers_mean_and_what_to_type_next(method: Method, numbers: dict[str, float], says: str) -> None:
    assert judge_numbers(method, numbers, 0.01, 5e-5) == says
    assert is_broken(numbers) == ("broken" in says)


def test_what_holds_a_run_back() -> None:
    """Too large a weight of the retain loss is told from too low a learning rate, and from weights that moved far."""
    low = {"forget_moved": 0.009, "forget_shift": 0.072, "retain_moved": 0.009}
    held = {"forget_moved": 0.0063, "forget_shift": 0.051, "retain_moved": 0.013}
    assert judge_numbers(srmu.SRMU(), low, 0.016, 5e-5).endswith("try train.learning_rate=0.001, or srmu auto")
    assert judge_numbers(srmu.SRMU(), held, 0.033, 5e-4).endswith(
        "the retain loss holds the forget activations back; try method.alpha=47"
    )
    assert judge_numbers(srmu.SRMU(), low, 0.3, 5e-5).endswith(
        "try method.alpha=120; srmu auto looks for other settings"
    )
    far = {"forget_moved": 0.00001, "forget_shift": 0.0001, "retain_moved": 0.01}
    assert judge_numbers(srmu.SRMU(alpha=1e5), far, 0.033, 5e-4).endswith("try method.alpha=100")


@pytest.mark.parametrize(("method", "numbers"), [(srmu.SRMU(), moved(0.71, 0.46)), (srmu.NPO(), nats(0.2, 0.3))])
def test_more_is_not_advised_where_it_would_cost_the_retain_texts(method: Method, numbers: dict[str, float]) -> None:
    """The first numbers are SmolLM2-135M's at alpha=16; at the lower weight that was advised retain texts suffered."""
    assert judge_numbers(method, numbers, 0.08, 5e-4) == (
        "the retain texts suffer before the forget texts do; srmu auto looks for other settings"
    )


def test_a_topic_with_options_of_its_own_is_advised_to_change_them(tmp_path: Path) -> None:
    """Those of the method do not reach it."""
    parts = {"forget": write_jsonl(tmp_path / "f.jsonl", FORGET), "retain": write_jsonl(tmp_path / "r.jsonl", RETAIN)}
    config = {
        "model": str(save_pico(tmp_path / "model")),
        "method": {"name": "srmu", "layer": LAYER, "alpha": 0.0},
        "topics": {"a": parts | {"kappa": 0.0}, "b": parts},
        "train": {"max_steps": 2},
        "runs_dir": str(tmp_path / "runs"),
    }
    (warning,) = unlearn_config(build_config(config)).record["effect"]["warnings"]
    assert warning.startswith("a: the strength is 0") and warning.endswith("set topics.a.kappa=8")
    assert "try topics.a.alpha=" in judge_numbers(
        srmu.SRMU(),
        {"forget_moved": 0.0063, "forget_shift": 0.051, "retain_moved": 0.013}, 0.033, 5e-4, "topics.a",
    )  # fmt: skip


@pytest.mark.parametrize("alpha", [30.0, 1200.0])
@pytest.mark.parametrize("shared", [0.1, 0.25, 1.0])
def test_the_weight_at_which_shared_activations_move(alpha: float, shared: float) -> None:
    """Where all that moves is shared, the advice ends at twice the least shift, from whatever weight it starts."""
    way, aim = 8.0, 2.0

    def settle(weight: float) -> dict[str, float]:
        grid = torch.linspace(0, way, 80001, dtype=torch.float64)
        x = float(grid[((way - grid) ** 2 + weight * (shared * grid) ** 2).argmin()])
        return {"forget_moved": x / way, "forget_shift": x, "retain_moved": shared * x}

    advised = find_alpha(alpha, settle(alpha))
    assert advised is not None
    assert settle(advised)["forget_shift"] == pytest.approx(aim, rel=0.01)


def test_a_run_that_does_little_says_so(workplace: Path, call: Call) -> None:
    """On the command line, in the record, on the model card, and in memory: the same sentence."""
    given = ["method.layer=2", "train.max_steps=3", "train.learning_rate=1e-5", f"runs_dir={workplace / 'runs'}"]
    sources = ["--forget", workplace / "forget.jsonl", "--retain", workplace / "retain.jsonl"]
    code, out, _ = call("unlearn", *given, "--model", workplace / "model", *sources)
    (folder,) = (workplace / "runs").iterdir()
    effect = read_record(folder / "record.json")["effect"]
    (sentence,) = effect["sentences"]
    assert code == 0 and sentence in out.splitlines()
    assert sentence.startswith("topic: forget activations moved 0.")
    assert sentence.endswith("little was learned; try train.learning_rate=0.0002, or srmu auto")
    card = summarise_record(read_record(folder / "record.json"))
    assert sentence.removeprefix("topic: ") in card
    _, result = unlearn(train=TRAIN | {"learning_rate": 1e-5})
    assert result.record["effect"] == effect


def test_before_something_was_measured_nothing_is_called_suppressed(workplace: Path) -> None:
    forget, retain = (str(workplace / f"{role}.jsonl") for role in ("forget", "retain"))
    given = ["method.layer=2", "train.max_steps=2", "train.learning_rate=1e-3", f"runs_dir={workplace / 'runs'}"]
    run = unlearn_config(
        srmu.make_config(str(workplace / "model"), forget, retain, "srmu", given), out=workplace / "out"
    )
    for page in (summarise_record(run.record), (workplace / "out" / "README.md").read_text()):
        assert "attempted; effect not measured" in page
        assert "suppress" not in page.lower()
    asked = run.record | {"results": {"before": {}, "after": {"quiz/acc": {"value": 0.25, "n": 4.0}}}}
    assert "not measured" not in summarise_record(asked)


def test_a_run_that_diverged_measures_nothing(workplace: Path) -> None:
    forget, retain = (str(workplace / f"{role}.jsonl") for role in ("forget", "retain"))
    given = ["method.layer=2", "train.max_steps=3", "train.learning_rate=1e30", f"runs_dir={workplace / 'runs'}"]
    with pytest.raises(srmu.DivergedError):
        unlearn_config(srmu.make_config(str(workplace / "model"), forget, retain, "srmu", given))
    (folder,) = (workplace / "runs").iterdir()
    assert Run.open(folder).record["effect"]["topics"] == {}


# --- warnings


def warnings(**options: Any) -> list[str]:
    found: list[str] = unlearn(**options)[1].record["effect"]["warnings"]
    return found


def test_an_ordinary_run_has_no_warning() -> None:
    assert warnings() == []


@pytest.mark.parametrize(
    "method", [srmu.SRMU(layer=LAYER, kappa=0), srmu.RMU(layer=LAYER, coeff=0), srmu.MultiSite(layers=(1, 2), kappa=0)]
)
def test_a_strength_of_zero(method: Method) -> None:
    (says,) = warnings(method=method, train=TRAIN | {"learning_rate": 1e-4})
    assert "the strength is 0" in says and "method.kappa=8" in says


def test_one_forget_document() -> None:
    (says,) = warnings(forget=FORGET[:1])
    assert "one forget document" in says


def test_texts_in_both_sets() -> None:
    (says,) = warnings(retain=[*RETAIN, FORGET[0], FORGET[1], FORGET[1]])
    assert f"2 of {len(FORGET)} forget texts are retain texts, too" in says


@pytest.mark.parametrize("cls", [srmu.SRMU, srmu.MultiSite])
def test_a_map_that_is_nearly_flat(cls: type[Method], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srmu.runs.effect.FLAT", 1.0)
    layers = {"layer": LAYER} if cls is srmu.SRMU else {"layers": (LAYER,)}
    assert "the map is nearly flat" in warnings(method=cls(**layers))[0]
    if cls is srmu.SRMU:  # flat on purpose
        assert warnings(method=srmu.SRMU(layer=LAYER, importance="uniform")) == []


@pytest.mark.parametrize(
    ("retain", "rings"),
    [
        ([0, 1e-4, 2e-4, 3e-4], False),
        ([0, 1e-4, 0.09], False),  # a thousandfold of next to nothing
        ([0, 1e-3, 0.5, 2.0], True),
        ([0, 0.9, 5.0], False),
        ([1e-8, 0.9, 5.0], False),  # some models round
        ([0, 11.0], True),  # at once
        ([2.0, 2.5, 1.0], False),  # a likelihood, which does not begin at 0
        ([0, *[1e-3] * 9, 2.0], False),  # later the stop rule watches
    ],
)
def test_a_retain_loss_that_runs_away_in_the_first_steps(retain: list[float], rings: bool) -> None:
    steps = [{"step": i, "forget": 1.0, "retain": value} for i, value in enumerate(retain)]
    says = list(list_warnings(srmu.NPO(), topic(), State(), steps))
    assert any("retain loss rose" in text for text in says) == rings


def test_a_run_whose_retain_loss_jumps_warns() -> None:
    """Steps as large as the weights, whose retain loss the stop rule for later steps lets pass."""
    assert "the retain loss rose to" in warnings(train={"max_steps": 4, "learning_rate": 3.0})[0]


def test_each_topic_has_its_own_sentence_and_warnings(tmp_path: Path) -> None:
    save_pico(tmp_path / "model")
    write_jsonl(tmp_path / "forget.jsonl", FORGET)
    write_jsonl(tmp_path / "one.jsonl", FORGET[:1])
    retain = write_jsonl(tmp_path / "retain.jsonl", RETAIN)
    sets = {name: {"forget": str(tmp_path / f"{file}.jsonl"), "retain": str(retain)}
            for name, file in (("many", "forget"), ("single", "one"))}  # fmt: skip
    sets["many"]["kappa"] = 0  # type: ignore[assignment]
    tree = {"model": str(tmp_path / "model"), "topics": sets, "runs_dir": str(tmp_path / "runs")}
    tree |= {"method": {"name": "srmu", "layer": LAYER}, "train": TRAIN | {"learning_rate": 1e-4}}
    effect = unlearn_config(srmu.Config.model_validate(tree)).record["effect"]
    assert [text.split(":")[0] for text in effect["sentences"]] == ["many", "single"] == list(effect["topics"])
    assert [text.split(":")[0] for text in effect["warnings"]] == ["many", "single"]


# --- a model that repeats itself


@pytest.mark.parametrize("known", [{}, {"quiz/acc": {"value": 0.5}}])
def test_a_model_that_repeats_itself_is_named(known: dict[str, Any]) -> None:
    def results(before: float, after: float) -> dict[str, Any]:
        shares = {"before": before, "after": after}
        return {when: known | {f"repetition/{kind}": {"value": share}} for when, share in shares.items()}

    kind = "forget"
    says = "after forget prompts the model repeats itself: 83 % of its four-token sequences, 4 % before"
    assert explain_repetition(results(0.04, 0.83)) == [says]
    assert explain_repetition(results(0.04, 0.18)) == explain_repetition(results(0.83, 0.04)) == []
    kind = "neutral"
    (damage,) = explain_repetition(results(0.04, 0.83))
    assert damage == says.replace("forget", "neutral") + ", which is damage: try a weaker setting"
    # what was not measured, on one side or on both, says nothing
    assert explain_repetition({"after": results(0, 1)["after"]}) == explain_repetition({}) == []
