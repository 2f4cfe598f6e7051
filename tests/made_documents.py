"""Documents as their own programs make them, PDFs that are made to hurt, and what tests of reading them share."""

from __future__ import annotations

import io
import zipfile
import zlib

import docx
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

from zen_turbo.text.readers.document import Reading
from zen_turbo.text.readers.limits import Limits

SMALL = Limits(text_characters=200_000, unpacked_bytes=8 << 20, memory_bytes=512 << 20, cpu_s=2, wall_s=20)


def text_of(reading: Reading) -> str:
    (document,) = reading.documents
    return document.text


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
