"""The contracts: configuration, errors, records, logs, and how the code is written."""

from __future__ import annotations

import ast
import json
import logging
import pickle
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import validate
from support.plans import QWEN3_4B

import qwen3ft
from flows.cli.options import read_overrides
from flows.finetune import qwen3_finetune
from qwen3ft import config, errors, logs
from qwen3ft.config import TrainingConfig, load_config, parse_config
from qwen3ft.errors import ConfigError, FinetuneError, error_kinds
from qwen3ft.model.shapes import find_shape

ROOT = Path(__file__).parents[1]


def test_the_defaults_are_the_specified_ones() -> None:
    """The ten fields of the specification hold its values."""
    defaults = TrainingConfig()
    assert defaults.model_name == "Qwen/Qwen3-4B-Thinking-2507"
    assert defaults.output_dir == "./qwen3-finetuned"
    assert defaults.max_memory_gb == 13.0
    assert (defaults.batch_size, defaults.gradient_accumulation_steps) == (4, 16)
    assert defaults.learning_rate == 5e-5
    assert defaults.num_epochs == 100
    assert defaults.max_sequence_length == 256
    assert (defaults.lora_r, defaults.lora_alpha) == (6, 12)


def test_every_setting_says_what_it_is() -> None:
    """Prefect shows the descriptions as the run's form; none may be missing."""
    for name, field in TrainingConfig.model_fields.items():
        assert field.description, name


def test_all_problems_of_a_config_are_reported_at_once() -> None:
    """Three mistakes give one error naming all three and the values given."""
    with pytest.raises(ConfigError) as caught:
        parse_config({"lora_r": 0, "learning_rate": -1, "learning_rat": 1})
    text = str(caught.value)
    assert "3 invalid" in text
    assert all(part in text for part in ("lora_r", "learning_rate", "learning_rat", "-1"))
    assert "Next: " in text


def test_a_config_file_is_overridden_by_settings(tmp_path: Path) -> None:
    """Order: defaults, then the file, then overrides."""
    path = tmp_path / "config.yaml"
    path.write_text("lora_r: 8\nbatch_size: 2\n")
    found = load_config(path, {"batch_size": 3})
    assert (found.lora_r, found.batch_size, found.lora_alpha) == (8, 3, 12)


OLD, NEW = {"when_card_is_busy": "refuse"}, {"when_gpu_is_busy": "wait"}


def test_the_old_name_of_a_setting_is_accepted_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a file, as an override, and in a flow run's parameters."""
    path = tmp_path / "config.yaml"
    path.write_text("when_card_is_busy: refuse\n")
    for read in (
        lambda: load_config(path),
        lambda: load_config(None, OLD),
        lambda: parse_config(read_overrides(["when_card_is_busy=refuse"])),
        lambda: qwen3_finetune.validate_parameters({"config": OLD})["config"],
    ):
        caplog.clear()
        assert read().when_gpu_is_busy == "refuse"
        [message] = [record.getMessage() for record in caplog.records]
        assert message.startswith("setting when_card_is_busy is now when_gpu_is_busy;")


def test_an_override_replaces_an_old_name_in_the_file(tmp_path: Path) -> None:
    """Whichever of the two names the file and the override use."""
    path = tmp_path / "config.yaml"
    for written, override in (("when_card_is_busy", NEW), ("when_gpu_is_busy", OLD)):
        path.write_text(f"{written}: {'refuse' if override is NEW else 'wait'}\n")
        expected = next(iter(override.values()))
        assert load_config(path, override).when_gpu_is_busy == expected


def test_a_setting_cannot_be_given_by_both_of_its_names() -> None:
    """The error names both."""
    with pytest.raises(ConfigError, match=r"when_card_is_busy.*when_gpu_is_busy"):
        parse_config(OLD | NEW)


def test_a_removed_setting_is_ignored_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning names what takes its place."""
    monkeypatch.setitem(config.REMOVED_SETTINGS, "gone", "it is an option of qwen3ft export")
    assert parse_config({"gone": 3}) == TrainingConfig()
    assert "gone is ignored: it is an option of qwen3ft export" in caplog.text


def test_prefect_accepts_old_names_and_refuses_unknown_ones() -> None:
    """Its server checks a run's parameters against the flow's schema, not against the code."""
    schema = parameter_schema(qwen3_finetune).model_dump_for_openapi()
    validate({"config": OLD}, schema, raise_on_error=True)
    assert validate({"config": {"when_card_is_busi": "wait"}}, schema)


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "\x00"])
def test_a_broken_config_file_is_a_config_error(tmp_path: Path, content: str) -> None:
    """Whatever is wrong with the file, the error names it."""
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_config(path)


def test_every_error_survives_json_and_pickle() -> None:
    """Kind, text and facts of every class of the tree come back unchanged."""
    for kind in error_kinds():
        error = kind("12 of 13 GB", why="because", next_command="qwen3ft doctor", step=3)
        for copy in (
            pickle.loads(pickle.dumps(error)),
            FinetuneError.from_dict(json.loads(json.dumps(error.to_dict()))),
        ):
            assert type(copy) is kind
            assert copy.to_dict() == error.to_dict()


def test_the_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    """Every class is drawn, and nothing is drawn that does not exist."""
    drawn = {word for word in (errors.__doc__ or "").split() if word.endswith("Error")}
    defined = {kind.__name__ for kind in error_kinds() if kind.__module__ == errors.__name__}
    assert drawn == defined


def test_the_named_errors_of_the_specification_exist() -> None:
    """Nine names are promised."""
    for name in (
        "OutOfMemoryError",
        "InsufficientMemoryError",
        "MemoryLeakError",
        "ModelNotFoundError",
        "QuantizationError",
        "TokenizerError",
        "TrainingFailureError",
        "DataLoadingError",
        "SaveError",
    ):
        assert issubclass(getattr(errors, name), FinetuneError)


def test_parameter_counts_of_known_models() -> None:
    """Counted from the shape, Qwen3-4B has 4.02 B parameters, of which 3.63 B are quantised."""
    _, shape = find_shape("4b")
    assert shape.total_parameters == 4_022_468_096
    assert QWEN3_4B.linear_parameters == 36 * 100_925_440


def test_public_names_are_there_and_import_no_torch() -> None:
    """`import qwen3ft` is instant; the classes of the specification come on first use."""
    for name in qwen3ft.__all__:
        assert getattr(qwen3ft, name).__name__ == name
    program = "import sys; from qwen3ft import TrainingConfig; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert printed.stdout.strip() == "False"


@pytest.mark.parametrize(
    "secret",
    [
        "hf_abcdefghijklmnopqrstuvwx",
        "sk-abcdefghijklmnopqrstuvwx",
        "AKIAABCDEFGHIJKLMNOP",
        "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    ],
)
def test_secrets_never_reach_a_log(tmp_path: Path, secret: str) -> None:
    """Tokens in messages and in tracebacks are masked before any handler has them."""
    path = tmp_path / "log.jsonl"
    logs.configure(console=False, json_path=path)
    try:
        raise ValueError(f"bad token {secret}")
    except ValueError:
        logs.get_logger("test").exception("failed with %s", secret)
    finally:
        logs.configure(console=False)
    entry = json.loads(path.read_text())
    assert secret not in path.read_text()
    assert "***" in entry["message"]
    assert "***" in entry["traceback"]
    record = logging.LogRecord("qwen3ft.x", logging.INFO, "", 0, f"x {secret}", None, None)
    assert logs.get_logger("x").filter(record)
    assert secret not in logs.ConsoleFormatter("%(name)s %(message)s").format(record)


def test_a_password_in_an_address_is_masked() -> None:
    """The user and password of a URL go, the host stays."""
    masked = logs.mask_secrets("postgresql://me:secret@db.example/x")
    assert masked == "postgresql://***@db.example/x"


# --- how the code is written ---

PRODUCT = ("qwen3ft", "flows", "tasks", "deployments")
MODULES = {
    path: ast.parse(path.read_text(encoding="utf-8"))
    for folder in PRODUCT
    for path in sorted((ROOT / folder).rglob("*.py"))
}
MOST_MODULES = 22


def test_no_docstring_opens_with_a_question_word() -> None:
    """Docstrings begin with a verb or a noun; so do strings under constants, and descriptions."""
    opening = re.compile(r"\s*(What|Whether|Of|How|Those|Which)\b")
    found = []
    for path, tree in MODULES.items():
        for node in ast.walk(tree):
            described = isinstance(node, ast.keyword) and node.arg == "description"
            text = node.value if described or isinstance(node, ast.Expr) else None
            if not isinstance(text, ast.Constant) or not isinstance(text.value, str):
                continue
            if opening.match(text.value):
                found.append(f"{path.relative_to(ROOT)}:{text.lineno}: {text.value[:60]}")
    assert not found, "\n".join(found)


def test_nothing_is_called_told() -> None:
    """A name says what the thing is: a message, labels, lines, warnings."""
    found = []
    for path, tree in MODULES.items():
        for node in ast.walk(tree):
            names = [getattr(node, field, None) for field in ("id", "arg", "name", "attr")]
            if {"told", "_told"} & {name for name in names if isinstance(name, str)}:
                found.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', '?')}")
    assert not found, "\n".join(found)


def test_every_public_name_is_defined_in_one_module() -> None:
    """Top-level names without an underscore; a module's `logger` is its own."""
    homes: dict[str, set[str]] = {}
    for path, tree in MODULES.items():
        for node in tree.body:
            names: list[str] = []
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names = [node.name]
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                parts = (part for target in targets for part in ast.walk(target))
                names = [part.id for part in parts if isinstance(part, ast.Name)]
            for name in names:
                if not name.startswith("_") and name != "logger":
                    homes.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    twice = {name: sorted(places) for name, places in homes.items() if len(places) > 1}
    assert not twice


def test_no_folder_is_too_full_to_find_anything() -> None:
    """A package of more modules wants to be two."""
    counts = Counter(path.parent for path in MODULES if path.name != "__init__.py")
    assert {folder: n for folder, n in counts.items() if n > MOST_MODULES} == {}


def test_every_module_of_tests_has_a_name_of_its_own() -> None:
    """Pytest imports them by their names alone, and refuses the second of two."""
    folders = (ROOT / "tests", ROOT / "benchmarks" / "tests")
    names = Counter(path.name for folder in folders for path in folder.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
