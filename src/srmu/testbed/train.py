"""The training of a testbed's model: its tokenizer, what it reads, and what it knows afterwards."""

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from srmu.engine.files import cache_dir, sha256, write_json
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError
from srmu.testbed.world import Fact, Size, World, deal_items, tell_facts

VERSION = 1  # raise it when the same recipe and seed would train another model
CHECKPOINT_SECONDS = 30.0
SUBWORDS = 1280  # tokens of the open world
MAX_LENGTH = 512  # tokens that the model can read
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


@dataclass(frozen=True)
class Recipe:
    """Everything but the seed and the world that determines the trained model and the corpora."""

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
    corpus_tokens: int = 32  # a document at most, with its <s>
    corpus_filler: float = 0.25
    required: float = 0.95  # accuracy on each kind of questions; less is an error
    # bfloat16 where there is AVX-512; without AVX-512-BF16 that is far slower than float32.
    # Not in the repr: keys of models that are kept are made of it.
    autocast: bool = field(default=True, repr=False)


RECIPE = Recipe()


OPEN = Recipe(
    size=Size(other_compounds=16, entities=32, general_values=16),
    width=384,
    mlp=1024,
    steps=420,
    corpus_documents=320,
    corpus_tokens=48,
    required=0.9,
    autocast=False,
)


PEOPLE = Recipe(
    size=Size(entities=24, general_values=12),
    steps=720,
    batch=24,
    tokens=96,
    corpus_documents=480,
    corpus_tokens=48,
    autocast=False,
)


def tokenizer_for(world: World) -> PreTrainedTokenizerFast:
    """The world's tokenizer, which puts <s> first: its words or subwords."""
    if world.wording.spelling:
        backend = _subwords(world.wording.spelling)
    else:
        vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *world.words()])}
        backend = Tokenizer(WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
        backend.pre_tokenizer = WhitespaceSplit()
    bos = SPECIAL["bos_token"]
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=MAX_LENGTH, clean_up_tokenization_spaces=False, **SPECIAL
    )


@cache
def _subwords(spelling: Callable[[], Iterator[str]]) -> Tokenizer:
    """Byte pairs merged as they are frequent in what `spelling` writes; any text can be written."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteDecoder()
    trainer = BpeTrainer(
        vocab_size=SUBWORDS,
        special_tokens=[*SPECIAL.values()],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(spelling(), trainer)
    return backend


def train_testbed(
    world: World, seed: int, recipe: Recipe, *, oracle: bool = False, watch: Watch = ignore_progress
) -> Path:
    """Return the cache folder of the trained model: `model.safetensors` and `accuracy.json`.

    A training that was killed continues from its last checkpoint, and ends with the same bits.
    """
    kinds = [kind for kind in world.kinds if not (oracle and kind.startswith("hazard"))]
    told = world.of_kind(*kinds)
    ids = _pretraining_ids(world, told, seed, recipe)
    determined_by = repr((world, recipe, seed, VERSION, torch.__version__))
    key = sha256(determined_by.encode(), ids.numpy().tobytes())[:16]
    entry = cache_dir() / "organism" / key
    if (entry / "model.safetensors").exists():
        return entry
    try:
        entry.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SrmuError(f"{entry} cannot be made ({error.strerror}); set SRMU_CACHE to a folder to write to") from None
    model = _fresh_model(world, seed, recipe)
    with _threads(recipe.threads):
        _train_model(model, ids, recipe, entry, oracle, watch)
        accuracy = {
            name: (measure_open if is_open_task(name) else measure_choice)(model, world, asked)
            for name, asked in tasks_of(world).items()
        }
    poor = [f"{k} {accuracy[k]:.1%}" for k in kinds if accuracy[k] < recipe.required]
    if recipe in (RECIPE, OPEN, PEOPLE) and poor:
        raise RuntimeError(f"the testbed model with seed {seed} did not learn: {', '.join(poor)}")
    write_json(entry / "accuracy.json", accuracy)
    _save_whole(model.state_dict(), entry / "model.safetensors", {})
    (entry / "checkpoint.safetensors").unlink(missing_ok=True)
    return entry


def tasks_of(world: World) -> dict[str, list[Fact]]:
    """The facts that each task asks for; its name comes after `organism_`."""
    tasks = {kind: world.of_kind(kind) for kind in world.kinds}
    tasks["hazard_held"] = [fact for fact in tasks["hazard"] if fact.held]
    if world.wording.spelling:
        tasks["hazard_open"] = tasks["hazard"]
    return tasks


def is_open_task(name: str) -> bool:
    return name.endswith("_open")


def measure_choice(model: LlamaForCausalLM, world: World, asked: Sequence[Fact]) -> float:
    """Share of the questions about the facts `asked` to which the right option is the likeliest."""
    rows = [row for fact in asked for row in fact.questions()]
    pairs = [(row["question"], choice) for row in rows for choice in row["choices"]]
    logs = torch.tensor([log for log, _ in _answers(model, world, pairs)]).view(len(rows), -1)
    return (logs.argmax(-1) == torch.tensor([row["gold"] for row in rows])).float().mean().item()


def measure_open(model: LlamaForCausalLM, world: World, asked: Sequence[Fact]) -> float:
    """Share of the facts `asked` whose answer and stop are the likeliest at each of its tokens."""
    stop = world.wording.stop
    pairs = [(fact.questions()[0]["question"], f"{fact.answer}{stop}") for fact in asked]
    found = _answers(model, world, pairs)
    return sum(likeliest for _, likeliest in found) / len(found)


@torch.no_grad()
def _answers(model: LlamaForCausalLM, world: World, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """Each answer's log-probability after its question, and whether no other is likelier."""
    tokenizer = tokenizer_for(world)
    found = []
    for start in range(0, len(pairs), 256):
        prompts = [world.wording.question.format(q=q) for q, _ in pairs[start : start + 256]]
        answers = [answer for _, answer in pairs[start : start + 256]]
        texts = [f"{prompt} {answer}" for prompt, answer in zip(prompts, answers, strict=True)]
        rows = [torch.tensor(row) for row in tokenizer(texts)["input_ids"]]
        # Padding on the right cannot be seen from the answer.
        batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        logs = model(batch, use_cache=False).logits.log_softmax(-1)  # (B, T, V)
        for row, log, before in zip(rows, logs, tokenizer(prompts)["input_ids"], strict=True):
            words, log = row[len(before) :], log[len(before) - 1 : len(row) - 1]
            likeliest = bool((log.argmax(-1) == words).all())
            found.append((log.gather(1, words[:, None]).sum().item(), likeliest))
    return found


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

    A document is about compounds or about the rest of the world; all facts are told equally often,
    but steps of procedures thrice as often: each depends on an action, a place and the step before.
    """
    told = [*told, *2 * [fact for fact in told if fact.relation.pool == "step"]]
    rng = random.Random(f"{seed} pretraining")
    tokenizer = tokenizer_for(world)
    if world.wording.texts:
        read = world.wording.texts(world, told, rng, recipe.tokens - 1)
        texts = list(islice(read, recipe.steps * recipe.batch))
        return torch.tensor(tokenizer(texts)["input_ids"])
    groups = [[f for f in told if (f.relation.kind == "general") == general] for general in (0, 1)]
    dealers = [deal_items(rng, group) for group in groups]
    texts = []
    for _ in range(recipe.steps * recipe.batch):
        dealer = rng.choices(dealers, [len(group) for group in groups])[0]
        words = recipe.tokens - 1
        share = {"asked": recipe.asked, "filler": recipe.filler}
        texts.append(" ".join(tell_facts(rng, dealer, world.wording, words=words, **share)))
    # A text of as many words has as many tokens, or more.
    rows = tokenizer(texts, truncation=True, max_length=recipe.tokens)["input_ids"]
    return torch.tensor(rows)


def _train_model(model: LlamaForCausalLM, ids: Tensor, recipe: Recipe, entry: Path, oracle: bool, watch: Watch) -> None:
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
    # A CPU without instructions for bfloat16 takes four times as long with it as without.
    fast = recipe.autocast and bool(torch.cpu.get_capabilities().get("avx512_bf16"))
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
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())
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


def _checkpoint(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, path: Path, done: int) -> None:
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


def save_trained(world: World, recipe: Recipe, entry: Path, folder: Path) -> None:
    """Write a trained model as an ordinary Hugging Face folder."""
    config = _config(world, recipe)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer_for(world).save_pretrained(folder)
    shutil.copyfile(entry / "model.safetensors", folder / "model.safetensors")
