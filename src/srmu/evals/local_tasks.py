"""Tasks of one's own, as lm-eval's YAML files describe them: tasks, groups, tags, and the files that they ask from."""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from srmu.engine.files import find_paths, sha256
from srmu.errors import SrmuError

FILE_FORMATS = ("json", "csv", "parquet", "text", "arrow")  # dataset_path of a task kept in local files
SIGNS = re.compile(r"[^\w\s./-]")  # that `datasets` may take for more than a name
Config = dict[str, Any]


class TaskLoader(yaml.SafeLoader):
    """YAML whose `!function` is kept, and never run."""


class FunctionName(str):
    """What a YAML file names as code."""


TaskLoader.add_multi_constructor("!", lambda loader, tag, node: FunctionName(f"!{tag} {node.value}"))


class LocalTask(NamedTuple):
    """A task or a group of a folder, or a tag, which has no config; configs name files by their whole paths."""

    config: Config
    path: Path = Path()  # of its YAML file
    members: Sequence[str] = ()  # of a group or a tag: the names of others


Local = dict[str, LocalTask]


def read_local_tasks(folder: Path | None) -> Local:
    """The tasks, groups and tags described under a folder, by name."""
    if folder and not folder.is_dir():
        raise SrmuError(f"tasks folder {folder}: there is no such folder")
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
            raise SrmuError(f"task file {path}: another file has task {name!r} too")
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
        config = place_files(config, path.parent.resolve())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SrmuError(f"task file {path}: {getattr(error, 'problem', error)}") from error
    merged: Config = {}
    for name in as_list(config.pop("include", None)):
        merged |= read_task_file(path.parent / str(name), (*seen, path.resolve()))
    return merged | config


def place_files(config: Config, folder: Path) -> Config:
    """A config whose files and folders are named by their whole paths, where they lie in `folder`."""
    placed = dict(config)
    if isinstance(config.get("task"), list):
        placed["task"] = [place_files(one, folder) if isinstance(one, dict) else one for one in config["task"]]
    if isinstance(name := config.get("dataset_path"), str) and name not in FILE_FORMATS:
        placed["dataset_path"] = place_folder(name, folder)
    kwargs = config.get("dataset_kwargs")
    if not isinstance(kwargs, dict | type(None)):
        raise SrmuError("dataset_kwargs: expected keys and values like data_files: {test: quiz.jsonl}")
    if kwargs:
        placed["dataset_kwargs"] = kwargs = dict(kwargs)
        if isinstance(name := kwargs.get("data_dir"), str):
            kwargs["data_dir"] = place_folder(name, folder)
        if files := kwargs.get("data_files"):
            splits = files if isinstance(files, dict) else {"train": files}
            kwargs["data_files"] = {
                split: [path for name in as_list(names) for path in map(str, find_paths(str(name), folder) or [name])]
                for split, names in splits.items()
            }
    return placed


def place_folder(name: str, folder: Path) -> str:
    """The whole path of a folder that is named from that of the task, or from where one is; else the name."""
    here = (Path(name).resolve(),) if Path(name).is_dir() else ()
    return str(next((path for path in (*find_paths(name, folder), *here) if path.is_dir()), name))


def list_members(config: Config) -> list[str]:
    """The names of the tasks and groups that a group's config names, those inside it too."""
    inside = [one for each in walk_configs(config) if isinstance(each.get("task"), list) for one in each["task"]]
    named = [(one.get("task"), one.get("group")) if isinstance(one, dict) else (one,) for one in inside]
    return [name for names in named for name in names if isinstance(name, str)]


def find_parts(name: str, local: Local) -> Local:
    """A task, group or tag, with all that it takes from the folder."""
    parts: Local = {}
    open_names = [name]
    while open_names:
        if (name := open_names.pop()) in local and name not in parts:
            parts[name] = local[name]
            open_names += local[name].members
    return parts


def walk_configs(config: Config) -> Iterator[Config]:
    """A config, and those inside it."""
    yield config
    for one in as_list(config.get("task")):
        if isinstance(one, dict):
            yield from walk_configs(one)


def list_data(config: Config) -> Iterator[Path]:
    """The local files and folders that a config asks from; SrmuError where one is not there."""
    kwargs: Config = config.get("dataset_kwargs") or {}
    splits = kwargs.get("data_files") or {}
    for name in (one for names in splits.values() for one in names):
        path = Path(name)
        if path.is_absolute():
            yield path
        elif config.get("dataset_path") in FILE_FORMATS and "://" not in name:
            raise SrmuError(f"its data file {name} does not exist")
    for name in (config.get("dataset_path"), kwargs.get("data_dir")):
        if isinstance(name, str) and Path(name).is_absolute() and Path(name).is_dir():
            yield Path(name)


def describe_local(name: str, local: Local) -> str:
    """All that a folder says of a task, with what its files hold in place of where they are."""
    configs = {key: task.config for key, task in find_parts(name, local).items()}
    text = json.dumps(configs, skipkeys=True, default=str)
    try:
        for path in [path for config in configs.values() for one in walk_configs(config) for path in list_data(one)]:
            inside = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
            parts = (part for file in inside for part in (file.relative_to(path).as_posix().encode(), file))
            text = text.replace(json.dumps(str(path)), sha256(*parts))
    except (SrmuError, OSError) as error:
        raise SrmuError(f"task {name!r}: {error}") from None
    return text


def write_parts(name: str, local: Local, scratch: Path) -> Path:
    """Write a task and its parts for lm-eval, their data under plain names; SrmuError where one names code."""
    folder = scratch / "tasks"
    folder.mkdir()
    for number, task in enumerate(task for task in find_parts(name, local).values() if task.config):
        text = yaml.safe_dump(copy_data(task.config, scratch / "data", task.path), allow_unicode=True)
        (folder / f"{number}.yaml").write_text(text, encoding="utf-8")
    return folder


def copy_data(value: Any, folder: Path, path: Path) -> Any:
    """A task's values, with its data kept in `folder` where `datasets` would take a path for a pattern."""
    if isinstance(value, FunctionName):
        raise SrmuError(f"task file {path}: {value} is code, which srmu does not run; write a template instead")
    if isinstance(value, list):
        return [copy_data(one, folder, path) for one in value]
    if isinstance(value, dict):
        values = {key: copy_data(one, folder, path) for key, one in value.items()}
        if isinstance(value.get("dataset_kwargs"), dict):
            local = value.get("dataset_path") in FILE_FORMATS or Path(str(value.get("dataset_path"))).is_absolute()
            # the user's cache gains and lends nothing
            own = {"cache_dir": str(folder.parent / "cache"), "keep_in_memory": True} if local else {}
            values["dataset_kwargs"] = values["dataset_kwargs"] | own
        return values
    if isinstance(value, str) and Path(value).is_absolute() and SIGNS.search(value) and Path(value).exists():
        folder.mkdir(exist_ok=True)
        copy = folder / f"{len([*folder.iterdir()])}{Path(value).suffix}"
        (shutil.copytree if Path(value).is_dir() else shutil.copyfile)(value, copy)
        return str(copy)
    return value


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
