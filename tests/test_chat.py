"""Rendering and labels: what is trained is exactly what inference will ask for."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qwen3ft.chat import (
    END_TOKEN,
    configure_tokenizer,
    encode_texts,
    generation_prompt,
    load_tokenizer,
    prompt_ids,
    render_row,
    tokenize_row,
    writes_reasoning,
)
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import TokenizerError

TURNS = r"""
{%- for message in messages %}
    {%- if message.role == 'assistant' and THINKS %}
        {{- '<|im_start|>assistant\n<think>\n' + message.reasoning_content.strip('\n') }}
        {{- '\n</think>\n\n' + message.content.lstrip('\n') + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
"""
QWEN3 = (
    TURNS.replace("THINKS", "true")
    + r"""
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
)
INSTRUCT_2507 = (
    TURNS.replace("THINKS", "false")
    + r"{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
THINKING_2507 = (
    TURNS.replace("THINKS", "true")
    + r"{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)
TEMPLATES = {"qwen3": QWEN3, "instruct": INSTRUCT_2507, "thinking": THINKING_2507}

USER = "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"
GOLDEN = {
    ("qwen3", "one and one"): ("", "<think>\none and one\n</think>\n\n2<|im_end|>"),
    ("qwen3", ""): ("<think>\n\n</think>\n\n", "2<|im_end|>"),
    ("instruct", "one and one"): ("", "2<|im_end|>"),
    ("instruct", ""): ("", "2<|im_end|>"),
    ("thinking", "one and one"): ("<think>\n", "one and one\n</think>\n\n2<|im_end|>"),
    ("thinking", ""): ("<think>\n\n</think>\n\n", "2<|im_end|>"),
}
"""(template, reasoning): what the prompt holds after the user's turn, and what is trained."""

QUESTIONS = ("1 + 1?", "西安是哪个省的?", "  indented\n\tcode {x}", "<think> is a tag?", "🙂 naïve")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(MODEL_DIR)


@pytest.mark.parametrize(("template", "reasoning"), GOLDEN)
def test_each_template_renders_the_expected_prompt_and_completion(
    tokenizer: PreTrainedTokenizerBase, template: str, reasoning: str
) -> None:
    """The border stands after the prefilled or empty think block, whichever template is used."""
    tokenizer.chat_template = TEMPLATES[template]
    after_user, trained = GOLDEN[template, reasoning]
    row = render_row(tokenizer, "1 + 1?", "2", reasoning)
    assert (row.prompt, row.completion) == (USER + after_user, trained)


@pytest.mark.parametrize("template", [*TEMPLATES, "embedded"])
@pytest.mark.parametrize("reasoning", ["", "first\n\nsecond"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_training_row_starts_with_the_tokens_inference_starts_from(
    tokenizer: PreTrainedTokenizerBase, template: str, reasoning: str, question: str
) -> None:
    """Prompt ids of inference are a prefix of the row, and the text is the template's own."""
    tokenizer.chat_template = TEMPLATES.get(template, tokenizer.chat_template)
    row = {"question": question, "answer": "right\n  so", "reasoning": reasoning}
    ids, prompt_tokens = tokenize_row(tokenizer, row)
    assert ids[:prompt_tokens] == prompt_ids(tokenizer, question, bool(reasoning))
    conversation = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "right\n  so", "reasoning_content": reasoning},
    ]
    full = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert tokenizer.decode(ids) == full.removesuffix("\n")
    assert ids[-1] == tokenizer.convert_tokens_to_ids(END_TOKEN)


def test_only_templates_with_thinking_are_said_to_write_reasoning(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """An Instruct template is told apart, so that lost reasoning can be reported."""
    told = {}
    for name, template in TEMPLATES.items():
        tokenizer.chat_template = template
        told[name] = writes_reasoning(tokenizer)
    assert told == {"qwen3": True, "instruct": False, "thinking": True}


def test_the_embedded_template_behaves_like_qwen3(tokenizer: PreTrainedTokenizerBase) -> None:
    """The bundled model obeys the thinking switch in the prompt and writes reasoning."""
    assert generation_prompt(tokenizer, "1 + 1?", thinking=True) == USER
    assert generation_prompt(tokenizer, "1 + 1?", thinking=False) == USER + GOLDEN["qwen3", ""][0]
    assert writes_reasoning(tokenizer)


def test_a_template_that_breaks_its_own_prompt_is_refused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Training text that does not start with the generation prompt raises before training."""
    tokenizer.chat_template = INSTRUCT_2507.replace(
        r"{{- '<|im_start|>assistant\n' }}", r"{{- '<|im_start|>bot\n' }}"
    )
    with pytest.raises(TokenizerError, match="does not continue its own prompt"):
        render_row(tokenizer, "1 + 1?", "2", "")


def test_a_template_that_changes_the_answer_is_refused(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """An answer that is not rendered as it stands would teach something else."""
    tokenizer.chat_template = INSTRUCT_2507.replace("message.content", "message.content|upper")
    with pytest.raises(TokenizerError):
        render_row(tokenizer, "Q", "answer", "")


def test_a_qwen_tokenizer_without_a_template_gets_the_embedded_one(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    """The replacement happens, and is said in the log."""
    expected, tokenizer.chat_template = tokenizer.chat_template, None
    with caplog.at_level(logging.WARNING, logger="qwen3ft"):
        configure_tokenizer(tokenizer)
    assert tokenizer.chat_template == expected
    assert "no chat template" in caplog.text


def test_padding_never_uses_the_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """A tokenizer that pads with <|im_end|>, or with nothing, is given <|endoftext|>."""
    for pad_token in (END_TOKEN, None):
        tokenizer.pad_token = pad_token
        configure_tokenizer(tokenizer)
        assert tokenizer.pad_token == "<|endoftext|>"


def _foreign_tokenizer(special_tokens: list[str]) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    core.add_special_tokens(special_tokens)
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_a_tokenizer_without_turn_markers_is_refused() -> None:
    """No template is guessed for a tokenizer that is not Qwen's."""
    with pytest.raises(TokenizerError, match="im_start"):
        configure_tokenizer(_foreign_tokenizer(["<s>"]))


def test_a_tokenizer_with_nothing_to_pad_with_is_refused() -> None:
    """Padding with the end token is never a fallback."""
    with pytest.raises(TokenizerError, match="padding token"):
        configure_tokenizer(_foreign_tokenizer(["<|im_start|>", "<|im_end|>"]))


def test_a_folder_without_a_tokenizer_is_a_tokenizer_error(tmp_path: Path) -> None:
    """A damaged model folder gives advice instead of a foreign exception."""
    with pytest.raises(TokenizerError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_texts_are_encoded_without_cutting_or_adding(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """A text longer than the model's own limit comes back whole."""
    text = "word " * 3000
    assert tokenizer.decode(encode_texts(tokenizer, [text])[0]) == text
    assert encode_texts(tokenizer, []) == []


def test_the_bundled_tokenizer_loads_unchanged() -> None:
    """Configuring leaves a complete tokenizer as it is."""
    plain = AutoTokenizer.from_pretrained(MODEL_DIR)
    ours = load_tokenizer(MODEL_DIR)
    assert (plain.pad_token, plain.chat_template) == (ours.pad_token, ours.chat_template)
