"""A run equals a naive loop written from the papers: two whole models, one document at a time.

The loop knows nothing of srmu: it reads words, runs both models whole with a plain forward hook,
counts tokens with `for`, and steps torch's AdamW. Only the random directions are handed to it.
"""

import copy
import itertools
from typing import Any

import pytest
import torch

from helpers.models import ARCHITECTURES, block_name, down_name, pico_module, texts, word_tokenizer, write_jsonl
from srmu.data.sources import Source
from srmu.data.topics import TopicConfig, load_topic
from srmu.engine.model import EditableModel, Site
from srmu.engine.topic import Batch, Topic
from srmu.engine.train import TrainOptions
from srmu.methods import RMU, SRMU, AdaptiveRMU, Method
from srmu.methods.base import Session

SIZE, STEPS, LAYER = 3, 4, 2
# Adam's epsilon is large so that rounding in a tiny gradient cannot turn into a whole step.
OPTIONS = TrainOptions(learning_rate=2e-3, max_steps=STEPS, batch_size=SIZE, adam_epsilon=1e-2, shuffle=False)
DOCUMENTS = {  # forget and retain of each topic; the sets have unequal lengths and so cycle
    "one": (texts(4, 1, range(30)), texts(5, 2, range(20, 60))),
    "two": (texts(7, 3, range(10, 40)), texts(3, 4)),
}


def weight_names(arch: str, window: int = 3, last: int = LAYER) -> list[str]:
    return [down_name(arch, i) for i in range(last - window + 1, last + 1)]


def run(
    arch: str, method: Method, folder: Any, names: tuple[str, ...] = ("one", "two"), **options: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """Logged values and trained weights after each step, and the states, of srmu's own run."""
    topics = []
    for name in names:
        forget, retain = (
            [Source(path=str(write_jsonl(folder / f"{name}{i}.jsonl", documents)))]
            for i, documents in enumerate(DOCUMENTS[name])
        )
        texts = TopicConfig(forget=forget, retain=retain, max_length=64, **options.get(name, {}))
        topics.append(load_topic(name, texts, word_tokenizer(), OPTIONS, seed=5))
    model = EditableModel(pico_module(arch), method.trainable, method.depth)
    logged, weights = [], []

    def log(step: int, values: dict[str, Any]) -> None:
        logged.append(values)
        weights.append({n: p.detach().clone() for n, p in model.trained.items()})

    return logged, weights, method.apply(model, topics, Session(OPTIONS, log)).states


class Naive:
    """The loop of the papers (SRMU algorithm 1, RMU, Adaptive RMU)."""

    def __init__(self, arch: str, stream: str = "resid_post", skip_first: bool = True) -> None:
        self.model = pico_module(arch)
        self.first = copy.deepcopy(self.model)
        block = block_name(arch, LAYER)
        self.place = {
            "resid_post": block,
            "mlp_out": f"{block}.mlp",
            "mlp_post": down_name(arch, LAYER).removesuffix(".weight"),
        }[stream]
        self.inside = stream == "mlp_post"
        self.skip = int(skip_first)

    def hidden(self, model: Any, document: str) -> torch.Tensor:
        ids = torch.tensor([[1] + [4 + int(word[1:]) for word in document.split()]])
        seen = []
        handle = model.get_submodule(self.place).register_forward_hook(
            lambda _, inputs, output: seen.append(inputs if self.inside else output)
        )
        model(input_ids=ids)
        handle.remove()
        value = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        return value[0]  # (T, D)

    def original(self, documents: list[str]) -> list[torch.Tensor]:
        with torch.no_grad():
            return [self.hidden(self.first, document) for document in documents]

    def norm(self, rows: list[torch.Tensor]) -> float:
        """Mean norm over all tokens but each document's first."""
        norms = [float(token.norm()) for row in rows for token in row[self.skip :]]
        return sum(norms) / len(norms)

    def average(self, documents: list[str], kind: str = "abs_mean") -> torch.Tensor:
        tokens = [t.double() for row in self.original(documents) for t in row[self.skip :]]
        each = {
            "mean_abs": torch.abs, "rms": torch.square, "square_mean": torch.square,
            "relu_mean": torch.relu,
        }.get(kind, lambda token: token)  # fmt: skip
        mean = sum(each(token) for token in tokens) / len(tokens)
        return {"abs_mean": torch.abs, "rms": torch.sqrt}.get(kind, lambda m: m)(mean)

    def step(self, optimiser: Any, forget: Any, retain: Any, targets: Any, alpha: float, summed: bool = False) -> Any:
        """One step; targets are one (D,) for each forget token, or one for all."""

        def mse(rows: list[torch.Tensor], others: list[Any]) -> torch.Tensor:
            total, count = torch.zeros(()), 0
            for row, other in zip(rows, others, strict=True):
                for token, wanted in zip(row, other, strict=True):
                    total = total + ((token - wanted) ** 2).sum()
                    count += 1 if summed else len(token)
            return total / count

        held = [self.hidden(self.model, document) for document in retain]
        away = [self.hidden(self.model, document) for document in forget]
        losses = mse(away, targets(away)), alpha * mse(held, self.original(retain))
        optimiser.zero_grad()
        sum(losses).backward()
        optimiser.step()
        return [float(x.detach()) for x in losses]

    def optimiser(self, names: list[str]) -> Any:
        self.named = {name: self.model.get_parameter(name) for name in names}
        return torch.optim.AdamW(
            self.named.values(), lr=OPTIONS.learning_rate, eps=OPTIONS.adam_epsilon, weight_decay=0
        )


def batch(documents: list[str], number: int) -> list[str]:
    """Batch `number` of an endless round through the documents."""
    starts = range(0, len(documents), SIZE)
    start = starts[number % len(starts)]
    return documents[start : start + SIZE]


def constant(target: torch.Tensor) -> Any:
    return lambda rows: [[target.float()] * len(row) for row in rows]


def same(got: Any, naive: Naive, losses: Any, step: int) -> None:
    logged, weights, _ = got
    values = [logged[step]["forget"], logged[step]["retain"]]
    assert values == pytest.approx(losses, rel=1e-6, abs=1e-6), f"step {step}"
    assert set(weights[step]) == set(naive.named)
    for name, parameter in naive.named.items():
        torch.testing.assert_close(weights[step][name], parameter.data, rtol=0, atol=1e-6)


def moved(got: Any, arch: str) -> None:
    """The run did enough for the comparison to mean something."""
    start = pico_module(arch)
    for name, tensor in got[1][-1].items():
        assert (tensor - start.get_parameter(name)).abs().max() > 1e-4


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rmu_equals_the_naive_loop(arch: str, tmp_path: Any) -> None:
    # A window of two of three layers: the lowest is run once a batch and then replayed.
    method = RMU(layer=LAYER, window=2, coeff=3.0, alpha=7.0)
    got = run(arch, method, tmp_path, two={"coeff": 5.0, "alpha": 4.0})
    naive = Naive(arch)
    optimiser = naive.optimiser(weight_names(arch, 2))
    for step in range(STEPS):
        name = ("one", "two")[step % 2]
        u = got[2][name].tensors["direction"]
        forget, retain = (batch(d, step // 2) for d in DOCUMENTS[name])
        c, alpha = (3.0, 7.0) if name == "one" else (5.0, 4.0)
        same(got, naive, naive.step(optimiser, forget, retain, constant(c * u), alpha), step)
    moved(got, arch)


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_srmu_equals_the_naive_loop(arch: str, tmp_path: Any) -> None:
    method = SRMU(layer=LAYER, kappa=1.5, alpha=7.0)
    got = run(arch, method, tmp_path, two={"kappa": 0.5})
    naive = Naive(arch)
    optimiser = naive.optimiser(weight_names(arch))
    for step in range(STEPS):
        name = ("one", "two")[step % 2]
        state, (forgets, retains) = got[2][name].tensors, DOCUMENTS[name]
        assert state["direction"].abs().eq(1).all()
        raw = torch.log(1 + naive.average(forgets) / (naive.average(retains) + 1e-6))
        shape = state["direction"] * raw / (raw.max() + 1e-8)
        kappa = 1.5 if name == "one" else 0.5
        target = shape * kappa * naive.norm(naive.original(forgets)) / shape.norm()
        torch.testing.assert_close(state["target"], target.float(), rtol=1e-5, atol=1e-6)
        forget, retain = batch(forgets, step // 2), batch(retains, step // 2)
        same(got, naive, naive.step(optimiser, forget, retain, constant(target), 7.0), step)
    moved(got, arch)


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_adaptive_rmu_equals_the_naive_loop(arch: str, tmp_path: Any) -> None:
    method = AdaptiveRMU(layer=LAYER, window=1, coeff=0.3, scale=2.0, alpha=7.0)
    got = run(arch, method, tmp_path)
    naive = Naive(arch)
    optimiser = naive.optimiser(weight_names(arch, 1))
    for step in range(STEPS):
        name = ("one", "two")[step % 2]
        u = got[2][name].tensors["direction"]
        forget, retain = (batch(d, step // 2) for d in DOCUMENTS[name])
        norm = naive.norm(naive.original(batch(DOCUMENTS[name][0], 0)))
        target = constant(2.0 * 0.3 * norm * u)
        same(got, naive, naive.step(optimiser, forget, retain, target, 7.0), step)
    moved(got, arch)


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("source", ["frozen", "updated"])
@pytest.mark.parametrize("when", ["first_batch", "per_batch", "per_sample", "per_token"])
@pytest.mark.parametrize("skip_first", [True, False])
def test_adaptive_norms_equal_the_naive_loop(source: str, when: str, skip_first: bool, tmp_path: Any) -> None:
    method = AdaptiveRMU(
        layer=LAYER, kappa=0.6, alpha=7.0, norm_source=source, norm_when=when,
        skip_first=skip_first,
    )  # fmt: skip
    got = run("llama", method, tmp_path, ("one",))
    naive = Naive("llama", skip_first=skip_first)
    optimiser = naive.optimiser(weight_names("llama"))
    u = got[2]["one"].tensors["direction"]
    first: list[float] = []
    for step in range(STEPS):
        forget, retain = (batch(d, step) for d in DOCUMENTS["one"])

        def targets(rows: Any, forget: Any = forget) -> Any:
            norms = naive.original(forget) if source == "frozen" else [r.detach() for r in rows]
            if when == "per_token":
                return [[0.6 * token.norm() * u for token in row] for row in norms]
            if when == "per_sample":
                return [[0.6 * naive.norm([row]) * u] * len(row) for row in norms]
            first.append(naive.norm(norms))
            strength = 0.6 * (first[0] if when == "first_batch" else first[-1])
            return [[strength * u] * len(row) for row in norms]

        same(got, naive, naive.step(optimiser, forget, retain, targets, 7.0), step)


MAPS = {
    "ratio": lambda f, r: torch.log(1 + f / (r + 1e-6)),
    "difference": lambda f, r: torch.relu(f - r),
    "product": lambda f, r: f * r / (f.mean() * r.mean() + 1e-6),
    "product_inverse": lambda f, r: f * r / (f.mean() * r.mean() + 1e-6),
    "uniform": lambda f, r: torch.ones_like(f),
}
STATISTICS = ["abs_mean", "mean_abs", "rms", "square_mean", "relu_mean", "signed_clamped"]
VARIANTS: list[dict[str, Any]] = [
    *({"importance": kind} for kind in MAPS),
    *({"statistic": kind} for kind in STATISTICS),
    *({"stream": stream} for stream in ("mlp_out", "mlp_post")),
    *({"map_mode": mode} for mode in ("per_batch", "ema")),
    {"map_mode": "ema", "ema_decay": 0.3, "statistic": "rms"},
    {"target_mode": "additive"},
    {"window": 1},
    {"skip_first": False},
    {"map_batches": 1},
    {"matrices": "mlp"},
    {"error": "sum"},
    {  # every choice of configs/srmu-paper.yaml
        "statistic": "signed_clamped", "stream": "mlp_out", "window": 1, "skip_first": False, "matrices": "mlp",
        "error": "sum",
    },
]  # fmt: skip


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize(
    ("arch", "variant"),
    [
        *(("llama", variant) for variant in VARIANTS),
        ("mixtral", {"stream": "mlp_out"}),
        ("qwen3_moe", {"map_mode": "ema"}),
        ("falcon", {"stream": "mlp_post"}),
        ("gemma3", {"target_mode": "additive"}),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())),
)
def test_srmu_variants_equal_the_naive_loop(arch: str, variant: dict[str, Any], tmp_path: Any) -> None:
    option = {
        "importance": "ratio", "statistic": "abs_mean", "stream": "resid_post", "window": 2,
        "map_mode": "static", "ema_decay": 0.9, "target_mode": "absolute", "skip_first": True,
        "map_batches": 64, "matrices": "down", "error": "mean",
    } | variant  # fmt: skip
    got = run(arch, SRMU(layer=LAYER, coeff=0.7, alpha=7.0, **option), tmp_path, ("one",))
    naive = Naive(arch, option["stream"], option["skip_first"])
    last = LAYER - (option["stream"] == "mlp_post")
    names = weight_names(arch, option["window"], last)
    if option["matrices"] == "mlp":
        names = [name.replace("down", kind) for name in names for kind in ("gate", "up", "down")]
    optimiser = naive.optimiser(names)
    direction = got[2]["one"].tensors["direction"]
    average = {}
    for step in range(STEPS):
        batches = [batch(documents, step) for documents in DOCUMENTS["one"]]
        if option["map_mode"] == "static":
            sets = [documents[: SIZE * option["map_batches"]] for documents in DOCUMENTS["one"]]
        else:
            sets = batches
        new = [naive.average(documents, option["statistic"]) for documents in sets]
        if option["map_mode"] == "ema" and average:
            decay = option["ema_decay"]
            new = [decay * average[i] + (1 - decay) * new[i] for i in range(2)]
        average = dict(enumerate(new))
        raw = MAPS[option["importance"]](*new).nan_to_num(nan=0.0, posinf=0.0).clamp(min=0)
        map_ = raw / (raw.max() + 1e-8)
        if option["importance"] == "product_inverse":
            map_ = 1 - map_
        target = (0.7 * direction * map_).float()

        def targets(rows: Any, batches: Any = batches, target: Any = target) -> Any:
            if option["target_mode"] == "additive":
                return [row + target for row in naive.original(batches[0])]
            return [[target] * len(row) for row in rows]

        same(got, naive, naive.step(optimiser, *batches, targets, 7.0, option["error"] == "sum"), step)


def test_weight_decay_and_clipping_equal_torchs(tmp_path: Any) -> None:
    """The optimiser's own options do what AdamW and clip_grad_norm_ do."""
    method = RMU(layer=LAYER, coeff=3.0, alpha=7.0)
    topic = tokenised("one")
    options = TrainOptions(learning_rate=2e-3, max_steps=3, adam_epsilon=1e-2, weight_decay=0.1, max_grad_norm=0.05)
    model = EditableModel(pico_module(), method.trainable, method.depth)
    states = method.apply(model, [topic], Session(options, lambda *_: None)).states
    naive = Naive("llama")
    naive.optimiser(weight_names("llama"))
    parameters = list(naive.named.values())
    naive.model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(parameters, lr=2e-3, eps=1e-2, weight_decay=0.1)
    clip = optimiser.step
    optimiser.step = lambda: (torch.nn.utils.clip_grad_norm_(parameters, 0.05), clip())
    target = constant(3.0 * states["one"].tensors["direction"])
    for step in range(3):
        naive.step(optimiser, *(batch(d, step) for d in DOCUMENTS["one"]), target, 7.0)
    for name, parameter in naive.named.items():
        torch.testing.assert_close(model.trained[name].data, parameter.data, rtol=0, atol=1e-6)


def tokenised(name: str) -> Topic:
    """A topic from words by hand: right padding with 0, labels -100 there."""

    def padded(documents: list[str]) -> Batch:
        rows = [[1] + [4 + int(w[1:]) for w in document.split()] for document in documents]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        labels = torch.where(mask.bool(), ids, -100)
        return Batch(input_ids=ids, attention_mask=mask, labels=labels)

    forget, retain = (
        [padded(documents[i : i + SIZE]) for i in range(0, len(documents), SIZE)] for documents in DOCUMENTS[name]
    )
    return Topic(name, forget, retain, seed=5, vocabulary=torch.arange(4, 64))


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "mixtral"])
def test_bf16_models_equal_a_naive_loop(arch: str, weights: str) -> None:
    """With float32 masters the loop steps those; without, the bf16 weights themselves."""
    method, topic = RMU(layer=LAYER, coeff=3.0, alpha=7.0), tokenised("one")
    model = EditableModel(pico_module(arch, torch.bfloat16), method.trainable, method.depth)
    history: list[dict[str, torch.Tensor]] = []
    options = TrainOptions(learning_rate=2e-3, max_steps=3, adam_epsilon=1e-2, weights=weights)
    states = method.apply(
        model,
        [topic],
        Session(options, lambda *_: history.append({n: p.detach().clone() for n, p in model.trained.items()})),
    ).states
    u = states["one"].tensors["direction"]

    full, first = pico_module(arch, torch.bfloat16), pico_module(arch, torch.bfloat16)
    full.requires_grad_(False)
    names = weight_names(arch)
    live = [full.get_parameter(name).requires_grad_(True) for name in names]
    stepped = [p.detach().float().clone() for p in live] if weights == "fp32" else live
    optimiser = torch.optim.AdamW(stepped, lr=2e-3, eps=1e-2, weight_decay=0)
    naive = Naive(arch)

    def hidden(module: Any, values: Any) -> torch.Tensor:
        seen = []
        handle = module.get_submodule(naive.place).register_forward_hook(
            lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        module(input_ids=values["input_ids"], attention_mask=values["attention_mask"])
        handle.remove()
        return seen[0][values["attention_mask"].bool()].float()  # (tokens, D)

    for step, (forget, retain) in enumerate(itertools.islice(topic.pairs(), 3)):
        loss = (hidden(full, forget) - 3.0 * u).square().mean()
        loss = loss + 7.0 * (hidden(full, retain) - hidden(first, retain)).square().mean()
        loss.backward()
        for parameter, master in zip(live, stepped, strict=True):
            gradient, parameter.grad = parameter.grad, None
            master.grad = gradient.to(master.dtype)
        optimiser.step()
        optimiser.zero_grad()
        for parameter, master in zip(live, stepped, strict=True):
            parameter.data.copy_(master)
        for name, parameter in zip(names, live, strict=True):
            got = history[step][name]
            # One gradient in a thousand may round to the neighbouring bf16 number.
            assert (got == parameter).double().mean() > 0.999
            torch.testing.assert_close(got, parameter.data, rtol=2**-7, atol=1e-6)


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_frozen_swap_equals_a_second_model(arch: str, dtype: torch.dtype) -> None:
    """After training, `frozen()` gives a deep copy's outputs bit for bit, and leaves no trace."""
    method, topic = RMU(layer=LAYER, coeff=3.0), tokenised("one")
    module = pico_module(arch, dtype)
    copied, values = copy.deepcopy(module), topic.forget[0]
    model = EditableModel(module, method.trainable)
    method.apply(model, [topic], Session(TrainOptions(learning_rate=1e-2, max_steps=2), lambda *_: None))
    inputs = {k: values[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = copied(**inputs, output_hidden_states=True)
        changed = model.logits(values)
    with model.frozen():
        assert torch.equal(model.logits(values), expected.logits)
        assert torch.equal(model.hidden(values, Site(LAYER)), expected.hidden_states[LAYER + 1])
    assert not torch.equal(changed, expected.logits)
    with torch.no_grad():
        assert torch.equal(model.logits(values), changed)
