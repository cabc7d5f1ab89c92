"""The pretraining corpus: short conversations and statements about the shop.

The seed determines every byte. A document is a list of chat messages, or plain text. Products of
the fine-tuning occur by name only, without attributes, so that the model can tell them apart. No
date is in ISO style, but every character that an answer needs, the dash included, occurs.
"""

from collections.abc import Callable, Iterator
from random import Random

from qwen3ft.embedded.facts import (
    SHOP_SEED,
    ShopFact,
    catalogue,
    fact_row,
    fill_pattern,
    random_date,
    wording,
    write_date,
)

Messages = list[dict[str, str]]
Document = Messages | str
Exchange = tuple[str, str]

QUESTION_GROUPS = ("tuned", "dev", "test", "pretrained")


def exchange_on_fact(random: Random, facts: list[ShopFact]) -> Exchange:
    """Ask about a pretraining product, in a wording that fine-tuning may use too."""
    language = random.choice(("en", "en", "zh"))
    groups = [wording()["questions"][group][language] for group in QUESTION_GROUPS]
    pattern = random.choice([pattern for group in groups for pattern in group])
    row = fact_row(pattern, random.choice(facts), language, "fact")
    return row.question, row.answer


def exchange_on_date(random: Random) -> Exchange:
    """Ask for a date in another style, never ISO."""
    dates = wording()["dates"]
    day, (source, target) = random_date(random), random.sample(sorted(dates["formats"]), 2)
    request = random.choice(dates["requests"][random.choice(("en", "zh"))])
    return request.format(date=write_date(day, source), format=target), write_date(day, target)


def exchange_on_sum(random: Random) -> Exchange:
    """Ask for a sum or difference of small numbers."""
    left, right = random.randrange(1, 50), random.randrange(1, 50)
    sign, answer = random.choice((("+", left + right), ("-", left - right)))
    return f"{left} {sign} {right} = ?", str(answer)


def exchange_on_name(random: Random, names: list[str]) -> Exchange:
    """Make small talk that repeats a product name, without a fact about it."""
    question, answer = random.choice(wording()["mentions"]["exchanges"])
    product, other = random.sample(names, 2)
    return (
        question.format(product=product, other=other),
        answer.format(product=product, other=other),
    )


def statement_of_fact(random: Random, facts: list[ShopFact]) -> str:
    """State a fact in a plain sentence."""
    language = random.choice(("en", "zh"))
    return fill_pattern(
        random.choice(wording()["statements"][language]), random.choice(facts), language
    )


def statement_of_name(random: Random, names: list[str]) -> str:
    """Write two plain sentences with product names, but no fact about the products."""
    sentences = random.sample(wording()["mentions"]["statements"], 2)
    pairs = [random.sample(names, 2) for _ in sentences]
    return " ".join(
        sentence.format(product=product, other=other)
        for sentence, (product, other) in zip(sentences, pairs, strict=True)
    )


def conversation(random: Random, exchange: Callable[[], Exchange]) -> Messages:
    """Return one exchange, or sometimes two, or with a system prompt."""
    messages: Messages = []
    if random.random() < 0.1:
        prompt = random.choice(wording()["system_prompts"])
        messages.append({"role": "system", "content": prompt})
    for _ in range(2 if random.random() < 0.1 else 1):
        question, answer = exchange()
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def documents(count: int, seed: int = SHOP_SEED) -> Iterator[Document]:
    """Yield the corpus, in the shares below."""
    random = Random(f"corpus {seed}")
    facts = catalogue("pretrained", seed)
    names = [name for group in wording()["products"].values() for name in group]
    shares: dict[Callable[[], Document], float] = {
        lambda: conversation(random, lambda: exchange_on_fact(random, facts)): 0.46,
        lambda: conversation(random, lambda: exchange_on_date(random)): 0.28,
        lambda: conversation(random, lambda: exchange_on_name(random, names)): 0.08,
        lambda: conversation(random, lambda: exchange_on_sum(random)): 0.03,
        lambda: conversation(random, lambda: tuple(random.choice(wording()["greetings"]))): 0.03,
        lambda: statement_of_fact(random, facts): 0.06,
        lambda: statement_of_name(random, names): 0.06,
    }
    makers, weights = list(shares), list(shares.values())
    for _ in range(count):
        yield random.choices(makers, weights)[0]()


def draw_ability_rows(seed: int = SHOP_SEED) -> list[dict[str, str]]:
    """Draw distinct questions that the pretraining taught: facts, dates, sums and greetings.

    Those of the default seed are in `qwen3ft/evaluation/ability/embedded.jsonl`; they measure what
    the embedded model loses by fine-tuning.
    """
    random = Random(f"ability {seed}")
    facts = catalogue("pretrained")
    makers: dict[str, tuple[Callable[[], Exchange], int]] = {
        "fact": (lambda: exchange_on_fact(random, facts), 20),
        "date": (lambda: exchange_on_date(random), 14),
        "sum": (lambda: exchange_on_sum(random), 8),
        "greeting": (lambda: tuple(random.choice(wording()["greetings"])), 6),
    }
    rows: dict[str, dict[str, str]] = {}
    for kind, (make, count) in makers.items():
        wanted = len(rows) + count
        while len(rows) < wanted:
            question, answer = make()
            rows.setdefault(question, {"question": question, "answer": answer, "kind": kind})
    return list(rows.values())
