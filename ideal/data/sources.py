"""Sources: files, folders and hub data sets -> rows as they are."""

import csv
import difflib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import fsspec

from ideal.data.config import Source, SourceConfig
from ideal.distributed import is_main
from ideal.errors import UserError

BUILDERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
}
COMPRESSIONS = {".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip"}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
ONE_SPLIT = r"[A-Za-z][\w.]*(?:\[[^\]]*\])?"
PATH_AND_SPLIT = re.compile(rf"(.+?):({ONE_SPLIT}(?:\+{ONE_SPLIT})*)")


@dataclass(frozen=True)
class Rows:
    """The rows of one source, and how to say where one of them stands."""

    dataset: datasets.Dataset
    source: str
    files: tuple[Path, ...]
    sliced: bool

    @property
    def from_json(self) -> bool:
        """Whether they come from local JSON, where a missing value means that the row itself is at fault."""
        return bool(self.files) and builder_of(self.files[0]) == "json"

    def check_text(self, key: str) -> None:
        """Looks for what is wrong with the text of local JSON files.

        Raises:
            UserError: with the file and the line.
        """
        for file in self.files if self.from_json else ():
            check_json(file, key)

    def place(self, row: int) -> str:
        """Row `row` (from 0) in words: its file and line for JSON lines, else its number (from 1)."""
        if self.from_json and not self.sliced:
            seen = 0
            for file in self.files:
                for line, _ in json_lines(file):
                    if seen == row:
                        return f"{file}, line {line}"
                    seen += 1
        if len(self.files) == 1 and not self.sliced:
            return f"{self.files[0]}, row {row + 1}"
        return f"{self.source}, row {row + 1}"


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Shows or hides the progress bars of `datasets`, and hides them on every rank but 0."""
    before = datasets.are_progress_bars_disabled()
    if not (shown and is_main()):
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            datasets.enable_progress_bars()


def describe(source: Source) -> str:
    """A source as the user could have written it in one string."""
    if isinstance(source, str):
        return source
    return (
        source.path
        + (f" ({source.name})" if source.name else "")
        + (f":{source.split}" if source.split else "")
    )


def builder_of(path: Path) -> str | None:
    """The `datasets` builder that reads a file of this name, compressed or not; None: not a data file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return BUILDERS.get(suffixes[-1]) if suffixes else None


def data_files(folder: Path) -> list[Path]:
    """Every data file under `folder`, sorted, hidden ones left out."""
    found = [path for path in folder.rglob("*") if path.is_file() and builder_of(path)]
    return sorted(
        path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def files_for(folder: Path, role: str) -> list[Path]:
    """The files of `folder` for a role or split: train.jsonl, train-00000-of-00002.parquet, train/*."""

    def named(path: Path) -> bool:
        first = path.relative_to(folder).parts[0]
        return first == role or re.match(rf"{re.escape(role)}[.-]", first) is not None

    return [path for path in data_files(folder) if named(path)]


def read_rows(source: Source, role: str, key: str) -> Rows:
    """Reads a source.

    Args:
        source: what the user wrote.
        role: train, reference or test: which files of a folder are meant.
        key: where the user wrote it, for messages (data.domains.math.train).

    Raises:
        UserError: it is missing, empty, unreadable or malformed, with the file and line where there is one.
    """
    given = split_source(source)
    path = Path(given.path).expanduser()
    if path.exists():
        if given.name:
            raise UserError(
                f"{key}.name: {given.name} is for hub data sets, but {given.path} is a local {_kind(path)}"
            )
        return _read_local(given, path, role, key)
    if _looks_local(given.path):
        raise UserError(f"{key}: there is no file or folder {given.path}{_nearest(path)}")
    return _read_hub(given, role, key)


def split_source(source: Source) -> SourceConfig:
    """`PATH:SPLIT` taken apart; a path that exists as it is written is left alone."""
    if isinstance(source, SourceConfig):
        return source
    parts = PATH_AND_SPLIT.fullmatch(source)
    if parts and not Path(source).expanduser().exists():
        return SourceConfig(path=parts[1], split=parts[2])
    return SourceConfig(path=source)


def _kind(path: Path) -> str:
    return "folder" if path.is_dir() else "file"


def _looks_local(path: str) -> bool:
    """Whether a path that does not exist can only have been meant as a local one."""
    is_path = path.startswith((".", "/", "~")) or builder_of(Path(path)) is not None
    return is_path or HUB_NAME.fullmatch(path) is None or Path(path).parent.is_dir()


def _nearest(path: Path) -> str:
    """The existing name that is nearest to a missing path's, as the rest of a sentence."""
    parent, name = path.parent, path.name
    while not parent.exists() and parent != parent.parent:
        parent, name = parent.parent, parent.name
    near = difflib.get_close_matches(name, [entry.name for entry in parent.iterdir()], n=1, cutoff=0.5)
    return f"; did you mean {parent / near[0]}?" if near else f" (looked in {parent.absolute()})"


def _read_local(given: SourceConfig, path: Path, role: str, key: str) -> Rows:
    split = given.split or role
    base = re.split(r"[\[+]", split)[0]
    if path.is_dir():
        files = files_for(path, base) or ([] if given.split else data_files(path))
        if not files:
            raise UserError(f"{key}: the folder {path} holds no {base}.* (JSONL, JSON, Parquet or CSV)")
    else:
        files = [path]
    builders = {builder_of(file) for file in files}
    if len(builders) > 1:
        raise UserError(
            f"{key}: {path} mixes kinds of files ({', '.join(file.name for file in files[:4])}); name one"
        )
    builder = builders.pop()
    if builder is None:
        raise UserError(
            f"{key}: cannot tell what {path} is from its name; known are {', '.join(BUILDERS)}, "
            f"also with {', '.join(sorted(COMPRESSIONS))}"
        )
    files = [file for file in files if file.stat().st_size]
    if not files:
        raise UserError(f"{key}: {path} is empty")
    dataset = _load_files(builder, files, base, split, key)
    if not len(dataset):
        raise UserError(f"{key}: {describe(given)} holds no rows")
    name = _names(files) + (f":{split}" if split != base else "")
    return Rows(dataset, name, tuple(files), sliced=split != base)


def _load_files(builder: str, files: list[Path], base: str, split: str, key: str) -> datasets.Dataset:
    options = _csv_options(files, key) if builder == "csv" else {}
    paths = [str(file.absolute()) for file in files]
    try:
        with _undisturbed():
            return datasets.load_dataset(builder, data_files={base: paths}, split=split, **options)
    except Exception as error:  # the builders raise whatever their parsers do
        if builder == "json":
            for file in files:
                check_json(file, key)
        if "corresponds to no data" in str(error):
            raise UserError(f"{key}: {_names(files)} holds no rows") from error
        raise UserError(f"{key}: cannot read {_names(files)}: {_first_line(error)}") from error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Local files are read without a bar, without a log of errors that we report ourselves, and without the
    request to the hub by which `datasets` counts every load (seconds where there is no network)."""
    verbosity, counts = datasets.logging.get_verbosity(), datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        with progress_bars(False):
            yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts


def _names(files: list[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


def _first_line(error: BaseException) -> str:
    """What went wrong, without the layers that only say that something did."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _csv_options(files: list[Path], key: str) -> dict[str, Any]:
    """Reads every column as text: an answer may be 42, and the answer None is no missing value."""
    separator = "\t" if ".tsv" in files[0].name.lower() else ","
    try:
        with _open(files[0], "rt", encoding="utf-8-sig", newline="") as stream:
            header = next(csv.reader(stream, delimiter=separator), [])
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{key}: cannot read {files[0]}: {_first_line(error)}") from error
    names = [name or f"Unnamed: {number}" for number, name in enumerate(header)]  # as pandas names them
    features = datasets.Features({name: datasets.Value("string") for name in names})
    return {"features": features, "sep": separator, "keep_default_na": False}


def _open(path: Path, mode: str, **options: Any) -> Any:
    return fsspec.open(str(path.absolute()), mode, compression="infer", **options)


def json_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a JSON lines file that are not blank, numbered from 1; nothing if it is one JSON array."""
    with _open(file, "rb") as stream:
        start = True
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            if start and line.lstrip().startswith(b"["):
                return
            start = False
            yield number, line


def check_json(file: Path, key: str) -> None:
    """Finds what is wrong with a JSON file that its builder refused.

    Raises:
        UserError: with the file and the line.
    """
    seen = False
    kinds: dict[str, tuple[str, int]] = {}
    for number, line in json_lines(file):
        seen = True
        place = f"{key}: {file}, line {number}"
        for name, value in _parse_row(line, place).items():
            if value is not None:
                kind, first = kinds.setdefault(name, (_json_kind(value), number))
                if kind != _json_kind(value):
                    raise UserError(f"{place}: '{name}' is {_json_kind(value)}, but {kind} in line {first}")
    if seen:
        return
    try:
        with _open(file, "rb") as stream:
            text = stream.read().decode()
        rows = json.loads(text) if text.strip() else []
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {file} is not UTF-8 text ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{key}: {file}, line {error.lineno}: not valid JSON ({error.msg})") from error
    if not rows:
        raise UserError(f"{key}: {file} holds no rows")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{key}: {file}, row {number}: {_json_kind(row)} where an object is needed")


def _parse_row(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place}: not valid JSON ({error.msg}, column {error.colno}); mend or remove it"
        ) from error
    if not isinstance(row, dict):
        raise UserError(f'{place}: {_json_kind(row)} where an object is needed, {{"column": value, ...}}')
    return row


def _json_kind(value: Any) -> str:
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
        type(None): "null",
    }
    return kinds[type(value)]


def _read_hub(given: SourceConfig, role: str, key: str) -> Rows:
    # A reference or test set on the hub without a split is most often its test split; guessing is refused.
    if given.split is None and role != "train":
        raise UserError(f"{key}: which split of {given.path}? Write {given.path}:test, for example")
    split = given.split or "train"
    try:
        with progress_bars(True):
            dataset = datasets.load_dataset(given.path, name=given.name, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"{key}: {given.path} is neither a local file or folder nor a data set on the hub "
            "(a private or gated one needs `hf auth login`)"
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise UserError(
            f"{key}: {given.path} is no local file or folder, and the hub cannot be reached "
            f"({_first_line(error)})"
        ) from error
    except Exception as error:  # whatever the data set's files and the hub's client raise
        raise UserError(f"{key}: cannot load {describe(given)} from the hub: {_first_line(error)}") from error
    if not len(dataset):
        raise UserError(f"{key}: {describe(given)} holds no rows")
    return Rows(dataset, describe(given), (), sliced="[" in split)
