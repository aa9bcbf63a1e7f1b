"""The user's own tasks, as lm-eval's YAML files describe them: tasks, groups, tags and the files that they read."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from srmu.engine.files import find_paths, sha256
from srmu.errors import SrmuError, suggest_path

FILE_FORMATS = ("json", "csv", "parquet", "text", "arrow")  # dataset_path of a task kept in local files
SIGNS = re.compile(r"[^\w\s./-]")  # that `datasets` may take for a pattern or an address
Config = dict[str, Any]
Kind = Literal["folder", "file", "other"]
# of the name of data and its kind: a folder, a local file, or another, which may be of the hub
Change = Callable[[str, Kind], list[str]]


class TaskLoader(yaml.SafeLoader):
    """YAML whose `!function` is kept, and never run."""


class FunctionName(str):
    """What a YAML file names as code."""


TaskLoader.add_multi_constructor("!", lambda loader, tag, node: FunctionName(f"!{tag} {node.value}"))


class LocalTask(NamedTuple):
    """A task or a group of a folder, or a tag, which has no config; configs name files by their absolute paths."""

    config: Config
    path: Path = Path()  # of its YAML file
    members: Sequence[str] = ()  # of a group or a tag: the names of others


Local = dict[str, LocalTask]


def read_local_tasks(folder: Path | None) -> Local:
    """The tasks, groups and tags described under a folder, by name."""
    if folder and not folder.is_dir():
        raise SrmuError(f"tasks folder {folder}: there is no such folder{suggest_path(folder)}")
    tasks: Local = {}
    tags: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.yaml")) if folder else ():
        if any(part.startswith((".", "__")) for part in path.relative_to(folder or path).parts):
            continue  # copies that an editor keeps
        config = read_task_file(path, ())
        kind = "group" if isinstance(config.get("task"), list) or "task" not in config else "task"
        name = config.get(kind)
        if not isinstance(name, str):
            continue  # another kind of file
        if name in tasks:
            raise SrmuError(f"task file {path}: another file also has task {name!r}; rename one")
        tasks[name] = LocalTask(config, path, list_members(config))
        # `group` of one task is how earlier versions of lm-eval wrote a tag
        for tag in (*as_list(config.get("tag")), *(as_list(config.pop("group", None)) if kind == "task" else ())):
            tags.setdefault(str(tag), []).append(name)
    return {tag: LocalTask({}, members=names) for tag, names in tags.items()} | tasks


def read_task_file(path: Path, seen: tuple[Path, ...]) -> Config:
    """The values of a YAML file over those of the files that it includes; {} where it holds no keys."""
    if path.resolve() in seen:
        raise SrmuError(f"task file {path}: it includes itself")
    try:
        config = yaml.load(path.read_bytes(), TaskLoader)
        if not isinstance(config, dict):
            return {}
        config = map_data(config, partial(place_data, folder=path.parent.resolve()))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SrmuError(f"task file {path}: {getattr(error, 'problem', error)}") from error
    merged: Config = {}
    for name in as_list(config.pop("include", None)):
        merged |= read_task_file(path.parent / str(name), (*seen, path.resolve()))
    return merged | config


def map_data(config: Config, change: Change, more: Config | None = None) -> Config:
    """A config and those inside it, names of data replaced by what `change` gives, and `more` kwargs for local data."""
    changed = dict(config)
    if isinstance(inside := config.get("task"), list):
        changed["task"] = [map_data(one, change, more) if isinstance(one, dict) else one for one in inside]
    path, kwargs = config.get("dataset_path"), config.get("dataset_kwargs")
    in_files = path in FILE_FORMATS
    if isinstance(path, str) and not in_files:
        (changed["dataset_path"],) = change(path, "folder")
    if not isinstance(kwargs, dict | type(None)):
        raise SrmuError("dataset_kwargs: expected keys and values like data_files: {test: quiz.jsonl}")
    if kwargs is not None:
        is_local = in_files or Path(str(path)).is_absolute()
        changed["dataset_kwargs"] = kwargs = kwargs | ((more or {}) if is_local else {})
        if isinstance(kwargs.get("data_dir"), str):
            (kwargs["data_dir"],) = change(kwargs["data_dir"], "folder")
        if files := kwargs.get("data_files"):
            splits = files if isinstance(files, dict) else {"train": files}
            kind: Kind = "file" if in_files else "other"
            kwargs["data_files"] = {
                split: [one for name in as_list(names) for one in change(str(name), kind)]
                for split, names in splits.items()
            }
    return changed


def place_data(name: str, kind: Kind, folder: Path) -> list[str]:
    """The absolute paths that a name means in the task's folder, a folder's also in the current one; else the name."""
    found = find_paths(name, folder)
    if kind == "folder":
        found = [path for path in (*found, Path(name).resolve()) if path.is_dir()][:1]
    return list(map(str, found)) or [name]


def digest_data(name: str, kind: Kind) -> list[str]:
    """What a file or folder holds; SrmuError where it is not there."""
    path = Path(name)
    if not path.is_absolute():
        if kind == "file" and "://" not in name:
            raise SrmuError(f"its data file {name} does not exist")
        return [name]
    inside = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [sha256(*(part for file in inside for part in (file.relative_to(path).as_posix().encode(), file)))]


def copy_data(name: str, kind: Kind, folder: Path) -> list[str]:
    """Data as it is, or its copy in `folder` where `datasets` would take its path for a pattern."""
    path = Path(name)
    if not (path.is_absolute() and SIGNS.search(name) and path.exists()):
        return [name]
    copy = folder / f"{len([*folder.iterdir()])}{path.suffix}"
    (shutil.copytree if path.is_dir() else shutil.copyfile)(path, copy)
    return [str(copy)]


def list_members(config: Config) -> list[str]:
    """The names of the tasks and groups that a group's config names, those inside it too."""
    inside = config["task"] if isinstance(config.get("task"), list) else []
    parts = [one if isinstance(one, dict) else {"task": one} for one in inside]
    names = [name for one in parts for name in (one.get("task"), one.get("group"), *list_members(one))]
    return [name for name in names if isinstance(name, str)]


def find_parts(name: str, local: Local) -> Local:
    """A task, group or tag, with all that it takes from the folder."""
    parts: Local = {}
    open_names = [name]
    while open_names:
        if (name := open_names.pop()) in local and name not in parts:
            parts[name] = local[name]
            open_names += local[name].members
    return parts


def describe_local(name: str, local: Local) -> str:
    """All that a folder says of a task, with what its files hold in place of where they are."""
    try:
        configs = {key: map_data(task.config, digest_data) for key, task in find_parts(name, local).items()}
    except (SrmuError, OSError) as error:
        raise SrmuError(f"task {name!r}: {error}") from None
    return json.dumps(configs, skipkeys=True, default=str)


def write_parts(name: str, local: Local, scratch: Path) -> Path:
    """Write a task and its parts for lm-eval, their data under plain names; SrmuError where one names code."""
    folder, data = scratch / "tasks", scratch / "data"
    folder.mkdir()
    data.mkdir()
    own = {"cache_dir": str(scratch / "cache"), "keep_in_memory": True}  # the user's cache gains and lends nothing
    for number, task in enumerate(task for task in find_parts(name, local).values() if task.config):
        try:
            text = yaml.safe_dump(map_data(task.config, partial(copy_data, folder=data), own), allow_unicode=True)
        except yaml.representer.RepresenterError as error:
            what = f"{error.args[1]} is code, which srmu does not run"
            raise SrmuError(f"task file {task.path}: {what}; write a template instead") from None
        (folder / f"{number}.yaml").write_text(text, encoding="utf-8")
    return folder


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
