"""The page as the server gives it: no browser needed."""

from __future__ import annotations

import re

import httpx

from zen_turbo.server import page as page_module


def test_the_files_of_the_page_are_served(url: str) -> None:
    with httpx.Client(base_url=url) as http:
        for path in sorted(page_module.paths()):
            response = http.get(path)
            assert response.status_code == 200
            assert response.headers["cache-control"] == "no-cache" and response.headers["x-content-type-options"] == "nosniff"
            again = http.get(path, headers={"If-None-Match": f'"other", W/{response.headers["etag"]}'})
            assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", response.headers["etag"])
            assert http.get(path, headers={"If-None-Match": '"other"'}).status_code == 200
            head = http.head(path)
            assert (head.status_code, head.content, head.headers["content-type"]) == (200, b"", response.headers["content-type"])
        for path in ("/page", "/page/", "/page/nothing.js", "/page/../page.py", "/page/%2e%2e/app.py"):
            assert http.get(path).status_code == 404


def test_the_policy_lets_nothing_else_run(url: str) -> None:
    policy = dict(part.split(" ", 1) for part in httpx.get(url).headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
    assert policy["require-trusted-types-for"] == "'script'" and policy["frame-ancestors"] == "'none'"


def test_the_page_names_no_other_host_and_only_what_exists(url: str) -> None:
    paths = page_module.paths()
    text = {path: httpx.get(url + path).text for path in paths}
    named = {match for path in paths for match in re.findall(r'(?:src|href)="([^"#]+)"|from "\./([^"]+)"', text[path])}
    targets = {f"/{target}" if target else f"/page/{module}" for target, module in named}
    assert targets | {"/"} == paths  # nothing missing, nothing left over
    outside = {match for path in paths for match in re.findall(r"https?://[\w.]+", text[path])}
    assert outside <= {"http://www.w3.org"}  # the namespace of SVG
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", "".join(text.values()))
    assert not re.search(r"\son\w+=|<script>|<style|\sstyle=", text["/"])
