"""The files of a leaderboard, each written whole, in output_dir."""

import json
import textwrap
from pathlib import Path

from ideal.compare.tables import (
    COSTS,
    as_csv,
    changes_table,
    controls_in_words,
    cost_table,
    explained,
    losses_table,
    markdown,
    state_in_words,
)
from ideal.report.files import Json, write_atomically
from ideal.report.tables import WIDTH, as_text
from ideal.run_folder import read_json, remove

JSON_FILE = "leaderboard.json"


def write_leaderboard(folder: Path, content: Json) -> None:
    """leaderboard.json, .md, .csv."""
    texts = {
        JSON_FILE: json.dumps(content, indent=2, allow_nan=False) + "\n",
        "leaderboard.md": markdown(content),
        "leaderboard.csv": as_csv(content),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())


def clear_leaderboard(folder: Path) -> None:
    """Removes what `write_leaderboard` has written."""
    for path in [*folder.glob("leaderboard.*"), folder / "figures"]:
        remove(path)


def console_tables(folder: Path) -> str:
    """The leaderboard as text, and where its files are."""
    content = read_json(folder / JSON_FILE)
    tables = [as_text(table) for table in (losses_table(content), changes_table(content), cost_table(content)) if table]
    words = [*state_in_words(content), *explained(content), COSTS, *controls_in_words(content)]
    lines = [textwrap.fill(sentence, WIDTH) for sentence in words]
    return "\n\n".join([*tables, "\n".join(lines), f"In {folder}: {', '.join(files(folder))}, and a folder per method"])


def files(folder: Path) -> list[str]:
    """The leaderboard's files."""
    return sorted(path.name for path in folder.glob("leaderboard.*"))
