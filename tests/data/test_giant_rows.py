"""Rows of many megabytes: counted, named, and neither tokenised nor compared."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest
from support.data_stage import SNAPSHOT, accounted, prepare, read_lines, synthetic, write_jsonl
from transformers import PreTrainedTokenizerBase as Tokenizer

from qwen3ft.chat import rendering
from qwen3ft.chat.tokenizer import Encoder, load_tokenizer
from qwen3ft.chat.words import TOKEN_BYTES
from qwen3ft.data.row_table import BatchReader, RowTable, RowWriter
from qwen3ft.data.rows import RowCounts, RowRules, read_file
from qwen3ft.errors import DataLoadingError
from qwen3ft.records.data import BadRow, SourceFile
from qwen3ft.units import MIB

TEXTS = {
    "digits": "4" * 3000,
    "words": "the sum of two numbers " * 200,
    "Chinese": "三个数的和是多少" * 300,
    "decomposed": unicodedata.normalize("NFD", "한국어 Ǻ ΐ ᾯ") * 300,
    "emoji": "🙂👩‍🚀" * 400,
    "newlines": "\n" * 4000,
    "long tokens": "Ġ的价格写的是什么" * 300,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(SNAPSHOT.path)


@pytest.mark.parametrize("name", TEXTS)
def test_no_text_has_fewer_tokens_than_its_bytes_say(tokenizer: Tokenizer, name: str) -> None:
    """The bound is of use, too: it is no more than a few dozen times less."""
    encoder, text = Encoder(tokenizer), TEXTS[name]
    [ids] = encoder.encode([text])
    assert 0 < encoder.bound.fewest_tokens([text]) <= len(ids) // TOKEN_BYTES


def test_no_character_loses_more_than_a_border_allows() -> None:
    """Unicode's composed characters, written in the longest way, are cut anywhere."""
    for code in range(0x110000):
        character = chr(code)
        longest = unicodedata.normalize("NFD", character)
        if longest != character:
            assert len(longest.encode()) < 16


def test_other_kinds_of_tokenizers_have_no_bound() -> None:
    """Where unknown characters are one token, or white space is dropped."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    from qwen3ft.chat.length_bound import LengthBound

    words = Backend(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert LengthBound(words).fewest_tokens(["a" * 1000]) == 0
    assert LengthBound(words).ends("a" * 1000, 1) == "a" * 1000


def test_a_giant_row_is_left_out_before_it_is_tokenised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is too long, its length is stated as the least, and the warnings say both."""
    encoded: list[int] = []
    encode = Encoder.encode

    def watched(self: Encoder, texts: list[str]) -> list[bytes]:
        encoded.extend(map(len, texts))
        return encode(self, texts)

    monkeypatch.setattr(Encoder, "encode", watched)
    giant = {"question": "Which?", "answer": "number " * (MIB // 4), "reasoning": ""}
    data = write_jsonl(tmp_path / "qa.jsonl", [*synthetic(60), giant, giant | {"question": "Who?"}])
    manifest = prepare(tmp_path, data)
    assert manifest.rows_read == accounted(manifest) == 62
    assert (manifest.too_long, manifest.not_compared) == (2, 2)
    assert max(encoded) < 10_000
    assert manifest.longest[0].at_least
    assert manifest.longest[0].tokens > 7 * MIB // 4 // 40
    warnings = "\n".join(manifest.warnings)
    assert re.search(r"2 rows are too long by their bytes alone", warnings)
    assert re.search(r"2 rows are larger than 1 MiB, and were not compared", warnings)
    left_out = read_lines(Path(manifest.path) / "left_out.jsonl")
    assert [row["tokens_at_least"] for row in left_out] == [manifest.longest[0].tokens] * 2
    with pytest.raises(DataLoadingError, match="the longest at least") as raised:
        prepare(tmp_path, data, too_long="fail")
    assert raised.value.next_command.endswith("--set too_long=drop")


def test_a_giant_reasoning_is_shortened_to_its_ends(tmp_path: Path) -> None:
    """As of any other, beginning and end stay; the row is trained on."""
    reasoning = "first " + "and then " * (MIB // 4) + "last"
    rows = [*synthetic(60), {"question": "Which?", "answer": "It.", "reasoning": reasoning}]
    data = write_jsonl(tmp_path / "qa.jsonl", rows)
    manifest = prepare(tmp_path, data, too_long="shorten_reasoning", held_out_fraction=0.02)
    assert (manifest.shortened, manifest.too_long) == (1, 0)
    tokenizer = load_tokenizer(SNAPSHOT.path)
    row = {"question": "Which?", "answer": "It.", "reasoning": reasoning, "messages": []}
    shorter = rendering.shorten_reasoning(tokenizer, row, 256)  # type: ignore[arg-type]
    assert shorter is not None
    assert shorter["reasoning"].startswith("first and then")
    assert shorter["reasoning"].endswith("and then last")
    [tokenized] = rendering.tokenize_rows(tokenizer, [shorter])
    assert 250 <= len(tokenized) <= 256


def test_a_batch_of_rows_is_bounded_in_text(tmp_path: Path) -> None:
    """Giant rows do not pile up: each has a batch of its own, and all come out in order."""
    rows = [{"question": f"q{n}", "answer": "x" * (1 + 3 * MIB * (n % 3 == 1))} for n in range(12)]
    source = SourceFile(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "a.jsonl", "train")
    with RowWriter(tmp_path / "rows.arrow") as table:
        good = [
            row for row in read_file(source, RowRules(), RowCounts()) if not isinstance(row, BadRow)
        ]
        written = [*(table.append(row, 0) for row in good), table.flush()]
    places = [place for place in written if place is not None]
    batches = list(RowTable(BatchReader(tmp_path / "rows.arrow", [source]), places).batches())
    assert max(sum(len(row["answer"]) for row in rows) for _, rows in batches) == 3 * MIB + 1
    found = [row["question"] for _, rows in batches for row in rows]
    assert found == [f"q{n}" for n in range(12)]
