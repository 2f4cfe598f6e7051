"""The reference against torch's own attention, against itself in other words, and against loops over single pairs."""

from __future__ import annotations

import math

import pytest
import torch

from zen_turbo.attention import blocks, dca, reference
from zen_turbo.attention.dca import DualChunk
from zen_turbo.attention.rope import RotaryEmbedding
from zen_turbo.models.config import RopeConfig

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 16
SCALE = HEAD_DIM**-0.5
ROPE = RotaryEmbedding(RopeConfig(theta=100.0), HEAD_DIM)
# Tiny, so that a few hundred tokens see three spans and the clamp: L = 64, aligned with pages.
PAGED = DualChunk(chunk_size=96, local_size=32, trained_window=96)
TINY = DualChunk(chunk_size=8, local_size=2, trained_window=8, page_tokens=1)


def tensors(num_queries: int, num_keys: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [num_queries, 4, 16], k and v [num_keys, 2, 16], float64."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(num_queries, NUM_HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, num_keys, NUM_KV_HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
    return 2 * q, k, v


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_rotate_turns_dimension_pairs_by_the_angle() -> None:
    x = tensors(5, 1)[0]
    angles = torch.rand(5, HEAD_DIM // 2, dtype=torch.float64) * 6
    rotated = reference.rotate(x, angles.cos(), angles.sin())
    half = HEAD_DIM // 2
    as_complex = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angles)[:, None]
    close(rotated, torch.cat((as_complex.real, as_complex.imag), dim=-1))


def test_rotated_products_depend_on_the_distance_only() -> None:
    q, k, _ = tensors(1, 1)
    near, far = (
        (
            reference.rotate(q, *ROPE.cos_sin(torch.tensor([i])))
            * reference.rotate(k.repeat_interleave(2, 1), *ROPE.cos_sin(torch.tensor([j])))
        ).sum(-1)
        for i, j in ((7, 3), (1007, 1003))
    )
    torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5)  # cos and sin are fp32


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 9])
def test_attention_is_torch_attention(causal: bool, window: int | None) -> None:
    q, k, v = tensors(40, 40)
    positions = torch.arange(40)
    distances = positions[:, None] - positions
    mask = torch.ones(40, 40, dtype=torch.bool)
    if causal:
        mask &= distances >= 0
    if window:
        mask &= distances < window
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=mask, scale=0.3, enable_gqa=True
    ).transpose(0, 1)
    found = reference.attention(q, k, v, q_positions=positions, k_positions=positions, scale=0.3, window=window, causal=causal)
    close(found.out, expected)
    products = torch.einsum("thd,shd->ths", q, k.repeat_interleave(2, 1)) * 0.3
    close(found.lse.exp(), (products.exp() * mask[:, None]).sum(-1))


def test_logit_factor_multiplies_logits_of_its_query() -> None:
    q, k, v = tensors(6, 6)
    positions = torch.arange(6)
    factor = torch.tensor([1.0, 1.1, 1.2, 1.3, 1.4, 2.0])
    found = reference.attention(q, k, v, q_positions=positions, k_positions=positions, scale=SCALE, logit_factor=factor)
    scaled = reference.attention(q * factor.double()[:, None, None], k, v, q_positions=positions, k_positions=positions, scale=SCALE)
    close(found.out, scaled.out)
    close(found.lse, scaled.lse)


def test_a_query_that_sees_nothing_gives_zeros_and_minus_infinity() -> None:
    q, k, v = tensors(2, 3)
    found = reference.attention(q, k, v, q_positions=torch.tensor([0, 5]), k_positions=torch.tensor([1, 2, 3]), scale=SCALE)
    assert torch.equal(found.out[0], torch.zeros(NUM_HEADS, HEAD_DIM, dtype=torch.float64))
    assert (found.lse[0] == -math.inf).all()
    assert found.lse[1].isfinite().all()


def test_a_value_that_is_not_a_number_is_not_hidden() -> None:
    q, k, v = tensors(1, 2)
    q[0, 0, 0] = math.nan
    found = reference.attention(q, k, v, q_positions=torch.tensor([5]), k_positions=torch.tensor([1, 2]), scale=SCALE)
    assert found.out[0, 0].isnan().all()


@pytest.mark.parametrize("geometry", [TINY, PAGED])
def test_distances_agree_with_the_engines_positions(geometry: DualChunk) -> None:
    positions = torch.arange(4 * geometry.span + 3)
    found = reference.dca_distances(positions, positions, geometry)
    variants = torch.stack(dca.query_positions(positions, geometry))
    for query in positions.tolist():
        spans = (dca.span_of(positions[query], geometry) - dca.span_of(positions[: query + 1], geometry)).clamp_max(2)
        expected = variants[spans, query] - dca.key_positions(positions[: query + 1], geometry)
        assert torch.equal(found[query, : query + 1], expected)


def test_distances_of_the_published_table() -> None:
    found = reference.dca_distances(torch.tensor([9, 19]), torch.arange(20), TINY)
    assert found[0, :10].tolist() == [8, 7, 6, 5, 4, 3, 3, 2, 1, 0]
    assert found[1].tolist() == [8, 7, 6, 5, 4, 3, 8, 7, 6, 5, 4, 3, 7, 6, 5, 4, 3, 2, 1, 0]


def test_dual_chunk_attention_is_a_loop_over_pairs_at_their_distances() -> None:
    """Each key rotated backwards by its distance meets the unrotated query: RoPE in its relative form."""
    q, k, v = tensors(30, 30)
    distances = reference.dca_distances(torch.arange(30), torch.arange(30), TINY)
    found = reference.dca_attention(q, k, v, ROPE, TINY, rule="none")
    for query in range(30):
        cos, sin = ROPE.cos_sin(distances[query, : query + 1])
        keys = reference.rotate(k[: query + 1].repeat_interleave(2, 1), cos, -sin)
        logits = (keys * q[query]).sum(-1) * SCALE
        expected = torch.einsum("sh,shd->hd", logits.softmax(0), v[: query + 1].repeat_interleave(2, 1))
        torch.testing.assert_close(found.out[query], expected, rtol=1e-5, atol=1e-5)  # cos and sin are fp32
        torch.testing.assert_close(found.lse[query], logits.logsumexp(0), rtol=1e-5, atol=1e-5)


def test_inside_the_window_dual_chunk_attention_is_plain_rope() -> None:
    num_tokens = PAGED.chunk_size
    q, k, v = tensors(num_tokens, num_tokens)
    positions = torch.arange(num_tokens)
    angles = ROPE.cos_sin(positions)
    plain = reference.attention(
        reference.rotate(q, *angles), reference.rotate(k, *angles), v, q_positions=positions, k_positions=positions, scale=SCALE
    )
    extended = reference.dca_attention(q, k, v, ROPE, PAGED)
    torch.testing.assert_close(extended.out, plain.out, rtol=1e-5, atol=1e-5)
    first = slice(0, PAGED.span)  # one span: the very same rotations
    assert torch.equal(extended.out[first], plain.out[first])


def test_beyond_the_window_dual_chunk_attention_is_not_plain_rope() -> None:
    q, k, v = tensors(1, 200)
    rotated = reference.rotate(q, *ROPE.cos_sin(torch.tensor([199]))), reference.rotate(k, *ROPE.cos_sin(torch.arange(200)))
    plain = reference.attention(*rotated, v, q_positions=torch.tensor([199]), k_positions=torch.arange(200), scale=SCALE)
    extended = reference.dca_attention(q, k, v, ROPE, PAGED, q_start=199, rule="none")
    assert (plain.out - extended.out).abs().max() > 1e-2


def test_queries_of_a_later_chunk_are_those_of_one_shot() -> None:
    q, k, v = tensors(300, 300)
    whole = reference.dca_attention(q, k, v, ROPE, PAGED)
    for start, end in ((0, 128), (128, 256), (256, 300)):
        part = reference.dca_attention(q[start:end], k[:end], v[:end], ROPE, PAGED, q_start=start)
        close(part.out, whole.out[start:end])
        close(part.lse, whole.lse[start:end])


def test_the_temperature_rules() -> None:
    q, k, v = tensors(300, 300)
    ours = reference.dca_attention(q, k, v, ROPE, PAGED)
    by_position = dca.temperature(torch.arange(300), PAGED.trained_window)
    by_length = torch.full((300,), dca.original_temperature(300, PAGED.trained_window), dtype=torch.float64)
    given = reference.dca_attention(q, k, v, ROPE, PAGED, logit_factor=by_position)
    torch.testing.assert_close(given.out, ours.out, rtol=1e-5, atol=1e-5)  # the engine's factor is fp32
    original = reference.dca_attention(q, k, v, ROPE, PAGED, rule="original")
    close(original.out, reference.dca_attention(q, k, v, ROPE, PAGED, logit_factor=by_length).out)
    without = reference.dca_attention(q, k, v, ROPE, PAGED, rule="none")
    assert torch.equal(ours.out[:96], without.out[:96])
    assert not torch.equal(ours.out[96:], without.out[96:])
    close(ours.out[-1], original.out[-1])  # the last query's own position is the total length
    assert not torch.allclose(ours.out[:96], original.out[:96])
    with pytest.raises(ValueError, match="rule"):
        reference.dca_attention(q, k, v, ROPE, PAGED, rule="theirs")
    with pytest.raises(ValueError, match="logit_factor"):
        reference.dca_attention(q, k, v, ROPE, PAGED, rule="none", logit_factor=by_position)


def rotated_variants(q: torch.Tensor, first_position: int) -> tuple[torch.Tensor, ...]:
    positions = dca.query_positions(torch.arange(first_position, first_position + len(q)), PAGED)
    return tuple(reference.rotate(q, *ROPE.cos_sin(variant)) for variant in positions)


@pytest.mark.parametrize(("first_position", "num_rows"), [(0, 300), (192, 70), (256, 44), (299, 1)])
@pytest.mark.parametrize("window", [None, 50])
def test_every_page_kept_is_dual_chunk_attention(first_position: int, num_rows: int, window: int | None) -> None:
    end = first_position + num_rows
    q, k, v = tensors(num_rows, end)
    lists = blocks.dense_lists(
        first_position=first_position, num_rows=num_rows, num_heads=NUM_HEADS, span_pages=PAGED.span // 64, window=window
    )
    unpacked = reference.unpack_lists(lists.offsets, lists.entries, num_blocks=blocks.num_blocks(num_rows))
    factor = dca.temperature(torch.arange(first_position, end), PAGED.trained_window)
    found = reference.block_attention(
        rotated_variants(q, first_position),
        reference.rotate(k, *ROPE.cos_sin(dca.key_positions(torch.arange(end), PAGED))),
        v,
        unpacked,
        first_position=first_position,
        scale=SCALE,
        window=window,
        logit_factor=factor,
    )
    expected = reference.dca_attention(q, k, v, ROPE, PAGED, q_start=first_position, window=window, logit_factor=factor)
    close(found.out, expected.out)
    close(found.lse, expected.lse)


def test_block_lists_select_pages_per_head_and_block() -> None:
    """Against attention over the gathered keys, each list head and query block on its own, with one variant throughout."""
    q, k, v = tensors(130, 130)
    lists = [
        [[(0, 0)], [(1, 0)], [(0, 0), (2, 0)]],
        [[(0, 0)], [(0, 0), (1, 0)], [(1, 0)]],
    ]
    found = reference.block_attention((q, None, None), k, v, lists, first_position=0, scale=SCALE)
    for list_head, query_blocks in enumerate(lists):
        heads = slice(2 * list_head, 2 * list_head + 2)  # two lists of two heads, which share one KV head
        for block, pairs in enumerate(query_blocks):
            rows = torch.arange(130)[64 * block : 64 * block + 64]
            keys = torch.cat([torch.arange(130)[64 * page : 64 * page + 64] for page, _ in pairs])
            expected = reference.attention(
                q[rows][:, heads], k[keys][:, [list_head]], v[keys][:, [list_head]], q_positions=rows, k_positions=keys, scale=SCALE
            )
            close(found.out[rows][:, heads], expected.out)
            close(found.lse[rows][:, heads], expected.lse)


def test_what_is_kept_and_what_is_skipped_make_up_the_whole() -> None:
    """lse of disjoint lists adds up: the identity behind recall = exp(lse_kept - lse_full)."""
    q, k, v = tensors(64, 256)
    full, even, odd = (
        reference.block_attention((q, None, None), k, v, [[[(page, 0) for page in pages]]], first_position=192, scale=SCALE)
        for pages in (range(4), (0, 2), (1, 3))
    )
    close(torch.logaddexp(even.lse, odd.lse), full.lse)
    share = (even.lse - full.lse).exp()[..., None]
    close(share * even.out + (1 - share) * odd.out, full.out)


def test_an_empty_list_gives_zeros_and_minus_infinity() -> None:
    q, k, v = tensors(65, 128)
    found = reference.block_attention((q, None, None), k, v, [[[(0, 0)], []]], first_position=0, scale=SCALE)
    assert torch.equal(found.out[64], torch.zeros(NUM_HEADS, HEAD_DIM, dtype=torch.float64))
    assert (found.lse[64] == -math.inf).all()
    assert found.lse[:64].isfinite().all()


@pytest.mark.parametrize(
    ("lists", "words"),
    [
        ([[[(1, 0), (0, 0)]]], "must ascend"),
        ([[[(0, 0), (0, 1)]]], "must ascend"),
        ([[[(2, 0)]]], "must ascend"),
        ([[[(0, 1)]]], "variant 1"),
        ([[[(0, 0)], [(0, 0)]]], "2 blocks"),
        ([[[(0, 0)]]] * 3, "3 lists"),
    ],
)
def test_lists_that_break_the_contract_are_refused(lists: reference.Lists, words: str) -> None:
    q, k, v = tensors(64, 128)
    with pytest.raises(ValueError, match=words):
        reference.block_attention((q, None, q), k, v, lists, first_position=64, scale=SCALE)
