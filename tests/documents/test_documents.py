"""Documents of every format, as their own programs make them: their text, or an error that says why there is none."""

from __future__ import annotations

import io
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pypdf
import pytest
from made_documents import bare_docx, docx_of, epub_of, pdf_of, text_of, zip_of
from pypdf.generic import NameObject

from zen_turbo.errors import BinaryDocumentError, DocumentError, EncryptedDocumentError
from zen_turbo.text.documents import read_documents
from zen_turbo.text.readers.document import Reading, clean_label
from zen_turbo.text.readers.limits import Limits
from zen_turbo.text.readers.markup import html_to_text


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


def test_the_page_about_documents_names_the_limits() -> None:
    page, limits = (Path(__file__).parents[2] / "docs" / "documents.md").read_text(), Limits()
    for text in (
        f"{limits.text_characters:,} characters",
        f"{limits.unpacked_bytes >> 20} MiB in all, {limits.ratio} times the packed size each, {limits.members:,} entries",
        f"{limits.memory_bytes >> 30} GiB of address space",
        f"{limits.cpu_s} s of CPU, {limits.wall_s:g} s on the clock",
    ):
        assert text in page
