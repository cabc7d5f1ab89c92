"""Keys and values of the answers being written, in pages that all slots share.

A page holds `PAGE_TOKENS` tokens of one answer, in all blocks (paged attention, Kwon et al. 2023,
arXiv:2309.06180). Page 0 belongs to no answer: what idle slots compute is written there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen3ft.planning.decoder_sizes import PAGE_TOKENS


class PagedCache:
    """Keys and values, (blocks, pages x PAGE_TOKENS, key-value heads, head_dim), and free pages.

    Args:
        blocks: Number of blocks of the model.
        pages: Pages for answers.
        heads: Key-value heads.
        head_dim: Numbers per head.
        like: Tensor of their type, on their device.
    """

    def __init__(self, blocks: int, pages: int, heads: int, head_dim: int, like: Tensor) -> None:
        shape = (blocks, (pages + 1) * PAGE_TOKENS, heads, head_dim)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.pages = pages
        self._free = list(range(pages, 0, -1))

    @property
    def free_pages(self) -> int:
        """Number of pages that no answer holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Take `count` of the free pages."""
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: Sequence[int]) -> None:
        """Free pages."""
        self._free.extend(pages)

    def write(self, block: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write keys and values of tokens, (tokens, heads, head_dim), to `places`, (tokens,)."""
        self.keys[block].index_copy_(0, places, keys)
        self.values[block].index_copy_(0, places, values)

    def to_host(self, pages: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a copy of the pages in host memory."""
        places = self._places(pages)
        return self.keys[:, places].cpu(), self.values[:, places].cpu()

    def from_host(self, pages: Sequence[int], held: tuple[Tensor, Tensor]) -> None:
        """Write what `to_host` returned into the first of other pages."""
        places = self._places(pages)[: held[0].shape[1]]
        for target, source in zip((self.keys, self.values), held, strict=True):
            target[:, places] = source.to(target.device)

    def _places(self, pages: Sequence[int]) -> Tensor:
        return places_of(pages, len(pages) * PAGE_TOKENS).to(self.keys.device)


def pages_for(tokens: int) -> int:
    """Return the pages that hold `tokens` tokens."""
    return -(-tokens // PAGE_TOKENS)


def places_of(pages: Sequence[int], tokens: int) -> Tensor:
    """Return where the first `tokens` tokens of an answer with these pages stand, int64."""
    starts = torch.tensor(pages, dtype=torch.int64)[:, None] * PAGE_TOKENS
    return (starts + torch.arange(PAGE_TOKENS)).flatten()[:tokens]
