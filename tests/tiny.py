"""Checkpoints small enough to make in a test: random weights by transformers, a byte-level tokenizer trained on a paragraph, ChatML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import load_file

from zen_turbo.config import EngineConfig
from zen_turbo.kv.geometry import PageGeometry
from zen_turbo.kv.pool import PagePool
from zen_turbo.kv.sequence import SequenceCache
from zen_turbo.models.decoder import Decoder
from zen_turbo.models.loader import load_checkpoint

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    "def add(a, b):\n    return a + b\n\nÄpfel, naïve café, 東京, 12345 67890\n"
)

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 96}),
    "mistral": ("Mistral", {"sliding_window": 70}),
    "mistral-full": ("Mistral", {"sliding_window": None, "head_dim": 80}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),
}

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 512},
}


def tokenizer() -> tokenizers.Tokenizer:
    result = tokenizers.Tokenizer(tokenizers.models.BPE())
    result.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, show_progress=False, special_tokens=list(SPECIALS), initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    result.train_from_iterator([_TEXT], trainer)
    return result


def model(family: str = "llama", *, rope: str = "default", seed: int = 0, **overrides: Any) -> Any:
    """A transformers model in fp32, eval mode. Weights are large enough that logits differ by several units between tokens."""
    kind, settings = FAMILIES[family]
    values: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 320,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": ROPES[rope],
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": None,
        **settings,
        **overrides,
    }
    config = getattr(transformers, f"{kind}Config")(**values)
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    result = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
    torch.random.set_rng_state(generator_state)
    return result


def save(model: Any, folder: Path, **options: Any) -> Path:
    """A complete checkpoint folder."""
    model.save_pretrained(folder, **options)
    tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"bos_token": None, "eos_token": SPECIALS[2], "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def save_gguf(folder: Path, path: Path, kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32) -> Path:
    """A GGUF file of a saved folder, as llama.cpp's converter would write it; matrices get ``kind``."""
    config = json.loads((folder / "config.json").read_text())
    architecture = config["model_type"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    description = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = {**description["model"]["vocab"], **{token["content"]: token["id"] for token in description["added_tokens"]}}
    special = {token["id"] for token in description["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([3 if index in special else 1 for index in range(len(vocabulary))])
    writer.add_token_merges([" ".join(merge) for merge in description["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem, _, part = name.rpartition(".")
        if stem in _TOP_NAMES:
            own = f"{_TOP_NAMES[stem]}.{part}"
        else:
            _, _, layer, inner = stem.split(".", 3)
            own = f"blk.{layer}.{_LAYER_NAMES[inner]}.{part}"
            if architecture == "llama" and inner in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config["num_attention_heads" if inner.endswith("q_proj") else "num_key_value_heads"]
                rows = tensor.shape[0]
                tensor = tensor.reshape(heads, 2, rows // heads // 2, -1).transpose(1, 2).reshape(tensor.shape)
        values = np.ascontiguousarray(tensor.float().numpy())
        if values.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(own, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(own, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokens(count: int, *, vocab_size: int = 320, seed: int = 0) -> list[int]:
    """Random ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIALS), vocab_size, (count,), generator=generator).tolist()


def logits(path: Path, token_ids: list[int], *, chunks: list[int] | None = None, rows: int | None = None, **knobs: Any) -> torch.Tensor:
    """Our logits, float32 [rows, V], of the last ``rows`` tokens (None: all), in one chunk or in chunks of the given sizes."""
    config = EngineConfig(**{"dtype": "float32", "context_extension": "none", **knobs})
    checkpoint = load_checkpoint(path)
    decoder = Decoder(checkpoint, config)
    checkpoint.close()
    model_config = decoder.config
    geometry = PageGeometry(
        num_layers=model_config.num_hidden_layers,
        num_key_value_heads=model_config.num_key_value_heads,
        head_dim=model_config.head_dim,
        dtype=decoder.dtype,
    )
    pool = PagePool(geometry, len(token_ids) // 64 + 2)
    cache = SequenceCache(pool)
    cache.reserve(len(token_ids))
    results = []
    start = 0
    for size in chunks or [len(token_ids)]:
        part = torch.tensor(token_ids[start : start + size], dtype=torch.int64)
        values, _ = decoder.forward(
            part, cache.pages, first_position=start, logits_rows=slice(0, len(part)), rope_seq_len=len(token_ids)
        )
        start += len(part)
        cache.commit(start)
        assert values is not None
        results.append(values[-rows:] if rows else values)
    assert start == len(token_ids)
    result = torch.cat(results)
    return result[-rows:] if rows else result
