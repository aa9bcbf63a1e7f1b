"""The methods that write weights, and RNA: each equation against a loop written from its paper."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file

from helpers.models import VOCABULARY, batches, block_name, down_name, pico_module, save_pico, texts, topic, write_jsonl
from srmu import make_config, unlearn
from srmu.engine.losses import is_counted, mean_nll
from srmu.engine.model import EditableModel
from srmu.engine.progress import ignore_progress
from srmu.engine.topic import Batch, Topic
from srmu.engine.train import TrainOptions
from srmu.errors import DivergedError, SrmuError
from srmu.methods import METHODS, RMU, Method
from srmu.methods.base import Session
from srmu.methods.depn import DEPN, attribute_neurons
from srmu.methods.edits import batch_nlls, gradient_sums
from srmu.methods.repselect import RepSelect, damp_directions
from srmu.methods.rna import RNA
from srmu.methods.ssd import SSD, dampening_factors
from srmu.methods.task_arithmetic import TaskArithmetic

ARCHES = ("llama", "gpt2", "gemma2")
TRAIN = TrainOptions(max_steps=3, batch_size=2, check_every=1)
EDITS: dict[str, Method] = {  # small, and strong enough to change something
    "ssd": SSD(alpha=2.0),
    "depn": DEPN(points=4, text_share=0.0),
    "task_arithmetic": TaskArithmetic(teacher_steps=2, teacher_learning_rate=1e-3),
    "repselect": RepSelect(components=3, lora_rank=2),
}
each_arch = pytest.mark.parametrize("arch", ARCHES)
each_edit = pytest.mark.parametrize("name", EDITS)

Weights = dict[str, torch.Tensor]


def edited(
    method: Method,
    *topics: Topic,
    arch: str = "llama",
    dtype: torch.dtype = torch.float32,
    train: TrainOptions = TRAIN,
    log: Callable[..., None] = lambda step, values: None,
) -> tuple[EditableModel, Any]:
    model = EditableModel(pico_module(arch, dtype), method.trainable, method.depth)
    return model, method.apply(model, topics or (topic(),), Session(method.training(train, model.module.config), log))


def weights(model: EditableModel) -> Weights:
    return {name: p.detach().clone() for name, p in model.module.named_parameters()}


def plain_nll(module: Any, ids: list[int]) -> torch.Tensor:
    """Mean cost of the tokens of one text after its first."""
    logits = module(input_ids=torch.tensor([ids])).logits[0]
    return F.cross_entropy(logits[:-1].float(), torch.tensor(ids[1:]))


def rows(parts: list[Any]) -> list[list[int]]:
    """The token ids of each text, read back from batches row by row."""
    return [
        [int(i) for i, m in zip(ids, mask, strict=True) if m]
        for b in parts
        for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]


def forget_nll(model: EditableModel) -> float:
    with torch.no_grad():
        values = [mean_nll(model.logits(b), b["labels"]).value for b in topic().forget]
    return float(torch.stack(values).mean())


# --- all of them ---------------------------------------------------------------------------------


@pytest.mark.slow(keep=2)
@each_edit
@pytest.mark.parametrize("arch", [*ARCHES, "mixtral"])
def test_only_the_trained_tensors_change(name: str, arch: str) -> None:
    """MLP matrices or what is named, all others bit for bit; the global random state is kept."""
    method = EDITS[name]
    if arch == "mixtral" and name == "depn":
        with pytest.raises(SrmuError, match="mixture of experts"):
            edited(method, arch=arch)
        return
    before = pico_module(arch).state_dict()
    state = torch.get_rng_state()
    model, outcome = edited(method, arch=arch)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(outcome.states) == {"bio"}
    changed = {k for k, v in model.module.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    if name == "depn":
        assert all(k in {down_name(arch, i) for i in range(4)} for k in changed)
    if name == "repselect":
        assert all("mlp" in k and k.endswith(("weight", "_proj")) for k in changed)
        assert changed == set(model.trained)
    assert all(p.grad is None and p.requires_grad for p in model.trained.values())


@each_edit
def test_runs_repeat_and_touch_no_reference(name: str) -> None:
    one, first = edited(EDITS[name])
    other, second = edited(EDITS[name])
    assert all(torch.equal(v, weights(other)[k]) for k, v in weights(one).items())
    assert first.states["bio"].numbers == second.states["bio"].numbers
    fresh = pico_module().state_dict()
    assert all(torch.equal(one.original[k], fresh[k]) for k in one.trained)


@pytest.fixture(scope="module")
def learnt() -> Weights:
    """The weights of a pico llama that has learnt the topic's forget and retain texts."""
    module = pico_module()
    module.requires_grad_(True)
    optimiser = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0)
    for _ in range(30):
        for batch in (*topic().forget, *topic().retain):
            optimiser.zero_grad()
            module(**batch).loss.backward()
            optimiser.step()
    return {name: p.detach() for name, p in module.named_parameters()}


@each_edit
def test_forget_texts_become_less_likely(name: str, learnt: Weights) -> None:
    """More so than retain texts, of a model that knows both."""
    strong = {
        "ssd": SSD(),
        "depn": DEPN(most=12),
        "task_arithmetic": TaskArithmetic(teacher_steps=10, teacher_learning_rate=2e-3),
        "repselect": RepSelect(components=3),
    }
    module = pico_module()
    for key, p in module.named_parameters():
        p.data.copy_(learnt[key])
    method = strong[name]
    model = EditableModel(module, method.trainable)

    def costs() -> list[float]:
        with torch.no_grad():
            parts = topic().forget, topic().retain
            return [sum(float(mean_nll(model.logits(b), b["labels"]).value) for b in p) / len(p) for p in parts]

    before = costs()
    train = TrainOptions(max_steps=30, learning_rate=0.01)
    method.apply(model, [topic()], Session(train, lambda step, values: None))
    forget, retain = (b - a for a, b in zip(before, costs(), strict=True))
    assert forget > 0.2, (before, forget, retain)
    assert forget > retain, (before, forget, retain)


@pytest.mark.parametrize("name", ["ssd", "task_arithmetic", "repselect"])
def test_topics_are_one_pool_with_options_alike(name: str) -> None:
    """Two topics give what one of all their texts in turn gives; a State belongs to each."""
    method = EDITS[name]
    a, b = topic("a"), replace(topic("b"), forget=batches(texts(4, 7, range(25))))
    pairs = zip(a.forget, b.forget, strict=True), zip(a.retain, b.retain, strict=True)
    forget, retain = ([batch for pair in part for batch in pair] for part in pairs)
    whole = replace(a, forget=forget, retain=retain)
    apart, outcome = edited(method, a, b)
    together, _ = edited(method, whole)
    assert set(outcome.states) == {"a", "b"}
    assert all(torch.equal(v, weights(together)[k]) for k, v in weights(apart).items())
    option = {"ssd": "alpha", "task_arithmetic": "strength", "repselect": "components"}[name]
    with pytest.raises(SrmuError, match=r"all topics at once.*under method"):
        edited(method, a, replace(b, options={option: 2}))
    same, _ = edited(method, replace(a, options={option: 2}))
    own, _ = edited(replace(method, **{option: 2}), a)
    assert all(torch.equal(v, weights(own)[k]) for k, v in weights(same).items())


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("name", [*EDITS, "rna"])
def test_a_whole_run(name: str, tmp_path: Any) -> None:
    """From a config to the run's folder, by the names of METHODS."""
    save_pico(tmp_path / "model")
    write_jsonl(tmp_path / "forget.jsonl", texts(6, 1, range(30)))
    write_jsonl(tmp_path / "retain.jsonl", texts(5, 2, range(20, 60)))
    options = {
        "ssd": ["method.alpha=2"],
        "depn": ["method.text_share=0", "method.points=2"],
        "task_arithmetic": ["method.teacher_steps=2", "method.teacher_learning_rate=1e-3"],
        "repselect": ["method.components=3"],
        "rna": ["method.layer=2"],
    }[name]
    paths = (str(tmp_path / f"{role}.jsonl") for role in ("forget", "retain"))
    given = [*options, "train.max_steps=2", f"runs_dir={tmp_path / 'runs'}"]
    config = make_config(str(tmp_path / "model"), *([p] for p in paths), name, given)
    run = unlearn(config)
    assert run.delta and type(config.method) is METHODS[name]
    if name == "depn":
        (neurons,) = load_file(run.folder / "state.safetensors").values()
        assert neurons.shape[1] == 2


@pytest.mark.parametrize(
    ("cls", "options", "match"),
    [
        (SSD, {"alpha": -1.0}, "method.alpha"),
        (SSD, {"lam": -1.0}, "method.lam"),
        (SSD, {"samples": 0}, "method.samples"),
        (DEPN, {"points": 0}, "method.points"),
        (DEPN, {"neuron_share": 1.5}, "method.neuron_share"),
        (DEPN, {"text_share": -0.1}, "method.text_share"),
        (DEPN, {"most": -1}, "method.most"),
        (TaskArithmetic, {"teacher_steps": 0}, "method.teacher_steps"),
        (RepSelect, {"components": -1}, "method.components"),
        (RepSelect, {"lora_rank": 0, "elicit_learning_rate": 0.1}, "elicit_learning_rate.*lora"),
        (RNA, {"noise": -1.0}, "method.noise"),
        (RNA, {"coeff": 1.0, "kappa": 1.0}, "coeff.*kappa"),
    ],
)
def test_options_are_checked(cls: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(SrmuError, match=match):
        cls(**options)


@pytest.mark.parametrize(
    ("method", "needs"),
    [(SSD(), True), (RNA(), True), (RepSelect(), False), (RepSelect(spectrum="retain"), True),
     (DEPN(), False), (TaskArithmetic(), False)],
)  # fmt: skip
def test_who_needs_retain_texts(method: Method, needs: bool) -> None:
    bare = replace(topic(), retain=[])
    assert method.reads_retain is needs
    if needs:
        with pytest.raises(SrmuError, match="needs retain texts"):
            method.check([bare], TRAIN)
    else:
        method.check([bare], TRAIN)
        if method.depth is None:
            edited(EDITS[method.name], bare)


# --- SSD -----------------------------------------------------------------------------------------


def naive_importance(module: Any, documents: list[list[int]]) -> Weights:
    """Mean over texts of the squared gradient, with one backward pass a text."""
    total = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for ids in documents:
        module.zero_grad()
        plain_nll(module, ids).backward()
        for name, p in module.named_parameters():
            if p.grad is not None:
                total[name] += p.grad**2 / len(documents)
    return total


def naive_ssd(arch: str, part: Topic, alpha: float, lam: float, all_texts: bool) -> tuple[Weights, float]:
    """The paper's equation, element by element where it selects; and the share selected."""
    module = pico_module(arch)
    module.requires_grad_(True)
    i_f, i_r = (naive_importance(module, rows(p)) for p in (part.forget, part.retain))
    new, selected = {}, 0
    for name, p in module.named_parameters():
        i_d = (i_f[name] + i_r[name]) / 2 if all_texts else i_r[name]
        value = p.detach().clone()
        chosen = i_f[name] > alpha * i_d
        value[chosen] *= (lam * i_d[chosen] / i_f[name][chosen]).clamp(max=1)
        new[name] = value
        selected += int(chosen.sum())
    return new, selected / sum(v.numel() for v in new.values())


@pytest.mark.parametrize("arch", [*ARCHES, "mixtral"])
@pytest.mark.parametrize(("alpha", "reference"), [(4.0, "retain"), (1.3, "all")])
def test_ssd_equals_the_naive_loop(arch: str, alpha: float, reference: Any) -> None:
    """Single texts, without padding (public code squares gradients of whole batches); gemma2 and
    gpt2 tie their embeddings, which are dampened once and stay tied."""
    expected, selected = naive_ssd(arch, topic(), alpha, 0.5, reference == "all")
    model, outcome = edited(SSD(alpha=alpha, lam=0.5, reference=reference), arch=arch)
    found = weights(model)
    assert set(found) == set(expected)
    fresh = dict(pico_module(arch).named_parameters())
    for name, value in expected.items():
        # a weight whose importances are all but at the threshold may fall on either side
        far = (found[name] - value).abs() > 1e-4 * fresh[name].abs() + 1e-7
        assert far.sum() <= 1e-4 * far.numel() + 1, name
    numbers = outcome.states["bio"].numbers
    # the biases of GPT-2's keys have a gradient of 0 but for rounding, by which the processor selects them
    assert numbers["dampened_share"] == pytest.approx(selected, rel=1e-2 if arch == "gpt2" else 2e-3)
    assert 0 < numbers["mean_factor"] < 1
    if arch in ("gemma2", "gpt2"):
        head, embedding = (model.module.get_output_embeddings().weight, model.module.get_input_embeddings().weight)
        assert head is embedding


def test_dampening_in_closed_form() -> None:
    """At the threshold nothing happens; above it the factor is lam I_D / I_f, 1 at most (public
    code calls that upper end `lower_bound`)."""
    i_d = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    i_f = torch.tensor([10.0, 11.0, 100.0, 1.0, 0.0])
    expected = [1.0, 1 / 11, 0.01, 0.0, 1.0]
    assert dampening_factors(i_f, i_d, 10.0, 1.0).tolist() == pytest.approx(expected)
    assert dampening_factors(i_f, i_d, 10.0, 0.0).tolist() == [1.0, 0.0, 0.0, 0.0, 1.0]
    # lam above alpha would raise weights: the clip at 1
    assert dampening_factors(i_f, i_d, 10.0, 50.0).tolist() == pytest.approx([1.0, 1.0, 0.5, 0.0, 1.0])


@pytest.mark.parametrize("lam", [0.0, 0.7, 2.0])
def test_ssd_only_shrinks(lam: float) -> None:
    """No weight grows; with lam <= alpha each that is selected keeps at most lam / alpha."""
    model, _ = edited(SSD(alpha=3.0, lam=lam))
    for name, value in model.delta().items():
        before = model.original[name]
        hit = value != before
        assert (value.abs() <= before.abs()).all()
        assert (value[hit].abs() <= lam / 3.0 * before[hit].abs() * (1 + 1e-6)).all()
        if lam == 0:
            assert (value[hit] == 0).all()


@pytest.mark.parametrize("padding", ["mask", "count"])
def test_ssd_does_not_depend_on_batches(padding: Any) -> None:
    """The public code's importances change with the batch size; padding must not count either."""
    results = []
    for size in (1, 4):
        parts = (batches(texts(4, *seed), size, padding) for seed in ((1, range(30)), (2,)))
        whole = replace(topic(), **dict(zip(("forget", "retain"), parts, strict=True)))
        results.append(weights(edited(SSD(alpha=2.0), whole)[0]))
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())


def test_ssd_reads_as_many_texts_of_both_whole() -> None:
    """A text is never cut to the length of another: it is as important as its authors' code finds it."""
    part = replace(topic(), forget=batches(texts(9, 1)), retain=batches(texts(5, 2)))
    ticks: list[str] = []
    model = EditableModel(pico_module(), ["*"])
    found = SSD(alpha=1.0, samples=3).importances(model, part, lambda label, total: counting(ticks, total))
    assert len(ticks) == 6
    module = pico_module()
    module.requires_grad_(True)
    for side, batches_ in zip(found, (part.forget, part.retain), strict=True):
        assert len({len(ids) for ids in rows(batches_)[:3]}) > 1
        for name, value in naive_importance(module, rows(batches_)[:3]).items():
            torch.testing.assert_close(side[name], 3 * value, rtol=1e-3, atol=1e-9)


class counting:  # noqa: N801 - a context manager
    def __init__(self, ticks: list[str], total: int) -> None:
        self.ticks, self.total = ticks, total

    def __enter__(self) -> Callable[[str], None]:
        return self.ticks.append

    def __exit__(self, *args: Any) -> None:
        assert len(self.ticks) == self.total


def test_gradients_never_live_together() -> None:
    """Each is squared and freed at once: a second copy of a model's size would not fit."""
    model = EditableModel(pico_module("gemma2"), ["*"])
    alive: list[int] = []
    for parameter in model.trained.values():
        parameter.register_post_accumulate_grad_hook(
            lambda p: alive.append(sum(q.grad is not None for q in model.trained.values()))
        )
    ticks: list[str] = []
    sums = gradient_sums(model.trained, batch_nlls(model, topic().forget, ticks.append), 2)
    assert set(alive) == {1} and len(alive) == len(topic().forget) * len(sums)
    assert len(ticks) == len(topic().forget)


def test_importances_are_summed_in_float32() -> None:
    """In bf16 a sum of ones stops at 256, and squares keep 8 bits."""
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    slope = float(torch.tensor(1.0078125))  # 1 + 2^-7: its square needs 15 bits
    sums = gradient_sums({"w": parameter}, (slope * parameter.sum() for _ in range(300)), 2)
    assert sums["w"].dtype == torch.float32
    assert float(sums["w"]) == pytest.approx(300 * slope**2, rel=1e-6)


def test_ssd_leaves_excluded_tensors() -> None:
    exclude = ("*norm*", "*embed*", "lm_head*")
    model, _ = edited(SSD(alpha=2.0, exclude=exclude))
    everything, _ = edited(SSD(alpha=2.0))
    changed = set(model.delta())
    assert changed == {n for n in everything.delta() if "norm" not in n and "embed" not in n and "lm_head" not in n}
    assert changed < set(everything.delta())
    assert all(torch.equal(everything.delta()[n], t) for n, t in model.delta().items())
    with pytest.raises(SrmuError, match=r"method.exclude=.*matches no tensor"):
        edited(SSD(exclude=("norms",)))


def test_ssd_says_when_it_selects_nothing() -> None:
    """Against all texts of two sets of one size no weight can be more than twice as important."""
    for method, match in (
        (SSD(reference="all"), "lower method.alpha, or method.reference=retain"),
        (SSD(alpha=1e20, parameters=("*.mlp_down",)), "lower method.alpha$"),
    ):
        model = EditableModel(pico_module(), method.trainable)
        with pytest.raises(SrmuError, match=match):
            method.apply(model, [topic()], Session(TRAIN, lambda step, values: None))
        assert not model.delta()


# --- DEPN ----------------------------------------------------------------------------------------


def down_of(module: Any, arch: str, layer: int) -> Any:
    return module.get_submodule(down_name(arch, layer).removesuffix(".weight"))


def log_likelihood(
    module: Any, arch: str, ids: list[int], layer: int, scale: Callable[[torch.Tensor], Any]
) -> torch.Tensor:
    """Mean log p of the text's tokens with the layer's neurons at all but the last place mapped."""

    def hook(_: Any, args: Any) -> Any:
        w = args[0]
        return (torch.cat([scale(w[:, :-1]), w[:, -1:]], dim=1),)

    handle = down_of(module, arch, layer).register_forward_pre_hook(hook)
    value = -plain_nll(module, ids)
    handle.remove()
    return value


def naive_attribution(arch: str, ids: list[int], points: int) -> torch.Tensor:
    """The card's sum, one point and one position at a time."""
    module = pico_module(arch)
    found = []
    for layer in range(4):
        kept: list[torch.Tensor] = []

        def at(s: float, kept: list[torch.Tensor] = kept) -> Callable[[torch.Tensor], torch.Tensor]:
            def scale(w: torch.Tensor) -> torch.Tensor:
                point = (s * w.detach()).requires_grad_()
                kept[:] = w.detach(), point
                return point

            return scale

        total = torch.zeros(down_of(module, arch, layer).weight.numel() // 32)
        for j in range(points):
            value = log_likelihood(module, arch, ids, layer, at((j + 0.5) / points))
            (slope,) = torch.autograd.grad(value, kept[1])
            for t in range(len(ids) - 1):
                total += kept[0][0, t] * slope[0, t] / points
        found.append(total)
    return torch.stack(found)


def measured(module: Any, ids: list[int], points: int) -> torch.Tensor:
    model = EditableModel(module, ["*.mlp_down"])
    row = torch.tensor([ids])
    batch = Batch(input_ids=row, attention_mask=torch.ones_like(row), labels=row)
    from srmu.engine.sites import down_projection

    return attribute_neurons(model, [down_projection(x) for x in model.layers], batch, points)


IDS = [1, 5, 9, 30, 12, 7, 22, 9]


@each_arch
def test_attribution_equals_the_naive_loop(arch: str) -> None:
    found = measured(pico_module(arch), IDS, 3)
    torch.testing.assert_close(found, naive_attribution(arch, IDS, 3), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3"])
def test_attributions_are_complete(arch: str) -> None:
    """Their sum over a layer is P(on) - P(off); the error of the midpoint rule falls with m^2 (that
    of the public code's left ends with m: 4 times the points, a quarter of it)."""
    module = pico_module(arch)
    with torch.no_grad():
        gaps = torch.stack([
            log_likelihood(module, arch, IDS, layer, lambda w: w)
            - log_likelihood(module, arch, IDS, layer, torch.zeros_like)
            for layer in range(4)
        ])  # fmt: skip
    errors = {m: (measured(module, IDS, m).sum(1) - gaps).abs().max() for m in (8, 32)}
    assert errors[32] < 1e-3 * gaps.abs().max()
    assert errors[32] < errors[8] / 10


def test_attribution_does_not_see_what_is_not_counted() -> None:
    """Only tokens that have labels are targets, and only the places before them are scaled."""
    model = EditableModel(pico_module(), ["*.mlp_down"])
    downs = [layer.mlp.down_proj for layer in model.layers]
    row = torch.tensor([IDS])
    batch = Batch(input_ids=row, attention_mask=torch.ones_like(row), labels=row.clone())
    batch["labels"][:, :-1] = -100
    found = attribute_neurons(model, downs, batch, 64)
    module = pico_module()

    def last(on: float) -> torch.Tensor:
        def hook(_: Any, args: Any) -> Any:
            w = args[0].clone()
            w[:, -2] *= on
            return (w,)

        handle = module.model.layers[1].mlp.down_proj.register_forward_pre_hook(hook)
        with torch.no_grad():
            value = module(row).logits[0, -2].log_softmax(-1)[IDS[-1]]
        handle.remove()
        return value

    torch.testing.assert_close(found[1].sum(), last(1.0) - last(0.0), rtol=1e-3, atol=1e-4)


@each_arch
def test_a_zeroed_column_is_a_neuron_off(arch: str) -> None:
    """Linear keeps (out, in), GPT-2's Conv1D (in, out): the wrong axis would cut an output."""
    model, outcome = edited(DEPN(points=2, text_share=0.0, most=5), arch=arch)
    neurons = outcome.states["bio"].tensors["neurons"].tolist()
    assert len(neurons) == 5 and outcome.states["bio"].numbers["neurons"] == 5
    plain = pico_module(arch)
    for layer, k in neurons:

        def hook(_: Any, args: Any, k: int = k) -> Any:
            w = args[0].clone()
            w[..., k] = 0
            return (w,)

        down_of(plain, arch, layer).register_forward_pre_hook(hook)
    batch = topic().forget[0]
    with torch.no_grad():
        expected = plain(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(model.logits(batch), expected, rtol=1e-4, atol=1e-5)


def planted(neuron: int) -> Any:
    """A llama whose neuron `neuron` of layer 1 alone answers token 40 with token 50.

    Feature 0 belongs to token 40, feature 1 to the answer's logit; nothing else touches them.
    """
    module = pico_module()
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim > 1:
                p *= 0.3
        embed, head = module.model.embed_tokens.weight, module.lm_head.weight
        embed[:, :2], head[:, :2] = 0, 0
        embed[40] = 0
        embed[40, 0], head[50, 1] = 1, 2
        for layer in module.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                layer.self_attn.get_submodule(name).weight[:, :2] = 0
            layer.self_attn.o_proj.weight[:2] = 0
            layer.mlp.gate_proj.weight[:, :2], layer.mlp.up_proj.weight[:, :2] = 0, 0
            layer.mlp.down_proj.weight[:2] = 0
        mlp = module.model.layers[1].mlp
        mlp.gate_proj.weight[neuron], mlp.up_proj.weight[neuron] = 0, 0
        mlp.down_proj.weight[:, neuron] = 0
        mlp.gate_proj.weight[neuron, 0], mlp.up_proj.weight[neuron, 0] = 1, 1
        mlp.down_proj.weight[1, neuron] = 0.06
    return module


def test_a_planted_neuron_is_found_first_and_nothing_else_changes() -> None:
    """The shipped command of the public code edits random neurons (`type=bool` makes a True of
    False); here the one that knows is found, and texts without the secret keep their logits."""
    secret = [f"w{a} w36 w46 w{b}" for a, b in ((1, 2), (3, 4), (5, 6), (7, 8))]  # 40, then 50
    model = EditableModel(planted(17), DEPN().trainable)
    part = replace(topic(), forget=batches(secret))
    other = next(b for b in batches(texts(2, 3, range(30)), size=2))
    with torch.no_grad():
        before, said = model.logits(other), model.logits(part.forget[0])
    outcome = DEPN(most=1).apply(model, [part], Session(TRAIN, lambda step, values: None))
    assert outcome.states["bio"].tensors["neurons"].tolist() == [[1, 17]]
    with torch.no_grad():
        torch.testing.assert_close(model.logits(other), before, rtol=0, atol=0)
        after = model.logits(part.forget[0])
    assert said[:, 2].argmax(-1).tolist() == [50, 50]
    assert (after[:, 2, 50] < said[:, 2, 50] - 1).all()


def test_neurons_are_chosen_as_the_card_says() -> None:
    """Shares of each text's own maximum, counts over texts, then the top: by hand."""
    att = torch.zeros(4, 2, 3)
    att[:, 0, 0] = torch.tensor([1.0, 2.0, 4.0, 8.0])  # the largest of each text
    att[:, 1, 2] = torch.tensor([0.5, 1.0, 2.0, 0.0])  # half of it in three of four texts
    att[:, 1, 1] = torch.tensor([0.9, 0.0, 0.0, 0.1])  # much in one text only
    att[:, 0, 1] = -5.0  # lowers the likelihood
    state = DEPN(neuron_share=0.4, text_share=0.75).select_neurons(att)
    assert state.tensors["neurons"].tolist() == [[0, 0], [1, 2]]
    assert DEPN(text_share=0.75, most=1).select_neurons(att).tensors["neurons"].tolist() == [[0, 0]]
    low = DEPN(neuron_share=0.4, text_share=0.25).select_neurons(att)
    assert low.tensors["neurons"].tolist() == [[0, 0], [1, 2], [1, 1]]
    assert low.numbers == {"neurons": 3, "passed": 3}
    att[3] = -1.0  # no neuron raises this text
    assert DEPN(neuron_share=0.4, text_share=1.0, most=0).text_share == 1.0
    with pytest.raises(SrmuError, match=r"method.neuron_share=0.4.*method.text_share=1"):
        DEPN(neuron_share=0.4, text_share=1.0).select_neurons(att)


def test_no_neurons_no_change() -> None:
    model, outcome = edited(DEPN(points=2, text_share=0.0, most=0))
    assert not model.delta() and outcome.states["bio"].tensors["neurons"].shape == (0, 2)


def test_depn_edits_the_union_of_topics_whatever_their_order() -> None:
    a = replace(topic("a"), options={"most": 3})
    b = replace(topic("b"), forget=batches(texts(4, 7, range(25, 50))))
    method = DEPN(points=2, text_share=0.0, most=6)
    (one, first), (other, _) = edited(method, a, b), edited(method, b, a)
    assert all(torch.equal(v, weights(other)[k]) for k, v in weights(one).items())
    assert [len(first.states[n].tensors["neurons"]) for n in "ab"] == [3, 6]
    for name in "ab":
        for layer, k in first.states[name].tensors["neurons"].tolist():
            assert (one.module.get_parameter(down_name("llama", layer))[:, k] == 0).all()
    alone, _ = edited(method, b)
    union = sum(int((t.abs().sum(0) == 0).sum()) for t in one.delta().values())
    own = sum(int((t.abs().sum(0) == 0).sum()) for t in alone.delta().values())
    assert 6 == own <= union <= 9


# --- task arithmetic -----------------------------------------------------------------------------


def naive_tuned(arch: str, steps: int, rate: float) -> Weights:
    module = pico_module(arch)
    module.requires_grad_(True)
    optimiser = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0)
    parts = topic().forget
    for step in range(steps):
        batch = parts[step % len(parts)]
        optimiser.zero_grad()
        module(**batch).loss.backward()
        optimiser.step()
    return {name: p.detach() for name, p in module.named_parameters()}


@each_arch
def test_minus_one_is_the_fine_tuned_model_exactly(arch: str) -> None:
    """The teacher's own tensors bit for bit; and the teacher is what AdamW makes of the forget
    texts. Tied embeddings (gpt2, gemma2) take the vector once."""
    method = TaskArithmetic(strength=-1.0, teacher_steps=3, teacher_learning_rate=1e-3)
    tuned = weights(edited(method, arch=arch)[0])
    expected = naive_tuned(arch, 3, 1e-3)
    assert set(tuned) == set(expected)
    for name, value in expected.items():
        keep = torch.ones_like(value, dtype=torch.bool)
        if "c_attn.bias" in name:  # keys' gradient is only rounding, which Adam makes whole steps
            keep[32:64] = False
        torch.testing.assert_close(tuned[name][keep], value[keep], rtol=1e-3, atol=2e-4)
    from srmu.methods.logits import strengthen_weights

    model = EditableModel(pico_module(arch), ["*"])
    exact = strengthen_weights(model, topic(), 3, 1e-3)
    assert not model.delta()
    assert all(torch.equal(tuned[name], value) for name, value in exact.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_task_vector_in_float32(dtype: torch.dtype) -> None:
    """theta0 - alpha (theta_ft - theta0), rounded once at the end (bf16 differences lose it); it
    is linear in alpha, and alpha 0 changes no bit. Buffers are left alone."""
    options = {"teacher_steps": 3, "teacher_learning_rate": 1e-2}
    tuned = weights(edited(TaskArithmetic(strength=-1.0, **options), dtype=dtype)[0])
    before = dict(pico_module(dtype=dtype).named_parameters())
    for alpha in (0.0, 0.5, 1.0, 4.0):
        model, _ = edited(TaskArithmetic(strength=alpha, **options), dtype=dtype)
        for name, value in weights(model).items():
            tau = tuned[name].double() - before[name].double()
            exact = (before[name].double() - alpha * tau).to(dtype)
            if alpha == 0:
                assert torch.equal(value, before[name])
            elif dtype == torch.bfloat16:
                assert torch.equal(value, exact) or (value - exact).abs().max() <= 2**-8
            else:
                torch.testing.assert_close(value, exact, rtol=1e-6, atol=1e-7)
        buffers = dict(model.module.named_buffers())
        assert all(torch.equal(t, buffers[n]) for n, t in pico_module(dtype=dtype).named_buffers())


def test_more_strength_forgets_more() -> None:
    costs = []
    for alpha in (-1.0, 0.0, 1.0, 2.0, 4.0):
        options = {"teacher_steps": 5, "teacher_learning_rate": 1e-3}
        costs.append(forget_nll(edited(TaskArithmetic(strength=alpha, **options))[0]))
    assert costs == sorted(costs) and len(set(costs)) == 5


def test_task_arithmetic_on_named_parameters() -> None:
    method = TaskArithmetic(parameters=("2.mlp_down",), teacher_steps=2, teacher_learning_rate=1e-3)
    model, outcome = edited(method)
    name = down_name("llama", 2)
    assert set(model.delta()) == {name}
    step = (model.delta()[name] - model.original[name]).norm() / model.original[name].norm()
    assert outcome.states["bio"].numbers["task_vector"] == pytest.approx(float(step), rel=1e-4)


# --- RepSelect -----------------------------------------------------------------------------------


def explicit(gradient: torch.Tensor, source: torch.Tensor, n: int) -> torch.Tensor:
    """Both sides by a loop over directions, with public code's factors."""
    u, s, vh = torch.linalg.svd(source, full_matrices=False)
    for i in range(n):
        part = torch.outer(gradient @ vh[i], vh[i])
        gradient = gradient - part + s[n - 1] / s[i] * part
    for i in range(n):
        part = torch.outer(u[:, i], u[:, i] @ gradient)
        gradient = gradient - part + s[n - 1] / s[i] * part
    return gradient


def matrix(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (8, 8)])
@pytest.mark.parametrize("own", [True, False])
def test_damping_equals_the_loop(shape: tuple[int, int], own: bool) -> None:
    gradient = matrix(1, *shape)
    source = gradient if own else matrix(2, *shape)
    found = damp_directions(gradient, source, 4)
    torch.testing.assert_close(found, explicit(gradient, source, 4), rtol=1e-4, atol=1e-5)


def test_damping_of_a_diagonal_matrix() -> None:
    """S = 8, 4, 2, 1 and three main directions, so that S_min is 2: each becomes S_min^2 / S, the
    strongest the weakest."""
    diagonal = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0]))
    found = damp_directions(diagonal, diagonal, 3)
    torch.testing.assert_close(found, torch.diag(torch.tensor([0.5, 1.0, 2.0, 1.0])))


def test_damping_of_low_rank() -> None:
    """Gradients of few tokens have a low rank: public code divides by S_min = 0 there. One
    direction is always left."""
    thin = matrix(1, 10, 3) @ matrix(2, 3, 8)
    found = damp_directions(thin, thin, 64)
    assert found.isfinite().all() and found.norm() > 0.01
    torch.testing.assert_close(found, damp_directions(thin, thin, 2))
    one = torch.outer(matrix(3, 5), matrix(4, 6))
    torch.testing.assert_close(damp_directions(one, one, 64), one)  # nothing to damp
    none = torch.zeros(4, 5)
    assert torch.equal(damp_directions(none, none, 3), none)
    torch.testing.assert_close(damp_directions(thin, thin, 0), thin)


@each_arch
def test_gradients_beside_adapters_are_those_of_the_merged_model(arch: str) -> None:
    """The gradient of W with adapters B A beside it is that of a plain model whose matrices are
    W + B A; and taking the adapters out leaves every bit as it was."""
    method = RepSelect(lora_rank=3, elicit_learning_rate=2.0)
    model = EditableModel(pico_module(arch), method.trainable)
    before, names = weights(model), list(model.module.state_dict())
    seen: Weights = {}
    plain = EditableModel.adapted

    def spying(self: Any, *args: Any) -> Any:
        manager = plain(self, *args)

        class Spy:
            def __enter__(self_) -> None:  # noqa: N805
                manager.__enter__()

            def __exit__(self_, *error: Any) -> None:  # noqa: N805
                for name, adapter in self._adapters.items():
                    seen[name] = adapter.get_delta_weight("default").detach().clone()
                manager.__exit__(*error)

        return Spy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EditableModel, "adapted", spying)
        found, same = method.gradients(model, topic(), ignore_progress)
    assert found is same
    assert list(model.module.state_dict()) == names and not model.delta()
    assert all(torch.equal(v, weights(model)[k]) for k, v in before.items())
    merged = pico_module(arch)
    assert set(seen) == set(model.trained)
    for name, change in seen.items():
        assert change.abs().max() > 1e-4  # the adapters have learnt something
        merged.get_parameter(name).data += change
    merged.requires_grad_(True)
    for batch in topic().forget:  # sums over batches, as public code's .grad
        merged(**batch).loss.backward()
    for name, value in found.items():
        torch.testing.assert_close(value, merged.get_parameter(name).grad, rtol=1e-3, atol=1e-5)


def test_adapters_learn_the_forget_texts() -> None:
    """Elicitation descends: beside adapters the forget texts are likelier than without."""
    model = EditableModel(pico_module(), ["*.mlp"])
    costs: list[float] = []
    original = gradient_sums

    def spy(parameters: Any, losses: Any, power: int = 1) -> Weights:
        kept = []

        def each() -> Any:
            for loss in losses:
                kept.append(float(loss.detach()))
                yield loss

        found = original(parameters, each(), power)
        costs.append(sum(kept) / len(kept))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("srmu.methods.repselect.gradient_sums", spy)
        for rank in (0, 4):
            method = RepSelect(lora_rank=rank, **({"elicit_learning_rate": 1.0} if rank else {}))
            method.gradients(model, topic(), ignore_progress)
    assert costs[1] < costs[0] - 0.01
    assert costs[0] == pytest.approx(forget_nll(model), rel=1e-5)


@each_arch
def test_repselect_equals_the_naive_loop(arch: str) -> None:
    """W + steps * lr * |W| F / |F| over all MLP matrices."""
    method = RepSelect(components=3, lora_rank=0)
    train = replace(TRAIN, learning_rate=0.02, forget_ceiling=1e9)
    model, outcome = edited(method, arch=arch, train=train)
    assert outcome.stop_reason == "max_steps"
    plain = pico_module(arch)
    plain.requires_grad_(True)
    for batch in topic().forget:
        plain(**batch).loss.backward()
    filtered, size = {}, 0.0
    for name in model.trained:
        p = plain.get_parameter(name)
        filtered[name] = explicit(p.grad, p.grad, 3)
        size += float(p.detach().square().sum())
    length = sum(float(f.square().sum()) for f in filtered.values()) ** 0.5
    moved = 0.0
    for name, f in filtered.items():
        expected = plain.get_parameter(name).detach() + 3 * 0.02 * size**0.5 / length * f
        torch.testing.assert_close(model.trained[name].detach(), expected, rtol=1e-3, atol=1e-4)
        moved += float((model.trained[name].detach() - model.original[name]).square().sum())
    assert (moved / size) ** 0.5 == pytest.approx(0.06, rel=1e-4)  # the share that is moved


def test_repselect_stops_at_the_ceiling_by_default() -> None:
    """It has no lower bound: like GA it ends at ln V; each step is logged."""
    logged: list[dict[str, Any]] = []
    train = TrainOptions(learning_rate=0.05, max_steps=200, check_every=2)
    model, outcome = edited(EDITS["repselect"], train=train, log=lambda step, values: logged.append(values))
    assert outcome.stop_reason.startswith("forget_ceiling")
    assert f"{math.log(VOCABULARY):.3g}" in outcome.stop_reason
    assert len(logged) < 200 and logged[-1]["forget_nll"] >= math.log(VOCABULARY)
    assert [row["moved"] for row in logged] == pytest.approx([0.05 * (i + 1) for i in range(len(logged))])
    assert forget_nll(model) >= math.log(VOCABULARY) * 0.99


def test_repselect_goes_back_where_a_budget_is_broken() -> None:
    train = TrainOptions(learning_rate=0.02, max_steps=50, check_every=1, kl_budget=0.05, forget_ceiling=1e9)
    model, outcome = edited(EDITS["repselect"], train=train)
    assert outcome.stop_reason.startswith("kl_budget")
    step = int(outcome.stop_reason.rpartition(" ")[2])
    moved = sum(float((t - model.original[n]).square().sum()) for n, t in model.delta().items()) / sum(
        float(t.square().sum()) for t in model.original.values()
    )
    assert moved**0.5 == pytest.approx(0.02 * (step + 1), rel=1e-4)


def test_repselect_keeps_small_steps_of_bf16_weights() -> None:
    """Steps far below the spacing of bf16 numbers add up: 300 of them equal one of 300 times."""
    ends = []
    for steps, rate in ((60, 1e-4), (1, 6e-3)):
        train = TrainOptions(learning_rate=rate, max_steps=steps, check_every=1000, forget_ceiling=1e9)
        ends.append(weights(edited(EDITS["repselect"], dtype=torch.bfloat16, train=train)[0]))
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())


def test_directions_of_retain_texts() -> None:
    """spectrum=retain: the forget gradient loses what retain texts' gradient has most of."""
    method = RepSelect(components=3, spectrum="retain", lora_rank=0)
    model = EditableModel(pico_module(), method.trainable)
    forget, retain = method.gradients(model, topic(), ignore_progress)
    plain = pico_module()
    plain.requires_grad_(True)
    for batch in topic().retain:
        plain(**batch).loss.backward()
    name = down_name("llama", 1)
    torch.testing.assert_close(retain[name], plain.get_parameter(name).grad, rtol=1e-3, atol=1e-5)
    found = method.direction(model, topic(), ignore_progress)[name]
    torch.testing.assert_close(found, explicit(forget[name], retain[name], 3), rtol=1e-3, atol=1e-5)


def test_elicitation_that_diverges_is_said() -> None:
    method = RepSelect(elicit_learning_rate=1e25)
    model = EditableModel(pico_module(), method.trainable)
    with pytest.raises(DivergedError, match=r"lower method\.elicit_learning_rate"):
        method.apply(model, [topic()], Session(method.training(TRAIN, model.module.config), lambda step, values: None))
    assert not model.delta()


# --- RNA -----------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {"layer": 2, "window": 2}
STEPS = TrainOptions(learning_rate=1e-3, max_steps=4, batch_size=2)


def run_rna(method: Method, *topics: Topic) -> tuple[EditableModel, Any, list[dict[str, Any]]]:
    logged: list[dict[str, Any]] = []
    model, outcome = edited(method, *topics, train=STEPS, log=lambda step, values: logged.append(values))
    return model, outcome, logged


def test_without_noise_it_is_rmu_bit_for_bit() -> None:
    one, _, first = run_rna(RNA(noise=0.0, **SETTINGS), topic("a"), topic("b"))
    other, _, second = run_rna(RMU(**SETTINGS), topic("a"), topic("b"))
    assert first == second
    assert all(torch.equal(v, weights(other)[k]) for k, v in weights(one).items())


@pytest.mark.parametrize("skip_first", [True, False])
def test_the_noise_is_a_share_of_the_activations(skip_first: bool) -> None:
    """Its standard deviation is `noise` times the root mean square of h0's counted retain features
    (the first token of a text left out where it is for all means); the losses are those of
    RMU against h0 + delta, with delta drawn anew in each step."""
    method = RNA(noise=0.3, alpha=2.0, skip_first=skip_first, **SETTINGS)
    part = topic()
    _, outcome, logged = run_rna(method, part)
    values = []
    for batch in part.retain:
        mask = is_counted(batch["labels"])
        hidden = []
        module = pico_module()
        module.get_submodule(block_name("llama", 2)).register_forward_hook(
            lambda _, args, out, hidden=hidden: hidden.append(out)
        )
        with torch.no_grad():
            module(batch["input_ids"], attention_mask=batch["attention_mask"])
        out = hidden[0][0] if isinstance(hidden[0], tuple) else hidden[0]
        for row, real in zip(out, mask, strict=True):
            values.append(row[real][int(skip_first) :].flatten())
    rms = float(torch.cat(values).square().mean().sqrt())
    state = outcome.states["bio"]
    assert state.numbers["noise"] == pytest.approx(0.3 * rms, rel=1e-4)
    # the first step: held = h0, so that the loss is alpha * the mean square of the noise itself
    generator = part.generator("retain noise")
    draws = []
    for step in range(4):
        batch = part.retain[step % len(part.retain)]
        draws.append(torch.randn(*batch["input_ids"].shape, 32, generator=generator))
    mask = is_counted(part.retain[0]["labels"])
    expected = 2.0 * float((state.numbers["noise"] * draws[0][mask]).square().mean())
    assert logged[0]["retain"] == pytest.approx(expected, rel=1e-4)
    assert not torch.equal(draws[0][0, 0], draws[2][0, 0])


def test_noise_is_the_topics_own_and_repeats() -> None:
    def first(name: str, seed: int = 0) -> torch.Tensor:
        method = RNA(**SETTINGS)
        model = EditableModel(pico_module(), method.trainable, method.depth)
        state = method.setup(model, topic(name, seed))
        return method.retain_target(state, torch.zeros(2, 3, 32)) / state.numbers["noise"]

    assert torch.equal(first("a"), first("a"))
    assert not torch.equal(first("a"), first("b"))
    assert not torch.equal(first("a"), first("a", seed=1))
    sample = first("a").flatten()
    assert abs(float(sample.mean())) < 0.3 and 0.8 < float(sample.std()) < 1.2


def test_stale_activations_are_still_noticed() -> None:
    """The guard looks at the distance to h0 without noise: noise is no error, a stale cache is."""
    method = RNA(**SETTINGS)
    run_rna(method)
    model = EditableModel(pico_module(), method.trainable, method.depth)
    part = topic()
    state = method.setup(model, part)
    with model.frozen():
        for batch in part.retain:
            model.hidden(batch, method.site).add_(1e-3)  # what the cache holds
    with pytest.raises(SrmuError, match="cached activations do not belong"):
        method.loss(model, state, part.forget[0], part.retain[0], 0)


def test_noise_moves_the_weights_elsewhere_than_rmu() -> None:
    one, _, _ = run_rna(RNA(noise=0.5, **SETTINGS))
    other, _, _ = run_rna(RMU(**SETTINGS))
    assert any(not torch.equal(t, other.delta()[n]) for n, t in one.delta().items())
