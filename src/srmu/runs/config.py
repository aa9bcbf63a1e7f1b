"""The config tree: a YAML file, dotted overrides, and errors that say what to type."""

import dataclasses
import hashlib
import inspect
import json
import os
import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, InstanceOf, PlainSerializer, TypeAdapter, ValidationError

from srmu.data.sources import Source
from srmu.data.topics import TopicConfig
from srmu.engine.files import import_from_file, sha256
from srmu.engine.train import TrainOptions
from srmu.errors import SrmuError, first_line, is_short_for, suggest_path, suggest_word
from srmu.methods import METHODS, Method, Misdirection

# keys that the weights do not depend on
UNDECIDING = ("runs_dir", "eval", "tasks_dir", "cache", "purpose")
PATHS = ("forget", "retain", "path", "tasks_dir", "runs_dir")
# a JSON string with half of a character, or with a byte of a path that is not UTF-8
BROKEN = re.compile(r'[^"]*[\ud800-\udfff][^"]*')
# code or data that an option of a method names
NAMED_FILE = re.compile(r".+\.(py(?=:)|(json|txt)$)")
Files = str | Path | Sequence[str | Path]


def _method(value: Any) -> Any:
    if isinstance(value, Method):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, dict):
        raise SrmuError("method: expected a mapping like {name: srmu, layer: 7}")
    options = {str(k): v for k, v in value.items() if k != "name"}
    cls = find_method(str(value.get("name", "srmu")))
    try:
        return TypeAdapter(cls).validate_python(options)
    except ValidationError as error:
        raise SrmuError(explain_error(error, "method", cls)) from None


def _method_dict(method: Method) -> dict[str, Any]:
    name = method.name
    if METHODS.get(name) is not type(method):
        try:
            name = f"{inspect.getfile(type(method))}:{type(method).__name__}"
        except (TypeError, OSError):
            instead = "put it into one, or hand model and tokenizer to srmu.unlearn"
            raise SrmuError(f"method {type(method).__name__} is in no file: {instead}") from None
    return {"name": name} | dataclasses.asdict(method)


class Purpose(BaseModel, extra="forbid"):
    """Why the run was made, in the operator's words, for its record; never the texts."""

    reason: str = ""
    target: str = ""  # what is to be forgotten, described
    operator: str = ""
    ticket: str = ""
    reviewer: str = ""
    sign_off: str = ""  # who approved the result, and when
    choice: str = ""  # why this layer and this strength
    not_covered: list[str] = []  # models that this run does not change


class Config(BaseModel, extra="forbid", frozen=True):
    """Everything that decides a run, checked: what a config file holds.

    `load_config` and `make_config` make one. `method` is a Method, `topics` name what to forget and what to retain
    beside it, `train` holds TrainOptions. `eval`, `tasks_dir`, `runs_dir`, `cache` and `purpose` do not change the
    weights, and so are not part of the `id`.
    """

    model: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: the checkpoint's own
    device: str = "auto"  # auto: a GPU where there is one
    method: Annotated[InstanceOf[Method], BeforeValidator(_method), PlainSerializer(_method_dict)]
    topics: dict[str, TopicConfig]
    train: TrainOptions = TrainOptions()
    eval: list[str] = []
    tasks_dir: str | None = None
    seed: int = 0
    runs_dir: str = "runs"
    cache: Literal["disk", "memory", "none"] = "disk"  # where activations are kept for later steps
    purpose: Purpose = Purpose()

    @property
    def testbed(self) -> Path | None:
        """The folder of the testbed around the model, if its texts are to be forgotten: it says what to ask."""
        home = Path(self.model).parent.resolve()
        texts = [text.path for topic in self.topics.values() for text in topic.forget if text.path]
        inside = home in {Path(path).parent.resolve() for path in texts}
        return home if inside and (home / "testbed.json").is_file() else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values with every default written out."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The text of a config file that gives this config again."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @property
    def id(self) -> str:
        """First 8 hex digits of the SHA-256 of all that decides the result."""
        undeciding: dict[str, Any] = {**dict.fromkeys(UNDECIDING, True), "train": {"checkpoint_seconds"}}
        values = self.model_dump(mode="json", exclude=undeciding)
        for key, value in values["method"].items():  # the code or data of one's own decides, too
            if file := NAMED_FILE.match(str(value)):
                values["code" if key == "name" else f"method.{key}"] = sha256(Path(file[0]))
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config from a YAML file, with overrides such as `train.max_steps=20`.

    Relative paths in the file start at its own folder, those of overrides at the working folder. SrmuError names the
    line or the key that is wrong, and the option that it is near to.
    """
    path = Path(path)
    return build_config(rebase_paths(read_tree(path), path.resolve().parent), overrides)


def read_tree(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file; SrmuError where it has none."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        json.dumps(tree, default=str, skipkeys=True)  # refuses a value that holds itself
    except FileNotFoundError:
        raise SrmuError(f"{path}: no such file{suggest_path(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SrmuError(f"{path}: cannot be read ({type(error).__name__})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise SrmuError(f"{path}{line}: not YAML: {getattr(error, 'problem', error)}") from None
    except (ValueError, RecursionError) as error:
        raise SrmuError(f"{path}: not YAML of a config: {first_line(error)}") from None
    if not isinstance(tree, dict):
        raise SrmuError(f"{path}: expected keys and values like 'model: folder'")
    return tree


def build_config(tree: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Check plain values with `key=value` overrides, whose paths start at the working folder; SrmuError if wrong."""
    values: dict[str, Any] = deepcopy({"runs_dir": "runs", **tree})
    if isinstance(values.get("method"), str):
        values["method"] = {"name": values["method"]}
    overrides = [re.sub("^method=(?=[^{])", "method.name=", override) for override in overrides]
    # A whole method first, then its name: the file's options are those of its own method.
    for override in sorted(overrides, key=lambda o: (not o.startswith("method="), not o.startswith("method.name="))):
        if override.startswith("method.name="):
            forget_old_method(values, override.removeprefix("method.name="))
        put_override(values, override)
    try:  # JSON values only: YAML also reads dates
        values = json.loads(text := json.dumps(values, default=str, ensure_ascii=False))
    except (TypeError, ValueError):
        raise SrmuError("config: the keys must be text") from None
    if broken := BROKEN.search(text):
        raise SrmuError(f"config: {broken[0]!a} is not UTF-8; rename the file or the folder, or mend the value")
    return check_tree(rebase_paths(values, Path.cwd()))


def check_tree(tree: dict[str, Any]) -> Config:
    """The config of a tree of values; SrmuError when wrong."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise SrmuError(explain_error(error, "", Config)) from None


def forget_old_method(values: dict[str, Any], name: str) -> None:
    """Drop the options of a config's method, and its learning rate, if the method `name` replaces it.

    Methods of one family keep them: kappa and alpha mean the same in SRMU and RMU.
    """
    method = values.get("method")
    old = METHODS.get(str(method.get("name", "srmu"))) if isinstance(method, dict) else None
    new = find_method(name) if ".py:" in name else METHODS.get(name)
    if old is None or new is None or old is new or (issubclass(old, Misdirection) and issubclass(new, Misdirection)):
        return
    values["method"] = {"name": name}
    if isinstance(values.get("train"), dict):
        values["train"].pop("learning_rate", None)


def make_config(
    model: str, forget: Files, retain: Files = (), method: str | Method = "srmu", overrides: Sequence[str] = ()
) -> Config:
    """A config for one topic, without a file: a model, text files, and a method or its name.

    `model` is a folder or a hub id; `overrides` are those of `load_config`. Only names are checked here: files and the
    model when the run is made.

    Examples:
        >>> config = srmu.make_config("model", "forget.jsonl", "retain.jsonl", "rmu", ["method.kappa=16"])
        >>> config.method.kappa, config.train.max_steps
        (16.0, 150)
        >>> srmu.make_config("model", "forget.jsonl", overrides=["train.max_step=20"])
        Traceback (most recent call last):
        srmu.errors.SrmuError: train.max_step is not an option; did you mean train.max_steps?
    """
    named = _method_dict(method) if isinstance(method, Method) else {"name": method}
    topics = {"topic": {"forget": forget, "retain": retain}}
    return build_config({"model": str(model), "method": named, "topics": topics}, overrides)


def rebase_paths(value: Any, folder: Path, key: str = "") -> Any:
    """The values of a tree with its relative paths made absolute, starting at `folder`."""
    if isinstance(value, list):
        return [rebase_paths(item, folder, key) for item in value]
    if isinstance(value, dict) and key != "where":  # which holds the values of a column
        return {name: rebase_paths(item, folder, key if key == "method" else name) for name, item in value.items()}
    named = key == "method" and NAMED_FILE.match(str(value))
    if not isinstance(value, str) or not (named or key in ("model", *PATHS)):
        return value
    try:
        path = folder / Path(value).expanduser()
    except RuntimeError:
        raise SrmuError(f"{value}: there is no such user") from None
    return value if key == "model" and not path.exists() else str(path)  # a hub id stays


def put_override(tree: dict[str, Any], override: str) -> None:
    """Set `a.b.c=value` in a tree; the value is read as YAML, but a path as it is."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise SrmuError(f"{override!r}: expected key=value without spaces, for example method.kappa=8")
    if not text.strip():
        raise SrmuError(f"{override}: expected a value behind the =; null stands for none")
    *parents, last = key.split(".")
    is_path = last in ("model", *PATHS) and text not in ("", "null")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        if not is_path:
            raise SrmuError(f"{override!r}: the value is not YAML") from None
        value = text
    if is_path and (not isinstance(value, list | dict) or os.path.exists(text)):  # noqa: PTH110 - of any length
        value = text
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise SrmuError(f"{override!r}: {parent} holds a value, not further keys")
    tree[last] = value


def find_method(name: str) -> type[Method]:
    """The class of a method: a name in METHODS, or `path/to/file.py:Class`."""
    if name in METHODS:
        return METHODS[name]
    path, _, attribute = name.rpartition(":")
    if not path.endswith(".py"):
        raise SrmuError(f"unknown method {name!r}{suggest_word(name, METHODS)}")
    cls = import_from_file("method", name)
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise SrmuError(f"method {name}: {attribute} is not a Method in that file")
    if inspect.isabstract(cls) or not hasattr(cls, "name") or not hasattr(cls, "paper"):
        raise SrmuError(f"method {name}: a method has a name, a paper, a setup and a loss")
    return cls


def find_key(word: str) -> list[str]:
    """The option that a word is short for, with the key before it: of training, else of a method; or none."""
    owners: list[tuple[str, Any]] = [("train", TrainOptions), *(("method", cls) for cls in METHODS.values())]
    pairs = {(key, one.name) for key, cls in owners for one in dataclasses.fields(cls) if is_short_for(word, one.name)}
    ranked = sorted(pairs, key=lambda pair: (pair[0] == "method", pair[1] != word, len(pair[1]), pair))
    return [".".join(pair) for pair in ranked[:1]]


def explain_error(error: ValidationError, where: str, schema: Any) -> str:
    """The first of pydantic's complaints in one line."""
    first = error.errors(include_url=False)[0]
    if isinstance(cause := first.get("ctx", {}).get("error"), SrmuError):
        return str(cause)
    location = [str(part) for part in first["loc"]]
    key = ".".join([where, *location] if where else location)
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        if len(location) > 1:
            topic = Source if len(location) > 3 else TopicConfig
            schema = {"train": TrainOptions, "purpose": Purpose, "topics": topic}.get(location[0], schema)
        fields = (
            schema.model_fields
            if issubclass(schema, BaseModel)
            else [field.name for field in dataclasses.fields(schema)]
        )
        group = key.removesuffix(location[-1]) if len(location) <= 3 else ""  # of a source's options the name alone
        elsewhere = () if key.count(".") else find_key(location[-1])
        return f"{key} is not an option{suggest_word(location[-1], fields, elsewhere, group)}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{key} is missing from the config"
    shown = first["input"] if isinstance(first["input"], str | int | float) else "that value"
    message = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{key}={shown}: expected {message}"
