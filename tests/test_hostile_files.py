"""Damaged and hostile checkpoints: a clear error with its code, never another exception, never an allocation that the file asked for."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import gguf
import pytest
import tiny
import torch

from zen_turbo.errors import CheckpointError, CorruptFileError, ModelNotFoundError, UnsupportedModelError, ZenTurboError
from zen_turbo.models.gguf_file import GgufFile
from zen_turbo.models.loader import load_checkpoint
from zen_turbo.text.chat_template import load_chat_template
from zen_turbo.text.tokenizer import load_tokenizer


def open_whole(path: Path) -> None:
    """Everything the engine reads of a checkpoint."""
    checkpoint = load_checkpoint(path)
    try:
        tokenizer = load_tokenizer(checkpoint.tokenizer_source)
        load_chat_template(checkpoint.tokenizer_source, tokenizer)
        for name in checkpoint.tensor_names():
            checkpoint.tensor(name, torch.float32)
        assert checkpoint.fingerprint
    finally:
        checkpoint.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder, GGUF) of one tiny model."""
    root = tmp_path_factory.mktemp("good")
    folder = tiny.save(tiny.model("llama", hidden_size=64, num_attention_heads=1, num_key_value_heads=1), root / "folder")
    path = tiny.save_gguf(folder, root / "model.gguf", gguf.GGMLQuantizationType.Q8_0)
    open_whole(folder)
    open_whole(path)
    return folder, path


def header_length(path: Path) -> int:
    file = GgufFile(path)
    file.close()
    return file.header_bytes


def test_a_truncated_gguf_file(files: tuple[Path, Path], tmp_path: Path) -> None:
    data = files[1].read_bytes()
    header = header_length(files[1])
    path = tmp_path / "cut.gguf"
    generator = random.Random(0)
    cuts = [0, 1, 3, 4, 8, 15, 16, 23, 24, header - 1, header, len(data) - 1, *(generator.randrange(len(data)) for _ in range(60))]
    for cut in cuts:
        path.write_bytes(data[:cut])
        with pytest.raises(CorruptFileError, match=r"cut\.gguf"):
            open_whole(path)


def test_bits_flipped_in_a_gguf_header(files: tuple[Path, Path], tmp_path: Path) -> None:
    """A flip may leave a file that is valid (another float, another token); it may not do anything but load or be refused."""
    data = files[1].read_bytes()
    header = header_length(files[1])
    path = tmp_path / "flipped.gguf"
    generator = random.Random(1)
    refused = 0
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(generator.choice((1, 1, 3))):
            damaged[generator.randrange(header)] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            open_whole(path)
        except ZenTurboError as error:
            assert error.code in ("corrupt_file", "unsupported_model", "invalid_checkpoint")
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("value", [2**31, 2**40, 2**63, 2**64 - 1])
@pytest.mark.parametrize("offset", [8, 16], ids=["tensors", "metadata"])
def test_counts_that_no_file_could_hold(files: tuple[Path, Path], tmp_path: Path, offset: int, value: int) -> None:
    data = bytearray(files[1].read_bytes())
    data[offset : offset + 8] = struct.pack("<Q", value)
    path = tmp_path / "counts.gguf"
    path.write_bytes(data)
    with pytest.raises(CorruptFileError):
        open_whole(path)


def one_value(key: bytes, kind: int, payload: bytes) -> bytes:
    """A GGUF file with one metadata value and no tensor."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + payload


@pytest.mark.parametrize(
    "data",
    [
        b"GGML" + bytes(60),
        b"GGUF" + struct.pack("<I", 1) + bytes(60),
        b"GGUF" + struct.pack(">I", 3) + bytes(60),
        b"GGUF" + struct.pack("<I", 99) + bytes(60),
        one_value(b"a", 8, struct.pack("<Q", 2**60) + b"x"),  # a string longer than the file
        one_value(b"a", 9, struct.pack("<IQ", 4, 2**60)),  # an array longer than the file
        one_value(b"a", 9, struct.pack("<IQ", 9, 2**50)),  # an array of arrays
        one_value(b"a", 99, b"12345678"),
        one_value(b"\xff\xfe", 4, b"1234"),
        b"\x7fELF" + bytes(100),
    ],
)
def test_headers_made_to_hurt(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "evil.gguf"
    path.write_bytes(data)
    with pytest.raises((CorruptFileError, UnsupportedModelError), match=r"evil\.gguf"):
        load_checkpoint(path)


def test_deeply_nested_arrays(tmp_path: Path) -> None:
    path = tmp_path / "deep.gguf"
    path.write_bytes(one_value(b"a", 9, struct.pack("<IQ", 9, 1) * 100_000 + struct.pack("<IQ", 4, 0)))
    with pytest.raises(CorruptFileError):
        load_checkpoint(path)


# safetensors


def copy_folder(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_truncated_safetensors(files: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copy_folder(files[0], tmp_path / "folder")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    generator = random.Random(2)
    for cut in [0, 1, 7, 8, 9, 100, len(data) - 1, *(generator.randrange(len(data)) for _ in range(20))]:
        path.write_bytes(data[:cut])
        with pytest.raises(CorruptFileError, match=r"model\.safetensors"):
            open_whole(folder)


def test_bits_flipped_in_a_safetensors_header(files: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copy_folder(files[0], tmp_path / "folder")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    generator = random.Random(3)
    refused = 0
    for _ in range(200):
        damaged = bytearray(data)
        damaged[generator.randrange(header)] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            open_whole(folder)
        except ZenTurboError as error:
            assert error.code in ("corrupt_file", "unsupported_model", "invalid_checkpoint")
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("length", [2**31, 2**62, 2**64 - 1])
def test_an_oversized_safetensors_header(files: tuple[Path, Path], tmp_path: Path, length: int) -> None:
    folder = copy_folder(files[0], tmp_path / "folder")
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(CorruptFileError):
        load_checkpoint(folder)


def test_shards_that_lie(files: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copy_folder(files[0], tmp_path / "folder")
    index = folder / "model.safetensors.index.json"
    for text, kind in (
        ("{", CorruptFileError),
        ("[]", CorruptFileError),
        ('{"weight_map": {"a": "../model.safetensors"}}', CorruptFileError),
        ('{"weight_map": {"a": "/etc/passwd"}}', CorruptFileError),
        ('{"weight_map": {"a": 3}}', CorruptFileError),
        ('{"weight_map": {"a": "absent.safetensors"}}', CheckpointError),
        ("[" * 100_000, CorruptFileError),
    ):
        index.write_text(text)
        with pytest.raises(kind):
            load_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"architectures": 3}', '{"architectures": ["LlamaForCausalLM"]}', "\x00", "[" * 100_000])
def test_configs_that_are_no_config(files: tuple[Path, Path], tmp_path: Path, text: str) -> None:
    folder = copy_folder(files[0], tmp_path / "folder")
    (folder / "config.json").write_text(text)
    with pytest.raises((CorruptFileError, UnsupportedModelError)):
        load_checkpoint(folder)


def test_values_of_any_type_in_a_config(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Every key of a config with values of every type: refused by an error of ours, or harmless."""
    folder = copy_folder(files[0], tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    for key in config:
        for value in (None, True, -1, 0, 2.5, "text", [], [1], {}, {"a": 1}, 10**30):
            (folder / "config.json").write_text(json.dumps(config | {key: value}))
            try:
                load_checkpoint(folder).close()
            except ZenTurboError:
                pass


def test_tokenizers_that_are_none(files: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copy_folder(files[0], tmp_path / "folder")
    for text in ("", "{", "[]", "{}", '{"model": {"type": "WordLevel", "vocab": {}, "unk_token": "?"}}'):
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises((CorruptFileError, UnsupportedModelError)):
            open_whole(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModelError, match=r"tokenizer\.json"):
        open_whole(folder)


def test_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        load_checkpoint(tmp_path)
    with pytest.raises(ModelNotFoundError):
        load_checkpoint(tmp_path / "absent")
