"""The decoder: reads prompts packed, writes one token a step in each slot, refills the slots.

On a GPU one step is captured as a CUDA graph. The number of slots never changes while a decoder
lives, and a prompt's products always have the same number of rows: so every product is the same
kernel each time, and an answer is the same bit by bit, whoever is asked beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from qwen3ft.decoding.attention import PlainAttention, SlotAttention
from qwen3ft.decoding.block import DecoderBlock, PackedTexts
from qwen3ft.decoding.cache import PagedCache
from qwen3ft.decoding.projections import BASE, Scratch, Switch
from qwen3ft.decoding.reading import PackedReading
from qwen3ft.decoding.slots import SlotTable
from qwen3ft.decoding.writing import Marks
from qwen3ft.planning.decoder_sizes import DecoderSizes
from qwen3ft.training.fused import element_wise
from qwen3ft.training.fused.attention import Segments

_Result = TypeVar("_Result")


def slot_attention(device: str) -> SlotAttention:
    """Return Triton's kernels for 'cuda', plain torch for 'cpu'."""
    if device == "cuda":
        from qwen3ft.decoding.kernels import TritonAttention

        return TritonAttention()
    return PlainAttention(element_wise(device))


class Decoder:
    """Weights, cache and slots of `model`, and the computations on them.

    Args:
        model: A 4-bit `Qwen3ForCausalLM`, or a PEFT model over one.
        names: Adapters between which questions choose, by their number.
        sizes: Extent of cache and slots.
        marks: Token ids that steer the writing.
        most_draws: Most tokens of a drawn answer, 0 if none is drawn.
        shaped: Draws heed temperature and top-p.
    """

    def __init__(
        self,
        model: Any,
        names: Sequence[str],
        sizes: DecoderSizes,
        marks: Marks,
        most_draws: int = 0,
        *,
        shaped: bool = False,
    ) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.sizes = sizes
        self.embedding, self.head = base.model.embed_tokens.weight, base.lm_head.weight
        self.norm, self._rotary = base.model.norm, base.model.rotary_emb
        device = self.embedding.device
        self.device = device
        self.ops, attention = element_wise(device.type), slot_attention(device.type)
        scratch = Scratch()
        self.blocks = [
            DecoderBlock(block, names, self.ops, attention, scratch) for block in base.model.layers
        ]
        for block in self.blocks[: sizes.resident_blocks]:
            for projection in block.projections:
                projection.keep_resident()
        self.switch = Switch([each for block in self.blocks for each in block.projections])
        first = self.blocks[0]
        with torch.no_grad():
            self.cache = PagedCache(
                len(self.blocks), sizes.pages, first.key_heads, first.head_dim, self.embedding
            )
            self.table = SlotTable(
                sizes.slots,
                sizes.most_tokens,
                marks,
                most_draws,
                self._rotation(max(sizes.most_tokens, sizes.chunk_tokens)),
                shaped=shaped,
            )
        self._logits: Tensor | None = None
        self._reading = PackedReading.of([[0]], [BASE], None, sizes.chunk_tokens).to(device)
        self._read: Callable[[], Tensor] | None = None
        self._step: Callable[[], None] = self._compute_logits
        self._choices: dict[bool, Callable[[], None]] = {}

    def _rotation(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin of each position, fp32, (tokens, head_dim / 2) each."""
        positions = torch.arange(tokens, device=self.device)[None]
        half = self._rotary.inv_freq.numel()
        # transformers takes only device and dtype of the first argument; both halves are the same
        cos, sin = self._rotary(self.norm.weight.float(), positions)
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    @torch.no_grad()
    def replace(self, index: int, name: str) -> None:
        """Copy the model's adapter `name` over the one with number `index`, which answers nothing.

        Its rank may not pass that of the adapter which the decoder was made with.
        """
        for block in self.blocks:
            for projection in block.projections:
                projection.replace(index, name)

    @torch.no_grad()
    def hidden(
        self,
        texts: Sequence[Sequence[int]],
        models: Sequence[int],
        places: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Return the last hidden states of packed texts, before the norm, (tokens, hidden).

        They are valid until the next call. All texts together should fill a chunk, or be one.

        Args:
            texts: Token ids; at most `READ_TEXTS`.
            models: Number of each text's adapter.
            places: Where the cache keeps each text's tokens; None to keep nothing.
        """
        reading = PackedReading.of(texts, models, places, self.sizes.chunk_tokens)
        if self._read is not None and len(reading.ids) == self.sizes.chunk_tokens:
            self._reading.copy_(reading)
            hidden = self._read()
        else:
            hidden = self._compute_hidden(reading.to(self.device))
        return hidden[: sum(map(len, texts))]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return the fp32 logits of hidden states, (rows, vocabulary)."""
        normed = torch.empty_like(hidden)
        self.ops.rms_norm(hidden, self.norm.weight, self.norm.variance_epsilon, normed)
        if normed.is_cuda and normed.dtype != torch.float32:
            wide: Tensor = torch.mm(normed, self.head.t(), out_dtype=torch.float32)
            return wide
        return torch.mm(normed, self.head.t()).float()

    @torch.no_grad()
    def step(self, *, draw: bool) -> None:
        """Write one token in every slot; the tokens are in `table.token`."""
        self._step()
        choose = self._choices.get(draw)
        if choose is None:
            self._choose(draw)
        else:
            choose()

    @torch.no_grad()
    def capture(self, *, draw: bool) -> None:
        """Capture reading and the step as CUDA graphs; call it while all slots are idle."""
        if self.device.type != "cuda":
            return
        # once as they are: that compiles kernels and makes the workspaces
        self.step(draw=draw)
        self._compute_hidden(self._reading)
        pool = torch.cuda.graph_pool_handle()
        self._read = _captured(lambda: self._compute_hidden(self._reading), pool)
        self._step = _captured(self._compute_logits, pool)
        for drawn in {False, draw}:
            self._choices[drawn] = _captured(partial(self._choose, drawn), pool)

    def _compute_hidden(self, reading: PackedReading) -> Tensor:
        chunk, tokens = self.sizes.chunk_tokens, len(reading.ids)
        rotation = self.table.rotation
        if tokens > len(rotation[0]):  # a text that is only read may be longer than any answer
            rotation = self._rotation(tokens)
        cos, sin = (table[reading.positions] for table in rotation)
        texts = PackedTexts(
            # The length of the longest only sizes the launch; no kernel may depend on it.
            Segments(reading.bounds, tokens, reading.host_bounds),
            cos,
            sin,
            [self.switch.masks(models) for models in reading.models.view(-1, chunk)],
            chunk,
            reading.places,
        )
        x = torch.nn.functional.embedding(reading.ids, self.embedding)
        for index, block in enumerate(self.blocks):
            block.packed(x, texts, self.cache, index)
        return x

    def _compute_logits(self) -> None:
        table = self.table
        slots, foreign = table.now(), self.switch.masks(table.model)
        x = torch.nn.functional.embedding(table.token, self.embedding)
        for index, block in enumerate(self.blocks):
            keys, values = self.cache.keys[index], self.cache.values[index]
            block.step(x, slots, foreign, keys, values)
        self._logits = self.logits(x)

    def _choose(self, draw: bool) -> None:
        assert self._logits is not None
        table = self.table
        token = table.writing.choose(self._logits, draw=draw)
        table.token.copy_(token)
        table.position += (~table.writing.state["ended"]).int()


def _captured(compute: Callable[[], _Result], pool: Any) -> Callable[[], _Result]:
    """Return a replay of `compute`; it gives back the tensors of the capture, overwritten."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = compute()

    def replay() -> _Result:
        graph.replay()
        return result

    return replay
