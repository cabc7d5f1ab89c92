"""The decoder against transformers' `generate`, and an answer's independence of those beside it."""

from __future__ import annotations

import random
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from support.answering import (
    ADAPTERS,
    MODELS,
    NEW_TOKENS,
    ask,
    embedded_prompts,
    generated,
    make_decoder,
    marks,
    two_adapters,
)

from qwen3ft.decoding.cache import pages_for
from qwen3ft.decoding.decoder import Decoder
from qwen3ft.decoding.losses import LossQuery, summed_losses
from qwen3ft.decoding.slots import Query
from qwen3ft.decoding.writer import AnswerWriter
from qwen3ft.decoding.writing import AnswerLimits, Marks, Writing
from qwen3ft.planning.decoder_sizes import DecoderSizes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return two_adapters(tmp_path_factory.mktemp("model"), torch.float32, "cpu")


@pytest.fixture(scope="module")
def decoder(model: Any) -> Decoder:
    return make_decoder(model, draws=NEW_TOKENS)


def test_answers_are_those_of_generate(model: Any, decoder: Decoder) -> None:
    """In fp32, with base and two adapters in one batch."""
    prompts = embedded_prompts()[::80]
    asked = [(index, number) for number in MODELS for index in range(len(prompts))]
    ours = ask(decoder, prompts, asked)
    assert {key: written.tokens for key, written in ours.items()} == generated(model, prompts)


def test_an_answer_does_not_depend_on_those_beside_it(model: Any, decoder: Decoder) -> None:
    """In any order, in part, and with so few pages that answers wait in host memory."""
    prompts = embedded_prompts()[:8]
    asked = [(index, number) for number in MODELS for index in range(len(prompts))]
    truth = ask(decoder, prompts, asked)
    scarce = make_decoder(model, pages=6)
    for seed, (one, count) in enumerate([(decoder, 7), (scarce, len(asked))]):
        order = random.Random(seed).sample(asked, count)
        assert ask(one, prompts, order) == {key: truth[key] for key in order}


def test_no_draw_is_a_token_without_probability() -> None:
    """The last of a vocabulary is of no use, but a sum in fp32 may end before the draw."""
    writing = Writing(16, Marks((0,)), 1, torch.device("cpu"))
    writing.state["draws"][:] = 1 - 2**-24  # the largest there is
    logits = torch.randn(16, 20_000, generator=torch.Generator().manual_seed(0))
    logits[:, -100:] = -torch.inf
    assert (writing._draw(logits) < 19_900).all()


def test_drawn_answers_depend_on_their_seed_alone(decoder: Decoder) -> None:
    """The same seed gives the same answer in any company; another gives another."""
    prompts = embedded_prompts()[:3]
    drawn = [Query(prompts[0], AnswerLimits(NEW_TOKENS, seed=seed)) for seed in (1, 2, 3, 4)]
    greedy = [Query(prompt, AnswerLimits(NEW_TOKENS)) for prompt in prompts]
    together = dict(AnswerWriter(decoder, [*greedy, *drawn]).run())
    alone = dict(AnswerWriter(decoder, [drawn[2]]).run())
    assert alone[0] == together[5]
    assert len({tuple(together[place].tokens) for place in range(3, 7)}) > 1
    assert together[0] == dict(AnswerWriter(decoder, greedy).run())[0]


def test_thinking_ends_with_its_budget(decoder: Decoder) -> None:
    """After the budget comes the end of the block, then an answer within its own limit."""
    prompt = embedded_prompts()[5]
    for opened in (True, False):
        limits = AnswerLimits(answer_tokens=6, thinking_tokens=2, opened=opened)
        [(_, written)] = AnswerWriter(decoder, [Query(prompt, limits)]).run()
        closing = list(marks().closing)
        if not opened:  # this model opens no block by itself
            assert not written.thinking_cut
            assert len(written.tokens) <= 6
            continue
        assert written.thinking_cut
        assert written.tokens[2 : 2 + len(closing)] == closing
        assert 0 < len(written.tokens) - 2 - len(closing) <= 6


def test_a_question_that_is_ahead_is_not_kept_waiting(decoder: Decoder) -> None:
    """It takes the next free slot; the others keep their order."""
    question = Query(embedded_prompts()[0], AnswerLimits(1))
    writer = AnswerWriter(decoder, [question] * (decoder.sizes.slots + 2), burst_steps=1)
    writer.burst()
    waiting = list(writer.waiting)
    assert len(waiting) == 2
    writer.add(1000, question, ahead=True)
    writer.add(1001, question)
    assert [index for index, _ in writer.run()] == [1000, *waiting, 1001]


def test_a_page_is_given_back(decoder: Decoder) -> None:
    """After all answers, every slot and page is free."""
    ask(decoder, embedded_prompts()[:5], [(index, 0) for index in range(5)])
    assert decoder.cache.free_pages == decoder.cache.pages
    assert len(decoder.table.free) == decoder.sizes.slots


def test_the_newest_answer_waits_where_those_before_it_hold_all_pages(model: Any) -> None:
    """Whichever it is that lacks a page, also the last one that is being written."""
    new_tokens = 100
    prompts = [prompt[:9] for prompt in embedded_prompts()[:4]]
    queries = [Query(prompt, AnswerLimits(new_tokens)) for prompt in prompts]
    most_tokens = 9 + new_tokens
    written = []
    for pages in (pages_for(most_tokens) + 1, 4 * pages_for(most_tokens)):
        sizes = DecoderSizes(slots=4, pages=pages, most_tokens=most_tokens, chunk_tokens=64)
        endless = Decoder(model, ADAPTERS, sizes, Marks(()))
        written.append(dict(AnswerWriter(endless, queries).run()))
    assert written[0] == written[1]
    assert {len(answer.tokens) for answer in written[0].values()} == {new_tokens}


@pytest.mark.slow  # 1 s
def test_answers_that_are_cancelled_give_all_back_and_disturb_no_other(model: Any) -> None:
    """Those that wait, are written, or were moved to host memory."""
    text = [*chain(*embedded_prompts()[:20])]  # a page has 32 tokens
    queries = [Query(text[start : start + 27], AnswerLimits(9)) for start in range(6)]
    sizes = DecoderSizes(slots=4, pages=5, most_tokens=36, chunk_tokens=64)
    endless = Decoder(model, ADAPTERS, sizes, Marks(()))
    truth = dict(AnswerWriter(endless, queries).run())
    writer = AnswerWriter(endless, queries, burst_steps=2)
    ended = []
    while not (writer.waiting and writer.paused):
        ended += writer.burst()[1]
    gone = {writer.waiting[-1], writer.running[0].index, writer.paused[0].running.index}
    for index in (*gone, *gone, 99):  # again, and one that never was
        writer.cancel(index)
    ended += list(writer.run())
    assert dict(ended) == {index: truth[index] for index in truth if index not in gone}
    assert len(gone) == 3
    assert endless.cache.free_pages == endless.cache.pages
    assert len(endless.table.free) == sizes.slots


def test_an_answer_may_end_within_its_first_burst(model: Any) -> None:
    """No page is taken beyond the longest answer, whatever a burst could write."""
    sizes = DecoderSizes(slots=1, pages=2, most_tokens=64, chunk_tokens=64)
    decoder = Decoder(model, ADAPTERS, sizes, marks())
    prompt = [*chain(*embedded_prompts()[:9])][:63]
    [(_, written)] = AnswerWriter(decoder, [Query(prompt, AnswerLimits(1))]).run()
    assert len(written.tokens) == 1


def test_losses_are_those_of_transformers(model: Any, decoder: Decoder) -> None:
    """Of short texts, and of one that is longer than a chunk and than any answer."""
    _check_losses(model, decoder, tolerance=1e-4)


@pytest.mark.slow
def test_all_questions_and_twenty_orders(model: Any) -> None:
    """All 480 questions of the embedded model, for base and two adapters."""
    prompts = embedded_prompts()
    decoder = make_decoder(model, slots=64, pages=300)
    asked = [(index, number) for number in MODELS for index in range(len(prompts))]
    truth = ask(decoder, prompts, asked)
    assert {key: written.tokens for key, written in truth.items()} == generated(model, prompts)
    for seed in range(20):
        order = random.Random(seed).sample(asked, 300)
        assert ask(decoder, prompts, order) == {key: truth[key] for key in order}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_answers_alike(tmp_path: Path) -> None:
    """In bf16 at least 96 % are those of `generate`; all are the same in 20 orders."""
    model = two_adapters(tmp_path, torch.bfloat16, "cuda")
    prompts = embedded_prompts()
    decoder = make_decoder(model, slots=64, pages=300)
    asked = [(index, number) for number in MODELS for index in range(len(prompts))]
    truth = ask(decoder, prompts, asked)
    plain = generated(model, prompts)
    assert sum(plain[key] == truth[key].tokens for key in asked) >= 0.96 * len(asked)
    for seed in range(20):
        order = random.Random(seed).sample(asked, 500)
        assert ask(decoder, prompts, order) == {key: truth[key] for key in order}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_measures_losses_alike(tmp_path: Path) -> None:
    """Also after a text that is too long for the captured pass was read."""
    model = two_adapters(tmp_path, torch.bfloat16, "cuda")
    decoder = make_decoder(model)
    for _ in range(2):
        _check_losses(model, decoder, tolerance=0.03)


def _check_losses(model: Any, decoder: Decoder, *, tolerance: float) -> None:
    """Compare with transformers' logits; the longest text exceeds what an answer may have."""
    prompts = embedded_prompts()
    texts = [*prompts[:3], [*chain(*prompts[3:12])]]
    assert len(texts[-1]) > max(decoder.sizes.most_tokens, decoder.sizes.chunk_tokens)
    queries = [LossQuery(text, [(5, len(text))], 1) for text in texts]
    losses = summed_losses(decoder, queries, lambda _: None)
    model.set_adapter(ADAPTERS[1])
    for text, loss in zip(texts, losses, strict=True):
        ids = torch.tensor([text], device=model.device)
        with torch.no_grad():
            logits = model(ids).logits[0].float()
        truth = torch.nn.functional.cross_entropy(logits[4:-1], ids[0, 5:], reduction="sum")
        assert loss == pytest.approx(truth.item(), rel=tolerance)
