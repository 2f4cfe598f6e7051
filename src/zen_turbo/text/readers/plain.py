"""Bytes of a text file to text."""

from __future__ import annotations

import codecs
import re

from zen_turbo.errors import BinaryDocumentError

# What web pages declare, besides UTF-8. A list, because codecs.lookup also finds codecs that are no encodings of text.
_DECLARED = frozenset(
    """us-ascii ascii iso-8859-1 iso-8859-2 iso-8859-3 iso-8859-4 iso-8859-5 iso-8859-6 iso-8859-7 iso-8859-8 iso-8859-9 iso-8859-10
    iso-8859-13 iso-8859-14 iso-8859-15 iso-8859-16 windows-1250 windows-1251 windows-1252 windows-1253 windows-1254 windows-1255
    windows-1256 windows-1257 windows-1258 koi8-r koi8-u shift_jis euc-jp iso-2022-jp gb2312 gbk gb18030 big5 euc-kr""".split()
)
_DECLARATION = re.compile(rb"""(?:charset|encoding)\s{0,9}=\s{0,9}["']?([A-Za-z0-9_-]{1,40})""", re.IGNORECASE)
_DECLARATION_WITHIN_BYTES = 1024  # as HTML says


def decode_text(raw: bytes, label: str, *, declared: bool = False) -> str:
    """UTF-8 (with or without mark) or UTF-16 with mark; with ``declared`` also the encoding that a web page names at its beginning.

    Raises BinaryDocumentError for anything else.
    """
    encoding = "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    if declared and encoding != "utf-16" and (match := _DECLARATION.search(raw, 0, _DECLARATION_WITHIN_BYTES)):
        name = match[1].decode("ascii").lower()
        encoding = name if name in _DECLARED else encoding
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise BinaryDocumentError(f"{label} is not text: byte {error.start} is not valid {encoding.removesuffix('-sig')}.") from error
    if "\0" in text:
        raise BinaryDocumentError(f"{label} is not text: it contains NUL characters.")
    return text
