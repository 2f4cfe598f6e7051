"""Files over a real socket with the real ``openai`` client, and their use in messages; the model is a tiny random one."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from made_documents import HOSTILE_PDFS, docx_of, epub_of, pdf_of, zip_of
from serving import HELLO, NAME, client_of, serving, wait_until

from zen_turbo import LLM
from zen_turbo.engine.engine import Engine
from zen_turbo.errors import ContextLengthExceededError, DocumentTooLargeError
from zen_turbo.server.app import create_app
from zen_turbo.server.attachments import expand_files
from zen_turbo.text.documents import Document, build_messages, documents_text

MAX_BYTES, QUOTA = 1 << 20, 3 << 20


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return LLM(tiny_folder, prefill_chunk_tokens=128, kv_cache_bytes=64 << 20, max_model_len=4096).engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "files"


@pytest.fixture(scope="module")
def url(engine: Engine, folder: Path) -> Iterator[str]:
    app = create_app(lambda: engine, model_name=NAME, files_dir=folder, max_upload_bytes=MAX_BYTES, files_quota_bytes=QUOTA)
    with serving(app) as base:
        wait_until(lambda: httpx.get(f"{base}/health").status_code == 200)
        yield base


@pytest.fixture
def client(url: str, folder: Path) -> Iterator[openai.OpenAI]:
    with client_of(url) as result:
        yield result
        for file in result.files.list():
            result.files.delete(file.id)
    assert [path.name for path in folder.iterdir()] == [".lock"], "nothing stays"


def create(client: openai.OpenAI, name: str, data: bytes, purpose: Any = "user_data") -> Any:
    return client.files.create(file=(name, data), purpose=purpose)


def test_the_life_of_a_file(client: openai.OpenAI, engine: Engine) -> None:
    data = pdf_of("The sky is blue.")
    file = create(client, "colours.pdf", data)
    assert file.id.startswith("file-") and (file.object, file.bytes, file.filename) == ("file", len(data), "colours.pdf")
    assert (file.purpose, file.status) == ("user_data", "processed")
    text = documents_text([Document("colours.pdf", "The sky is blue.")])
    expected = {"tokens": len(engine.tokenizer.encode(text)), "characters": len(text), "documents": 1, "num_skipped": 0, "skipped": []}
    assert file.model_extra["zen_turbo"] == expected
    assert client.files.retrieve(file.id) == file
    assert client.files.list().data == [file]
    assert client.files.content(file.id).read() == data
    gone = client.files.delete(file.id)
    assert (gone.id, gone.deleted, gone.object) == (file.id, True, "file")
    for use in (client.files.retrieve, client.files.delete, client.files.content):
        with pytest.raises(openai.NotFoundError) as caught:
            use(file.id)
        assert (caught.value.code, caught.value.param) == ("file_not_found", "file_id")


def test_every_format(client: openai.OpenAI) -> None:
    for name, data, purpose in (
        ("a.md", b"# Colours", "file-extract"),
        ("a.py", b"print(1)", "assistants"),
        ("a.html", b"<p>The sky", "user_data"),
        ("a.epub", epub_of({"a.xhtml": "The sky"}), "user_data"),
        ("a.docx", docx_of("The sky"), "user_data"),
    ):
        assert create(client, name, data, purpose).model_extra["zen_turbo"]["documents"] == 1
    archive = zip_of({"a.txt": "one", "b/c.txt": "two", "x.png": b"\x00"})
    ours = create(client, "all.zip", archive).model_extra["zen_turbo"]
    assert (ours["documents"], ours["num_skipped"], ours["skipped"][0]["filename"]) == (2, 1, "all.zip/x.png")


def test_the_list(client: openai.OpenAI, url: str) -> None:
    ids = [create(client, f"{n}.txt", b"text", "user_data" if n % 2 else "assistants").id for n in range(5)]
    assert [file.id for file in client.files.list()] == ids[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == ids, "the client asks for page after page"
    page = client.files.list(limit=2, order="asc", after=ids[1])
    assert ([file.id for file in page.data], page.has_more) == (ids[2:4], True)
    assert [file.id for file in client.files.list(purpose="user_data", order="asc")] == ids[1::2]
    body = httpx.get(f"{url}/v1/files", params={"limit": 2}).json()
    assert (body["object"], body["first_id"], body["last_id"], body["has_more"]) == ("list", ids[4], ids[3], True)
    for name, value in (("limit", "0"), ("limit", "10001"), ("limit", "x"), ("limit", "0" * 5000 + "1"), ("order", "up"), ("after", "file-none")):
        answer = httpx.get(f"{url}/v1/files", params={name: value})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


# What is refused


def refused(client: openai.OpenAI, name: str, data: bytes, **values: Any) -> dict[str, Any]:
    with pytest.raises(openai.APIStatusError) as caught:
        create(client, name, data, **values)
    body = caught.value.body
    assert isinstance(body, dict)
    return {"status": caught.value.status_code, **body}


@pytest.mark.parametrize("purpose", ["fine-tune", "batch", "vision", "", "x" * 1000])
def test_other_purposes(client: openai.OpenAI, purpose: str) -> None:
    body = refused(client, "a.txt", b"text", purpose=purpose)
    assert (body["status"], body["param"]) == (400, "purpose") and "file-extract" in body["message"]


@pytest.mark.parametrize(
    ("name", "data", "code", "word"),
    [
        ("a.txt", b"", "unreadable_document", "no text"),
        ("a.png", b"\x89PNG\x00", "binary_document", "a.png"),
        ("a.pdf", b"%PDF-1.7", "unreadable_document", "a.pdf"),
        ("a.odt", b"text", "unreadable_document", "not supported"),
        ("bomb.zip", zip_of({"a.txt": b" " * (8 << 20)}), "document_too_large", "times its size"),
        ("loop.pdf", HOSTILE_PDFS["pages that are their own children"], "unreadable_document", "loop.pdf"),
        ("pictures.zip", zip_of({"x.png": b"\x00"}), "unreadable_document", "x.png"),
    ],
)
def test_a_file_that_cannot_be_read_leaves_nothing(client: openai.OpenAI, name: str, data: bytes, code: str, word: str) -> None:
    body = refused(client, name, data)
    assert (body["status"], body["code"], body["type"]) == (400, code, "invalid_request_error") and word in body["message"]
    assert client.files.list().data == []


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("../../etc/passwd.txt", "etc/passwd.txt"),
        ("/etc/passwd.txt", "etc/passwd.txt"),
        ("C:\\Windows\\a.txt", "a.txt"),
        ("book/chapter 1.txt", "book/chapter 1.txt"),
        ("ünï 東京.txt", "ünï 東京.txt"),
        (".lock", ".lock"),
    ],
)
def test_names_are_only_labels(client: openai.OpenAI, folder: Path, name: str, label: str) -> None:
    before = set(folder.parent.parent.rglob("*"))
    file = create(client, name, b"text")
    assert file.filename == label
    assert {path.name for path in set(folder.parent.parent.rglob("*")) - before} == {file.id, "content", "documents.json", "about.json"}
    assert client.files.content(file.id).read() == b"text"


@pytest.mark.parametrize("path", ["..%2F..%2Fetc%2Fpasswd", ".lock", "file-" + "0" * 32, "%2e%2e", "file-%00"])
def test_ids_are_only_looked_up(url: str, path: str) -> None:
    for method, tail in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        answer = httpx.request(method, f"{url}/v1/files/{path}{tail}")
        assert answer.status_code == 404 and answer.json()["error"]["code"] in ("file_not_found", "not_found")


def test_too_many_bytes(client: openai.OpenAI, url: str) -> None:
    whole = create(client, "a.txt", b"x" * MAX_BYTES)
    assert whole.bytes == MAX_BYTES
    client.files.delete(whole.id)
    for count in (MAX_BYTES + 1, MAX_BYTES + (1 << 20), 40 << 20):
        body = refused(client, "a.txt", b"x" * count)
        assert (body["status"], body["code"], body["param"]) == (413, "request_too_large", "file")
        assert body["num_bytes"] >= count and body["max_bytes"] == MAX_BYTES
        assert str(MAX_BYTES) in body["message"] and str(body["num_bytes"]) in body["message"]

    def without_length() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n'
        for _ in range(40):
            yield b"x" * (1 << 20)

    answer = httpx.post(f"{url}/v1/files", content=without_length(), headers={"Content-Type": "multipart/form-data; boundary=b"}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_the_quota(client: openai.OpenAI) -> None:
    """Content and text count, and what is refused or deleted gives its room back."""
    data = b"x" * 700_000
    kept = [create(client, "a.txt", data).id for _ in range(2)]
    body = refused(client, "a.txt", data)
    assert (body["status"], body["code"], body["unit"]) == (400, "file_quota_exceeded", "bytes")
    assert body["need"] > body["have"] > 0 and str(body["need"]) in body["message"] and str(body["have"]) in body["message"]
    small = zip_of({"a.txt": os.urandom(200).hex() * 1200})
    assert len(small) < 10_000
    create(client, "fits.txt", b"y" * 10_000)
    assert refused(client, "a.zip", small)["code"] == "file_quota_exceeded", "its text would not fit"
    client.files.delete(kept[0])
    create(client, "a.zip", small)


def test_what_is_no_upload(url: str, client: openai.OpenAI) -> None:
    def post(**values: Any) -> tuple[int, str | None]:
        answer = httpx.post(f"{url}/v1/files", timeout=60, **values)
        return answer.status_code, answer.json()["error"]["param"]

    form = {"Content-Type": "multipart/form-data; boundary=b"}
    assert post(json={"file": "x"}) == (400, "file")
    assert post(content=b"x", headers={"Content-Type": "multipart/form-data"}) == (400, "file")
    assert post(content=b"nonsense", headers=form) == (400, "file")
    assert post(content=b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\ncut', headers=form)[0] == 400
    assert post(data={"purpose": "user_data", "file": "not a file"}, files={"other": b"x"}) == (400, "file")
    assert post(data={"purpose": "user_data"}, files=[("file", ("a.txt", b"1")), ("file", ("b.txt", b"2"))]) == (400, "file")
    assert post(data={"purpose": "user_data"}, files={"file": ("../..", b"1")}) == (400, "file")
    assert post(data={"purpose": "user_data"}, files={"file": ("n" * 256, b"1")}) == (400, "file")
    assert post(data={"purpose": "user_data", "expires_after[seconds]": "9"}, files={"file": ("a", b"1")}) == (400, "expires_after")
    assert post(data={f"f{n}": "1" for n in range(100)}, files={"file": ("a", b"1")}) == (400, "file")
    assert client.files.list().data == []


def test_a_client_that_leaves_while_it_sends_gives_its_room_back(url: str, client: openai.OpenAI) -> None:
    host, port = url.removeprefix("http://").split(":")
    head = "POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: 1000000\r\n\r\n"
    begin = head.encode() + b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.txt"\r\n\r\n' + b"x" * 100_000
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(socket.create_connection((host, int(port)))).sendall(begin)
        wait_until(lambda: is_full(client))
    wait_until(lambda: not is_full(client))


def is_full(client: openai.OpenAI) -> bool:
    """Whether there is no room for half a megabyte."""
    try:
        client.files.delete(create(client, "a.txt", b"x" * 500_000).id)
    except openai.BadRequestError as error:
        assert error.code == "file_quota_exceeded"
        return True
    return False


# In messages


def ask(client: openai.OpenAI, *messages: dict[str, Any]) -> Any:
    return client.chat.completions.create(model=NAME, messages=list(messages), temperature=0, max_tokens=4)  # type: ignore[arg-type]


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


QUESTION = {"type": "text", "text": "What is blue?"}
SKY, GRASS = "The sky is blue. " * 30, "The grass is green. " * 20


def test_a_file_in_a_message_is_its_text(client: openai.OpenAI, url: str) -> None:
    sky, grass = create(client, "sky.txt", SKY.encode()).id, create(client, "b/grass.html", f"<p>{GRASS}".encode()).id
    documents = [Document("sky.txt", SKY), Document("b/grass.html", GRASS.strip())]
    both, (first, second) = documents_text(documents), (documents_text([document]) for document in documents)
    inline = "data:text/plain;base64," + base64.b64encode(SKY.encode()).decode()
    for messages, pasted in (
        ([{"role": "system", "content": f"fileid://{sky},fileid://{grass}"}, user(QUESTION)], [{"role": "system", "content": both}, user(QUESTION)]),
        ([{"role": "system", "content": f"fileid://{sky}, {grass}"}, user(QUESTION)], [{"role": "system", "content": both}, user(QUESTION)]),
        ([user({"type": "file", "file": {"file_id": sky}}, QUESTION)], [{"role": "user", "content": first + "What is blue?"}]),
        (
            [user({"type": "text", "text": "a"}, {"type": "file", "file": {"file_id": grass}}, {"type": "input_file", "file_id": sky})],
            [{"role": "user", "content": "a" + second + first}],
        ),
        (
            [user({"type": "file", "file": {"filename": "sky.txt", "file_data": inline}}, QUESTION)],
            [{"role": "user", "content": first + "What is blue?"}],
        ),
        (
            [user({"type": "input_file", "filename": "sky.txt", "file_data": inline.partition(",")[2]}, QUESTION)],
            [{"role": "user", "content": first + "What is blue?"}],
        ),
        ([user({"type": "file", "file": {"file_data": inline}})], [user({"type": "text", "text": first.replace("sky.txt", "document.txt")})]),
    ):
        with_files, with_text = ask(client, *messages), ask(client, *pasted)
        assert with_files.usage.prompt_tokens == with_text.usage.prompt_tokens > 100
        assert with_files.choices[0].message.content == with_text.choices[0].message.content
        assert with_text.usage.prompt_tokens_details.cached_tokens == (with_text.usage.prompt_tokens - 1) // 64 * 64, "they are the same tokens"
        counts = [
            httpx.post(f"{url}{path}", json={"messages": messages}).json()[key]
            for path, key in (("/tokenize", "count"), ("/v1/chat/completions/input_tokens", "input_tokens"))
        ]
        assert counts == [with_files.usage.prompt_tokens] * 2


def test_it_is_what_the_command_line_would_ask(client: openai.OpenAI) -> None:
    file = create(client, "sky.txt", SKY.encode()).id
    system, question = build_messages([Document("sky.txt", SKY)], "What is blue?")
    first = ask(client, system, question)
    second = ask(client, system, user({"type": "file", "file": {"file_id": file}}, {"type": "text", "text": "Question: What is blue?"}))
    assert second.usage.prompt_tokens == first.usage.prompt_tokens
    assert second.usage.prompt_tokens_details.cached_tokens == (first.usage.prompt_tokens - 1) // 64 * 64


def test_an_archive_in_a_message(client: openai.OpenAI) -> None:
    data = zip_of({"a.txt": "one", "b/c.txt": "two"})
    file = create(client, "all.zip", data).id
    text = documents_text([Document("all.zip/a.txt", "one"), Document("all.zip/b/c.txt", "two")])
    expected = ask(client, user({"type": "text", "text": text})).usage.prompt_tokens
    assert ask(client, user({"type": "file", "file": {"file_id": file}})).usage.prompt_tokens == expected
    inline = {"filename": "all.zip", "file_data": "data:application/zip;base64," + base64.b64encode(data).decode()}
    assert ask(client, user({"type": "file", "file": inline})).usage.prompt_tokens == expected


def test_another_question_about_the_same_files_is_cheap(client: openai.OpenAI) -> None:
    files = ",".join(f"fileid://{create(client, name, text.encode()).id}" for name, text in (("x.txt", SKY * 2), ("y.txt", GRASS * 2)))
    system = {"role": "system", "content": files}
    ask(client, system, user(QUESTION))
    usage = ask(client, system, user({"type": "text", "text": "And what is green?"})).usage
    assert usage.prompt_tokens_details.cached_tokens > usage.prompt_tokens - 128


def test_a_user_may_write_what_looks_like_an_id(client: openai.OpenAI) -> None:
    message = {"role": "user", "content": "fileid://file-none"}
    assert expand_files([message], None) == [message]  # type: ignore[arg-type]
    ask(client, message)


PNG = base64.b64encode(b"\x89PNG\x00").decode()


@pytest.mark.parametrize(
    ("message", "status", "code"),
    [
        (user({"type": "file", "file": {"file_id": "file-" + "0" * 32}}), 404, "file_not_found"),
        (user({"type": "file", "file": {"file_id": "../../etc/passwd"}}), 404, "file_not_found"),
        ({"role": "system", "content": "fileid://file-0,fileid://file-1"}, 404, "file_not_found"),
        ({"role": "system", "content": "fileid://file-0 and more"}, 400, "invalid_request"),
        ({"role": "system", "content": "fileid://../../etc/passwd"}, 400, "invalid_request"),
        ({"role": "system", "content": [{"type": "text", "text": "fileid://file-0"}]}, 404, "file_not_found"),
        (user({"type": "file"}), 400, "invalid_request"),
        (user({"type": "file", "file": {}}), 400, "invalid_request"),
        (user({"type": "file", "file": {"file_id": 3}}), 400, "invalid_request"),
        (user({"type": "file", "file": {"file_id": "file-0", "file_data": "eA=="}}), 400, "invalid_request"),
        (user({"type": "file", "file": {"file_data": "%%%", "filename": "a.txt"}}), 400, "invalid_request"),
        (user({"type": "file", "file": {"file_data": 3}}), 400, "invalid_request"),
        (user({"type": "file", "file": {"file_data": "eA==", "filename": "../"}}), 400, "invalid_request"),
        (user({"type": "file", "file": {"file_data": PNG, "filename": "a.png"}}), 400, "binary_document"),
        (user({"type": "file", "file": {"file_data": PNG, "filename": "a.pdf"}}), 400, "unreadable_document"),
        (user({"type": "file", "file": {"file_data": "A" * (MAX_BYTES * 2), "filename": "a.txt"}}), 413, "request_too_large"),
        (user({"type": "input_file", "file_url": "http://127.0.0.1/x"}), 400, "unsupported_parameter"),
    ],
)
def test_files_that_cannot_be_used(client: openai.OpenAI, url: str, message: dict[str, Any], status: int, code: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, *HELLO, message)
    assert (caught.value.status_code, caught.value.code, caught.value.param) == (status, code, "messages")
    assert "messages[1]: " in caught.value.message
    answer = httpx.post(f"{url}/tokenize", json={"messages": [*HELLO, message]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_deleted_file_cannot_be_used(client: openai.OpenAI) -> None:
    file = create(client, "sky.txt", SKY.encode()).id
    ask(client, user({"type": "file", "file": {"file_id": file}}))
    client.files.delete(file)
    with pytest.raises(openai.NotFoundError, match=file):
        ask(client, user({"type": "file", "file": {"file_id": file}}))


def test_files_longer_than_the_context_are_refused_before_they_are_loaded(client: openai.OpenAI) -> None:
    file = create(client, "long.txt", SKY.encode() * 100)
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, user({"type": "file", "file": {"file_id": file.id}}))
    body: Any = caught.value.body
    assert (body["code"], body["n_ctx"]) == ("context_length_exceeded", 4096)
    assert body["n_prompt_tokens"] == file.model_extra["zen_turbo"]["tokens"]


class FewFiles:
    """Files as messages see them, of a given size each; none may be loaded."""

    max_bytes = 100

    def __init__(self, characters: int, tokens: int | None) -> None:
        self.max_characters, self.max_tokens, self._size = 1000, 500, (characters, tokens)

    def size(self, file_id: str) -> tuple[int, int | None]:
        return self._size

    def documents(self, file_id: str) -> list[Document]:
        raise AssertionError("loaded")

    def read_inline(self, data: bytes, filename: str) -> list[Document]:
        return [Document(filename, "x" * 400)]


def test_the_files_of_a_request_are_bounded_together() -> None:
    message = {"role": "system", "content": "fileid://" + ",".join(["file-0"] * 3)}
    with pytest.raises(DocumentTooLargeError, match=r"messages\[0\].* 1200 characters or more; at most 1000"):
        expand_files([message], FewFiles(400, None))
    with pytest.raises(ContextLengthExceededError) as caught:
        expand_files([message], FewFiles(1, 200))
    assert caught.value.details == {"n_prompt_tokens": 600, "n_ctx": 500}
    inline = {"type": "file", "file": {"file_data": "eA==", "filename": "a.txt"}}
    with pytest.raises(DocumentTooLargeError):
        expand_files([user(inline), user(inline), user(inline)], FewFiles(0, 0))


@pytest.mark.parametrize("messages", ["text", None, [3], [{"role": "user"}], [{"role": "user", "content": [3, {"type": "text"}]}]])
def test_what_is_not_about_files_is_left_alone(messages: Any) -> None:
    assert expand_files(messages, FewFiles(0, 0)) == messages


# Their folder, their tokens


def test_a_temporary_folder_goes_with_the_server(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gate = threading.Event()

    def load() -> Engine:
        gate.wait(20)
        return engine

    with serving(create_app(load, model_name=NAME)) as base, openai.OpenAI(base_url=f"{base}/v1", api_key="none") as client:
        assert list(tmp_path.iterdir()) == []
        file = create(client, "a.txt", b"The sky is blue.")
        assert file.model_extra["zen_turbo"]["tokens"] is None, "nobody can count yet"
        assert len(list(tmp_path.iterdir())) == 1
        gate.set()
        wait_until(lambda: httpx.get(f"{base}/health").status_code == 200)
        text = documents_text([Document("a.txt", "The sky is blue.")])
        assert client.files.retrieve(file.id).model_extra["zen_turbo"]["tokens"] == len(engine.tokenizer.encode(text))
        assert client.files.list().data[0].model_extra["zen_turbo"]["tokens"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "The sky is blue.\nThe grass is green.\n" * 30_000, "東京" * 100_000, "x\ny\n" * 200_000])
def test_tokens_are_counted_as_they_are_encoded(engine: Engine, text: str) -> None:
    assert engine.tokenizer.count(text) == len(engine.tokenizer.encode(text))
