"""Documents of every format, good, damaged and hostile: text or an error with its code, and never a process that hangs or grows."""

from __future__ import annotations

import dataclasses
import io
import random
import stat
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import docx
import pypdf
import pytest
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from pypdf.generic import NameObject

from zen_turbo.errors import (
    BinaryDocumentError,
    DocumentError,
    DocumentTimeoutError,
    DocumentTooLargeError,
    EncryptedDocumentError,
)
from zen_turbo.text.documents import read_documents, read_file
from zen_turbo.text.readers.apart import ReaderProcess
from zen_turbo.text.readers.document import Reading, clean_label
from zen_turbo.text.readers.limits import Limits
from zen_turbo.text.readers.markup import html_to_text

SMALL = Limits(text_characters=200_000, unpacked_bytes=8 << 20, memory_bytes=512 << 20, cpu_s=2, wall_s=20)


@pytest.fixture(scope="module")
def process() -> Iterator[ReaderProcess]:
    """One for all tests: it must survive every one of them."""
    with ReaderProcess(SMALL) as result:
        yield result


@pytest.fixture
def read(tmp_path: Path, process: ReaderProcess) -> Callable[[str, bytes], Reading]:
    def result(name: str, data: bytes) -> Reading:
        path = tmp_path / "file"
        path.write_bytes(data)
        return read_file(path, name, process, limit_text=True)

    return result


def text_of(reading: Reading) -> str:
    (document,) = reading.documents
    return document.text


# Files as their own programs make them


def pdf_of(*pages: str, title: str | None = None) -> bytes:
    target = io.BytesIO()
    with PdfPages(target, metadata={"Title": title}) as file:
        for page in pages:
            figure = Figure(figsize=(4, 3))
            figure.text(0.1, 0.5, page)
            file.savefig(figure)
    return target.getvalue()


def zip_of(members: dict[str, str | bytes], *, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return target.getvalue()


CONTAINER = (
    '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles><rootfile full-path="OEBPS/book.opf"/></rootfiles></container>'
)


def epub_of(chapters: dict[str, str], *, spine: list[str] | None = None, more: dict[str, str | bytes] | None = None) -> bytes:
    """Chapters by href; the manifest is in their order, the spine in its own."""
    items = "".join(f'<item id="i{n}" href="{href}" media-type="application/xhtml+xml"/>' for n, href in enumerate(chapters))
    names = list(chapters)
    order = "".join(f'<itemref idref="i{names.index(href)}"/>' for href in spine or names)
    book = (
        '<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata>'
        "<dc:title>The\n Book</dc:title><dc:creator>Ada</dc:creator><dc:creator>Bob</dc:creator></metadata>"
        f'<manifest>{items}<item id="css" href="s.css" media-type="text/css"/></manifest><spine>{order}</spine></package>'
    )
    texts = {f"OEBPS/{href.replace('%20', ' ')}": f"<html><head><title>x</title></head><body>{text}</body></html>" for href, text in chapters.items()}
    return zip_of({"mimetype": "application/epub+zip", "META-INF/container.xml": CONTAINER, "OEBPS/book.opf": book, **texts, **(more or {})})


def docx_of(*paragraphs: str) -> bytes:
    file = docx.Document()
    file.add_heading("The Report", 1)
    for paragraph in paragraphs:
        file.add_paragraph(paragraph)
    table = file.add_table(rows=3, cols=2)
    for row, names in zip(table.rows, (("city", "people"), ("Rome", "2,8 million"), ("", "total")), strict=True):
        for cell, name in zip(row.cells, names, strict=True):
            cell.text = name
    target = io.BytesIO()
    file.save(target)
    return target.getvalue()


W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
RELATIONS = (
    '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship Id="r1" '
    'Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/{kind}" Target="{target}"/></Relationships>'
)


def bare_docx(body: str, *, prolog: str = "", notes: str = "", method: int = zipfile.ZIP_DEFLATED) -> bytes:
    members: dict[str, str | bytes] = {
        "_rels/.rels": RELATIONS.format(kind="officeDocument", target="word/document.xml"),
        "word/document.xml": f'<?xml version="1.0"?>{prolog}<w:document xmlns:w="{W}"><w:body>{body}</w:body></w:document>',
    }
    if notes:
        members["word/_rels/document.xml.rels"] = RELATIONS.format(kind="footnotes", target="footnotes.xml")
        members["word/footnotes.xml"] = f'<w:footnotes xmlns:w="{W}">{notes}</w:footnotes>'
    return zip_of(members, method=method)


def test_pdf(read: Callable[[str, bytes], Reading]) -> None:
    text = text_of(read("a.pdf", pdf_of("The sky is blue.", "The grass is green.", title="Colours")))
    assert text == "Title: Colours\n\n[page 1]\nThe sky is blue.\n\n[page 2]\nThe grass is green."
    assert text_of(read("a.PDF", pdf_of("One page."))) == "One page."
    assert text_of(read("no extension", pdf_of("One page."))) == "One page."


def test_a_pdf_without_text_says_so(read: Callable[[str, bytes], Reading]) -> None:
    with pytest.raises(DocumentError, match=r"scan\.pdf has 2 pages and no text"):
        read("scan.pdf", pdf_of("", ""))


@pytest.mark.parametrize("algorithm", ["RC4-128", "AES-256"])
def test_an_encrypted_pdf(read: Callable[[str, bytes], Reading], algorithm: str) -> None:
    """Many are only locked against printing, and open with no password."""
    for password in ("", "secret"):
        writer = pypdf.PdfWriter(io.BytesIO(pdf_of("The sky is blue.")))
        writer.encrypt(password, "owner", algorithm=algorithm)
        target = io.BytesIO()
        writer.write(target)
        if not password:
            assert "The sky is blue." in text_of(read("locked.pdf", target.getvalue()))
            continue
        with pytest.raises(EncryptedDocumentError, match=r"locked\.pdf") as caught:
            read("locked.pdf", target.getvalue())
        assert caught.value.code == "encrypted_document"


def test_a_page_that_cannot_be_read_says_so_in_its_place(read: Callable[[str, bytes], Reading]) -> None:
    writer = pypdf.PdfWriter(io.BytesIO(pdf_of("one", "two", "three")))
    writer.pages[1]["/Contents"].get_object()[NameObject("/Filter")] = NameObject("/Nothing")
    target = io.BytesIO()
    writer.write(target)
    text = text_of(read("a.pdf", target.getvalue()))
    assert "[page 1]\none" in text and "[page 3]\nthree" in text
    assert "[page 2]\n[this page could not be read:" in text


def test_epub_is_read_in_the_order_of_its_spine(read: Callable[[str, bytes], Reading]) -> None:
    chapters = {"b.xhtml": "<h1>Two</h1><p>second &amp; last</p>", "text/a%20b.xhtml": "<h1>One</h1><p>first</p>"}
    data = epub_of(chapters, spine=["text/a%20b.xhtml", "b.xhtml"])
    assert text_of(read("a.epub", data)) == "Title: The Book\nAuthor: Ada, Bob\n\nOne\nfirst\n\nTwo\nsecond & last"
    assert text_of(read("a.zip", data)) == text_of(read("a.epub", data)), "it is what it is, whatever its name"
    locked = (
        '<encryption xmlns:enc="http://www.w3.org/2001/04/xmlenc#"><enc:EncryptedData><enc:CipherData>'
        '<enc:CipherReference URI="OEBPS/{}"/></enc:CipherData></enc:EncryptedData></encryption>'
    )
    with pytest.raises(EncryptedDocumentError, match="rights management"):
        read("a.epub", epub_of(chapters, more={"META-INF/encryption.xml": locked.format("b.xhtml")}))
    assert "second" in text_of(read("a.epub", epub_of(chapters, more={"META-INF/encryption.xml": locked.format("font.otf")})))


def test_docx(read: Callable[[str, bytes], Reading]) -> None:
    data = docx_of("The sky is blue.", "Ünïcödé\tand a tab.")
    assert text_of(read("a.docx", data)) == "The Report\nThe sky is blue.\nÜnïcödé\tand a tab.\ncity\tpeople\nRome\t2,8 million\n\ttotal"
    assert text_of(read("a.zip", data)) == text_of(read("a.docx", data))


def test_docx_says_what_it_says_today(read: Callable[[str, bytes], Reading]) -> None:
    body = (
        '<w:p><w:pPr><w:tabs><w:tab w:val="left"/></w:tabs></w:pPr><w:r><w:t>a</w:t></w:r>'
        '<w:ins><w:r><w:t xml:space="preserve"> new</w:t></w:r></w:ins>'
        "<w:del><w:r><w:delText>gone</w:delText></w:r></w:del><w:moveFrom><w:r><w:t>moved</w:t></w:r></w:moveFrom>"
        '<w:r><w:footnoteReference w:id="2"/></w:r></w:p>'
        '<mc:AlternateContent xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"><mc:Choice><w:p><w:r><w:t>box</w:t></w:r></w:p>'
        "</mc:Choice><mc:Fallback><w:p><w:r><w:t>box</w:t></w:r></w:p></mc:Fallback></mc:AlternateContent>"
        "<w:p><w:r><w:instrText>PAGE</w:instrText><w:br/><w:t>end</w:t></w:r></w:p>"
    )
    notes = (
        '<w:footnote w:id="0" w:type="separator"><w:p><w:r><w:t>---</w:t></w:r></w:p></w:footnote>'
        '<w:footnote w:id="2"><w:p><w:r><w:t>a note</w:t></w:r></w:p></w:footnote>'
    )
    assert text_of(read("a.docx", bare_docx(body, notes=notes))) == "a new[^2]\nbox\nend\n[^2] a note"


def test_html() -> None:
    page = (
        "<!doctype html><title>no</title><style>p {}</style><p>one\n  two<b>three</b><br>four &lt;five&gt;<table><tr><td> a\tb</td><td>c</td></tr>"
        "<tr><th>d<td>e<tr><td></td><td>f</table><pre>\ndef f():\n    return  1\n</pre><script>no()</script><p>end"
    )
    expected = ["one twothree", "four <five>", "a b\tc", "d\te", "\tf", "def f():", "    return  1", "end"]
    assert html_to_text(page).split("\n") == expected


def test_html_in_the_encoding_that_it_declares(read: Callable[[str, bytes], Reading]) -> None:
    assert text_of(read("a.html", '<meta charset="windows-1252"><p>fünf €'.encode("cp1252"))) == "fünf €"
    assert text_of(read("a.html", "<p>fünf €".encode())) == "fünf €"
    with pytest.raises(BinaryDocumentError, match=r"a\.html"):
        read("a.html", '<meta charset="zlib_codec"><p>fünf'.encode("latin-1"))


def test_the_members_of_an_archive_are_documents(read: Callable[[str, bytes], Reading]) -> None:
    link = zipfile.ZipInfo("src/link.txt")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in {
            "src/deep/z.py": "print(1)",
            "src/b.md": "# Two",
            "a.txt": "one",
            "paper.pdf": pdf_of("three"),
            "book.epub": epub_of({"c.xhtml": "four"}),
            "src/report.docx": docx_of("five"),
            "page.html": "<p>six",
            ".git/config": "no",
            "__MACOSX/a.txt": "no",
            "src/node_modules/x.js": "no",
            "picture.png": b"\x89PNG\r\n\x1a\n\x00",
            "broken.pdf": b"%PDF-1.7",
            "empty.txt": " ",
            "inner.zip": zip_of({"x.txt": "no"}),
            "inner": zip_of({"x.txt": "no"}),
            "sheet.xlsx": b"PK\x03\x04",
            "../up.txt": "no",
            "/abs.txt": "no",
            "C:\\windows.txt": "no",
            "n" * 300: "no",
        }.items():
            archive.writestr(name, data)
        archive.writestr(link, "/etc/passwd")
    reading = read("all.zip", target.getvalue())
    assert [document.label for document in reading.documents] == [
        *(f"all.zip/{name}" for name in ("a.txt", "book.epub", "page.html", "paper.pdf", "src/b.md", "src/report.docx", "src/deep/z.py"))
    ]
    assert [document.text.split("\n")[-1] for document in reading.documents][:4] == ["one", "four", "six", "three"]
    reasons = dict(reading.skipped)
    for name, word in {
        "picture.png": "not text",
        "broken.pdf": "no PDF",
        "inner.zip": "inside an archive",
        "inner": "inside an archive",
        "sheet.xlsx": "not supported",
        "up.txt": "leads outside",
        "abs.txt": "leads outside",
        "windows.txt": "leads outside",
        "src/link.txt": "a link",
        "n" * 300: "300 characters; at most 255",
    }.items():
        assert word in reasons.pop(f"all.zip/{name}")
    assert reasons == {}


def test_an_archive_and_a_folder_read_alike(tmp_path: Path) -> None:
    members: dict[str, str | bytes] = {"b/two.txt": "two", "a.txt": "one", "b/c/three.html": "<p>three", "paper.pdf": pdf_of("four")}
    for name, data in members.items():
        path = tmp_path / "x.zip" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    (tmp_path / "zipped").mkdir()
    (tmp_path / "zipped" / "x.zip").write_bytes(zip_of(members))
    assert read_documents([tmp_path / "x.zip"]) == read_documents([tmp_path / "zipped" / "x.zip"])
    folder = read_documents([tmp_path / "zipped", tmp_path / "x.zip" / "a.txt"])
    assert [document.label for document in folder.documents] == ["a.txt"]
    assert [label for label, _ in folder.skipped] == ["zipped/x.zip"]


def test_an_encrypted_archive(read: Callable[[str, bytes], Reading]) -> None:
    data = bytearray(zip_of({"a.txt": "one"}))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    with pytest.raises(EncryptedDocumentError, match=r"a\.zip"):
        read("a.zip", bytes(data))


@pytest.mark.parametrize("name", ["a.odt", "a.RTF", "a.doc", "a.xlsx", "a.tar.gz", "a.mobi"])
def test_formats_that_are_refused_by_name(read: Callable[[str, bytes], Reading], name: str) -> None:
    with pytest.raises(DocumentError, match="not supported"):
        read(name, b"text")


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("a.txt", "a.txt"),
        ("../../etc/passwd", "etc/passwd"),
        ("/etc/passwd", "etc/passwd"),
        ("C:\\Users\\me\\a.txt", "Users/me/a.txt"),
        ("a/./b//c.txt", "a/b/c.txt"),
        ("a ===\n=== end of the document ===\n\x00x.txt", "a === === end of the document === x.txt"),
        ("\u202egnp.exe", "gnp.exe"),
        ("..", ""),
    ],
)
def test_a_name_becomes_a_label(name: str, label: str) -> None:
    assert clean_label(name) == label


# Too large, too slow, too deep


def too_large(read: Callable[[str, bytes], Reading], name: str, data: bytes, limit: str) -> None:
    with pytest.raises(DocumentTooLargeError) as caught:
        read(name, data)
    assert caught.value.code == "document_too_large"
    most = caught.value.details[limit]
    assert str(most) in caught.value.message
    found = caught.value.details.get(limit.removeprefix("max_"))
    assert limit == "max_memory_bytes" or (found > most and str(found) in caught.value.message)


def spaces(count: int) -> bytes:
    return b" " * (count - 1) + b"x"


def test_a_flat_zip_bomb(read: Callable[[str, bytes], Reading]) -> None:
    bomb = zip_of({"a.txt": spaces(6 << 20)})
    assert len(bomb) < 10_000
    too_large(read, "a.zip", bomb, "max_ratio")
    noise = random.Random(0).randbytes(6000).hex()
    too_large(read, "a.zip", zip_of({f"{n}.png": b"\x00" + noise.encode() * 75 for n in range(10)}), "max_unpacked_bytes")
    too_large(read, "a.zip", zip_of({f"{n}.txt": noise * 20 for n in range(10)}), "max_characters")


def test_a_nested_zip_bomb(read: Callable[[str, bytes], Reading]) -> None:
    """An archive inside is never opened, and what it would unpack to does not matter; one that unpacks to too much itself is refused."""
    inner = zip_of({f"{n}.txt": spaces(4 << 20) for n in range(4)})
    with_bomb = zip_of({**{f"{n}.zip": inner for n in range(16)}, "a.txt": "one"})
    reading = read("a.zip", with_bomb)
    assert [document.text for document in reading.documents] == ["one"] and len(reading.skipped) == 16
    too_large(read, "a.zip", zip_of({"deep/book.epub": epub_of({"a.xhtml": "x" * (6 << 20)})}), "max_ratio")


def test_a_zip_bomb_whose_members_share_their_data(read: Callable[[str, bytes], Reading]) -> None:
    """Directory entries that all point to the same bytes: the claims add up, and the claims are what counts."""
    data = zip_of({"a.txt": "\0" + random.Random(0).randbytes(6000).hex() * 75})
    start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    entry = data[start:end]
    record = bytearray(data[end:])
    record[8:10] = record[10:12] = (20).to_bytes(2, "little")
    record[12:16] = (20 * len(entry)).to_bytes(4, "little")
    entries = b"".join(entry.replace(b"a.txt", b"%c.txt" % (97 + n)) for n in range(20))
    too_large(read, "a.zip", data[:start] + entries + bytes(record), "max_unpacked_bytes")


def test_a_zip_that_unpacks_beyond_its_claims(read: Callable[[str, bytes], Reading]) -> None:
    data = bytearray(zip_of({"a.txt": spaces(6 << 20)}))
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.index(signature) + offset
        data[at : at + 4] = (1000).to_bytes(4, "little")
    with pytest.raises(DocumentError):
        text_of(read("a.docx", bytes(data)))
    reading = read("a.zip", bytes(data))
    assert reading.documents == () and "damaged" in reading.skipped[0][1]


def test_too_many_members(read: Callable[[str, bytes], Reading], tmp_path: Path) -> None:
    path = tmp_path / "many.zip"
    path.write_bytes(zip_of({f"{n}.txt": "x" for n in range(30)}))
    with ReaderProcess(dataclasses.replace(SMALL, members=20)) as process, pytest.raises(DocumentTooLargeError, match="30 entries; at most 20"):
        read_file(path, "many.zip", process)


LAUGHS = "<!DOCTYPE w [<!ENTITY a 'ha'>" + "".join(f"<!ENTITY {b} '{f'&{a};' * 10}'>" for a, b in zip("abcdefghi", "bcdefghij", strict=True)) + "]>"


@pytest.mark.parametrize(
    "prolog",
    [
        LAUGHS,
        "<!DOCTYPE w [<!ENTITY j SYSTEM 'file:///etc/passwd'>]>",
        "<!DOCTYPE w [<!ENTITY % e SYSTEM 'http://127.0.0.1:9/x'> %e;<!ENTITY j 'x'>]>",
    ],
    ids=["laughs", "file", "parameter"],
)
def test_entities_are_not_read(read: Callable[[str, bytes], Reading], prolog: str) -> None:
    with pytest.raises(DocumentError, match="entities"):
        read("a.docx", bare_docx("<w:p><w:r><w:t>&j;</w:t></w:r></w:p>", prolog=prolog))
    with pytest.raises(DocumentError, match="entities"):
        read("a.epub", epub_of({"a.xhtml": "x"}, more={"OEBPS/book.opf": f"{prolog}<package>&j;</package>"}))


def test_nesting_costs_nothing(read: Callable[[str, bytes], Reading]) -> None:
    depth = 200_000
    many = "".join(f"<w:x{n % 7}>" for n in range(depth))
    close = "".join(f"</w:x{n % 7}>" for n in reversed(range(depth)))
    deep = bare_docx(f"{many}<w:p><w:t>deep</w:t></w:p>{close}", method=zipfile.ZIP_STORED)
    assert text_of(read("a.docx", deep)) == "deep"
    assert text_of(read("a.html", (b"<div>" * depth) + b"deep")) == "deep"
    with pytest.raises(DocumentError):
        read("a.epub", epub_of({"a.xhtml": "x"}, more={"OEBPS/book.opf": f"<package>{many}"}))


def pdf_objects(*objects: str | bytes) -> bytes:
    """A PDF of these objects, the first of them the catalog."""
    data, offsets = b"%PDF-1.7\n", []
    for number, value in enumerate(objects, 1):
        offsets.append(len(data))
        data += b"%d 0 obj\n" % number + (value if isinstance(value, bytes) else value.encode()) + b"\nendobj\n"
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(objects) + 1
    trailer = b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (size, len(data))
    return data + b"xref\n0 %d\n0000000000 65535 f \n" % size + table + trailer


def stream(data: bytes, entries: str = "", length: int | None = None) -> bytes:
    return f"<< /Length {len(data) if length is None else length} {entries}>>\nstream\n".encode() + data + b"\nendstream"


FONT = "/Font << /F << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> "  # without one nobody looks at the contents
PAGE = f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 9 9] /Contents 4 0 R /Resources << {FONT} {{}} >> >>"
CATALOG, PAGES = "<< /Type /Catalog /Pages 2 0 R >>", "<< /Type /Pages /Kids [3 0 R] /Count 1 >>"
FORM = "/Type /XObject /Subtype /Form /BBox [0 0 9 9] /Resources << " + FONT + "/XObject << /F 5 0 R /G 5 0 R >> >> "
HOSTILE_PDFS: dict[str, bytes] = {
    "pages that are their own children": pdf_objects(CATALOG, "<< /Type /Pages /Kids [2 0 R 2 0 R] /Count 2 >>"),
    "a page tree in a circle": pdf_objects(
        CATALOG, "<< /Type /Pages /Kids [3 0 R] /Count 9 >>", "<< /Type /Pages /Parent 2 0 R /Kids [2 0 R] /Count 9 >>"
    ),
    "a page that is its own parent": pdf_objects(CATALOG, PAGES, "<< /Type /Page /Parent 3 0 R >>"),
    "a reference to itself": pdf_objects(CATALOG, PAGES, PAGE.format(""), "4 0 R"),
    "a form that draws itself": pdf_objects(CATALOG, PAGES, PAGE.format("/XObject << /F 5 0 R >>"), stream(b"/F Do"), stream(b"/F Do /G Do", FORM)),
    "a billion pages": pdf_objects(CATALOG, "<< /Type /Pages /Kids [3 0 R] /Count 1000000000 >>", PAGE.format(""), stream(b"")),
    "a stream longer than the file": pdf_objects(CATALOG, PAGES, PAGE.format(""), stream(b"", length=1 << 60)),
    "a stream of negative length": pdf_objects(CATALOG, PAGES, PAGE.format(""), stream(b"", length=-1)),
    "a deflate bomb": pdf_objects(CATALOG, PAGES, PAGE.format(""), stream(zlib.compress(b" " * (100 << 20), 9), "/Filter /FlateDecode ")),
    "deflate in deflate": pdf_objects(
        CATALOG, PAGES, PAGE.format(""), stream(zlib.compress(zlib.compress(bytes(100 << 20), 9), 9), "/Filter [/FlateDecode /FlateDecode] ")
    ),
    "arrays without end": pdf_objects(CATALOG, PAGES, PAGE.format(""), "[" * 100_000),
    "pages without end": pdf_objects(
        CATALOG,
        f"<< /Type /Pages /Kids [{'3 0 R ' * 300}] /Count 300 >>",
        PAGE.format(""),
        stream(b"BT /F 9 Tf () Tj ET " * 20_000),
    ),
    "too many operations": pdf_objects(CATALOG, PAGES, PAGE.format(""), stream(b"BT /F 9 Tf (x) Tj ET " * 600_000)),
    "a cross reference table that leads to itself": b"%PDF-1.7\nxref\n0 1\n0000000000 65535 f \ntrailer\n<< /Size 1 /Prev 9 >>\nstartxref\n9\n%%EOF",
    "only a header": b"%PDF-1.7",
    "nothing": b"",
}


# What must be met for the attack to have reached what it attacks; the others may give text, too.
MET = {
    "pages that are their own children": "cyclic",
    "a page tree in a circle": "cyclic",
    "a stream longer than the file": "1152921504606846976",
    "a deflate bomb": "Limit",
    "deflate in deflate": "Limit",
    "arrays without end": "recursion",
    "pages without end": "2 s of CPU time",
}


@pytest.mark.parametrize("name", HOSTILE_PDFS)
def test_a_pdf_made_to_hurt(read: Callable[[str, bytes], Reading], name: str) -> None:
    """Text or an error of the document; that it comes at all is what the limits are for."""
    try:
        text = text_of(read("evil.pdf", HOSTILE_PDFS[name]))
        assert text.strip() and name not in MET
    except DocumentError as error:
        assert error.code in ("unreadable_document", "document_too_large", "document_timeout")
        assert MET.get(name, "") in error.message


def test_cpu_time_is_limited(tmp_path: Path) -> None:
    path = tmp_path / "slow.pdf"
    path.write_bytes(HOSTILE_PDFS["pages without end"])
    with ReaderProcess(dataclasses.replace(SMALL, cpu_s=1)) as process:
        with pytest.raises(DocumentTimeoutError, match="1 s of CPU time") as caught:
            read_file(path, "slow.pdf", process)
        assert (caught.value.code, caught.value.details) == ("document_timeout", {"max_cpu_s": 1})
        path.write_bytes(pdf_of("The sky is blue."))
        assert text_of(read_file(path, "next.pdf", process)) == "The sky is blue.", "the next file gets a new process"


def test_time_is_limited(tmp_path: Path) -> None:
    path = tmp_path / "slow.pdf"
    path.write_bytes(HOSTILE_PDFS["pages without end"])
    with (
        ReaderProcess(dataclasses.replace(SMALL, cpu_s=100, wall_s=0.5)) as process,
        pytest.raises(DocumentTimeoutError, match=r"within 0\.5 s"),
    ):
        read_file(path, "slow.pdf", process)


def test_memory_is_limited(tmp_path: Path) -> None:
    path = tmp_path / "large.zip"
    path.write_bytes(zip_of({"a.txt": "large " * (12 << 20)}, method=zipfile.ZIP_STORED))
    limits = dataclasses.replace(SMALL, unpacked_bytes=1 << 40, memory_bytes=128 << 20)

    def read_large(name: str, data: bytes) -> Reading:
        with ReaderProcess(limits) as process:
            return read_file(path, name, process)

    too_large(read_large, "large.zip", b"", "max_memory_bytes")


def test_a_long_text_is_refused_only_where_it_is_asked_for(read: Callable[[str, bytes], Reading], tmp_path: Path) -> None:
    too_large(read, "a.txt", b"a" * 200_001, "max_characters")
    too_large(read, "a.txt", b"a" * 900_000, "max_characters")
    too_large(read, "a.html", b"a" * 200_001, "max_characters")
    assert len(text_of(read("a.txt", "ä".encode() * 200_000))) == 200_000
    (tmp_path / "a.txt").write_text("a" * 200_001)
    assert len(text_of(read_documents([tmp_path / "a.txt"]))) == 200_001


def test_a_reader_can_be_stopped(tmp_path: Path) -> None:
    path = tmp_path / "slow.pdf"
    path.write_bytes(HOSTILE_PDFS["pages without end"])
    process = ReaderProcess(Limits())

    def stop() -> None:
        while process._process is None:
            time.sleep(0.01)
        process.stop()

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(DocumentError, match="stopped"):
        read_file(path, "slow.pdf", process)
    thread.join()
    with pytest.raises(DocumentError, match="stopped"):
        read_file(path, "slow.pdf", process)


# Damage


@pytest.fixture(scope="module")
def good() -> dict[str, bytes]:
    return {
        "a.pdf": pdf_of("The sky is blue.", "The grass is green.", title="Colours"),
        "a.epub": epub_of({"a.xhtml": "<p>The sky is blue.", "b.xhtml": "<p>The grass is green."}),
        "a.docx": docx_of("The sky is blue."),
        "a.zip": zip_of({"a.txt": "The sky is blue.", "b.html": "<p>The grass is green."}),
        "a.html": b"<!doctype html><head><meta charset=utf-8><title>x</title></head><p class='a'>The sky &amp; the grass <!-- no --><b>x</b>",
    }


@pytest.mark.parametrize("name", ["a.pdf", "a.epub", "a.docx", "a.zip", "a.html"])
def test_damaged_files(read: Callable[[str, bytes], Reading], good: dict[str, bytes], name: str) -> None:
    """A hundred corruptions: text or a DocumentError. Some must be refused, or the damage did not reach what is read."""
    data = good[name]
    generator = random.Random(name)
    refused = 0
    for round_ in range(100):
        damaged = bytearray(data)
        match round_ % 4:
            case 0:
                del damaged[generator.randrange(len(data)) :]
            case 1:
                for _ in range(generator.choice((1, 3, 30))):
                    damaged[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            case 2:
                at = generator.randrange(len(data))
                damaged[at : at + generator.randrange(1, 100)] = b""
            case _:
                at, other = generator.randrange(len(data)), generator.randrange(len(data))
                damaged[at:at] = data[other : other + generator.randrange(1, 100)]
        try:
            reading = read(name, bytes(damaged))
            assert all(isinstance(document.text, str) for document in reading.documents)
            refused += bool(reading.skipped)
        except DocumentError as error:
            assert name in error.message
            refused += 1
    assert refused > (0 if name == "a.html" else 10)


def test_truncated_files(read: Callable[[str, bytes], Reading], good: dict[str, bytes]) -> None:
    for name in ("a.epub", "a.docx", "a.zip"):
        for cut in (0, 1, 30, len(good[name]) // 2, len(good[name]) - 1):
            with pytest.raises(DocumentError, match=r"is no zip file, or a damaged one"):
                read(name, good[name][:cut])


def test_the_page_about_documents_names_the_limits() -> None:
    page, limits = (Path(__file__).parent.parent / "docs" / "documents.md").read_text(), Limits()
    for text in (
        f"{limits.text_characters:,} characters",
        f"{limits.unpacked_bytes >> 20} MiB in all, {limits.ratio} times the packed size each, {limits.members:,} entries",
        f"{limits.memory_bytes >> 30} GiB of address space",
        f"{limits.cpu_s} s of CPU, {limits.wall_s:g} s on the clock",
    ):
        assert text in page
