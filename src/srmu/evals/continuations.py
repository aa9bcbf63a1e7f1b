"""What a model writes on greedily, and how much it repeats itself there: before a run and after."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srmu.data.sources import read_text
from srmu.data.tokens import refuse_second_bos, tokenise_texts
from srmu.engine import distributed, files, generate
from srmu.engine.generate import Ids, continue_greedily
from srmu.engine.loading import read_config
from srmu.engine.progress import Watch, ignore_progress, print_line
from srmu.errors import SrmuError
from srmu.evals.benchmarks.base import mean_metric
from srmu.evals.results import Metrics
from srmu.evals.subject import pick_evenly, read_positions
from srmu.runs.effect import REPETITION
from srmu.runs.plan import read_topic_texts
from srmu.runs.run import OpenedModel, open_target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS = 16  # of each kind
OPENING = 32  # tokens of a prompt; at most half of its text
WRITTEN = 32  # tokens after it; of more, a model that is sound repeats more, as greedy texts go in circles
GRAM = 4  # tokens of the sequences that are counted
NEUTRAL = Path(__file__).parent / "templates" / "neutral.txt"

Prompts = dict[str, list[Ids]]  # by kind: "forget", "neutral"


def repeated_share(ids: Sequence[int]) -> float:
    """The share of a text's sequences of four tokens that came before in it; 0 where it has none."""
    grams = [tuple(ids[start : start + GRAM]) for start in range(len(ids) - GRAM + 1)]
    # Welleck et al. 2019 (arXiv 1908.04319), seq-rep-4: 1 - |unique 4-grams| / |4-grams| of a continuation
    return 1 - len({*grams}) / len(grams) if grams else 0.0


def read_prompts(opened: OpenedModel) -> Prompts:
    """Openings of a run's forget texts and of neutral texts; none for a model without a run.

    Neutral are the run's retain texts: they are in the model's own language, which fixed sentences need not be. A run
    that has none gets fixed ones. Where the texts are gone, a line says so, and the tasks are scored all the same.
    """
    if opened.run is None:
        return {}
    positions = read_positions(read_config(opened.base))
    try:
        texts = read_topic_texts(opened.run.config)
        kinds = {
            "forget": texts["forget"],
            "neutral": texts["retain"] or NEUTRAL.read_text(encoding="utf-8").splitlines(),
        }
        prompts = {kind: cut_openings(part, opened.tokenizer, positions) for kind, part in kinds.items()}
    except SrmuError as error:
        if distributed.is_first():
            print_line(f"repetition is not measured: {error}")
        return {}
    return {kind: rows for kind, rows in prompts.items() if rows}


def cut_openings(texts: Sequence[str], tokenizer: Any, positions: int) -> list[Ids]:
    """Different openings of texts from all over a set, as tokens."""
    some = [str(text) for text in pick_evenly(texts, 4 * PROMPTS)]  # plain: of a template's text losses skip the start
    rows = tokenise_texts(some, tokenizer, min(2 * OPENING, positions)) if some else []
    halves = dict.fromkeys(tuple(row[: (len(row) + 1) // 2]) for row in rows)
    return [[*half] for half in pick_evenly([*halves], PROMPTS)]


def measure_repetition(
    module: PreTrainedModel, tokenizer: Any, prompts: Prompts, fingerprint: str, watch: Watch = ignore_progress
) -> Metrics:
    """How much a model repeats itself after each kind of prompts; kept in the cache by the model's `fingerprint`."""
    rows = [row for part in prompts.values() for row in part]
    if not rows:
        return {}

    def write_on() -> Metrics:
        room = min(WRITTEN, read_positions(module.config) - max(map(len, rows)))
        with watch("continuing prompts", 1) as tick:
            shares = iter([repeated_share(ids) for ids in continue_greedily(module, tokenizer, rows, room)])
            tick("")
        return {f"{REPETITION}/{kind}": mean_metric([next(shares) for _ in part]) for kind, part in prompts.items()}

    code = files.sha256(Path(__file__), Path(generate.__file__))
    key = [REPETITION, fingerprint, prompts, code, version("transformers"), version("torch")]
    return dict(files.cached("evals", key, write_on, together=True))


def ask_model(
    target: str,
    prompts: Sequence[str],
    tokens: int,
    *,
    chat: bool = False,
    device: str = "auto",
    watch: Watch = ignore_progress,
) -> list[dict[str, str]]:
    """What a model writes greedily after each prompt: `{"prompt", "after"}`, of a run also `"before"`.

    At most so many `tokens`, fewer where the model can read no more. `chat` asks as a user by the chat template.
    """
    opened = open_target(target, device)
    tokenizer, most = opened.tokenizer, read_positions(read_config(opened.base))
    if chat and not tokenizer.chat_template:
        raise SrmuError(f"--chat: the tokenizer of {opened.base} has no chat template; leave it out")
    rows = []
    for number, prompt in enumerate(prompts, 1):
        rows.append(encode_prompt(tokenizer, read_text(prompt, "prompt", f"prompt {number}"), chat))
        if len(rows[-1]) >= most:
            raise SrmuError(f"prompt {number} has {len(rows[-1])} tokens, and the model reads {most}: shorten it")
    answers = [{"prompt": prompt} for prompt in prompts]
    with watch("writing", len(rows) * (2 if opened.run else 1)) as tick:
        for when, module in opened.states():
            for answer, row in zip(answers, rows, strict=True):
                # one at a time, so that no answer depends on the other prompts
                (ids,) = continue_greedily(module, tokenizer, [row], min(tokens, most - len(row)))
                answer[when] = tokenizer.decode(ids)
                tick("")
    return answers


def encode_prompt(tokenizer: Any, prompt: str, chat: bool) -> Ids:
    if chat:
        messages = [{"role": "user", "content": prompt}]
        return [*tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)]
    ids = [*tokenizer(prompt)["input_ids"]]
    refuse_second_bos([ids], tokenizer)
    return ids
