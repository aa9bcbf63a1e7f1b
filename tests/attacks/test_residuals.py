"""The attacks on the residual: lens, probe, ablation, patching, soft prompts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.attack_world import ANSWERS, exam, facts, states, subject, taught, texts
from helpers.models import block_name, down_name, pico_module, word_tokenizer
from srmu.attacks import residual
from srmu.attacks.base import Attack, AttackResult, Exam, Texts
from srmu.attacks.learned_prompts import Latent, SoftPrompt, SplicedSubject, insert_prompt, unused_token
from srmu.attacks.residual import (
    DirectionAblation,
    LinearProbe,
    LogitLens,
    UnlearningDepth,
    answer_nll,
    answer_rows,
    batch_answers,
    depth_scores,
    edit_residual,
    embed_options,
    find_displacement_edits,
    last_residuals,
    pad_answers,
    pick_evenly,
    read_outputs,
)
from srmu.engine.likelihoods import SharedHeadError, score_layers
from srmu.engine.sites import cut_blocks, decoder_blocks, hook_outputs
from srmu.evals.subject import NotApplicable, Subject, mark_answers, mark_layers, option_scores

EACH = (
    LogitLens(), LinearProbe(), DirectionAblation(), UnlearningDepth(), SoftPrompt(steps=3), Latent(steps=3, most=2),
)  # fmt: skip


def run(attack: Attack, model: Subject, seed: int = 0) -> AttackResult:
    return attack.run(model, texts(), exam(), seed)


def score(half: tuple[float, ...]) -> float:
    return sum(half) / len(half)


def best(found: AttackResult) -> Any:
    return max(found.ways, key=lambda way: score(way.val))


@contextmanager
def unchanged(model: Subject) -> Iterator[None]:
    def state() -> Any:
        parts = list(model.module.named_modules())
        return (
            {n: (p.data_ptr(), p.requires_grad) for n, p in model.module.named_parameters()},
            [n for n, m in parts if m._forward_hooks or m._forward_pre_hooks or m.training],
            [n for n, _ in parts],
        )

    before = state()
    weights = {n: t.clone() for n, t in model.module.state_dict().items()}
    random = torch.get_rng_state()
    try:
        yield
    finally:
        assert state() == before
        assert all(torch.equal(t, weights[n]) for n, t in model.module.state_dict().items())
        assert all(p.grad is None for p in model.module.parameters())
        assert torch.equal(random, torch.get_rng_state())


def other(arch: str) -> Subject:
    """Another architecture, unlearned at random in one layer, with an oracle."""
    module = pico_module(arch)
    name = down_name(arch, 1)
    original = {name: dict(module.named_parameters())[name].detach().clone()}
    with torch.no_grad():
        module.get_parameter(name).mul_(-3)
    oracle = Subject(pico_module(arch, seed=1), word_tokenizer())
    return Subject(module, word_tokenizer(), original, oracle)


def known(model: Subject) -> Exam:
    """The exam with right answers that are likelier to the original than to the oracle."""
    assert model.oracle is not None
    asked = (*exam().test, *exam().val)
    with model.as_original():
        has = torch.tensor(option_scores(model, asked))
    golds = (has - torch.tensor(option_scores(model.oracle, asked))).argmax(dim=1).tolist()
    test = tuple(replace(q, gold=gold) for q, gold in zip(asked, golds, strict=True))
    return replace(exam(), test=test)


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("attack", EACH, ids=lambda attack: attack.name)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_leaves_no_trace_and_repeats(attack: Attack, arch: str) -> None:
    model = subject("unlearned") if arch == "llama" else other(arch)
    asked = exam() if arch == "llama" else known(model)
    with unchanged(model):
        first = attack.run(model, texts(), asked, 0)
    assert first.ways or first.metrics
    assert first == attack.run(model, texts(), asked, 0)
    assert not first.ways or {len(way.test) for way in first.ways} - {0} == {len(asked.test)}
    for way in first.ways:
        assert {*way.val, *way.test} <= {0.0, 1.0}


def test_bfloat16() -> None:
    model = Subject(pico_module(dtype=torch.bfloat16), word_tokenizer())
    for attack in (LogitLens(), LinearProbe(), DirectionAblation(), SoftPrompt(steps=2)):
        assert run(attack, model).ways


def test_an_exception_leaves_no_trace() -> None:
    model = subject("original")
    prompted = SplicedSubject(model, [2] * 16, 1)
    manners: list[Any] = [
        cut_blocks(model.module, 2), edit_residual(model, {0: torch.relu, 2: torch.relu}),
        insert_prompt(prompted, torch.zeros(16, 32)),
    ]  # fmt: skip
    for manner in manners:
        with unchanged(model), pytest.raises(KeyError), manner:
            raise KeyError


# The layers of the residual


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "gpt_neox", "mixtral"])
def test_blocks_are_read_edited_and_cut(arch: str) -> None:
    """As transformers' own hidden states are; a cut is final norm and head by hand."""
    module = pico_module(arch)
    model = Subject(module, word_tokenizer())
    ids = torch.tensor([[1, 9, 8, 7, 6], [1, 5, 4, 0, 0]])
    at = torch.tensor([[0, 0, 1, 0, 1], [0, 1, 1, 0, 0]], dtype=torch.bool)
    with torch.no_grad():
        states = module(ids, output_hidden_states=True).hidden_states
        for layer, values in enumerate(read_outputs(model, ids, at)[:-1]):  # the last one is normed
            torch.testing.assert_close(values, states[layer + 1][at])
        owner = module.get_submodule(block_name(arch, 0).rpartition(".")[0].rpartition(".")[0])
        norm = next(m for n, m in owner.named_children() if n in ("norm", "ln_f", "final_layer_norm"))
        by_hand = module.get_output_embeddings()(norm(states[2]))
        if cap := getattr(module.config, "final_logit_softcapping", None):
            by_hand = cap * torch.tanh(by_hand / cap)
        with cut_blocks(module, 2):
            torch.testing.assert_close(module(ids).logits, by_hand)
        with edit_residual(model, {1: lambda h: torch.zeros_like(h), 2: lambda h: h + 1}):
            silenced = read_outputs(model, ids, at)
        assert not silenced[1].any() and not torch.equal(silenced[2], states[3][at])


def test_answer_nll_of_rows_of_many_lengths() -> None:
    """The mean over an answer's tokens, as the score of its option."""
    model = subject("original")
    pairs = [("w50 w3", " w41"), ("w52 w1 w2 w3", " w4 w5 w6"), ("w51", " w40 w2")]
    questions = [replace(exam().val[0], prompt=p, options=(o,), gold=0) for p, o in pairs]
    expected = [-row[0] for row in option_scores(model, questions, normalised=True)]
    found: dict[int, float] = {}
    for chosen, ids, labels in batch_answers(answer_rows(model, questions), 2, model.device):
        found |= dict(zip(chosen, answer_nll(model, ids, labels).tolist(), strict=True))
    assert [found[i] for i in range(3)] == pytest.approx(expected, abs=1e-5)


# E4


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "gpt_neox", "mixtral"])
def test_layers_are_marked_as_the_model_cut_above_each(arch: str) -> None:
    """Answers of one token and of several, some after one prompt."""
    model = Subject(pico_module(arch), word_tokenizer())
    questions = [replace(q, options=(*q.options, " w3 w4", " w5 w6 w7", " w3 w9")) for q in exam().test]
    for layer, marks in mark_layers(model, questions, [0, 1, 3]):
        with cut_blocks(model.module, layer + 1):
            assert marks == mark_answers(model, questions)


def test_of_a_head_that_reads_other_blocks_too_each_cut_is_read() -> None:
    model = subject("unlearned")
    norm, first = model.module.model.norm, model.module.model.layers[0]
    seen: list[Any] = []
    hooks = {first: lambda _, out: seen.append(out), norm: lambda _, out: out + seen[-1][:, -out.shape[1] :]}
    with hook_outputs(hooks):
        with pytest.raises(SharedHeadError, match="reads more than the last block"):
            score_layers(model.module, [1], [([1, 5], [6])], 8)
        for layer, marks in mark_layers(model, exam().test, [1, 3]):
            with cut_blocks(model.module, layer + 1):
                assert marks == mark_answers(model, exam().test)


def test_lens_reads_what_only_the_last_layers_hide() -> None:
    found = run(LogitLens(), subject("unlearned"))
    assert [way.setting for way in found.ways] == [f"layer {i}" for i in range(4)]
    assert score(found.ways[1].test) == 1  # unlearning changed layers 2 and 3
    assert found.ways[3].test == mark_answers(subject("unlearned"), exam().test)
    assert score(found.ways[3].test) < 0.5
    assert max(score(way.test) for way in run(LogitLens(), subject("oracle")).ways) < 0.5


# E5


def test_probe_reads_facts_that_it_was_not_trained_on() -> None:
    known, oracle = (run(LinearProbe(), subject(name)) for name in ("unlearned", "oracle"))
    assert score(known.ways[1].test) > 0.8
    assert known.metrics["selectivity"].low > 0.3
    # two phrasings of a fact in two folds would give the oracle away
    assert max(score(way.test) for way in oracle.ways) < 0.5
    assert oracle.metrics["selectivity"].low < 0.1


def test_probe_of_the_validation_half_sees_no_test_label() -> None:
    """Other labels of the test half change nothing on the validation half."""
    model, val, test = subject("original"), exam().val, exam().test
    h, z = last_residuals(model, (*val, *test))[2], embed_options(model, (*val, *test), 32)
    turned = [replace(q, gold=(q.gold + 1) % 4) for q in test]
    one, other = (LinearProbe().fit_probe(h, z, [*val, *half], len(val), 0) for half in (test, turned))
    assert one[: len(val)] == other[: len(val)]
    assert one[len(val) :] != other[len(val) :]


# E6


def planted(layer: int, size: float) -> tuple[Subject, torch.Tensor]:
    """The original with a vector added to one block's output on hazard prompts, by its weights."""
    model = subject("original")
    down = model.module.get_parameter(down_name("llama", layer))
    read_by: list[torch.Tensor] = []
    owner = model.module.get_submodule(down_name("llama", layer).removesuffix(".weight"))
    handle = owner.register_forward_pre_hook(lambda m, args: read_by.append(args[0].flatten(0, 1)))
    prompts = [q.prompt for q in (*exam().val, *exam().test)]
    for pool in (prompts, texts().neutral):
        ids = torch.tensor(word_tokenizer()([*pool])["input_ids"])
        with torch.no_grad():
            model.module(ids)
    handle.remove()
    key = torch.linalg.lstsq(
        torch.cat(read_by), torch.cat([torch.ones(len(read_by[0])), torch.zeros(len(read_by[1]))])
    ).solution
    ids = torch.tensor(word_tokenizer()(prompts)["input_ids"])
    h = read_outputs(model, ids, torch.ones_like(ids, dtype=torch.bool))[layer]
    direction = torch.linalg.eigh(h.T @ h).eigenvectors[:, 0]  # the model uses it least
    original = {down_name("llama", layer): down.detach().clone()}
    with torch.no_grad():
        down += size * direction[:, None] * key
    return Subject(model.module, model.tokenizer, original), direction


def test_ablation_finds_a_planted_direction() -> None:
    model, direction = planted(1, 60.0)
    assert score(mark_answers(model, exam().val)) < 0.6
    found = {way.setting: score(way.val) for way in run(DirectionAblation(), model).ways}
    assert "displacement, layer 0" not in found  # nothing moved there
    assert found["displacement, layer 1"] > 0.95
    edit = find_displacement_edits(model, exam())[1]
    h = torch.randn(3, 2, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(edit(h), h - (h @ direction).unsqueeze(-1) * direction)


def test_difference_of_means() -> None:
    """By hand, first tokens left out; along the difference all tokens go to the neutral mean."""
    model = subject("original")
    few = Texts(forget=("w50 w1", "w51 w2 w40 w3"), neutral=("w52 w5 w48",))
    edit = DirectionAblation().find_difference_edits(model, few, seed=0)[2]

    def mean(pool: tuple[str, ...]) -> torch.Tensor:
        tokens = []
        for text in pool:
            ids = torch.tensor([model.tokens(text)])
            with torch.no_grad():
                tokens.append(model.module(ids, output_hidden_states=True).hidden_states[3][0, 1:])
        return torch.cat(tokens).mean(0)

    neutral = mean(few.neutral)
    d = mean(few.forget) - neutral
    h = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(edit(h) @ d, neutral @ d, atol=1e-3)
    away = h - (h @ d).unsqueeze(-1) * d / (d @ d)
    torch.testing.assert_close(edit(h) - (neutral @ d) * d / (d @ d), away, atol=1e-3, rtol=1e-3)


def test_tokens_that_moved_far_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    moves = torch.zeros(100, 32)
    moves[:, 0] = 1
    moves[7] = torch.eye(32)[1] * 1000
    halves = [[moves[:50]], [moves[50:]]]
    monkeypatch.setattr(residual, "iterate_displacements", lambda *args: iter(halves))
    edit = find_displacement_edits(subject("unlearned"), exam())[0]
    torch.testing.assert_close(edit(torch.ones(1, 1, 32))[0, 0], 1 - torch.eye(32)[0])


def test_deep_models_have_eight_layers_ablated_alone() -> None:
    assert pick_evenly(range(32), 8) == [0, 4, 9, 13, 18, 22, 27, 31]


def test_ablation_of_the_original() -> None:
    found = run(DirectionAblation(), subject("original"))
    assert {way.setting.partition(",")[0] for way in found.ways} == {"forget minus neutral"}
    assert found.budget["skipped"] == {"displacement": "this is the original model"}


# E17


def test_depth_of_models_known() -> None:
    oracle = subject("oracle")
    name = "model.layers.0.mlp.down_proj.weight"
    same = subject("original", original={name: states()["original"][name]}, oracle=oracle)
    assert run(UnlearningDepth(), same).metrics["depth"].value == 0
    gone = subject("oracle", oracle=oracle)
    assert run(UnlearningDepth(), gone).metrics["depth"].value == pytest.approx(1, abs=1e-4)
    assert 0.05 < run(UnlearningDepth(), subject("unlearned")).metrics["depth"].value < 0.9


@pytest.mark.parametrize("given", [{"oracle": None}, {"original": {}}, {"fixed": "a filter"}])
def test_depth_needs_both_other_models(given: dict[str, Any]) -> None:
    model = subject("unlearned", **given)
    with unchanged(model), pytest.raises(NotApplicable):
        run(UnlearningDepth(), model)


@pytest.mark.slow
def test_depth_is_that_of_a_loop_over_questions() -> None:
    """Answers of two tokens: both positions are patched, at one layer at a time."""
    model = subject("unlearned")
    asked = [replace(q, options=tuple(f"{option} w1" for option in q.options)) for q in exam().test]
    found = UnlearningDepth().run(model, texts(), replace(exam(), test=tuple(asked)), 0)
    total = []
    with torch.no_grad():
        for q in asked:
            before, answer = model.split(q.prompt, q.answer)
            ids = torch.tensor([before + answer[:-1]])
            spots = [len(before) - 1, len(before)]

            def mean_logp(ids: Any = ids, spots: Any = spots, answer: Any = answer) -> float:
                logs = model.module(ids).logits[0, spots].log_softmax(-1)
                return (logs[0, answer[0]] + logs[1, answer[1]]).item() / 2

            drops = torch.zeros(2, 4)
            for stage, source in enumerate([model.oracle, model]):
                assert source is not None
                for layer in range(4):
                    kept: list[torch.Tensor] = []
                    block = decoder_blocks(source.module)[layer]
                    handle = block.register_forward_hook(lambda m, a, out, k=kept: k.append(out))
                    source.module(ids)
                    handle.remove()

                    def patched(m: Any, a: Any, out: Any, k: Any = kept, s: Any = spots) -> Any:
                        return torch.stack(
                            [k[0][0, t] if t in s else out[0, t] for t in range(out.shape[1])]
                        ).unsqueeze(0)

                    with model.as_original():
                        intact = mean_logp()
                        handle = decoder_blocks(model.module)[layer].register_forward_hook(patched)
                        drops[stage, layer] = intact - mean_logp()
                        handle.remove()
            over = [layer for layer in range(4) if drops[0, layer] > 0.05]
            if not over:
                continue
            weights = [drops[0, layer].item() for layer in over]
            shares = [min(max((drops[1, i] / drops[0, i]).item(), 0), 1) for i in over]
            total.append(sum(w * s for w, s in zip(weights, shares, strict=True)) / sum(weights))
    assert found.metrics["depth"].n == len(total) < len(asked)
    assert found.metrics["depth"].value == pytest.approx(sum(total) / len(total), abs=1e-4)


def test_depth_by_hand() -> None:
    first = torch.tensor([[1.0, 0.01, 0.0], [3.0, 0.02, 0.5]])
    second = torch.tensor([[0.5, 9.0, 9.0], [6.0, 9.0, -1.0]])
    found = depth_scores(first, second, threshold=0.05).tolist()
    assert found[0] == pytest.approx((1 * 0.5 + 3 * 1) / 4)
    assert found[1] != found[1]  # no layer
    assert found[2] == 0


# E13


def test_embeddings_of_words_do_what_the_words_do() -> None:
    model = subject("original")
    words = range(10, 26)
    prompted = SplicedSubject(model, [unused_token(model, exam())] * len(words), 1)
    soft = model.module.get_input_embeddings().weight[list(words)].detach()
    texts = " ".join(word_tokenizer().convert_ids_to_tokens(words))
    spoken = [replace(q, prompt=f"{texts} {q.prompt}") for q in exam().test]
    with insert_prompt(prompted, soft):
        found = option_scores(prompted, exam().test)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(option_scores(model, spoken)))


@pytest.mark.slow
def test_soft_prompt_finds_what_a_prefix_unlocks() -> None:
    """A model that answers only after a word; one without the facts answers no better."""
    said = [f"w53 {w} {s} {a}" for w in ("w50", "w51") for s, (a, _) in facts().items()]
    prompts = [q.prompt for half in (exam().test, exam().val) for q in half]
    with torch.random.fork_rng():
        locked = Subject(taught(pico_module(), said, 120, prompts), word_tokenizer())
    assert score(mark_answers(locked, exam().test)) < 0.5
    for model, low, high in ((locked, 0.85, 1), (subject("oracle"), 0, 0.45)):
        (way,) = SoftPrompt(length=1, rates=(1e-2,)).run(model, texts(), exam(), 0).ways
        assert low <= score(way.test) <= high
        assert len(way.val) == 8  # a fifth of the facts, in two phrasings


def test_a_vector_undoes_a_shift() -> None:
    """Misdirection sends activations elsewhere by one shift, which the attack finds; in the oracle it finds nothing."""
    hidden = subject("unlearned")
    assert score(mark_answers(hidden, exam().test)) < 0.45
    with unchanged(hidden):
        found = run(Latent(), hidden)
    assert [way.setting for way in found.ways] == [f"layer {i}" for i in range(4)]
    assert score(best(found).test) > 0.65
    assert score(best(run(Latent(), subject("oracle"))).test) < 0.45


def test_soft_prompt_is_trained_on_other_facts_than_choose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = subject("original"), []

    def keep(self: Any, prompted: SplicedSubject, answers: Any, *rest: Any) -> torch.Tensor:
        given.extend(tuple(token for token in before if token != prompted.added[0]) for before, _ in answers)
        return torch.zeros(16, 32)

    monkeypatch.setattr(SoftPrompt, "learn_prompt", keep)
    ways = SoftPrompt().run(model, texts(), exam(), 0).ways
    trained = {word_tokenizer().decode(tokens[2:]) for tokens in given}
    assert len(trained) == 16 and len(given) == 32 * len(ways)
    assert trained < {q.entry for q in exam().val}


def test_padding_and_placeholders() -> None:
    model = subject("original")
    batch = pad_answers([([1, 2], [3]), ([1], [4, 5, 6])], model.device)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0], [1, 4, 5, 6]]
    assert batch["labels"].tolist() == [[-100, -100, 3, -100], [-100, 4, 5, 6]]
    assert unused_token(model, exam()) not in {0, *word_tokenizer().convert_tokens_to_ids(ANSWERS)}
