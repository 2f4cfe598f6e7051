"""Opening a checkpoint: GGUF file, or folder with config.json and safetensors. Names and shapes are checked before any data is read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from zen_turbo.errors import CheckpointError, CorruptFileError, ModelNotFoundError, UnsupportedModelError
from zen_turbo.models import config as model_config
from zen_turbo.models.config import ModelConfig
from zen_turbo.models.gguf_file import GgufFile
from zen_turbo.text.tokenizer_source import TokenizerSource

MAX_JSON_BYTES = 64 << 20


class TensorFile(Protocol):
    """Tensors by canonical (Hugging Face) name."""

    shapes: dict[str, tuple[int, ...]]

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor: ...
    def sample(self) -> Iterator[bytes]: ...
    def close(self) -> None: ...


class Checkpoint:
    """An opened checkpoint: ``config``, tensors on demand, and where the tokenizer is. Close it when the weights are loaded."""

    def __init__(self, path: Path, config: ModelConfig, file: TensorFile, tokenizer_source: TokenizerSource) -> None:
        self.path = path
        self.config = config
        self.tokenizer_source = tokenizer_source
        self._file = file
        _check_tensors(path, config, file.shapes)

    def tensor_names(self) -> list[str]:
        return sorted(self._file.shapes)

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A new contiguous tensor, dequantised, in Hugging Face's layout."""
        return self._file.tensor(name, dtype)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the config, every tensor's name and shape, and samples of the data: cheap, and different for different
        weights in practice; not a defence against someone who forges a file."""
        digest = hashlib.sha256(repr(self.config).encode())
        for name in self.tensor_names():
            digest.update(f"{name}{self._file.shapes[name]}".encode())
        for piece in self._file.sample():
            digest.update(piece)
        return digest.hexdigest()

    def close(self) -> None:
        self._file.close()


def load_checkpoint(path: Path) -> Checkpoint:
    """Open ``path``: a .gguf file, a folder with config.json and safetensors, or a folder with exactly one .gguf.

    Raises ModelNotFoundError, CorruptFileError, UnsupportedModelError or CheckpointError, naming file, key or tensor.
    """
    if not path.exists():
        raise ModelNotFoundError(f"There is no model at {path}.", param="model")
    if path.is_file():
        return _open_gguf(path)
    if (path / "config.json").exists():
        return _open_folder(path)
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise ModelNotFoundError(f"{path} has neither config.json nor exactly one .gguf file ({len(files)} found).", param="model")
    return _open_gguf(files[0])


def _check_tensors(path: Path, config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    expected = config.tensor_shapes()
    missing, extra = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} tensors, the first is {missing[0]}.")
    if extra:
        raise CheckpointError(f"{path} has {len(extra)} tensors that this model does not use, the first is {extra[0]}.")
    for name, shape in expected.items():
        if tuple(shapes[name]) != shape:
            raise CheckpointError(f"{path}: tensor {name} has shape {tuple(shapes[name])}, the config implies {shape}.")


# GGUF

_GGUF_TOP = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
# Architectures whose Q and K rows are stored in pairs for interleaved rotation.
_INTERLEAVED = ("llama", "smollm3")


class _GgufTensors:
    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._names: dict[str, str] = {}
        for name in file.tensors:
            if name != _ROPE_FACTORS:
                self._names[_canonical(name, file.path)] = name
        self.shapes = {name: file.tensors[own].shape for name, own in self._names.items()}
        self._interleaved = file.metadata.get("general.architecture") in _INTERLEAVED
        self._heads: dict[str, int] = {}

    def set_heads(self, config: ModelConfig) -> None:
        self._heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        tensor = self._file.tensor(self._names[name], dtype)
        part = name.split(".")[-2]
        if self._interleaved and part in self._heads:
            # Rows of a head are stored (0, half, 1, half + 1, ...); back to (0 .. half, half .. head_dim).
            heads = self._heads[part]
            tensor = tensor.view(heads, tensor.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(tensor.shape)
        return tensor

    def sample(self) -> Iterator[bytes]:
        return self._file.sample()

    def close(self) -> None:
        self._file.close()


def _canonical(name: str, path: Path) -> str:
    layer = re.fullmatch(r"blk\.(\d{1,6})\.(\w+)\.(weight|bias)", name)
    if layer and layer[2] in _GGUF_LAYER:
        return f"model.layers.{int(layer[1])}.{_GGUF_LAYER[layer[2]]}.{layer[3]}"
    top = re.fullmatch(r"(\w+)\.(weight)", name)
    if top and top[1] in _GGUF_TOP:
        return f"{_GGUF_TOP[top[1]]}.{top[2]}"
    raise UnsupportedModelError(f"{path} has a tensor that this version does not understand: {name}.")


def _open_gguf(path: Path) -> Checkpoint:
    file = GgufFile(path)
    try:
        tensors = _GgufTensors(file)
        factors = None
        if _ROPE_FACTORS in file.tensors:
            factors = tuple(file.tensor(_ROPE_FACTORS, torch.float32).tolist())
        config = model_config.from_gguf(file.metadata, tensors.shapes, factors)
        if factors is not None and len(factors) != config.head_dim // 2:
            raise CheckpointError(f"{path}: {_ROPE_FACTORS} has {len(factors)} factors, head_dim {config.head_dim} needs half as many.")
        tensors.set_heads(config)
        fields = {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
        return Checkpoint(path, config, tensors, TokenizerSource("gguf", gguf_fields=fields))
    except BaseException:
        file.close()
        raise


# safetensors

_SAFE_DTYPES = ("BF16", "F16", "F32")
# Buffers that old checkpoints saved although they are computed.
_COMPUTED = re.compile(r"(model\.layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


class _SafeTensors:
    def __init__(self, folder: Path, tied: bool) -> None:
        self._stack = contextlib.ExitStack()
        self._files: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._folder = folder
        for path in _shards(folder):
            self._open(path, tied)

    def _open(self, path: Path, tied: bool) -> None:
        if not path.exists():
            raise CheckpointError(f"{path.parent} lacks the shard {path.name} that its index names.")
        try:
            file = self._stack.enter_context(safe_open(str(path), framework="pt"))
            names = list(file.keys())
            slices = {name: file.get_slice(name) for name in names}
        except (SafetensorError, OSError, ValueError) as error:
            raise CorruptFileError(f"{path}: not a valid safetensors file: {error}.") from error
        for name, piece in slices.items():
            if _COMPUTED.fullmatch(name) or (tied and name == "lm_head.weight"):
                continue
            if name in self.shapes:
                raise CheckpointError(f"{path}: tensor {name} occurs in two shards.")
            if piece.get_dtype() not in _SAFE_DTYPES:
                raise UnsupportedModelError(f"{path}: tensor {name} has dtype {piece.get_dtype()} (only {', '.join(_SAFE_DTYPES)}).")
            self.shapes[name] = tuple(piece.get_shape())
            self._files[name] = file

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        try:
            return self._files[name].get_tensor(name).to(dtype, copy=True).contiguous()
        except SafetensorError as error:
            raise CorruptFileError(f"{self._folder}: tensor {name} cannot be read: {error}.") from error

    def sample(self) -> Iterator[bytes]:
        for name in sorted(self._files):
            piece = self._files[name].get_slice(name)[:1]
            yield piece.contiguous().view(torch.uint8).numpy().tobytes()[:4096]

    def close(self) -> None:
        self._files.clear()
        self._stack.close()


def _shards(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        names = set(weight_map.values()) if isinstance(weight_map, dict) else None
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise CorruptFileError(f"{index}: weight_map must map tensor names to file names of this folder.")
        return [folder / name for name in sorted(names)]
    if not single.exists():
        raise CheckpointError(f"{folder} has neither model.safetensors nor model.safetensors.index.json.")
    return [single]


def _read_json(path: Path, *, kind: type = dict) -> Any:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CorruptFileError(f"{path} has {path.stat().st_size} bytes; at most {MAX_JSON_BYTES} are read.")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, kind):
        raise CorruptFileError(f"{path} is not a JSON {'object' if kind is dict else 'array'}.")
    return value


def _open_folder(folder: Path) -> Checkpoint:
    generation, sparse = folder / "generation_config.json", folder / "sparse_attention_config.json"
    values = _read_json(folder / "config.json")
    section = values.get("dual_chunk_attention_config")
    if sparse.exists() and isinstance(section, dict):  # the 1M checkpoints publish the budgets of their heads in a file of their own
        section.setdefault("sparse_attention_config", _read_json(sparse, kind=list))
    config = model_config.from_huggingface(
        values, _read_json(generation) if generation.exists() else None, where=str(folder / "config.json")
    )
    tensors = _SafeTensors(folder, config.tie_word_embeddings)
    try:
        return Checkpoint(folder, config, tensors, TokenizerSource("hf", folder=folder))
    except BaseException:
        tensors.close()
        raise
