"""Sizes of tiny models that read images beside text, of the kinds that people have."""

from typing import Any

from helpers.models import VOCABULARY

TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
# As many blocks as the text model has, for names with the same numbers.
IMAGES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48,
          "image_size": 8, "patch_size": 4, "depth": 4, "num_heads": 4}  # fmt: skip
TURNED = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
VIEWS = {"out_hidden_size": 32, "num_position_embeddings": 16}
DEEP = {**VIEWS, "deepstack_visual_indexes": [1]}
# What a kind wants of its text part and of the part that reads images.
IMAGE_MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "aria": ({}, {"model_type": "idefics3_vision"}),
    "gemma3": ({}, {"model_type": "siglip_vision_model"}),
    "gemma4": ({"hidden_size_per_layer_input": 4}, {"position_embedding_size": 16}),
    "glm4v": ({"rope_parameters": TURNED}, VIEWS),
    "idefics3": ({"model_type": "llama"}, {}),
    "internvl": ({"model_type": "qwen2"}, {"image_size": [8, 8], "patch_size": [4, 4]}),
    "llama4": ({"intermediate_size_mlp": 48}, {"vision_output_dim": 32, "projector_input_dim": 32,
               "projector_output_dim": 32}),
    "llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model"}),
    "mistral3": ({"model_type": "mistral"}, {"model_type": "pixtral", "head_dim": 8}),
    "paligemma": ({"model_type": "gemma"}, {"model_type": "siglip_vision_model", "projection_dim": 32}),
    "qwen2_vl": ({"rope_parameters": TURNED}, {"embed_dim": 32}),
    "qwen2_5_vl": ({"rope_parameters": TURNED}, VIEWS),
    "qwen3_vl": ({"rope_parameters": TURNED}, DEEP),
    "qwen3_vl_moe": ({"rope_parameters": TURNED, **EXPERTS}, DEEP),
    "qwen3_5": ({}, VIEWS),
    "qwen3_5_moe": ({}, VIEWS),
}  # fmt: skip
