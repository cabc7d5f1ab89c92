"""A question-answer row in the model's own chat format: as text, as token ids, and what is trained.

Guarantees: a training row is the prompt that inference starts from, followed by what the assistant
has to write, up to and with the end token `<|im_end|>`. The border is found by construction: the
prompt is a true prefix of the rendered conversation, and both parts are tokenised on their own, so
no token lies across it. Loss is on the second part alone.

Thinking: a row with reasoning trains `<think>...</think>` and the answer; a row without has an
empty think block in its prompt, which is not trained. A template that prefills `<think>` (the
Thinking models) has the opening tag in the prompt; one that knows no thinking (the Instruct models)
leaves the reasoning out, in training and inference alike (see `writes_reasoning`).

It does not cover: system prompts, several turns, tools. It imports transformers only to load a
tokenizer, and never torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import TokenizerError
from qwen3ft.logs import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START_TOKEN, END_TOKEN, PAD_TOKEN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
IGNORED_LABEL = -100
"""The label that cross-entropy in torch and transformers leaves out."""

_OPEN_BLOCK = "<think>\n"
_REST_OF_EMPTY_BLOCK = "\n</think>\n\n"


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """One conversation as text: what is given, and what is to be written (and trained)."""

    prompt: str
    completion: str


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder` (or a cached hub name), ready for use: see `configure_tokenizer`.

    Raises:
        TokenizerError: it cannot be loaded or configured.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise TokenizerError(
            f"The tokenizer in {folder} cannot be loaded: {error}",
            why="tokenizer.json or tokenizer_config.json is missing or damaged.",
            next_command=f"ls -l {folder}",
            folder=str(folder),
        ) from error
    configure_tokenizer(tokenizer)
    return tokenizer


def configure_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give `tokenizer` what training needs where it can be told: a chat template, a padding token.

    Raises:
        TokenizerError: it does not know the turn markers of Qwen, or has no token to pad with.
    """
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in (START_TOKEN, END_TOKEN) if token not in vocabulary]
    if missing:
        raise _tokenizer_error(
            f"The tokenizer does not have {' and '.join(missing)} as single tokens.",
            "Turns are marked by them; this is no Qwen chat tokenizer.",
        )
    if not tokenizer.chat_template:
        tokenizer.chat_template = (MODEL_DIR / "chat_template.jinja").read_text(encoding="utf-8")
        get_logger("data").warning(
            "The tokenizer has no chat template; that of the embedded model (ChatML) is used."
        )
    if tokenizer.pad_token_id in (None, vocabulary[END_TOKEN]):
        if PAD_TOKEN not in vocabulary:
            raise _tokenizer_error(
                f"The tokenizer has no padding token besides {END_TOKEN}, and no {PAD_TOKEN}.",
                "Padding with the end token would teach the model never to stop.",
            )
        tokenizer.pad_token = PAD_TOKEN


def generation_prompt(tokenizer: PreTrainedTokenizerBase, question: str, thinking: bool) -> str:
    """The text after which the assistant writes: the one border of training and inference.

    Args:
        tokenizer: With a chat template.
        question: The user's message.
        thinking: Whether the model is to think first; if not, a template with thinking closes an
            empty think block here.
    """
    prompt = _apply(tokenizer, [_user(question)], add_generation_prompt=True, thinking=thinking)
    if not thinking and prompt.endswith(_OPEN_BLOCK):
        return prompt + _REST_OF_EMPTY_BLOCK
    return prompt


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str, thinking: bool) -> list[int]:
    """The token ids of `generation_prompt`, exactly as in a training row."""
    return encode_texts(tokenizer, [generation_prompt(tokenizer, question, thinking)])[0]


def writes_reasoning(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template renders an assistant's reasoning at all."""
    probe = "a thought"
    return probe in _apply(tokenizer, [_user("q"), _assistant("a", probe)])


def render_row(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: str, reasoning: str
) -> RenderedRow:
    """Render one row; `reasoning` may be empty.

    Raises:
        TokenizerError: the template does not continue its own generation prompt, or changes the
            answer, so that training would differ from inference.
    """
    prompt = generation_prompt(tokenizer, question, thinking=bool(reasoning))
    conversation = [_user(question), _assistant(answer, reasoning)]
    full = _apply(tokenizer, conversation, thinking=bool(reasoning))
    written, end, _ = full.removeprefix(prompt).rpartition(END_TOKEN)
    if not full.startswith(prompt) or not end or not written.endswith(answer):
        raise _tokenizer_error(
            f"The chat template does not continue its own prompt: {prompt[-60:]!r} is followed by "
            f"{full[max(0, len(prompt) - 60) :][:120]!r}.",
            "Training on it would teach another format than the one inference asks for.",
        )
    return RenderedRow(prompt, written + end)


def tokenize_row(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, str]
) -> tuple[list[int], int]:
    """(token ids, how many of them are the prompt) of a row: question, answer, maybe reasoning.

    Raises:
        TokenizerError: as `render_row`.
    """
    rendered = render_row(tokenizer, row["question"], row["answer"], row.get("reasoning") or "")
    prompt, completion = encode_texts(tokenizer, [rendered.prompt, rendered.completion])
    return prompt + completion, len(prompt)


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with nothing added and nothing cut."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    return ids


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], completions: Sequence[str]
) -> Iterator[tuple[list[int], list[int]]]:
    """(token ids of the prompt, token ids of the completion) of each row."""
    return zip(encode_texts(tokenizer, prompts), encode_texts(tokenizer, completions), strict=True)


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    *,
    add_generation_prompt: bool = False,
    thinking: bool = True,
) -> str:
    text: Any = tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        enable_thinking=thinking,
    )
    return str(text)


def _user(question: str) -> dict[str, str]:
    return {"role": "user", "content": question}


def _assistant(answer: str, reasoning: str) -> dict[str, str]:
    # Given even where it is empty: a template then does not look for tags inside the answer.
    return {"role": "assistant", "content": answer, "reasoning_content": reasoning}


def _tokenizer_error(what: str, why: str) -> TokenizerError:
    return TokenizerError(
        what, why=why, next_command="qwen3ft plan --set model_name=Qwen/Qwen3-4B-Thinking-2507"
    )
