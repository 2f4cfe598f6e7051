"""One decoder for the dense Llama, Qwen2, Qwen3, SmolLM and Mistral families.

A transformer block reads as its formula:

    x = norm(residual)              QKV = x Wqkv          pages <- K, V     a = attend(Q, pages)
    residual += a Wo                x = norm(residual)    residual += (silu(x Wgate) * (x Wup)) Wdown

The residual stream is fp32 and everything else has the engine's dtype. Q, K and V are one matrix, gate and up are one matrix. Families
differ by flags of ModelConfig (biases, QK norm, window, layers without rotation), not by code.

Shape legend: T rows of the chunk, H hidden size, I intermediate size, V vocabulary.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from zen_turbo import kernels
from zen_turbo.attention import dca
from zen_turbo.attention.answer import Answer, TokenAttention
from zen_turbo.attention.attend import Attention, ChunkPlan
from zen_turbo.attention.blocks import pages_read
from zen_turbo.attention.dca import DualChunk
from zen_turbo.attention.decode import SparseDecode
from zen_turbo.attention.fidelity import Fidelity, Observation
from zen_turbo.attention.rope import RotaryEmbedding
from zen_turbo.config import FAR_TOKENS, PAGE_TOKENS, EngineConfig
from zen_turbo.errors import UnsupportedModelError
from zen_turbo.kernels import LayerWeights, PageView, Queries, TokenBatch, TokenLayer
from zen_turbo.models.config import ModelConfig
from zen_turbo.models.linear import LINEARS, TILE_ROWS, KernelLinear, Kinds, Linear, head_linear, linear_arithmetic
from zen_turbo.models.loader import Checkpoint

# Rows of logits that are looked at together: 40 MB with a vocabulary of 150,000.
LOGITS_TILE_ROWS = 64
TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class LayerPages(Protocol):
    """Gives the pages of one layer as the kernels read them."""

    def __call__(self, layer: int) -> PageView: ...


@dataclass
class Timers:
    """Wall seconds since the last reset: linear layers, attention kernel, block selection with the sampling of its recall."""

    linear_s: float = 0.0
    attend_s: float = 0.0
    select_s: float = 0.0


@dataclass
class ChunkRun:
    """A chunk on its way through the layers. residual: f32 [T, H]; delta: the last layer's MLP output, not added yet."""

    plan: ChunkPlan
    pages: LayerPages
    residual: torch.Tensor
    delta: torch.Tensor | None
    fidelity: Fidelity | None
    decode: SparseDecode | None
    timers: Timers
    next_layer: int = 0


class TokenRow(NamedTuple):
    """The next token of one sequence, at ``position``."""

    token_id: int
    position: int
    answer: Answer


class _Linears(NamedTuple):
    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class _Layer:
    """far: the linears of a prompt's tokens from FAR_TOKENS on; near: those of all others."""

    input_norm: torch.Tensor
    near: _Linears
    far: _Linears
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    post_norm: torch.Tensor
    window: int | None
    rotate: bool


class Decoder:
    """Weights and forward pass of one model.

    Raises UnsupportedModelError for a head_dim without a kernel and ConfigurationError for an impossible Dual Chunk Attention geometry.
    """

    def __init__(self, checkpoint: Checkpoint, engine_config: EngineConfig, *, on_layer: Callable[[int, int], None] | None = None) -> None:
        config = checkpoint.config
        if config.head_dim not in kernels.HEAD_DIMS:
            supported = ", ".join(map(str, kernels.HEAD_DIMS))
            raise UnsupportedModelError(f"head_dim {config.head_dim} is not supported (only {supported}).")
        self.config = config
        self.dtype = TORCH_DTYPES[engine_config.dtype]
        self.dual_chunk = dual_chunk_of(config, engine_config)
        self.attention = Attention(
            num_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rotary=RotaryEmbedding(config.rope, config.head_dim),
            dual_chunk=self.dual_chunk,
            trained_window=trained_window(config),
            temperature=engine_config.attention_temperature and self.dual_chunk is not None,
        )
        self.timers = Timers()
        self._embedding = checkpoint.tensor("model.embed_tokens.weight", self.dtype)  # [V, H]
        self._layers = []
        kinds = LINEARS[linear_arithmetic(engine_config)]
        longest = engine_config.max_model_len or (math.inf if self.dual_chunk else trained_window(config))
        if longest <= FAR_TOKENS:
            kinds = Kinds(kinds.near, kinds.near)
        for index in range(config.num_hidden_layers):
            self._layers.append(_load_layer(checkpoint, index, self.dtype, kinds))
            if on_layer:
                on_layer(index + 1, config.num_hidden_layers)
        self._norm = checkpoint.tensor("model.norm.weight", torch.float32)
        head = self._embedding if config.tie_word_embeddings else checkpoint.tensor("lm_head.weight", self.dtype)
        self._head = head_linear(head)
        self._token_attention = self._prepare_tokens()
        self._layer_weights = self._prepare_layers()
        self._batches: dict[int, TokenBatch] = {}  # by rows
        self._uses_onednn = self._layer_weights is None or not isinstance(self._head, KernelLinear)

    def _prepare_tokens(self) -> TokenAttention | None:
        """What attends to the tokens of answers natively, None where a layer has a window."""
        if any(layer.window is not None for layer in self._layers):
            return None
        layers = [TokenLayer(layer.rotate, layer.q_norm, layer.k_norm, self.config.rms_norm_eps) for layer in self._layers]
        return TokenAttention(self.attention, layers, dtype=self.dtype)

    def _prepare_layers(self) -> list[LayerWeights] | None:
        """The layers as one native call multiplies them, None where they are not our own kernels'."""
        found = []
        for layer in self._layers:
            linears = [linear.weights for linear in layer.near if isinstance(linear, KernelLinear)]
            if len(linears) < 4:
                return None
            qkv, out, gate_up, down = linears
            found.append(LayerWeights(layer.input_norm, qkv, out, layer.post_norm, gate_up, down))
        return found

    @property
    def linear_flops_per_token(self) -> int:
        """FLOP of the linear layers for one prompt token (the output head runs once per prompt and is not counted)."""
        return sum(linear.flops_per_row for layer in self._layers for linear in layer.near)

    def linear_shapes(self) -> list[tuple[int, int]]:
        """(in_features, out_features) of one layer's linears, for measuring the GEMM rate on this model's shapes."""
        return [(linear.in_features, linear.out_features) for linear in self._layers[0].near]

    def begin(
        self,
        token_ids: torch.Tensor,
        pages: LayerPages,
        *,
        first_position: int,
        rope_seq_len: int | None = None,
        fidelity: Fidelity | None = None,
        decode: SparseDecode | None = None,
        timers: Timers | None = None,
    ) -> ChunkRun:
        """Begin one chunk (int64 [T]) whose keys and values go to positions first_position and on. ``fidelity`` makes the prefill sparse;
        without it everything is read. ``decode``: what will select for the answer, where this chunk ends the prompt and it may learn from it."""
        plan = self.attention.plan(first_position, len(token_ids), rope_seq_len=rope_seq_len)
        if fidelity is not None:
            fidelity.begin_chunk(first_position)
        residual = self._embedding[token_ids].float()  # [T, H]
        return ChunkRun(plan, pages, residual, None, fidelity, decode, timers or Timers())

    @torch.inference_mode()
    def advance(self, run: ChunkRun) -> bool:
        """Compute the chunk's next layer; whether layers are left. What is written before the last one lies beyond the sequence's committed
        length and is never read, so a run may be given up between layers, and any other may come between."""
        index = run.next_layer
        self.timers = run.timers

        def attend(qkv: torch.Tensor) -> torch.Tensor:
            queries, kv = self._store(index, run.plan, qkv, run.pages(index))
            return self._attend_chunk(index, run, queries, kv)

        run.delta = self._layer(index, run.residual, run.delta, attend, near_rows=max(0, FAR_TOKENS - run.plan.first_position))
        run.next_layer += 1
        return run.next_layer < len(self._layers)

    @torch.inference_mode()
    def logits(self, run: ChunkRun, rows: slice) -> torch.Tensor:
        """Logits of some rows of a chunk that is through all layers, f32 [rows, V]."""
        assert run.delta is not None and run.next_layer == len(self._layers)
        self.timers = run.timers
        return self._logits(run.residual[rows].contiguous(), run.delta[rows].contiguous())

    @torch.inference_mode()
    def each_logits(self, run: ChunkRun, see: Callable[[int, torch.Tensor], None]) -> None:
        """Show the logits of all rows of such a chunk, a tile at a time: the position of the tile's first row, and f32 [tile, V]."""
        assert run.delta is not None and run.next_layer == len(self._layers)
        for tile in _tiles(0, run.plan.num_rows, size=LOGITS_TILE_ROWS):
            # A copy, because the norm adds delta to the residual in place.
            see(run.plan.first_position + tile.start, self._logits(run.residual[tile].clone(), run.delta[tile]))

    def forward(
        self, token_ids: torch.Tensor, pages: LayerPages, *, logits_rows: slice | None = None, **settings: Any
    ) -> tuple[torch.Tensor | None, ChunkPlan]:
        """A whole chunk at once; settings as for ``begin``. Returns (logits f32 [rows, V] of ``logits_rows``, or None; the plan used)."""
        run = self.begin(token_ids, pages, **settings)
        while self.advance(run):
            pass
        return (None if logits_rows is None else self.logits(run, logits_rows)), run.plan

    @torch.inference_mode()
    def decode_tokens(self, tokens: Sequence[TokenRow]) -> torch.Tensor:
        """One token of each of several sequences, stored and answered: logits, f32 [tokens, V].

        The linear layers, whose weights a token mostly waits for, run for all of them at once; each attends to its own pages. A row gives the
        same bits whoever shares its batch, so with oneDNN, which computes a single row in another order, there are never fewer than two.
        """
        self.timers = Timers()
        ids = [token.token_id for token in tokens]
        residual = self._embedding[torch.tensor(ids * 2 if len(ids) == 1 and self._uses_onednn else ids)].float()
        natively = self._token_attention is not None and all(self._token_attention.serves(token.answer) for token in tokens)
        through = self._tokens_natively if natively else self._tokens_by_call
        residual, delta = through(tokens, residual)
        return self._logits(residual, delta)[: len(tokens)]

    def _tokens_natively(self, tokens: Sequence[TokenRow], residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All layers in one call, or where oneDNN multiplies the attention of each in one. residual f32 [T, H] -> (residual, delta not added yet)."""
        attention = self._token_attention
        assert attention is not None
        sequences = [attention.begin(token.answer, token.position) for token in tokens]
        if self._layer_weights is not None:
            batch = self._batches.get(len(residual))
            if batch is None:
                batch = TokenBatch(self._layer_weights, rows=len(residual), dtype=self.dtype, eps=self.config.rms_norm_eps)
                self._batches[len(residual)] = batch
            batch.residual.copy_(residual)
            batch.run(sequences)
            residual, delta = batch.residual, batch.delta
        else:

            def attend(index: int, qkv: torch.Tensor) -> torch.Tensor:
                attended = qkv.new_zeros((len(qkv), self.config.num_attention_heads * self.config.head_dim))
                kernels.attend_tokens(sequences, index, qkv, attended)
                return attended

            delta = self._through_layers(residual, attend)
        for token in tokens:
            attention.end(token.answer)
        return residual, delta

    def _tokens_by_call(self, tokens: Sequence[TokenRow], residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, every kernel by a call of its own: for layers with a window, and for what selects in Python."""
        plans = [self.attention.plan(token.position, 1, rope_seq_len=token.answer.rope_seq_len) for token in tokens]

        def attend(index: int, qkv: torch.Tensor) -> torch.Tensor:
            attended, window = qkv.new_zeros((len(qkv), self.config.num_attention_heads * self.config.head_dim)), self._layers[index].window
            for row, (token, plan) in enumerate(zip(tokens, plans, strict=True)):
                queries, kv = self._store(index, plan, qkv[row : row + 1], token.answer.pages(index))
                if token.answer.decode is None or window is not None:
                    lists = self.attention.select(plan, queries, kv, window=window)
                    attended[row : row + 1] = self.attention.attend(plan, queries, kv, lists, window=window)
                else:
                    attended[row : row + 1] = self._attend_token(index, plan, queries, kv, token.answer.decode)
            return attended

        return residual, self._through_layers(residual, attend)

    def _through_layers(self, residual: torch.Tensor, attend: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        delta: torch.Tensor | None = None
        for index in range(len(self._layers)):
            delta = self._layer(index, residual, delta, functools.partial(attend, index), near_rows=len(residual))
        assert delta is not None
        return delta

    def _layer(
        self,
        index: int,
        residual: torch.Tensor,
        delta: torch.Tensor | None,
        attend: Callable[[torch.Tensor], torch.Tensor],
        *,
        near_rows: int,
    ) -> torch.Tensor:
        """One block. residual [T, H] is updated in place; ``delta`` is the previous block's MLP output, added here. Returns this block's.
        attend: [T, (heads + 2 kv_heads) * head_dim] -> [T, heads * head_dim]; near_rows: as many rows as may be there have the near linears."""
        layer, config, rows = self._layers[index], self.config, len(residual)
        eps = config.rms_norm_eps
        near = min(rows, near_rows)
        tiles = [(tile, layer.near) for tile in _tiles(0, near)] + [(tile, layer.far) for tile in _tiles(near, rows)]
        x = residual.new_empty((min(rows, TILE_ROWS), config.hidden_size), dtype=self.dtype)
        qkv = residual.new_empty((rows, layer.near.qkv.out_features), dtype=self.dtype)
        for tile, linears in tiles:
            part = x[: tile.stop - tile.start]
            kernels.add_rms_norm(residual[tile], delta[tile] if delta is not None else None, layer.input_norm, part, eps=eps)
            qkv[tile] = self._linear(linears.qkv, part)
        attended = attend(qkv)
        out = residual.new_empty((rows, config.hidden_size), dtype=self.dtype)
        hidden = residual.new_empty((min(rows, TILE_ROWS), config.intermediate_size), dtype=self.dtype)
        for tile, linears in tiles:
            part, gated = x[: tile.stop - tile.start], hidden[: tile.stop - tile.start]
            kernels.add_rms_norm(residual[tile], self._linear(linears.out, attended[tile]), layer.post_norm, part, eps=eps)
            kernels.silu_mul(self._linear(linears.gate_up, part), gated)
            out[tile] = self._linear(linears.down, gated)
        return out

    def _store(self, index: int, plan: ChunkPlan, qkv: torch.Tensor, kv: PageView) -> tuple[Queries, PageView]:
        """Keys and values to their pages; the rotated queries, and the pages with what was stored."""
        layer = self._layers[index]
        queries = self.attention.store(
            plan, qkv, kv, rotate=layer.rotate, q_norm=layer.q_norm, k_norm=layer.k_norm, norm_eps=self.config.rms_norm_eps
        )
        return queries, kv._replace(stored_tokens=plan.first_position + plan.num_rows)

    def _attend_chunk(self, index: int, run: ChunkRun, queries: Queries, kv: PageView) -> torch.Tensor:
        attended = self._attend(index, run.plan, queries, kv, run.residual, run.fidelity)
        if run.decode is not None and self._layers[index].window is None:
            self.attention.show_prompt_end(run.plan, queries, kv, run.decode, index)
        return attended

    def _attend(
        self, index: int, plan: ChunkPlan, queries: Queries, kv: PageView, residual: torch.Tensor, fidelity: Fidelity | None
    ) -> torch.Tensor:
        """Select, attend, and where ``fidelity`` wants it measure what the selection cost."""
        window, attention = self._layers[index].window, self.attention
        start = time.perf_counter()
        lists = attention.select(plan, queries, kv, window=window, layer=index, fidelity=fidelity)
        self.timers.select_s += time.perf_counter() - start
        sparse = fidelity is not None and window is None and plan.is_sparse(fidelity)
        rows = fidelity.rows_to_sample(plan.first_position, plan.num_rows, index) if fidelity is not None and sparse else []
        lse = torch.empty((attention.num_heads, plan.num_rows)) if rows else None
        start = time.perf_counter()
        attended = attention.attend(plan, queries, kv, lists, window=window, lse=lse)
        self.timers.attend_s += time.perf_counter() - start
        if fidelity is not None and window is None:
            fidelity.observe_lists(lists, num_heads=attention.num_heads, causal_pairs=plan.causal_pairs)
        if fidelity is not None and lse is not None:
            start = time.perf_counter()
            for row in rows:
                exact, lse_full = attention.full_row(plan, queries, kv, row)
                error = self._head_errors(self._layers[index].near.out, attended[row].view_as(exact), exact, residual[row])
                pages = pages_read(lists, block=row // PAGE_TOKENS, num_blocks=-(-plan.num_rows // PAGE_TOKENS), num_heads=len(exact))
                fidelity.observe_row(
                    Observation(plan.first_position + row, index, error, pages.float()), lse_kept=lse[:, row], lse_full=lse_full
                )
            self.timers.select_s += time.perf_counter() - start
        return attended

    def _attend_token(self, index: int, plan: ChunkPlan, queries: Queries, kv: PageView, decode: SparseDecode) -> torch.Tensor:
        """One token over the pages that are selected for it, and where recall is sampled over all."""
        attention, position = self.attention, plan.first_position
        lists = attention.select_for_token(plan, queries, kv, decode, index)
        sampled = decode.is_sparse(position) and decode.sampled_layer(position) == index
        lse = torch.empty((attention.num_heads, 1)) if sampled else None
        attended = attention.attend(plan, queries, kv, lists, lse=lse)
        if lse is not None:
            _, lse_full = attention.full_row(plan, queries, kv, 0)
            decode.observe(lse_kept=lse[:, 0], lse_full=lse_full)
        return attended

    @staticmethod
    def _head_errors(out: Linear, found: torch.Tensor, exact: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """What each head's error does to the residual stream: squared norm after the output projection, relative to the exact stream, f32
        [heads]. found, exact: one row's attention output [heads, head_dim]; residual: the stream before it, f32 [H]."""
        heads, head_dim = exact.shape
        each = exact.new_zeros((heads + 1, heads, head_dim))
        each[range(heads), range(heads)] = found - exact  # row h has the error of head h alone
        each[heads] = exact
        projected = out(each.view(heads + 1, -1)).float()
        if out.has_bias:
            projected[:heads] -= out(torch.zeros_like(each[:1]).view(1, -1)).float()
        return projected[:heads].square().sum(dim=1) / (residual + projected[heads]).square().sum()

    def _linear(self, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        y = linear(x)
        self.timers.linear_s += time.perf_counter() - start
        return y

    def _logits(self, residual: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        x = torch.empty_like(delta)
        kernels.add_rms_norm(residual, delta, self._norm, x, eps=self.config.rms_norm_eps)
        return torch.cat([self._linear(self._head, x[tile]).float() for tile in _tiles(0, len(x))])


def _tiles(first: int, last: int, *, size: int = TILE_ROWS) -> list[slice]:
    return [slice(start, min(start + size, last)) for start in range(first, last, size)]


def _load_layer(checkpoint: Checkpoint, index: int, dtype: torch.dtype, kinds: Kinds) -> _Layer:
    config = checkpoint.config
    prefix = f"model.layers.{index}."

    def fused(names: tuple[str, ...], bias: bool) -> list[Linear]:
        weights = torch.cat([checkpoint.tensor(f"{prefix}{name}.weight", dtype) for name in names])
        biases = torch.cat([checkpoint.tensor(f"{prefix}{name}.bias", dtype) for name in names]) if bias else None
        near = kinds.near(weights, biases)
        return [near, near if kinds.far is kinds.near else kinds.far(weights, biases)]

    def norm(name: str) -> torch.Tensor:
        return checkpoint.tensor(f"{prefix}{name}.weight", torch.float32)

    near, far = zip(
        fused(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), config.qkv_bias),
        fused(("self_attn.o_proj",), config.o_bias),
        fused(("mlp.gate_proj", "mlp.up_proj"), config.mlp_bias),
        fused(("mlp.down_proj",), config.mlp_bias),
        strict=True,
    )
    return _Layer(
        input_norm=norm("input_layernorm"),
        near=_Linears(*near),
        far=_Linears(*far),
        q_norm=norm("self_attn.q_norm") if config.qk_norm else None,
        k_norm=norm("self_attn.k_norm") if config.qk_norm else None,
        post_norm=norm("post_attention_layernorm"),
        window=config.sliding_window if config.sliding_layers[index] else None,
        rotate=not config.no_rope_layers[index],
    )


def trained_window(config: ModelConfig) -> int:
    """Positions that the checkpoint was trained for, its own RoPE scaling included."""
    return config.dca.original_max_position_embeddings if config.dca else config.max_position_embeddings


def dual_chunk_of(config: ModelConfig, engine_config: EngineConfig) -> DualChunk | None:
    """The Dual Chunk Attention geometry: the engine's knobs, else the checkpoint's own, else chunk_size = trained window, local a quarter.

    Raises ConfigurationError where page or span do not fit; None if the context extension is off.
    """
    if engine_config.context_extension != "dca":
        return None
    window = trained_window(config)
    chunk_size, local_size = engine_config.dca_chunk_size, engine_config.dca_local_size
    if chunk_size is None and config.dca:
        chunk_size = config.dca.chunk_size
        local_size = local_size or config.dca.local_size
    if chunk_size is None and local_size is None:
        return dca.default_for(window)
    chunk_size = chunk_size or window
    return DualChunk(chunk_size=chunk_size, local_size=local_size or chunk_size // 4, trained_window=window)
