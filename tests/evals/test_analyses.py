import math

import pytest
import torch
from torch import nn

from helpers.models import VOCABULARY, batches, pico_module, texts, word_tokenizer
from srmu.engine.losses import is_counted, without_first
from srmu.engine.model import EditableModel, Site
from srmu.errors import DivergedError, SrmuError
from srmu.evals import analyses
from srmu.evals.analyses import (
    measure_alignment,
    measure_confidence,
    measure_cosines,
    measure_layer,
    measure_logits,
    measure_sensitivity,
    measure_tokens,
    open_model,
    sweep_layers,
)
from srmu.report.studies import draw_panel, write_analysis
from srmu.runs.config import make_config
from srmu.runs.plan import read_topic_texts
from srmu.runs.run import unlearn_config

TEXTS = {"forget": texts(6, 1, range(30)), "retain": texts(5, 2, range(20, 60))}


def plain(arch="llama"):
    return EditableModel(pico_module(arch), [])


def a_run(workplace, method="srmu", *overrides):
    config = make_config(
        str(workplace / "model"),
        str(workplace / "forget.jsonl"),
        str(workplace / "retain.jsonl"),
        method,
        ["train.max_steps=5", f"runs_dir={workplace / 'runs'}", "train.learning_rate=0.01",
         *overrides],
    )  # fmt: skip
    return config, unlearn_config(config)


def test_sureness_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(6), math.log(3), 0.0, -1e9]])
    found = measure_logits(logits)
    torch.testing.assert_close(found[0], torch.tensor([0, 0.25, 0, math.log(4)]))
    entropy = -sum(p * math.log(p) for p in (0.6, 0.3, 0.1))
    torch.testing.assert_close(found[1], torch.tensor([math.log(6), 0.6, 0.3, entropy]))
    assert measure_logits(torch.tensor([[0.0, -math.inf]])).isfinite().all()


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_confidence_of_a_model_that_says_all_alike(arch):
    model = plain(arch)
    nn.init.zeros_(model.module.get_output_embeddings().weight)
    found = measure_confidence(model, word_tokenizer(), TEXTS)
    for name in TEXTS:
        row = found.numbers["confidence"][name]["model"]
        assert row["entropy"] == pytest.approx(math.log(VOCABULARY), rel=1e-5)
        assert row["probability"] == pytest.approx(1 / VOCABULARY, rel=1e-5)
        assert row["margin"] == 0 and row["logit"] == 0


def test_padding_does_not_change_confidence():
    model = plain()
    many = torch.cat([measure_tokens(model, b) for b in batches(TEXTS["forget"], 6)])
    each = torch.cat([measure_tokens(model, b) for b in batches(TEXTS["forget"], 1)])
    torch.testing.assert_close(many, each, atol=1e-5, rtol=1e-4)


def test_generated_tokens_are_the_greedy_ones():
    """Against a loop that reads the whole text again for each token; the end counts, no more."""
    model, tokenizer = plain(), word_tokenizer()
    with torch.no_grad():  # make the end likely, so that some texts reach it
        model.module.lm_head.weight[2] *= 3
    naive = []
    for text in TEXTS["forget"]:
        ids = tokenizer(text)["input_ids"]
        ids = ids[: len(ids) // 2]
        for _ in range(16):
            with torch.no_grad():
                logits = model.module(torch.tensor([ids])).logits[0, -1]
            naive.append(measure_logits(logits[None]))
            ids.append(int(logits.argmax()))
            if ids[-1] == model.module.generation_config.eos_token_id:
                break
    found = measure_confidence(model, tokenizer, {"forget": TEXTS["forget"]})
    row = found.numbers["confidence"]["forget"]["model"]
    assert row["tokens"] == len(naive) < 16 * len(TEXTS["forget"])
    mean = torch.cat(naive).double().mean(dim=0)
    for name, value in zip(("logit", "probability", "margin", "entropy"), mean, strict=True):
        assert row[name] == pytest.approx(float(value), rel=1e-4)


def test_cosine_of_a_planted_displacement():
    """The biases of an MLP's output move every token along one direction: cosine 1, and at the
    layers below, nothing moved."""
    model = EditableModel(pico_module("gpt2"), ["transformer.h.2.mlp.c_proj.bias"])
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    bias = model.trained["transformer.h.2.mlp.c_proj.bias"]
    with torch.no_grad():
        bias += 3 * direction
    rows = batches(TEXTS["forget"])
    at = measure_cosines(model, rows, Site(2), direction)
    torch.testing.assert_close(at["displacement"], torch.ones_like(at["after"]))
    with model.frozen():
        naive = [
            torch.cosine_similarity(model.hidden(b, Site(2))[without_first(is_counted(b["labels"]))], direction, dim=-1)
            for b in rows
        ]
    torch.testing.assert_close(at["before"], torch.cat(naive))
    assert (at["after"] > at["before"]).all()
    below = measure_cosines(model, rows, Site(1), direction)
    assert len(below["displacement"]) == 0
    torch.testing.assert_close(below["before"], below["after"])


def test_alignment_of_a_run(workplace):
    _, run = a_run(workplace, "rmu", "method.kappa=8", "method.alpha=0")
    model, tokenizer = open_model(run.folder, "cpu")
    found = measure_alignment(run, model, tokenizer)
    (rows,) = found.numbers["topics"].values()
    site = found.numbers["layer"]
    assert rows[site]["displacement"] > 0.3
    assert rows[site]["after"] > rows[site]["before"]
    assert len(found.panels) == 2
    for panel in found.panels:
        draw_panel(panel)
    bars = found.panels[-1].series
    assert all(sum(values) == pytest.approx(1) for values in bars.values())


def test_alignment_needs_a_direction(workplace):
    _, run = a_run(workplace, "npo", "train.learning_rate=0.001")
    with pytest.raises(SrmuError, match="npo keeps none"):
        measure_alignment(run, *open_model(run.folder, "cpu"))


@pytest.mark.slow
def test_sensitivity_of_linear_maps():
    """A last layer whose norm is replaced: the identity passes noise on as it is, a matrix W has
    psi = size^2 |W|_F^2 / D * E |h|^2 / |W h|^2, and noise cannot change a constant."""
    model = plain()
    rows = batches(TEXTS["forget"], 3)
    size, draws = 0.1, 200
    model.module.model.norm = nn.Identity()
    assert measure_layer(model, rows, 3, size, draws) == pytest.approx(size**2, rel=0.02)
    matrix = nn.Linear(32, 32, bias=False)
    with torch.no_grad():
        matrix.weight.normal_(generator=torch.Generator().manual_seed(1))
        hidden = torch.cat([
            model.hidden(b, Site(3))[without_first(is_counted(b["labels"]))] for b in rows
        ])  # fmt: skip
        ratio = hidden.square().sum(-1) / matrix(hidden).square().sum(-1)
        expected = size**2 * float(matrix.weight.square().sum() / 32 * ratio.mean())
        model.module.model.norm = matrix
        assert measure_layer(model, rows, 3, size, draws) == pytest.approx(expected, rel=0.03)
    model.module.model.norm = nn.Linear(32, 32)  # what it gives is its bias
    nn.init.zeros_(model.module.model.norm.weight)
    assert measure_layer(model, rows, 3) == 0
    assert not model.layers[3]._forward_hooks


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_sensitivity_of_every_layer(arch):
    model = plain(arch)
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    found = measure_sensitivity(model, word_tokenizer(), TEXTS)
    again = measure_sensitivity(model, word_tokenizer(), TEXTS)
    assert found.numbers == again.numbers
    for values in found.numbers["psi"].values():
        assert len(values) == 4 and all(value > 0 for value in values)
    assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items())


def test_a_small_noise_gives_psi_of_its_square():
    model, rows = plain(), batches(TEXTS["forget"])
    with torch.no_grad():
        one, two = (measure_layer(model, rows, 1, size, 50) for size in (1e-3, 2e-3))
    assert two / one == pytest.approx(4, rel=0.02)


def test_before_and_after_a_run(workplace):
    _, run = a_run(workplace)
    model, tokenizer = open_model(run.folder, "cpu")
    original, _ = open_model(workplace / "model", "cpu")
    assert set(read_topic_texts(run.config)) == {"forget", "retain"}
    found = measure_confidence(model, tokenizer, read_topic_texts(run.config)).numbers["confidence"]["forget"]
    alone = measure_confidence(original, tokenizer, read_topic_texts(run.config)).numbers["confidence"]["forget"]
    assert found["before"] == alone["model"] != found["after"]
    psis = measure_sensitivity(model, tokenizer, read_topic_texts(run.config)).numbers["psi"]
    one = measure_sensitivity(original, tokenizer, read_topic_texts(run.config)).numbers["psi"]
    assert psis["forget, before"] == one["forget, model"] != psis["forget, after"]


@pytest.mark.slow
def test_the_layer_sweep_goes_on_where_it_stopped(workplace, tmp_path, monkeypatch):
    config, _ = a_run(workplace)
    scored = []

    def score(run):
        scored.append(run.config.method.layer)
        fall = {2: 0.5, 3: 0.2}[run.config.method.layer]
        before = {"hazard/acc": {"value": 0.9}, "rest/acc": {"value": 0.8}, "x/f1": {"value": 1}}
        after = {"hazard/acc": {"value": 0.9 - fall}, "rest/acc": {"value": 0.7}, "x/f1": {"value": 1}}
        return {"before": before, "after": after}

    monkeypatch.setattr(analyses, "score_model", score)
    found = sweep_layers(config, ["hazard/acc"])
    assert scored == [2, 3] and found.numbers["best"] == 2  # a window of three starts at layer 0
    row = found.numbers["layers"][0]
    assert row["forgetting"] == pytest.approx(0.5) and row["utility_loss"] == pytest.approx(0.1)
    assert "method.layer=2" in found.sentences[0]
    times = {p: p.stat().st_mtime_ns for p in (workplace / "runs").glob("*/record.json")}
    assert sweep_layers(config, ["hazard/acc"]).numbers == found.numbers
    assert times == {p: p.stat().st_mtime_ns for p in (workplace / "runs").glob("*/record.json")}
    page = write_analysis(found, tmp_path / "sweep.html").read_text()
    assert "Unlearning at each layer" in page and str(workplace) not in page

    def refuse(run):
        if run.config.method.layer == 2:
            raise DivergedError("step 3: the loss is not finite")
        return score(run)

    monkeypatch.setattr(analyses, "score_model", refuse)
    found = sweep_layers(config, ["hazard/acc"])
    assert found.numbers["best"] == 3 and "Diverged at layers 2." in found.sentences
    assert found.panels[0].series["forgetting"][0] is None
    assert "\N{EN DASH}" in write_analysis(found, tmp_path / "lost.html").read_text()
    with pytest.raises(SrmuError, match="no accuracy other/acc"):
        sweep_layers(config, ["other/acc"])
    with pytest.raises(SrmuError, match="another one to keep"):
        sweep_layers(config, ["hazard/acc", "rest/acc"])


def test_wrong_input(workplace):
    model, tokenizer = plain(), word_tokenizer()
    for rows in ([], ["w1"]):
        with pytest.raises(SrmuError, match="no text of two tokens"):
            measure_confidence(model, tokenizer, {"forget": rows})
    config, _ = a_run(workplace, "npo", "train.learning_rate=0.001")
    with pytest.raises(SrmuError, match="no layer to vary"):
        sweep_layers(config, ["x/acc"])
