"""A run's model with rounded weights: what is written is what others read, and it says what rounding does."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from helpers import architectures
from helpers.gguf_files import Q8, write_gguf
from helpers.models import GROUPED, Call, save_pico, texts, write_jsonl
from srmu.cli.output import next_for_model
from srmu.engine.loading import load_pretrained
from srmu.engine.rounding import QUANTISERS
from srmu.engine.weights import locate_model
from srmu.errors import SrmuError
from srmu.evals.results import merge_results, metric_rows
from srmu.runs.config import make_config
from srmu.runs.gguf_file import SPLITS, choose_type, find_order
from srmu.runs.model_card import write_model_card
from srmu.runs.quantise import compare_costs, export_quantised, round_fp8
from srmu.runs.run import Run, open_target, unlearn_config


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRMU_CACHE", str(tmp_path / "cache"))


def make_run(place: Path, model: Path, *given: str) -> Run:
    files = [write_jsonl(place / f"{i}.jsonl", texts(8, i)) for i in (0, 1)]
    more = ["train.max_steps=3", "train.batch_size=2", "train.learning_rate=0.05", f"runs_dir={place / 'runs'}"]
    name, *rest = given or ("srmu", "method.layer=2")
    return unlearn_config(make_config(str(model), *files, name, [*rest, *more]))


def read_tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_a_gguf_file_comes_back_with_other_matrices(arch: str, tmp_path: Path) -> None:
    """What the run left is bit for bit the file's; what it changed is the run's, rounded once; metadata stay."""
    write_gguf(tmp_path / "m.gguf", arch, Q8)
    run = make_run(tmp_path, tmp_path / "m.gguf")
    out, costs = export_quantised(run, tmp_path / "out", "q8_0")
    assert (out.parent, out.suffix) == (tmp_path / "out", ".gguf")
    assert (tmp_path / "out" / "README.md").is_file()
    before, after = (read_tensors(path) for path in (tmp_path / "m.gguf", out))
    assert [*before] == [*after]
    changed = {name for name in before if before[name].data.tobytes() != after[name].data.tobytes()}
    assert changed == {f"blk.{i}.ffn_down.weight" for i in range(3)}
    for i in range(3):
        new = run.delta[f"model.layers.{i}.mlp.down_proj.weight"].float().numpy()
        assert after[f"blk.{i}.ffn_down.weight"].data.tobytes() == gguf.quantize(new, Q8).tobytes()
    fields = [gguf.GGUFReader(path).fields for path in (tmp_path / "m.gguf", out)]
    for name in fields[0].keys() - {"general.file_type"}:
        if not name.startswith("GGUF."):
            assert fields[0][name].contents() == fields[1][name].contents(), name
    assert costs["forget"].keys() == {"before", "after", "rounded"}


def test_rows_that_llama_cpp_orders_otherwise(tmp_path: Path) -> None:
    """Queries and keys of Llama."""
    write_gguf(tmp_path / "m.gguf", "llama")
    run = make_run(tmp_path, tmp_path / "m.gguf", "npo", "method.parameters=['*.q_proj.weight', '*.k_proj.weight']")
    out, _ = export_quantised(run, tmp_path / "out", "q8_0")
    module = transformers.AutoModelForCausalLM.from_pretrained(locate_model(str(out)))
    with open_target(run, "cpu").after() as expected:
        for name, tensor in expected.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                torch.testing.assert_close(module.get_parameter(name), tensor, rtol=0.02, atol=0.02)


def test_rows_that_are_alike_are_not_mixed_up() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])
    orders = [find_order(*pair) for pair in ((rows, rows), (rows[:2], rows[[1, 0]]))]
    assert [order.tolist() for order in orders if order is not None] == [[0, 1, 2], [1, 0]]
    assert find_order(rows, rows[[1, 0, 2]]) is None
    assert find_order(rows[:2], rows[:2] + 1) is None


def test_norms_and_embeddings_find_their_place(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", Q8)
    parameters = "method.parameters=['*norm.weight', '*embed_tokens.weight']"
    run = make_run(tmp_path, tmp_path / "m.gguf", "npo", parameters)
    out, _ = export_quantised(run, tmp_path / "out", "q8_0")
    module = transformers.AutoModelForCausalLM.from_pretrained(locate_model(str(out)))
    for name, tensor in run.delta.items():
        close = 0.02 if "embed" in name else 0
        torch.testing.assert_close(module.get_parameter(name), tensor, rtol=close, atol=close)


@pytest.mark.parametrize(
    ("kind", "form", "line"),
    [
        ("qwen3_moe", "fp8", "--quantise fp8 writes no experts"),
        ("gpt2", "fp8", "rounds nn.Linear, but the layers of GPT2LMHeadModel have none"),
    ],
)
def test_what_cannot_be_rounded(kind: str, form: str, line: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, save_pico(tmp_path / "model", kind))
    with pytest.raises(SrmuError, match=line):
        export_quantised(run, tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


def test_only_the_text_part_is_rounded(tmp_path: Path) -> None:
    if not architectures.write_world("gemma3", tmp_path):
        pytest.skip("this transformers builds no tiny gemma3")
    run = architectures.try_run(tmp_path, "activations")
    out, costs = export_quantised(run, tmp_path / "out", "fp8")
    types = {name: tensor.dtype for name, tensor in load_file(out / "model.safetensors").items()}
    rounded = {name for name, dtype in types.items() if dtype == torch.float8_e4m3fn}
    assert rounded and not any("vision" in name for name in rounded)
    assert type(load_pretrained(locate_model(str(out)))).__name__ == "Gemma3ForConditionalGeneration"
    assert costs["retain"]["rounded"] == pytest.approx(costs["retain"]["after"], rel=0.05)


def test_coarser_numbers_cost_other_nats(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", Q8)
    run = make_run(tmp_path, tmp_path / "m.gguf")
    found = [export_quantised(run, tmp_path / kind, kind)[1]["retain"] for kind in ("q8_0", "q4_0")]
    apart = [abs(one["rounded"] - one["after"]) for one in found]
    assert apart[0] < apart[1]
    assert [found[0][when] for when in ("before", "after")] == [found[1][when] for when in ("before", "after")]
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(next((tmp_path / "q4_0").glob("*.gguf"))).tensors}
    assert kinds == {"Q4_0", "F32"}


def test_q4_k_is_read_back_as_it_was_rounded(tmp_path: Path) -> None:
    """Rows that its blocks do not fill are in Q5_0, as llama.cpp has them."""
    write_gguf(tmp_path / "m.gguf", "llama", hidden_size=256)
    run = make_run(tmp_path, tmp_path / "m.gguf", "npo", "method.parameters=['*.v_proj.weight', '*.down_proj.weight']")
    out, costs = export_quantised(run, tmp_path / "out", "q4_k")
    after = read_tensors(out)
    assert {tensor.tensor_type.name for tensor in after.values()} == {"Q4_K", "Q5_0", "F32"}
    new, stored = run.delta["model.layers.1.self_attn.v_proj.weight"].float(), after["blk.1.attn_v.weight"]
    read = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type))
    assert torch.equal(read, QUANTISERS["q4_k"].round_matrix(new))
    assert after["blk.1.ffn_down.weight"].tensor_type.name == "Q5_0"  # rows of 64
    assert gguf.GGUFReader(out).fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_S
    assert costs["retain"]["rounded"] != costs["retain"]["after"]


def test_eight_bits_in_transformers_own_form(tmp_path: Path) -> None:
    run = make_run(tmp_path, save_pico(tmp_path / "model"), "npo")
    out, costs = export_quantised(run, tmp_path / "out", "fp8")
    stored, full = load_file(out / "model.safetensors"), run.delta["model.layers.2.mlp.down_proj.weight"]
    weight, scale = (stored[f"model.layers.2.mlp.down_proj.weight{end}"] for end in ("", "_scale_inv"))
    assert weight.dtype == torch.float8_e4m3fn and scale.shape == (2, 3)
    spread = weight.float() * scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
    torch.testing.assert_close(spread, full.float(), rtol=2**-4, atol=1e-4)
    assert stored["lm_head.weight"].dtype == torch.float32
    assert json.loads((out / "config.json").read_text())["quantization_config"]["weight_block_size"] == [16, 16]
    assert (out / "tokenizer.json").is_file()
    assert transformers.AutoModelForCausalLM.from_pretrained(locate_model(str(out))).dtype == torch.bfloat16
    assert costs["forget"]["before"] < costs["forget"]["after"]
    assert costs["forget"]["rounded"] == pytest.approx(costs["forget"]["after"], rel=0.05)


def test_texts_that_are_gone(tmp_path: Path, capsys: Any) -> None:
    run = make_run(tmp_path, save_pico(tmp_path / "model"))
    (tmp_path / "0.jsonl").unlink()
    out, costs = export_quantised(run, tmp_path / "out", "fp8")
    assert out.is_dir()
    assert costs == {} and "0.jsonl: no such file" in capsys.readouterr().err


def test_rounding_of_a_block() -> None:
    """The largest number of a block is exact, and zeros stay."""
    matrix = torch.zeros(4, 4)
    matrix[0, 1], matrix[3, 3] = 7.0, -0.3
    rounded, scale = round_fp8(matrix, 2)
    assert scale[0, 0] == pytest.approx(7 / 448) and scale[1, 1] == pytest.approx(0.3 / 448)
    torch.testing.assert_close(rounded.float() * scale.repeat_interleave(2, 0).repeat_interleave(2, 1), matrix)


def test_four_bits_of_bitsandbytes(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4
    )
    save_pico(tmp_path / "model")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    run = make_run(tmp_path, tmp_path / "model")
    out, costs = export_quantised(run, tmp_path / "out", "nf4")
    module = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(module.model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    assert (out / "tokenizer.json").is_file()
    assert compare_costs(run, out) == costs


@pytest.mark.parametrize(("kind", "line"), [("q5_k", "--quantise q5_k is none of q4_0, q4_k, q8_0, nf4, fp8")])
def test_mistakes(kind: str, line: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, save_pico(tmp_path / "model"))
    with pytest.raises(SrmuError, match=line) as caught:
        export_quantised(run, tmp_path / "out", kind)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_gguf_file_that_is_another_one_now(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", Q8)
    run = make_run(tmp_path, tmp_path / "m.gguf")
    write_gguf(tmp_path / "m.gguf", "qwen2", Q8)
    with pytest.raises(SrmuError, match=r"is not the file that .* was made from|has no|lacks"):
        export_quantised(run, tmp_path / "out", "q8_0")
    assert not (tmp_path / "out").exists()


def test_a_library_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, save_pico(tmp_path / "model"))
    monkeypatch.setattr("srmu.runs.quantise.find_spec", lambda name: None)
    with pytest.raises(SrmuError, match="pip install bitsandbytes"):
        export_quantised(run, tmp_path / "out", "nf4")


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", Q8)
    run = make_run(tmp_path, tmp_path / "m.gguf")
    monkeypatch.chdir(tmp_path)
    answer = call("export", str(run.folder), "out", "--quantise", "q8_0")
    assert answer.code == 0, answer.err
    assert "mean loss of a token (nats): before the run, after it, and after rounding" in answer.out
    assert "srmu eval out/m-srmu-q8_0.gguf --tasks TASK" in answer.out
    answer = call("export", str(run.folder), "out3", "--quantise", "q8_0", "--error", "0.1")
    assert answer.code == 2 and "--error goes with --adapter" in answer.err
    for place in (run.folder / "inside", run.base / "inside"):
        answer = call("export", str(run.folder), str(place), "--quantise", "q8_0")
        assert answer.code == 2 and "must stay as it is" in answer.err and not place.exists()
    answer = call("export", str(run.folder), "out3", "--quantise", "")
    assert answer.code == 2 and "is none of q4_0" in answer.err
    answer = call("export", str(run.folder), "out2", "--quantise", "q8_0", "--adapter")
    assert answer.code == 2 and "--adapter goes without" in answer.err


def ask_llama_cpp(path: Path, prompt: Any) -> dict[int, float]:
    """The five likeliest next tokens, as the program that serves GGUF files has them."""
    served = pytest.importorskip("xllamacpp")
    options = served.CommonParams()
    options.model.path, options.n_ctx, options.verbosity, options.warmup = str(path), 64, -1, False
    options.cpuparams.n_threads = 1
    given = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": 5}
    answer = served.Server(options).handle_completions(given)
    return {one["id"]: one["logprob"] for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}


def ask_transformers(module: Any, ids: list[int]) -> dict[int, float]:
    with torch.no_grad():
        logs = module.float()(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    return {int(token): float(logs[token]) for token in logs.topk(5).indices}


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "kind"), [("llama", "q8_0"), ("qwen2", "q8_0"), ("llama", "q4_k")])
def test_llama_cpp_answers_as_transformers_does(arch: str, kind: str, tmp_path: Path) -> None:
    """The file that ships, in the program that serves it."""
    write_gguf(tmp_path / "m.gguf", arch, Q8, hidden_size=256 if kind == "q4_k" else 32)
    out, _ = export_quantised(make_run(tmp_path, tmp_path / "m.gguf"), tmp_path / "out", kind)
    ids = [0, 5, 9, 17, 33]
    module = transformers.AutoModelForCausalLM.from_pretrained(locate_model(str(out)))
    assert ask_llama_cpp(out, ids) == pytest.approx(ask_transformers(module, ids), abs=0.02)


# --- a GGUF file of a model that came from none

CUTS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    **{
        name: pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        for pattern, name in SPLITS.items()
    },
}
SAID = "<s>it's 2026 w1 w22, w333!  WE'LL see\n\nwhat 12345 gives </s>"


def save_bytes(folder: Path, arch: str, cut: str) -> Path:
    """A tiny model whose tokenizer merges bytes, after it cut the text as models of a kind do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = CUTS[cut], decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([*texts(40, 0), "it's what 2026 gives, we'll see 12345 333"] * 3, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = "{{ messages[0]['content'] }}"
    fast.save_pretrained(folder)
    sizes = {**GROUPED, "vocab_size": 400, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}
    sizes |= {
        "hidden_size": 64,
        "head_dim": 128 if arch == "qwen3" else 16,
        "intermediate_size": 64,
        "tie_word_embeddings": arch == "qwen2",
    }
    config = transformers.CONFIG_MAPPING[arch](**sizes)
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    module.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "cut"), [("llama", "smollm"), ("mistral", "gpt-2"), ("qwen2", "qwen2"), ("qwen3", "llama-bpe")]
)
def test_llama_cpp_reads_text_as_transformers_does(arch: str, cut: str, tmp_path: Path) -> None:
    """Tokens and logits, from a file that was written anew."""
    folder = save_bytes(tmp_path / "model", arch, cut)
    run = make_run(tmp_path, folder, "srmu", "method.layer=2")
    out, costs = export_quantised(run, tmp_path / "out", "q8_0")
    assert costs["retain"]["rounded"] == pytest.approx(costs["retain"]["after"], rel=0.05)
    fields = gguf.GGUFReader(out).fields
    assert fields["tokenizer.ggml.pre"].contents() == cut
    assert fields["tokenizer.chat_template"].contents() == "{{ messages[0]['content'] }}"
    ids = transformers.AutoTokenizer.from_pretrained(folder)(SAID)["input_ids"]
    with open_target(run, "cpu").after() as module:
        expected = ask_transformers(module, ids)
    found = ask_llama_cpp(out, SAID)
    both = found.keys() & expected.keys()
    assert len(both) >= 4
    assert [found[token] for token in both] == pytest.approx([expected[token] for token in both], abs=0.1)
    assert found == pytest.approx(ask_llama_cpp(out, ids), abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("gemma2", "a gemma2 is not written as a GGUF file here: .* convert_hf_to_gguf"),
        ("llama", "the tokenizer of .*"),
    ],
)
def test_what_is_not_written_as_a_gguf_file(kind: str, line: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, save_pico(tmp_path / "model", kind))
    with pytest.raises(SrmuError, match=line):
        export_quantised(run, tmp_path / "out", "q4_0")
    assert not (tmp_path / "out").exists()


def test_sizes_that_bitsandbytes_cannot_compute_with(tmp_path: Path) -> None:
    """Such a folder could be written, and would fail at its first use."""
    pytest.importorskip("bitsandbytes")
    run = make_run(tmp_path, save_pico(tmp_path / "model"))
    with pytest.raises(SrmuError, match=r"bitsandbytes takes sides that 64 divides, not \[.*32"):
        export_quantised(run, tmp_path / "out", "nf4")
    assert not (tmp_path / "out").exists()


def test_a_library_that_fails_to_measure_leaves_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("N must be divisible by block_n")

    monkeypatch.setattr("srmu.runs.quantise.compare_costs", fail)
    run = make_run(tmp_path, save_pico(tmp_path / "model"))
    assert export_quantised(run, tmp_path / "out", "fp8") == (tmp_path / "out", {})
    assert "what rounding does was not measured: N must be divisible" in capsys.readouterr().err


def test_the_card_of_a_rounded_model(tmp_path: Path) -> None:
    """It has no figures for machines to read, which are of the model before rounding, and no untrue word of bytes."""
    run = make_run(tmp_path, save_pico(tmp_path / "model"))
    merge_results(run.folder, metric_rows({"quiz/acc": {"value": 0.5, "n": 20}}, "after"))
    run = Run.open(run.folder)
    assert "model-index" in write_model_card(run.record)
    card = write_model_card(run.record, "fp8")
    assert "model-index" not in card and "all others are the base model's, rounded" in card
    assert next_for_model(export_quantised(run, tmp_path / "out", "fp8")[0]).startswith("next: srmu ask ")


def test_tensors_that_stay_in_float_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their rows fill no block."""
    kinds = gguf.GGMLQuantizationType
    assert choose_type("blk.0.ffn_up.weight", 48, "q8_0", kinds.F32) == kinds.F32
    assert "blk.0.ffn_up.weight is not rounded: its rows of 48 numbers" in capsys.readouterr().err
    assert choose_type("blk.0.ffn_up.weight", 64, "q8_0", kinds.F32) == kinds.Q8_0
    assert choose_type("blk.0.attn_norm.weight", 64, "q8_0", kinds.F32) == kinds.F32
    assert capsys.readouterr().err == ""
