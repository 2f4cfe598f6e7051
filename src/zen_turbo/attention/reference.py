"""What attention means: the specification that every fast path is tested against. Torch only, everything in float64, and slow.

Nothing here shares code with the fast paths, Dual Chunk Attention's positions included, so that a mistake made there is not made here.
Memory grows with queries x keys x heads: a few hundred tokens are meant, or a thousand.

Shape legend: T queries, S keys, H query heads, G key-value heads (H a multiple of G; query head h reads head h // (H / G)), D head_dim.
Inputs may have any float dtype; outputs are float64. A query that sees no key gives zeros and a log-sum-exp of -inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch

PAGE_TOKENS = 64
RULES = ("ours", "original", "none")

# Per list of heads and query block: the (key page, variant) pairs that it reads, by ascending page. Variants are 0 intra, 1 succ, 2 inter.
Lists = Sequence[Sequence[Sequence[tuple[int, int]]]]


class Rotary(Protocol):
    def cos_sin(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


class Geometry(Protocol):
    """Dual Chunk Attention in tokens, as ``attention.dca.DualChunk``."""

    @property
    def chunk_size(self) -> int: ...
    @property
    def local_size(self) -> int: ...
    @property
    def trained_window(self) -> int: ...


class Attended(NamedTuple):
    """out: float64 [T, H, D]. lse: float64 [T, H], the natural log-sum-exp of the logits (the kernels write it as [H, T])."""

    out: torch.Tensor
    lse: torch.Tensor


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [T, H, D] by angles [T or 1, D / 2], Hugging Face's convention: dimension d turns with dimension d + D / 2."""
    first, second = x.double().chunk(2, dim=-1)
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_positions: torch.Tensor,
    k_positions: torch.Tensor,
    scale: float,
    window: int | None = None,
    causal: bool = True,
    logit_factor: torch.Tensor | None = None,
) -> Attended:
    """Softmax attention of q [T, H, D] over k, v [S, G, D], already rotated.

    q_positions int64 [T] and k_positions int64 [S] say who sees whom: with causal, keys at or before the query; with window, keys after
    position - window. logit_factor [T] multiplies a query's logits, after scale.
    """
    logits = _logits(q, k, scale, logit_factor)
    return _softmax(logits.masked_fill(~_visible(q_positions, k_positions, window, causal), -torch.inf), v)


def dca_distances(q_positions: torch.Tensor, k_positions: torch.Tensor, dual_chunk: Geometry) -> torch.Tensor:
    """int64 [T], [S] -> int64 [T, S]: the distance that the rotations of query and key stand for; without meaning after the query."""
    variants, positions = _dca_variants(q_positions, k_positions, dual_chunk)
    span = dual_chunk.chunk_size - dual_chunk.local_size
    return positions.gather(1, variants) - k_positions % span


def dca_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: Rotary,
    dual_chunk: Geometry,
    *,
    q_start: int = 0,
    scale: float | None = None,
    window: int | None = None,
    logit_factor: torch.Tensor | None = None,
    rule: str = "ours",
) -> Attended:
    """Causal Dual Chunk Attention of unrotated q [T, H, D] at positions q_start and on over unrotated k, v [S, G, D] at 0 and on.

    For every pair of query and key on its own: which of the query's three rotations meets the key's one. scale None is D^-0.5.
    The logits are multiplied by logit_factor [T] if given, and otherwise by ``rule``, with m(s) = max(1, 0.1 ln s + 1):

        ours      m(s)^2, s = (position of the query + 1) / trained window
        original  m(s)^2, s = S / trained window, for all queries alike (the published code)
        none      1
    """
    if rule not in RULES or (logit_factor is not None and rule != "ours"):
        raise ValueError(f"rule must be one of {RULES}, and is not given together with logit_factor; got {rule!r}.")
    q_positions = torch.arange(q_start, q_start + len(q))
    k_positions = torch.arange(len(k))
    if logit_factor is None and rule != "none":
        lengths = q_positions + 1 if rule == "ours" else torch.full_like(q_positions, len(k))
        logit_factor = (0.1 * (lengths.double() / dual_chunk.trained_window).log() + 1).clamp_min(1).square()
    if scale is None:
        scale = q.shape[-1] ** -0.5
    variants, positions = _dca_variants(q_positions, k_positions, dual_chunk)
    rotated_k = rotate(k, *rope.cos_sin(k_positions % (dual_chunk.chunk_size - dual_chunk.local_size)))
    of_variant = [_logits(rotate(q, *rope.cos_sin(positions[:, variant])), rotated_k, scale, logit_factor) for variant in range(3)]
    logits = torch.where(variants == 0, of_variant[0], torch.where(variants == 1, of_variant[1], of_variant[2]))
    return _softmax(logits.masked_fill(~_visible(q_positions, k_positions, window, causal=True), -torch.inf), v)


def unpack_lists(offsets: torch.Tensor, entries: torch.Tensor, *, num_blocks: int) -> Lists:
    """The kernels' CSR lists (offsets int64 [lists * num_blocks + 1], entries ``page * 4 + variant``) as nested lists."""
    bounds, packed = offsets.tolist(), entries.tolist()
    blocks = [[divmod(entry, 4) for entry in packed[begin:end]] for begin, end in pairwise(bounds)]
    return [blocks[first : first + num_blocks] for first in range(0, len(blocks), num_blocks)]


def block_attention(
    q_variants: Sequence[torch.Tensor | None],
    k: torch.Tensor,
    v: torch.Tensor,
    lists: Lists,
    *,
    first_position: int,
    scale: float,
    window: int | None = None,
    logit_factor: torch.Tensor | None = None,
) -> Attended:
    """The contract of the native kernel: each query block attends, in one softmax, to the pages of its list, each with its query variant.

    q_variants: the rotations intra, succ and inter, each [T, H, D] at positions first_position and on; one that no list names may be None.
    k, v: [S, G, D], keys rotated, at positions 0 and on; page p is keys [64 p, 64 p + 64). lists[a][b] serves list head a of len(lists),
    which is query heads [a H / len(lists), (a + 1) H / len(lists)), and query block b, which is rows [64 b, 64 b + 64). Causality and the
    window apply inside, as in ``attention``. Raises ValueError for a list that is not ascending, names a page beyond the keys, or a
    variant that is missing.
    """
    first = next(q for q in q_variants if q is not None)
    num_rows, num_heads, _ = first.shape
    if num_heads % len(lists):
        raise ValueError(f"{len(lists)} lists cannot serve {num_heads} heads.")
    out = torch.zeros(first.shape, dtype=torch.float64)
    lse = torch.full((num_rows, num_heads), -torch.inf, dtype=torch.float64)
    heads_per_list = num_heads // len(lists)
    for list_head, blocks in enumerate(lists):
        if len(blocks) != -(-num_rows // PAGE_TOKENS):
            raise ValueError(f"List head {list_head} has {len(blocks)} blocks for {num_rows} rows.")
        heads = torch.arange(list_head * heads_per_list, (list_head + 1) * heads_per_list)
        kv_heads = heads // (num_heads // k.shape[1])
        for block, pairs in enumerate(blocks):
            pages = [page for page, _ in pairs]
            if sorted(set(pages)) != pages or (pages and (pages[0] < 0 or pages[-1] * PAGE_TOKENS >= len(k))):
                raise ValueError(f"List head {list_head}, block {block}: pages must ascend and lie within {len(k)} keys: {pages}.")
            if not pairs:
                continue
            rows = torch.arange(block * PAGE_TOKENS, min((block + 1) * PAGE_TOKENS, num_rows))
            parts, columns = [], []
            for page, variant in pairs:
                q = q_variants[variant]
                if q is None:
                    raise ValueError(f"List head {list_head}, block {block}: page {page} needs query variant {variant}, which is missing.")
                keys = torch.arange(page * PAGE_TOKENS, min((page + 1) * PAGE_TOKENS, len(k)))
                factor = None if logit_factor is None else logit_factor[rows]
                logits = _logits(q[rows][:, heads], k[keys][:, kv_heads], scale, factor)
                parts.append(logits.masked_fill(~_visible(first_position + rows, keys, window, causal=True), -torch.inf))
                columns.append(keys)
            attended = _softmax(torch.cat(parts, dim=-1), v[torch.cat(columns)][:, kv_heads])
            out[rows[:, None], heads] = attended.out
            lse[rows[:, None], heads] = attended.lse
    return Attended(out, lse)


def page_means(x: torch.Tensor) -> torch.Tensor:
    """Mean key or value of every full page: [S, G, D] -> float64 [S // 64, G, D]."""
    full = len(x) // PAGE_TOKENS
    return x[: full * PAGE_TOKENS].double().view(full, PAGE_TOKENS, *x.shape[1:]).mean(dim=1)


def page_energies(
    q_variants: Sequence[torch.Tensor | None],
    k: torch.Tensor,
    *,
    first_position: int,
    scale: float,
    span_pages: int | None,
    sample_rows: int,
    logit_factor: torch.Tensor | None = None,
    bounds: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Estimated attention mass of every page before a query block's own, float64 [H, blocks, pages]; rows sum to 1, or are 0 for page 0.

    q_variants and k as in ``block_attention``. Rows of block b are sampled evenly, min(sample_rows, rows) of them, the last one among them;
    each takes a softmax over its logits with the mean keys, and the mean over rows is the estimate. bounds: largest and smallest keys of pages,
    [pages, G, D] each; the estimate is then by the largest logit that such keys allow (Quest, 2406.10774).
    """
    first = next(q for q in q_variants if q is not None)
    num_rows, num_heads, _ = first.shape
    first_block, num_blocks = first_position // PAGE_TOKENS, -(-num_rows // PAGE_TOKENS)
    means = page_means(k)
    energies = torch.zeros((num_heads, num_blocks, first_block + num_blocks), dtype=torch.float64)
    for block in range(num_blocks):
        count = first_block + block
        if not count:
            continue
        in_block = min(PAGE_TOKENS, num_rows - block * PAGE_TOKENS)
        samples = min(sample_rows, in_block)
        rows = torch.tensor([block * PAGE_TOKENS + in_block * (i + 1) // samples - 1 for i in range(samples)])
        factor = None if logit_factor is None else logit_factor[rows]
        parts = []
        for page in range(count):
            variant = 0 if span_pages is None else min(count // span_pages - page // span_pages, 2)
            q = q_variants[variant]
            if q is None:
                raise ValueError(f"page {page} needs query variant {variant}, which is missing.")
            if bounds is None:
                parts.append(_logits(q[rows], means[page : page + 1], scale, factor))
            else:
                high, low = (keys[page : page + 1] for keys in bounds)
                parts.append(_logits(q[rows].clamp_min(0), high, scale, factor) + _logits(q[rows].clamp_max(0), low, scale, factor))
        energies[:, block, :count] = torch.cat(parts, dim=-1).softmax(dim=-1).mean(dim=1)
    return energies


def _logits(q: torch.Tensor, k: torch.Tensor, scale: float, logit_factor: torch.Tensor | None) -> torch.Tensor:
    """q [T, H, D], k [S, G, D] -> float64 [H, T, S]."""
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = torch.einsum("thd,shd->hts", q.double(), keys) * scale
    return logits if logit_factor is None else logits * logit_factor.double()[:, None]


def _visible(q_positions: torch.Tensor, k_positions: torch.Tensor, window: int | None, causal: bool) -> torch.Tensor:
    """bool [T, S]."""
    distances = q_positions[:, None] - k_positions
    visible = torch.ones_like(distances, dtype=torch.bool)
    if causal:
        visible &= distances >= 0
    if window is not None:
        visible &= distances < window
    return visible


def _softmax(logits: torch.Tensor, v: torch.Tensor) -> Attended:
    """logits float64 [H, T, S] with -inf where nothing is seen, v [S, G, D]."""
    lse = logits.logsumexp(dim=-1)
    weights = torch.where(lse[..., None] == -torch.inf, 0.0, (logits - lse[..., None]).exp())
    values = v.double().repeat_interleave(logits.shape[0] // v.shape[1], dim=1)
    return Attended(torch.einsum("hts,shd->thd", weights, values), lse.T.contiguous())


def _dca_variants(q_positions: torch.Tensor, k_positions: torch.Tensor, dual_chunk: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """(variant of each pair, int64 [T, S]; the position that each variant rotates a query to, int64 [T, 3])."""
    chunk_size = dual_chunk.chunk_size
    span = chunk_size - dual_chunk.local_size
    variants = (q_positions[:, None] // span - k_positions // span).clamp(0, 2)
    inside = q_positions % span
    inter = torch.full_like(inside, min(2 * span - 1, chunk_size))
    return variants, torch.stack((inside, (inside + span).clamp_max(chunk_size), inter), dim=1)
