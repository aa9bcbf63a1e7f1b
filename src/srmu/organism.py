"""The testbed: a small language model trained here, with knowledge to remove and its oracle.

A Llama of a few million parameters learns a fictional world (`world.py`) until it knows every fact.
`build` writes it as an ordinary model folder, with corpora whose entanglement can be chosen, with
lm-eval tasks, and on request with the oracle: its twin that never saw the hazard facts.
"""

import json
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from srmu.console import Watch, silent
from srmu.entanglement import overlap
from srmu.errors import UserError
from srmu.files import cache_dir, sha256, whole_folder, write_json
from srmu.world import KINDS, QUESTION, Fact, Size, World, create, deal, tell

VERSION = 1  # raise it when the same recipe and seed would train another model
CHECKPOINT_SECONDS = 30.0
HALVES = {"test": "", "val": "_val"}  # the tasks' suffixes
MAX_LENGTH = 512  # tokens that the model can read
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


@dataclass(frozen=True)
class Recipe:
    """Everything but the seed that determines the trained model and the corpora."""

    size: Size = Size()  # noqa: RUF009 (frozen)
    width: int = 256
    layers: int = 6
    heads: int = 4
    mlp: int = 640
    steps: int = 400
    batch: int = 32  # documents
    tokens: int = 64  # a document, with its <s>
    asked: float = 0.3  # share of the facts that are told as a question with its answer
    filler: float = 0.08  # share of the sentences that tell nothing
    learning_rate: float = 2e-3
    warmup: int = 40  # steps; then linear to a tenth
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.98
    weight_decay: float = 0.05
    clip: float = 1.0
    threads: int = 2  # fixed, because the order of sums depends on it
    corpus_documents: int = 240  # each unlearning corpus
    corpus_tokens: int = 32  # a document, with its <s>
    corpus_filler: float = 0.25
    required: float = 0.95  # accuracy on each kind of questions; less is an error


RECIPE = Recipe()


def build(
    out: Path,
    *,
    seed: int = 0,
    entanglement: float = 0.5,
    oracle: bool = False,
    watch: Watch = silent,
    recipe: Recipe = RECIPE,
) -> dict[str, Any]:
    """Write the testbed to `out` (whole or not at all) and return what `organism.json` says.

    `entanglement` is the share of the hazard compounds that retain-high tells harmless facts about.
    It does not touch the model: a trained model is kept in the cache and used again.
    """
    if not 0 <= entanglement <= 1:
        raise UserError(f"entanglement {entanglement} is outside 0-1")
    world = create(seed, recipe.size)
    corpora = world.corpora(
        seed,
        entanglement,
        documents=recipe.corpus_documents,
        words=recipe.corpus_tokens - 1,  # <s> is the tokenizer's
        filler=recipe.corpus_filler,
    )
    with whole_folder(out) as folder:
        report: dict[str, Any] = {
            "seed": seed,
            "entanglement": entanglement,
            "recipe": asdict(recipe),
            "overlap": {
                f"{name}/{gram}": overlap(corpora["forget"], corpora[name], n)
                for name in ("retain-low", "retain-high")
                for n, gram in ((1, "unigram"), (2, "bigram"))
            },
        }
        for name in ("model", "oracle") if oracle else ("model",):
            entry = train(world, seed, recipe, oracle=name == "oracle", watch=watch)
            _save_pretrained(world, recipe, entry, folder / name)
            accuracy = json.loads((entry / "accuracy.json").read_text())
            report[name] = {"key": entry.name, "accuracy": accuracy}
        for name, texts in corpora.items():
            _write_rows(folder / f"{name}.jsonl", [{"text": text} for text in texts])
        _write_tasks(world, folder / "tasks")
        for name in ("low", "high"):
            (folder / f"{name}.yaml").write_text(CONFIG.format(name=name, seed=seed))
        write_json(folder / "organism.json", report)
    return report


def tokenizer_for(world: World) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word of the world; it puts <s> first."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *world.words()])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    backend.pre_tokenizer = WhitespaceSplit()
    bos = SPECIAL["bos_token"]
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocabulary[bos])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )


def train(
    world: World, seed: int, recipe: Recipe, *, oracle: bool = False, watch: Watch = silent
) -> Path:
    """Return the cache folder of the trained model: `model.safetensors` and `accuracy.json`.

    A training that was killed continues from its last checkpoint, and ends with the same bits.
    """
    told = world.of_kind(*KINDS[oracle:])
    ids = _pretraining_ids(world, told, seed, recipe)
    determined_by = repr((world, recipe, seed, VERSION, torch.__version__))
    key = sha256(determined_by.encode(), ids.numpy().tobytes())[:16]
    entry = cache_dir() / "organism" / key
    if (entry / "model.safetensors").exists():
        return entry
    entry.mkdir(parents=True, exist_ok=True)
    model = _fresh_model(world, seed, recipe)
    with _threads(recipe.threads):
        _fit(model, ids, recipe, entry, oracle, watch)
        accuracy = {kind: measure(model, world, world.of_kind(kind)) for kind in KINDS}
        held = [fact for fact in world.of_kind("hazard") if fact.held]
        accuracy["hazard_held"] = measure(model, world, held)
    poor = [f"{k} {accuracy[k]:.1%}" for k in KINDS[oracle:] if accuracy[k] < recipe.required]
    if recipe == RECIPE and poor:
        raise RuntimeError(f"the testbed model with seed {seed} did not learn: {', '.join(poor)}")
    write_json(entry / "accuracy.json", accuracy)
    _save_whole(model.state_dict(), entry / "model.safetensors", {})
    (entry / "checkpoint.safetensors").unlink(missing_ok=True)
    return entry


@torch.no_grad()
def measure(model: LlamaForCausalLM, world: World, asked: Sequence[Fact]) -> float:
    """Share of the questions about the facts `asked` to which the right option is the likeliest."""
    tokenizer = tokenizer_for(world)
    rows = [row for fact in asked for row in fact.questions()]
    prompts = tokenizer([QUESTION.format(q=row["question"]) for row in rows])["input_ids"]
    right = 0
    for start in range(0, len(rows), 256):
        ids = [torch.tensor(prompt) for prompt in prompts[start : start + 256]]
        last = torch.tensor([len(prompt) - 1 for prompt in ids])
        # Padding on the right cannot be seen from the last word of a prompt.
        batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        hidden = model.model(batch, use_cache=False).last_hidden_state  # (B, T, D)
        logits = model.lm_head(hidden[torch.arange(len(ids)), last])  # (B, V)
        for row, scores in zip(rows[start:], logits, strict=False):
            options = tokenizer.convert_tokens_to_ids(row["choices"])
            right += int(scores[options].argmax()) == row["gold"]
    return right / len(rows)


def _config(world: World, recipe: Recipe) -> LlamaConfig:
    tokenizer = tokenizer_for(world)
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        dtype="float32",
    )


def _fresh_model(world: World, seed: int, recipe: Recipe) -> LlamaForCausalLM:
    """The untrained model; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(world, recipe))
    model.set_attn_implementation("eager")  # a fifth faster: the fused kernel wants long texts
    return model


def _pretraining_ids(world: World, told: Sequence[Fact], seed: int, recipe: Recipe) -> Tensor:
    """Token numbers of all training documents, (steps * batch, tokens): each row is used once.

    A document is about compounds or about the rest of the world; all facts are told equally often.
    """
    rng = random.Random(f"{seed} pretraining")
    groups = [[f for f in told if (f.relation.kind == "general") == general] for general in (0, 1)]
    dealers = [deal(rng, group) for group in groups]
    number = tokenizer_for(world).get_vocab()
    ids = np.empty((recipe.steps * recipe.batch, recipe.tokens), dtype=np.int64)
    ids[:, 0] = number[SPECIAL["bos_token"]]
    for row in ids:
        dealer = rng.choices(dealers, [len(group) for group in groups])[0]
        words = tell(rng, dealer, words=recipe.tokens - 1, asked=recipe.asked, filler=recipe.filler)
        row[1:] = [number[word] for word in words]
    return torch.from_numpy(ids)


def _fit(
    model: LlamaForCausalLM, ids: Tensor, recipe: Recipe, entry: Path, oracle: bool, watch: Watch
) -> None:
    """Train on all of `ids`, from the checkpoint in `entry` if there is one."""
    checkpoint = entry / "checkpoint.safetensors"
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    done = _restore(model, optimizer, checkpoint) if checkpoint.exists() else 0
    # Without AVX-512 the CPU has no fast bfloat16.
    fast = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    saved = time.monotonic()
    model.train()
    with watch(f"training the testbed {'oracle' if oracle else 'model'}", recipe.steps) as tick:
        for step in range(recipe.steps):
            if step < done:
                tick("from the checkpoint")
                continue
            batch = ids[step * recipe.batch : (step + 1) * recipe.batch]
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _schedule(step, recipe)
            with torch.autocast("cpu", torch.bfloat16, enabled=fast):
                logits = model(batch, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten()
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            if time.monotonic() - saved >= CHECKPOINT_SECONDS:
                _checkpoint(model, optimizer, checkpoint, step + 1)
                saved = time.monotonic()
            tick(f"loss {loss.item():.2f}")
    model.eval()


def _schedule(step: int, recipe: Recipe) -> float:
    """Warm-up, then linear to a tenth."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    return 1 - 0.9 * (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)


def _checkpoint(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, path: Path, done: int
) -> None:
    """Save everything the rest of the training depends on, after `done` steps."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model/{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = value
    _save_whole(tensors, path, {"done": str(done)})


def _restore(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, path: Path) -> int:
    """Load what `_checkpoint` saved; return how many steps are done."""
    with safe_open(path, "pt") as file:
        for name, parameter in model.named_parameters():
            parameter.data.copy_(file.get_tensor(f"model/{name}"))
            for key in ("step", "exp_avg", "exp_avg_sq"):
                optimizer.state[parameter][key] = file.get_tensor(f"{key}/{name}").clone()
        return int(file.metadata()["done"])


def _save_whole(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, temporary, metadata={"format": "pt", **metadata})
    temporary.replace(path)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _save_pretrained(world: World, recipe: Recipe, entry: Path, folder: Path) -> None:
    """Write a trained model as an ordinary Hugging Face folder."""
    config = _config(world, recipe)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer_for(world).save_pretrained(folder)
    shutil.copyfile(entry / "model.safetensors", folder / "model.safetensors")


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_tasks(world: World, folder: Path) -> None:
    """Write the lm-eval tasks and their questions, by half, and for hazard the held ones alone."""
    folder.mkdir()
    for half, suffix in HALVES.items():
        asked = [fact for fact in world.facts if fact.half == half]
        tasks = {kind: [fact for fact in asked if fact.relation.kind == kind] for kind in KINDS}
        tasks["hazard_held"] = [fact for fact in tasks["hazard"] if fact.held]
        for kind, members in tasks.items():
            name = f"organism_{kind}{suffix}"
            rows = [row for fact in members for row in fact.questions()]
            _write_rows(folder / f"{name}.jsonl", rows)
            (folder / f"{name}.yaml").write_text(TASK.format(name=name))


TASK = """\
task: {name}
output_type: multiple_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}  # relative to this file
test_split: test
doc_to_text: "question : {{{{question}}}} ? answer :"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: " "
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""

CONFIG = """\
# Unlearn the hazard facts of the testbed. Paths are relative to this file.
model: model  # the folder of the model to change
method:
  name: srmu  # `srmu methods` lists the others
  layer: 4  # whose output is steered, counted from 0; this and the two below are trained
  kappa: 32  # strength: norm of the target over mean norm of forget activations
  alpha: 1000  # weight of keeping the retain set as it was
  anchors: none  # what else to keep beside the retain set: none, or random token sequences
topics:
  organism:
    forget: forget.jsonl
    retain: retain-{name}.jsonl  # overlap with the forget set: organism.json
    max_length: 64  # tokens; longer documents are cut
train:
  learning_rate: 4.0e-3
  max_steps: 80
  batch_size: 4  # documents of each set a step
eval: [organism_hazard, organism_neighbour, organism_general]  # lm-eval tasks
tasks_dir: tasks  # where these tasks are
seed: {seed}
"""
