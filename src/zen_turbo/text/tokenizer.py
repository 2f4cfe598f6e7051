"""Text to token ids and back, from a Hugging Face tokenizer.json or from GGUF metadata, on the ``tokenizers`` library.

Two things are ours. Special tokens are parsed only where the caller says so, because in a user's text ``<|im_end|>`` is text. And decoding
goes through bytes, so that a stream of tokens gives the same text as decoding them at once and never splits a character.
"""

from __future__ import annotations

import codecs
import copy
import json
import re
from array import array
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from zen_turbo.errors import CorruptFileError, UnsupportedModelError
from zen_turbo.text import pretokenizers
from zen_turbo.text.kept_segments import KeptSegments
from zen_turbo.text.tokenizer_source import TokenizerSource

__all__ = ["IncrementalDecoder", "Tokenizer", "TokenizerSource", "load_tokenizer"]

_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types
# GGUF names one end-of-text token; instruction models end a turn with another. Control tokens of these names end generation too.
_END_OF_GENERATION = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "</s>")
_SEGMENT_CHARACTERS = 1 << 16
_COUNTED_TOGETHER = 16
_APART = "\x02"
# A line end between two visible ASCII characters: every byte-level pattern breaks there, and neither side's pieces depend on the other.
_SAFE_BREAK = re.compile(r"(?<=[!-~]\n)(?=[0-9A-Za-z])")
# And where the tokenizer splits words as nearly all do, before the one space between two of them: prose may have no line ends.
_SAFE_BREAK_OR_WORDS = re.compile(_SAFE_BREAK.pattern + r"|(?<=[a-z])(?= [a-z])")


class Tokenizer:
    """encode and decode. ``special_tokens``: text -> id of the tokens that are parsed only on request."""

    def __init__(
        self,
        full: tokenizers.Tokenizer,
        plain: tokenizers.Tokenizer,
        *,
        special: dict[str, AddedToken],
        byte_level: bool,
        strip_first_space: bool,
        bos_token_id: int | None,
        eos_token_ids: tuple[int, ...],
        add_bos: bool,
        chat_template: str | None,
    ) -> None:
        self._plain = plain
        self._kept = KeptSegments()
        words = plain.pre_tokenizer.pre_tokenize_str("ab cd\nef gh") if byte_level and plain.pre_tokenizer is not None else []
        self._break = _SAFE_BREAK_OR_WORDS if [span for _, span in words] == [(0, 2), (2, 5), (5, 6), (6, 8), (8, 11)] else _SAFE_BREAK
        self._byte_level = byte_level
        self._strip_first_space = strip_first_space
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self.add_bos = add_bos
        self.chat_template = chat_template
        vocabulary = full.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.special_tokens = {text: vocabulary[text] for text in special}
        self._texts: list[str | None] = [None] * self.vocab_size
        for text, token in vocabulary.items():
            self._texts[token] = text
        self._special_ids = frozenset(self.special_tokens.values())
        self._literal_ids = frozenset(full.get_added_tokens_decoder())  # added tokens are stored as they read
        self._special_pattern = _alternation(special)

    def token_text(self, token_id: int | None) -> str:
        """The stored text of a token, for templates (bos_token, eos_token)."""
        return "" if token_id is None else self._texts[token_id] or ""

    def encode(self, text: str, *, allow_special: bool = False, add_special_tokens: bool = False) -> list[int]:
        """Token ids of ``text``. With ``allow_special`` the texts of special tokens become those tokens; else they are ordinary text.
        ``add_special_tokens`` puts the beginning-of-sequence token in front where the model wants one."""
        ids: list[int] = [self.bos_token_id] if add_special_tokens and self.add_bos and self.bos_token_id is not None else []
        for piece, special_id in self.split_special(text) if allow_special else [(text, None)]:
            ids += self._encode_plain(piece) if special_id is None else [special_id]
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of ordinary text that follows other text: without the space that some tokenizers put before the first word."""
        if not self._strip_first_space:
            return self._encode_plain(text)
        # That space goes before a character which no vocabulary joins with others; what follows it is wanted.
        ids = self._encode_plain(_APART + text)
        mark = next(at for at, token in enumerate(ids) if self.token_bytes(token).endswith(_APART.encode()))
        return ids[mark + 1 :]

    def split_special(self, text: str) -> list[tuple[str, int | None]]:
        """Cut text at special tokens: (piece, None) for ordinary text, (text, id) for a special token."""
        if self._special_pattern is None:
            return [(text, None)]
        pieces: list[tuple[str, int | None]] = []
        at = 0
        for match in self._special_pattern.finditer(text):
            if match.start() > at:
                pieces.append((text[at : match.start()], None))
            name = next(name for name in match.groups() if name is not None)
            pieces.append((name, self.special_tokens[name]))
            at = match.end()
        if at < len(text):
            pieces.append((text[at:], None))
        return pieces

    def _encode_plain(self, text: str) -> list[int]:
        segments = self._segments(text)
        if len(segments) == 1:
            return self._plain.encode(segments[0], add_special_tokens=False).ids
        known = [self._kept.get(segment) for segment in segments]
        missing = [segment for segment, ids in zip(segments, known, strict=True) if ids is None]
        encodings = iter(self._plain.encode_batch_fast(missing, add_special_tokens=False) if missing else ())
        result: list[int] = []
        for segment, ids in zip(segments, known, strict=True):
            if ids is None:
                ids = array("i", next(encodings).ids)
                self._kept.put(segment, ids)
            result += ids
        return result

    def count(self, text: str) -> int:
        """``len(encode(text))`` in memory that does not grow with the text. Where nothing in 128 Ki characters can be cut at without
        changing tokens (one word, one line of Chinese), it is cut all the same, which may change the count by a token each time."""
        longest = 2 * _SEGMENT_CHARACTERS
        pieces = [segment[at : at + longest] for segment in self._segments(text) for at in range(0, len(segment), longest)]
        return sum(
            len(encoding.ids)
            for at in range(0, len(pieces), _COUNTED_TOGETHER)
            for encoding in self._plain.encode_batch_fast(pieces[at : at + _COUNTED_TOGETHER], add_special_tokens=False)
        )

    def _segments(self, text: str) -> list[str]:
        """Cut a long text where that cannot change its tokens, so that it is encoded in parallel and in linear time."""
        if not self._byte_level or len(text) <= 2 * _SEGMENT_CHARACTERS:
            return [text]
        segments, at = [], 0
        while len(text) - at > 2 * _SEGMENT_CHARACTERS:
            match = self._break.search(text, at + _SEGMENT_CHARACTERS)
            if match is None:
                break
            segments.append(text[at : match.start()])
            at = match.start()
        return [*segments, text[at:]]

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes:
        """The bytes that a token stands for; special tokens stand for nothing unless asked."""
        text = self._texts[token_id] if 0 <= token_id < self.vocab_size else None
        if text is None or (skip_special_tokens and token_id in self._special_ids):
            return b""
        if token_id in self._literal_ids:
            return text.encode()
        if self._byte_level:
            return bytes(_BYTE_OF[character] for character in text)
        if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text):
            return bytes([int(text[3:5], 16)])
        return text.replace("▁", " ").encode()

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        decoder = IncrementalDecoder(self, skip_special_tokens=skip_special_tokens)
        return "".join([decoder.push(token) for token in ids] + [decoder.flush()])

    def incremental(self, *, skip_special_tokens: bool = True) -> IncrementalDecoder:
        return IncrementalDecoder(self, skip_special_tokens=skip_special_tokens)


class IncrementalDecoder:
    """Decodes a stream of tokens: ``push`` gives text as soon as its characters are complete."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = tokenizer._strip_first_space

    def push(self, token_id: int) -> str:
        raw = self._tokenizer.token_bytes(token_id, skip_special_tokens=self._skip)
        if self._strip and raw:
            raw = raw.removeprefix(b" ")
            self._strip = False
        return self._utf8.decode(raw)

    def flush(self) -> str:
        """The end of the stream: an incomplete character becomes U+FFFD."""
        return self._utf8.decode(b"", final=True)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _alternation(special: dict[str, AddedToken]) -> re.Pattern[str] | None:
    """One pattern for all special tokens, longest first; a token that strips swallows the white space on that side."""
    if not special:
        return None
    parts = []
    for text in sorted(special, key=len, reverse=True):
        left, right = (r"\s*" if flag else "" for flag in (special[text].lstrip, special[text].rstrip))
        parts.append(f"{left}({re.escape(text)}){right}")
    return re.compile("|".join(parts))


def load_tokenizer(source: TokenizerSource) -> Tokenizer:
    """Raises UnsupportedModelError or CorruptFileError naming what is wrong."""
    if source.kind == "gguf":
        return _from_gguf(source.gguf_fields or {})
    assert source.folder is not None
    return _from_folder(source.folder)


def _from_gguf(fields: dict[str, Any]) -> Tokenizer:
    def need(name: str) -> Any:
        if name not in fields:
            raise CorruptFileError(f"GGUF metadata lacks {name}.")
        return fields[name]

    texts, kind = need("tokenizer.ggml.tokens"), need("tokenizer.ggml.model")
    types = fields.get("tokenizer.ggml.token_type", [1] * len(texts))
    vocabulary = {text: token for token, text in enumerate(texts)}
    if len(types) != len(texts) or len(vocabulary) != len(texts):
        raise CorruptFileError(f"GGUF tokenizer: {len(texts)} tokens, {len(vocabulary)} of them distinct, {len(types)} types.")
    if kind == "gpt2":
        plain = _byte_level_bpe(vocabulary, need("tokenizer.ggml.merges"), fields.get("tokenizer.ggml.pre", "default"))
    elif kind == "llama":
        plain = _sentencepiece_bpe(vocabulary, need("tokenizer.ggml.scores"), fields.get("tokenizer.ggml.add_space_prefix", True))
    else:
        raise UnsupportedModelError(f"GGUF tokenizer model {kind!r} is not supported (gpt2 and llama are).")
    user_defined = [texts[token] for token, type_ in enumerate(types) if type_ == _USER_DEFINED]
    control = {
        texts[token]: AddedToken(texts[token], special=True, normalized=False) for token, type_ in enumerate(types) if type_ == _CONTROL
    }
    plain.add_tokens([AddedToken(text, normalized=False) for text in user_defined])
    full = tokenizers.Tokenizer.from_str(plain.to_str())
    full.add_special_tokens(list(control.values()))
    eos = [fields[name] for name in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if name in fields]
    eos += [vocabulary[text] for text in _END_OF_GENERATION if text in control]
    return Tokenizer(
        full,
        plain,
        special=control,
        byte_level=kind == "gpt2",
        strip_first_space=kind == "llama" and bool(fields.get("tokenizer.ggml.add_space_prefix", True)),
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(eos)),
        add_bos=bool(fields.get("tokenizer.ggml.add_bos_token", kind == "llama")),
        chat_template=fields.get("tokenizer.chat_template"),
    )


def _byte_level_bpe(vocabulary: dict[str, int], merges: list[str], name: str) -> tokenizers.Tokenizer:
    pre = pretokenizers.by_name(name)
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre.ignore_merges)  # type: ignore[arg-type]
    except Exception as error:
        raise CorruptFileError(f"GGUF tokenizer: the merges do not fit the vocabulary: {error}.") from error
    tokenizer = tokenizers.Tokenizer(model)
    if pre.normalizer is not None:
        tokenizer.normalizer = pre.normalizer
    tokenizer.pre_tokenizer = pre.splitter
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_bpe(vocabulary: dict[str, int], scores: list[float], add_space_prefix: bool) -> tokenizers.Tokenizer:
    """SentencePiece BPE stores scores instead of merges: every split of a piece into two pieces is a merge, best score first."""
    pairs = []
    for text, token in vocabulary.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocabulary and right in vocabulary:
                pairs.append((-scores[token], vocabulary[left], vocabulary[right], left, right))
    pairs.sort(key=lambda pair: pair[:3])
    unknown = next((text for text, token in vocabulary.items() if token == 0), "<unk>")
    model = models.BPE(
        vocab=vocabulary, merges=[pair[3:] for pair in pairs], unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    steps: list[normalizers.Normalizer] = [normalizers.Prepend("▁")] if add_space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    return tokenizer


def _from_folder(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.exists():
        raise UnsupportedModelError(f"{folder} has no tokenizer.json.")
    try:
        description = json.loads(path.read_bytes())
        full = tokenizers.Tokenizer.from_str(json.dumps(description))
        settings_path, template_path = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        settings = json.loads(settings_path.read_bytes()) if settings_path.exists() else {}
    except Exception as error:  # the library raises bare Exception
        raise CorruptFileError(f"{path} cannot be read as a tokenizer: {error}.") from error
    kind = json.dumps(description.get("decoder") or {})
    byte_level, byte_fallback = '"ByteLevel"' in kind, '"ByteFallback"' in kind
    if not byte_level and not byte_fallback:
        raise UnsupportedModelError(f"{path}: only byte-level and byte-fallback BPE are supported.")
    special = {token.content: token for token in full.get_added_tokens_decoder().values() if token.special}
    stripped = copy.deepcopy(description)
    stripped["added_tokens"] = [token for token in stripped.get("added_tokens", []) if not token["special"]]
    stripped["post_processor"] = None
    template = template_path.read_text("utf-8") if template_path.exists() else settings.get("chat_template")
    if isinstance(template, list):  # named templates: the default one
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    vocabulary = full.get_vocab(with_added_tokens=True)

    def token_id(name: str) -> int | None:
        value = settings.get(name)
        return vocabulary.get(value["content"] if isinstance(value, dict) else value) if value else None

    bos, eos = token_id("bos_token"), token_id("eos_token")
    return Tokenizer(
        full,
        tokenizers.Tokenizer.from_str(json.dumps(stripped)),
        special=special,
        byte_level=byte_level,
        strip_first_space='"Strip"' in kind,
        bos_token_id=bos,
        eos_token_ids=() if eos is None else (eos,),
        add_bos=bos is not None and full.encode("a").ids[:1] == [bos],
        chat_template=template,
    )
