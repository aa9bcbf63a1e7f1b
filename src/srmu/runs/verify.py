"""Compute every digest of a run or an export again, and compare it with the record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from srmu.engine import weights
from srmu.engine.files import sha256, write_whole
from srmu.engine.progress import Watch, ignore_progress
from srmu.errors import SrmuError
from srmu.runs.record import CONFIG, DELTA, RECORD, digest_file, read_record
from srmu.runs.run import Run

SIGNATURE = "record.sig"


def find_record(folder: Path) -> Path:
    """The record of a run's or an export's folder."""
    for name in (RECORD, weights.EXPORTED):
        if (folder / name).is_file():
            return folder / name
    if (folder / CONFIG).is_file():
        Run.open(folder)  # says how to finish it
    raise SrmuError(
        f"{folder} holds no record ({RECORD} of a run, {weights.EXPORTED} of an export): "
        "name the folder of a run, or one that srmu export wrote"
    )


def verify_folder(folder: Path, key: Path | None = None, watch: Watch = ignore_progress) -> dict[str, Any]:
    """Check a run or an export, and count the files and tensors that were compared.

    SrmuError naming everything that is not as recorded. For a run, the base model is read as well,
    once, a piece at a time.
    """
    path = find_record(folder)
    record = read_record(path)
    if key is not None:
        check_signature(path, key)
    if path.name == RECORD:
        differences = [*compare_run(folder, record, watch)]
        tensors = len(record["change"]["tensors"]) + sum(
            len(file["tensors"]) for file in record["base"]["files"].values()
        )
        files = len(record["files"]) + len(record["base"]["files"])
    else:
        differences = [*compare_export(folder, record, watch)]
        tensors = len(record["change"]["tensors"]) + record["change"]["others"]
        files = len(record["base"]["files"])
    if differences:
        listed = "; ".join(differences[:20])
        raise SrmuError(f"{folder}: {len(differences)} not as recorded: {listed}")
    return {"record": record["id"], "files": files, "tensors": tensors, "signed": key is not None}


def compare_run(folder: Path, record: Mapping[str, Any], watch: Watch) -> Iterator[str]:
    """What in a run's folder, or in its base model, is not as recorded."""
    for name, expected in record["files"].items():
        if not (folder / name).is_file():
            yield f"{name} is missing"
        elif name != DELTA and sha256(folder / name) != expected:
            yield f"{name} has changed"
    if DELTA in record["files"] and (folder / DELTA).is_file():
        after = {name: entry["after"] for name, entry in record["change"]["tensors"].items()}
        yield from compare_tensors(folder / DELTA, {"sha256": record["files"][DELTA], "tensors": after})
    known = {*record["files"], RECORD, SIGNATURE}
    for path in sorted(folder.iterdir()):
        if path.name not in known:
            yield f"{path.name} is not in the record"
    base = weights.locate_model(record["model"], record["reproduction"]["config"]["revision"])
    yield from compare_base(base, record["base"]["files"], watch)


def compare_base(folder: Path, files: Mapping[str, Any], watch: Watch) -> Iterator[str]:
    """What in a base model is not as recorded."""
    with watch("hashing the base model", len(files)) as tick:
        for name, file in files.items():
            if not (folder / name).is_file():
                yield f"{name} of the base model is missing"
            else:
                for difference in compare_tensors(folder / name, file):
                    yield f"base model: {difference}"
            tick(name)


def compare_export(folder: Path, record: Mapping[str, Any], watch: Watch) -> Iterator[str]:
    """What in an export is not the base model with the delta on it."""
    after = {name: entry["after"] for name, entry in record["change"]["tensors"].items()}
    own = record["exported"]
    expected = {name: file for name, file in record["base"]["files"].items() if name not in own}
    with watch("hashing the export", len(expected)) as tick:
        for name, file in expected.items():
            if not (folder / name).is_file():
                yield f"{name} is missing"
                continue
            changed = {k: after[k] for k in file["tensors"] if k in after}
            patched = {**file, "tensors": file["tensors"] | changed}
            if changed:
                patched["sha256"] = ""  # header and tensors decide
            yield from compare_tensors(folder / name, patched)
            tick(name)
    for name, digest in own.items():
        if not (folder / name).is_file():
            yield f"{name} is missing"
        elif sha256(folder / name) != digest:
            yield f"{name} has changed"
    known = {*expected, *own, weights.EXPORTED, SIGNATURE}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder).as_posix() not in known:
            yield f"{path.relative_to(folder).as_posix()} is not in the record"


def compare_tensors(path: Path, expected: Mapping[str, Any]) -> Iterator[str]:
    """What in a file is not as expected; in a safetensors file, which tensors."""
    if path.suffix != ".safetensors":
        if sha256(path) != expected["sha256"]:
            yield f"{path.name} has changed"
        return
    try:
        actual = digest_file(path)
    except SrmuError as error:
        yield str(error)
        return
    differs = False
    for name, digest in expected["tensors"].items():
        if name not in actual["tensors"]:
            yield f"{path.name} lacks the tensor {name}"
            differs = True
        elif actual["tensors"][name] != digest:
            yield f"{path.name}: the tensor {name} has changed"
            differs = True
    for name in sorted(set(actual["tensors"]) - set(expected["tensors"])):
        yield f"{path.name}: the tensor {name} is not in the record"
        differs = True
    if not differs and any(expected.get(part) and actual[part] != expected[part] for part in ("header", "sha256")):
        yield f"{path.name}: its header has changed"


def check_signature(path: Path, key: Path) -> None:
    """SrmuError where the public key's owner did not sign this record."""
    ed25519, serialization = import_cryptography()
    public = load_key(key, serialization.load_pem_public_key, ed25519.Ed25519PublicKey, "public")
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
    ed25519, serialization = import_cryptography()
    without_password = partial(serialization.load_pem_private_key, password=None)
    path = find_record(folder)
    private = load_key(key, without_password, ed25519.Ed25519PrivateKey, "private")
    write_whole(path.with_name(SIGNATURE), private.sign(path.read_bytes()).hex() + "\n")
    return path.with_name(SIGNATURE)


def import_cryptography() -> tuple[Any, Any]:
    """The library's keys and key files; SrmuError where it is not installed."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise SrmuError("signatures need a library: pip install 'srmu[sign]'") from None
    return ed25519, serialization


def load_key(path: Path, load: Callable[[bytes], Any], kind: type, what: str) -> Any:
    """An Ed25519 key from a PEM file."""
    try:
        key = load(path.read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise SrmuError(f"{path} is no {what} key in PEM form: {type(error).__name__}") from None
    if not isinstance(key, kind):
        raise SrmuError(f"{path} is no Ed25519 {what} key; openssl genpkey -algorithm ed25519")
    return key
