"""Files of results: CSV, one dataclass a file, a header, appended to and never rewritten."""

import csv
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any


def columns(kind: type) -> tuple[str, ...]:
    """The header of a file of such rows."""
    return tuple(f.name for f in fields(kind))


def append(path: Path, kind: type, rows: Iterable[Any]) -> None:
    """Add rows to a file, and the header to a new one; any file that is not ours is left alone."""
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        read(path, kind)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns(kind), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows({n: _text(value) for n, value in asdict(row).items()} for row in rows)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}.") from None


def read(path: Path, kind: type) -> list[Any]:
    """Read a file that `append` wrote; of any other say in one ValueError what is wrong with it."""
    expected = columns(kind)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *lines = csv.reader(file) if path.stat().st_size else [expected]
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, csv.Error):
        raise ValueError(f"{path} is not a CSV file.") from None
    if tuple(header) != expected:
        raise ValueError(f"{path} has other columns than this program writes; name another file.")
    numbers = {f.name for f in fields(kind) if f.type is not str}
    rows = []
    for at, line in enumerate(lines, start=2):
        try:
            cells = zip(expected, line, strict=True)
            rows.append(kind(*(_number(text) if n in numbers else text for n, text in cells)))
        except ValueError:
            raise ValueError(f"{path}: line {at} is not a row of results.") from None
    return rows


def _text(value: object) -> object:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def _number(text: str) -> float | None:
    return float(text) if text else None
