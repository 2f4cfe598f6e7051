"""Zip files, the container of archives, EPUB and DOCX, opened as if by an enemy; and the XML inside them.

Nothing is ever extracted: members are read into memory by their place in the directory, so that a name cannot lead anywhere. What a member
claims to unpack to is accounted for before it is unpacked, and no more than that is unpacked, whatever its data say. XML may not declare
entities nor refer to other files.
"""

from __future__ import annotations

import posixpath
import stat
import struct
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO
from xml.etree.ElementTree import Element, ParseError

import defusedxml
import defusedxml.ElementTree

from zen_turbo.errors import DocumentError, EncryptedDocumentError
from zen_turbo.text.readers.limits import Budget

_PIECE_BYTES = 1 << 20
# Office and EPUB files use nothing else, and neither do the archives that people make by hand.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# What the library raises for damaged files; RuntimeError is its word for a password.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError, struct.error, LookupError)


class Package:
    """A zip file. Raises DocumentError if ``file`` is none, DocumentTooLargeError if it has too many entries."""

    def __init__(self, file: BinaryIO, label: str, budget: Budget) -> None:
        self.label = label
        self._budget = budget
        try:
            self._zip = zipfile.ZipFile(file)
        except _DAMAGE as error:
            raise DocumentError(f"{label} is no zip file, or a damaged one: {error}.") from error
        self.entries = [entry for entry in self._zip.infolist() if not entry.is_dir()]
        budget.take_members(len(self.entries))
        # The last entry of a name wins, as it does for tools that extract.
        self._by_name = {entry.filename: entry for entry in self.entries}

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def read(self, name: str) -> bytes:
        """A member by name. Raises DocumentError if it is missing or damaged, and what ``read_entry`` raises."""
        if name not in self._by_name:
            raise DocumentError(f"{self.label}: there is no {name[:100]!r} inside.")
        return self.read_entry(self._by_name[name])

    def read_entry(self, entry: zipfile.ZipInfo) -> bytes:
        """Raises DocumentError, EncryptedDocumentError, DocumentTooLargeError (before anything is unpacked)."""
        return b"".join(self._pieces(entry))

    def xml(self, name: str) -> Element:
        """A member as an XML tree, for small ones. Raises DocumentError for XML that is malformed or declares entities."""
        data = self.read(name)
        try:
            return defusedxml.ElementTree.fromstring(data)
        except (ParseError, defusedxml.DefusedXmlException, ValueError, LookupError) as error:
            raise xml_error(self.label, name, error) from error

    def feed(self, name: str, parser: defusedxml.ElementTree.DefusedXMLParser) -> None:
        """Feed a member to a parser piece by piece, so that no tree of it is ever in memory. Raises as ``xml``."""
        if name not in self._by_name:
            raise DocumentError(f"{self.label}: there is no {name[:100]!r} inside.")
        try:
            for piece in self._pieces(self._by_name[name]):
                parser.feed(piece)
            parser.close()
        except (ParseError, defusedxml.DefusedXmlException, LookupError) as error:
            raise xml_error(self.label, name, error) from error

    def _pieces(self, entry: zipfile.ZipInfo) -> Iterator[bytes]:
        name = entry.filename[:100]
        if entry.flag_bits & 0x1:
            raise EncryptedDocumentError(f"{self.label}: {name} is encrypted; only files without a password can be read.")
        if entry.compress_type not in _METHODS:
            raise DocumentError(f"{self.label}: {name} uses compression method {entry.compress_type}; stored and deflate are supported.")
        self._budget.take_member(name, entry.compress_size, entry.file_size)
        try:
            # In pieces: one read would let the data unpack beyond what the header claims before it is cut.
            with self._zip.open(entry) as member:
                while piece := member.read(_PIECE_BYTES):
                    yield piece
        except _DAMAGE as error:
            raise DocumentError(f"{self.label}: {name} is damaged: {error}.") from error


def xml_error(label: str, name: str, error: Exception) -> DocumentError:
    if isinstance(error, defusedxml.DefusedXmlException):
        return DocumentError(f"{label}: {name[:100]} declares XML entities, which are not read.")
    return DocumentError(f"{label}: {name[:100]} is not well-formed XML: {error}.")


def is_link(entry: zipfile.ZipInfo) -> bool:
    return stat.S_ISLNK(entry.external_attr >> 16)


def local_name(tag: str) -> str:
    """An element's name without its namespace: every format here has more than one namespace for the same thing."""
    return tag.rpartition("}")[2]


def relative_to(part: str, reference: str) -> str:
    """The member that a reference (an URL, without fragment) inside ``part`` means. A name to look up, so that ``..`` leads nowhere."""
    path = urllib.parse.unquote(urllib.parse.urldefrag(reference).url)
    return posixpath.normpath(posixpath.join("/", posixpath.dirname(part), path)).lstrip("/")
