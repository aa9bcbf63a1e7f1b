"""Fine-tuning against a loop written out; what ends it, and what it leaves alone."""

from typing import Any

import pytest
import torch

from helpers.models import pico_module, texts, word_tokenizer
from srmu.engine.fine_tune import Row, descend, rate_factor, tune_model
from srmu.engine.model import EditableModel


def text_rows(count: int) -> list[Row]:
    return [([], row) for row in word_tokenizer()(texts(count, seed=2))["input_ids"]]


def test_rate_rises_and_falls() -> None:
    linear = [rate_factor(done, 40, "linear") for done in range(40)]
    assert linear[:3] == [0.5, 1.0, 1.0]  # 5 % of 40 steps rise
    assert linear[3] == pytest.approx(37 / 38)
    assert linear[-1] == pytest.approx(1 / 38)
    assert [rate_factor(done, 40, "constant") for done in range(40)] == [0.5] + [1.0] * 39
    assert [rate_factor(done, 2, "linear") for done in range(2)] == pytest.approx([1, 1 / 1.9])


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_tune_is_the_loop_written_out(optimiser: Any) -> None:
    """Rows of several lengths in one batch; only what is to be said counts."""
    rows = [([1, 5], [6, 7, 8]), ([], [1, 9, 10]), ([1, 11, 12, 13], [14])]
    tuned, naive = pico_module(), pico_module()
    done: list[int] = []
    options: Any = {"learning_rate": 1e-2, "batch_size": 3, "optimiser": optimiser}
    model = EditableModel(tuned, ["*"])
    assert tune_model(model, rows, steps=4, seed=0, after=done.append, **options) == 4
    assert done == [1, 2, 3, 4]

    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in naive.parameters()]
    for step in range(4):
        losses = []
        for before, said in rows:
            ids = torch.tensor([before + said])
            logs = naive(ids).logits[0].log_softmax(-1)
            losses += [-logs[t - 1, ids[0, t]] for t in range(max(len(before), 1), ids.shape[1])]
        grads = torch.autograd.grad(torch.stack(losses).mean(), [*naive.parameters()])
        rate = 1e-2 * min(1.0, (4 - step) / (4 - 0.2))
        with torch.no_grad():
            for p, g, (m, v) in zip(naive.parameters(), grads, moments, strict=True):
                if optimiser == "sgd":
                    m.mul_(0.9).add_(g)
                    p -= rate * m
                else:
                    m.mul_(0.9).add_(0.1 * g)
                    v.mul_(0.999).add_(0.001 * g * g)
                    one, two = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
                    p -= rate * one / (two.sqrt() + 1e-8)
    for name, weight in naive.named_parameters():
        # where a gradient is almost 0, Adam's step is its sign: rounding decides it
        close = torch.isclose(model.trained[name], weight, atol=2e-4)
        assert close.float().mean() > 0.999, name


def test_each_epoch_reads_each_row_once() -> None:
    model = EditableModel(pico_module(), ["*.linear"])
    read: list[int] = []
    logits = model.logits
    model.logits = lambda batch: (  # type: ignore[method-assign]
        read.extend(batch["input_ids"][:, 1].tolist()) or logits(batch)
    )
    rows = [([], [1, word, 9]) for word in range(20, 30)]
    tune_model(model, rows, steps=6, learning_rate=1e-3, batch_size=4, seed=0)
    assert sorted(read[:10]) == sorted(read[10:]) == list(range(20, 30))
    assert read[:10] != read[10:]


def test_small_steps_add_up_in_bf16() -> None:
    """A step of 2e-5 on a weight of 0.15 rounds to nothing: float32 copies keep it."""
    rows = text_rows(4)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = EditableModel(pico_module(dtype=dtype), ["*.linear"])
        tune_model(model, rows, steps=60, learning_rate=2e-5, batch_size=4, seed=0, schedule="constant")
        name = next(iter(model.trained))
        found[dtype] = (model.trained[name] - model.original[name]).detach().flatten().float()
    cosine = torch.cosine_similarity(*found.values(), dim=0)
    assert cosine > 0.8


def test_tune_stops_before_what_is_not_finite() -> None:
    model = EditableModel(pico_module(), ["*.linear"])
    rows = text_rows(40)
    taken = tune_model(model, rows, steps=20, learning_rate=1e30, batch_size=4, seed=0, schedule="constant")
    assert 0 < taken < 20


def test_only_what_is_tuned_gets_a_gradient() -> None:
    module, soft = pico_module(), torch.zeros(3, 32, requires_grad=True)
    optimiser = torch.optim.SGD([soft], lr=1.0)

    def loss() -> torch.Tensor:
        return module(inputs_embeds=soft[None]).logits[..., 0].mean()

    first = float(loss())
    assert descend([(soft, soft)], optimiser, loss, 5) == 5
    assert float(loss()) < first
    assert all(parameter.grad is None for parameter in module.parameters())
