"""Files that a path stands for: files, folders, globs, and data sets of the hub."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import pytest

from qwen3ft.config import TrainingConfig
from qwen3ft.data.hub import (
    DatasetAccessError,
    DatasetNotFoundError,
    DatasetUnavailableError,
    glob_pattern,
    parse_hub_name,
    pin_dataset,
    select_files,
)
from qwen3ft.data.readers.open import read_raw
from qwen3ft.data.sources import pin_sources, resolve_sources, resolved
from qwen3ft.data.splits import DEV_NAMES
from qwen3ft.errors import DataLoadingError, DownloadError
from qwen3ft.records.data import SourceFile

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "89abcdef0123456789abcdef0123456789abcdef"


def row(text: str) -> bytes:
    """Return one line of a file."""
    return json.dumps({"question": text, "answer": "a"}).encode() + b"\n"


FILES = {
    "data/train-00000.jsonl": row("first"),
    "data/train-00001.jsonl": row("second"),
    "data/validation.jsonl": row("dev"),
    "test.csv": b"question,answer\nheld,out\n",
    "dataset_infos.json": b"{}",
    "load.py": b"raise SystemExit('this must never run')",
    "README.md": b"# A data set",
}
REPOS = {
    "owner/weather": FILES,
    "owner/unnamed": {"rows.jsonl": row("all"), "eval.jsonl": row("dev"), "latest.json": row("x")},
    "owner/empty": {"script.py": b""},
}


class FakeHub(BaseHTTPRequestHandler):
    """A hub with a few data sets, which notes every request."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        """Answer what a file is, before it is fetched."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer with the info of a data set, the list of names, or a file."""
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        if path == "/api/datasets":
            self.answer(200, json.dumps([{"id": name} for name in REPOS]).encode())
        elif path.startswith("/api/datasets/"):
            name, _, revision = path.removeprefix("/api/datasets/").partition("/revision/")
            self.info(name, revision)
        else:
            name, _, file = path.removeprefix("/datasets/").partition("/resolve/")
            commit, _, file = file.partition("/")
            content = REPOS[name][file]
            etag = hashlib.sha256(content).hexdigest()
            self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    def info(self, name: str, revision: str) -> None:
        """Answer with the commit and the files of a data set, or an error."""
        refusals = {"owner/gated": (403, "GatedRepo"), "owner/broken": (503, "")}
        if name in refusals or name not in REPOS:
            status, code = refusals.get(name, (404, "RepoNotFound"))
            self.answer(status, b"{}", {"X-Error-Code": code} if code else {})
        elif revision not in ("", "main", "old", "refs/pr/1", COMMIT, OLDER):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            commit = OLDER if revision in ("old", OLDER) else COMMIT
            files = [{"rfilename": file} for file in REPOS[name]]
            self.answer(200, json.dumps({"id": name, "sha": commit, "siblings": files}).encode())

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        """Send `body`, or only its length for a HEAD request."""
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Be quiet."""


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Start a hub on loopback, with empty caches; return the list of its requests."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    FakeHub.asked.clear()
    yield FakeHub.asked
    server.shutdown()
    server.server_close()


@pytest.fixture
def ask(tmp_path: Path) -> Any:
    """Return a function from training paths to their files, with a cache of its own."""

    def files(*paths: str, **more: Any) -> list[SourceFile]:
        config = TrainingConfig(data_paths=paths, cache_dir=str(tmp_path / "cache"), **more)
        return resolve_sources(config)[0]

    return files


def labels(files: list[SourceFile]) -> list[str]:
    """Return the labels of files, without the hub's prefix."""
    return [file.label.removeprefix("hf://datasets/") for file in files]


def test_a_glob_gives_its_readable_files_sorted(tmp_path: Path, ask: Any) -> None:
    """** is any depth of folders; hidden and unsupported files are skipped; none is an error."""
    names = ("a.jsonl", "x/b.jsonl.GZ", "x/y/c.csv", "x/y/d.tsv.zst", "x/.h.jsonl", "x/n.txt")
    for name in names:
        path = tmp_path / "rows" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("{}")
    root = str(tmp_path / "rows")

    def found(pattern: str) -> list[str]:
        return [str(file.path.relative_to(root)) for file in ask(f"{root}/{pattern}")]

    assert found("**/*") == ["a.jsonl", "x/b.jsonl.GZ", "x/y/c.csv", "x/y/d.tsv.zst"]
    assert found("**/*.jsonl*") == ["a.jsonl", "x/b.jsonl.GZ"]
    assert found("*/[by]*") == ["x/b.jsonl.GZ"]
    assert found("") == found("**/*")
    with pytest.raises(DataLoadingError, match="matches no file") as caught:
        ask(f"{root}/*.parquet")
    assert caught.value.next_command == f"ls -lR {root}"


def test_a_path_that_exists_is_never_taken_for_a_glob_or_the_hub(
    tmp_path: Path, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brackets in a name, and a folder named like a data set."""
    monkeypatch.chdir(tmp_path)
    for name in ("rows[1].jsonl", "owner/weather/a.csv"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("{}")
    assert labels(ask("rows[1].jsonl", "owner/weather")) == ["rows[1].jsonl", "owner/weather/a.csv"]


def test_the_digest_is_over_the_bytes_on_disk(tmp_path: Path) -> None:
    """The same rows compressed in another way are another file."""
    import gzip

    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(row("x"), mtime=1))
    [file] = resolved(TrainingConfig(data_paths=(str(path),), cache_dir=str(tmp_path))).files
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("hf://datasets/o/n", ("o/n", None, None)),
        ("hf://datasets/o/n@main", ("o/n", "main", None)),
        ("hf://datasets/o/n@refs%2Fpr%2F1/data/*.csv", ("o/n", "refs/pr/1", "data/*.csv")),
        ("hf://datasets/o/n/a@b.jsonl", ("o/n", None, "a@b.jsonl")),
        ("o/n", ("o/n", None, None)),
        ("o/n@v1.0", ("o/n", "v1.0", None)),
        ("o/rows.jsonl", None),
        ("o/rows.csv.gz", None),
        ("./n", None),
        ("../n", None),
        ("a/b/c", None),
        ("/a/b", None),
        ("rows", None),
        ("data/*", None),
    ],
)
def test_paths_that_name_a_data_set(given: str, expected: Any) -> None:
    """Two words with a slash and no known suffix, or anything that starts with the hub's prefix."""
    asked = parse_hub_name(given)
    assert (asked and (asked.name, asked.revision, asked.glob)) == expected


@pytest.mark.parametrize("given", ["hf://datasets/", "hf://datasets/name", "hf://datasets/a b/c"])
def test_an_address_that_names_nothing_is_refused(given: str) -> None:
    """The hub is not asked."""
    with pytest.raises(DatasetNotFoundError, match="not a valid name of a data set"):
        parse_hub_name(given)


@pytest.mark.parametrize(
    ("glob", "matching", "other"),
    [
        ("data/**/*.jsonl", ["data/a.jsonl", "data/x/y/a.jsonl"], ["a.jsonl", "data/a.json"]),
        ("*.csv", ["a.csv"], ["data/a.csv", "axcsv"]),
        ("data", ["data", "data/a.csv", "data/x/a.csv"], ["data2/a.csv"]),
        ("data/", ["data/a.csv"], ["data2/a.csv"]),
        ("**", ["a.csv", "x/y/a.csv"], []),
        ("a?[!b-d][x]", ["aaax"], ["aabx", "aaa/", "a/ax"]),
    ],
)
def test_a_glob_means_the_same_on_the_hub(glob: str, matching: Any, other: Any) -> None:
    """One star stays inside a folder, two do not; a folder means all files below it."""
    pattern = glob_pattern(glob)
    assert all(pattern.fullmatch(path) for path in matching)
    assert not any(pattern.fullmatch(path) for path in other)


def test_files_are_chosen_by_the_words_in_their_paths() -> None:
    """Training takes files with 'train', or else all not held out; other roles take their own."""
    named = ["data/train-0.parquet", "data/test-0.parquet", "dev/a.parquet", "trainer/valid.csv"]
    assert select_files(named, "train") == ["data/train-0.parquet", "trainer/valid.csv"]
    assert select_files(named, "test") == ["data/test-0.parquet"]
    assert select_files(named, "dev") == ["dev/a.parquet", "trainer/valid.csv"]
    unnamed = ["a.csv", "latest.csv", "devices.csv", "x_eval.csv", "test.csv", "validation/b.csv"]
    assert select_files(unnamed, "train") == ["a.csv", "latest.csv"]


@pytest.mark.parametrize("name", DEV_NAMES)
def test_a_held_out_file_is_called_the_same_in_a_folder_and_on_the_hub(
    tmp_path: Path, name: str
) -> None:
    """And a file is no description of a data set because its name begins like one."""
    assert select_files([f"{name}.jsonl", "valley.jsonl"], "train") == ["valley.jsonl"]
    assert select_files([f"{name}.jsonl", "valley.jsonl"], "dev") == [f"{name}.jsonl"]
    for file in (f"{name}.jsonl", "valley.jsonl", "state.csv", "state.json"):
        (tmp_path / file).touch()
    config = TrainingConfig(model_name="embedded", data_paths=(str(tmp_path),))
    files, _, skipped = resolve_sources(config)
    assert {file.path.name: file.role for file in files} == {
        "valley.jsonl": "train",
        "state.csv": "train",
        f"{name}.jsonl": "dev",
    }
    assert len(skipped) == 1


def test_a_data_set_is_read_at_its_commit_and_its_script_never(
    fake_hub: list[str], ask: Any
) -> None:
    """A bare name gives the training files, labelled with the commit, read by our own readers."""
    files = ask("owner/weather")
    assert labels(files) == [f"owner/weather@{COMMIT}/data/train-0000{n}.jsonl" for n in (0, 1)]
    rows = [raw.values["question"] for file in files for raw in read_raw(file.path, list)]
    assert rows == ["first", "second"]
    assert not any(path.endswith((".py", ".md", "infos.json")) for path in fake_hub)


def test_each_role_takes_its_own_files(fake_hub: list[str], ask: Any) -> None:
    """The same name under dev and test gives the held-out files."""
    files = ask("owner/unnamed", dev_paths=("owner/weather",), test_paths=("owner/weather",))
    assert [(file.role, file.path.name) for file in files] == [
        ("train", "latest.json"),
        ("train", "rows.jsonl"),
        ("dev", "validation.jsonl"),
        ("test", "test.csv"),
    ]


def test_a_glob_and_a_revision_choose_files(fake_hub: list[str], ask: Any) -> None:
    """A branch with a slash and a full commit work too."""
    given = "hf://datasets/owner/weather"
    assert labels(ask(f"{given}@old/*.csv")) == [f"owner/weather@{OLDER}/test.csv"]
    assert labels(ask(f"{given}@refs%2Fpr%2F1/test.csv")) == [f"owner/weather@{COMMIT}/test.csv"]
    assert labels(ask(f"{given}@{OLDER}/data/*1.jsonl")) == [
        f"owner/weather@{OLDER}/data/train-00001.jsonl"
    ]


def test_fingerprints_hold_label_and_content(fake_hub: list[str], tmp_path: Path) -> None:
    """Two files of equal content stay two; the digest is that of the file."""
    config = TrainingConfig(
        data_paths=("hf://datasets/owner/weather/data/train*",), cache_dir=str(tmp_path)
    )
    [first, _] = resolved(config).fingerprints
    digest = hashlib.sha256(FILES["data/train-00000.jsonl"]).hexdigest()
    label = f"hf://datasets/owner/weather@{COMMIT}/data/train-00000.jsonl"
    assert first == [label, digest, "train"]


def test_without_network_the_same_files_are_found_again(
    fake_hub: list[str], ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files fetched before are read; others are an error of their own."""
    before = ask("owner/weather")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert ask("owner/weather") == before
    with pytest.raises(DatasetUnavailableError, match="owner/weather"):
        ask("hf://datasets/owner/weather/test.csv")


def test_a_pinned_data_set_asks_nothing_once_it_is_cached(
    fake_hub: list[str], ask: Any, tmp_path: Path
) -> None:
    """A full commit means the same files for ever."""
    pinned = pin_dataset("owner/weather", tmp_path / "cache")
    assert pinned == f"hf://datasets/owner/weather@{COMMIT}"
    assert pin_dataset(pinned, tmp_path / "cache") == pinned
    assert pin_dataset("rows.jsonl", tmp_path / "cache") == "rows.jsonl"
    before = ask(pinned)
    fake_hub.clear()
    assert ask(pinned) == before
    assert fake_hub == []


def test_a_config_is_pinned_where_it_names_the_hub_alone(
    fake_hub: list[str], tmp_path: Path
) -> None:
    """Local paths, bundled rows and globs stay; sample data may stand in for an unknown name."""
    local = tmp_path / "rows.jsonl"
    local.write_text("{}")
    config = TrainingConfig(
        data_paths=("owner/weather", str(local), "embedded:train", "data/*.jsonl"),
        cache_dir=str(tmp_path / "cache"),
    )
    pinned = (f"hf://datasets/owner/weather@{COMMIT}", *config.data_paths[1:])
    assert pin_sources(config).data_paths == pinned
    unknown = config.model_copy(update={"data_paths": ("owner/wether",)})
    with pytest.raises(DatasetNotFoundError):
        pin_sources(unknown)
    allowed = unknown.model_copy(update={"allow_sample_data": True})
    assert pin_sources(allowed) == allowed


@pytest.mark.parametrize(
    ("given", "expected", "message"),
    [
        ("owner/wether", DatasetNotFoundError, "Did you mean owner/weather"),
        ("owner/weather@v9", DatasetNotFoundError, "no revision 'v9'"),
        ("hf://datasets/owner/weather/none*", DatasetNotFoundError, "data/train-00000.jsonl"),
        ("owner/empty", DatasetNotFoundError, "0 data files"),
        ("owner/gated", DatasetAccessError, "gated"),
        ("owner/broken", DownloadError, "503"),
    ],
)
def test_each_reason_for_having_no_data_is_its_own_error(
    fake_hub: list[str], ask: Any, given: str, expected: type[Exception], message: str
) -> None:
    """Unknown, gated and broken data sets have errors of their own, each with a next command."""
    with pytest.raises(expected, match=message) as caught:
        ask(given)
    assert type(caught.value) is expected
    assert caught.value.next_command  # type: ignore[attr-defined]


def test_no_network_and_no_copy_is_an_error_that_names_the_missing_path_too(
    ask: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A bare name may have been meant as a folder."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DatasetUnavailableError, match="There is no path my/rows"):
        ask("my/rows")


UNREAD = {
    "notes.txt": ("name it .tsv or .csv", "head {}"),
    "README.md": ("write its questions and answers", "ls -l {}"),
    "report.docx": ("write its questions and answers", "ls -l {}"),
    "paper.PDF": ("write its questions and answers", "ls -l {}"),
    "old.xls": ("save it as xlsx or csv", "libreoffice --headless --convert-to xlsx {}"),
    "rows.ndjson": ("name it .jsonl", "mv {} {folder}/rows.jsonl"),
    "all.zip": ("unpack it", "unzip {}"),
    "rows.csv.bz2": ("unpack it", "bunzip2 -k {}"),
    "set.tar.gz": ("unpack it", "tar -xf {}"),
    "load.py": ("never run", "ls -l {}"),
    "table.feather": ("convert it to csv, jsonl or parquet", "ls -l {}"),
    "LICENSE": ("no ending", "ls -l {}"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_file_that_no_reader_takes_is_named_with_what_to_do(tmp_path: Path, name: str) -> None:
    """In a folder and by a glob beside others, and alone as an error with the command."""
    why, command = UNREAD[name]
    path = tmp_path / name
    path.write_text("x")
    for given in (str(tmp_path), str(tmp_path / "*"), str(path)):
        with pytest.raises(DataLoadingError) as caught:
            resolve_sources(TrainingConfig(data_paths=(given,)))
        assert why in f"{caught.value.what} {caught.value.why}"
    assert caught.value.next_command == command.format(path, folder=tmp_path)
    (tmp_path / "good.jsonl").write_bytes(row("q"))
    for given in (str(tmp_path), str(tmp_path / "*")):
        files, _, [skipped] = resolve_sources(TrainingConfig(data_paths=(given,)))
        assert [file.path.name for file in files] == ["good.jsonl"]
        assert skipped.startswith(f"{path}: ")
        assert why in skipped
