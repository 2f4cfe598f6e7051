"""How GGUF's ``tokenizer.ggml.pre`` names split text before byte-pair merging. The patterns are facts of each tokenizer family."""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import Regex, normalizers, pre_tokenizers

from zen_turbo.errors import UnsupportedModelError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL


class PreTokenizer(NamedTuple):
    """``ignore_merges``: a piece that is a whole vocabulary entry is taken as it is (Llama 3)."""

    normalizer: normalizers.Normalizer | None
    splitter: pre_tokenizers.PreTokenizer
    ignore_merges: bool = False


def _pattern(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def by_name(name: str) -> PreTokenizer:
    """Raises UnsupportedModelError for a name that is not in the table: a wrong split would give wrong tokens in silence."""
    if name in ("qwen2", "deepseek-r1-qwen"):
        return PreTokenizer(normalizers.NFC(), _pattern(_QWEN2))
    if name in ("llama-bpe", "llama3", "llama-v3", "smaug-bpe"):
        return PreTokenizer(None, _pattern(_LLAMA3), ignore_merges=True)
    if name == "smollm3":
        return PreTokenizer(None, _pattern(_LLAMA3), ignore_merges=True)
    if name == "smollm":
        return PreTokenizer(None, _digits_then_gpt2())
    if name in ("gpt-2", "default"):
        return PreTokenizer(None, _gpt2())
    raise UnsupportedModelError(f"Pre-tokenizer {name!r} is not supported (qwen2, llama-bpe, smollm, smollm3, gpt-2 are).")
