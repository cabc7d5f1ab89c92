"""Near-duplicates: copies are found, templates are left alone, and memory stays small."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from random import Random

import numpy as np
import pytest

from qwen3ft.data.near_duplicates import BUCKET_ROWS, NearDuplicates, band_hashes
from qwen3ft.data.text_features import are_near, as_text, features, jaccard
from qwen3ft.embedded import DATA_DIR

LATIN = ["".join(Random(i).choices("abcdefghijklmnop", k=3 + i % 6)) for i in range(4000)]
CHINESE = [chr(0x4E00 + 5 * i) for i in range(2500)]


def make_text(number: int, words: int = 60, *, chinese: bool = False) -> list[str]:
    """Return the words of a random text, always the same for a number."""
    vocabulary = [c for c in CHINESE if c not in "二三四五六七八九十百千万亿零两半"]
    return Random(number).choices(vocabulary if chinese else LATIN, k=words)


def join(words: Sequence[str]) -> str:
    """Return a question and an answer made of the words."""
    middle = len(words) // 2
    gap = "" if words[0] > "z" else " "
    return as_text(gap.join(words[:middle]) + "?", gap.join(words[middle:]) + ".")


def twins_of(texts: Sequence[str], left: Sequence[bool], threshold: float = 0.8) -> dict[int, int]:
    """Return each row of `left` with its near-duplicate among the others."""
    near = NearDuplicates(threshold)
    near.add(band_hashes(texts[:3]))
    near.add(band_hashes(texts[3:]))
    mask = np.array(left)
    twins = near.twins(mask, ~mask, texts.__getitem__)
    assert near.find(mask, ~mask, texts.__getitem__).tolist() == np.flatnonzero(twins >= 0).tolist()
    return {int(row): int(twins[row]) for row in np.flatnonzero(twins >= 0)}


@pytest.mark.parametrize("chinese", [False, True])
def test_a_copy_with_one_word_exchanged_is_found(chinese: bool) -> None:
    """In 60 words, of Latin or Chinese; unrelated texts are not taken for copies."""
    originals = [make_text(i, chinese=chinese) for i in range(150)]
    copies = [[*words] for words in originals]
    for number, words in enumerate(copies):
        words[number % 60] = "石" if chinese else "stone"
    texts = [join(words) for words in (*originals, *copies)]
    left = [i >= 150 for i in range(300)]
    assert twins_of(texts, left) == {150 + i: i for i in range(150)}


def test_case_punctuation_and_unicode_form_make_no_difference() -> None:
    """A copy typed anew is the same copy."""
    question = "请问公司在合同到期之前，需要提前多少天通知员工不再续签劳动合同？"
    texts = [
        as_text(question, "需要提前30天，书面通知。"),
        as_text(question.replace("，", " ").replace("？", "?"), "需要提前３０天 书面通知"),
        as_text("Which café serves the best coffee near the station?", "The small one: Luna."),
        as_text(
            "which cafe\u0301 serves the BEST coffee near the station", "the small one – luna!"
        ),
    ]
    assert twins_of(texts, [False, True, False, True]) == {1: 0, 3: 2}


CHINESE_PLAIN = (
    "昨天下午有位老顾客打来电话说他去年冬天在我们店里买过一件东西现在想寄给住在外地的亲戚"
    "所以希望知道包裹会不会太沉以及邮费大概需要多少请用简短礼貌的话回复"
)
PLAIN = (
    "a customer who bought one of our devices last year would like to know how heavy the device is "
    "before sending it back to the shop in the box that it came in, please answer as shortly as "
    "you can and mention the unit, and do not forget to be polite to the customer at all times"
)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((PLAIN, "it is light enough"), (PLAIN, "it is rather heavy")),
        ((PLAIN + " 250", "yes it is"), (PLAIN + " 350", "yes it is")),
        ((PLAIN + " for two", "yes it is"), (PLAIN + " for six", "yes it is")),
        ((PLAIN + " the Foo", "yes it is"), (PLAIN + " the Bar", "yes it is")),
        ((PLAIN + "《红楼梦》", "yes it is"), (PLAIN + "《西游记》", "yes it is")),
        ((f"{CHINESE_PLAIN} Quenby", "很重"), (f"{CHINESE_PLAIN} Tolvex", "很重")),
        ((f"{CHINESE_PLAIN}三月", "是的"), (f"{CHINESE_PLAIN}四月", "是的")),
    ],
)
def test_another_number_name_or_answer_is_another_question(
    one: tuple[str, str], other: tuple[str, str]
) -> None:
    """However long the text in common is: these are templates, not copies."""
    first, second = features(as_text(*one)), features(as_text(*other))
    assert jaccard(first.shingles, second.shingles) >= 0.8
    assert not are_near(first, second, 0.8)
    assert not are_near(second, first, 0.8)
    assert twins_of([as_text(*one), as_text(*other)], [False, True]) == {}


def test_a_name_in_another_case_or_place_is_the_same_name() -> None:
    """Names are looked for in the whole of the other text."""
    one = features(as_text(f"{PLAIN} in the city of Paris", "yes"))
    other = features(as_text(f"{PLAIN} in the city of paris", "yes"))
    assert are_near(one, other, 0.8)
    assert are_near(other, one, 0.8)


@pytest.mark.parametrize("held_out", ["dev", "test", "novel"])
def test_the_templates_of_the_bundled_data_do_not_collapse(held_out: str) -> None:
    """Other products and dates in trained wordings, trained facts in other wordings: no copies."""
    texts, sizes = [], []
    for split in ("train", held_out):
        lines = (DATA_DIR / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        texts += [as_text(row["question"], row["answer"]) for row in rows]
        sizes.append(len(rows))
    assert twins_of(texts, [i < sizes[0] for i in range(sum(sizes))]) == {}


def test_long_templates_do_not_collapse() -> None:
    """200 products in one sentence of 50 words, each with its own weight, and none a copy."""
    names = [word.capitalize() for word in dict.fromkeys(LATIN)][:200]
    texts = [as_text(f"{PLAIN}: the {name}", f"{i % 7} kg") for i, name in enumerate(names)]
    near = NearDuplicates()
    near.add(band_hashes(texts))
    everything = np.ones(200, bool)
    assert near.find(everything, everything, texts.__getitem__).tolist() == []
    assert near.capped_buckets > 0


def test_within_a_set_the_later_row_is_the_repeat() -> None:
    """The first of three copies stays, and rows outside the mask do not count."""
    words = make_text(1)
    texts = [join(words), join(make_text(2)), join([*words[:-1], "x"]), join([*words[:-1], "y"])]
    near = NearDuplicates()
    near.add(band_hashes(texts))
    mask = np.ones(4, bool)
    assert near.find(mask, mask, texts.__getitem__).tolist() == [2, 3]
    mask[0] = False
    assert near.find(mask, mask, texts.__getitem__).tolist() == [3]


def test_copies_in_large_buckets_are_compared_with_the_first() -> None:
    """A hundred copies of one text cost one comparison each, and all are found."""
    texts = [join([*make_text(1)[:-1], LATIN[i]]) for i in range(5 * BUCKET_ROWS)]
    near = NearDuplicates()
    near.add(band_hashes(texts))
    everything = np.ones(len(texts), bool)
    found = near.find(everything, everything, texts.__getitem__)
    assert found.tolist() == list(range(1, len(texts)))
    assert near.capped_buckets > 0
    assert near.verified < 2 * len(texts)


def similar_pair(number: int, exchanged: int) -> tuple[list[str], list[str]]:
    """Return two texts of 60 words, some of which, far from each other, differ."""
    one = make_text(number)
    other = [*one]
    for place in Random(number).sample(range(3, 56, 4), exchanged):
        other[place] = f"new{'abcdefghij'[place % 10]}"
    return one, other


def test_candidates_are_found_as_often_as_the_formula_says() -> None:
    """At 0.8 to 0.9, 97 % of the pairs and more; each pair is named once, the left row first."""
    pairs = [similar_pair(i, 2) for i in range(400)]
    texts = [join(words) for sides in zip(*pairs, strict=True) for words in sides]
    similar = [
        jaccard(features(texts[i]).shingles, features(texts[400 + i]).shingles) for i in range(400)
    ]
    assert 0.75 < min(similar) <= max(similar) < 0.87
    near = NearDuplicates()
    near.add(band_hashes(texts))
    left = np.arange(800) < 400
    found = [tuple(pair) for pairs in near.pairs(left, ~left) for pair in pairs.tolist()]
    assert len(found) == len(set(found))
    assert all(left[one] and not left[other] for one, other in found)
    assert sum((i, 400 + i) in set(found) for i in range(400)) >= 0.96 * 400


def test_texts_of_no_words_are_never_copies() -> None:
    """Punctuation alone, or nothing at all, is compared with nothing."""
    texts = ["???", "???", "", "", "\0", "\0", "\ud800", "。"]
    assert twins_of(texts, [i % 2 == 1 for i in range(8)]) == {}
    near = NearDuplicates()
    assert near.find(np.ones(0, bool), np.ones(0, bool), texts.__getitem__).tolist() == []


def test_a_row_costs_under_200_bytes() -> None:
    """Signatures and the search together, on top of what one batch takes."""
    texts = [join(make_text(i, 8)) for i in range(5000)]
    near = NearDuplicates()
    near.add(band_hashes(texts[:1000]))
    tracemalloc.start()
    for start in range(1000, 5000, 1000):
        near.add(band_hashes(texts[start : start + 1000]))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 200 * 4000
