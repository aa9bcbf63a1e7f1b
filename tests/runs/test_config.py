"""The config tree: files, overrides, paths, ids."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from srmu.attacks.suite import Sources, fill_sources
from srmu.errors import SrmuError
from srmu.runs.config import Config, build_config, load_config, make_config
from srmu.runs.run import unlearn_config

REPOSITORY = Path(__file__).parents[2]
PRESETS = [
    path for path in sorted((REPOSITORY / "configs").glob("*.yaml")) if "model" in yaml.safe_load(path.read_text())
]

TREE: dict[str, Any] = {
    "model": "model",
    "method": {"name": "srmu", "layer": 2, "kappa": 4},
    "topics": {
        "bio": {"forget": "forget.jsonl", "retain": {"dataset": "wikitext", "name": "raw"}},
        "cyber": {"forget": ["a.txt", {"path": "b/*.csv", "column": "body"}], "retain": "/c.txt"},
    },
    "eval": ["quiz"],
    "tasks_dir": "tasks",
    "runs_dir": "out/runs",
}


def write(path: Path, tree: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config in a folder with its model; the working folder is another one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "there" / "model").mkdir(parents=True)
    return write(tmp_path / "there" / "config.yaml", TREE)


def test_paths_start_at_the_config_file(config_file: Path, tmp_path: Path) -> None:
    config = load_config("../there/config.yaml")
    there = tmp_path / "there"
    assert config.model == str(there / "model")
    bio, cyber = config.topics["bio"], config.topics["cyber"]
    assert bio.forget[0].path == str(there / "forget.jsonl")
    assert bio.retain[0].dataset == "wikitext"
    assert [s.path for s in cyber.forget] == [str(there / "a.txt"), str(there / "b/*.csv")]
    assert cyber.retain[0].path == "/c.txt"
    assert config.tasks_dir == str(there / "tasks")
    assert config.runs_dir == str(there / "out/runs")


def test_paths_of_overrides_start_at_the_working_folder(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, ["topics.bio.forget=x.jsonl", "runs_dir=mine"])
    assert config.topics["bio"].forget[0].path == str(tmp_path / "here" / "x.jsonl")
    assert config.runs_dir == str(tmp_path / "here" / "mine")
    del (tree := dict(TREE))["runs_dir"]
    assert load_config(write(config_file, tree)).runs_dir == str(tmp_path / "here" / "runs")


@pytest.mark.parametrize("name", ["a #b", "[1]", "a: b", "123", "no", "'q", "{x}", "a=b", "%41 &"])
def test_paths_of_overrides_are_taken_as_they_are(
    name: str, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    config = load_config(config_file, [f"tasks_dir={name}", f"topics.bio.forget={name}", f"runs_dir={name}"])
    assert {config.tasks_dir, config.runs_dir, config.topics["bio"].forget[0].path} == {str(tmp_path / name)}


def test_a_hub_id_is_left_alone(config_file: Path) -> None:
    assert load_config(config_file, ["model=owner/name"]).model == "owner/name"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.learning_rate=5e-5", lambda c: c.train.learning_rate == 5e-5),
        ("train.max_steps=3", lambda c: c.train.max_steps == 3),
        ("train.shuffle=false", lambda c: c.train.shuffle is False),
        ("method.kappa=16", lambda c: c.method.kappa == 16.0),
        ("method.kappa=null", lambda c: c.method.kappa is None),
        ("topics.bio.alpha=2", lambda c: c.topics["bio"].options == {"alpha": 2.0}),
        ("topics.new={forget: a.txt, retain: b.txt}", lambda c: len(c.topics) == 3),
        ("eval=[a, b]", lambda c: c.eval == ["a", "b"]),
        ("method.importance=product", lambda c: c.method.importance == "product"),
    ],
)
def test_overrides(override: str, value: Callable[[Config], bool], config_file: Path) -> None:
    assert value(load_config(config_file, [override]))


def test_a_method_may_be_only_a_name(config_file: Path) -> None:
    file = write(config_file, TREE | {"method": "rmu"})
    config = load_config(file, ["method.alpha=3"])
    assert (config.method.name, config.method.alpha) == ("rmu", 3.0)


def test_a_train_option_that_is_none_names_those_there_are(config_file: Path) -> None:
    with pytest.raises(SrmuError, match=r"train.utility is not an option") as told:
        load_config(config_file, ["train.utility=1"])
    assert "__" not in str(told.value)


def test_numbers_as_yaml_reads_them(config_file: Path) -> None:
    config_file.write_text(config_file.read_text() + "train: {learning_rate: 5e-5}\n")
    assert yaml.safe_load("5e-5") == "5e-5"  # the trap
    assert load_config(config_file).train.learning_rate == 5e-5


@pytest.mark.parametrize(
    ("value", "why"),
    [("&a [*a]", "Circular"), ("[" * 999 + "]" * 999, "recursion"), ("2024-13-45", "month"), ("9" * 5000, "digits")],
)
def test_values_that_cannot_be_read(value: str, why: str, config_file: Path) -> None:
    config_file.write_text(f"{config_file.read_text()}seed: {value}\n")
    with pytest.raises(SrmuError, match=f"not YAML of a config: .*{why}"):
        load_config(config_file)


def test_the_resolved_config_round_trips(config_file: Path, tmp_path: Path) -> None:
    overrides = ["topics.bio.forget=x.jsonl", "train.learning_rate=1e-3", "seed=3"]
    config = load_config(config_file, overrides)
    again = load_config(write(tmp_path / "elsewhere" / "c.yaml", config.to_dict()))
    (tmp_path / "elsewhere" / "c.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "elsewhere" / "c.yaml") == again == config
    assert again.id == config.id
    assert set(config.to_dict()) == set(Config.model_fields)  # every default is written out


@pytest.mark.parametrize(
    "override",
    [
        "model=owner/other", "revision=abc", "dtype=float32", "device=cuda", "seed=1",
        "method.layer=1", "method.alpha=2", "method.kappa=5", "method.importance=product",
        "method.direction=plus", "method.anchors=random", "method.name=rmu",
        "train.learning_rate=1", "train.max_steps=1", "train.batch_size=1", "train.shuffle=false",
        "train.padding=count", "train.weight_decay=1", "train.max_grad_norm=1",
        "topics.bio.forget=x.jsonl", "topics.bio.max_length=7", "topics.bio.retain_max_length=7",
        "topics.bio.alpha=1", "topics.bio.retain={dataset: wikitext, name: raw, split: test}",
        "topics.bio.retain.template='{q} {a}'", "topics.bio.retain.where={page: 3}",
        "topics.bio.retain.wrap=true",
    ],
)  # fmt: skip
def test_what_decides_the_result_changes_the_id(override: str, config_file: Path) -> None:
    assert load_config(config_file, [override]).id != load_config(config_file).id


@pytest.mark.parametrize("override", ["runs_dir=x", "eval=[a]", "eval=[]", "tasks_dir=x"])
def test_what_does_not_decide_the_result_keeps_the_id(override: str, config_file: Path) -> None:
    assert load_config(config_file, [override]).id == load_config(config_file).id


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_presets_parse(path: Path) -> None:
    config = load_config(path)
    # WMDP's papers set the strength
    assert "wmdp" not in path.stem or config.method.coeff is not None


# --- a method of one's own

MINE = """
from dataclasses import dataclass
from typing import ClassVar
from srmu.engine.losses import is_counted, token_mse
from srmu.methods import Objective
from srmu.methods.base import State
from srmu.engine.model import Site
from srmu.engine.train import Terms


@dataclass(frozen=True, kw_only=True)
class Shrink(Objective):
    "Sends forget activations towards zero."

    name: ClassVar[str] = "shrink"
    paper: ClassVar[str] = "none"
    layer: int = 1
    strength: float = 1.0

    @property
    def depth(self):
        return self.layer + 1

    @property
    def trainable(self):
        return (f"{self.layer}.mlp_down",)

    def setup(self, model, topic):
        return State()

    def loss(self, model, state, forget, retain, step):
        hidden = model.hidden(forget, Site(self.layer))
        zero = hidden.new_zeros(hidden.shape[-1])
        loss = self.strength * token_mse(hidden, zero, is_counted(forget["labels"]))
        return Terms({"forget": loss}, {})


class NoMethod:
    pass


class Half(Objective):
    "Lacks a loss."
"""


def mine(folder: Path, *overrides: str) -> Config:
    sources = [str(folder / f"{name}.jsonl") for name in ("forget", "retain")]
    quick = ["train.max_steps=2", f"runs_dir={folder / 'runs'}", *overrides]
    return make_config(str(folder / "model"), *sources, f"{folder}/my.py:Shrink", quick)


def test_a_method_from_a_file(workplace: Path) -> None:
    (workplace / "my.py").write_text(MINE)
    run = unlearn_config(mine(workplace, "method.strength=2"))
    assert run.folder.name.endswith("-shrink")
    assert set(run.delta) == {"model.layers.1.mlp.down_proj.weight"}
    assert run.config.method.strength == 2.0  # the run's config finds the file again
    assert run.config.id == run.record["id"]
    before = mine(workplace).id
    assert mine(workplace).id == before
    (workplace / "my.py").write_text(MINE + "\n# another version\n")
    assert mine(workplace).id != before  # the code decides the result


def test_a_method_file_is_found_beside_the_config(workplace: Path) -> None:
    (workplace / "my.py").write_text(MINE)
    topics = {"t": {"forget": "forget.jsonl", "retain": "retain.jsonl"}}
    tree = {"model": "model", "method": {"name": "my.py:Shrink"}, "topics": topics}
    assert load_config(write(workplace / "c.yaml", tree)).method.name == "shrink"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("my.py:NoMethod", "not a Method"),
        ("my.py:Half", "a name, a paper"),
        ("my.py:Absent", "not a Method"),
        ("none.py:Shrink", "no such file"),
        ("broken.py:Shrink", "SyntaxError"),
        ("raises.py:Shrink", "ZeroDivisionError"),
    ],
)
def test_a_file_without_a_method(name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("x = (")
    (tmp_path / "raises.py").write_text("1 / 0")
    with pytest.raises(SrmuError, match=says):
        make_config("model", "f", "r", name)


def test_topic_options_must_be_the_methods(workplace: Path) -> None:
    (workplace / "my.py").write_text(MINE)
    with pytest.raises(SrmuError, match=r"topics\.topic\.alpha: method shrink has no such option"):
        unlearn_config(mine(workplace, "topics.topic.alpha=2"))


def test_two_method_files_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    for folder, default in (("a", 1.0), ("b", 3.0)):
        (tmp_path / folder).mkdir()
        text = MINE.replace("strength: float = 1.0", f"strength: float = {default}")
        (tmp_path / folder / "json.py").write_text(text)  # nor does it hide the library's json
    make = [make_config("m", "f", "r", f"{tmp_path}/{f}/json.py:Shrink") for f in "ab"]
    assert [c.method.strength for c in make] == [1.0, 3.0]
    names = [c.to_dict()["method"]["name"] for c in make]
    assert names == [f"{tmp_path}/{f}/json.py:Shrink" for f in "ab"]


def test_another_family_starts_from_its_own_defaults(tmp_path: Path) -> None:
    """What a file says for SRMU, its learning rate too, is not said for NPO; but it is for RMU."""
    path = tmp_path / "a.yaml"
    path.write_text(
        "model: m\nmethod: {name: srmu, kappa: 3, alpha: 7}\n"
        "topics: {t: {forget: f.jsonl}}\ntrain: {learning_rate: 4.0e-3, max_steps: 9}\n"
    )
    npo = load_config(path, ["method.beta=0.2", "method.name=npo"])
    assert (npo.method.alpha, npo.method.beta) == (1.0, 0.2)
    assert (npo.train.learning_rate, npo.train.max_steps) == (None, 9)
    assert load_config(path, ["method.name=npo", "train.learning_rate=1e-4"]).train == replace(
        npo.train, learning_rate=1e-4
    )
    rmu = load_config(path, ["method.name=rmu"])
    assert (rmu.method.kappa, rmu.method.alpha, rmu.train.learning_rate) == (3, 7, 4e-3)
    assert load_config(path, ["method.name=srmu"]).method.kappa == 3
    with pytest.raises(SrmuError, match="kappa is not an option"):
        load_config(path, ["method.name=npo", "method.kappa=3"])
    path.write_text("model: m\nmethod: srmu\ntopics: {t: {forget: f.jsonl}}\n")
    assert load_config(path, ["method.name=ga"]).method.name == "ga"


def test_an_empty_value_is_refused_and_a_method_keeps_what_it_shares(tmp_path: Path) -> None:
    """`method=rmu` is `method.name=rmu`: RMU keeps the file's kappa, where a method of another family does not."""
    tree = {"model": "m", "method": {"name": "srmu", "kappa": 3.0}, "topics": {"t": {"forget": "f.jsonl"}}}
    with pytest.raises(SrmuError, match=r"method.kappa=: expected a value behind the =; null stands for none"):
        build_config(tree, ["method.kappa="])
    assert build_config(tree, ["method=rmu"]) == build_config(tree, ["method.name=rmu"])
    assert build_config(tree, ["method=rmu"]).method.kappa == 3.0


def test_a_method_of_ones_own_takes_the_place_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from srmu.methods.npo import NPO\n\n\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(NPO):\n"
        '    """NPO under another name."""\n\n'
        '    name = "mine"\n'
    )
    tree = {"model": "m", "topics": {"t": {"forget": "f.jsonl"}}, "method": {"name": "srmu", "layer": 2, "kappa": 3}}
    assert build_config(tree, [f"method.name={tmp_path / 'mine.py'}:Mine", "method.beta=0.2"]).method.name == "mine"


def test_a_whole_method_does_not_hide_its_name() -> None:
    tree = {"model": "m", "topics": {"t": {"forget": "f.jsonl"}}, "method": {"name": "srmu", "kappa": 3}}
    assert build_config(tree, ["method={}", "method.name=npo"]).method.name == "npo"


@pytest.mark.parametrize(("told", "found"), [("bed", True), ("own", False)])
def test_a_testbed_is_that_of_the_texts(tmp_path: Path, told: str, found: bool) -> None:
    """Its questions are about its own forget texts, not about those of others on its model."""
    (tmp_path / "bed").mkdir()
    (tmp_path / "bed" / "testbed.json").write_text("{}")
    config = make_config(str(tmp_path / "bed" / "model"), str(tmp_path / told / "forget.jsonl"))
    assert config.testbed == (tmp_path / "bed" if found else None)
    asked = fill_sources(Sources(tasks=() if found else ("mine",)), config, tmp_path / "bed" / "model")
    assert asked.tasks == (("testbed_hazard",) if found else ("mine",))
    if not found:
        with pytest.raises(SrmuError, match="tasks: name those of lm-eval, or your own"):
            fill_sources(Sources(), config, tmp_path / "bed" / "model")
