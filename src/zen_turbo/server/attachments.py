"""Files in messages: references and inline files become the documents' text, where they stand.

Four forms are known: a system message that is ``fileid://file-...`` or a list of these with commas (DashScope); content parts of type ``file``
with ``file_id`` or with ``file_data`` (OpenAI chat), and of type ``input_file`` with the same keys (OpenAI responses). The text is what
``zen-turbo ask`` would put into a prompt, so that the same files in the same order share a prefix, whoever asks and however.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Any, Protocol

from zen_turbo.errors import (
    ContextLengthExceededError,
    DocumentTooLargeError,
    InvalidRequestError,
    RequestTooLargeError,
    UnsupportedParameterError,
    ZenTurboError,
)
from zen_turbo.text.documents import Document, documents_text
from zen_turbo.text.readers.document import MAX_LABEL_CHARACTERS, clean_label

_SCHEME = "fileid://"
_SCHEME_ROLES = ("system", "developer")
_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
_FILE_PARTS = ("file", "input_file")
# A media type of an inline file without a name -> the name that says how to read it.
_NAMES = {
    "application/pdf": "document.pdf",
    "application/epub+zip": "document.epub",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": "document.docx",
    "application/zip": "document.zip",
    "text/html": "document.html",
}
_DATA_URL = re.compile(r"data:([^;,]{0,200})(?:;[^;,]{0,200}){0,9};base64,", re.IGNORECASE)


class Files(Protocol):
    """Where the documents of a request come from, and how much of them one request may hold; ``max_tokens`` None is not known yet."""

    max_characters: int
    max_bytes: int

    @property
    def max_tokens(self) -> int | None: ...

    def size(self, file_id: str) -> tuple[int, int | None]:
        """(characters, tokens if they can be counted). Raises UploadedFileNotFoundError."""
        ...

    def documents(self, file_id: str) -> Sequence[Document]:
        """Raises UploadedFileNotFoundError."""
        ...

    def read_inline(self, data: bytes, filename: str) -> Sequence[Document]:
        """Raises DocumentError and its kinds, and ReadersBusyError."""
        ...


def expand_files(messages: Sequence[Any], files: Files) -> list[Any]:
    """Messages with text in place of files. A message without any is the same object, and what is malformed otherwise is left to others.

    Raises, with param "messages" and the message's place in the text: UploadedFileNotFoundError, InvalidRequestError, RequestTooLargeError,
    UnsupportedParameterError (a file by URL), ReadersBusyError, DocumentError and its kinds (an inline file that cannot be read, too much text
    in all), and ContextLengthExceededError where the files alone are longer than the context. Sizes are known before a text is loaded.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return messages  # type: ignore[unreachable]
    texts = _Texts(files)
    result = []
    for index, message in enumerate(messages):
        try:
            result.append(_expanded(message, texts))
        except ContextLengthExceededError:
            raise  # clients look for its first words
        except ZenTurboError as error:
            error.message, error.param = f"messages[{index}]: {error.message}", "messages"
            error.args = (error.message,)
            raise
    return result


class _Texts:
    """The text of one request's files, and the account of how much it is in all."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._characters = 0
        self._tokens = 0

    def of_ids(self, file_ids: Sequence[str]) -> str:
        for file_id in file_ids:
            self._take(*self._files.size(file_id))
        return documents_text([document for file_id in file_ids for document in self._files.documents(file_id)])

    def of_inline(self, part: dict[str, Any]) -> str:
        data, filename = _decoded(part, self._files.max_bytes)
        text = documents_text(self._files.read_inline(data, filename))
        self._take(len(text), None)
        return text

    def _take(self, characters: int, tokens: int | None) -> None:
        self._characters += characters
        self._tokens += tokens or 0
        most = self._files.max_tokens
        if most is not None and self._tokens > most:
            raise ContextLengthExceededError(num_prompt_tokens=self._tokens, max_tokens=1, max_model_len=most)
        if self._characters > self._files.max_characters:
            raise DocumentTooLargeError(
                f"the files of this request have {self._characters} characters or more; at most {self._files.max_characters} are read.",
                characters=self._characters,
                max_characters=self._files.max_characters,
            )


def _expanded(message: Any, texts: _Texts) -> Any:
    if not isinstance(message, dict):
        return message
    content = message.get("content")
    by_scheme = message.get("role") in _SCHEME_ROLES
    if isinstance(content, str):
        if by_scheme and content.lstrip().startswith(_SCHEME):
            return {**message, "content": texts.of_ids(_ids_in(content))}
        return message
    if not isinstance(content, list):
        return message
    parts = [_expanded_part(part, texts, by_scheme=by_scheme) for part in content]
    return message if all(new is old for new, old in zip(parts, content, strict=True)) else {**message, "content": parts}


def _expanded_part(part: Any, texts: _Texts, *, by_scheme: bool) -> Any:
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind in _FILE_PARTS:
        inner = part.get("file") if kind == "file" else part
        if not isinstance(inner, dict):
            raise InvalidRequestError("a content part of type file needs an object file.")
        return {"type": "text", "text": _text_of_file(inner, texts)}
    text = part.get("text")
    if by_scheme and isinstance(text, str) and text.lstrip().startswith(_SCHEME):
        return {**part, "text": texts.of_ids(_ids_in(text))}
    return part


def _text_of_file(part: dict[str, Any], texts: _Texts) -> str:
    """``part``: file_id, or file_data with filename."""
    if part.get("file_url") is not None:
        raise UnsupportedParameterError("files are not fetched from an URL; upload the file, or send it as file_data.")
    file_id, data = part.get("file_id"), part.get("file_data")
    if (file_id is None) == (data is None):
        raise InvalidRequestError("a file needs either file_id or file_data.")
    if data is not None:
        return texts.of_inline(part)
    if not isinstance(file_id, str):
        raise InvalidRequestError("file_id must be a string.")
    return texts.of_ids([file_id])


def _ids_in(content: str) -> list[str]:
    """``fileid://a,fileid://b``; the scheme may be left out after the first."""
    ids = [part.strip().removeprefix(_SCHEME) for part in content.split(",")]
    for file_id in ids:
        if not _ID.fullmatch(file_id):
            raise InvalidRequestError(f"a system message that begins with {_SCHEME} must be a list of file ids; {file_id[:100]!r} is none.")
    return ids


def _decoded(part: dict[str, Any], max_bytes: int) -> tuple[bytes, str]:
    """(bytes, name) of an inline file: base64 as a data URL or bare."""
    data, filename = part["file_data"], part.get("filename")
    if not isinstance(data, str) or not isinstance(filename, str | None):
        raise InvalidRequestError("file_data and filename must be strings.")
    match = _DATA_URL.match(data)
    name = clean_filename(filename) if filename else _NAMES.get(match[1].strip().lower() if match else "", "document.txt")
    encoded = data[match.end() :] if match else data
    if len(encoded) // 4 * 3 > max_bytes + 2:
        raise RequestTooLargeError(name, num_bytes=len(encoded) // 4 * 3, max_bytes=max_bytes)
    try:
        return base64.b64decode(encoded, validate=True), name
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError(f"{name}: file_data must be base64, with or without data:...;base64, before it ({error}).") from error


def clean_filename(name: str) -> str:
    """What a client calls a file, as its label. Raises InvalidRequestError (param "file") if nothing is left of it or it is too long."""
    label = clean_label(name)
    if not label or len(label) > MAX_LABEL_CHARACTERS:
        raise InvalidRequestError(
            f"A file's name must have 1 to {MAX_LABEL_CHARACTERS} characters that print; this one has {len(label)}.",
            param="file",
            characters=len(label),
            max_characters=MAX_LABEL_CHARACTERS,
        )
    return label
