"""The OpenAPI document says what the routes take, and a schema fuzzer finds no way to make the server fail."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import jsonschema
import pytest
from fastapi.routing import APIRoute
from serving import serving, wait_until

from zen_turbo import LLM
from zen_turbo.engine.engine import Engine
from zen_turbo.server.app import create_app
from zen_turbo.server.openapi import BODIES, FORMS
from zen_turbo.server.schemas import ChatRequest


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Iterator[Engine]:
    result = LLM(tiny_folder, prefill_chunk_tokens=64, kv_cache_bytes=64 << 20, max_model_len=512).engine
    yield result
    result.close()


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with serving(create_app(lambda: engine, model_name="tiny", default_max_tokens=4)) as base:
        wait_until(lambda: httpx.get(f"{base}/health").status_code == 200)
        yield base


@pytest.fixture(scope="module")
def document(url: str) -> dict[str, Any]:
    return httpx.get(f"{url}/openapi.json").json()


def test_every_route_that_takes_a_body_says_which(engine: Engine, document: dict[str, Any]) -> None:
    app = create_app(lambda: engine, model_name="tiny")
    posts = {route.path for route in app.routes if isinstance(route, APIRoute) and "POST" in route.methods}
    assert posts - {"/v1/responses/{response_id}/cancel"} == set(BODIES) | set(FORMS), "and one that takes none"
    for path, model in BODIES.items():
        content = document["paths"][path]["post"]["requestBody"]["content"]
        assert content == {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}


def test_the_document_is_whole(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    references: list[str] = []

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            references.extend([value["$ref"]] if isinstance(value.get("$ref"), str) else [])
            value = list(value.values())
        if isinstance(value, list):
            for each in value:
                collect(each)

    collect(document)
    assert {reference.removeprefix("#/components/schemas/") for reference in references} <= set(schemas)
    assert set(schemas["ChatRequest"]["properties"]) == set(ChatRequest.model_fields)
    for path, item in document["paths"].items():
        for operation in item.values():
            named = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "path"}
            assert named == set(re.findall(r"{(\w+)}", path))
    assert all("default" in operation["responses"] for item in document["paths"].values() for operation in item.values())


def documented(document: dict[str, Any], method: str, path: str, response: Any) -> bool:
    """Whether the document has the media type of this success. A fuzzer's response has a list for each header."""
    content = document["paths"][path][method.lower()]["responses"][str(response.status_code)]["content"]
    found = response.headers["content-type"]
    return (found if isinstance(found, str) else found[0]).partition(";")[0] in content


def test_the_document_knows_what_kind_of_answer_comes(url: str, document: dict[str, Any]) -> None:
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hi."}]}
    with httpx.Client(base_url=url, timeout=60) as client:
        file = client.post("/v1/files", files={"file": ("a.txt", b"The grass is green.")}, data={"purpose": "user_data"}).json()
        for method, path, values in (
            ("GET", "/metrics", {}),
            ("GET", "/v1/files/{file_id}/content", {}),
            ("POST", "/v1/chat/completions", {"json": chat}),
            ("POST", "/v1/chat/completions", {"json": {**chat, "stream": True}}),
            ("POST", "/v1/completions", {"json": {"model": "tiny", "prompt": "Hi.", "stream": True}}),
            ("POST", "/v1/responses", {"json": {"model": "tiny", "input": "Hi.", "stream": True}}),
        ):
            response = client.request(method, path.format(file_id=file["id"]), **values)
            assert response.status_code == 200 and documented(document, method, path, response), (path, response.headers)
        client.delete(f"/v1/files/{file['id']}")


@pytest.mark.slow
def test_every_border_of_the_document_is_kept(url: str, tmp_path: Path) -> None:
    """Missing and null fields, values at their bounds, wrong media types and methods: 1,577 cases."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,unsupported_method"
    options = ["--phases", "coverage", "--checks", checks, "--seed", "1", "--continue-on-failure", "--no-color"]
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{url}/openapi.json", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_a_fuzzer_that_knows_the_schema_finds_no_fault(url: str, engine: Engine, document: dict[str, Any], mode: str) -> None:
    """10,000 cases in both modes together, most of them bodies."""
    import schemathesis  # takes a second

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    of_error = jsonschema.Draft202012Validator(document["components"]["schemas"]["Error"])
    seen: dict[str, Counter[int]] = {}

    for result in schema.get_all_operations():
        operation = result.ok()
        examples = 700 if operation.body else 200

        @hypothesis.settings(max_examples=examples, suppress_health_check=list(hypothesis.HealthCheck))
        @hypothesis.given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)), sound=hypothesis.strategies.booleans())
        def probe(case: Any, sound: bool) -> None:
            if sound and isinstance(case.body, dict):  # past the model and the messages, to what stands behind them
                case.body["model"] = "tiny"
                if "messages" in case.body:
                    case.body["messages"] = [{"role": "user", "content": "Hi."}]
            response = case.call(timeout=60)
            seen.setdefault(case.operation.path, Counter())[response.status_code] += 1
            assert response.status_code < 500, response.text
            if response.status_code >= 400:
                of_error.validate(response.json())
            else:
                assert documented(document, case.operation.method, case.operation.path, response)

        with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # nothing can be wrong about a GET without parameters
            probe()
    assert set(seen) >= set(BODIES)
    for path in BODIES:
        assert max(seen[path]) >= 400, "a fuzzer that is never refused tries nothing"
        assert mode == "negative" or 200 in seen[path], "and one that always is, little"
    assert sum(counts.total() for counts in seen.values()) >= 5000, seen
    wait_until(lambda: not engine.has_work())
