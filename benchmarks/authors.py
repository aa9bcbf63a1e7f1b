"""Our runs against plain restatements of what the authors' code does, from the same model on the same batches.

    python benchmarks/authors.py TESTBED

TESTBED is a folder that `srmu testbed` wrote. Prints the Markdown table of docs/methods.md: the cosine of our move of
the weights with theirs, and the size of ours over theirs, for the authors' form of each option and for our default. The
restatements were written from reading the code that docs/methods.md names; they hold none of it.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, logsigmoid, mse_loss
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler
from transformers.utils.logging import disable_progress_bar

from srmu.data.sources import Source
from srmu.data.topics import TopicConfig, load_topic
from srmu.engine.model import EditableModel
from srmu.engine.topic import Batch, Topic
from srmu.engine.train import TrainOptions
from srmu.methods import LLMU, METHODS, NPO, RMU, SCRUB, SSD, AdaptiveRMU, Method
from srmu.methods.base import Session

STEPS, LAYER = 8, 4
C, ALPHA, RATE = 6.5, 1200.0, 5e-5  # of RMU on Zephyr
Moves = dict[str, Tensor]


class Case:
    """A testbed's model and batches, and what moves it."""

    def __init__(
        self, testbed: Path, train: TrainOptions, dtype: torch.dtype = torch.float32, batches: int = 8
    ) -> None:
        self.folder, self.train, self.dtype = testbed / "model", train, dtype
        forget, retain = ([Source(path=str(testbed / name))] for name in ("forget.jsonl", "retain-high.jsonl"))
        texts = TopicConfig(forget=forget, retain=retain, max_length=64)  # type: ignore[call-arg]
        topic = load_topic("bio", texts, AutoTokenizer.from_pretrained(self.folder), train, seed=0)
        self.topic: Topic = replace(topic, forget=topic.forget[:batches], retain=topic.retain[:batches])
        self.first: Moves = {}  # the move of our first step

    def load(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.dtype).eval()

    def run_ours(self, method: Method, **train: Any) -> tuple[Moves, Any]:
        """Our move of the weights, and the state of the method."""
        model = EditableModel(self.load(), method.trainable, method.depth)
        self.first = {}

        def log(step: int, values: dict[str, float | str]) -> None:
            if step == 0:
                self.first = {n: (p.detach() - model.original[n]).float() for n, p in model.trained.items()}

        options = replace(self.train, **train)
        states = method.apply(model, [self.topic], Session(method.training(options, model.module.config), log)).states
        return {n: (p.detach().float() - model.original[n].float()) for n, p in model.trained.items()}, states["bio"]

    def run_theirs(
        self,
        loss: Callable[[Any, Any, Batch, Batch, int], Tensor],
        step: Callable[[Sequence[Any], int], None],
        names: Sequence[str] = (),
        steps: int = STEPS,
        topic: Topic | None = None,
    ) -> Moves:
        """The move of the weights by a loss of (model, frozen model, forget, retain, step) and an optimiser's step."""
        model, frozen = self.load(), self.load()
        before = {n: p.detach().clone() for n, p in model.named_parameters() if not names or n in names}
        parameters = [model.get_parameter(name) for name in before]
        for number, (forget, retain) in enumerate(islice((topic or self.topic).pairs(), steps)):
            model.zero_grad()
            loss(model, frozen, forget, retain, number).backward()
            step(parameters, number)
        return {name: (model.get_parameter(name).detach().float() - t.float()) for name, t in before.items()}


def compare(ours: Moves, theirs: Moves) -> str:
    """Cosine and ratio of two moves."""
    one, other = (torch.cat([moves[n].flatten().double() for n in sorted(theirs)]) for moves in (ours, theirs))
    return f"{float(one @ other / (one.norm() * other.norm())):.4f}, {float(one.norm() / other.norm()):.3f}"


def former_adamw(rate: float, epsilon: float) -> Callable[[Sequence[Any], int], None]:
    """Adam whose epsilon stands beside the root of v as it is, in the precision of the weights."""
    memory: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(parameters: Sequence[Any], number: int) -> None:
        size = rate * math.sqrt(1 - 0.999 ** (number + 1)) / (1 - 0.9 ** (number + 1))
        for p in parameters:
            m, v = memory.setdefault(id(p), (torch.zeros_like(p), torch.zeros_like(p)))
            m += 0.1 * (p.grad - m)
            v += 0.001 * (p.grad**2 - v)
            p -= size * m / (v.sqrt() + epsilon)

    return step


def trainer(options: TrainOptions, kind: str, decay: float = 0.0) -> Callable[[Sequence[Any], int], None]:
    """transformers' Trainer: clipping at 1, torch's AdamW, a schedule of transformers."""
    made: list[Any] = []

    def step(parameters: Sequence[Any], number: int) -> None:
        if not made:
            optimiser = torch.optim.AdamW(parameters, lr=options.learning_rate or 0.0, weight_decay=decay)
            made.extend((optimiser, get_scheduler(kind, optimiser, options.warmup_steps, options.max_steps)))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        made[0].step()
        made[1].step()

    return step


def read(batch: Batch) -> dict[str, Tensor]:
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def hidden(model: Any, batch: Batch) -> Tensor:
    return model(**read(batch), output_hidden_states=True).hidden_states[LAYER + 1]


def costs(model: Any, batch: Batch, logits: Tensor | None = None) -> Tensor:
    """Nats of each next token, 0 where it is not counted, (B, T - 1)."""
    logits = model(**read(batch)).logits if logits is None else logits
    return cross_entropy(logits[:, :-1].float().transpose(1, 2), batch["labels"][:, 1:], reduction="none")


def count(batch: Batch) -> Tensor:
    return (batch["labels"][:, 1:] != -100).float()


def text_means(model: Any, batch: Batch) -> Tensor:
    return (costs(model, batch).sum(1) / count(batch).sum(1)).mean()


def token_mean(model: Any, batch: Batch) -> Tensor:
    return costs(model, batch).sum() / count(batch).sum()


def measure_rmu(testbed: Path, dtype: torch.dtype, weights: Literal["bf16", "fp32"]) -> list[str]:
    """RMU and Adaptive RMU: padding counted, means over all positions, losses in the model's precision."""
    train = TrainOptions(
        learning_rate=RATE, max_steps=STEPS, adam_epsilon=1e-6, adam_epsilon_form="transformers", shuffle=False,
        padding="count", weights=weights,
    )  # fmt: skip
    case = Case(testbed, train, dtype)
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(LAYER - 2, LAYER + 1)]
    rmu = RMU(layer=LAYER, coeff=C, alpha=ALPHA)
    adaptive = AdaptiveRMU(layer=LAYER, coeff=1.0, scale=5.0, alpha=ALPHA, norm_source="updated", skip_first=False)
    lines = []
    for method in (rmu, adaptive):
        ours, state = case.run_ours(method)
        moved, u = [share_moved(case.first)], state.tensors["direction"].to(dtype)
        strength = [C if method is rmu else 0.0]  # measured in the first step

        def loss(
            model: Any, frozen: Any, f: Batch, r: Batch, step: int, u: Tensor = u, c: list[float] = strength
        ) -> Tensor:
            away, held = hidden(model, f), hidden(model, r)
            c[0] = c[0] or 5.0 * float(away.detach().norm(dim=-1).mean())
            return mse_loss(away, (c[0] * u).expand_as(away)) + ALPHA * mse_loss(held, hidden(frozen, r).detach())

        first, theirs = (case.run_theirs(loss, former_adamw(RATE, 1e-6), names, steps) for steps in (1, STEPS))
        other: dict[str, Any] = {} if method is rmu else {"norm_source": "frozen", "skip_first": True}
        plain = case.run_ours(replace(method, **other), adam_epsilon_form="torch", adam_epsilon=1e-8)[0]
        moved += [share_moved(first), share_moved(case.first)]
        shares = "step 1 moved {:.1%} of the weights, theirs {:.1%}, the default {:.1%}".format(*moved)
        label = f"{METHODS[method.name].__name__}, {weights}: {shares}"
        lines.append(f"| {label} | {compare(ours, theirs)} | {compare(plain, theirs)} |")
    return lines


def share_moved(moves: Moves) -> float:
    return sum(int((t != 0).sum()) for t in moves.values()) / sum(t.numel() for t in moves.values())


def measure_npo(testbed: Path) -> list[str]:
    """NPO as RWKU's and MUSE's trainers step it, and MUSE's on raw logits."""
    rwku = TrainOptions(
        learning_rate=1e-4, schedule="cosine", warmup_steps=3, max_steps=STEPS, max_grad_norm=1.0, shuffle=False
    )
    muse = replace(rwku, schedule="constant", warmup_steps=0, weights="bf16")

    def npo(model: Any, frozen: Any, f: Batch, r: Batch, step: int, beta: float = 0.2) -> Tensor:
        with torch.no_grad():
            before = costs(frozen, f).sum(1)
        return -2 / beta * logsigmoid(beta * (costs(model, f).sum(1) - before)).mean()

    def with_nll(model: Any, frozen: Any, f: Batch, r: Batch, step: int) -> Tensor:
        return npo(model, frozen, f, r, step, beta=0.1) + token_mean(model, r)

    def on_raw_logits(model: Any, frozen: Any, f: Batch, r: Batch, step: int) -> Tensor:
        with torch.no_grad():
            before = frozen(**read(f)).logits
        raw = -20 * logsigmoid(0.1 * (before - model(**read(f)).logits).float()).mean()
        return raw + token_mean(model, r)

    case, method = Case(testbed, rwku), NPO(beta=0.2)
    theirs = case.run_theirs(npo, trainer(rwku, "cosine"))
    ours, plain = case.run_ours(method)[0], case.run_ours(method, max_grad_norm=None, schedule="linear")[0]
    lines = [f"| RWKU's NPO | {compare(ours, theirs)} | {compare(plain, theirs)} |"]
    case, method = Case(testbed, muse, torch.bfloat16), NPO(beta=0.1, retain="nll")
    ours, plain = case.run_ours(method)[0], case.run_ours(method, max_grad_norm=None, weights="fp32")[0]
    for label, loss in (("of log-likelihoods", with_nll), ("as it is, of raw logits", on_raw_logits)):
        theirs = case.run_theirs(loss, trainer(muse, "constant"))
        lines.append(f"| MUSE's NPO + NLL, {label} | {compare(ours, theirs)} | {compare(plain, theirs)} |")
    return lines


def measure_ssd(testbed: Path) -> list[str]:
    """SSD: squares of the gradients of single whole texts."""
    case = Case(testbed, TrainOptions(max_steps=1, batch_size=1), batches=32)
    ours = case.run_ours(SSD(alpha=10.0))[0]
    importances = []
    for texts in (case.topic.forget, case.topic.retain):
        model = case.load()
        sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        for text in texts:
            model.zero_grad()
            token_mean(model, text).backward()
            for n, p in model.named_parameters():
                sums[n] += p.grad**2
        importances.append(sums)
    i_f, i_d = importances
    theirs = {}
    for n, p in case.load().named_parameters():
        factor = torch.where(i_f[n] > 10 * i_d[n], (i_d[n] / i_f[n]).clamp(max=1), 1.0)
        theirs[n] = p.detach() * (factor - 1)
    counts = [sum(int((t != 0).sum()) for t in moves.values()) for moves in (ours, theirs)]
    return ["| SSD; weights dampened: ours {:,}, theirs {:,} | {} | the same |".format(*counts, compare(ours, theirs))]


def measure_llmu(testbed: Path) -> list[str]:
    """LLMU: means over texts; the hold's mean over all positions, padding too."""
    train = TrainOptions(
        learning_rate=1e-4,
        schedule="linear",
        max_steps=STEPS,
        weight_decay=0.01,
        shuffle=False,
        forget_ceiling=math.inf,
    )  # fmt: skip
    case, method = Case(testbed, train), LLMU(answers=2, average="texts")
    ours, plain = case.run_ours(method)[0], case.run_ours(replace(method, average="tokens"))[0]
    parts = method.prepared(case.topic)
    state = method.setup(EditableModel(case.load(), ("*",)), case.topic)

    def loss(model: Any, frozen: Any, f: Batch, r: Batch, step: int) -> Tensor:
        wrong = method.answer_randomly(state, f, step)
        with torch.no_grad():
            before = frozen(**read(r)).logits.softmax(-1)
        held = -(before * log_softmax(model(**read(r)).logits, -1)).sum(-1).mean()
        return -0.5 * text_means(model, f) + text_means(model, wrong) + held

    made: list[Any] = []

    def step(parameters: Sequence[Any], number: int) -> None:
        if not made:
            optimiser = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01)
            made.extend((optimiser, get_scheduler("linear", optimiser, 0, STEPS)))
        made[0].step()
        made[1].step()

    theirs = case.run_theirs(loss, step, topic=parts)
    return [f"| LLMU | {compare(ours, theirs)} | {compare(plain, theirs)} |"]


def measure_scrub(testbed: Path) -> list[str]:
    """SCRUB: whole passes away, then back, at temperature 2; here two batches of each set."""
    train = TrainOptions(learning_rate=1e-4, max_steps=6, shuffle=False, forget_ceiling=math.inf)
    case = Case(testbed, train, batches=2)
    method = SCRUB(turns="epochs", ascent_steps=1, temperature=2.0)
    ours, plain = case.run_ours(method)[0], case.run_ours(SCRUB())[0]

    def distance(model: Any, frozen: Any, batch: Batch) -> Tensor:
        with torch.no_grad():
            before = log_softmax(frozen(**read(batch)).logits[:, :-1] / 2, -1)
        after = log_softmax(model(**read(batch)).logits[:, :-1] / 2, -1)
        return 4 * ((before.exp() * (before - after)).sum(-1) * count(batch)).sum() / count(batch).sum()

    def loss(model: Any, frozen: Any, f: Batch, r: Batch, step: int) -> Tensor:
        if step // 2 in (0, 2):  # passes: away, back, away, back
            return -distance(model, frozen, f)
        return 0.5 * distance(model, frozen, r) + token_mean(model, r)

    def second(model: Any, frozen: Any, f: Batch, r: Batch, step: int) -> Tensor:
        return loss(model, frozen, f, r, step + 2)

    def step(parameters: Sequence[Any], number: int) -> None:
        made[:] = made if number else [torch.optim.Adam(parameters, lr=1e-4)]
        made[0].step()

    made: list[Any] = []
    lines = []
    for label, of, steps in (
        ("from its second pass on", second, 6),
        ("as it is, the first along rounding noise", loss, 8),
    ):
        theirs = case.run_theirs(of, step, steps=steps)
        lines.append(f"| SCRUB, {label} | {compare(ours, theirs)} | {compare(plain, theirs)} |")
    return lines


def main(testbed: Path) -> None:
    disable_progress_bar()
    print("| method | with the authors' options: cosine, size | with our defaults |\n| --- | --- | --- |")
    for dtype, weights in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        print(*measure_rmu(testbed, dtype, weights), sep="\n", flush=True)  # type: ignore[arg-type]
    for measure in (measure_npo, measure_ssd, measure_llmu, measure_scrub):
        print(*measure(testbed), sep="\n", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
