"""Compute every digest of a run or an export again, or make the run again, and compare with the record."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from srmu.engine import weights
from srmu.engine.files import write_json, write_whole
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError, suggest_path
from srmu.runs import record as audit
from srmu.runs.config import build_config
from srmu.runs.plan import plan_run
from srmu.runs.run import Run, run_plan

SIGNATURE = "record.sig"


def find_record(folder: Path) -> Path:
    """The record of a run's or an export's folder."""
    for name in (audit.RECORD, weights.EXPORTED):
        if (folder / name).is_file():
            return folder / name
    if (folder / audit.CONFIG).is_file():
        Run.open(folder)  # says how to finish it
    advice = "name the folder of a run, or of a whole export; a rounded model or an adapter is checked by its run"
    holds = f"{folder} holds no record ({audit.RECORD} of a run, {weights.EXPORTED} of an export)"
    raise SrmuError(f"{holds}{suggest_path(folder) or f': {advice}'}")


def verify_folder(folder: Path, key: Path | None = None, watch: Watch = ignore_progress) -> dict[str, Any]:
    """Check a run, with its base model, or an export, and count the files and tensors that were compared.

    SrmuError naming everything that is not as recorded.
    """
    path = find_record(folder)
    record = audit.read_record(path)
    if key is not None:
        check_signature(path, key)
    after = {name: entry["after"] for name, entry in record["change"]["tensors"].items()}
    base, is_run = record["base"]["files"], path.name == audit.RECORD
    listed = record["files" if is_run else "exported"]
    own: dict[str, dict[str, Any]] = {name: {"sha256": digest} for name, digest in listed.items()}
    expected = {"": (folder, own)}
    if is_run:
        if audit.DELTA in own:
            own[audit.DELTA]["tensors"] = after
        place = weights.locate_model(record["model"], record["reproduction"]["config"]["revision"])
        expected["base model: "] = place, base
    else:
        for name, file in base.items():
            changed = {n: after[n] for n in file["tensors"] if n in after}
            own.setdefault(name, file | {"tensors": file["tensors"] | changed})  # the card is the export's own
    differences = [f"{whose}{text}" for whose, files in expected.items() for text in compare_files(*files, watch)]
    known = {*own, path.name, SIGNATURE, audit.RESULTS_LOCK}
    inside = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
    differences += [f"{name} is not in the record" for name in inside if name not in known]
    if differences:
        raise SrmuError(f"{folder}: {len(differences)} not as recorded: {'; '.join(differences[:20])}")
    compared = [file for _, files in expected.values() for file in files.values()]
    tensors = sum(len(file.get("tensors", ())) for file in compared)
    return {"record": record["id"], "files": len(compared), "tensors": tensors, "signed": key is not None}


def compare_files(folder: Path, expected: dict[str, dict[str, Any]], watch: Watch) -> Iterator[str]:
    """How the files of a folder differ from what is expected of them."""
    with watch(f"hashing {folder.name}", len(expected)) as tick:
        for name, file in expected.items():
            if (folder / name).is_file():
                yield from compare_digests(folder / name, file)
            else:
                yield f"{name} is missing"
            tick(name)


def compare_digests(path: Path, expected: dict[str, Any]) -> Iterator[str]:
    """How a file differs from what is expected, tensor by tensor where the record lists its tensors."""
    try:
        actual = audit.digest_file(path)
    except SrmuError as error:
        yield str(error)
        return
    then, now = expected.get("tensors", actual["tensors"]), actual["tensors"]
    changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    for name in changed:
        what = "is not in the record" if name not in then else "has changed" if name in now else "is missing"
        yield f"{path.name}: the tensor {name} {what}"
    mark = "header" if expected.get("header") else "sha256"  # beside tensors the header decides: an export has others
    if not changed and actual[mark] != expected[mark]:
        yield f"{path.name}{': its header' if expected.get('tensors') else ''} has changed"


def rerun_record(
    path: Path, overrides: Sequence[str] = (), watch: Watch = ignore_progress
) -> tuple[Run, dict[str, Any]]:
    """Make the run of a record again, in `again/` beside it, and compare the two.

    The comparison (`same`; how tensors, data and environments differ) is written into the record. SrmuError where the
    base model is not that of the record. `overrides` may change what does not decide the result, such as `runs_dir`.
    """
    record = audit.read_record(path)
    again = f"runs_dir={path.resolve().parent.parent / 'again'}"
    plan = plan_run(build_config(record["reproduction"]["config"], [again, *overrides]))
    added = {*audit.digest_folder(plan.base, watch)} - {*record["base"]["files"]}
    if foreign := audit.list_foreign_files(plan.base, record, watch) or sorted(added):
        raise SrmuError(f"{plan.base} is not the base model of {path}: its {foreign[0]} differs; nothing was run")
    if plan.folder.resolve() == path.resolve().parent:
        raise SrmuError("runs_dir: name another folder than the record's own")
    run = run_plan(plan, watch=watch)
    now = run.record
    old, new = record["change"]["tensors"], now["change"]["tensors"]
    outcome: dict[str, Any] = {
        "same": record["reproduction"]["expected"] == now["reproduction"]["expected"],
        "tensors": [name for name, then in old.items() if new.get(name, {}).get("after") != then["after"]],
        "differences": [],
    }
    if not outcome["same"]:
        outcome["differences"] = list_differences("", record["environment"], now["environment"])
        outcome["differences"] += list_differences("data.", record["data"], now["data"])
    rerun = {"when": datetime.now(UTC).isoformat(timespec="seconds"), **outcome}
    reproduction = record["reproduction"] | {"rerun": rerun}
    write_json(path, audit.seal_record(record | {"reproduction": reproduction}))
    return run, outcome


def list_differences(prefix: str, one: Any, other: Any) -> list[str]:
    """Each leaf that differs between two trees, like `torch: 2.13.0 then, 2.14.0 now`."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = dict.fromkeys([*one, *other])
        return [text for key in keys for text in list_differences(f"{prefix}{key}.", one.get(key), other.get(key))]
    return [] if one == other else [f"{prefix.rstrip('.')}: {one} then, {other} now"]


def check_signature(path: Path, key: Path) -> None:
    """SrmuError where the public key's owner did not sign this record."""
    public = load_key(key, "public")
    signature = path.with_name(SIGNATURE)
    if not signature.is_file():
        raise SrmuError(f"{path.parent} is not signed: it has no {SIGNATURE}; --sign makes one")
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(bytes.fromhex(signature.read_text().strip()), path.read_bytes())
    except (InvalidSignature, ValueError):
        raise SrmuError(f"{signature} is not the signature of {path.name} by {key}") from None


def sign_record(folder: Path, key: Path) -> Path:
    """Write the record's Ed25519 signature beside it."""
    path = find_record(folder)
    signature = path.with_name(SIGNATURE)
    write_whole(signature, load_key(key, "private").sign(path.read_bytes()).hex() + "\n")
    return signature


def load_key(path: Path, what: Literal["private", "public"]) -> Any:
    """An Ed25519 key from a PEM file."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise SrmuError("signatures need a library: pip install 'srmu[sign]'") from None
    try:
        data, load = path.read_bytes(), serialization.load_pem_public_key
        key = load(data) if what == "public" else serialization.load_pem_private_key(data, password=None)
    except FileNotFoundError:
        raise SrmuError(f"{path}: no such file; expected a {what} Ed25519 key in PEM form") from None
    except (OSError, ValueError, TypeError) as error:
        raise SrmuError(f"{path} is no {what} key in PEM form: {type(error).__name__}") from None
    if not isinstance(key, ed25519.Ed25519PublicKey | ed25519.Ed25519PrivateKey):
        raise SrmuError(f"{path} is not an Ed25519 {what} key; make one: openssl genpkey -algorithm ed25519")
    return key
