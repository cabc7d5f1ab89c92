"""Sizes of the decoder: slots, pages and dequantised blocks that a budget has room for.

More slots write more tokens a step; blocks that stay dequantised make a step shorter. Both take
memory, so the sizes are those with the most tokens per second by `step_seconds`, whose constants
were measured on one H200. On other GPUs they rank settings; they do not predict seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen3ft.planning.gpu_specs import GPU_SPECS, GpuSpec
from qwen3ft.planning.recompute import padded_rank
from qwen3ft.records.model import ModelShape
from qwen3ft.units import GIB

PAGE_TOKENS = 32
"""Tokens of an answer that a page of the cache holds."""

CHUNK_TOKENS = 1024
"""Rows of each product while prompts are read."""

SLOT_CHOICES = (*(1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128), *range(144, 257, 16))

LIVE_SHARE = 0.75
"""Tokens that an answer in progress has on average, as a share of the mean length: more than half,
since long answers are in progress for longer."""

DECODER_SLACK_BYTES = int(0.3 * GIB)
"""Workspaces of cuBLAS and of graphs, and what the allocator holds beyond what is in use."""

# seconds of a step on one H200; see `benchmarks/README.md`
_READ_SECONDS, _ROW_SECONDS, _DEQUANTISE_SECONDS = 0.70e-12, 1.1e-15, 0.8e-12  # per weight
_BLOCK_SECONDS = 70e-6  # launches and low-rank products
_BYTES_PER_SECOND = 3e12
_READ_FLOPS = 400e12  # of the products while prompts are read, dequantising included
_MEASURED = GPU_SPECS[0]


def may_decode(device: str, kernels: str) -> bool:
    """Return False if the settings alone leave the answers to transformers.

    `kernels` 'fused' asks for the decoder on a CPU too, where its plain twin is slow.
    """
    return kernels == "fused" or (kernels == "auto" and device == "cuda")


@dataclass(frozen=True)
class DecoderSizes:
    """Extent of a decoder.

    Attributes:
        slots: Answers written at a time.
        pages: Pages of the cache.
        most_tokens: Most tokens of a prompt and its answer.
        chunk_tokens: Rows of each product while prompts are read.
        resident_blocks: Blocks whose weights stay dequantised.
    """

    slots: int
    pages: int
    most_tokens: int
    chunk_tokens: int = CHUNK_TOKENS
    resident_blocks: int = 0


@dataclass(frozen=True)
class AnswerLoad:
    """Questions and the model that answers them.

    Attributes:
        shape: The model.
        ranks: Rank of each adapter.
        questions: Answers of all models together.
        prompt_tokens: Tokens of the longest prompt.
        typical_prompt_tokens: Mean tokens of a prompt.
        answer_tokens: Most tokens of an answer, with its thinking.
        typical_answer_tokens: Expected mean tokens of an answer.
        read_tokens: Tokens of the longest text whose loss is measured.
        drawn: Some answers are drawn.
        compute_bytes: Bytes of a number.
    """

    shape: ModelShape
    ranks: tuple[int, ...]
    questions: int
    prompt_tokens: int
    typical_prompt_tokens: float
    answer_tokens: int
    typical_answer_tokens: float
    read_tokens: int = 0
    drawn: bool = True
    compute_bytes: int = 2

    @property
    def most_tokens(self) -> int:
        """Most tokens of a prompt and its answer."""
        return self.prompt_tokens + self.answer_tokens

    @property
    def live_tokens(self) -> float:
        """Mean tokens in the cache of an answer in progress."""
        return self.typical_prompt_tokens + LIVE_SHARE * self.typical_answer_tokens

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in all blocks."""
        shape = self.shape
        per_token = 2 * shape.num_hidden_layers * shape.key_features * self.compute_bytes
        return PAGE_TOKENS * per_token

    def fixed_bytes(self) -> int:
        """Return the bytes that a decoder of any size takes beside the model."""
        shape, c = self.shape, self.compute_bytes
        hidden, mlp = shape.hidden_size, shape.intermediate_size
        qkv = shape.query_features + 2 * shape.key_features
        columns = padded_rank(3 * sum(self.ranks))
        largest = max(2 * mlp * (hidden + columns), hidden * (mlp + columns))
        features = qkv + shape.query_features + 2 * mlp + mlp + 4 * hidden
        copies = shape.num_hidden_layers * columns * features
        longest = max(self.prompt_tokens, self.read_tokens)
        texts = -(-longest // CHUNK_TOKENS) * CHUNK_TOKENS
        reading = texts * (2 * hidden + 3 * qkv) + CHUNK_TOKENS * (3 * mlp + 2 * hidden + columns)
        return c * (largest + copies + reading) + DECODER_SLACK_BYTES

    def slot_bytes(self) -> int:
        """Return the bytes of a slot beside its pages."""
        shape, c = self.shape, self.compute_bytes
        logits = (3 if self.drawn else 1) * 4 * shape.vocab_size
        wide = c * (4 * shape.intermediate_size + 6 * shape.hidden_size + 4 * shape.query_features)
        return logits + wide + 4 * self.answer_tokens

    def resident_bytes(self) -> int:
        """Return the bytes of a block that stays dequantised."""
        columns = padded_rank(3 * sum(self.ranks))
        numbers = sum(out * (inp + columns) for out, inp in self.shape.projection_sizes().values())
        return self.compute_bytes * numbers

    def step_seconds(self, slots: int, resident_blocks: int) -> float:
        """Estimate the time of a step on one H200."""
        shape = self.shape
        dequantised = 1 - resident_blocks / shape.num_hidden_layers
        weight = _READ_SECONDS + _ROW_SECONDS * slots + _DEQUANTISE_SECONDS * dequantised
        cache = slots * self.live_tokens * self.page_bytes / PAGE_TOKENS
        head = 2 * shape.vocab_size * shape.hidden_size + 12 * slots * shape.vocab_size
        return (
            shape.linear_parameters * weight
            + shape.num_hidden_layers * _BLOCK_SECONDS
            + (cache + head) / _BYTES_PER_SECOND
        )

    def seconds(self, sizes: DecoderSizes, gpu: GpuSpec = _MEASURED, ranks: int = 1) -> float:
        """Estimate the time of all answers, prompts included, once the decoders are ready.

        Time that memory decides is scaled by the GPU's bandwidth, that of reading by its products.
        """
        questions = -(-self.questions // ranks)  # of the rank with the most
        rounds = -(-questions // sizes.slots)
        # the last answers leave slots idle for about the time of one answer
        steps = rounds * self.typical_answer_tokens + self.answer_tokens / 2
        read = 2 * questions * self.typical_prompt_tokens  # once more for the loss
        writing = steps * self.step_seconds(sizes.slots, sizes.resident_blocks)
        reading = 2 * self.shape.linear_parameters * read / _READ_FLOPS
        return (
            writing * _MEASURED.bandwidth_gbps / gpu.bandwidth_gbps
            + reading * _MEASURED.bf16_tflops / gpu.bf16_tflops
        )

    def bytes_of(self, sizes: DecoderSizes) -> int:
        """Return the bytes that a decoder of `sizes` takes beside the model."""
        return (
            self.fixed_bytes()
            + sizes.slots * self.slot_bytes()
            + (sizes.pages + 1) * self.page_bytes
            + sizes.resident_blocks * self.resident_bytes()
        )


def choose_sizes(
    load: AnswerLoad, room_bytes: int, most_slots: int = SLOT_CHOICES[-1], *, resident: bool = True
) -> DecoderSizes | None:
    """Return the sizes that write the most tokens per second; None if no slot fits.

    Args:
        load: Questions and model.
        room_bytes: Memory beside the model and the process.
        most_slots: Limit of slots, which is a choice itself.
        resident: Let blocks stay dequantised.
    """
    longest = -(-load.most_tokens // PAGE_TOKENS)
    best: tuple[float, DecoderSizes] | None = None
    for slots in (*(slots for slots in SLOT_CHOICES if slots < most_slots), most_slots):
        if best and slots > 1.3 * load.questions:
            break
        typical = -(-int(1.1 * slots * (load.live_tokens + PAGE_TOKENS / 2)) // PAGE_TOKENS)
        pages = max(longest + 1, min(typical, slots * longest))
        sizes = DecoderSizes(slots, pages, load.most_tokens)
        room = room_bytes - load.bytes_of(sizes)
        if room < 0:
            break
        blocks = room // load.resident_bytes() if resident else 0
        blocks = min(load.shape.num_hidden_layers, blocks)
        room -= blocks * load.resident_bytes()
        pages = min(slots * longest, pages + room // load.page_bytes)
        sizes = DecoderSizes(slots, pages, load.most_tokens, resident_blocks=blocks)
        seconds = load.seconds(sizes)
        if best is None or seconds < best[0]:
            best = seconds, sizes
    return None if best is None else best[1]
