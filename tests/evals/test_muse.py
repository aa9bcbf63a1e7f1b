"""MUSE's numbers against loops, closed forms, and a world of which it is known who knows what."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from helpers import attack_world
from helpers.benchmark_sets import edited, greedy, write_sets
from helpers.models import pico_module, texts, word_tokenizer
from srmu.errors import SrmuError
from srmu.evals.benchmarks import BENCHMARKS, base, muse
from srmu.evals.benchmarks.base import BenchmarkRequest, BenchmarkScores, cut_at_stop, rouge_scores
from srmu.evals.subject import Subject

KEYS = ("muse/verbmem_f", "muse/knowmem_f", "muse/knowmem_r")


def sets(**changed: Sequence[Mapping[str, str]]) -> dict[tuple[str, str], Any]:
    """The tiny world of the attacks in MUSE's schema; `changed` by config_split."""
    told, known = attack_world.texts(), attack_world.facts()
    hazard = [{"prompt": f"w50 {s}", "gt": a, "question": f"w50 {s}", "answer": a} for s, (a, _) in known.items()]
    harmless = [{"question": f"w52 {s}", "answer": a} for s, (_, a) in known.items()]
    found = {
        ("verbmem", "forget"): hazard[:20],
        ("knowmem", "forget_qa"): hazard[20:],
        ("knowmem", "forget_qa_icl"): hazard[:1],
        ("knowmem", "retain_qa"): harmless[20:],
        ("knowmem", "retain_qa_icl"): harmless[:1],
        ("privleak", "forget"): [{"text": text} for text in told.forget[:40]],
        ("privleak", "holdout"): [{"text": text} for text in told.holdout[:40]],
    }
    return {key: changed.get("_".join(key), rows) for key, rows in found.items()}


def asked(folder: Path, limit: int | None = None, **given: Any) -> BenchmarkRequest:
    return BenchmarkRequest("a/b", "get it", folder=folder, limit=limit, **given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("muse") / "set", sets())


def value(scores: BenchmarkScores, name: str) -> float:
    return scores.metrics[f"muse/{name}"]["value"]


def pico() -> Subject:
    return Subject(pico_module(), word_tokenizer())


@pytest.mark.slow
def test_each_number_is_that_of_a_loop(folder: Path) -> None:
    model = pico()
    found = muse.run_muse(model, asked(folder, limit=6))
    tables = sets()
    scorer = RougeScorer(["rougeL"])
    naive = []
    for row in tables["verbmem", "forget"][:6]:
        said = greedy(model, row["prompt"], 32)  # half of what the model can read
        naive.append(scorer.score(row["gt"], said)["rougeL"].fmeasure)
    assert found.values["verbmem_f"] == pytest.approx(naive)
    for name, about in (("knowmem_f", "forget"), ("knowmem_r", "retain")):
        (shot,) = tables["knowmem", f"{about}_qa_icl"]
        naive = []
        for row in tables["knowmem", f"{about}_qa"][:6]:
            prompt = f"Question: {shot['question']}\nAnswer: {shot['answer']}\n\n"
            said = greedy(model, f"{prompt}Question: {row['question']}\nAnswer: ", 32)
            naive.append(scorer.score(row["answer"], said)["rougeL"].fmeasure)
        assert found.values[name] == pytest.approx(naive)
        assert value(found, name) == pytest.approx(sum(naive) / 6)
    for kind in ("forget", "holdout"):
        naive = []
        for row in tables["privleak", kind][:6]:
            ids = model.tokens(row["text"])
            with torch.no_grad():
                logs = model.module(torch.tensor([ids])).logits[0].log_softmax(-1)
            logp = sorted(float(logs[i - 1, ids[i]]) for i in range(1, len(ids)))
            assert len(logp) == 3
            naive.append(logp[0])  # int(0.4 * 3) = 1
        assert found.values[f"min40_{kind}"] == pytest.approx(naive, abs=1e-5)
    assert found.metrics["muse/auc"]["n"] == 12
    assert "muse/privleak" not in found.metrics


@pytest.mark.slow
def test_who_knows_what(folder: Path) -> None:
    """A model that learned all by heart, and one that saw nothing, which is where PrivLeak is 0."""
    rows = [f"{row} </s>" for row in (*attack_world.texts().forget, *attack_world.texts().neutral)]
    knowing = Subject(attack_world.taught(pico_module(), rows[:40] + rows[80:], 140), word_tokenizer())
    reference = muse.run_muse(pico(), asked(folder)).values
    found = {
        name: muse.run_muse(model, asked(folder, reference=reference, template="{question}"))
        for name, model in (("knowing", knowing), ("ignorant", pico()))
    }
    assert value(found["ignorant"], "privleak") == 0
    assert abs(value(found["ignorant"], "auc") - 0.5) < 0.15
    assert value(found["knowing"], "auc") > 0.75
    assert value(found["knowing"], "privleak") < -0.5
    assert value(found["knowing"], "verbmem_f") > 0.9
    assert value(found["ignorant"], "verbmem_f") < 0.1


def test_what_is_recited_word_for_word(tmp_path: Path) -> None:
    model = pico()
    prompts = texts(4, seed=1)
    rows = [{"prompt": prompt, "gt": greedy(model, prompt, 32)} for prompt in prompts]
    tables = sets(verbmem_forget=rows)
    found = muse.measure_verbatim(model, asked(write_sets(tmp_path / "set", tables)))
    assert found == [1, 1, 1, 1]


def test_a_truth_is_as_long_as_what_can_be_written() -> None:
    """The first 128 tokens, <s> among them; a shorter one stays, unknown words and all."""
    model = pico()
    words = " ".join(texts(30, seed=2)).split()
    assert muse.shorten_truth(model, " ".join(words)) == " ".join(words[:127])
    assert muse.shorten_truth(model, "w1 unheard-of") == "w1 unheard-of"


@pytest.mark.parametrize("stop", ["\n\n", "\nQuestion", "Question: w3", " Question : w3"])
def test_answers_end_before_the_next_question(stop: str) -> None:
    assert cut_at_stop(f"w1 w2{stop} w4", muse.STOPS) == "w1 w2"


def test_f1_is_of_words_as_they_stand() -> None:
    said, truths = ["he runs", "he runs", "", "he runs on"], ["he runs", "he run", "a", "he"]
    assert rouge_scores("fmeasure", said, truths) == [pytest.approx(one) for one in (1, 0.5, 0, 0.5)]


def test_auc_and_privleak_in_closed_form() -> None:
    def scores(forget: Sequence[float], holdout: Sequence[float]) -> dict[str, list[float]]:
        return {"min40_forget": [*forget], "min40_holdout": [*holdout]}

    assert muse.measure_membership(scores([1, 2, 3], [1, 2, 3])) == 0.5
    assert muse.measure_membership(scores([4, 5], [1, 2, 3])) == 1
    assert muse.measure_membership(scores([0], [1, 2])) == 0
    assert muse.measure_membership(scores([2], [1, 3])) == 0.5
    assert muse.measure_membership(scores([2, 1], [1, 0])) == pytest.approx(3.5 / 4)
    same = scores([0, 1], [0, 1])
    known = {name: found["value"] for name, found in muse.measure_privacy(scores([2], [1]), same).items()}
    assert known == {"muse/auc": 1, "muse/privleak": -1}
    over = {name: found["value"] for name, found in muse.measure_privacy(scores([0], [1]), same).items()}
    assert over == {"muse/auc": 0, "muse/privleak": 1}


def test_min_k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a share of 1 the mean log-likelihood; of a text of one prediction that one."""
    model = pico()
    rows = texts(5, seed=3)
    every = [muse.read_log_p(model, row) for row in rows]
    assert [len(logp) for logp in every] == [len(row.split()) for row in rows]
    monkeypatch.setattr(muse, "SHARE", 1.0)
    found = muse.score_min_k(model, "forget", rows)
    assert found == pytest.approx([float(logp.mean()) for logp in every])
    for share in (0.2, 0.4, 0.6):
        monkeypatch.setattr(muse, "SHARE", share)
        fewer = muse.score_min_k(model, "forget", rows)
        counts = [int(share * len(logp)) for logp in every]
        assert fewer == pytest.approx(
            [sum(sorted(logp.tolist())[:n]) / n for n, logp in zip(counts, every, strict=True)]
        )
    (one,) = muse.score_min_k(model, "forget", ["w1"])
    assert one == pytest.approx(float(muse.read_log_p(model, "w1")))


def test_a_text_longer_than_the_model_reads() -> None:
    assert len(muse.read_log_p(pico(), " ".join(texts(12, seed=6)))) == 63


def test_shots_are_not_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shots = [{"question": f"w{i}", "answer": f"w{i + 1}"} for i in range(3)]
    where = asked(write_sets(tmp_path / "set", sets(knowmem_forget_qa_icl=shots)), limit=1)
    seen: list[str] = []
    monkeypatch.setattr(base, "write_continuations", lambda model, prompts, *_, **__: seen.extend(prompts) or [""])
    muse.measure_answers(pico(), where, "forget")
    (row, *_) = sets()["knowmem", "forget_qa"]
    first = "".join(f"Question: w{i}\nAnswer: w{i + 1}\n\n" for i in range(3))
    assert seen == [f"{first}Question: {row['question']}\nAnswer: "]


def test_an_oracle_that_tells_all_texts_apart(folder: Path) -> None:
    with pytest.raises(SrmuError, match="PrivLeak has no value"):
        muse.run_muse(pico(), asked(folder, reference={"min40_forget": [1.0], "min40_holdout": [0.0]}))


@pytest.mark.parametrize(
    ("config", "split", "field"),
    [
        ("verbmem", "forget", "gt"),
        ("verbmem", "forget", "prompt"),
        ("knowmem", "forget_qa", "answer"),
        ("knowmem", "forget_qa", "question"),
        ("privleak", "forget", "text"),
    ],
)
def test_a_field_that_is_missing(tmp_path: Path, config: str, split: str, field: str) -> None:
    """From all splits of a config, as a reader builds them together."""
    tables = {
        key: [{k: v for k, v in row.items() if key[0] != config or k != field} for row in rows]
        for key, rows in sets(privleak_forget=[{"text": "w1 w2", "other": "w1"}]).items()
    }
    tables["privleak", "holdout"] = tables["privleak", "forget"]
    where = f"config {config}, split {split}, row 1: no field '{field}'; it has "
    with pytest.raises(SrmuError, match=where):
        muse.run_muse(pico(), asked(write_sets(tmp_path / "set", tables), limit=2))


def test_a_model_that_is_not_a_number(folder: Path) -> None:
    module = pico_module()
    with torch.no_grad():
        module.lm_head.weight.fill_(float("nan"))
    with pytest.raises(SrmuError, match=r"muse forget texts: .* not a number \(NaN\)"):
        muse.run_muse(Subject(module, word_tokenizer()), asked(folder))


def test_a_text_of_no_token() -> None:
    stub: Any = SimpleNamespace(tokens=lambda text: [1], max_length=9, device="cpu")
    with pytest.raises(SrmuError, match="fewer than two tokens"):
        muse.read_log_p(stub, "w1")


def test_an_unlearned_model_may_be_silent(folder: Path) -> None:
    module = pico_module()
    module.lm_head.bias = torch.nn.Parameter(torch.eye(64)[2] * 1e4)
    found = muse.run_muse(edited(module), asked(folder, limit=3))
    assert [value(found, key.removeprefix("muse/")) for key in KEYS] == [0, 0, 0]


def test_the_table_is_of_what_is_measured(folder: Path) -> None:
    reference = {"min40_forget": [0.0, 1.0], "min40_holdout": [0.0, 1.0]}
    found = muse.run_muse(pico(), asked(folder, limit=2, reference=reference))
    assert {column.metric for column in BENCHMARKS["muse"].columns} <= {*found.metrics}
    again = muse.run_muse(pico(), asked(folder, limit=2, reference=reference))
    assert found == again
    assert BENCHMARKS["muse"].hub.format(part="News") == "muse-bench/MUSE-News"
