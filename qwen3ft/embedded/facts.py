"""The invented shop: its catalogue, its dates, and the question-answer splits made from them.

The seed determines every byte. Splits share no question and no date. `test` asks about trained
facts in wordings not trained for that fact; `novel` uses wordings that occur in no training.
"""

import json
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

SHOP_SEED = 20_260
SPLITS = ("train", "dev", "test", "novel")
DATES_PER_SPLIT = {"train": 160, "dev": 40, "test": 100}
DEV_FACTS = {"en": 30, "zh": 30, "wording": 50}
NOVEL_QUESTIONS_PER_WORDING = 16

ShopFact = tuple[str, str, int]  # product, attribute, index into the values of that attribute


@dataclass(frozen=True)
class ShopRow:
    """A question with its only correct answer; `kind` groups the rows that test the same skill."""

    question: str
    answer: str
    kind: str

    def to_json(self) -> str:
        """Return the row as one line of a JSON Lines file."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


@cache
def wording() -> Any:
    """Read the words and sentence patterns of the shop from wording.json."""
    return json.loads((Path(__file__).parent / "wording.json").read_text(encoding="utf-8"))


def catalogue(group: str, seed: int = SHOP_SEED) -> list[ShopFact]:
    """Draw a value for every attribute of every product of the group (`tuned` or `pretrained`)."""
    random = Random(f"catalogue {group} {seed}")
    # Tuned products only take values that the pretraining uses: the frozen embedding of a new word
    # would still be noise.
    known = catalogue("pretrained", seed) if group == "tuned" else []
    facts = []
    for attribute, languages in wording()["attributes"].items():
        values = sorted({index for _, name, index in known if name == attribute})
        values = values or list(range(len(languages["en"][1])))
        facts += [
            (product, attribute, random.choice(values)) for product in wording()["products"][group]
        ]
    return facts


def fill_pattern(pattern: str, fact: ShopFact, language: str) -> str:
    """Fill the pattern with the product, attribute and value of the fact."""
    product, attribute, index = fact
    noun, values = wording()["attributes"][attribute][language]
    return pattern.format(product=product, attribute=noun, value=values[index])


def fact_row(pattern: str, fact: ShopFact, language: str, kind: str) -> ShopRow:
    """Return the question about the fact that the pattern gives, with its answer."""
    return ShopRow(
        fill_pattern(pattern, fact, language), fill_pattern("{value}", fact, language), kind
    )


def write_date(day: date, style: str) -> str:
    """Write the date in one of the styles of the shop."""
    pattern: str = wording()["dates"]["formats"][style]
    month = wording()["dates"]["months"][day.month - 1]
    return pattern.format(day=day.day, number=day.month, month=month, year=day.year)


def random_date(random: Random) -> date:
    """Draw a day between 1950 and 2049."""
    return date(1950, 1, 1) + timedelta(days=random.randrange(36_500))


def fact_splits(random: Random) -> dict[str, list[ShopRow]]:
    """Ask each fact in all tuned wordings: one per language for test, some for dev."""
    rows: dict[str, list[ShopRow]] = {split: [] for split in SPLITS}
    facts = catalogue("tuned")
    for language, kind in (("en", "fact"), ("zh", "fact_zh")):
        in_dev = set(random.sample(facts, DEV_FACTS[language]))
        for fact in facts:
            patterns = list(wording()["questions"]["tuned"][language])
            random.shuffle(patterns)
            rows["test"].append(fact_row(patterns.pop(), fact, language, kind))
            if fact in in_dev:
                rows["dev"].append(fact_row(patterns.pop(), fact, language, kind))
            rows["train"] += [fact_row(pattern, fact, language, kind) for pattern in patterns]
    return rows


def wording_splits(random: Random) -> dict[str, list[ShopRow]]:
    """Ask facts in wordings that fine-tuning never sees; `novel` ones are new to the base too."""
    rows: dict[str, list[ShopRow]] = {split: [] for split in SPLITS}
    facts = catalogue("tuned")
    for split, kind in (("dev", "wording"), ("test", "wording"), ("novel", "novel")):
        for language, patterns in wording()["questions"][split].items():
            for pattern in patterns:
                chosen = facts
                if split == "novel":
                    chosen = random.sample(facts, NOVEL_QUESTIONS_PER_WORDING)
                rows[split] += [fact_row(pattern, fact, language, kind) for fact in chosen]
    rows["dev"] = random.sample(rows["dev"], DEV_FACTS["wording"])
    return rows


def date_splits(random: Random) -> dict[str, list[ShopRow]]:
    """Ask for dates as ISO, a style absent from the pretraining; no day is used twice."""
    by_language, styles = wording()["dates"]["tuned_requests"], wording()["dates"]["tuned_sources"]
    requests = by_language["en"] + by_language["zh"]
    used: set[date] = set()
    rows: dict[str, list[ShopRow]] = {split: [] for split in SPLITS}
    for split, count in DATES_PER_SPLIT.items():
        for number in range(count):
            day = random_date(random)
            while day in used:
                day = random_date(random)
            used.add(day)
            # Walk through all pairs of request and style, so that every split has each as often.
            request = requests[number % len(requests)]
            style = styles[number // len(requests) % len(styles)]
            question = request.format(date=write_date(day, style))
            rows[split].append(ShopRow(question, day.isoformat(), "date"))
    return rows


def qa_splits(seed: int = SHOP_SEED) -> dict[str, list[ShopRow]]:
    """Return the four splits, shuffled; the same seed gives the same rows."""
    random = Random(f"splits {seed}")
    parts = [make(random) for make in (fact_splits, wording_splits, date_splits)]
    splits = {split: [row for part in parts for row in part[split]] for split in SPLITS}
    for rows in splits.values():
        random.shuffle(rows)
    return splits


def write_splits(directory: Path, seed: int = SHOP_SEED) -> None:
    """Write one JSON Lines file per split."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, rows in qa_splits(seed).items():
        text = "".join(row.to_json() for row in rows)
        (directory / f"{split}.jsonl").write_text(text, encoding="utf-8")
