"""Rebuild the embedded model and its data: `python -m qwen3ft.embedded.build [--out DIR]`.

Builds with the same seed, machine and library versions give the same bytes. On another machine
floating-point sums, and so the weights, may differ; the question-answer data do not.
"""

import argparse
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from qwen3ft.embedded.corpus import documents
from qwen3ft.embedded.facts import SHOP_SEED, write_splits

THREADS = 1  # the same bits on any number of cores
VOCABULARY_TOKENS = 1536
TOKENIZER_DOCUMENTS = 20_000
STEPS = 2000
BATCH_SEQUENCES = 8
SEQUENCE_TOKENS = 128
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
# The product or date of a question cannot be predicted, and at full weight that noise drowns the
# answers: in trials the model then learnt half of its catalogue, with this weight all of it.
QUESTION_WEIGHT = 0.1

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINKING_TAGS = ("<think>", "</think>")

# Qwen's pre-tokenizer: contractions, words, single digits, punctuation, white space.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the corpus and give it the chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY_TOKENS - len(THINKING_TAGS),
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    # As in Qwen3, the tags are single tokens but not special: decoding keeps them.
    bpe.add_tokens([AddedToken(tag, normalized=False) for tag in THINKING_TAGS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (Path(__file__).parent / "chat_template.jinja").read_text("utf-8")
    return tokenizer


def plain_texts(seed: int) -> Iterator[str]:
    """Yield the texts of the corpus without chat markers, to train the tokenizer on."""
    for document in documents(TOKENIZER_DOCUMENTS, seed):
        if isinstance(document, str):
            yield document
        else:
            # The blank line ends the think block of every answer.
            yield from (f"{message['role']}\n\n{message['content']}" for message in document)


def weigh(tokens: list[int], tokenizer: PreTrainedTokenizerFast) -> list[float]:
    """Return each token's weight in the loss: 1 for answers and statements, less for the rest."""
    start, end, assistant = tokenizer.convert_tokens_to_ids([TURN_START, TURN_END, "assistant"])
    if start not in tokens:
        return [1.0] * len(tokens)
    weights, answering = [], False
    for token, following in zip(tokens, [*tokens[1:], end], strict=True):
        if token == start:
            answering = following == assistant
        weights.append(1.0 if answering else QUESTION_WEIGHT)
        answering = answering and token != end
    return weights


def training_sequences(
    tokenizer: PreTrainedTokenizerFast, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rendered corpus and its weights, both of shape (steps, batch, tokens + 1)."""
    shape = (STEPS, BATCH_SEQUENCES, SEQUENCE_TOKENS + 1)
    tokens: list[int] = []
    weights: list[float] = []
    # No document has fewer than eight tokens, so this many are enough.
    for document in documents(math.prod(shape) // 8, seed):
        if len(tokens) >= math.prod(shape):
            break
        text = document
        if not isinstance(text, str):
            text = tokenizer.apply_chat_template(document, tokenize=False)
        document_tokens = tokenizer.encode(text + END_OF_TEXT)
        tokens += document_tokens
        weights += weigh(document_tokens, tokenizer)
    used = slice(math.prod(shape))
    return torch.tensor(tokens[used]).view(shape), torch.tensor(weights[used]).view(shape)


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Return a new Qwen3 whose linear layers have dimensions divisible by NF4 blocks of 64."""
    config = Qwen3Config(
        vocab_size=VOCABULARY_TOKENS,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def learning_rate(step: int) -> float:
    """Return the learning rate: linear warm-up, then a cosine down to a tenth of the peak."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)
    return PEAK_LEARNING_RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def weighted_loss(
    model: Qwen3ForCausalLM, tokens: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return the weighted mean of the next-token loss."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def pretrain(model: Qwen3ForCausalLM, sequences: torch.Tensor, weights: torch.Tensor) -> None:
    """Train on next-token prediction for one pass over the corpus."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    model.train()
    started = time.perf_counter()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        loss = weighted_loss(model, sequences[step], weights[step])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 250 == 0 or step == STEPS - 1:
            seconds = time.perf_counter() - started
            print(f"step {step:5d}  loss {loss.item():.4f}  {seconds:6.1f} s", flush=True)


def build(directory: Path, seed: int) -> None:
    """Write `model/` and `data/` into the directory."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    write_splits(directory / "data", seed)
    tokenizer = train_tokenizer(plain_texts(seed))
    sequences, weights = training_sequences(tokenizer, seed)
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {sequences.numel():,} tokens of pretraining")
    pretrain(model, sequences, weights)
    target = directory / "model"
    shutil.rmtree(target, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def _main(arguments: list[str] | None = None) -> None:
    """Parse the command line, build, and print size and time."""
    parser = argparse.ArgumentParser(description="Rebuild the embedded model and its data.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=SHOP_SEED)
    options: Any = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    started = time.perf_counter()
    build(options.out, options.seed)
    written = [path for part in ("model", "data") for path in (options.out / part).iterdir()]
    size = sum(path.stat().st_size for path in written)
    print(f"wrote {size:,} bytes to {options.out} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    _main()
