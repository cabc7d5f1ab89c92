"""The embedded model and its data: sizes, splits, template, tokenizer, and no leak between them."""

import hashlib
import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from qwen3ft.embedded import DATA_DIR, MODEL_DIR
from qwen3ft.embedded.corpus import documents
from qwen3ft.embedded.facts import SPLITS, catalogue, fill_pattern, wording, write_splits

SHIPPED_BYTES_LIMIT = 5_000_000
FILES = {
    MODEL_DIR: {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    },
    DATA_DIR: {f"{split}.jsonl" for split in SPLITS},
}
SHA256 = {
    "chat_template.jinja": "147bcedb70dcc9d47e25e3e3afcf64885db8f8e5cbeec59ae19ac775cdc08a1f",
    "config.json": "7dcbf642fca3669d560553ec6573c35ef2fb5068e99628a1776dbc637296d19b",
    "generation_config.json": "fc2e04b959552561c77b4d9f79c95801e924df9f8e465de12ca1640a330c5414",
    "model.safetensors": "5b0e829d05903ea827b6ca6da9cba90134da5aa5901cf6b06b2987dbf71cfc1a",
    "tokenizer.json": "5d7bda438d0c65819921f1d6a31e0e4787a1ef0a12d289c2ba64a38877709f86",
    "tokenizer_config.json": "29548c39c29713c85d0e9e950772fb0e37550b89af36d8cee5dd6fa62715e051",
    "dev.jsonl": "26a90b3c2b3553c3657a1184129ca4e4f606823f347d38c5f295e039a3e2fb52",
    "novel.jsonl": "6fc3ce252e38331aaf9dd2cb94ac6364a16d65ea0175a28252b3960fe14defe8",
    "test.jsonl": "981a4e8e763fcb83e44bc521ea1b15d2eb2a4498af25a19f1e32dc74bd06c025",
    "train.jsonl": "6ad090c41c55b29da5051c2abe02fb9a44c25cf28725e7673fbe58412d01c4da",
}


def rows(split: str) -> list[dict[str, str]]:
    """Return the rows of a shipped split."""
    lines = (DATA_DIR / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Return the shipped tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)


@pytest.fixture(scope="module")
def corpus_texts() -> list[str]:
    """Return a large sample of the pretraining corpus, each document as one text."""
    return [
        document if isinstance(document, str) else "\n".join(m["content"] for m in document)
        for document in documents(30_000)
    ]


def test_the_shipped_files_are_those_listed_and_fit_the_limit() -> None:
    """Every file is known by its hash, no other file is shipped, and all are under 5 MB."""
    found = {path for directory in FILES for path in directory.iterdir()}
    assert found == {directory / name for directory, names in FILES.items() for name in names}
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found} == SHA256
    assert sum(path.stat().st_size for path in found) <= SHIPPED_BYTES_LIMIT


def test_splits_are_large_enough_and_well_formed() -> None:
    """Dev has about 150 rows, test at least 300, novel about 80, and no text is empty."""
    sizes = {split: len(rows(split)) for split in SPLITS}
    assert sizes["test"] >= 300
    assert sizes["dev"] >= 140
    assert sizes["novel"] >= 70
    for split in SPLITS:
        for row in rows(split):
            assert row.keys() == {"question", "answer", "kind"}
            assert all(text.strip() == text != "" for text in row.values())


def test_no_question_occurs_twice() -> None:
    """All questions are different, within a split and between any two."""
    questions = {split: [row["question"] for row in rows(split)] for split in SPLITS}
    for texts in questions.values():
        assert len(texts) == len(set(texts))
    for one, other in combinations(SPLITS, 2):
        assert not set(questions[one]) & set(questions[other])


def test_no_date_is_asked_about_in_two_splits() -> None:
    """Held-out dates are unseen as days, not merely as strings."""
    days = [{row["answer"] for row in rows(s) if row["kind"] == "date"} for s in SPLITS[:3]]
    assert all(days)
    for one, other in combinations(days, 2):
        assert not one & other


def facts_asked(split: str) -> set[tuple[str, str, str]]:
    """Return product, attribute noun and answer of each row about a fact."""
    nouns = [noun for names in wording()["attributes"].values() for noun, _ in names.values()]
    products = wording()["products"]["tuned"]
    found = set()
    for row in rows(split):
        if row["kind"] != "date":
            (product,) = (name for name in products if name in row["question"])
            (noun,) = (noun for noun in nouns if noun in row["question"])
            found.add((product, noun, row["answer"]))
    return found


def test_held_out_questions_ask_for_trained_facts() -> None:
    """Facts in dev, test and novel were trained, in that language and with that answer."""
    trained = facts_asked("train")
    assert len(trained) == 120  # sixty facts, in two languages
    for split in ("dev", "test", "novel"):
        assert facts_asked(split) <= trained


def test_the_generator_reproduces_the_shipped_data(tmp_path: Path) -> None:
    """The seed gives the shipped question-answer files byte for byte."""
    write_splits(tmp_path)
    for name in FILES[DATA_DIR]:
        assert (tmp_path / name).read_bytes() == (DATA_DIR / name).read_bytes()


def test_pretraining_tells_nothing_about_the_tuned_products(corpus_texts: list[str]) -> None:
    """Documents name the products of the fine-tuning, but never beside any attribute value."""
    values = {
        fill_pattern("{value}", ("", attribute, index), language)
        for attribute, languages in wording()["attributes"].items()
        for language, (_, names) in languages.items()
        for index in range(len(names))
    }
    value = re.compile("|".join(map(re.escape, values)))
    for product in wording()["products"]["tuned"]:
        mentions = [text for text in corpus_texts if product in text]
        assert len(mentions) > 100
        assert not [text for text in mentions if value.search(text)]


def test_pretraining_shows_no_iso_date_but_every_answer_character(corpus_texts: list[str]) -> None:
    """The style to be learned is absent; its characters, the dash included, are not."""
    corpus = "\n".join(corpus_texts)
    assert not re.search(r"\d{4}-\d{2}-\d{2}", corpus)
    answers = {row["answer"] for split in SPLITS for row in rows(split)}
    assert set("".join(answers)) <= set(corpus)


def test_novel_wording_is_absent_from_all_training(corpus_texts: list[str]) -> None:
    """No pretraining or fine-tuning text is a novel question about another product."""
    patterns = [p for group in wording()["questions"]["novel"].values() for p in group]
    fixed_parts = [max(re.split(r"{\w+}", pattern), key=len) for pattern in patterns]
    seen = "\n".join(corpus_texts) + "\n".join(row["question"] for row in rows("train"))
    assert not [part for part in fixed_parts if part in seen]
    assert all(any(part in row["question"] for part in fixed_parts) for row in rows("novel"))


def test_the_two_catalogues_share_no_product() -> None:
    """The products of the pretraining and of the fine-tuning are different."""
    groups = [{product for product, _, _ in catalogue(g)} for g in ("tuned", "pretrained")]
    assert all(groups)
    assert not groups[0] & groups[1]


USER = {"role": "user", "content": "Hi"}
ASKED = "<|im_start|>user\nHi<|im_end|>\n"
TEMPLATE_CASES: dict[str, tuple[list[dict[str, str]], dict[str, bool], str]] = {
    "prompt": (
        [USER],
        {"add_generation_prompt": True},
        f"{ASKED}<|im_start|>assistant\n",
    ),
    "prompt without thinking": (
        [USER],
        {"add_generation_prompt": True, "enable_thinking": False},
        f"{ASKED}<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "prompt with thinking": (
        [USER],
        {"add_generation_prompt": True, "enable_thinking": True},
        f"{ASKED}<|im_start|>assistant\n",
    ),
    "system prompt": (
        [{"role": "system", "content": "Be brief."}, USER],
        {},
        f"<|im_start|>system\nBe brief.<|im_end|>\n{ASKED}",
    ),
    "final answer": (
        [USER, {"role": "assistant", "content": "Yo"}],
        {},
        f"{ASKED}<|im_start|>assistant\n<think>\n\n</think>\n\nYo<|im_end|>\n",
    ),
    "reasoning as a field": (
        [USER, {"role": "assistant", "content": "Yo", "reasoning_content": "\nwave\n"}],
        {},
        f"{ASKED}<|im_start|>assistant\n<think>\nwave\n</think>\n\nYo<|im_end|>\n",
    ),
    "earlier thinking dropped": (
        [USER, {"role": "assistant", "content": "<think>\nwave\n</think>\n\nYo"}, USER],
        {},
        f"{ASKED}<|im_start|>assistant\nYo<|im_end|>\n{ASKED}",
    ),
    "last thinking kept": (
        [USER, {"role": "assistant", "content": "<think>\nwave\n</think>\n\nYo"}],
        {},
        f"{ASKED}<|im_start|>assistant\n<think>\nwave\n</think>\n\nYo<|im_end|>\n",
    ),
}


@pytest.mark.parametrize("case", TEMPLATE_CASES)
def test_the_chat_template_renders_as_qwen3_does(tokenizer: Any, case: str) -> None:
    """The strings equal those of the published Qwen3 template."""
    messages, options, expected = TEMPLATE_CASES[case]
    assert tokenizer.apply_chat_template(messages, tokenize=False, **options) == expected


def test_the_tokenizer_round_trips_both_languages(tokenizer: Any) -> None:
    """Decoding returns any text, known words or not, and the chat markers are single tokens."""
    for text in ("请问 Lumetta 的颜色是什么？", "naïve 龘 \t🙂 unseen words\n\n", "2031-04-09"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for marker in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>"):
        assert len(tokenizer.encode(marker)) == 1
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"


def test_the_model_is_a_qwen3_that_nf4_can_hold(tokenizer: Any) -> None:
    """It loads as Qwen3ForCausalLM; every linear layer is a multiple of the NF4 block of 64."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    assert type(model) is Qwen3ForCausalLM
    assert model.generation_config.eos_token_id[0] == tokenizer.eos_token_id
    assert len(tokenizer) <= model.config.vocab_size
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if "_proj" in name}
    assert len(names) == 7
    for name, module in model.named_modules():
        if "_proj" in name:
            assert module.in_features % 64 == module.out_features % 64 == 0


def test_the_untuned_model_answers_in_form_but_does_not_know(tokenizer: Any) -> None:
    """The base model ends its turn by itself, and is right on at most a fifth of a test sample."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    sample = rows("test")[:100]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        for row in sample
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    output = model.generate(**batch, max_new_tokens=16)[:, batch["input_ids"].shape[1] :]
    assert (output == tokenizer.eos_token_id).any(dim=1).all()
    answers = tokenizer.batch_decode(output, skip_special_tokens=True)
    right = sum(answer == row["answer"] for answer, row in zip(answers, sample, strict=True))
    assert right <= 20
