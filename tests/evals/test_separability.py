import math
from html import unescape

import numpy as np
import pytest
import torch
from plotly.offline import get_plotlyjs
from sklearn.linear_model import LogisticRegression

from helpers.models import pico_module, texts, word_tokenizer
from srmu.data.overlap import ngram_overlap
from srmu.data.tokens import batch_rows, tokenise_texts
from srmu.engine.loading import find_layers
from srmu.engine.losses import is_counted, without_first
from srmu.errors import SrmuError
from srmu.evals.separability import (
    advise_user,
    choose_layer,
    classify_sets,
    describe_selectivity,
    draw_sample,
    measure_entanglement,
    measure_principal_cosines,
    measure_separability,
    sample_activations,
)
from srmu.evals.subject import Question
from srmu.methods.importance import FLAT_WORDS, describe_importance, importance_map, measure_features, sum_features
from srmu.report.studies import write_analysis

FORGET, RETAIN = texts(12, 1, range(30)), texts(12, 2, range(20, 60))


def sample(documents, tokens=1000, size=5):
    tokenizer = word_tokenizer()
    batches = list(batch_rows(tokenise_texts(documents, tokenizer, 64), tokenizer, size, "mask"))
    return draw_sample("forget", batches, tokens, torch.Generator().manual_seed(0))


def states(module, batch):
    """The output of each block, by hooks of the test's own."""
    found = []
    handles = [
        block.register_forward_hook(lambda m, a, out: found.append(out[0] if isinstance(out, tuple) else out))
        for block in getattr(*find_layers(module))
    ]
    with torch.no_grad():
        module(batch["input_ids"], attention_mask=batch["attention_mask"])
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_activations_are_those_of_each_block(arch):
    module, drawn = pico_module(arch), sample(FORGET)
    found = sample_activations(module, drawn, range(4), lambda text: None)
    naive = [states(module, batch) for batch in drawn.batches]
    masks = [without_first(is_counted(batch["labels"])) for batch in drawn.batches]
    assert len(found) == 4
    for layer, (values, total) in enumerate(found):
        parts = [h[layer][mask] for h, mask in zip(naive, masks, strict=True)]
        np.testing.assert_allclose(values, torch.cat(parts).numpy(), atol=1e-5)
        whole = [sum_features(h[layer], mask) for h, mask in zip(naive, masks, strict=True)]
        torch.testing.assert_close(total, torch.stack(whole).sum(dim=0), atol=1e-4, rtol=1e-5)
    assert not any(block._forward_hooks for block in getattr(*find_layers(module)))


def test_the_tokens_drawn():
    whole, few = sample(FORGET), sample(FORGET, tokens=20)
    lengths = [len(text.split()) for text in FORGET]  # <s> comes first and is left out
    assert [int((whole.owners == i).sum()) for i in range(len(FORGET))] == lengths
    assert len(few.owners) == 20 == sum(int(part.sum()) for part in few.chosen)
    for chosen, mask in zip(few.chosen, few.masks, strict=True):
        assert not (chosen & ~mask).any()


def test_a_classifier_learns_documents_not_tokens():
    """Features that name a document tell nothing of another: chance, where splitting by token
    would give 1. Features that name the set give 1."""
    owners = np.repeat(np.arange(10), 20)
    rng = np.random.default_rng(0)
    marks = rng.normal(size=(20, 40))
    left, right = marks[owners], marks[10 + owners]
    noise = rng.normal(size=(2, 200, 40)) * 0.1
    accuracy, error = classify_sets(left + noise[0], right + noise[1], owners, owners)
    whole = np.concatenate([left, right])
    labels = np.repeat([1, 0], 200)
    assert LogisticRegression().fit(whole, labels).score(whole, labels) == 1
    assert accuracy < 0.8 and error > 0
    left[:, :20], right[:, :20] = 3, -3
    assert classify_sets(left + noise[0], right + noise[1], owners, owners)[0] > 0.95


def test_accuracy_is_balanced():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(300, 5)), rng.normal(size=(20, 5))
    owners = np.arange(300) // 10
    assert abs(classify_sets(left, right, owners, np.arange(20) // 2)[0] - 0.5) < 0.2


def test_principal_angles_by_hand():
    rng = np.random.default_rng(0)
    left, right = np.zeros((50, 6)), np.zeros((60, 6))
    left[:, :2] = rng.normal(size=(50, 2)) + 7  # the plane of axes 0 and 1, not through 0
    angle = math.radians(30)
    right[:, 0] = rng.normal(size=60)
    other = rng.normal(size=60)
    right[:, 1], right[:, 2] = other * math.cos(angle), other * math.sin(angle)
    cosines = measure_principal_cosines(left, right, 2)
    np.testing.assert_allclose(sorted(cosines), [math.cos(angle), 1], atol=1e-6)


def test_the_map_is_srmus_and_its_outliers_are_found():
    values = torch.full((1, 3, 50), 1.0)
    values[..., 7] = 1e6
    mask = torch.ones(1, 3, dtype=torch.bool)
    retain = sum_features(torch.ones(1, 3, 50), mask)
    found = describe_selectivity(sum_features(values, mask), retain)
    map_ = importance_map(measure_features([sum_features(values, mask)])[0], torch.ones(50), "ratio")
    assert found.items() >= describe_importance(map_).items()
    assert found["outliers"] == [{"dimension": 7, "value": pytest.approx(1)}]


def test_a_feature_planted_in_one_layer_separates_there():
    """Layer 2 adds a vector to tokens w0-w29 only."""
    module = pico_module()
    block = module.model.layers[2]
    seen = {}
    module.model.embed_tokens.register_forward_hook(lambda m, a, o: seen.update(ids=a[0]))

    def add(m, a, out):
        hidden = out[0] if isinstance(out, tuple) else out
        new = hidden + ((seen["ids"] >= 4) & (seen["ids"] < 24)).unsqueeze(-1) * 40.0
        return (new, *out[1:]) if isinstance(out, tuple) else new

    block.register_forward_hook(add)
    forget, retain = texts(20, 1, range(20)), texts(20, 2, range(20, 60))
    found = measure_separability(module, word_tokenizer(), forget, retain)
    rows = found["layers"]
    assert rows[2]["accuracy"] == 1 and choose_layer(rows)["layer"] <= 2
    assert rows[2]["mean_cosine"] < rows[1]["mean_cosine"]
    assert found["documents"] == [20, 20]
    some = measure_separability(module, word_tokenizer(), forget, retain, [1, 3])
    assert some["layers"] == [found["layers"][1], found["layers"][3]]
    again = measure_separability(module, word_tokenizer(), forget, retain)
    assert again == found


def row(layer, accuracy, sd=0.2, outliers=()):
    map_ = {"gini": 0.4, "sd": sd, "share_above_half": 0.1, "outliers": list(outliers)}
    return {"layer": layer, "accuracy": accuracy, "stderr": 0.01, "importance": map_}


def advice(shared, rows=None, contamination=None):
    numbers = {
        "entanglement": shared,
        "overlap": ngram_overlap(["a"], ["a"]),
        **({"separability": {"layers": rows}} if rows else {}),
        **({"contamination": contamination} if contamination else {}),
    }
    return " ".join(advise_user(numbers))


def test_advice():
    assert "same subjects as the forget set" in advice(0.1)
    assert "at risk" in advice(0.7) and "at risk" not in advice(0.3)
    rows = [row(0, 0.6), row(1, 0.7), row(2, 0.9), row(3, 0.905), row(4, 0.8)]
    assert "method.layer=2." in advice(0.3, rows)  # within an error of the highest, and lower
    assert "method.layer=1 method.window=2." in advice(0.3, rows[:2])
    assert "No layer tells" in advice(0.3, rows[:2]) and "No layer" not in advice(0.3, rows)
    assert FLAT_WORDS in advice(0.3, [row(0, 0.9, sd=0.05)])
    assert "clip_quantile" in advice(0.3, [row(0, 0.9, outliers=[{"dimension": 1, "value": 1.0}])])
    dirty = {"either": 0.5, "questions": 10}
    clean = {"either": 0.0, "questions": 10}
    assert "remove those" in advice(0.3, contamination={"forget": clean, "retain": dirty})
    assert "gives away" not in advice(0.3, contamination={"forget": clean, "retain": clean})


def test_the_whole_and_its_page(tmp_path):
    questions = [Question("w1 w2 w3", (" w4",), 0, "one", entry="w1"), Question("zz", (" yy",), 0, "other")]
    found = measure_entanglement(
        FORGET, RETAIN, questions, (pico_module(), word_tokenizer()), definition="corpus_jaccard"
    )
    assert 0 < found.numbers["entanglement"] < 1
    assert set(found.numbers["contamination"]) == {"forget", "retain"}
    page = write_analysis(found, tmp_path / "out" / "figure.html").read_text()
    body = unescape(page.replace(get_plotlyjs(), ""))
    for sentence in found.sentences:
        assert sentence in body
    assert body.count("<table ") == len(found.panels) == 3
    assert "src=" not in body and "w4" not in body and '<link rel="stylesheet' not in body
    accuracy = found.numbers["separability"]["layers"][0]["accuracy"]
    assert f"{accuracy:.4g}" in body  # the table says what the picture shows


def test_without_a_model_there_is_no_picture(tmp_path):
    found = measure_entanglement(FORGET, RETAIN)
    assert not found.panels and len(found.sentences) >= 2
    page = write_analysis(found, tmp_path / "figure.html").read_text()
    assert "plotly.js v" not in page
    with pytest.raises(SrmuError, match="is a folder"):
        write_analysis(found, tmp_path)


@pytest.mark.parametrize(
    ("forget", "retain", "message"),
    [
        ([], RETAIN, "0 document of the forget set"),
        (FORGET[:1], RETAIN, "1 document of the forget set"),
        (FORGET, RETAIN[:1], "1 document of the retain set"),
        (["w1 w2", "w3 w4"], RETAIN, "4 tokens of a set are too few"),
    ],
)
def test_wrong_input(forget, retain, message):
    with pytest.raises(SrmuError, match=message):
        measure_separability(pico_module(), word_tokenizer(), forget, retain)
