"""A tiny model of every decoder class that transformers builds from sizes alone, and what srmu does with it.

`python -m helpers.architectures`, in `tests`, prints the table of docs/models.md.
"""

import dataclasses
import gc
import inspect
import os
import re
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

import srmu
from helpers import attack_world
from helpers.image_models import IMAGE_MODELS, IMAGES, TEXT
from helpers.models import VOCABULARY, word_tokenizer
from srmu.attacks.suite import Sources, attack_run
from srmu.engine.loading import load_pretrained
from srmu.engine.progress import ignore_progress
from srmu.errors import SrmuError, first_line
from srmu.evals.score import score_model
from srmu.methods import METHODS
from srmu.methods.base import Edit
from srmu.runs.config import make_config
from srmu.runs.run import open_target, unlearn_config

LARGEST = 800_000  # numbers
# The first pattern that a size's name matches gives it.
SIZES: dict[str, Any] = {
    r"vocab_size|vocab_size_per_layer_input|n_vocab|bigram_vocab_size": VOCABULARY,
    r"num_hidden_layers|n_layers?|num_layers|decoder_layers|num_decoder_layers|encoder_layers|num_encoder_layers": 4,
    r"(num|n)_(attention_)?heads?|(de|en)coder_attention_heads|num_(de|en)coder_attention_heads": 4,
    r"num_key_value_heads|num_kv_heads": 2,
    r"(qk_nope_|qk_rope_|v_|global_|swa_|linear_(key|value)_)?head_dim|attention_head_size|d_head|kv_channels": 8,
    r"swa_v_head_dim|d_kv|rotary_dim|index_head_dim|indexer_head_dim": 8,
    r"hidden_size|n_embd|d_model|dim_model|embedding_size|emb_dim|word_embed_proj_dim|lru_width": 32,
    r".*(intermediate_size|ffn_dim|ffn_hidden_size|dim_ff|n_inner|dff)": 48,
    r"n_routed_experts|num_(local_|routed_)?experts|moe_num_experts": 4,
    r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts": 2,
    r"num_nextn_predict_layers": 0,
    r"n_group|topk_group|n_groups|mamba_n_groups": 1,
    r"(q_lora|kv_lora|o_lora|.*_lora)_rank|time_step_rank|mamba_dt_rank": 8,
    r"first_k_dense_replace": 1,
    r"hidden_size_per_layer_input": 4,
    r"max_position_embeddings|n_positions|max_seq_len(gth)?": 64,
    r"(mamba_)?d_state|state_size|mamba_d_state": 4,
    r"mamba_n_heads|mamba_num_heads|mamba_d_head|mamba_head_dim|n_mamba_heads": 8,
    r"(mamba_)?chunk_size": 8,
    r"index_n_heads": 4,
    r"index_topk": 64,  # all tokens: scores of random indexers tie
    r"is_decoder": True,
    r"pad_token_id": 0,
    r"bos_token_id": 1,
    r"eos_token_id|sep_token_id": 2,
}
# What an architecture wants besides.
OTHERS: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},
    "bailing_hybrid": {"layer_types": ["full_attention"] * 3 + ["linear_attention"]},  # which is slow
    "bamba": {"attn_layer_indices": [1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "xlnet": {"d_inner": 48},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "moe_intermediate_size": 48, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "layer_types": ["full_attention"] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "inkling_text": {"n_shared_experts": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "kimi_linear": {
        "layer_types": ["full_attention"] * 3 + ["linear_attention"],
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "num_local_experts": 4,
    },
    "longcat_flash": {"expert_ffn_hidden_size": 48, "zero_expert_num": 2},
    "moshi": {"audio_vocab_size": VOCABULARY},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 1,
        "ngram_vocab_size_base": 8,
        "ple_embed_dim": 8,
        "hc_lowrank": 4,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "roc_bert": {
        "enable_pronunciation": False,
        "enable_shape": False,
        "shape_vocab_size": 8,
        "pronunciation_vocab_size": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "use_mamba_kernels": False},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "use_mamba_kernels": False},
}


def decoder_types() -> list[str]:
    """The model types whose causal language model is one by its name, a class once, and those that also read images."""
    names: dict[str, str] = {}
    for kind, cls in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if isinstance(cls, str) and cls.endswith(("ForCausalLM", "LMHeadModel")):
            # llama4_text, not llama4 with its images; gpt2, not gpt-sw3
            names[cls] = min(names.get(cls, kind), kind, key=lambda name: (not name.endswith("_text"), len(name)))
    return sorted({*names.values(), *IMAGE_MODELS})


def tiny_config(kind: str) -> Any:
    """The config of a model type, 32 wide and 4 layers deep."""
    if kind in IMAGE_MODELS:
        sizes, (text, images) = list_sizes(CONFIG_MAPPING[kind]), IMAGE_MODELS[kind]
        text, images = {**TEXT, **text}, {**IMAGES, **images}
        parts = {"text_config": text, "vision_config": images}
        sizes |= {name: {**sizes.get(name, {}), **part} for name, part in parts.items()}
        sizes |= {"image_token_id": 62, "image_token_index": 62, "video_token_id": 63, "projection_dim": 32}
        return CONFIG_MAPPING[kind](**sizes)
    return CONFIG_MAPPING[kind](**(list_sizes(CONFIG_MAPPING[kind]) | OTHERS.get(kind, {})))


def list_sizes(cls: Any) -> dict[str, Any]:
    """The sizes of a config and of the configs inside it."""
    known = {*inspect.signature(cls.__init__).parameters, *getattr(cls, "__dataclass_fields__", ())}
    sizes = {}
    for name in known - {"self", "kwargs"}:
        value = next((v for pattern, v in SIZES.items() if re.fullmatch(pattern, name)), None)
        if value is not None:
            sizes[name] = value
    if "kv_lora_rank" in known:  # latent attention: each head has keys of its own
        sizes["num_key_value_heads"] = 4
    inner = {name: part for name, part in cls.sub_configs.items() if dataclasses.is_dataclass(part)}
    return sizes | {name: list_sizes(part) for name, part in inner.items()}


def tiny_module(kind: str) -> Any:
    """A random model of a model type; None where it cannot be built as small."""
    try:
        config = tiny_config(kind)
        auto = transformers.AutoModelForImageTextToText if kind in IMAGE_MODELS else transformers.AutoModelForCausalLM
        with torch.device("meta"):
            if auto.from_config(config).num_parameters() > LARGEST:
                return None
        torch.manual_seed(0)
        module = auto.from_config(config).eval()
        with torch.no_grad():
            module(torch.tensor([[1, 5, 6, 7, 8]]), use_cache=False)
    except Exception:  # a class refuses sizes in its own way
        return None
    for parameter in module.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
        else:  # no two alike, as in a trained model
            parameter.data += 0.1 * torch.rand_like(parameter)
    return module


TRAIN = {"max_steps": 2, "batch_size": 4, "learning_rate": 0.01}
SUPPRESS = {"method.teacher_steps": 1, "method.teacher_learning_rate": 1e-3}
# A method of each family, by the title of its column, with options as small as its code allows.
FAMILIES: dict[str, dict[str, Any]] = {
    "likelihood": {"method.name": "npo"},
    "activations": {"method.name": "srmu"},
    "LoRA": {"method.name": "npo", "method.lora_rank": 2},
    "distillation": {"method.name": "undial"},
    "reward": {"method.name": "quark", "method.quantiles": 2, "method.response": 3, "method.pool": 4},
    "gradients": {"method.name": "ssd", "method.alpha": 1.2},
    "neurons": {"method.name": "depn", "method.neuron_share": 0, "method.samples": 2, "method.points": 2},
    "against relearning": {"method.name": "undo", "method.own_texts": 4, "method.own_tokens": 4, **SUPPRESS},
    "by name": {
        "method.name": "rename_scrub", "method.own_texts": 6, "method.own_tokens": 4, "method.prompt": 2,
        "method.renamings": 2, "method.keep_rows": 2, "method.held_out": 2,
    },
}  # fmt: skip
REST = ("export", "eval", "attack")
REASONS = {
    "no embeddings in place": "its code reads tokens, not embeddings",
    "in 4 lists": "its layers are four lists",
    "reads more than its tokens": "a layer reads more than the tokens",
    "read those after it": "a token reads those after it",
    "no list of": "no list of its layers",
    "answers without": "the list of layers that is found is not the one it runs",
    "AutoModelForCausalLM does not load": "AutoModelForCausalLM does not know its config",
    "in this form": "a tensor is stored otherwise than it is held",
    "no weight in the role": "a layer without an MLP has no down-projection",
    "MLPs of several widths": "its MLPs have several widths",
    "mixture of experts, each with neurons": "neurons belong to one expert",
    "names no bos_token_id": "its config names no token to begin a text",
    "tells nothing new of the names": "the tiny model wrote none of the names",
}
ATTACKS = ("extraction", "logit_lens", "direction_ablation", "quantisation")


def write_world(kind: str, place: Path) -> bool:
    """A tiny model of a type beside texts and questions; False where there is none."""
    if (module := tiny_module(kind)) is None:
        return False
    attack_world.write_sets(place)
    TOKENIZER_MAPPING_NAMES.pop(kind, None)  # else transformers reads the words as that type's own pieces
    module.save_pretrained(place / "model")
    word_tokenizer().save_pretrained(place / "model")
    (place / "names.txt").write_text("\n".join(attack_world.SUBJECTS))
    return True


def try_run(place: Path, title: str) -> Any:
    """The run of a family's method, or the line of its refusal."""
    given = {"runs_dir": place / "runs", "tasks_dir": place / "tasks", "topics.topic.max_length": 16}
    given |= {f"train.{name}": value for name, value in TRAIN.items()} | FAMILIES[title]
    name, *texts = given.pop("method.name"), place / "forget.jsonl", place / "neutral.jsonl"
    try:
        return unlearn_config(make_config(str(place / "model"), *texts, name, [f"{k}={v}" for k, v in given.items()]))
    except SrmuError as error:
        return first_line(error)


def try_in_memory(place: Path, title: str) -> str:
    """What a family's method says of a model in memory: "" or the line of its refusal."""
    options = {key.removeprefix("method."): value for key, value in FAMILIES[title].items()}
    if title == "by name":
        options["names"] = str(place / "names.txt")
    module = load_pretrained(place / "model")
    method, texts = METHODS[options.pop("name")], attack_world.texts()
    given = {"forget": [*texts.forget], "retain": [*texts.neutral], "max_length": 16}
    train = {k: v for k, v in TRAIN.items() if k != "learning_rate" or not issubclass(method, Edit)}
    try:
        srmu.unlearn(module, word_tokenizer(), method=method(**options), train=train, watch=ignore_progress, **given)
    except SrmuError as error:
        return first_line(error)
    return ""


def try_rest(run: Any, place: Path) -> dict[str, str]:
    """What becomes of a run that is exported, loaded, asked and attacked: "" or the line of a refusal."""
    ids = torch.tensor([[1, 5, 6, 7, 8]])

    def export() -> None:
        run.export(place / "export")
        loaded = load_pretrained(place / "export").eval()
        with torch.no_grad(), open_target(run).after() as module:
            both = (one(ids, use_cache=False).logits for one in (loaded, module))
            assert torch.allclose(*both, rtol=1e-4, atol=1e-4), "the export is another model"

    def attack() -> None:
        sources = Sources(("hazard",), tasks_dir=str(place / "tasks"), neutral=str(place / "neutral.jsonl"))
        report = attack_run(run, names=ATTACKS, sources=sources)
        if failed := [entry["why"] for entry in report["attacks"].values() if entry["status"] == "failed"]:
            raise SrmuError(failed[0])

    steps = {"export": export, "eval": lambda: score_model(run, ("hazard",), limit=4), "attack": attack}
    found = {}
    for name, step in steps.items():
        try:
            step()
            found[name] = ""
        except SrmuError as error:
            found[name] = first_line(error)
    return found


def describe_type(kind: str, place: Path) -> str:
    """What srmu does with a model type, as the cells of the table beside its name."""
    if not write_world(kind, place):
        return f"{'| ' * len((*FAMILIES, *REST))}| not tried: sizes alone build no tiny model |"
    first = try_run(place, "likelihood")
    line = first if isinstance(first, str) else ""
    run = try_run(place, "activations") if line else first
    if isinstance(run, str):
        found = dict.fromkeys((*FAMILIES, *REST), line)
    else:
        found = {title: try_in_memory(place, title) for title in FAMILIES if title != "likelihood"}
        found = {"likelihood": line} | found | try_rest(run, place)
    notes = sorted({str(name_reason(line)) for line in found.values() if line})
    cells = ["" if line else "yes" for line in found.values()]
    return f"| {' | '.join(cells)} | {'; '.join(notes)} |"


def name_reason(line: str) -> str:
    """A refusal in a few words; as it stands where it is not known."""
    return next((short for part, short in REASONS.items() if part in line), line)


def print_table(outcomes: dict[str, str]) -> None:
    """The table of docs/models.md: types with the same outcome in one row, the most common first."""
    print(f"| `model_type` | {' | '.join([*FAMILIES, *REST])} | what is refused |")
    print("|---" * (len(FAMILIES) + len(REST) + 2) + "|")
    rows = {cells: [kind for kind in sorted(outcomes) if outcomes[kind] == cells] for cells in outcomes.values()}
    for cells, kinds in sorted(rows.items(), key=lambda row: (-len(row[1]), row[1])):
        print(f"| {', '.join(f'`{kind}`' for kind in kinds)} {cells}")


def main() -> None:
    """Print the table of docs/models.md, or that of the types that are named; what ended in an error goes to stderr."""
    outcomes: dict[str, str] = {}
    gc.freeze()  # runs collect garbage, of which this is none
    for kind in sys.argv[1:] or decoder_types():
        with tempfile.TemporaryDirectory() as place:
            os.environ["SRMU_CACHE"] = f"{place}/cache"
            try:
                outcomes[kind] = describe_type(kind, Path(place))
            except Exception:
                print(kind, traceback.format_exc(), file=sys.stderr, flush=True)
    print_table(outcomes)


if __name__ == "__main__":
    main()
