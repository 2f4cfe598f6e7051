"""Page summaries and native selection against the fp64 reference, under every instruction set of this CPU."""

from __future__ import annotations

import pytest
import torch
from test_kernels import DTYPES, make_view

from zen_turbo import kernels
from zen_turbo.attention import blocks, reference
from zen_turbo.kernels import PackedSummaries, PageView

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "f32"])
NO_ANGLES = (None, None, None)


def with_summaries(view: PageView, head_dim: int) -> PageView:
    shape = (view.pages.shape[0], view.pages.shape[1], 3, head_dim)
    return view._replace(summaries=torch.full(shape, float("nan")))


def store(qkv: torch.Tensor, view: PageView, *, heads: int, first_position: int = 0) -> torch.Tensor:
    q = qkv.new_empty(len(qkv), heads, qkv.shape[2])
    kernels.store(qkv.flatten(1), (q, None, None), NO_ANGLES, view, first_position=first_position, num_heads=heads)
    return q


def random_qkv(length: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(length, heads + 2 * kv_heads, head_dim, generator=generator)
    # Pages differ, as in text: without it all energies are alike.
    drift = torch.randn(-(-length // 64), heads + 2 * kv_heads, head_dim, generator=generator).repeat_interleave(64, dim=0)[:length]
    return (qkv + drift).to(dtype)


@dtypes
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_summaries_are_mean_largest_and_smallest_key_of_full_pages(isa: str, head_dim: int, dtype: torch.dtype) -> None:
    heads, kv_heads, length = 2, 2, 250
    qkv = random_qkv(length, heads, kv_heads, head_dim, dtype)
    view = with_summaries(make_view(4, kv_heads, head_dim, dtype), head_dim)
    store(qkv, view, heads=heads)
    assert view.summaries is not None
    found = view.summaries[view.page_table.long()]
    keys = qkv[:, heads : heads + kv_heads]
    torch.testing.assert_close(found[:3, :, 0].double(), reference.page_means(keys), rtol=1e-5, atol=1e-5)
    pages = keys[:192].float().view(3, 64, kv_heads, head_dim)
    assert torch.equal(found[:3, :, 1], pages.amax(dim=1)) and torch.equal(found[:3, :, 2], pages.amin(dim=1))
    assert found[3].isnan().all(), "the last page is not full"


@dtypes
def test_a_page_filled_in_pieces_has_the_summary_of_one_filled_at_once(isa: str, dtype: torch.dtype) -> None:
    qkv = random_qkv(128, 2, 1, 64, dtype)
    whole, pieces = (with_summaries(make_view(2, 1, 64, dtype), 64) for _ in range(2))
    store(qkv, whole, heads=2)
    for start, end in ((0, 10), (10, 64), (64, 127), (127, 128)):
        store(qkv[start:end], pieces, heads=2, first_position=start)
    assert whole.summaries is not None and pieces.summaries is not None
    table = whole.page_table.long()
    assert torch.equal(whole.summaries[table], pieces.summaries[table])


CASES = [
    # rows, first position, heads, kv heads, head_dim, span in pages, sampled rows
    (256, 0, 4, 2, 64, None, 8),
    (256, 512, 14, 2, 64, None, 8),
    (200, 4096, 3, 1, 64, None, 4),
    (130, 1024, 4, 1, 128, None, 1),
    (192, 1600, 4, 2, 80, 7, 8),
    (320, 6400, 2, 1, 64, 30, 8),
    (70, 640, 2, 2, 256, 6, 64),
]


@dtypes
@pytest.mark.parametrize("bounds", [False, True])
@pytest.mark.parametrize(("num_rows", "first_position", "heads", "kv_heads", "head_dim", "span", "rows"), CASES)
def test_energies(
    isa: str,
    num_rows: int,
    first_position: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    span: int | None,
    rows: int,
    bounds: bool,
    dtype: torch.dtype,
) -> None:
    length = first_position + num_rows
    qkv = random_qkv(length, heads, kv_heads, head_dim, dtype)
    view = with_summaries(make_view(-(-length // 64), kv_heads, head_dim, dtype), head_dim)
    store(qkv, view, heads=heads)
    generator = torch.Generator().manual_seed(1)
    queries = tuple((torch.randn(num_rows, heads, head_dim, generator=generator) * 2).to(dtype) for _ in range(3))
    factor = 1 + torch.rand(num_rows, generator=generator)
    num_blocks, num_pages = -(-num_rows // 64), -(-length // 64)
    energies = torch.full((1 + bounds, heads, num_blocks, num_pages), float("nan"))
    mass = torch.linspace(0.3, 0.9, heads)
    settings = {"first_position": first_position, "scale": head_dim**-0.5, "span_pages": span, "logit_factor": factor, "sample_rows": rows}
    forced = {"sink_pages": 1, "local_pages": 2}
    chosen = kernels.select_pages(queries, view, mass, **settings, **forced, bound_pages=5 * bounds, energies=energies if bounds else energies[0])
    # Means are rounded to the dtype of keys before scoring.
    k = qkv[:, heads : heads + kv_heads]
    rounded = reference.page_means(k).to(dtype).repeat_interleave(64, dim=0)
    rounded = torch.cat((rounded, k[len(rounded) :].double()))
    full = k[: length // 64 * 64].view(-1, 64, kv_heads, head_dim)
    largest = full.amax(dim=1), full.amin(dim=1)
    for found, by in zip(energies, (None, largest), strict=False):
        expected = reference.page_energies(queries, rounded, **settings, bounds=by)
        torch.testing.assert_close(found.double(), expected, rtol=2e-2 if dtype == torch.bfloat16 else 2e-4, atol=1e-6)
    if bounds:
        check_both(chosen, energies, mass, first_position, bound_pages=5, most=num_pages, sinks=1, local=2)
    else:
        check_kept(chosen, energies[0], mass, first_position, sinks=1, local=2)
    again = kernels.select_pages(queries, view, mass, **settings, **forced, bound_pages=5 * bounds, num_threads=1)
    assert torch.equal(again.bits, chosen.bits) and torch.equal(again.counts, chosen.counts)


@dtypes
@pytest.mark.parametrize("head_dim", [64, 80])
def test_packed_tiles_are_kept_from_call_to_call(isa: str, head_dim: int, dtype: torch.dtype) -> None:
    """Chunks, then tokens, then a chunk again with other keys: what is chosen and estimated is what packing anew gives, bit for bit."""
    heads, kv_heads, length = 4, 2, 64 * 70
    view = with_summaries(make_view(length // 64, kv_heads, head_dim, dtype), head_dim)
    summaries = PackedSummaries(length // 64, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    kept = view._replace(packed=summaries)
    qkv = random_qkv(length, heads, kv_heads, head_dim, dtype)
    other = random_qkv(length, heads, kv_heads, head_dim, dtype, seed=1)
    packed = []
    for values, start, end in ((qkv, 0, 640), (qkv, 640, 2048), (qkv, 2048, 4000), (qkv, 4000, 4001), (qkv, 4001, 4002), (other, 1984, 2304)):
        q = store(values[start:end], kept, heads=heads, first_position=start)
        found = []
        for each in (kept, view):
            blocks = -(-(end - start) // 64)
            bounds_too = start >= 2048
            energies = torch.empty((*((2,) if bounds_too else ()), heads, blocks, start // 64 + blocks))
            settings = {"first_position": start, "scale": 0.125, "span_pages": None, "sink_pages": 1, "local_pages": 2, "energies": energies}
            chosen = kernels.select_pages((q, None, None), each, torch.full((heads,), 0.7), **settings, bound_pages=3 * bounds_too)
            found.append((chosen.bits, energies))
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
        packed.append(tuple(summaries.num_valid))
    assert packed == [(0,), (10,), (32, 32), (62, 62), (62, 62), (31, 31)]
    short = view._replace(packed=PackedSummaries(16, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype))
    q = store(qkv, view, heads=heads)
    with pytest.raises(ValueError, match="room for 64 pages, not 70"):
        kernels.select_pages((q, None, None), short, torch.ones(heads), first_position=0, scale=1.0, span_pages=None, sink_pages=1, local_pages=1)


@dtypes
@pytest.mark.parametrize("position", [4096, 4100, 4159, 63])
def test_one_row_and_one_list_for_the_heads_of_a_group(isa: str, position: int, dtype: torch.dtype) -> None:
    heads, kv_heads, head_dim = 6, 2, 64
    qkv = random_qkv(position + 1, heads, kv_heads, head_dim, dtype)
    view = with_summaries(make_view(position // 64 + 1, kv_heads, head_dim, dtype), head_dim)
    store(qkv, view, heads=heads)
    q = (torch.randn(1, heads, head_dim, generator=torch.Generator().manual_seed(1)) * 2).to(dtype)
    settings = {"first_position": position, "scale": 0.125, "span_pages": None, "sample_rows": 1}
    energies = torch.full((kv_heads, 1, position // 64 + 1), float("nan"))
    chosen = kernels.select_pages(
        (q, None, None), view, torch.full((2,), 0.7), **settings, sink_pages=1, local_pages=2, energies=energies, per_kv_head=True
    )
    full = position // 64 * 64
    k = qkv[:full, heads : heads + kv_heads]
    rounded = torch.cat((reference.page_means(k).to(dtype).repeat_interleave(64, dim=0), qkv[full:, heads : heads + kv_heads].double()))
    expected = reference.page_energies((q, None, None), rounded, **settings).view(kv_heads, 3, 1, -1).sum(dim=1)
    torch.testing.assert_close(energies.double(), expected, rtol=2e-2 if dtype == torch.bfloat16 else 2e-4, atol=1e-6)
    check_kept(chosen, energies, torch.full((2,), 0.7), position, sinks=1, local=2)
    assert int(chosen.counts.max()) < 66


@dtypes
@pytest.mark.parametrize(("count", "span"), [(0, None), (512, None), (1300, 100), (2100, 1500)])
def test_a_token_scores_many_pages_in_parts(isa: str, count: int, span: int | None, dtype: torch.dtype) -> None:
    """As the same row does that is a query block; and in the same way with any number of threads."""
    heads, kv_heads, head_dim, position = 14, 2, 64, 64 * count + 5
    generator = torch.Generator().manual_seed(2)
    means = torch.randn(count + 1, kv_heads, 1, head_dim, generator=generator)
    reach = torch.rand(count + 1, kv_heads, 1, head_dim, generator=generator)
    view = make_view(count + 1, kv_heads, head_dim, dtype)
    summaries = torch.empty(view.pages.shape[0], kv_heads, 3, head_dim)
    summaries[view.page_table.long()] = torch.cat((means, means + reach, means - reach), dim=2)
    view = view._replace(summaries=summaries)
    queries = tuple((torch.randn(1, heads, head_dim, generator=generator) * 2).to(dtype) for _ in range(3))
    settings = {"first_position": position, "scale": 0.125, "span_pages": span, "sink_pages": 1, "local_pages": 4, "sample_rows": 1}
    limits = {"bound_pages": 40, "most_pages": 300}

    def choose(num_threads: int) -> tuple[kernels.PageBits, torch.Tensor]:
        energies = torch.full((2, kv_heads, 1, count + 1), float("nan"))
        mass = torch.full((kv_heads,), 0.9)
        chosen = kernels.select_pages(
            queries, view, mass, **settings, **limits, energies=energies, per_kv_head=True, num_threads=num_threads
        )
        return chosen, energies

    chosen, energies = choose(1)
    of_heads = torch.empty(2, heads, 1, count + 1)
    kernels.select_pages(queries, view, torch.ones(heads), **settings, **limits, energies=of_heads)
    torch.testing.assert_close(energies, of_heads.view(2, kv_heads, -1, 1, count + 1).sum(dim=2), rtol=1e-3, atol=1e-7)
    check_both(chosen, energies, torch.full((kv_heads,), 0.9), position, bound_pages=40, most=300, sinks=1, local=4)
    for num_threads in (2, 5):
        again, same = choose(num_threads)
        assert torch.equal(again.bits, chosen.bits) and torch.equal(same, energies)


def as_codes(x: torch.Tensor) -> torch.Tensor:
    """float32 [pages, ...] as csrc/summary_codes.inl keeps it, float64: 64 pages share a middle and a step."""
    parts = []
    for part in x.split(64):
        if not len(part):
            break
        most, least = part.amax(dim=0), part.amin(dim=0)
        middle, step = (most + least) * 0.5, (most - least) / 254
        codes = ((part - middle) / step.clamp_min(1e-30)).round().clamp(-127, 127)
        parts.append(middle.double() + step.double() * codes.double())
    return torch.cat(parts) if parts else x.double()


@pytest.mark.parametrize(("count", "span", "head_dim", "group"), [(0, None, 64, 7), (37, None, 80, 1), (600, 100, 64, 7), (1100, 800, 256, 4)])
def test_a_token_reads_codes(isa: str, count: int, span: int | None, head_dim: int, group: int) -> None:
    """Energies are those of the summaries as codes have them, and nearly those of the summaries."""
    kv_heads, position = 2, 64 * count + 63
    generator = torch.Generator().manual_seed(3)
    middle = 3 * torch.randn(1, kv_heads, 1, head_dim, generator=generator)  # keys lie far from zero, on one side
    means = middle + torch.randn(count + 1, kv_heads, 1, head_dim, generator=generator)
    reach = torch.rand(count + 1, kv_heads, 1, head_dim, generator=generator)
    view = make_view(count + 1, kv_heads, head_dim, torch.bfloat16)
    table = view.page_table.long()
    summaries = torch.empty(view.pages.shape[0], kv_heads, 3, head_dim)
    summaries[table] = torch.cat((means, means + reach, means - reach), dim=2)
    view = view._replace(summaries=summaries)
    queries = tuple((torch.randn(1, kv_heads * group, head_dim, generator=generator) * 10 / head_dim**0.5).bfloat16() for _ in range(3))
    settings = {"first_position": position, "scale": 0.125, "span_pages": span, "sink_pages": 1, "local_pages": 4, "sample_rows": 1}
    energies = torch.full((2, kv_heads, 1, count + 1), float("nan"))
    mass = torch.full((kv_heads,), 0.9)
    chosen = kernels.select_pages(
        queries, view, mass, **settings, bound_pages=5, most_pages=50, energies=energies, per_kv_head=True, codes=True
    )
    check_both(chosen, energies, mass, position, bound_pages=5, most=50, sinks=1, local=4)
    for values, tolerance in ((as_codes(summaries[table][:count]), 2e-2), (summaries[table][:count].double(), 2e-1)):
        mean, largest, smallest = values.unbind(dim=2)  # [pages, kv_heads, head_dim]
        own = count // span if span else 0
        for kv_head in range(kv_heads):
            expected = torch.zeros(2, count, dtype=torch.float64)
            for head in range(kv_head * group, (kv_head + 1) * group):
                logits = torch.empty(2, count, dtype=torch.float64)
                for page in range(count):
                    q = queries[min(own - page // span, 2) if span else 0][0, head].double()
                    logits[0, page] = q @ mean[page, kv_head]
                    logits[1, page] = q.clamp_min(0) @ largest[page, kv_head] + q.clamp_max(0) @ smallest[page, kv_head]
                expected += (logits * 0.125).softmax(dim=1)
            torch.testing.assert_close(energies[:, kv_head, 0, :count].double(), expected, rtol=tolerance, atol=1e-6)


def test_codes_are_kept_from_token_to_token(isa: str) -> None:
    """Tokens fill pages; a chunk in between drops them. What is estimated is what packing anew gives, bit for bit."""
    heads, kv_heads, head_dim, begin = 4, 2, 64, 64 * 127 + 60
    view = with_summaries(make_view(140, kv_heads, head_dim, torch.bfloat16), head_dim)
    packed = PackedSummaries(140, kv_heads=kv_heads, head_dim=head_dim, dtype=torch.bfloat16)
    kept = view._replace(packed=packed)
    qkv = random_qkv(140 * 64, heads, kv_heads, head_dim, torch.bfloat16)
    store(qkv[:begin], view, heads=heads)
    settings = {"scale": 0.125, "span_pages": None, "sink_pages": 1, "local_pages": 2, "bound_pages": 3}
    token = {"per_kv_head": True, "codes": True, "sample_rows": 1}
    for position in (*range(begin, begin + 10), *range(begin + 64, begin + 70)):
        q = store(qkv[position : position + 1], kept, heads=heads, first_position=position)
        found = []
        for each in (kept, view):
            energies = torch.empty(2, kv_heads, 1, position // 64 + 1)
            mass = torch.full((kv_heads,), 0.7)
            chosen = kernels.select_pages((q, None, None), each, mass, first_position=position, energies=energies, **settings, **token)
            found.append((chosen.bits, energies))
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
        assert packed.codes and packed.num_valid == [position // 64] * 2
        if position == begin + 9:
            kernels.select_pages((q, None, None), kept, torch.ones(heads), first_position=position, **settings)
            assert not packed.codes
            qkv[begin + 10 : begin + 64, heads:] += 1
            store(qkv[begin + 10 : begin + 64], kept, heads=heads, first_position=begin + 10)
    with pytest.raises(ValueError, match="codes are for one bfloat16 row"):
        kernels.select_pages((q, None, None), view, torch.ones(heads), first_position=position, **settings, codes=True)


def kept_pages(chosen: kernels.PageBits, num_pages: int) -> torch.Tensor:
    """bool [lists, blocks, pages]"""
    bits = (chosen.bits[..., None] >> torch.arange(64)) & 1
    return bits.flatten(2)[..., :num_pages].bool()


def check_kept(
    chosen: kernels.PageBits, energies: torch.Tensor, mass: torch.Tensor, first_position: int, *, sinks: int, local: int
) -> None:
    """What must be kept is, nothing of the future is, the mass is reached, and no page kept for its energy is far below one left out."""
    num_pages = energies.shape[2]
    kept = kept_pages(chosen, num_pages)
    assert torch.equal(kept.sum(dim=-1, dtype=torch.int32), chosen.counts)
    for block in range(energies.shape[1]):
        diagonal = first_position // 64 + block
        forced = [page for page in range(diagonal + 1) if page < sinks or page >= diagonal - local]
        free = [page for page in range(diagonal) if page not in forced]
        for head in range(energies.shape[0]):
            row, energy = kept[head, block], energies[head, block].double()
            assert row[forced].all() and not row[diagonal + 1 :].any()
            if diagonal:
                assert float(energy[row].sum()) >= float(mass[head]) * float(energy.sum()) - 1e-5
            inside = [float(energy[page]) for page in free if row[page]]
            outside = [float(energy[page]) for page in free if not row[page]]
            if inside and outside:
                assert min(inside) >= max(outside) * (1 - 1 / 16)
            if inside:
                # Without the least of them the mass would not be reached: nothing is kept for nothing.
                assert float(energy[row].sum()) - max(min(inside), max(inside) / 17) < float(mass[head]) * float(energy.sum()) + 1e-5 or (
                    float(energy[row].sum()) - min(inside) * (1 + 1 / 8) < float(mass[head]) * float(energy.sum()) + 1e-5
                )


def kept_twice(energies: torch.Tensor, mass: float, count: int, *, bound_pages: int, most: int, sinks: int, local: int) -> set[int]:
    """So many by bounds, whatever they hold, then by means, as the rule says it; energies: [2, pages]."""
    kept = {page for page in range(count) if page < sinks or page >= count - local}
    room = most
    for energy, limit, share in ((energies[1], bound_pages, 1.0), (energies[0], most, mass)):
        order = sorted((page for page in range(count) if page not in kept), key=lambda page: -float(energy[page]))
        have, all_of_it = float(energy[sorted(kept)].sum()), float(energy[:count].sum())
        added = 0
        for page in order:
            if added >= min(limit, room) or (share < 1 and have >= share * all_of_it):
                break
            kept.add(page)
            have, added = have + float(energy[page]), added + 1
        room -= added
    return kept


def check_both(
    chosen: kernels.PageBits,
    energies: torch.Tensor,
    mass: torch.Tensor,
    first_position: int,
    **settings: int,
) -> None:
    """Energies are compared in steps of a sixteenth, so a few pages may differ from the exact rule's; not many, and not in number."""
    kept = kept_pages(chosen, energies.shape[3])
    assert torch.equal(kept.sum(dim=-1, dtype=torch.int32), chosen.counts)
    for block in range(energies.shape[2]):
        diagonal = first_position // 64 + block
        for head in range(energies.shape[1]):
            found = set(kept[head, block].nonzero().flatten().tolist())
            expected = kept_twice(energies[:, head, block], float(mass[head]), diagonal, **settings) | {diagonal}
            assert {diagonal, *range(min(settings["sinks"], diagonal)), *range(max(0, diagonal - settings["local"]), diagonal)} <= found
            assert max(found) == diagonal
            assert len(found ^ expected) <= 4 + len(expected) // 8, (found - expected, expected - found)


@dtypes
@pytest.mark.parametrize("most", [0, 1, 7, 16, 1000])
def test_some_of_the_pages_are_chosen_by_bounds(isa: str, most: int, dtype: torch.dtype) -> None:
    """A page has one key that the query looks for, which its mean hides; five others lie a little in that direction with all of their keys."""
    pages, heads = 60, 2
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(64 * pages, 3 * heads, 64, generator=generator) * 0.3
    needle = torch.zeros(64)
    needle[5] = 12.0
    qkv[64 * 20 + 9, heads : 2 * heads] = needle
    qkv[64 * 30 : 64 * 35, heads : 2 * heads, 5] += 0.6
    qkv[-1, :heads] = needle / 2
    view = with_summaries(make_view(pages, heads, 64, dtype), 64)
    q = store(qkv.to(dtype), view, heads=heads)[-1:].contiguous()
    energies = torch.empty(2, heads, 1, pages)
    settings = {"first_position": 64 * pages - 1, "scale": 0.125, "span_pages": None, "sink_pages": 1, "local_pages": 2, "sample_rows": 1}
    chosen = kernels.select_pages((q, None, None), view, torch.ones(heads), **settings, most_pages=most, bound_pages=3, energies=energies)
    check_both(chosen, energies, torch.ones(heads), settings["first_position"], bound_pages=3, most=most, sinks=1, local=2)
    assert chosen.counts.tolist() == [[min(pages, 1 + 2 + 1 + most)]] * heads
    assert kept_pages(chosen, pages)[:, 0, 20].all() == (most >= 1)
    assert (energies[1, :, 0, 20] > 0.5).all() and (energies[0, :, 0, 20] < 0.1).all()


def make_flat(num_pages: int) -> tuple[torch.Tensor, PageView]:
    """Keys all alike: every page has the same energy."""
    qkv = torch.ones(num_pages * 64, 3, 64)
    view = with_summaries(make_view(num_pages, 1, 64, torch.float32), 64)
    return store(qkv, view, heads=1), view


@pytest.mark.parametrize(("mass", "kept"), [(0.0, 1 + 2 + 1), (0.5, 20), (0.25, 10), (1.0, 41)])
def test_a_head_without_preferences_keeps_as_many_as_it_needs(isa: str, mass: float, kept: int) -> None:
    q, view = make_flat(41)
    queries = (q[40 * 64 :].contiguous(), None, None)
    settings = {"first_position": 40 * 64, "scale": 0.125, "span_pages": None, "sink_pages": 1, "local_pages": 2}
    chosen = kernels.select_pages(queries, view, torch.tensor([mass]), **settings)
    row = kept_pages(chosen, 41)[0, 0]
    count = int(chosen.counts[0, 0])
    assert abs(count - 1 - (kept - 1)) <= 1
    free = row[1:38]
    assert torch.equal(free, free.sort(stable=True).values), "the latest pages go first"


def test_all_of_the_mass_is_all_of_the_pages(isa: str) -> None:
    qkv = random_qkv(64 * 70, 4, 2, 64, torch.bfloat16)
    qkv[:, :4] *= 8  # most energies are zero in floating point
    view = with_summaries(make_view(70, 2, 64, torch.bfloat16), 64)
    q = store(qkv, view, heads=4)[64 * 66 :].contiguous()
    chunk = blocks.Chunk(
        queries=(q, q, q), kv=view, first_position=64 * 66, scale=0.125, span_pages=20, logit_factor=None, sparse_blocks=range(4)
    )
    lists = blocks.select_by_mass(chunk, torch.ones(4), sink_pages=0, local_pages=0)
    dense = blocks.dense_lists(first_position=64 * 66, num_rows=256, num_heads=4, span_pages=20)
    assert lists.heads_per_list == 1
    assert torch.equal(lists.entries, dense.entries.repeat(4))
    assert torch.equal(lists.offsets[:5], dense.offsets)


def test_a_limit_is_kept_and_the_best_stay(isa: str) -> None:
    qkv = random_qkv(64 * 40, 2, 1, 64, torch.float32)
    view = with_summaries(make_view(40, 1, 64, torch.float32), 64)
    q = store(qkv, view, heads=2)[64 * 38 :].contiguous()
    energies = torch.empty(2, 2, 40)
    settings = {"first_position": 64 * 38, "scale": 0.5, "span_pages": None, "sink_pages": 1, "local_pages": 1}
    chosen = kernels.select_pages((q, None, None), view, torch.full((2,), 0.999), **settings, most_pages=5, energies=energies)
    assert torch.equal(chosen.counts, torch.full((2, 2), 1 + 1 + 1 + 5, dtype=torch.int32))
    kept = kept_pages(chosen, 40)
    for head in range(2):
        best = energies[head, 0, 1:37].argmax() + 1
        assert kept[head, 0, best]


def test_bits_and_lists_agree(isa: str) -> None:
    keep = torch.rand(3, 4, 150, generator=torch.Generator().manual_seed(0)) < 0.3
    first_position = 146 * 64
    chosen = blocks.pack_bits(keep, first_position=first_position, sink_pages=2, local_pages=3)
    kept = kept_pages(chosen, 150)
    lists = blocks.from_bits(chosen, first_position=first_position, num_heads=6, span_pages=40)
    assert lists.heads_per_list == 2
    nested = reference.unpack_lists(lists.offsets, lists.entries, num_blocks=4)
    for number in range(3):
        for block in range(4):
            diagonal = 146 + block
            pages = [page for page, _ in nested[number][block]]
            assert pages == kept[number, block].nonzero().flatten().tolist()
            asked = {page for page in range(diagonal + 1) if keep[number, block, page]}
            assert set(pages) == asked | {0, 1} | set(range(diagonal - 3, diagonal + 1))
            assert all(variant == min(diagonal // 40 - page // 40, 2) for page, variant in nested[number][block])


def test_arguments_that_do_not_fit_are_refused() -> None:
    q, view = make_flat(4)
    settings = {"first_position": 0, "scale": 0.125, "span_pages": None, "sink_pages": 1, "local_pages": 2}
    mass = torch.ones(1)
    queries = (q, None, None)
    with pytest.raises(ValueError, match="summaries"):
        kernels.select_pages(queries, view._replace(summaries=None), mass, **settings)
    with pytest.raises(ValueError, match="multiple of 64"):
        kernels.select_pages(queries, view, mass, **{**settings, "first_position": 3})
    with pytest.raises(ValueError, match="mass"):
        kernels.select_pages(queries, view, torch.ones(2), **settings)
    with pytest.raises(ValueError, match="query variants"):
        kernels.select_pages(queries, view, mass, **{**settings, "span_pages": 1})
    with pytest.raises(ValueError, match="beyond"):
        kernels.select_pages(queries, view, mass, **{**settings, "first_position": 64})
    with pytest.raises(ValueError, match="out of range"):
        kernels.select_pages(queries, view, mass, **settings, sample_rows=65)
