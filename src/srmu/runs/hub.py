"""Put an export on the hub: what would be uploaded, and the upload."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from srmu.engine import weights
from srmu.engine.files import format_json
from srmu.errors import SrmuError, first_line
from srmu.runs.model_card import write_model_card
from srmu.runs.run import CARD, Run


def plan_push(run: Run, name: str, last_good: bool = False) -> dict[str, Any]:
    """Which files of a whole export would go where; nothing is written, and no network is used."""
    check_name(name)
    run.require_model(last_good)
    sizes = {file: (run.base / file).stat().st_size for file in weights.list_carried(run.base)}
    sizes |= {CARD: len(write_model_card(run.record).encode()), weights.EXPORTED: len(format_json(run.record).encode())}
    return {"repository": name, "private": True, "files": sizes, "bytes": sum(sizes.values())}


def check_name(name: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if name.count("/") != 1:
        raise SrmuError("--push: expected OWNER/NAME, a user or an organisation and the model's name")


def require_hub(name: str) -> None:
    """SrmuError where nobody is logged in, or the hub does not answer: before the export is written."""
    from huggingface_hub import HfApi

    check_name(name)
    with explain_hub():
        HfApi().whoami()


def push_folder(folder: Path, name: str) -> str:
    """Upload a folder to a model repository, which is made, private, where it is missing; its address."""
    from huggingface_hub import HfApi

    hub = HfApi()
    with explain_hub(f"{folder} is written, but "):
        address = str(hub.create_repo(name, private=True, exist_ok=True))
        hub.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload by srmu export")
    return address


@contextmanager
def explain_hub(kept: str = "") -> Iterator[None]:
    """What the hub refuses, in one line."""
    try:
        yield
    except Exception as error:  # the hub's library raises those of its HTTP library, which its releases change
        raise SrmuError(f"{kept}--push failed: {first_line(error)}; `hf auth login` logs in") from error
