"""Attention of one chunk: positions -> rotations, temperature and dense block lists, shared by all layers; then per layer store, select and
attend.

Without Dual Chunk Attention there is one rotation, by position. With it, keys are rotated once by ``position mod L`` and a query has up to
three rotations; which one a key page takes depends on the span distance alone (see ``blocks``). A chunk inside the first span is plain RoPE,
bit for bit. The temperature is a function of the query's own position and multiplies logits, never keys, so that a cached prefix is what a
cold run computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zen_turbo import kernels
from zen_turbo.attention import blocks, dca
from zen_turbo.attention.blocks import Chunk
from zen_turbo.attention.dca import DualChunk
from zen_turbo.attention.decode import OBSERVED_ROWS, SparseDecode
from zen_turbo.attention.fidelity import Fidelity
from zen_turbo.attention.rope import RotaryEmbedding
from zen_turbo.config import PAGE_TOKENS
from zen_turbo.kernels import Angles, BlockLists, PageView, Queries, Rotations


@dataclass(frozen=True)
class ChunkPlan:
    """What all layers of one chunk share. ``angles`` has None for a variant that no row of the chunk needs."""

    first_position: int
    num_rows: int
    angles: Rotations
    logit_factor: torch.Tensor | None
    lists: BlockLists
    density: float

    @property
    def num_variants(self) -> int:
        return sum(angle is not None for angle in self.angles)

    @property
    def causal_pairs(self) -> int:
        """(query block, key page) pairs of one head."""
        first = self.first_position // PAGE_TOKENS
        return sum(range(first + 1, first + blocks.num_blocks(self.num_rows) + 1))

    def sparse_blocks(self, fidelity: Fidelity) -> range:
        """The query blocks of this chunk that may leave pages out."""
        count = blocks.num_blocks(self.num_rows)
        begin, end = ((at - self.first_position) // PAGE_TOKENS for at in (fidelity.dense_below, fidelity.dense_from))
        return range(min(max(begin, 0), count), min(max(end, 0), count))

    def is_sparse(self, fidelity: Fidelity) -> bool:
        return self.num_rows > 1 and (bool(self.sparse_blocks(fidelity)) or fidelity.bounds_end(self.first_position, self.num_rows))


class Attention:
    """The attention geometry of one model: heads, rotation, window, Dual Chunk Attention and temperature.

    head_dim, scale and the window are per model; ``window`` is None or the sliding window in tokens of the layers that have one.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        rotary: RotaryEmbedding,
        dual_chunk: DualChunk | None,
        trained_window: int,
        temperature: bool,
        scale: float | None = None,
    ) -> None:
        self.num_heads = num_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.rotary = rotary
        self.dual_chunk = dual_chunk
        self.trained_window = trained_window
        self.temperature = temperature
        self.scale = head_dim**-0.5 if scale is None else scale
        self.span_pages = dual_chunk.span // PAGE_TOKENS if dual_chunk else None

    def plan(self, first_position: int, num_rows: int, *, rope_seq_len: int | None = None) -> ChunkPlan:
        """Plan rows at positions first_position and on. ``rope_seq_len`` is the prompt's length, which dynamic RoPE depends on."""
        positions = torch.arange(first_position, first_position + num_rows, dtype=torch.int64)
        lists = self.dense_lists(first_position, num_rows)
        return ChunkPlan(
            first_position,
            num_rows,
            self._angles(positions, rope_seq_len),
            self._logit_factor(positions),
            lists,
            blocks.density(lists, first_position=first_position, num_rows=num_rows),
        )

    def rotation(self, position: int, *, rope_seq_len: int | None = None) -> tuple[Rotations, torch.Tensor | None]:
        """Angles and temperature of a single row, as ``plan`` has them."""
        positions = torch.tensor([position])
        return self._angles(positions, rope_seq_len), self._logit_factor(positions)

    def _angles(self, positions: torch.Tensor, rope_seq_len: int | None) -> Rotations:
        def rotate(at: torch.Tensor) -> Angles:
            return Angles(*self.rotary.cos_sin(at, seq_len=rope_seq_len))

        if self.dual_chunk is None:
            return rotate(positions), None, None
        variants = dca.query_positions(positions, self.dual_chunk)
        last_span = int(positions[-1]) // self.dual_chunk.span
        return (
            rotate(variants.intra),
            rotate(variants.succ) if last_span >= 1 else None,
            rotate(variants.inter[:1]) if last_span >= 2 else None,  # one position for every query
        )

    def _logit_factor(self, positions: torch.Tensor) -> torch.Tensor | None:
        if not self.temperature or int(positions[-1]) < self.trained_window:
            return None
        return dca.temperature(positions, self.trained_window)

    def run(
        self,
        plan: ChunkPlan,
        qkv: torch.Tensor,
        kv: PageView,
        *,
        rotate: bool = True,
        window: int | None = None,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        norm_eps: float = 0.0,
    ) -> torch.Tensor:
        """Store the chunk's keys and values, then attend. qkv: [rows, (heads + 2 kv_heads) * head_dim] -> [rows, heads * head_dim]."""
        queries = self.store(plan, qkv, kv, rotate=rotate, q_norm=q_norm, k_norm=k_norm, norm_eps=norm_eps)
        kv = kv._replace(stored_tokens=plan.first_position + plan.num_rows)
        return self.attend(plan, queries, kv, self.select(plan, queries, kv, window=window), window=window)

    def store(
        self,
        plan: ChunkPlan,
        qkv: torch.Tensor,
        kv: PageView,
        *,
        rotate: bool = True,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        norm_eps: float = 0.0,
    ) -> Queries:
        """Pack the chunk's keys and values into pages; return the query variants, each [rows, heads, head_dim]."""
        shape = (plan.num_rows, self.num_heads, self.head_dim)
        first, second, third = (qkv.new_empty(shape) if angle is not None else None for angle in plan.angles)
        queries = (first, second, third)
        kernels.store(
            qkv,
            queries,
            plan.angles if rotate else (None, None, None),
            kv,
            first_position=plan.first_position,
            num_heads=self.num_heads,
            q_norm=q_norm,
            k_norm=k_norm,
            norm_eps=norm_eps,
        )
        return queries

    def select(
        self,
        plan: ChunkPlan,
        queries: Queries,
        kv: PageView,
        *,
        window: int | None = None,
        layer: int = 0,
        fidelity: Fidelity | None = None,
    ) -> BlockLists:
        """The pages that each query block of this layer reads. Without ``fidelity``, in a layer with a window, and for a single row: all."""
        if window is not None:
            if plan.first_position + plan.num_rows <= window:
                return plan.lists
            return self.dense_lists(plan.first_position, plan.num_rows, window)
        if fidelity is None or not plan.is_sparse(fidelity):
            return plan.lists
        return fidelity.select(self._chunk(plan, queries, kv, plan.sparse_blocks(fidelity)), layer)

    def _chunk(self, plan: ChunkPlan, queries: Queries, kv: PageView, sparse_blocks: range, *, first_row: int = 0) -> Chunk:
        """Rows ``first_row`` and on of a planned chunk, as policies see them."""
        first, second, third = (query[first_row:] if query is not None else None for query in queries)
        return Chunk(
            queries=(first, second, third),
            kv=kv,
            first_position=plan.first_position + first_row,
            scale=self.scale,
            span_pages=self.span_pages,
            logit_factor=plan.logit_factor[first_row:] if plan.logit_factor is not None else None,
            sparse_blocks=sparse_blocks,
        )

    def select_for_token(self, plan: ChunkPlan, queries: Queries, kv: PageView, decode: SparseDecode, layer: int) -> BlockLists:
        """The pages that the one row of ``plan`` reads in this layer."""
        if not decode.is_sparse(plan.first_position):
            return plan.lists
        return decode.select(self._chunk(plan, queries, kv, range(1)), layer)

    def show_prompt_end(self, plan: ChunkPlan, queries: Queries, kv: PageView, decode: SparseDecode, layer: int) -> None:
        """Let ``decode`` see the last rows of a prompt that ends with this chunk."""
        first_row = max(0, plan.num_rows - OBSERVED_ROWS) // PAGE_TOKENS * PAGE_TOKENS
        decode.observe_prompt(self._chunk(plan, queries, kv, range(0), first_row=first_row), layer)

    def dense_lists(self, first_position: int, num_rows: int, window: int | None = None) -> BlockLists:
        """Every page that these rows may read, in one list for all heads."""
        return blocks.dense_lists(
            first_position=first_position, num_rows=num_rows, num_heads=self.num_heads, span_pages=self.span_pages, window=window
        )

    def attend(
        self,
        plan: ChunkPlan,
        queries: Queries,
        kv: PageView,
        lists: BlockLists,
        *,
        window: int | None = None,
        lse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention over the listed pages -> [rows, heads * head_dim]. lse: float32 [heads, rows], filled if given."""
        first = queries[0]
        assert first is not None
        out = torch.empty_like(first)
        settings = {"scale": self.scale, "window": window, "logit_factor": plan.logit_factor, "lse": lse}
        if plan.num_rows == 1:
            kernels.decode(queries, kv, lists, out, first_position=plan.first_position, **settings)
        else:
            kernels.attend(queries, kv, lists, out, first_position=plan.first_position, **settings)
        return out.view(plan.num_rows, -1)

    def full_row(self, plan: ChunkPlan, queries: Queries, kv: PageView, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One row over all its keys: (output [heads, head_dim], log-sum-exp float32 [heads]). Cost: every key and value read once."""
        position = plan.first_position + row
        first, second, third = (query[row : row + 1] if query is not None else None for query in queries)
        assert first is not None
        lse = torch.empty((self.num_heads, 1))
        factor = plan.logit_factor[row : row + 1] if plan.logit_factor is not None else None
        lists, out = self.dense_lists(position, 1), torch.empty_like(first)
        kernels.decode((first, second, third), kv, lists, out, first_position=position, scale=self.scale, logit_factor=factor, lse=lse)
        return out[0], lse[:, 0]
