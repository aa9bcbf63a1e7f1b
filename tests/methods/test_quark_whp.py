"""Quark, WHP and retraining: each equation against a loop, and what public code got wrong."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from helpers.models import (
    ARCHITECTURES,
    VOCABULARY,
    batches,
    pico_module,
    save_pico,
    texts,
    topic,
    word_tokenizer,
    write_jsonl,
)
from helpers.testbeds import QUIZ, TINY
from srmu.engine import generate
from srmu.engine.activation_cache import Activations
from srmu.engine.losses import generic_logits, token_entropy
from srmu.engine.model import EditableModel
from srmu.engine.topic import Batch, Topic
from srmu.engine.train import TrainOptions
from srmu.errors import SrmuError
from srmu.evals.score import score_model
from srmu.methods import METHODS, quark
from srmu.methods.base import Session, State
from srmu.methods.quark import PoolEntry, Quark
from srmu.methods.whp import WHP, combine_logits, read_anchors, tokenise_terms, translate_batch
from srmu.runs.config import build_config, load_config, make_config
from srmu.runs.run import unlearn_config
from srmu.testbed import build
from srmu.testbed import train as training

TRAIN = TrainOptions(learning_rate=1e-2, max_steps=3, batch_size=2)


def editable(arch: str = "llama", trainable: str = "*") -> EditableModel:
    return EditableModel(pico_module(arch), (trainable,))


def applied(method: Any, topics: list[Topic], train: TrainOptions = TRAIN) -> Any:
    """The model, the outcome, and the rows that were logged."""
    model, rows = editable(), []
    outcome = method.apply(model, topics, Session(train, lambda step, values: rows.append(values)))
    return model, outcome, rows


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- a model read with control tokens ------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_control_is_read_like_a_token(arch: str) -> None:
    """With the embedding of a token as the control, the logits are those of the text with it."""
    model = editable(arch)
    (batch, *_) = batches(texts(3, 5), 3)
    tokens = torch.tensor([9, 20, 41])
    control = model.module.get_input_embeddings()(tokens)
    longer = {
        name: torch.cat([rows[:, :1], extra[:, None], rows[:, 1:]], 1)
        for name, rows, extra in (
            ("input_ids", batch["input_ids"], tokens),
            ("attention_mask", batch["attention_mask"], torch.ones(3, dtype=torch.long)),
        )
    }
    with torch.no_grad():
        got = model.logits(batch, control)
        expected = model.logits(Batch(longer))[:, 1:]
        plain = model.logits(batch)
        first = model.logits(batch, control[0])
    assert got.shape == plain.shape
    real = batch["attention_mask"] == 1
    torch.testing.assert_close(got[real], expected[real], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got[real], plain[real], atol=1e-2)
    torch.testing.assert_close(first[0][real[0]], got[0][real[0]], atol=1e-4, rtol=1e-4)


def test_a_control_is_not_mistaken_for_what_was_kept() -> None:
    """What lower layers gave is kept by tokens only: a text with a control has other states."""
    model = EditableModel(pico_module(), ("3.mlp_down",))
    model.activations = Activations()
    batch = batches(texts(2, 5))[0]
    control = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, got = model.logits(batch), model.logits(batch, control)
        again = model.logits(batch)
        fresh = EditableModel(pico_module(), ("3.mlp_down",)).logits(batch, control)
    assert torch.equal(plain, again)
    assert torch.equal(got, fresh)
    assert not torch.allclose(plain, got)


# --- the pool ------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["mask", "count"])
def test_texts_become_prompts_and_continuations(padding: Any) -> None:
    some = topic(padding=padding)
    found = quark.split_continuations(some, 99)
    rows = [
        row[mask == 1].tolist()
        for batch in some.forget
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert [x + y for x, y in found] == rows
    assert all(len(x) >= 2 and len(y) >= 1 for x, y in found)  # a <s> and a word, a word
    assert quark.split_continuations(some, 3) == found[:3]
    assert quark.split_continuations(topic(), 99) == found  # wherever the padding is


def peaked(arch: str) -> Any:
    """A model that is all but sure of its next token, so that a sample is the likeliest text."""
    module = copy.deepcopy(pico_module(arch))
    handle = module.get_output_embeddings()
    handle.register_forward_hook(lambda _, args, output: output * 1000)
    return module


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mistral"])
def test_samples_do_not_depend_on_padding(arch: str) -> None:
    """Prompts of several lengths go on as each alone."""
    module = peaked(arch)
    model = EditableModel(module, ("*",))
    contexts = [[1, 5, 6], [1, 8], [1, 9, 10, 11, 12, 13], [1, 40]]
    got = generate.sample_continuations(model.module, contexts, 5, 0)
    for context, response in zip(contexts, got, strict=True):
        expected: list[int] = []
        while len(expected) < 5 and expected[-1:] != [2]:
            with torch.no_grad():
                logits = module(torch.tensor([context + expected])).logits
            expected.append(int(logits[0, -1].argmax()))
        assert response == expected


def test_samples_are_drawn_from_all_tokens_whatever_the_checkpoint_says() -> None:
    """A checkpoint's own top_k, temperature and penalties would bend the distribution."""
    module = pico_module()
    model = EditableModel(module, ("*",))
    contexts = [[1, 5, 6, 7]] * 400
    expected = generate.sample_continuations(model.module, contexts, 1, 3)
    for name, value in {"top_k": 1, "temperature": 0.1, "repetition_penalty": 9.0}.items():
        setattr(module.generation_config, name, value)
    own = module.generation_config
    state = torch.get_rng_state()
    assert generate.sample_continuations(model.module, contexts, 1, 3) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert module.generation_config is own and own.top_k == 1
    assert generate.sample_continuations(model.module, contexts, 1, 4) != expected
    counts = torch.bincount(torch.tensor(expected).flatten(), minlength=VOCABULARY) / 400
    with torch.no_grad():
        p = module(torch.tensor(contexts[:1])).logits[0, -1].softmax(-1)
    assert float((counts - p).abs().max()) < 0.1
    assert float((counts - p).abs().sum()) < 0.5


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    """And those without a chance never: the first, the last, one between."""
    chances = torch.tensor([0.0, 0.5, 0.0, 0.125, 0.375, 0.0])
    torch.manual_seed(0)
    drawn = generate.choose_drawn(torch.empty(0), chances.log().expand(40_000, -1)).argmax(-1)
    counts = torch.bincount(drawn, minlength=6) / 40_000
    assert counts[chances == 0].tolist() == [0, 0, 0]
    assert torch.allclose(counts, chances, atol=0.01)


def test_a_sample_ends_with_the_end_of_a_text() -> None:
    module = pico_module()
    module.generation_config.eos_token_id = list(range(2, 34))  # some models have several
    drawn = generate.sample_continuations(module, [[1, 5], [1, 6, 7]] * 10, 8, 0)
    ends = set(range(2, 34))
    assert all(1 <= len(row) <= 8 and not ends & {*row[:-1]} for row in drawn)
    assert all(len(row) == 8 or row[-1] in ends for row in drawn)
    assert len({len(row) for row in drawn}) > 1


def naive_likelihood(module: Any, context: list[int], response: list[int]) -> float:
    """Mean of log p(token | what is before), one at a time."""
    total = 0.0
    for i, token in enumerate(response):
        with torch.no_grad():
            logits = module(torch.tensor([context + response[:i]])).logits[0, -1]
        total += float(logits.log_softmax(-1)[token])
    return total / len(response)


TEXTS = [([1, 5, 6], [7, 8, 9]), ([1, 8], [9]), ([1, 30, 31, 32], [33, 34])] * 4
RESPONSES = [[7, 8, 20], [9], [40, 41, 42, 43]] * 4


def test_rewards_follow_the_original() -> None:
    """Also where the model has changed: minus mean log p0(y|x), plus fluency's log p0(y)."""
    model, module = editable(), pico_module()
    with torch.no_grad():
        for parameter in model.trained.values():
            parameter.mul_(1.5)
    entries = quark.judge_responses(model, quark.find_reward("likelihood"), 0.7, TEXTS, RESPONSES)
    for (x, _), y, entry in zip(TEXTS, RESPONSES, entries, strict=True):
        expected = -naive_likelihood(module, x, y) + 0.7 * naive_likelihood(module, [1], y)
        assert entry.reward == pytest.approx(expected, abs=1e-4)
        assert (entry.prompt, entry.response) == (x, y)


def test_overlap_is_of_bigrams() -> None:
    reward = quark.find_reward("overlap")
    model = editable()
    cases = [
        ([7, 8, 9], [7, 8, 9], -1.0),
        ([7, 8, 20], [7, 8, 9], -0.5),
        ([8, 7], [7, 8, 9], 0.0),  # the same words in another order
        ([9], [7, 8, 9], -1.0),  # a single token: itself
        ([20], [7, 8, 9], 0.0),
        ([7, 7, 7, 7], [7, 7], -1.0),
        ([7, 8], [9], 0.0),
    ]
    got = reward(model, [[1]] * len(cases), [c[0] for c in cases], [c[1] for c in cases])
    assert list(got) == [c[2] for c in cases]


OWN_REWARD = """
def longest(model, prompts, responses, truths):
    return [len(response) for response in responses]

def short(model, prompts, responses, truths):
    return [1.0]

what = 3
"""


def test_a_reward_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN_REWARD)
    reward = quark.find_reward(f"{file}:longest")
    entries = quark.judge_responses(editable(), reward, 0.0, TEXTS, RESPONSES)
    assert [entry.reward for entry in entries] == [len(y) for y in RESPONSES]
    with pytest.raises(SrmuError, match="gave 1 numbers for 12 responses"):
        quark.judge_responses(editable(), quark.find_reward(f"{file}:short"), 0.0, TEXTS, RESPONSES)
    for name, says in (
        (f"{file}:what", "no such function"),
        (f"{file}:none", "no such function"),
        (f"{tmp_path}/other.py:longest", "no such file"),
        ("overlab", "did you mean overlap?"),
        ("zzz", "choose one of likelihood, overlap, or path/to/file.py:function"),
    ):
        with pytest.raises(SrmuError, match=says):
            Quark(reward=name)
    file.write_text("1 / 0")
    with pytest.raises(SrmuError, match="ZeroDivisionError"):
        Quark(reward=f"{file}:longest")


def test_a_config_names_its_reward(tmp_path: Path) -> None:
    """A relative path starts at the config's folder, and the run's id depends on the code."""
    tree = "{model: m, method: {name: quark, reward: REWARD}, topics: {t: {forget: f.txt}}}"
    (tmp_path / "c.yaml").write_text(tree.replace("REWARD", "'mine.py:longest'"))
    (tmp_path / "mine.py").write_text(OWN_REWARD)
    config = load_config(tmp_path / "c.yaml")
    assert config.method.reward == f"{tmp_path}/mine.py:longest"
    before = config.id
    (tmp_path / "mine.py").write_text(OWN_REWARD + "# other\n")
    assert load_config(tmp_path / "c.yaml").id != before
    (tmp_path / "c.yaml").write_text(tree.replace("REWARD", "likelyhood"))
    with pytest.raises(SrmuError, match="did you mean likelihood"):
        load_config(tmp_path / "c.yaml")


@given(st.lists(st.floats(-9, 9), min_size=2, max_size=40), st.integers(2, 8))
def test_quantiles(rewards: list[float], count: int) -> None:
    """Of equal sizes, the remainder in the worst, and none better than one of a better part."""
    pool = [PoolEntry([1], [i], reward) for i, reward in enumerate(rewards)]
    parts = quark.split_quantiles(pool, count)
    assert len(parts) == count
    size = len(pool) // count
    assert [len(part) for part in parts[:-1]] == [size] * (count - 1)
    assert len(parts[-1]) == size + len(pool) % count
    assert sorted(e for part in parts for e in part) == sorted(pool)
    if size:
        lows = [min(e.reward for e in part) for part in parts]
        highs = [max(e.reward for e in part) for part in parts]
        assert all(low >= high for low, high in zip(lows, highs[1:], strict=False))
        means = [sum(e.reward for e in part) / len(part) for part in parts]
        assert means[0] >= max(means) - 1e-9


def test_a_batch_is_drawn_evenly() -> None:
    state = Quark(quantiles=3, response=4).setup(editable(), topic())
    pool = state.memory["pool"]
    parts = quark.split_quantiles(pool.entries, 3)
    counts = torch.zeros(3)
    for step in range(60):
        entries, ranks = pool.draw(4, 3, step)
        assert ranks == sorted(ranks) and {*ranks} == {0, 1, 2}
        assert all(entry in parts[k] for entry, k in zip(entries, ranks, strict=True))
        assert (entries, ranks) == pool.draw(4, 3, step)
        counts += torch.bincount(torch.tensor(ranks), minlength=3)
    assert float(counts.min()) > 60  # the fourth is of each in turn
    assert {e.response[0] for s in range(60) for e in pool.draw(4, 3, s)[0]} == {e.response[0] for e in pool.entries}


# --- Quark's loss --------------------------------------------------------------------------------


def started(**options: Any) -> tuple[Quark, EditableModel, State]:
    method = Quark(**{"quantiles": 3, "response": 4, **options})
    model = editable()
    return method, model, method.setup(model, topic())


def shaken(model: EditableModel) -> None:
    """Other weights than the original's."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trained.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def naive_quark(method: Quark, model: EditableModel, state: State, step: int) -> dict[str, float]:
    """The loss one response token at a time, the control written into the embeddings by hand."""
    current = copy.deepcopy(model.module)
    original = pico_module()
    entries, ranks = state.memory["pool"].draw(2, method.quantiles, step)
    sums, count = {"forget": 0.0, "kl": 0.0, "entropy": 0.0}, 0
    for entry, rank in zip(entries, ranks, strict=True):
        for i, token in enumerate(entry.response):
            ids = torch.tensor([entry.prompt + entry.response[:i]])
            embedded = current.get_input_embeddings()(ids)
            if rank > 0:
                row = state.parameters["control"][rank - 1][None, None]
                embedded = torch.cat([embedded[:, :1], row, embedded[:, 1:]], 1)
            with torch.no_grad():
                log_p = current(inputs_embeds=embedded).logits[0, -1].log_softmax(-1)
                log_q = original(ids).logits[0, -1].log_softmax(-1)
            sums["forget"] -= float(log_p[token])
            sums["kl"] += method.kl * float((log_p.exp() * (log_p - log_q)).sum())
            sums["entropy"] += method.entropy * float((log_p.exp() * log_p).sum())
            count += 1
    return {name: value / count for name, value in sums.items()}


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_quark_against_a_loop(step: int) -> None:
    """A port whose KL includes the new tokens' logits, or runs the original with the control,
    or averages over rows and not tokens, does not pass."""
    method, model, state = started(kl=0.3, entropy=0.2)
    shaken(model)
    forget = topic().forget[0]
    with torch.no_grad():
        got = method.loss(model, state, forget, Batch(), step).loss_values
    expected = naive_quark(method, model, state, step)
    assert {name: float(value) for name, value in got.items()} == pytest.approx(expected, abs=1e-4)


def test_the_kl_is_of_the_model_to_the_original() -> None:
    """Public code's order, KL(p || p0): `kl_div` with log p0 as its input and p as its target."""
    method, model, state = started(quantiles=2, kl=1.0, entropy=0.0)
    shaken(model)
    pool = state.memory["pool"]
    pool.draw = lambda count, parts, step: (pool.entries[:count], [0] * count)
    batch = generate.join_responses([e.prompt for e in pool.entries[:2]], [e.response for e in pool.entries[:2]])
    mask = (batch["labels"] != -100)[:, 1:]
    with torch.no_grad():
        got = float(method.loss(model, state, topic().forget[0], Batch(), 0).loss_values["kl"])
        p, q = (m(**batch).logits[:, :-1].log_softmax(-1)[mask] for m in (model.module, pico_module()))
    assert got == pytest.approx(float(F.kl_div(q, p.exp(), reduction="sum") / mask.sum()), rel=1e-3)
    other = float(F.kl_div(p, q.exp(), reduction="sum") / mask.sum())
    assert got != pytest.approx(other, rel=1e-3)


def test_without_weights_it_is_fine_tuning() -> None:
    method, model, state = started(kl=0.0, entropy=0.0)
    pool = state.memory["pool"]
    pool.draw = lambda count, parts, step: (pool.entries[:count], [0] * count)
    got = method.loss(model, state, topic().forget[0], Batch(), 0)
    entries = pool.entries[:2]
    batch = generate.join_responses([e.prompt for e in entries], [e.response for e in entries])
    expected = pico_module()(**batch).loss  # transformers' own: the mean over labelled tokens
    total = torch.stack([*got.loss_values.values()]).sum()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)


def test_before_training_only_control_tokens_move_the_kl() -> None:
    method, model, state = started(kl=1.0)
    pool = state.memory["pool"]
    entries = pool.entries[:2]
    forget = topic().forget[0]
    found = []
    for rank in (0, 1, 2):
        pool.draw = lambda count, parts, step, rank=rank: (entries, [rank] * 2)
        found.append(method.loss(model, state, forget, Batch(), 0).loss_values["kl"].item())
    assert found[0] == 0.0
    assert found[1] > 1e-3 and found[2] > 1e-3 and found[1] != found[2]


def test_control_tokens_are_as_embeddings_are() -> None:
    model, some = editable(), topic()
    rows = quark.control_tokens(model, some, 4000)
    known = model.module.get_input_embeddings().weight[some.vocabulary]
    torch.testing.assert_close(rows.mean(0), known.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(rows.std(0), known.std(0), atol=0.02, rtol=0)
    assert torch.equal(rows, quark.control_tokens(model, some, 4000))
    assert not torch.equal(rows, quark.control_tokens(model, topic(seed=1), 4000))
    half = EditableModel(pico_module(dtype=torch.bfloat16), ("*",))  # for train.weights=bf16
    assert quark.control_tokens(half, some, 3).dtype == torch.bfloat16


def test_a_run_trains_the_controls_and_leaves_an_ordinary_model() -> None:
    """Public code adds K + 1 rows to the vocabulary; here the embeddings keep their shape."""
    method = Quark(quantiles=3, response=4, reward="overlap", sample_every=2)
    first = method.setup(editable(), topic()).parameters["control"]
    model, outcome, rows = applied(method, [topic()], replace(TRAIN, max_steps=5))
    control = outcome.states["bio"].parameters["control"]
    assert control.shape == first.shape == (2, 32)
    assert (control != first).any(dim=1).all()
    assert all(tensor.shape == model.original[name].shape for name, tensor in model.delta().items())
    assert "control" not in model.delta()
    assert model.vocabulary_size == VOCABULARY
    assert {"forget", "kl", "entropy", "reward"} <= rows[0].keys()
    entries = outcome.states["bio"].memory["pool"].entries
    assert len(entries) == 4 * (2 + 2)  # own and the original's, then after steps 2 and 4
    again, *_ = applied(method, [topic()], replace(TRAIN, max_steps=5))
    assert same(model.delta(), again.delta())
    other, *_ = applied(method, [topic(seed=1)], replace(TRAIN, max_steps=5))
    assert not same(model.delta(), other.delta())


def test_each_of_several_topics_is_sampled() -> None:
    """Of two topics, one gets the odd steps: a multiple of `sample_every` may never be its own."""
    method = Quark(quantiles=2, response=3, reward="overlap", sample_every=2)
    _, outcome, _ = applied(method, [topic("bio"), topic("cyber")], replace(TRAIN, max_steps=8))
    sizes = [len(outcome.states[name].memory["pool"].entries) for name in ("bio", "cyber")]
    assert sizes == [4 * (2 + 3), 4 * (2 + 3)]


def test_new_samples_come_from_the_model_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """And those of the beginning from the original; swapped names in public code hide which."""
    seen: list[tuple[float, int]] = []
    drawn = quark.sample_continuations

    def add_weights(module: Any) -> float:
        return float(sum(parameter.detach().double().abs().sum() for parameter in module.parameters()))

    def watched(module: Any, contexts: Any, length: int, seed: int) -> Any:
        seen.append((add_weights(module), seed))
        return drawn(module, contexts, length, seed)

    _, model, _ = started()
    original = add_weights(model.module)
    monkeypatch.setattr(quark, "sample_continuations", watched)
    applied(Quark(quantiles=2, response=3, sample_every=2), [topic()], replace(TRAIN, max_steps=5))
    assert [total != original for total, _ in seen] == [False, True, True]
    assert len({seed for _, seed in seen}) == 3


def test_an_error_while_sampling_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Public code catches RuntimeError and skips the step."""
    method, model, state = started(sample_every=1)
    monkeypatch.setattr(quark, "judge_responses", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        method.loss(model, state, topic().forget[0], Batch(), 1)


@pytest.mark.slow
def test_the_reward_of_samples_rises(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stub reward, the share of words from the first half of the vocabulary."""

    def early(response: list[int]) -> float:
        return sum(token < VOCABULARY // 2 for token in response) / len(response)

    def share(model: EditableModel) -> float:
        drawn = generate.sample_continuations(
            model.module, [x for x, _ in quark.split_continuations(some, 12)] * 20, 3, 9
        )
        return sum(map(early, drawn)) / len(drawn)

    monkeypatch.setitem(quark.REWARDS, "stub", lambda m, x, y, t: [early(r) for r in y])
    method = Quark(reward="stub", quantiles=3, response=3, sample_every=5, fluency=0.0, entropy=0.0)
    some = replace(topic(), forget=batches(texts(12, 1, range(30)), 4))
    model, *_ = applied(method, [some], replace(TRAIN, learning_rate=3e-3, max_steps=60))
    assert share(model) > share(editable()) + 0.05


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quantiles": 1}, "method.quantiles=1: expected a number from 2"),
        ({"kl": -0.1}, "method.kl=-0.1: expected a number at least 0"),
        ({"response": 0}, "method.response=0"),
        ({"pool": 0}, "method.pool=0"),
        ({"sample_every": 0}, "method.sample_every=0"),
    ],
)
def test_options_of_quark(options: Any, says: str) -> None:
    with pytest.raises(SrmuError, match=says):
        Quark(**options)


def test_more_quantiles_than_continuations() -> None:
    with pytest.raises(SrmuError, match="topic bio has 8 continuations"):
        Quark(quantiles=9, response=4).setup(editable(), topic())


def test_entropy_is_that_of_a_distribution() -> None:
    logits = torch.zeros(1, 3, 8)
    assert token_entropy(logits)[0].tolist() == pytest.approx([math.log(8)] * 2)


# --- WHP: the generic logits ---------------------------------------------------------------------

numbers = st.lists(st.floats(-9, 9, width=32), min_size=6, max_size=6)


@given(numbers, numbers, st.floats(0, 50))
def test_generic_logits(base: list[float], reinforced: list[float], strength: float) -> None:
    """Unraised logits stay bit by bit; with nothing raised, or no strength, all do."""
    v0, v1 = torch.tensor(base), torch.tensor(reinforced)
    got = generic_logits(v0, v1, strength)
    raised = v1 > v0
    assert torch.equal(got[~raised], v0[~raised])
    assert torch.equal(generic_logits(v0, v1, 0.0), v0)
    assert torch.equal(generic_logits(v0, v0, strength), v0)
    # a larger strength never makes a raised token likelier relative to an unraised one
    more = generic_logits(v0, v1, strength + 1)
    if raised.any() and not raised.all():
        gaps = [(v[raised][:, None] - v[~raised][None]) for v in (got, more)]
        assert (gaps[1] <= gaps[0]).all()


def test_huge_strength_leaves_the_untouched_tokens() -> None:
    v0, v1 = torch.tensor([3.0, 1.0, 0.0, -1.0]), torch.tensor([3.5, 1.0, -2.0, -0.9])
    p = generic_logits(v0, v1, 1e5).softmax(-1)
    assert p[[0, 3]].sum() == 0
    torch.testing.assert_close(p[1] / p[2], torch.tensor(math.e))


def test_a_constant_added_to_raw_logits_changes_them() -> None:
    """ReLU is not shift-invariant: WHP takes raw logits, as the paper does."""
    v0, v1 = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.5, -1.0, 2.5])
    a, b = (generic_logits(v0, v1 + shift, 5.0).softmax(-1) for shift in (0.0, 1.0))
    assert not torch.allclose(a, b, atol=1e-2)


def whp_state(model: EditableModel, anchors: Any = None) -> State:
    generator = torch.Generator().manual_seed(7)
    tuned = {
        name: tensor + 0.03 * torch.randn(tensor.shape, generator=generator) for name, tensor in model.original.items()
    }
    return State(memory={"strengthened": tuned, "anchors": anchors})


def with_tensors(tensors: Any) -> Any:
    module = pico_module()
    for name, parameter in module.named_parameters():
        parameter.data.copy_(tensors[name])
    return module


@pytest.mark.parametrize("mode", ["soft", "argmax"])
@pytest.mark.parametrize("padding", ["mask", "count"])
def test_whp_against_a_loop(mode: Any, padding: Any) -> None:
    model = editable()
    state = whp_state(model)
    shaken(model)
    batch = topic(padding=padding).forget[1]
    got = WHP(mode=mode).loss(model, state, batch, Batch(), 0).loss_values["forget"]
    models = [pico_module(), with_tensors(state.memory["strengthened"]), model.module]
    with torch.no_grad():
        v0, v1, v = (m(batch["input_ids"], batch["attention_mask"]).logits for m in models)
    costs = []
    for row in range(len(batch["labels"])):
        for i in range(batch["labels"].shape[1] - 1):
            if batch["labels"][row, i + 1] == -100:
                continue
            target = torch.stack(
                [b - 5.0 * max(r - b, torch.tensor(0.0)) for b, r in zip(v0[row, i], v1[row, i], strict=True)]
            )
            log_p = v[row, i].log_softmax(-1)
            soft = -(target.softmax(-1) * log_p).sum()
            costs.append(float(soft if mode == "soft" else -log_p[int(target.argmax())]))
    assert float(got.detach()) == pytest.approx(sum(costs) / len(costs), rel=1e-4)


def test_the_fixed_point_of_the_distillation() -> None:
    """Where nothing was raised the original is what is learnt: the gradient at it is 0."""
    for options, tuned in (({"strength": 0.0}, False), ({}, True)):
        model = editable()
        state = whp_state(model)
        if tuned:
            state.memory["strengthened"] = model.original
        batch = topic().forget[0]
        loss = WHP(**options).loss(model, state, batch, Batch(), 0).loss_values["forget"]
        loss.backward()
        assert max(float(p.grad.abs().max()) for p in model.trained.values()) < 1e-6
        with torch.no_grad():  # and the cost there is the distribution's own entropy
            mask = batch["labels"][:, 1:] != -100
            entropy = float(token_entropy(model.logits(batch))[mask].mean())
        assert float(loss.detach()) == pytest.approx(entropy, rel=1e-5)
    state = whp_state(model)
    model.module.zero_grad()
    WHP().loss(model, state, batch, Batch(), 0).loss_values["forget"].backward()
    assert max(float(p.grad.abs().max()) for p in model.trained.values()) > 1e-3


def test_the_teacher_reads_the_forget_texts_and_the_model_is_put_back() -> None:
    model, some = editable(), topic()
    state = WHP(teacher_steps=5, teacher_learning_rate=1e-2).setup(model, some)
    assert not model.delta()
    batch = some.forget[0]
    with model.using(state.memory["strengthened"]):
        after = float(F.cross_entropy(*rows(model.logits(batch), batch)))
    with model.frozen():
        before = float(F.cross_entropy(*rows(model.logits(batch), batch)))
    assert after < before - 0.5


def rows(logits: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    return logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()


# --- WHP: anchors --------------------------------------------------------------------------------


def encoded(text: str) -> list[int]:
    return word_tokenizer().encode(text)


def anchors_of(terms: dict[str, str]) -> Any:
    return tokenise_terms(terms, word_tokenizer())


@pytest.mark.parametrize("padding", ["mask", "count"])
def test_no_anchors_are_the_identity(padding: Any) -> None:
    model = editable()
    for batch in topic(padding=padding).forget:
        found = translate_batch(batch, *anchors_of({}))
        mask = batch["attention_mask"] == 1
        assert torch.equal(found.usable, mask)
        assert found.batch["input_ids"][found.batch["attention_mask"] == 1].tolist() == (
            batch["input_ids"][mask].tolist()
        )
        for row, places in enumerate(found.places):
            assert places[mask[row]].tolist() == list(range(int(mask[row].sum())))
        with torch.no_grad():
            plain, same_texts = (
                WHP().loss(model, whp_state(model, a), batch, Batch(), 0).loss_values["forget"]
                for a in (None, anchors_of({}))
            )
        if padding == "mask":  # else the padding counts, which no translation has
            assert torch.equal(plain, same_texts)


@pytest.mark.parametrize("padding", ["mask", "count"])
def test_a_translation(padding: Any) -> None:
    """Terms of several tokens, longer and shorter generic ones, the longest term first."""
    terms = {"w1 w2": "w40", "w1": "w41 w42 w43", "w5": "w50"}
    text = "w0 w1 w2 w3 w1 w4 w1 w2 w5 w1"
    batch = batches([text, "w9 w9"], padding=padding)[0]
    found = translate_batch(batch, *anchors_of(terms))
    row = found.batch["input_ids"][0][found.batch["attention_mask"][0] == 1]
    expected = "w0 w40 w3 w41 w42 w43 w4 w40 w50 w41 w42 w43"
    assert row.tolist() == encoded(expected)
    # original:  <s> w0 w1 w2 w3 w1 w4 w1 w2 w5 w1
    # translated: 0   1  -  2  3  6  7  -  8  9  12
    start = int(batch["attention_mask"][0].argmax())
    assert found.places[0, start:].tolist() == [0, 1, 0, 2, 3, 6, 7, 0, 8, 9, 12]
    # w1 inside a term has no place; what predicts the second "w1 w2" or the second "w1" is left out
    usable = [1, 1, 0, 1, 1, 1, 0, 0, 1, 0, 1]
    assert found.usable[0, start:].int().tolist() == usable
    ids = {word: encoded(word)[1] for word in ("w40", "w41", "w50")}
    assert found.named == [
        (0, start + 3, ids["w40"]), (0, start + 5, ids["w41"]), (0, start + 8, ids["w40"]),
        (0, start + 9, ids["w50"]), (0, start + 10, ids["w41"]),
    ]  # fmt: skip
    second = found.batch["attention_mask"][1] == 1
    assert found.batch["input_ids"][1][second].tolist() == encoded("w9 w9")


def test_labels_come_from_the_translation_at_its_own_places() -> None:
    """A port that keeps the original's positions reads, after the first longer generic term, the
    distribution of another place."""
    model = editable()
    state = whp_state(model, anchors_of({"w1": "w41 w42"}))
    batch = batches(["w0 w1 w3 w1 w4", "w7 w8 w9 w6 w5"])[0]
    with torch.no_grad():
        target, usable = WHP(strength=0.0).generic_target(model, state, batch)
        original = pico_module()(batch["input_ids"]).logits
        translated = pico_module()(torch.tensor([encoded("w0 w41 w42 w3 w41 w42 w4")])).logits[0]
    assert usable[0].tolist() == [True, True, True, False, True]  # not what predicts w1 again
    assert usable[1].tolist() == [True] * 5
    torch.testing.assert_close(target[1], original[1, :-1])
    generic = encoded("w41")[1]
    for i, place in enumerate([0, 1, 3, 4, 6]):
        expected = translated[place].clone()
        if i >= 2:  # w1 was named: "w41" is no likelier than the original makes it
            expected[generic] = torch.minimum(expected[generic], original[0, i, generic])
        torch.testing.assert_close(target[0, i], expected, atol=1e-5, rtol=1e-5)


def test_terms_in_subwords() -> None:
    """A term inside a text is tokenised with the space before it, at the start without."""

    class Subwords:
        unk_token_id = None

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            assert not add_special_tokens
            table = {"Harry": [5, 6], " Harry": [7], "Jon": [8], " Jon": [9, 10]}
            return table[text]

    anchors = tokenise_terms({"Harry": "Jon"}, Subwords())
    ids = torch.tensor([[5, 6, 3, 7, 4]])
    batch = Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    found = translate_batch(batch, *anchors)
    assert found.batch["input_ids"].tolist() == [[8, 3, 9, 10, 4]]
    assert found.usable.int().tolist() == [[0, 1, 0, 1, 1]]  # both ways are one term's


def test_files_of_anchors(tmp_path: Path) -> None:
    good = tmp_path / "terms.json"
    good.write_text('{"w1 w2": "w40"}')
    assert read_anchors(str(good)) == {"w1 w2": "w40"}
    for name, content, says in (
        ("a.json", None, "a.json: no such file"),
        ("b.json", "{", "b.json is damaged .*column"),
        ("c.json", "[1]", "c.json: expected an object of texts"),
        ("d.json", '{"w1": 3}', "d.json: expected an object of texts"),
        ("e.json", '{"": "w1"}', "e.json: expected an object of texts"),
        ("f.json", "[]", "f.json: expected an object of texts"),
        ("g.yaml", "w1: w2", "g.yaml: expected a .json file"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(SrmuError, match=says):
            WHP(anchors=str(tmp_path / name))
    with pytest.raises(SrmuError, match=r"method\.anchors has no effect without method\.mode"):
        WHP(anchors=str(good), mode="logits")
    with pytest.raises(SrmuError, match="load the model from a folder"):
        WHP(anchors=str(good)).setup(editable(), topic())


@pytest.mark.slow
def test_a_run_with_anchors(workplace: Path) -> None:
    words = " ".join(json.loads(line)["text"] for line in open_lines(workplace / "forget.jsonl"))
    term = words.split()[3]
    file = workplace / "terms.json"
    options = ["method.teacher_steps=2", "method.teacher_learning_rate=0.001", *quick(workplace)]

    def config(**terms: str) -> Any:
        file.write_text(json.dumps(terms))
        sources = (workplace / "forget.jsonl", workplace / "retain.jsonl")
        return make_config(str(workplace / "model"), *sources, "whp", [*options, f"method.anchors={file}"])

    run = unlearn_config(config(**{term: "w50"}))
    assert run.delta and run.record["stop_reason"] == "max_steps"
    other = config(**{term: "w51"})
    assert other.id != run.record["id"]  # what the file holds decides, too
    with pytest.raises(SrmuError, match="none of its terms is in topic's forget texts"):
        unlearn_config(config(Hogwarts="w50"))
    with pytest.raises(SrmuError, match="the tokenizer does not know 'Jon'"):
        unlearn_config(config(**{term: "Jon"}))


def open_lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def quick(folder: Path) -> list[str]:
    return ["train.max_steps=2", "train.learning_rate=0.001", f"runs_dir={folder / 'runs'}"]


# --- WHP: two models at inference ----------------------------------------------------------------


def other_tensors(module: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: p.detach() + 0.05 * torch.randn(p.shape, generator=generator)
        for name, p in module.named_parameters()
        if "mlp" in name
    }


def writing(module: Any, tensors: dict[str, Tensor]) -> Any:
    def write() -> None:
        for name, tensor in tensors.items():
            module.get_parameter(name).data.copy_(tensor)

    return write


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_two_models_answer_together(arch: str) -> None:
    """Also when they generate: a shared cache would give one model the other's keys."""
    module, base, tuned = (pico_module(arch) for _ in range(3))
    tensors = other_tensors(module)
    writing(tuned, tensors)()
    inner = module.forward
    prompts = [[1, 5, 6, 7, 8], [1, 9, 10]]
    ids = torch.tensor([prompts[0], [0, 0, *prompts[1]]])
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])

    def combined(row: list[int]) -> Tensor:
        v0, v1 = (m(torch.tensor([row])).logits[0] for m in (base, tuned))
        return v0 - 5.0 * (v1 - v0).clamp(min=0)

    with torch.no_grad(), combine_logits(module, writing(module, tensors), lambda a, b: generic_logits(a, b, 5.0)):
        got = module(torch.tensor([prompts[0]])).logits[0]
        torch.testing.assert_close(got, combined(prompts[0]), atol=1e-3, rtol=1e-3)
        whole = module.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, use_cache=True)
        for start, answer in zip(prompts, whole[:, 5:].tolist(), strict=True):
            row = list(start)
            for token in answer:
                if row[-1] == 2:
                    break  # what follows is padding
                row.append(int(combined(row)[-1].argmax()))
                assert token == row[-1]
    assert module.forward == inner
    with torch.no_grad():
        plain = module(torch.tensor([prompts[0]])).logits
        assert torch.equal(plain, tuned(torch.tensor([prompts[0]])).logits)


@pytest.fixture
def quizzed(workplace: Path) -> Path:
    """A workplace with 40 questions."""
    draw = texts(200, 9)
    tasks = workplace / "tasks"
    tasks.mkdir()
    rows = [{"question": draw[5 * i], "options": draw[5 * i + 1 : 5 * i + 5], "answer": i % 4} for i in range(40)]
    (tasks / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "quiz.yaml").write_text(QUIZ)
    return workplace


@pytest.mark.slow
def test_a_run_of_two_models_is_scored_and_not_exported(quizzed: Path) -> None:
    def config(strength: float) -> Any:
        options = [
            "method.mode=logits", "method.teacher_steps=4", "method.teacher_learning_rate=0.01",
            f"method.strength={strength}", "eval=[quiz]", f"tasks_dir={quizzed / 'tasks'}",
        ]  # fmt: skip
        sources = (quizzed / "forget.jsonl", quizzed / "retain.jsonl")
        return make_config(str(quizzed / "model"), *sources, "whp", [*options, *quick(quizzed)])

    with pytest.raises(SrmuError, match=r"two models at inference; method\.mode=soft distils"):
        unlearn_config(config(5), out=quizzed / "out")
    run = unlearn_config(config(5))
    assert run.record["stop_reason"] == "strengthened"
    with pytest.raises(SrmuError, match="whp with mode=logits is two models at inference"):
        run.export(quizzed / "out")
    scores = score_model(run)
    base, tuned = pico_module(), pico_module()
    for name, tensor in run.delta.items():
        tuned.get_parameter(name).data.copy_(tensor)

    def answer(question: str, options: list[str], strength: float) -> int:
        tokenizer, likelihoods = word_tokenizer(), []
        for option in options:
            start, whole = tokenizer.encode(question), tokenizer.encode(f"{question} {option}")
            with torch.no_grad():
                v0, v1 = (m(torch.tensor([whole])).logits[0] for m in (base, tuned))
            logs = generic_logits(v0, v1, strength).log_softmax(-1)
            chosen = range(len(start), len(whole))
            likelihoods.append(sum(float(logs[i - 1, whole[i]]) for i in chosen))
        return max(range(4), key=likelihoods.__getitem__)

    lines = [json.loads(line) for line in open_lines(quizzed / "tasks" / "quiz.jsonl")]
    right = {
        strength: sum(answer(r["question"], r["options"], strength) == r["answer"] for r in lines)
        for strength in (0.0, 5.0, 50.0)
    }
    assert scores["before"]["quiz/acc"]["value"] == right[0.0] / 40
    assert scores["after"]["quiz/acc"]["value"] == right[5.0] / 40
    # the same tensors with another strength are another product: nothing kept is taken for it
    more, none = unlearn_config(config(50)), unlearn_config(config(0))
    assert same(more.delta, run.delta)
    assert score_model(more)["after"]["quiz/acc"]["value"] == right[50.0] / 40
    assert score_model(none)["after"] == scores["before"]
    assert len({right[5.0], right[50.0], right[0.0]}) > 1


def test_the_reinforced_model_is_what_is_left() -> None:
    """Of all topics' texts together, with or without adapters."""
    options: dict[str, Any] = {"teacher_steps": 6, "teacher_learning_rate": 1e-2, "mode": "logits"}
    two = [topic("bio"), replace(topic("cyber"), forget=topic().retain)]
    model, outcome, rows_logged = applied(WHP(**options), two)
    assert not rows_logged and outcome.states == {}
    for some in two:
        batch = some.forget[0]
        with torch.no_grad():
            after = float(F.cross_entropy(*rows(model.logits(batch), batch)))
            before = float(F.cross_entropy(*rows(pico_module()(**batch).logits, batch)))
        assert after < before
    adapted = EditableModel(pico_module(), ("*.linear",))
    WHP(lora_rank=2, **options).apply(adapted, two, Session(TRAIN, lambda *_: None))
    assert set(adapted.delta()) == set(adapted.trained)


# --- retraining ----------------------------------------------------------------------------------


def retrain_config(folder: Path, **options: Any) -> Any:
    tree = {
        "model": str(folder / "model"),
        "method": "retrain",
        "topics": {"topic": {"forget": str(folder / "forget.jsonl")}},
        "runs_dir": str(folder / "runs"),
    }
    return build_config(tree | options)


@pytest.fixture
def testbed(tmp_path: Path) -> Path:
    build.build_testbed(tmp_path / "bed", seed=3, oracle=True, recipe=TINY)
    return tmp_path / "bed"


@pytest.mark.slow
def test_retrain_gives_the_oracle(testbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = []
    train = training.train_testbed

    def counted(*args: Any, **options: Any) -> Path:
        trainings.append(options["oracle"])
        return train(*args, **options)

    monkeypatch.setattr(training, "train_testbed", counted)
    run = unlearn_config(retrain_config(testbed))
    assert trainings == [True]
    oracle = load_file(testbed / "oracle" / "model.safetensors")
    base = load_file(testbed / "model" / "model.safetensors")
    assert same(run.delta, {k: v for k, v in oracle.items() if not torch.equal(v, base[k])})
    assert run.record["stop_reason"] == "edited"
    run.export(testbed / "out")
    assert same(load_file(testbed / "out" / "model.safetensors"), oracle)
    assert AutoTokenizer.from_pretrained(testbed / "out")


@pytest.mark.slow
def test_retrain_knows_the_testbed_only(testbed: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    save_pico(elsewhere / "model")
    write_jsonl(elsewhere / "forget.jsonl", texts(4, 1))
    config = retrain_config(elsewhere)
    with pytest.raises(SrmuError, match=r"no testbed\.json beside it\); srmu testbed OUT"):
        unlearn_config(config)
    assert not (elsewhere / "runs").exists()
    report = testbed / "testbed.json"
    (elsewhere / "testbed.json").write_text(report.read_text())
    with pytest.raises(SrmuError, match=r"is not the model that testbed\.json beside it describes"):
        unlearn_config(config)
    for text in ("{", "[]", '{"seed": 1, "recipe": {"size": {}, "speed": 3}}', '{"seed": 1}'):
        (elsewhere / "testbed.json").write_text(text)
        with pytest.raises(SrmuError, match="not the report of a testbed of this version"):
            unlearn_config(config)
    with pytest.raises(SrmuError, match="this is not a testbed's model"):
        METHODS["retrain"]().apply(editable(), [topic()], Session(TRAIN, lambda *_: None))
