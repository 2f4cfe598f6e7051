"""What a model is: one dataclass for every family, read strictly from a Hugging Face config.json or from GGUF metadata.

Strict means: every key is either understood, or on the list of keys that cannot change the forward pass, or an error that names it. A setting
that we ignored in silence would run the model wrong in silence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zen_turbo.errors import UnsupportedModelError


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotation; field names as in a Hugging Face ``rope_parameters``. ``original_max_position_embeddings`` is the window before scaling."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    frequency_factors: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class DualChunkConfig:
    """A checkpoint's own ``dual_chunk_attention_config``, in tokens."""

    chunk_size: int
    local_size: int
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shapes and flags of one checkpoint; Hugging Face's names. ``sliding_layers`` and ``no_rope_layers`` have one flag per layer."""

    architecture: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    no_rope_layers: tuple[bool, ...] = ()
    dca: DualChunkConfig | None = None
    sparse_attention: Mapping[str, Any] | None = field(default=None, compare=False)
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
            _positive(name, getattr(self, name))
        _positive("vocab_size", self.vocab_size)
        _positive("max_position_embeddings", self.max_position_embeddings)
        if self.num_attention_heads % self.num_key_value_heads:
            raise UnsupportedModelError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads {self.num_key_value_heads}."
            )
        if not self.sliding_layers:
            object.__setattr__(self, "sliding_layers", (self.sliding_window is not None,) * self.num_hidden_layers)
        if not self.no_rope_layers:
            object.__setattr__(self, "no_rope_layers", (False,) * self.num_hidden_layers)
        for name in ("sliding_layers", "no_rope_layers"):
            if len(getattr(self, name)) != self.num_hidden_layers:
                raise UnsupportedModelError(f"{name} names {len(getattr(self, name))} layers, the model has {self.num_hidden_layers}.")

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that a checkpoint of this model must have, by its Hugging Face name."""
        heads, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size),
            "model.norm.weight": (self.hidden_size,),
        }
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        linears = {
            "self_attn.q_proj": (heads, self.hidden_size, self.qkv_bias),
            "self_attn.k_proj": (kv, self.hidden_size, self.qkv_bias),
            "self_attn.v_proj": (kv, self.hidden_size, self.qkv_bias),
            "self_attn.o_proj": (self.hidden_size, heads, self.o_bias),
            "mlp.gate_proj": (self.intermediate_size, self.hidden_size, self.mlp_bias),
            "mlp.up_proj": (self.intermediate_size, self.hidden_size, self.mlp_bias),
            "mlp.down_proj": (self.hidden_size, self.intermediate_size, self.mlp_bias),
        }
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            for name, (rows, columns, bias) in linears.items():
                shapes[f"{prefix}{name}.weight"] = (rows, columns)
                if bias:
                    shapes[f"{prefix}{name}.bias"] = (rows,)
            for name in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{prefix}{name}.weight"] = (self.hidden_size,)
            if self.qk_norm:
                shapes[f"{prefix}self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[f"{prefix}self_attn.k_norm.weight"] = (self.head_dim,)
        return shapes


# One row per family: what a config.json of it does not say.
#   qkv_bias: biases of Q, K, V only; None means "attention_bias, on all four projections".
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"classes": ("LlamaForCausalLM",), "qkv_bias": None, "qk_norm": False},
    "qwen2": {"classes": ("Qwen2ForCausalLM",), "qkv_bias": True, "qk_norm": False},
    "qwen3": {"classes": ("Qwen3ForCausalLM",), "qkv_bias": None, "qk_norm": True},
    "mistral": {"classes": ("MistralForCausalLM",), "qkv_bias": False, "qk_norm": False},
    "smollm3": {"classes": ("SmolLM3ForCausalLM",), "qkv_bias": None, "qk_norm": False},
}

# Keys that cannot change the forward pass of a dense decoder: training, bookkeeping, generation defaults, and defaults of the base class.
_HARMLESS = frozenset(
    """_name_or_path _attn_implementation attention_dropout attn_implementation auto_map bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder
    is_encoder_decoder is_llama_config label2id length_penalty max_length min_length model_max_length no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp problem_type
    pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config transformers_version typical_p
    unsloth_fixed unsloth_version use_bfloat16 use_cache use_mrope""".split()
)


_MAX_SIZE, _MAX_LAYERS = 1 << 31, 1 << 14  # beyond any model; a config may not make us build lists of its choice


def _positive(name: str, value: Any, *, most: int = _MAX_SIZE) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise UnsupportedModelError(f"{name} must be a positive integer of at most {most}, not {str(value)[:50]!r}.")
    return value


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


class _Keys:
    """Hands out keys of a mapping and remembers which were used."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = dict(values)
        self._where = where

    def take(self, name: str, default: Any = None, *, kind: type | tuple[type, ...] = object) -> Any:
        """The value, or ``default`` where it is missing or null. Raises UnsupportedModelError for a value of another kind; float takes
        finite integers too."""
        value = self._values.pop(name, None)
        if value is None:
            return default
        wrong = not isinstance(value, (int, float) if kind is float else kind) or (isinstance(value, bool) and kind in (int, float))
        if wrong or (kind is float and not math.isfinite(_as_float(value))):
            wanted = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise UnsupportedModelError(f"{self._where}: {name} must be {wanted}, not {str(value)[:50]!r}.")
        return value

    def need(self, name: str, *, kind: type | tuple[type, ...] = object) -> Any:
        value = self.take(name, kind=kind)
        if value is None:
            raise UnsupportedModelError(f"{self._where} lacks {name}.")
        return value

    def expect(self, name: str, allowed: Any, *, default: Any = None) -> None:
        """Take a key that has only one value we can run."""
        value = self._values.pop(name, default)
        if value is not None and value != allowed:
            raise UnsupportedModelError(f"{self._where}: {name} = {value!r} is not supported (only {allowed!r}).")

    def finish(self, harmless: frozenset[str] = frozenset()) -> None:
        left = sorted(key for key, value in self._values.items() if key not in harmless and value is not None)
        if left:
            raise UnsupportedModelError(f"{self._where} has keys that this version does not understand: {', '.join(left)}.")


def family_of(config: Mapping[str, Any], where: str) -> str:
    names = config.get("architectures") or []
    if not isinstance(names, list):
        raise UnsupportedModelError(f"{where}: architectures must be a list, not {str(names)[:50]!r}.")
    model_type = config.get("model_type")
    for family, row in FAMILIES.items():
        if (names and names[0] in row["classes"]) or (not names and model_type == family):
            return family
    supported = ", ".join(name for row in FAMILIES.values() for name in row["classes"])
    raise UnsupportedModelError(f"{where}: architecture {(names or [model_type])[0]!r} is not supported. Supported: {supported}.")


def from_huggingface(config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None, *, where: str = "config.json") -> ModelConfig:
    """Read a config.json (old ``rope_scaling`` and new ``rope_parameters`` styles). Raises UnsupportedModelError naming what it is about."""
    if not isinstance(config, Mapping):
        raise UnsupportedModelError(f"{where} is not a JSON object.")
    family = family_of(config, where)
    row = FAMILIES[family]
    keys = _Keys(config, where)
    keys.take("architectures")
    keys.take("model_type")
    num_layers = _positive("num_hidden_layers", keys.need("num_hidden_layers"), most=_MAX_LAYERS)
    num_heads = _positive("num_attention_heads", keys.need("num_attention_heads"))
    hidden_size = _positive("hidden_size", keys.need("hidden_size"))
    max_positions = _positive("max_position_embeddings", keys.need("max_position_embeddings"))
    keys.expect("hidden_act", "silu")
    keys.expect("partial_rotary_factor", 1.0)
    keys.expect("rope_interleaved", False)
    attention_bias = bool(keys.take("attention_bias", False, kind=bool))
    qkv_bias = row["qkv_bias"] if row["qkv_bias"] is not None else attention_bias
    window, sliding_layers = _windows(keys, family, num_layers)
    rope = _rope(keys, max_positions, where)
    dca, sparse = _dual_chunk(keys, where)
    no_rope = _no_rope_layers(keys, num_layers, family)
    generation = generation_config or {}
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    keys.take("eos_token_id")
    if eos is not None and not all(isinstance(token, int) for token in (eos if isinstance(eos, list) else [eos])):
        raise UnsupportedModelError(f"{where}: eos_token_id must be an integer or a list of them, not {str(eos)[:50]!r}.")
    result = ModelConfig(
        architecture=family,
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=_positive("intermediate_size", keys.need("intermediate_size")),
        num_attention_heads=num_heads,
        num_key_value_heads=_positive("num_key_value_heads", keys.take("num_key_value_heads", num_heads)),
        head_dim=_positive("head_dim", keys.take("head_dim", hidden_size // num_heads)),
        vocab_size=_positive("vocab_size", keys.need("vocab_size")),
        rms_norm_eps=float(keys.need("rms_norm_eps", kind=float)),
        rope=rope,
        max_position_embeddings=max_positions,
        tie_word_embeddings=keys.take("tie_word_embeddings", family == "smollm3", kind=bool),
        qkv_bias=bool(qkv_bias),
        o_bias=row["qkv_bias"] is None and attention_bias,
        mlp_bias=keys.take("mlp_bias", False, kind=bool),
        qk_norm=row["qk_norm"],
        sliding_window=window,
        sliding_layers=sliding_layers,
        no_rope_layers=no_rope,
        dca=dca,
        sparse_attention=sparse,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        bos_token_id=keys.take("bos_token_id", kind=int),
    )
    keys.finish(_HARMLESS)
    return result


def _windows(keys: _Keys, family: str, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The sliding window and the layers that have it. Qwen has one only with use_sliding_window, from layer max_window_layers on."""
    window = keys.take("sliding_window", kind=int)
    switched_on = keys.take("use_sliding_window", family == "mistral", kind=bool)
    first = keys.take("max_window_layers", 0 if family == "mistral" else num_layers, kind=int)
    layer_types = keys.take("layer_types", kind=list)
    if layer_types is not None:
        unknown = set(map(str, layer_types)) - {"full_attention", "sliding_attention"}
        if unknown:
            raise UnsupportedModelError(f"layer_types names {', '.join(sorted(unknown))}, which is not supported.")
        layers = tuple(kind == "sliding_attention" for kind in layer_types)
        if any(layers) and window is None:
            raise UnsupportedModelError("layer_types asks for sliding_attention but sliding_window is missing.")
        return (window, layers) if any(layers) else (None, layers)
    if window is None or not switched_on:
        return None, (False,) * num_layers
    return _positive("sliding_window", window), tuple(layer >= first for layer in range(num_layers))


def _rope(keys: _Keys, max_positions: int, where: str) -> RopeConfig:
    """Both spellings: ``rope_theta`` with ``rope_scaling``, and ``rope_parameters``."""
    theta = keys.take("rope_theta", kind=float)
    parameters = {**keys.take("rope_scaling", {}, kind=dict), **keys.take("rope_parameters", {}, kind=dict)}
    rope = _Keys(parameters, f"{where} rope parameters")
    kind = rope.take("rope_type") or rope.take("type") or "default"
    rope.take("type")
    theta = rope.take("rope_theta", theta, kind=float) or 10000.0
    rope.expect("partial_rotary_factor", 1.0)
    if kind not in ("default", "linear", "dynamic", "llama3", "yarn"):
        raise UnsupportedModelError(f"{where}: rope type {kind!r} is not supported (default, linear, dynamic, llama3, yarn are).")
    factor = float(rope.take("factor", 1.0, kind=float))
    original = rope.take("original_max_position_embeddings", kind=(int, float))
    if kind in ("yarn", "llama3") and original is None:
        original = max_positions
    if kind == "dynamic" and original is None:
        original = max_positions
    result = RopeConfig(
        kind=kind,
        theta=float(theta),
        factor=factor,
        original_max_position_embeddings=original,
        low_freq_factor=float(rope.take("low_freq_factor", 1.0, kind=float)),
        high_freq_factor=float(rope.take("high_freq_factor", 4.0, kind=float)),
        beta_fast=float(rope.take("beta_fast", 32.0, kind=float)),
        beta_slow=float(rope.take("beta_slow", 1.0, kind=float)),
        attention_factor=rope.take("attention_factor", kind=float),
        mscale=rope.take("mscale", kind=float),
        mscale_all_dim=rope.take("mscale_all_dim", kind=float),
        truncate=rope.take("truncate", True, kind=bool),
    )
    rope.finish()
    if not math.isfinite(result.theta) or result.theta <= 0 or result.factor <= 0:
        raise UnsupportedModelError(f"{where}: rope_theta and factor must be positive.")
    return result


def _dual_chunk(keys: _Keys, where: str) -> tuple[DualChunkConfig | None, Mapping[str, Any] | None]:
    """The published 1M checkpoints' own section; its sparse part is kept for the policy that reads it."""
    section = keys.take("dual_chunk_attention_config", kind=dict)
    if section is None:
        return None, None
    inner = _Keys(section, f"{where} dual_chunk_attention_config")
    dca = DualChunkConfig(
        chunk_size=_positive("chunk_size", inner.need("chunk_size")),
        local_size=_positive("local_size", inner.need("local_size")),
        original_max_position_embeddings=_positive(
            "original_max_position_embeddings", inner.need("original_max_position_embeddings")
        ),
    )
    names = ("sparse_attention_config", "sparse_attention_enabled", "sparse_attention_threshold", "sparse_attention_last_q")
    sparse = {name: value for name in names if (value := inner.take(name)) is not None}
    inner.finish()
    return dca, sparse or None


def _no_rope_layers(keys: _Keys, num_layers: int, family: str) -> tuple[bool, ...]:
    """SmolLM3: ``no_rope_layers`` has 1 where a layer rotates; without it every ``no_rope_layer_interval``-th layer does not."""
    flags = keys.take("no_rope_layers", kind=list)
    interval = keys.take("no_rope_layer_interval", 4 if family == "smollm3" else None, kind=int)
    if flags is not None:
        return tuple(not flag for flag in flags)
    if interval is None:
        return (False,) * num_layers
    return tuple((layer + 1) % interval == 0 for layer in range(num_layers))


_GGUF_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "smollm3": "smollm3"}
# Metadata outside "<architecture>." that describes the file or the tokenizer.
_GGUF_DESCRIPTIVE = ("general.", "tokenizer.", "quantize.", "mradermacher.", "GGUF.")


def from_gguf(
    metadata: Mapping[str, Any], tensor_shapes: Mapping[str, tuple[int, ...]], frequency_factors: tuple[float, ...] | None = None
) -> ModelConfig:
    """Read GGUF metadata. ``tensor_shapes`` (canonical names, torch order) tells what metadata does not: biases, tied embeddings, vocabulary."""
    where = "GGUF metadata"
    architecture = metadata.get("general.architecture")
    if architecture not in _GGUF_FAMILIES:
        raise UnsupportedModelError(
            f"{where}: architecture {architecture!r} is not supported. Supported: {', '.join(sorted(_GGUF_FAMILIES))}."
        )
    if metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedModelError("GGUF files split into several parts are not supported; join them first.")
    prefix = f"{architecture}."
    own = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
    for name in metadata:
        if not name.startswith((prefix, "split.", *_GGUF_DESCRIPTIVE)):
            raise UnsupportedModelError(f"{where} has a key that this version does not understand: {name}.")
    keys = _Keys(own, where)
    num_heads = _positive("attention.head_count", keys.need("attention.head_count"))
    hidden_size = _positive("embedding_length", keys.need("embedding_length"))
    num_layers = _positive("block_count", keys.need("block_count"), most=_MAX_LAYERS)
    context = _positive("context_length", keys.need("context_length"))
    head_dim = _positive("attention.key_length", keys.take("attention.key_length", hidden_size // num_heads))
    keys.expect("attention.value_length", head_dim)
    keys.expect("rope.dimension_count", head_dim)
    keys.take("vocab_size")  # the embedding's shape decides
    for name in ("expert_count", "expert_used_count"):
        keys.expect(name, 0)
    embedding = tensor_shapes.get("model.embed_tokens.weight")
    if embedding is None:
        raise UnsupportedModelError("The file has no tensor token_embd.weight.")
    window = keys.take("attention.sliding_window")
    result = ModelConfig(
        architecture=_GGUF_FAMILIES[architecture],
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=_positive("feed_forward_length", keys.need("feed_forward_length")),
        num_attention_heads=num_heads,
        num_key_value_heads=_positive("attention.head_count_kv", keys.take("attention.head_count_kv", num_heads)),
        head_dim=head_dim,
        vocab_size=embedding[0],
        rms_norm_eps=float(keys.need("attention.layer_norm_rms_epsilon", kind=float)),
        rope=_gguf_rope(keys, context, frequency_factors, where),
        max_position_embeddings=context,
        tie_word_embeddings="lm_head.weight" not in tensor_shapes,
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in tensor_shapes,
        o_bias="model.layers.0.self_attn.o_proj.bias" in tensor_shapes,
        mlp_bias="model.layers.0.mlp.down_proj.bias" in tensor_shapes,
        qk_norm="model.layers.0.self_attn.q_norm.weight" in tensor_shapes,
        sliding_window=_positive("attention.sliding_window", window) if window else None,
        no_rope_layers=tuple((layer + 1) % 4 == 0 for layer in range(num_layers)) if architecture == "smollm3" else (),
        eos_token_ids=tuple(
            token
            for name in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
            if (token := _token_id(metadata, name)) is not None
        ),
        bos_token_id=_token_id(metadata, "tokenizer.ggml.bos_token_id"),
    )
    keys.finish()
    return result


def _token_id(metadata: Mapping[str, Any], name: str) -> int | None:
    value = metadata.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise UnsupportedModelError(f"GGUF metadata: {name} must be an integer, not {str(value)[:50]!r}.")
    return value


def _gguf_rope(keys: _Keys, context: int, frequency_factors: tuple[float, ...] | None, where: str) -> RopeConfig:
    kind = keys.take("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedModelError(f"{where}: rope.scaling.type {kind!r} is not supported (none, linear, yarn are).")
    keys.expect("rope.scaling.finetuned", True, default=True) if kind == "none" else keys.take("rope.scaling.finetuned")
    return RopeConfig(
        kind="default" if kind == "none" else kind,
        theta=float(keys.take("rope.freq_base", 10000.0, kind=float)),
        factor=float(keys.take("rope.scaling.factor", 1.0, kind=float)),
        original_max_position_embeddings=keys.take("rope.scaling.original_context_length", context, kind=int),
        attention_factor=keys.take("rope.scaling.attn_factor", kind=float),
        beta_fast=float(keys.take("rope.scaling.yarn_beta_fast", 32.0, kind=float)),
        beta_slow=float(keys.take("rope.scaling.yarn_beta_slow", 1.0, kind=float)),
        frequency_factors=frequency_factors,
    )
