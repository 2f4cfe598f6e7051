"""One sequence while it is answered: from token to token, natively where what selects for it allows that (``kernels/tokens.py``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from zen_turbo.attention.attend import Attention
from zen_turbo.attention.decode import SparseDecode
from zen_turbo.config import PAGE_TOKENS
from zen_turbo.kernels import BlockLists, PageView, TokenLayer, TokenScratch, TokenSequence


class Answer:
    """pages: gives those of a layer; decode: selects for its tokens, None reads everything; rope_seq_len: the prompt's length, for dynamic RoPE."""

    def __init__(self, pages: Callable[[int], PageView], decode: SparseDecode | None = None, *, rope_seq_len: int | None = None) -> None:
        self.pages = pages
        self.decode = decode
        self.rope_seq_len = rope_seq_len
        self.sequence: TokenSequence | None = None
        self.dense: BlockLists | None = None  # every page up to the newest token's, if they were needed
        self.sampled: tuple[int, torch.Tensor, torch.Tensor] | None = None


class TokenAttention:
    """The attention of all layers for tokens of answers. layers: none of them has a window."""

    def __init__(self, attention: Attention, layers: Sequence[TokenLayer], *, dtype: torch.dtype) -> None:
        self._attention, self._layers = attention, layers
        self._scratch = TokenScratch(
            variants=3 if attention.dual_chunk else 1,
            num_heads=attention.num_heads,
            kv_heads=attention.num_key_value_heads,
            head_dim=attention.head_dim,
            dtype=dtype,
        )

    @staticmethod
    def serves(answer: Answer) -> bool:
        return answer.decode is None or answer.decode.selects_by_mass

    def begin(self, answer: Answer, position: int) -> TokenSequence:
        """What the token at ``position`` needs in all layers. ``end`` it when it is through."""
        attention, decode = self._attention, answer.decode
        sparse = decode is not None and decode.is_sparse(position)
        sample = decode.sampled_layer(position) if decode is not None and sparse else None
        answer.sampled = None if sample is None else (sample, torch.empty(attention.num_heads), torch.empty(attention.num_heads))
        sequence = answer.sequence
        if sequence is None or not sequence.serves(answer.pages(0), sparse=sparse):
            sequence = answer.sequence = self._sequence(answer, position, sparse=sparse)
        dense = self._dense(answer, position) if not sparse or sample is not None else None
        angles, logit_factor = attention.rotation(position, rope_seq_len=answer.rope_seq_len)
        every = decode.settings.select_every if decode is not None and sparse else 0
        sequence.begin(position, angles, logit_factor, dense=dense, select_every=every, sample=answer.sampled)
        return sequence

    def _dense(self, answer: Answer, position: int) -> BlockLists:
        if answer.dense is None or answer.dense.last_page != position // PAGE_TOKENS:
            answer.dense = self._attention.dense_lists(position, 1)
        return answer.dense

    def _sequence(self, answer: Answer, position: int, *, sparse: bool) -> TokenSequence:
        attention, decode = self._attention, answer.decode
        return TokenSequence(
            [answer.pages(layer) for layer in range(len(self._layers))],
            self._layers,
            self._scratch,
            self._dense(answer, position),
            position=position,
            scale=attention.scale,
            span_pages=attention.span_pages,
            selection=decode.selection(attention.num_key_value_heads, self._scratch.out.dtype) if decode is not None and sparse else None,
            after=answer.sequence,
        )

    @staticmethod
    def end(answer: Answer) -> None:
        if answer.sampled is not None and answer.decode is not None:
            _, kept, full = answer.sampled
            answer.decode.observe(lse_kept=kept, lse_full=full)
