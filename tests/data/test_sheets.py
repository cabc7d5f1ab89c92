"""Rows of spreadsheets: values as they are shown, what is not read named, and bounds."""

from __future__ import annotations

import zipfile
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from qwen3ft.config import TrainingConfig
from qwen3ft.data.readers import sheets
from qwen3ft.data.readers.open import read_raw
from qwen3ft.data.readers.raw import RawRow, UnreadableFileError
from qwen3ft.data.sources import resolve_sources
from qwen3ft.errors import DataLoadingError
from qwen3ft.machine.installing import extra_command

MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
LINKS = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
PACKAGE = "http://schemas.openxmlformats.org/package/2006/relationships"
DATE_STYLE = (
    f'<styleSheet xmlns="{MAIN}"><fonts><font/></fonts><fills><fill/></fills><borders><border/>'
    '</borders><cellXfs><xf numFmtId="0"/><xf numFmtId="14" applyNumberFormat="1"/></cellXfs>'
    "</styleSheet>"
)


def text(value: str) -> str:
    """Return a cell of text."""
    return f'<c t="inlineStr"><is><t>{escape(value)}</t></is></c>'


def row(number: int, *cells: str, more: str = "") -> str:
    """Return a row of xlsx; cells that do not begin with < are texts."""
    placed = (
        (cell if cell.startswith("<") else text(cell)).replace("<c", f'<c r="{column}{number}"', 1)
        for column, cell in zip("ABCDEFG", cells, strict=False)
    )
    return f'<row r="{number}"{more}>{"".join(placed)}</row>'


def xlsx(path: Path, *pages: tuple[str, str, str]) -> Path:
    """Write a workbook; each page is (name, attributes, rows and what follows them)."""
    names = "".join(
        f'<sheet name="{name}" sheetId="{at}" r:id="rId{at}"{state}/>'
        for at, (name, state, _) in enumerate(pages, 1)
    )
    links = "".join(
        f'<Relationship Id="rId{at}" Type="{LINKS}/worksheet" Target="worksheets/s{at}.xml"/>'
        for at in range(1, len(pages) + 1)
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(
            "_rels/.rels",
            f'<Relationships xmlns="{PACKAGE}"><Relationship Id="r" '
            f'Type="{LINKS}/officeDocument" Target="xl/workbook.xml"/></Relationships>',
        )
        archive.writestr(
            "xl/workbook.xml",
            f'<workbook xmlns="{MAIN}" xmlns:r="{LINKS}"><sheets>{names}</sheets></workbook>',
        )
        archive.writestr(
            "xl/_rels/workbook.xml.rels",
            f'<Relationships xmlns="{PACKAGE}">{links}<Relationship Id="st" '
            f'Type="{LINKS}/styles" Target="styles.xml"/></Relationships>',
        )
        archive.writestr("xl/styles.xml", DATE_STYLE)
        for at, (_, _, rows) in enumerate(pages, 1):
            before, _, behind = rows.partition("|")
            archive.writestr(
                f"xl/worksheets/s{at}.xml",
                f'<worksheet xmlns="{MAIN}"><sheetData>{before}</sheetData>{behind}</worksheet>',
            )
    return path


def ods(path: Path, *tables: tuple[str, str]) -> Path:
    """Write a document of tables; each is (name, rows)."""
    spaces = "".join(
        f' xmlns:{name}="urn:oasis:names:tc:opendocument:xmlns:{name}:1.0"'
        for name in ("office", "table", "text", "style")
    )
    body = "".join(
        f'<table:table table:name="{name}">{rows}</table:table>' for name, rows in tables
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mimetype", "application/vnd.oasis.opendocument.spreadsheet")
        archive.writestr(
            "content.xml",
            f"<office:document-content{spaces}><office:body><office:spreadsheet>{body}"
            "</office:spreadsheet></office:body></office:document-content>",
        )
        archive.writestr("META-INF/manifest.xml", "<manifest/>")
    return path


def read_noted(path: Path, limit: int = 10_000) -> tuple[list[RawRow], list[str]]:
    """Return all rows of a file, and what is said of it."""
    notes: list[str] = []
    return list(read_raw(path, list, limit, notes.append)), notes


def test_cells_come_out_as_they_are_shown(tmp_path: Path) -> None:
    """Whole numbers without .0, dates by ISO, stored results of formulas; rows as numbered."""
    cells = ("<c><v>1</v></c>", '<c s="1"><v>45413</v></c>', '<c t="b"><v>1</v></c>')
    path = xlsx(
        tmp_path / "a.xlsx",
        (
            "问答",
            "",
            row(2, "question", "answer", "n", "day", "yes", "f")
            + row(
                3, "什么?", "<c><v>0.30000000000000004</v></c>", *cells, "<c><f>1+1</f><v>2</v></c>"
            )
            + row(4)
            + row(7, "two", "123456789012"),
        ),
    )
    rows, notes = read_noted(path)
    assert [found.line for found in rows] == [3, 7]
    assert list(rows[0].values.values()) == ["什么?", "0.3", "1", "2024-05-01", "TRUE", "2"]
    assert list(rows[1].values.values()) == ["two", "123456789012", "", "", "", ""]
    assert notes == ["sheet '问答'"]


def test_what_a_sheet_hides_is_named(tmp_path: Path) -> None:
    """Other sheets, hidden rows and columns, merged cells, formulas and cells without a value."""
    merged = '|<mergeCells count="1"><mergeCell ref="A3:A4"/></mergeCells>'
    path = xlsx(
        tmp_path / "a.xlsx",
        ("empty", "", ""),
        ("secret", ' state="hidden"', row(1, "q", "a") + row(2, "x", "y")),
        (
            "main",
            "",
            row(1, "q", "a")
            + row(2, "one", "1", more=' hidden="1"')
            + row(3, "two", "<c><f>1+1</f></c>")
            + row(5, "three", '<c t="e"><v>#N/A</v></c>')
            + merged,
        ),
        ("other", "", row(1, "q", "a") + row(2, "x", "y", more=' hidden="1"')),
    )
    rows, notes = read_noted(path)
    assert [found.values["q"] for found in rows] == ["one", "two", "three"]
    assert notes == [
        "sheet 'main'; not read: 'empty', 'secret' (hidden), 'other'",
        "ranges of merged cells (1): only the first cell of each has the text",
        "hidden rows (1) are read like the others",
        "formulas without a stored result (1) are empty; save the file in Excel",
        "cells with an error such as #N/A (1) are empty",
    ]


def test_ods_gives_the_same_rows(tmp_path: Path) -> None:
    """Its numbers are typed, and its rows may be hidden too."""

    def line(*values: str, more: str = "") -> str:
        cells = "".join(
            f'<table:table-cell office:value-type="float" office:value="{value}"/>'
            if value.replace(".", "").isdigit()
            else f'<table:table-cell office:value-type="string"><text:p>{value}</text:p>'
            "</table:table-cell>"
            for value in values
        )
        return f"<table:table-row{more}>{cells}</table:table-row>"

    hidden = ' table:visibility="filter"'
    path = ods(
        tmp_path / "a.ods",
        ("first", line("question", "答案") + line("q", "1.0") + line("r", "2.5", more=hidden)),
        ("second", line("x", more=hidden)),
    )
    rows, notes = read_noted(path)
    assert [(found.line, *found.values.values()) for found in rows] == [
        (2, "q", "1"),
        (3, "r", "2.5"),
    ]
    assert notes == [
        "sheet 'first'; not read: 'second'",
        "hidden rows (1) are read like the others",
    ]


def test_two_columns_of_one_name_are_refused_and_none_is_numbered(tmp_path: Path) -> None:
    """As in csv."""
    path = xlsx(tmp_path / "a.xlsx", ("s", "", row(1, "q", "a", "q") + row(2, "1", "2", "3")))
    with pytest.raises(UnreadableFileError, match="columns 1 and 3 are both called 'q'"):
        read_noted(path)
    path = xlsx(tmp_path / "b.xlsx", ("s", "", row(1, "q", "", "a") + row(2, "1", "2", "3")))
    assert read_noted(path)[0][0].values == {"q": "1", "(column 2)": "2", "a": "3"}


def test_a_row_that_is_too_large_costs_itself(tmp_path: Path) -> None:
    """And its beginning is kept."""
    long = row(2, "x" * 20_000, "y")
    path = xlsx(tmp_path / "a.xlsx", ("s", "", row(1, "q", "a") + long + row(3, "1", "2")))
    rows, _ = read_noted(path)
    assert [(found.line, found.reason) for found in rows] == [(2, "row_too_large"), (3, "")]
    assert rows[0].text.startswith("xxx")


def test_small_files_that_would_take_all_memory_are_refused(tmp_path: Path) -> None:
    """One unpacks to 1.5 GB; in the other, a far cell makes the sheet a table of 10^10 cells."""
    far = '<row r="1048576"><c r="XFD1048576"><v>1</v></c></row>'
    path = xlsx(tmp_path / "far.xlsx", ("s", "", row(1, "q", "a") + far))
    with pytest.raises(UnreadableFileError, match="1 GB of memory"):
        read_noted(path)
    path = xlsx(tmp_path / "bomb.xlsx", ("s", "", row(1, "q", "a")))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/media/zeros", b"\0" * 2**20)
    content = path.read_bytes()
    size = (2**20).to_bytes(4, "little")
    path.write_bytes(content.replace(size, (1_500_000_000).to_bytes(4, "little")))
    with pytest.raises(UnreadableFileError, match=r"unpacks to 1\.5 GB"):
        read_noted(path)


@pytest.mark.parametrize("content", [b"", b"PK\3\4 and no more", b"\xd0\xcf\x11\xe0 protected"])
def test_a_damaged_file_is_unreadable(tmp_path: Path, content: bytes) -> None:
    """Whatever it holds."""
    (tmp_path / "a.xlsx").write_bytes(content)
    with pytest.raises(UnreadableFileError, match="damaged"):
        read_noted(tmp_path / "a.xlsx")


def test_without_the_library_sheets_are_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder they are not read; named alone, they are an error."""
    monkeypatch.setattr(sheets, "find_spec", lambda _: None)
    xlsx(tmp_path / "a.xlsx", ("s", "", row(1, "q", "a")))
    (tmp_path / "b.csv").write_text("q,a\n1,2\n")
    files, _, skipped = resolve_sources(TrainingConfig(data_paths=(str(tmp_path),)))
    assert [file.path.name for file in files] == ["b.csv"]
    assert skipped[0].endswith(extra_command("sheets"))
    with pytest.raises(DataLoadingError) as caught:
        resolve_sources(TrainingConfig(data_paths=(str(tmp_path / "a.xlsx"),)))
    assert caught.value.next_command == extra_command("sheets")
