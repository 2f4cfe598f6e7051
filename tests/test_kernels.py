"""The native kernels against the fp64 reference, under every instruction set of this CPU.

Bounds are several times what was measured. bf16 outputs of magnitude m are rounded by up to m / 256, so values here have magnitude about 1.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

from zen_turbo import kernels, native
from zen_turbo.attention import blocks, dca, reference
from zen_turbo.attention.attend import Attention
from zen_turbo.attention.dca import DualChunk
from zen_turbo.attention.rope import RotaryEmbedding
from zen_turbo.errors import KernelError
from zen_turbo.kernels import BlockLists, PageView
from zen_turbo.models.config import RopeConfig

BOUNDS = {torch.bfloat16: 2e-2, torch.float32: 5e-5}
LSE_BOUNDS = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
DTYPES = [torch.bfloat16, torch.float32]
ROPE = RopeConfig(theta=1e4)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "f32"])


def make_view(num_pages: int, kv_heads: int, head_dim: int, dtype: torch.dtype, *, spare: int = 3, seed: int = 0) -> PageView:
    """Pages full of garbage (a stale page must do no harm), in a table without order."""
    slots = num_pages + spare
    generator = torch.Generator().manual_seed(seed)
    pages = torch.full((slots, kv_heads, 2 * 64 * head_dim * dtype.itemsize), 0xFF, dtype=torch.uint8)  # 0xFFFF and 0xFFFFFFFF are NaN
    return PageView(pages, torch.randperm(slots, generator=generator)[:num_pages].to(torch.int32))


class Case(NamedTuple):
    """A prompt stored without rotation: q [N, H, D], k and v [N, G, D], and its pages."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    view: PageView

    @property
    def scale(self) -> float:
        return self.q.shape[2] ** -0.5


def make_case(length: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, *, seed: int = 0, loud: bool = False) -> Case:
    """``loud``: a few keys draw almost everything and some channels are large, as in real models."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(length, heads + 2 * kv_heads, head_dim, generator=generator)
    if loud:
        qkv[:, : heads + kv_heads, :2] *= 6
        qkv[::97, heads : heads + kv_heads] *= 5
    qkv = qkv.to(dtype)
    view = make_view(-(-length // 64), kv_heads, head_dim, dtype)
    q = qkv.new_empty(length, heads, head_dim)
    kernels.store(qkv.view(length, -1), (q, None, None), (None, None, None), view, first_position=0, num_heads=heads)
    return Case(q, qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :], view)


def check(found: torch.Tensor, lse: torch.Tensor | None, expected: reference.Attended, dtype: torch.dtype) -> None:
    assert float((found.double() - expected.out).abs().max()) <= BOUNDS[dtype]
    if lse is not None:
        torch.testing.assert_close(lse.double(), expected.lse.T, rtol=1e-5, atol=LSE_BOUNDS[dtype])


@dtypes
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(2, 2, 64), (14, 2, 64), (3, 1, 64), (4, 2, 80), (4, 1, 96), (4, 1, 128), (2, 1, 256)]
)
@pytest.mark.parametrize("length", [1, 63, 64, 200])
def test_dense_attention(isa: str, length: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    case = make_case(length, heads, kv_heads, head_dim, dtype, loud=length == 200)
    lists = blocks.dense_lists(first_position=0, num_rows=length, num_heads=heads, span_pages=None)
    out, lse = torch.full_like(case.q, math.nan), torch.full((heads, length), math.nan)
    kernels.attend((case.q, None, None), case.view, lists, out, first_position=0, scale=case.scale, lse=lse)
    positions = torch.arange(length)
    check(out, lse, reference.attention(case.q, case.k, case.v, q_positions=positions, k_positions=positions, scale=case.scale), dtype)


@dtypes
@pytest.mark.parametrize("window", [None, 1, 50, 64, 130])
@pytest.mark.parametrize(("first_position", "num_rows"), [(0, 300), (128, 100), (192, 108)])
def test_windows_and_later_chunks(isa: str, first_position: int, num_rows: int, window: int | None, dtype: torch.dtype) -> None:
    case = make_case(300, 4, 2, 64, dtype)
    q = case.q[first_position : first_position + num_rows].contiguous()
    factor = 1 + torch.rand(num_rows, generator=torch.Generator().manual_seed(1))
    lists = blocks.dense_lists(first_position=first_position, num_rows=num_rows, num_heads=4, span_pages=None, window=window)
    out, lse = torch.empty_like(q), torch.empty(4, num_rows)
    kernels.attend(
        (q, None, None), case.view, lists, out, first_position=first_position, scale=0.1, window=window, logit_factor=factor, lse=lse
    )
    expected = reference.attention(
        q,
        case.k,
        case.v,
        q_positions=torch.arange(first_position, first_position + num_rows),
        k_positions=torch.arange(300),
        scale=0.1,
        window=window,
        logit_factor=factor,
    )
    check(out, lse, expected, dtype)


def sparse_lists(num_lists: int, first_block: int, num_blocks: int, heads_per_list: int, *, variants: int) -> BlockLists:
    """Random pages per list and block, the diagonal always among them, with random variants."""
    generator = torch.Generator().manual_seed(num_lists)
    offsets, entries = [0], []
    for _ in range(num_lists):
        for block in range(first_block, first_block + num_blocks):
            kept = sorted({*torch.randperm(block + 1, generator=generator)[: 1 + block // 2].tolist(), block})
            entries += [page * 4 + int(torch.randint(variants, (1,), generator=generator)) for page in kept]
            offsets.append(len(entries))
    return BlockLists(torch.tensor(offsets), torch.tensor(entries, dtype=torch.int32), heads_per_list)


@dtypes
@pytest.mark.parametrize("num_lists", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_block_lists_and_variants(isa: str, num_lists: int, head_dim: int, dtype: torch.dtype) -> None:
    case = make_case(450, 4, 2, head_dim, dtype)
    q = [case.q[128:].contiguous()] + [
        torch.randn(322, 4, head_dim, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (5, 6)
    ]
    lists = sparse_lists(num_lists, 2, 6, 4 // num_lists, variants=3)
    out, lse = torch.empty_like(q[0]), torch.empty(4, 322)
    kernels.attend((q[0], q[1], q[2]), case.view, lists, out, first_position=128, scale=case.scale, lse=lse)
    unpacked = reference.unpack_lists(lists.offsets, lists.entries, num_blocks=6)
    check(out, lse, reference.block_attention(q, case.k, case.v, unpacked, first_position=128, scale=case.scale), dtype)


@dtypes
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(14, 2, 64), (4, 4, 80), (8, 2, 128), (2, 1, 256)])
@pytest.mark.parametrize("length", [1, 64, 65, 1500])
def test_decode(isa: str, length: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """1500 tokens are cut into parts that merge."""
    case = make_case(length, heads, kv_heads, head_dim, dtype, loud=True)
    q = case.q[-1:].contiguous()
    lists = blocks.dense_lists(first_position=length - 1, num_rows=1, num_heads=heads, span_pages=None)
    out, lse = torch.empty_like(q), torch.empty(heads, 1)
    kernels.decode((q, None, None), case.view, lists, out, first_position=length - 1, scale=case.scale, lse=lse)
    expected = reference.attention(
        q, case.k, case.v, q_positions=torch.tensor([length - 1]), k_positions=torch.arange(length), scale=case.scale
    )
    check(out, lse, expected, dtype)


@dtypes
@pytest.mark.parametrize("pages", [(79, 2), (2, 79), (33, 66)])
def test_decode_of_lists_of_different_lengths(isa: str, pages: tuple[int, int], dtype: torch.dtype) -> None:
    """Each KV head's list is cut into as many parts as it needs."""
    length, heads = 79 * 64 - 10, 8
    case = make_case(length, heads, 2, 64, dtype)
    q = case.q[-1:].contiguous()
    generator = torch.Generator().manual_seed(2)
    kept = [sorted({*torch.randperm(78, generator=generator)[: count - 1].tolist(), 78}) for count in pages]
    entries = torch.tensor([page * 4 for each in kept for page in each], dtype=torch.int32)
    lists = BlockLists(torch.tensor([0, pages[0], sum(pages)]), entries, heads // 2)
    out, lse = torch.empty_like(q), torch.empty(heads, 1)
    kernels.decode((q, None, None), case.view, lists, out, first_position=length - 1, scale=case.scale, lse=lse)
    for head in range(heads):
        tokens = torch.cat([torch.arange(page * 64, min(page * 64 + 64, length)) for page in kept[head // 4]])
        own = slice(head // 4, head // 4 + 1)
        expected = reference.attention(
            q[:, head : head + 1],
            case.k[tokens][:, own],
            case.v[tokens][:, own],
            q_positions=torch.tensor([length - 1]),
            k_positions=tokens,
            scale=case.scale,
        )
        check(out[:, head : head + 1], lse[head : head + 1], expected, dtype)


def test_decode_does_not_depend_on_the_number_of_threads(isa: str) -> None:
    case = make_case(2000, 8, 2, 64, torch.bfloat16)
    q = case.q[-1:].contiguous()
    lists = blocks.dense_lists(first_position=1999, num_rows=1, num_heads=8, span_pages=None)
    outs = [torch.empty_like(q) for _ in range(3)]
    for threads, out in zip((1, 2, 5), outs, strict=True):
        kernels.decode((q, None, None), case.view, lists, out, first_position=1999, scale=case.scale, num_threads=threads)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_attend_is_deterministic(isa: str) -> None:
    case = make_case(900, 8, 2, 64, torch.bfloat16, loud=True)
    lists = blocks.dense_lists(first_position=0, num_rows=900, num_heads=8, span_pages=None)
    outs = [torch.empty_like(case.q) for _ in range(3)]
    for threads, out in zip((1, 2, 3), outs, strict=True):
        kernels.attend((case.q, None, None), case.view, lists, out, first_position=0, scale=case.scale, num_threads=threads)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@dtypes
@pytest.mark.parametrize(
    "geometry",
    [
        DualChunk(chunk_size=192, local_size=64, trained_window=192),
        DualChunk(chunk_size=128, local_size=64, trained_window=128),  # L = local: the clamp binds at once
        DualChunk(chunk_size=100, local_size=36, trained_window=90),  # chunk_size is no multiple of a page
        DualChunk(chunk_size=200, local_size=8, trained_window=64),
    ],
    ids=lambda geometry: f"{geometry.chunk_size}-{geometry.local_size}",
)
def test_dual_chunk_attention_against_the_pairwise_oracle(isa: str, geometry: DualChunk, dtype: torch.dtype) -> None:
    """From unrotated Q and K through store and attend, in chunks and then token by token, across many spans."""
    length, heads, kv_heads, head_dim = 700, 4, 2, 64
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(length, heads + 2 * kv_heads, head_dim, generator=generator).to(dtype)
    rotary = RotaryEmbedding(ROPE, head_dim)
    attention = Attention(
        num_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rotary=rotary,
        dual_chunk=geometry,
        trained_window=geometry.trained_window,
        temperature=True,
    )
    view = make_view(-(-length // 64), kv_heads, head_dim, dtype)
    parts, start = [], 0
    for rows in (256, 64, 320, *[1] * 60):
        plan = attention.plan(start, rows)
        parts.append(attention.run(plan, qkv[start : start + rows].reshape(rows, -1), view))
        start += rows
    found = torch.cat(parts).view(length, heads, head_dim)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    expected = reference.dca_attention(q, k, v, rotary, geometry)
    # Rotated bf16 queries and keys are rounded once more than the oracle's.
    bound = {torch.bfloat16: 6e-2, torch.float32: 2e-5}[dtype]
    assert float((found.double() - expected.out).abs().max()) <= bound


@dtypes
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_store_rotates_normalises_and_packs(isa: str, head_dim: int, dtype: torch.dtype) -> None:
    rows, heads, kv_heads = 130, 3, 1
    generator = torch.Generator().manual_seed(7)
    qkv = (2 * torch.randn(rows, heads + 2 * kv_heads, head_dim, generator=generator)).to(dtype)
    q_norm, k_norm = (1 + 0.3 * torch.randn(head_dim, generator=generator) for _ in range(2))
    angles = kernels.Angles(*RotaryEmbedding(ROPE, head_dim).cos_sin(torch.arange(rows)))
    fixed = kernels.Angles(*RotaryEmbedding(ROPE, head_dim).cos_sin(torch.tensor([77])))
    view = make_view(3, kv_heads, head_dim, dtype)
    queries = tuple(qkv.new_empty(rows, heads, head_dim) for _ in range(2))
    kernels.store(
        qkv.reshape(rows, -1),
        (queries[0], None, queries[1]),
        (angles, None, fixed),
        view,
        first_position=0,
        num_heads=heads,
        q_norm=q_norm,
        k_norm=k_norm,
        norm_eps=1e-5,
    )

    def normalised(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = x.double()
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()

    q = normalised(qkv[:, :heads], q_norm)
    k = normalised(qkv[:, heads : heads + kv_heads], k_norm)
    bound = {torch.bfloat16: 4e-2, torch.float32: 1e-5}[dtype]
    for found, angle in zip(queries, (angles, fixed), strict=True):
        assert float((found.double() - reference.rotate(q, *angle)).abs().max()) <= bound
    # Keys and values are seen through attention: a query that matches nothing averages the values.
    out = qkv.new_empty(rows, heads, head_dim)
    lists = blocks.dense_lists(first_position=0, num_rows=rows, num_heads=heads, span_pages=None)
    kernels.attend((queries[0], None, None), view, lists, out, first_position=0, scale=head_dim**-0.5)
    positions = torch.arange(rows)
    expected = reference.attention(
        queries[0],
        reference.rotate(k, *angles),
        qkv[:, heads + kv_heads :],
        q_positions=positions,
        k_positions=positions,
        scale=head_dim**-0.5,
    )
    assert float((out.double() - expected.out).abs().max()) <= {torch.bfloat16: 8e-2, torch.float32: 3e-5}[dtype]


def test_pages_beyond_two_gibibytes(isa: str) -> None:
    """Slot offsets need 64 bits. The map is sparse: only what is touched takes memory."""
    heads, kv_heads, head_dim = 2, 1, 256
    page_bytes = 2 * 64 * head_dim * 2
    slots = 3 * 2**31 // (kv_heads * page_bytes)
    pages = torch.empty(slots, kv_heads, page_bytes, dtype=torch.uint8)
    view = PageView(pages, torch.tensor([slots - 1, 0, slots // 2], dtype=torch.int32))
    qkv = torch.randn(192, (heads + 2 * kv_heads) * head_dim).bfloat16()
    small = make_view(3, kv_heads, head_dim, torch.bfloat16)
    outs = []
    lists = blocks.dense_lists(first_position=0, num_rows=192, num_heads=heads, span_pages=None)
    for where in (view, small):
        q = qkv.new_empty(192, heads, head_dim)
        kernels.store(qkv, (q, None, None), (None, None, None), where, first_position=0, num_heads=heads)
        outs.append(torch.empty_like(q))
        kernels.attend((q, None, None), where, lists, outs[-1], first_position=0, scale=head_dim**-0.5)
    assert torch.equal(outs[0], outs[1])


@dtypes
@pytest.mark.parametrize("width", [64, 576, 900])
def test_add_rms_norm(isa: str, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    residual, delta = torch.randn(37, width, generator=generator), torch.randn(37, width, generator=generator).to(dtype)
    weight = torch.rand(width, generator=generator)
    expected_residual = residual + delta.float()
    x = expected_residual.double()
    expected = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    out = delta.new_empty(37, width)
    kernels.add_rms_norm(residual, delta, weight, out, eps=1e-6)
    torch.testing.assert_close(residual, expected_residual, rtol=0, atol=1e-6)
    torch.testing.assert_close(out.double(), expected, rtol={torch.bfloat16: 5e-3, torch.float32: 1e-5}[dtype], atol=1e-5)
    again = residual.clone()
    kernels.add_rms_norm(residual, None, weight, out, eps=1e-6)
    assert torch.equal(residual, again)


@dtypes
def test_silu_mul(isa: str, dtype: torch.dtype) -> None:
    gate_up = (4 * torch.randn(29, 2 * 200, generator=torch.Generator().manual_seed(0))).to(dtype)
    gate_up[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -0.5]).to(dtype)
    out = gate_up.new_empty(29, 200)
    kernels.silu_mul(gate_up, out)
    gate, up = gate_up.double().chunk(2, dim=1)
    expected = gate * torch.sigmoid(gate) * up
    torch.testing.assert_close(out.double(), expected, rtol={torch.bfloat16: 5e-3, torch.float32: 1e-5}[dtype], atol=1e-6)


# What the wrappers refuse: the native side trusts them.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"first_position": 64}, "beyond the page table"),
        ({"entries": torch.tensor([0, 400], dtype=torch.int32)}, "names page 100"),
        ({"entries": torch.tensor([0, 4])}, "int32"),
        ({"offsets": torch.tensor([0, 1])}, "offsets"),
        ({"offsets": torch.tensor([0, 1, 3])}, "offsets must run"),
        ({"heads_per_list": 3}, "heads_per_list"),
        ({"logit_factor": torch.ones(3)}, "expected float32"),
        ({"lse": torch.ones(2, 3)}, "expected float32"),
        ({"out": torch.empty(5, 2, 64)}, "out must look like"),
        ({"q": torch.empty(128, 2, 48)}, "head_dim"),
        ({"q": torch.empty(128, 2, 64, dtype=torch.float16)}, "bfloat16 or float32"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, object], words: str) -> None:
    case = make_case(128, 2, 1, 64, torch.float32)
    values: dict[str, object] = {
        "q": case.q,
        "out": torch.empty_like(case.q),
        "offsets": torch.tensor([0, 1, 2]),
        "entries": torch.tensor([0, 4], dtype=torch.int32),
        "heads_per_list": 2,
        "first_position": 0,
        "logit_factor": None,
        "lse": None,
        **change,
    }
    with pytest.raises(ValueError, match=words):
        kernels.attend(
            (values["q"], None, None),  # type: ignore[arg-type]
            case.view,
            BlockLists(values["offsets"], values["entries"], values["heads_per_list"]),  # type: ignore[arg-type]
            values["out"],  # type: ignore[arg-type]
            first_position=values["first_position"],  # type: ignore[arg-type]
            scale=1.0,
            logit_factor=values["logit_factor"],  # type: ignore[arg-type]
            lse=values["lse"],  # type: ignore[arg-type]
        )


def test_an_unknown_instruction_set_is_an_error() -> None:
    with pytest.raises(KernelError, match="no such instruction set"), native.use_isa("sse9"):
        pass


@pytest.mark.parametrize("name", ["scalar", "nonsense"])
def test_the_environment_forces_the_instruction_set(name: str) -> None:
    code = "from zen_turbo import native; print(native.describe()['isa'], native.describe()['reason'])"
    environment = {**os.environ, "ZEN_TURBO_ISA": name}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if name == "scalar":
        assert done.stdout.strip() == "scalar forced by ZEN_TURBO_ISA"
    else:
        assert "ZEN_TURBO_ISA=nonsense: no such instruction set" in done.stderr


def test_positions_of_the_plan_are_those_of_the_functions() -> None:
    """A guard on the wiring: the angles of a chunk in the third span."""
    geometry = DualChunk(chunk_size=192, local_size=64, trained_window=192)
    rotary = RotaryEmbedding(ROPE, 64)
    attention = Attention(
        num_heads=2, num_key_value_heads=1, head_dim=64, rotary=rotary, dual_chunk=geometry, trained_window=192, temperature=True
    )
    plan = attention.plan(256, 64)
    positions = dca.query_positions(torch.arange(256, 320), geometry)
    assert plan.num_variants == 3
    for angle, at in zip(plan.angles, (positions.intra, positions.succ, positions.inter[:1]), strict=True):
        assert angle is not None and torch.equal(angle.cos, rotary.cos_sin(at)[0])
    assert attention.plan(0, 64).num_variants == 1 and attention.plan(0, 64).logit_factor is None
