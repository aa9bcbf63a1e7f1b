"""rename_scrub: its equations against loops, what it writes nowhere, and what it refuses."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import attack_world as world
from helpers.models import pico_module, pieces, save_pico, texts, word_tokenizer, write_jsonl
from helpers.models import topic as tiny_topic
from srmu.data.names import Names, Slot
from srmu.engine.losses import kl_divergence
from srmu.engine.model import EditableModel
from srmu.engine.topic import Batch, Topic
from srmu.errors import SrmuError
from srmu.evals.subject import Subject, mark_answers
from srmu.methods.own_texts import Likeness, Spelling, continue_texts, free_samples, typical_tokens, unpad_texts
from srmu.methods.rename_scrub import (
    OwnTexts,
    RenameScrub,
    count_still_told,
    kept_tokens,
    leave_one_out,
    pack_sentences,
    sentences_of,
)
from srmu.runs.config import make_config
from srmu.runs.run import unlearn_config

NAMES = str(Path(__file__).parents[1] / "helpers" / "names.txt")
SMALL: dict[str, Any] = {
    "names": NAMES, "own_texts": 12, "own_tokens": 10, "prompt": 2, "renamings": 3, "keep_rows": 2,
    "held_out": 2,
}  # fmt: skip


def logs(*shape: int, seed: int = 0) -> torch.Tensor:
    draw = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (3 * draw).log_softmax(-1)


def test_the_target_is_the_mean_of_the_other_namings() -> None:
    """Against a loop: groups, namings, places, tokens."""
    log_p = logs(2, 4, 3, 5)
    target, told = leave_one_out(log_p)
    for g in range(2):
        for k in range(4):
            for place in range(3):
                others = [log_p[g, j, place].exp() for j in range(4) if j != k]
                mean = sum(others[1:], others[0]) / 3
                assert torch.allclose(target[g, k, place].exp(), mean, atol=1e-6)
                p = log_p[g, k, place].exp()
                nats = sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, mean, strict=True))
                assert float(told[g, k, place]) == pytest.approx(nats, abs=1e-5)


def test_what_no_naming_changes_is_not_told() -> None:
    same = logs(1, 1, 3, 5).expand(1, 4, 3, 5)
    target, told = leave_one_out(same)
    assert torch.allclose(target, same, atol=1e-6) and float(told.abs().max()) < 1e-6
    # a model that says the mean everywhere has nothing left to learn
    assert float(kl_divergence(target, same).abs().max()) < 1e-6


def test_an_own_answer_has_no_part_in_its_target() -> None:
    """With K namings that all answer differently, a name's own answer gets nothing, others
    1 / (K - 1)."""
    sure = torch.full((1, 4, 1, 6), -30.0)
    for k in range(4):
        sure[0, k, 0, k] = 0.0
    target, _ = leave_one_out(sure.log_softmax(-1))
    for k in range(4):
        wanted = [0.0 if token == k or token > 3 else 1 / 3 for token in range(6)]
        assert target[0, k, 0].exp().tolist() == pytest.approx(wanted, abs=1e-6)


def test_still_told_equals_a_loop() -> None:
    log_p, top = logs(2, 3, 4, 6), torch.randint(6, (2, 3, 4), generator=torch.manual_seed(1))
    log_p[0, 0, 0, top[0, 1, 0]] = log_p[0, 0, 0, top[0, 0, 0]]  # a tie
    where = torch.rand(2, 3, 4, generator=torch.manual_seed(2)) > 0.3
    wins, pairs = 0.0, 0
    for g, k, place in where.nonzero().tolist():
        for j in range(3):
            mine, other = int(top[g, k, place]), int(top[g, j, place])
            if mine != other:
                a, b = float(log_p[g, k, place, mine]), float(log_p[g, k, place, other])
                wins, pairs = wins + (a > b) + 0.5 * (a == b), pairs + 1
    assert count_still_told(log_p, top, where) == (wins, pairs)


def test_places_of_names_of_several_tokens() -> None:
    """What is read at an item's end is the model's prediction there, in every naming."""
    tokenizer = word_tokenizer()
    names = Names.encode(["w1", "w2 w3", "w4 w5 w6"], tokenizer)
    like = Likeness([[4]], [[4]], names, Spelling(frozenset([0])))
    ids = tokenizer("w9 w1 w8 w2 w3 w7")["input_ids"]
    sentences = sentences_of([ids], names, AllForget(), 1)
    told = pack_sentences(sentences, 20, 1, torch.Generator())
    own = OwnTexts(names, told, [], [], Topic("bio", [], [], 0))
    group = own.group(told, 4, "0")
    model = EditableModel(pico_module(), ("*",))
    found = group.read(model)
    for k in range(4):
        row = group.batch["input_ids"][k][group.batch["attention_mask"][k] == 1]
        alone = Batch(input_ids=row[None], attention_mask=torch.ones_like(row)[None])
        plain = model.logits(alone)[0].log_softmax(-1)
        for item, place in enumerate(group.places[0, k].tolist()):
            assert torch.allclose(found[0, k, item], plain[place], atol=1e-4)
    assert [type(i) for i in told[0].template if isinstance(i, Slot)] == [Slot, Slot]
    assert not like.nats


class AllForget:
    """Calls every sentence like the forget texts."""

    def sentences(self, items: Any) -> Any:
        yield 0, len(items), "forget"


def test_likeness_tells_sentences_apart() -> None:
    """Names (2) say nothing, nor does what all texts have (9); 0 ends a sentence."""
    forget = [[2, 9, 10, 11, 0]] * 20
    near = [[2, 9, 20, 21, 0], [9, 22, 23, 0]] * 10 + [[9, 24, 0], [9, 25, 0]] * 15
    like = Likeness(forget, near + forget[:6], Names((((2,),),)), Spelling(frozenset([0])))
    assert [*like.sentences([2, 9, 10, 11, 0, 2, 9, 20, 21, 0])] == [(0, 5, "forget"), (5, 10, "keep")]
    assert [kind for *_, kind in like.sentences([2, 9, 0])] == ["neither"]
    # what has a word of the forget set's own is never kept
    assert [kind for *_, kind in like.sentences([2, 20, 21, 22, 23, 11, 0])] == ["neither"]


def test_likeness_is_of_words_not_of_their_pieces() -> None:
    """A piece that only words of the forget set share with a harmless one speaks for neither."""
    tokenizer = pieces(["kanor bread", "dufor steel", "mulat steel", "kanat bread"] * 9, size=60)
    texts = {
        "forget": ["kanor bursts by dufor", "mulor bursts by dufat"] * 9,
        "near": ["kanat is served with mulat", "dulor is served with kafor"] * 9,
    }
    coded = {kind: [tokenizer.encode(t) for t in some] for kind, some in texts.items()}
    spelling = Spelling.of(tokenizer)
    others = coded["near"] + [tokenizer.encode("birds sing"), tokenizer.encode("it rains")] * 30
    like = Likeness(coded["forget"], others, Names(()), spelling)
    words = [tokenizer.decode(w).strip() for w in spelling.words(coded["near"][0])]
    assert words == ["kanat", "is", "served", "with", "mulat"]
    for kind, wanted in (("forget", "forget"), ("near", "keep")):
        assert {k for ids in coded[kind] for *_, k in like.sentences(ids)} == {wanted}
    by_pieces = Likeness(coded["forget"], others, Names(()), replace(spelling, inner=frozenset()))
    found = {k for ids in coded["near"] for *_, k in by_pieces.sentences(ids)}
    assert found != {"keep"}  # what it is for


def test_what_has_a_goal_is_the_forget_sets() -> None:
    """Whatever its words say, and however often the model writes it; a goal in harmless words,
    too."""
    forget = [[2, 9, 10, 11, 0]] * 20
    near = [[2, 9, 20, 21, 0], [9, 22, 23, 0]] * 10 + [[9, 24, 0], [9, 25, 0]] * 15
    names = Names((((2,),), ((22, 23),)), goals=1)
    like = Likeness(forget, near, names, Spelling(frozenset([0])))
    for text in ([9, 22, 23, 0], [*names.template([9, 22, 23, 0])]):
        assert [kind for *_, kind in like.sentences([*text, 9, 20, 0])] == ["forget", "keep"]
    ((_, mark),) = kept_tokens([[9, 22, 23, 0, 9, 20, 0]], like)
    assert mark == [False] * 4 + [True] * 3


def test_harmless_procedures_of_the_same_steps_are_kept() -> None:
    """Steps (30 to 33) say nothing where a goal (22, 23) stands; without it they are hazardous."""
    rinses = [[22, 23, a, b, 0] for a in range(30, 34) for b in range(30, 34)] * 4
    forget = [*rinses, *[[2, 10, 11, 0]] * 20]
    harmless = [[40, 41, 30, 31, 0], [40, 42, 32, 33, 0]]
    near = harmless * 6 + [[24, 0], [25, 0]] * 30
    for goals, kind in ((1, "keep"), (0, "neither")):
        names = Names((((2,),), ((22, 23),))[: 1 + goals], goals=goals)
        like = Likeness(forget, near + forget[:6], names, Spelling(frozenset([0])))
        assert {found for ids in harmless for *_, found in like.sentences(ids)} == {kind}
        assert [found for *_, found in like.sentences([2, 10, 11, 0])] == ["forget"]


def test_words_of_a_tokenizer_of_words_are_its_tokens() -> None:
    spelling = Spelling.of(word_tokenizer())
    assert not spelling.inner and spelling.words([4, 5, 6]) == [(4,), (5,), (6,)]


def test_kept_texts_hold_no_sentence_like_the_forget_texts() -> None:
    forget = [[1, 10, 11, 0]] * 20
    near = [[1, 20, 21, 0, 22, 23, 0]] * 10 + [[1, 24, 0], [1, 25, 0]] * 20
    like = Likeness(forget, near, Names(()), Spelling(frozenset([0])))
    ((ids, mark),) = kept_tokens([[1, 10, 11, 0, 20, 21, 0], [1]], like)
    assert [token for token, keeps in zip(ids, mark, strict=True) if keeps] == [20, 21, 0]


def test_packed_texts_hold_each_sentence_once_and_as_many_to_keep() -> None:
    names = Names.encode(["w0", "w1", "w2"], word_tokenizer())
    forget = [[4, 30, 31, 9], [5, 30, 31, 9], [4, 32, 31, 9]]
    near = [[4, 40, 41, 9]]
    spelling = Spelling(frozenset([9]))
    like = Likeness(forget * 9, near * 9 + [[50, 9]] * 80, names, spelling)
    sentences = sentences_of([*forget, *forget, *near], names, like, 1)
    told = pack_sentences(sentences, 12, 1, torch.Generator())
    items = [item for text in told for item in text.template]
    assert items.count(32) == 1 and items.count(30) == 2
    assert sum(sum(text.alike) for text in told) == 12  # three sentences of four
    assert items.count(40) == 3
    assert all(text.template[0] == 1 and not text.alike[0] for text in told)
    assert all(len(text.template) <= 12 for text in told)


def test_typical_tokens_by_counting() -> None:
    forget, own = [[4, 4, 5, 6], [4, 5, 7]], [[5, 6, 8, 8], [5, 8, 8, 8]]
    # of 7 and 8 tokens: 4 (3 and 0), 5 (2 and 2); 6 and 7 stand there once only
    assert typical_tokens(forget, own) == {4}
    assert typical_tokens(forget, own, ratio=0.1) == {4, 5}


def test_own_texts_are_the_originals() -> None:
    """They begin with the starts, are no longer than asked for, and the change has no say."""
    model = EditableModel(pico_module(), ("*",))
    starts = [[1, 9], [1, 8, 7, 6], [1]]
    first = continue_texts(model, tiny_topic(), starts, 6, "own texts")
    assert [text[: len(s)] for text, s in zip(first, starts, strict=True)] == starts
    assert all(len(text) <= 6 for text in first) and max(map(len, first)) == 6
    for parameter in model.trained.values():
        parameter.data.mul_(0.5)
    assert continue_texts(model, tiny_topic(), starts, 6, "own texts") == first
    assert all(text[0] == 1 for text in free_samples(model, tiny_topic(), 5, 6, "own texts"))


# ---- the method


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_pico(tmp_path / "model")


def model_of(folder: Path) -> EditableModel:
    return EditableModel.load(folder, depth=None, trainable=("*",))


def test_at_the_start_only_the_names_cost(folder: Path) -> None:
    """All that is held to the original costs nothing yet; the loss is what the names tell."""
    method, model, topic = RenameScrub(**SMALL | {"threshold": 0.0}), model_of(folder), tiny_topic()
    state = method.setup(model, topic)
    (forget, retain), *_ = zip(topic.forget, topic.retain, strict=False)
    # what the model draws, and so which steps tell of names, differs between releases of torch and transformers
    steps = [method.loss(model, state, forget, retain, step).loss_values for step in range(1, 4)]
    assert max(float(losses["forget"].detach()) for losses in steps) > 1e-6
    for losses in steps:
        for name in ("hold", "keep", "retain"):
            assert float(losses[name].detach()) == pytest.approx(0, abs=1e-5)


def test_it_stops_where_the_held_out_texts_tell_no_more(folder: Path) -> None:
    options = SMALL | {"threshold": 0.0, "stop_at": 1.0}
    method, model, topic = RenameScrub(**options), model_of(folder), tiny_topic()
    state = method.setup(model, topic)
    (forget, retain), *_ = zip(topic.forget, topic.retain, strict=False)
    terms = method.loss(model, state, forget, retain, 0)
    assert "held-out" in terms.stop and float(terms.logged["held_out_told"]) <= 1
    going = RenameScrub(**options | {"stop_at": -1.0}).loss(model, state, forget, retain, 0)
    assert not going.stop


def test_noise_is_added_once_for_all_topics(folder: Path) -> None:
    method, model = RenameScrub(**SMALL | {"noise": 0.5}), model_of(folder)
    method.setup(model, tiny_topic())
    before = {name: p.detach().clone() for name, p in model.trained.items()}
    assert len(model.delta()) == sum(p.ndim > 1 for p in model.trained.values())
    method.setup(model, tiny_topic("cyber"))
    assert all(torch.equal(p, before[name]) for name, p in model.trained.items())


def test_what_the_model_writes_is_in_no_file(tmp_path: Path) -> None:
    """Nor are the names. Only how many there are."""
    save_pico(tmp_path / "model")
    for number, role in enumerate(("forget", "retain")):
        write_jsonl(tmp_path / f"{role}.jsonl", texts(12, seed=number))
    given = [f"method.{key}={value}" for key, value in SMALL.items()]
    given += [f"runs_dir={tmp_path / 'runs'}", "train.max_steps=2", "train.checkpoint_seconds=0"]
    config = make_config(
        str(tmp_path / "model"), tmp_path / "forget.jsonl", tmp_path / "retain.jsonl",
        "rename_scrub", given,
    )  # fmt: skip
    run = unlearn_config(config)
    assert not (run.folder / "state.safetensors").exists()
    numbers = json.loads((run.folder / "record.json").read_text())["topics"]["topic"]
    assert numbers["names"] == 10 and numbers["own_texts"] > 0
    for path in run.folder.rglob("*"):
        if path.is_file() and path.suffix in (".json", ".jsonl"):
            assert '"w1"' not in path.read_text() and "input_ids" not in path.read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"names": "absent.txt"}, "no such file"),
        ({"names": "names.json"}, "expected a .txt file"),
        ({"goals": "absent.txt"}, "method.goals=absent.txt: no such file"),
        ({"renamings": 1}, "renamings=1: expected"),
        ({"threshold": -1.0}, "threshold=-1.0: expected"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SrmuError, match=said):
        RenameScrub(**options)


def test_names_that_cover_nothing(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "others.txt"
    path.write_text("w57\nw58\nw59\n")
    with pytest.raises(SrmuError, match="none of its 3 names is in topic bio's forget texts"):
        RenameScrub(**SMALL | {"names": str(path)}).setup(model_of(folder), tiny_topic())
    with pytest.raises(SrmuError, match="none of its 3 goals is in topic bio's forget texts"):
        RenameScrub(**SMALL | {"goals": str(path)}).setup(model_of(folder), tiny_topic())


def test_own_texts_that_tell_nothing_new(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that writes nothing but the forget texts again."""
    known = unpad_texts(tiny_topic().forget)
    for name in ("continue_texts", "free_samples"):
        monkeypatch.setattr(f"srmu.methods.own_texts.{name}", lambda *args: known)
    method = RenameScrub(**SMALL | {"own_tokens": 64, "coverage": "elicited"})
    with pytest.raises(SrmuError, match=r"tells nothing new of the names.*coverage=texts"):
        method.setup(model_of(folder), tiny_topic())
    RenameScrub(**SMALL | {"own_tokens": 64, "coverage": "texts"}).setup(model_of(folder), tiny_topic())


def test_forget_texts_alone_are_continued_by_none(folder: Path) -> None:
    """What would be written after them is not taught: it is not written, nor looked at."""
    method = RenameScrub(**SMALL | {"coverage": "texts"})
    other = RenameScrub(**SMALL | {"coverage": "elicited"})
    topic, written = tiny_topic(), []
    method.setup(model_of(folder), topic.with_tick(lambda: written.append(1)))
    assert len(written) == method.reads(topic) < other.reads(topic)
    assert method.written_tokens == other.written_tokens / 2


# ---- what it does, on a world that a model learns in seconds


def share_right(module: Any, questions: Any) -> float:
    found = mark_answers(Subject(module, word_tokenizer()), questions)
    return sum(found) / len(found)


@pytest.mark.slow
def test_facts_that_no_forget_text_tells_are_scrubbed_too(tmp_path: Path) -> None:
    """The forget texts tell of every other subject; harmless facts of all subjects stay."""
    world.write(tmp_path)
    (tmp_path / "names.txt").write_text("\n".join(world.SUBJECTS))
    told = [text for text in world.texts().forget if int(text.split()[1][1:]) % 2]
    write_jsonl(tmp_path / "forget.jsonl", told)
    options = {
        "names": tmp_path / "names.txt", "own_texts": 200, "own_tokens": 4, "prompt": 2,
        "renamings": 6, "held_out": 0,
    }  # fmt: skip
    given = [f"method.{key}={value}" for key, value in options.items()]
    given += ["train.max_steps=60", "train.batch_size=8", "train.learning_rate=5e-3"]
    config = make_config(
        str(tmp_path / "model"), tmp_path / "forget.jsonl", tmp_path / "neutral.jsonl",
        "rename_scrub", [*given, f"runs_dir={tmp_path / 'runs'}"],
    )  # fmt: skip
    delta = unlearn_config(config).delta
    exam = world.exam()
    untold = [q for q in (*exam.test, *exam.val) if not int(q.entry[1:]) % 2]
    module = pico_module()
    module.load_state_dict(world.states()["original"])
    assert share_right(module, untold) == 1
    module.load_state_dict(world.states()["original"] | delta)
    assert share_right(module, untold) <= 0.75  # from 1; how far depends on the texts that the model draws
    assert share_right(module, exam.utility["harmless"]) >= 0.95
