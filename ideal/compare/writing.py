"""The files of a leaderboard, each written whole, in output_dir."""

import json
import textwrap
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from ideal.compare.figures import rendered
from ideal.compare.leaderboard import RunNumbers, leaderboard
from ideal.compare.tables import (
    COSTS,
    as_csv,
    benchmarks_in_words,
    changes_table,
    controls_in_words,
    cost_table,
    explained,
    losses_table,
    markdown,
    mixture_table,
    score_changes_table,
    scores_in_words,
    scores_table,
    state_in_words,
    summary_table,
)
from ideal.report.files import Json, load_run, write_atomically
from ideal.report.page import embedded, template
from ideal.report.tables import WIDTH, as_text
from ideal.run_folder import read_json, remove

JSON_FILE = "leaderboard.json"


def write_leaderboard(folder: Path, content: Json) -> None:
    """leaderboard.json, .md, .csv, .html, and figures/."""
    figures = rendered(content)
    texts = {
        JSON_FILE: json.dumps(content, indent=2, allow_nan=False) + "\n",
        "leaderboard.md": markdown(content),
        "leaderboard.csv": as_csv(content),
        "leaderboard.html": page(content, figures),
    }
    for name, file in figures.items():
        write_atomically(folder / "figures" / name, file)
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())


def page(content: Json, figures: Mapping[str, bytes]) -> str:
    """leaderboard.html. figures: files by name, of which the SVGs are embedded."""
    runs = [(run["row"], run["seed"]) for run in content["runs"]]
    return template("leaderboard.html.jinja").render(
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        state=state_in_words(content),
        losses=losses_table(content),
        explained=explained(content),
        controls=controls_in_words(content),
        changes=changes_table(content),
        sections=[
            {
                "title": part.capitalize(),
                "scores": scores_table(content, part),
                "words": words,
                "changes": score_changes_table(content, part),
            }
            for part, words in (("scores", scores_in_words(content)), ("benchmarks", benchmarks_in_words(content)))
            if words
        ],
        cost=cost_table(content),
        costs=COSTS,
        ratios=mixture_table(content, "ratios"),
        shares=mixture_table(content, "shares"),
        runs=[{"name": f"{row}, seed {seed}", "href": f"{quote(row)}/seed_{seed}/report.html"} for row, seed in runs],
        figures={name.removesuffix(".svg"): embedded(file) for name, file in figures.items() if name.endswith("svg")},
    )


def refresh_leaderboard(folder: Path) -> None:
    """The files again, with the benchmarks that the runs have now; all else stays as the comparison left it."""
    content = read_json(folder / JSON_FILE)
    runs = []
    for entry in content["runs"]:
        run = load_run(folder / entry["row"] / f"seed_{entry['seed']}")
        runs.append(RunNumbers(**{**entry, "benchmarks": run.benchmarks}))
    beside = {row["row"]: row["beside"] for row in content["rows"] if row["beside"] is not None}
    again = leaderboard(runs, beside, content["failed"], content["expected"])
    write_leaderboard(folder, {**again, "compare": content["compare"]})


def clear_leaderboard(folder: Path) -> None:
    """Removes what `write_leaderboard` has written."""
    for path in [*folder.glob("leaderboard.*"), folder / "figures"]:
        remove(path)


def console_tables(folder: Path) -> str:
    """The leaderboard in short, as text, and where its files are."""
    content = read_json(folder / JSON_FILE)
    table = summary_table(content)
    scores = scores_table(content, "scores")
    words = [*state_in_words(content), *explained(content), COSTS, *controls_in_words(content)]
    words += scores_in_words(content)
    lines = [textwrap.fill(sentence, WIDTH) for sentence in words]
    names = sorted(path.name for path in folder.glob("leaderboard.*"))
    place = f"In {folder}: {', '.join(names)}, figures, and a folder per method"
    tables = [as_text(found) for found in (table, scores) if found]
    return "\n\n".join([*tables, "\n".join(lines), place])

