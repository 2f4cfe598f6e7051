"""Documents that are too large, too slow, too deep or damaged: text or an error with its code, and never a process that hangs or grows."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from made_documents import HOSTILE_PDFS, SMALL, bare_docx, docx_of, epub_of, pdf_of, text_of, zip_of

from zen_turbo.errors import DocumentError, DocumentTimeoutError, DocumentTooLargeError
from zen_turbo.text.documents import read_documents, read_file
from zen_turbo.text.readers.apart import ReaderProcess
from zen_turbo.text.readers.document import Reading
from zen_turbo.text.readers.limits import Limits


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
