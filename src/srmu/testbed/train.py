"""The training of a testbed's model: its tokenizer, what it reads, and what it knows afterwards."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic.dataclasses import dataclass
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from srmu.engine.files import cache_dir, require_place, sha256, write_json
from srmu.engine.likelihoods import score_answers, split_answers
from srmu.engine.progress import Tick, Watch, ignore_progress
from srmu.errors import SrmuError
from srmu.testbed.open_world import spelling_texts
from srmu.testbed.people import pretraining_texts
from srmu.testbed.world import Fact, Size, World, deal_themes, read_wording, tell_facts

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VERSION = 1  # raise it when the same recipe and seed would train another model
SUBWORDS = 1280  # tokens of the open world
MAX_LENGTH = 512  # tokens that the model can read
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


@dataclass(frozen=True, config={"extra": "forbid"})
class Recipe:
    """Everything but the seed and the world that determines the trained model and the corpora."""

    size: Size = Size()
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
    corpus_tokens: int = 32  # a document at most, with its <s>
    corpus_filler: float = 0.25
    required: float = 0.95  # accuracy on each kind of questions; less is an error
    # bfloat16 where the CPU has AVX-512-BF16; elsewhere it is far slower. Not in the repr, of which keys are made.
    autocast: bool = field(default=True, repr=False)


RECIPE, OPEN, PEOPLE = (Recipe(**read_wording(name)["recipe"]) for name in ("closed", "open", "people"))


def tokenizer_for(world: World) -> PreTrainedTokenizerFast:
    """The world's tokenizer, which puts <s> first: its words, or subwords in the open world."""
    from transformers import PreTrainedTokenizerFast

    if world.name == "open":
        backend = train_subwords()
    else:
        vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *world.words()])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos = SPECIAL["bos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=MAX_LENGTH, clean_up_tokenization_spaces=False, **SPECIAL
    )


@cache
def train_subwords() -> Tokenizer:
    """Byte pairs merged as they are frequent in the open world's texts; any text can be written."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special, alphabet = [*SPECIAL.values()], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SUBWORDS, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(spelling_texts(), trainer)
    return backend


def train_testbed(
    world: World, seed: int, recipe: Recipe, *, oracle: bool = False, watch: Watch = ignore_progress
) -> Path:
    """The cache folder of the trained model, which is trained where it is missing."""
    kinds = [kind for kind in world.kinds if not (oracle and kind.startswith("hazard"))]
    told = world.of_kind(*kinds)
    ids = pretraining_ids(world, told, seed, recipe)
    determined_by = repr((world, recipe, seed, VERSION, torch.__version__))
    key = sha256(determined_by.encode(), ids.numpy().tobytes())[:16]
    entry = cache_dir() / "testbeds" / key
    if (entry / "model.safetensors").exists():
        return entry
    try:
        require_place(entry)
    except SrmuError as error:
        raise SrmuError(f"{error}; set SRMU_CACHE to a folder to write to") from None
    entry.mkdir(parents=True, exist_ok=True)
    model = fresh_model(world, seed, recipe)
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        with watch(f"training the testbed {'oracle' if oracle else 'model'}", recipe.steps) as tick:
            _train_model(model, ids, recipe, tick)
        accuracy = {name: measure_accuracy(model, world, name, asked) for name, asked in tasks_of(world).items()}
    finally:
        torch.set_num_threads(threads)
    poor = [f"{k} {accuracy[k]:.1%}" for k in kinds if accuracy[k] < recipe.required]
    if recipe in (RECIPE, OPEN, PEOPLE) and poor:
        raise RuntimeError(f"the testbed model with seed {seed} did not learn: {', '.join(poor)}")
    write_json(entry / "accuracy.json", accuracy)
    temporary = entry / f".model.{os.getpid()}"
    save_file(model.state_dict(), temporary, metadata={"format": "pt"})
    temporary.replace(entry / "model.safetensors")
    return entry


def tasks_of(world: World) -> dict[str, list[Fact]]:
    """The facts that each task asks about, by its name after `testbed_`; a task `..._open` offers no options."""
    tasks = {kind: world.of_kind(kind) for kind in world.kinds}
    hazard = tasks["hazard"]
    tasks["hazard_held"] = [fact for fact in hazard if fact.held]
    return tasks | {"hazard_open": hazard} if world.name == "open" else tasks


def measure_accuracy(model: LlamaForCausalLM, world: World, task: str, asked: list[Fact]) -> float:
    """Share of a task's questions where the right option, or each token of the answer, is the most likely one."""
    if task.endswith("_open"):
        pairs = [(fact.questions()[0]["question"], f"{fact.answer}{world.wording['stop']}") for fact in asked]
        return sum(likeliest for _, likeliest in score_pairs(model, world, pairs)) / len(pairs)
    rows = [row for fact in asked for row in fact.questions()]
    pairs = [(row["question"], choice) for row in rows for choice in row["choices"]]
    logs = torch.tensor([log for log, _ in score_pairs(model, world, pairs)]).view(len(rows), -1)
    return (logs.argmax(-1) == torch.tensor([row["gold"] for row in rows])).float().mean().item()


def score_pairs(model: LlamaForCausalLM, world: World, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Each answer's log-probability after its question, and whether no other is likelier."""
    tokenizer = tokenizer_for(world)
    prompts = [world.wording["question"].format(q=question) for question, _ in pairs]
    texts = [(prompt, f"{prompt} {answer}") for prompt, (_, answer) in zip(prompts, pairs, strict=True)]
    return score_answers(model, split_answers(tokenizer, texts), MAX_LENGTH)


def fresh_model(world: World, seed: int, recipe: Recipe) -> LlamaForCausalLM:
    """The untrained model; the global random state is left as it was."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer_for(world)
    config = LlamaConfig(
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # a fifth faster: the fused kernel wants long texts
    return model


def pretraining_ids(world: World, told: list[Fact], seed: int, recipe: Recipe) -> Tensor:
    """Token numbers of all training documents, (steps * batch, tokens): each row is used once."""
    # Steps of procedures are told thrice as often: each depends on an action, a place and the step before.
    told = [*told, *2 * [fact for fact in told if fact.relation.pool == "step"]]
    rng, words = random.Random(f"{seed} pretraining"), recipe.tokens - 1
    if world.name == "people":
        read = pretraining_texts(world, told, rng, words)
    else:
        read = (
            tell_facts(rng, facts, world.wording, words=words, asked=recipe.asked, filler=recipe.filler)
            for _, facts in deal_themes(rng, told)
        )
    texts = list(islice(read, recipe.steps * recipe.batch))
    # A text of as many words has as many tokens, or more.
    return torch.tensor(tokenizer_for(world)(texts, truncation=True, max_length=recipe.tokens)["input_ids"])


def _train_model(model: LlamaForCausalLM, ids: Tensor, recipe: Recipe, tick: Tick) -> None:
    """Train on all of `ids`, each row once."""
    rate, betas, decay = recipe.learning_rate, (recipe.beta1, recipe.beta2), recipe.weight_decay
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=betas, weight_decay=decay, fused=True)
    fast = recipe.autocast and torch.cpu._is_avx512_bf16_supported()
    model.train()
    for step, batch in enumerate(ids.split(recipe.batch)):
        late = 0.9 * (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate * ((step + 1) / recipe.warmup if step < recipe.warmup else 1 - late)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            logits = model(batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        tick(f"loss {loss.item():.2f}")
    model.eval()


def save_trained(world: World, recipe: Recipe, entry: Path, folder: Path) -> None:
    """Write a trained model as an ordinary Hugging Face folder."""
    model = fresh_model(world, 0, recipe)
    for part in (model.config, model.generation_config, tokenizer_for(world)):
        part.save_pretrained(folder)
    shutil.copyfile(entry / "model.safetensors", folder / "model.safetensors")
