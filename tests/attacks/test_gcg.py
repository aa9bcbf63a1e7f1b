import pytest
import torch
from torch import Tensor

from helpers.attack_world import exam, subject, texts
from helpers.models import pico_module, word_tokenizer
from srmu.attacks.learned_prompts import GCG, SplicedSubject, common_end, make_target, suffix_gradient, suffix_losses
from srmu.evals.subject import Subject, mark_answers


def naive(model: Subject, suffix: Tensor, cue: int, wanted: list[int]) -> float:
    """Mean loss of the right answers of some validation questions, one whole forward each."""
    found = []
    for i in wanted:
        q = exam().val[i]
        before, answer = model.split(q.prompt, q.answer)
        at = len(before) - cue
        row = torch.tensor([before[:at] + suffix.tolist() + before[at:] + answer])
        with torch.no_grad():
            logs = model.module(row).logits[0].float().log_softmax(-1)
        places = range(row.shape[1] - len(answer) - 1, row.shape[1] - 1)
        found.append(-sum(float(logs[p, t]) for p, t in zip(places, answer, strict=True)) / len(answer))
    return sum(found) / len(found)


@pytest.mark.parametrize("cue", [0, 1])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_losses_are_those_of_whole_forwards(name: str, cue: int) -> None:
    model = Subject(pico_module(name), word_tokenizer())
    suffixes = torch.randint(4, 64, (40, 3), generator=torch.Generator().manual_seed(0))
    targets = [make_target(model, exam().val[i], cue, 3) for i in (0, 3)]
    found = suffix_losses(model, targets, suffixes, 32)
    for row in (0, 20, 39):  # of more batches than one
        assert float(found[row]) == pytest.approx(naive(model, suffixes[row], cue, [0, 3]), abs=2e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_slopes_tell_how_the_loss_changes(name: str) -> None:
    """The embedding moved a little towards a token's, against the derivative."""
    model = Subject(pico_module(name), word_tokenizer())
    suffix = torch.tensor([7, 9])
    one = make_target(model, exam().val[0], 0, 2)
    found = suffix_gradient(model, [one], suffix)
    assert found.shape == (2, 64)
    weight = model.module.get_input_embeddings().weight
    for place, token in ((0, 30), (1, 50)):
        ids = torch.cat([suffix, one.cue])[None]
        before, answer = model.split(exam().val[0].prompt, exam().val[0].answer)
        row = torch.tensor([before + ids[0].tolist()])
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                read = model.module.get_input_embeddings()(row).clone()
                read[0, len(before) + place] += sign * 1e-3 * weight[token]
                logs = model.module(inputs_embeds=read).logits[0, -1].double().log_softmax(-1)
            values.append(-float(logs[answer[0]]))
        slope = (values[0] - values[1]) / 2e-3
        assert float(found[place, token]) == pytest.approx(slope, rel=0.02, abs=2e-3)


def test_swaps_change_one_token_to_a_promising_one() -> None:
    generator = torch.Generator().manual_seed(0)
    suffix, allowed = torch.tensor([5, 6, 7]), torch.tensor([2, 4, 5, 6, 7, 9])
    steep = torch.arange(30.0).reshape(3, 10)
    tried = GCG(candidates=100).draw_swaps(steep, suffix, allowed, generator)
    assert len(tried) == 18  # all there are
    assert len({tuple(row) for row in tried.tolist()}) == 16  # three of them change nothing
    assert all((row != suffix).sum() <= 1 for row in tried)
    assert {*tried.flatten().tolist()} <= {*allowed.tolist()}
    assert len(GCG(candidates=4).draw_swaps(steep, suffix, allowed, generator)) == 4


@pytest.mark.slow
def test_one_step_over_all_tokens_finds_the_best_one() -> None:
    model = subject("unlearned")
    found = GCG(steps=1, candidates=1000, length=1).run(model, texts(), exam(), 0)
    import random

    chosen = random.Random(0).sample(range(len(exam().val)), 5)
    tokens = {*range(len(model.tokenizer))} - {*model.tokenizer.all_special_ids}
    values = {t: naive(model, torch.tensor([t]), 0, chosen) for t in sorted(tokens)}
    assert found.budget["loss after"] == pytest.approx(min(values.values()), abs=1e-4)
    best = torch.tensor([min(values, key=values.__getitem__)])
    asked = [SplicedSubject(model, best.tolist(), 0).split(q.prompt, q.answer) for q in exam().test]
    assert all(before[-1] == best for before, _ in asked)
    assert found.ways[0].test == mark_answers(SplicedSubject(model, best.tolist(), 0), exam().test)


@pytest.mark.slow
def test_more_steps_never_make_it_worse() -> None:
    model = subject("unlearned")
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    found = [GCG(steps=n, candidates=8, length=3).run(model, texts(), exam(), 1) for n in (2, 6)]
    after = [one.budget["loss after"] for one in found]
    assert found[0].budget["loss before"] == found[1].budget["loss before"] > after[0] >= after[1]
    assert found[1] == GCG(steps=6, candidates=8, length=3).run(model, texts(), exam(), 1)
    assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items())
    assert all(p.grad is None for p in model.module.parameters())


def test_the_cue_is_what_all_prompts_end_with() -> None:
    assert common_end([[1, 2, 8, 9], [1, 3, 8, 9], [4, 8, 9]]) == 2
    assert common_end([[8, 9], [8, 9]]) == 1  # something is before it
    assert common_end([[1, 2], [1, 3]]) == 0
    model = subject("unlearned")
    before, answer = SplicedSubject(model, [5, 6], -1).split("w50 w0", " w41")
    plain, same = model.split("w50 w0", " w41")
    assert (before, answer) == ([*plain[:-1], 5, 6, plain[-1]], same)


@pytest.mark.slow
def test_cost_says_seconds_and_bfloat16_runs() -> None:
    model = Subject(pico_module("gemma2", torch.bfloat16), word_tokenizer())
    work, seconds = GCG().cost(model)
    assert "5,000 forwards" in work and 0 < seconds < 3600
    found = GCG(steps=2, candidates=4, length=2).run(model, texts(), exam(), 0)
    assert len(found.ways[0].test) == len(exam().test)
