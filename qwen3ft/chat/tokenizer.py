"""A tokenizer that training can use: turn markers, a chat template, a padding token.

Guarantees: padding is never the end token, and what is missing is added where it can be told, and
said in the log. A chat template that is not known by its hash is used, with a warning.
It does not cover tokenizers of other models than Qwen's.
It imports transformers only to load a tokenizer, and never torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwen3ft.chat.templates import END_TOKEN, identify_template, template_error
from qwen3ft.embedded import MODEL_DIR
from qwen3ft.errors import TokenizerError
from qwen3ft.logs import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START_TOKEN, PAD_TOKEN = "<|im_start|>", "<|endoftext|>"


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
        raise template_error(
            f"The tokenizer does not have {' and '.join(missing)} as single tokens.",
            "Turns are marked by them; this is no Qwen chat tokenizer.",
        )
    if not tokenizer.chat_template:
        tokenizer.chat_template = (MODEL_DIR / "chat_template.jinja").read_text(encoding="utf-8")
        get_logger("data").warning(
            "The tokenizer has no chat template; the embedded model's, which is Qwen3's, is used."
        )
    info = identify_template(tokenizer)
    if not info.name:
        get_logger("data").warning(
            "The chat template (sha256 %s) is none of the known ones; it is used as it behaves.",
            info.sha256,
        )
    if tokenizer.pad_token_id in (None, vocabulary[END_TOKEN]):
        if PAD_TOKEN not in vocabulary:
            raise template_error(
                f"The tokenizer has no padding token besides {END_TOKEN}, and no {PAD_TOKEN}.",
                "Padding with the end token would teach the model never to stop.",
            )
        tokenizer.pad_token = PAD_TOKEN
