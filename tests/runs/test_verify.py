"""A record says what was done; whatever is not as it says is found, and named."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from safetensors.torch import load_file, save_file

from helpers.models import pico_module, texts, word_tokenizer, write_jsonl
from srmu.engine import weights
from srmu.engine.activation_cache import flat_bytes
from srmu.errors import SrmuError
from srmu.runs import record as audit
from srmu.runs.config import Config, Purpose, make_config
from srmu.runs.model_card import summarise_record, write_model_card
from srmu.runs.prices import describe_prices, describe_search
from srmu.runs.run import Run, unlearn_config
from srmu.runs.verify import rerun_record, verify_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in four shards, a run on it and its export."""
    folder = tmp_path_factory.mktemp("made")
    pico_module().save_pretrained(folder / "model", max_shard_size="40KB")
    word_tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "README.md").write_text("# A model, as hubs have them: an export has a card of its own\n")
    settings = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(settings | {"license": "apache-2.0"}))
    for number, role in enumerate(("forget", "retain")):
        write_jsonl(folder / f"{role}.jsonl", texts(12, seed=number))
    run = unlearn_config(config(folder))
    run.export(folder / "out")
    shutil.move(run.folder, folder / "run")
    return folder


def config(folder: Path, *overrides: str) -> Config:
    options = ["method.layer=2", "train.max_steps=3", "train.learning_rate=0.01", "cache=none"]
    purpose = ["purpose.reason=a request", "purpose.not_covered=[other-model]"]
    sources = [folder / "forget.jsonl", folder / "retain.jsonl"]
    runs_dir = f"runs_dir={folder / 'runs'}"
    return make_config(str(folder / "model"), *sources, "srmu", [*options, *purpose, runs_dir, *overrides])


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil; its run's record names the model of `made`."""
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run" / "record.json").read_text())


def test_what_is_whole_passes(made: Path) -> None:
    found = verify_folder(made / "run")
    changed = record(made)["changed"]
    where = weights.list_shards(made / "model")
    assert found["tensors"] == len(changed) + len(where)
    assert verify_folder(made / "out")["tensors"] == len(where)


def test_the_record_is_what_the_schema_says(made: Path) -> None:
    schema = audit.RECORD_SCHEMA
    assert set(schema["$defs"]["Purpose"]["properties"]) == set(Purpose.model_fields)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(record(made), schema)
    earlier = record(made)
    assert earlier["effect"].pop("broken") is False  # which earlier records do not say
    jsonschema.validate(earlier, schema)
    wrong = record(made) | {"steps": "many"}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


def test_a_licence_of_the_config_is_recorded(made: Path) -> None:
    assert record(made)["base"]["licence"] == "apache-2.0"


def test_the_record_tells_of_the_change(made: Path) -> None:
    told = record(made)
    run = Run.open(made / "run")
    before = {k: v for p in (made / "model").glob("*.safetensors") for k, v in load_file(p).items()}
    assert set(told["change"]["tensors"]) == set(run.delta) == set(told["changed"])
    for name, entry in told["change"]["tensors"].items():
        old, new = before[name], run.delta[name]
        assert entry["before"] == audit.sha256(flat_bytes(old))
        assert entry["after"] == audit.sha256(flat_bytes(new))
        assert entry["relative_norm"] == pytest.approx(float((new - old).norm() / old.norm()))
        assert entry["share_changed"] == pytest.approx(float((new != old).float().mean()))
    assert told["change"]["others"] == len(before) - len(run.delta)
    assert told["purpose"]["reason"] == "a request"
    assert told["flops"] > 0
    assert set(told["base"]["files"]) == set(weights.list_carried(made / "model"))


def test_the_purpose_decides_no_result(made: Path) -> None:
    assert config(made).id == config(made, "purpose.reason=another").id


def test_overlap_is_the_share_of_forget_pairs(made: Path) -> None:
    def pairs(role: str) -> set[tuple[str, str]]:
        rows = [json.loads(line)["text"].split() for line in (made / f"{role}.jsonl").open()]
        # the tokenizer puts <s> first
        return {p for row in rows for p in zip(["<s>", *row], row, strict=False)}

    shared = len(pairs("forget") & pairs("retain")) / len(pairs("forget"))
    assert record(made)["overlap"]["topic"] == pytest.approx(shared)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def swap(folder: Path) -> None:
    """Exchange two tensors of the same shape in a shard."""
    path = folder / "model-00001-of-00004.safetensors"
    names = [n for n, e in weights.read_header(path)[0].items() if len(e["shape"]) == 2]
    tensors = load_file(path)
    pairs = [(a, b) for a in names for b in names if a < b and tensors[a].shape == tensors[b].shape]
    one, other = pairs[0]
    weights.patch_file(path, {one: tensors[other], other: tensors[one]})


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


SHARD = "model-00001-of-00004.safetensors"
SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "export: a flipped bit": (lambda f: flip(f / "out" / SHARD, -1), "the tensor .* has changed"),
    "export: a swapped tensor": (lambda f: swap(f / "out"), "the tensor .* has changed"),
    "export: a header": (lambda f: flip(f / "out" / SHARD, 9), "damaged|header|tensor"),
    "export: an extra file": (lambda f: (f / "out" / "extra.bin").write_bytes(b"x"), "extra.bin is not in the record"),
    "export: a missing shard": (lambda f: (f / "out" / SHARD).unlink(), f"{SHARD} is missing"),
    "export: the tokenizer": (lambda f: flip(f / "out" / "tokenizer.json", 200), "tokenizer.json has changed"),
    "export: the card": (lambda f: flip(f / "out" / "README.md", 5), "README.md has changed"),
    "export: the record": (lambda f: edit(f / "out" / weights.EXPORTED, steps=9), "was edited after it was written"),
    "run: the delta": (
        lambda f: flip(f / "run" / "delta.safetensors", -1),
        "delta.safetensors: the tensor .* has changed",
    ),
    "run: a metric": (lambda f: flip(f / "run" / "metrics.jsonl", 20), "metrics.jsonl has changed"),
    "run: the config": (lambda f: flip(f / "run" / "config.yaml", 20), "config.yaml has changed"),
    "run: no state": (lambda f: (f / "run" / "state.safetensors").unlink(), "state.safetensors is missing"),
    "run: an extra file": (lambda f: (f / "run" / "notes.txt").write_text("x"), "notes.txt is not in the record"),
    "run: the record": (
        lambda f: edit(f / "run" / "record.json", stop_reason="fine"),
        "was edited after it was written",
    ),
    "run: no record": (lambda f: (f / "run" / "record.json").unlink(), "not a finished run"),
    "run: half a record": (lambda f: (f / "run" / "record.json").write_text("{"), r"record\.json is damaged"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_is_spoilt_is_found_and_named(copy: Path, case: str) -> None:
    spoil, says = SPOILT[case]
    spoil(copy)
    with pytest.raises(SrmuError, match=says) as error:
        verify_folder(copy / ("out" if case.startswith("export") else "run"))
    assert "\n" not in str(error.value)


def test_every_bit_counts(copy: Path) -> None:
    """Any flipped bit of an export's weights is found, wherever it is."""
    path = copy / "out" / SHARD
    size = path.stat().st_size
    for place in range(0, size, size // 25):
        flip(path, place)
        with pytest.raises(SrmuError, match=SHARD):
            verify_folder(copy / "out")
        flip(path, place)
    verify_folder(copy / "out")


def test_a_base_that_changed_is_found(copy: Path) -> None:
    told = record(copy)
    moved = audit.seal_record(told | {"model": str(copy / "model")})
    (copy / "run" / "record.json").write_text(json.dumps(moved))
    verify_folder(copy / "run")
    flip(copy / "model" / "model-00003-of-00004.safetensors", -1)
    with pytest.raises(SrmuError, match=r"base model: .*00003.*: the tensor .* has changed"):
        verify_folder(copy / "run")


def test_an_unknown_tensor_is_named(copy: Path) -> None:
    path = copy / "run" / "delta.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"new": next(iter(tensors.values())).clone()}, path)
    with pytest.raises(SrmuError, match="the tensor new is not in the record"):
        verify_folder(copy / "run")


def test_signed(copy: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from srmu.runs.verify import sign_record

    def keys(name: str) -> tuple[Path, Path]:
        key = Ed25519PrivateKey.generate()
        kind = forms.PrivateFormat.PKCS8
        (tmp_path / name).write_bytes(key.private_bytes(forms.Encoding.PEM, kind, forms.NoEncryption()))
        public = key.public_key().public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / f"{name}.pub").write_bytes(public)
        return tmp_path / name, tmp_path / f"{name}.pub"

    private, public = keys("mine")
    _, other = keys("other")
    with pytest.raises(SrmuError, match="is not signed"):
        verify_folder(copy / "run", public)
    sign_record(copy / "run", private)
    assert verify_folder(copy / "run", public)["signed"]
    with pytest.raises(SrmuError, match="is not the signature"):
        verify_folder(copy / "run", other)
    with pytest.raises(SrmuError, match="no private key in PEM form"):
        sign_record(copy / "run", public)
    with pytest.raises(SrmuError, match="no public key in PEM form"):
        verify_folder(copy / "run", copy / "run" / "config.yaml")
    # A record that somebody sealed anew fits its seal, but not the signature.
    forged = audit.seal_record(record(copy) | {"stop_reason": "fine"})
    (copy / "run" / "record.json").write_text(audit_text(forged))
    verify_folder(copy / "run")
    with pytest.raises(SrmuError, match="is not the signature"):
        verify_folder(copy / "run", public)


def test_signing_without_the_library(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("cryptography")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(SrmuError, match=r"pip install 'srmu\[sign\]'"):
        verify_folder(made / "run", made / "key.pub")


def audit_text(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def test_made_again_from_its_record(copy: Path) -> None:
    again, found = rerun_record(copy / "run" / "record.json")
    assert found == {"same": True, "tensors": [], "differences": []}
    assert again.folder.parent == copy / "again"
    outcome = record(copy)["reproduction"]["rerun"]
    assert outcome["same"] is True
    verify_folder(copy / "run")  # the outcome is sealed, too


def test_a_rerun_that_differs_says_how(copy: Path) -> None:
    told = record(copy)
    changed = told["change"] | {"tensors": {n: t | {"after": "0" * 64} for n, t in told["change"]["tensors"].items()}}
    environment = told["environment"] | {"threads": 99}
    environment["packages"] = environment["packages"] | {"torch": "1.0"}
    expected = told["reproduction"] | {"expected": {"delta.safetensors": "0" * 64}}
    forged = {"change": changed, "environment": environment, "reproduction": expected}
    path = copy / "run" / "record.json"
    path.write_text(audit_text(audit.seal_record(told | forged)))
    _, found = rerun_record(path, [f"runs_dir={copy / 'elsewhere'}"])
    assert not found["same"]
    assert found["tensors"] == told["changed"]
    now = told["environment"]
    assert f"threads: 99 then, {now['threads']} now" in found["differences"]
    assert f"packages.torch: 1.0 then, {now['packages']['torch']} now" in found["differences"]


def test_a_rerun_needs_the_same_base(copy: Path) -> None:
    told = record(copy)
    told["base"]["files"]["config.json"]["sha256"] = "0" * 64
    path = copy / "run" / "record.json"
    path.write_text(audit_text(audit.seal_record(told)))
    with pytest.raises(SrmuError, match=r"is not the base model .*config.json differs"):
        rerun_record(path)
    assert not (copy / "again").exists()


def test_a_rerun_refuses_a_file_that_came_to_the_base(copy: Path) -> None:
    told = record(copy)
    del told["base"]["files"]["generation_config.json"]
    path = copy / "run" / "record.json"
    path.write_text(audit_text(audit.seal_record(told)))
    with pytest.raises(SrmuError, match=r"is not the base model .*generation_config.json differs"):
        rerun_record(path)


def test_a_manifest_is_read_once(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = audit.digest_folder(made / "model")
    monkeypatch.setattr(audit, "digest_file", lambda path: pytest.fail("read again"))
    assert audit.digest_folder(made / "model") == first


def test_the_card_says_prices_as_the_report_does(made: Path) -> None:
    """Also what did not come back, and that a search was short, which then says little."""
    price = {"share": 0.5, "steps": 12.4, "low": 8.0, "high": None, "tried": 10, "tokens": 1984.0, "flop": 1.6e12}
    prices = [price, price | {"share": 0.9, "steps": None}]
    tuned = {"price": prices, "budget": {"trials": 3, "steps": 10}, "accuracy": None, "metrics": {}}
    attacks = {"K*": {"value": 0.5, "low": 0.4, "high": 0.6, "attack": "tuned_relearning"}, "tier": "deep"}
    attacks |= {"tried": {"tuned_relearning": tuned}, "oracle": True, "tasks": {}, "not_tried": []}
    page = summarise_record(record(made) | {"attacks": attacks})
    for line in (*describe_prices(prices), *describe_search(attacks["tried"])):
        assert f"- {line}.\n" in page
    assert "did not come back" in page and "3 trainings of at most 10 steps, where 24 of 100 are usual" in page


def test_the_page_and_the_card(made: Path) -> None:
    told = record(made)
    page = summarise_record(told)
    for name in told["changed"]:
        assert f"| {name} |" in page
    assert "a request" in page
    assert "other-model" in page
    assert "attempted; effect not measured" in page
    card = write_model_card(told)
    head = card.split("---")[1]
    assert "unlearning" in head
    assert "base_model:" not in head  # a folder of one's own is not a model of the hub
    assert str(made) not in card
    hub = {**told, "base": told["base"] | {"id": "owner/name", "licence": "mit"}}
    head = write_model_card(hub).split("---")[1]
    assert "base_model: owner/name" in head
    assert "base_model_relation: finetune" in head
    assert "license: mit" in head
    scored = hub | {"results": {"before": {}, "after": {"quiz/acc": {"value": 0.25, "n": 4.0}}}}
    assert "No attack was run" in write_model_card(scored)
    (entry,) = yaml.safe_load(write_model_card(scored).split("---")[1])["model-index"]
    assert entry["name"] == "name-srmu"
    assert entry["results"][0]["metrics"] == [{"type": "acc", "value": 0.25}]
    shares = {"before": 0.04, "after": 0.83}
    repeats = {when: {"repetition/forget": {"value": share, "n": 16.0}} for when, share in shares.items()}
    card = write_model_card(hub | {"results": repeats})
    assert "| repetition/forget | 0.040 | 0.830 | 16 |" in card
    assert "**Degenerated**: after forget prompts the model repeats itself: 83 %" in card
    assert "type: text-generation" in card and "Degenerated" not in write_model_card(scored)
