"""What the methods that weigh each token of an ascent promise: closed forms of their gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.models import topic
from srmu.engine.losses import is_predicted, mean_nll, weighted_nll
from srmu.engine.train import TrainOptions
from srmu.errors import SrmuError
from srmu.methods.base import State
from srmu.methods.ceu import CEU
from srmu.methods.satimp import SatImp
from srmu.methods.wga import WGA

LABELS = torch.tensor([[-100, -100, 4, 2, 0], [1, 3, -100, -100, -100]])
COUNT = 4  # of its tokens that are predicted


class Logits:
    """A model that is its logits."""

    def __init__(self, scale: float = 3.0) -> None:
        draw = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
        self.values = (scale * draw).requires_grad_()

    def logits(self, batch: Any) -> Tensor:
        return self.values


def loss_and_gradient(method: Any, model: Logits) -> tuple[Tensor, Tensor]:
    terms = method.loss(model, State(), {"labels": LABELS}, {}, 0)
    (loss,) = terms.loss_values.values()
    return loss, torch.autograd.grad(loss, model.values)[0]


def chances(model: Logits) -> tuple[Tensor, Tensor]:
    """The distribution at each position that predicts a counted token, (4, V), and the likelihood of that token."""
    places = is_predicted(LABELS)
    p = model.values[:, :-1].softmax(-1)[places]
    return p, p.gather(1, LABELS[:, 1:][places].unsqueeze(1))


def at_predicted(gradient: Tensor) -> Tensor:
    places = is_predicted(LABELS)
    assert not gradient[:, :-1][~places].any()
    assert not gradient[:, -1].any()
    return gradient[:, :-1][places]


@pytest.mark.parametrize(
    ("method", "powers"),
    [(WGA(), (1, 0)), (WGA(beta=0.2), (0.2, 0)), (SatImp(), (5, 1)), (SatImp(beta1=0.1, beta2=0.3), (0.1, 0.3))],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_each_tokens_ascent_is_weighted_by_its_likelihood(method: Any, powers: tuple[float, float]) -> None:
    """The gradient is that of ascent, times the weight: the weight itself has none."""
    model = Logits()
    p, p_y = chances(model)
    token = torch.zeros_like(p).scatter(1, LABELS[:, 1:][is_predicted(LABELS)].unsqueeze(1), 1.0)
    weight = p_y ** powers[0] * (1 - p_y) ** powers[1]
    _, gradient = loss_and_gradient(method, model)
    torch.testing.assert_close(at_predicted(gradient), weight * (token - p) / COUNT)


def test_wga_leaves_alone_what_is_forgotten_and_ga_does_not() -> None:
    """With beta near 0 the weight is 1, as in GA; with 1 a token's gradient falls as fast as its likelihood."""
    values = torch.tensor([[[30.0, 0.0], [0.0, 0.0]]], requires_grad=True)  # the true token costs 30 nats
    labels = torch.tensor([[-100, 1]])
    pull = {power: float(torch.autograd.grad(weighted_nll(values, labels, power).value, values)[0].abs().max())
            for power in (1e-3, 1.0)}  # fmt: skip
    assert pull[1e-3] == pytest.approx(1.0, abs=0.05)
    assert pull[1.0] < 1e-12


def test_satimp_without_importance_is_wga() -> None:
    one, other = (loss_and_gradient(m, Logits()) for m in (SatImp(beta1=0.7, beta2=0.0), WGA(beta=0.7)))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_satimp_leaves_alone_what_is_sure() -> None:
    """A token that nothing else could be, such as the end of a word, tells nothing: its weight is near 0."""
    values = torch.tensor([[[0.0, 30.0], [0.0, 0.0]]], requires_grad=True)
    labels = torch.tensor([[-100, 1]])
    sure = weighted_nll(values, labels, 5.0, 1.0).value
    assert float(sure.detach()) == pytest.approx(0.0, abs=1e-12)
    assert torch.isfinite(torch.autograd.grad(sure, values)[0]).all()


def test_weights_of_ones_are_the_mean_cost() -> None:
    model = Logits()
    torch.testing.assert_close(weighted_nll(model.values, LABELS, 0.0).value, mean_nll(model.values, LABELS).value)


def test_ceus_gradient_has_its_closed_form() -> None:
    """p(y) at the true token, -p(y) q elsewhere: it does not vanish where the model is sure, nor explode where not."""
    model = Logits()
    p, p_y = chances(model)
    place = LABELS[:, 1:][is_predicted(LABELS)].unsqueeze(1)
    expected = (-p_y * p / (1 - p_y)).scatter(1, place, p_y)
    _, gradient = loss_and_gradient(CEU(), model)
    torch.testing.assert_close(at_predicted(gradient), expected / COUNT)


@pytest.mark.parametrize(("lead", "pull"), [(40.0, 1.0), (-40.0, 0.0)])
def test_ceu_where_the_true_token_is_sure_or_impossible(lead: float, pull: float) -> None:
    model = Logits(0.0)
    model.values = torch.zeros(2, 5, 6).scatter_(2, LABELS.clamp(min=0).roll(-1, 1).unsqueeze(2), lead).requires_grad_()
    loss, gradient = loss_and_gradient(CEU(), model)
    assert loss.isfinite()
    found = at_predicted(gradient).gather(1, LABELS[:, 1:][is_predicted(LABELS)].unsqueeze(1))
    torch.testing.assert_close(found * COUNT, torch.full((COUNT, 1), pull), rtol=1e-5, atol=1e-12)


def test_ceu_skips_the_first_tokens_of_each_answer() -> None:
    method, model = CEU(skip=1), Logits()
    _, gradient = loss_and_gradient(method, model)
    assert gradient[:, :-1].any(dim=2).tolist() == [[False, False, True, True], [False, False, False, False]]
    assert loss_and_gradient(CEU(skip=3), model)[0] == 0


def test_ceu_that_would_skip_everything() -> None:
    some = topic()
    with pytest.raises(SrmuError, match=r"method\.skip=99 leaves no token of topic bio's forget texts"):
        CEU(skip=99).check([some], TrainOptions())
    CEU(skip=1).check([some], TrainOptions())
