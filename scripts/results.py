"""Writes docs/results.md and its figures: results.template.md, filled with what comparisons have come to.

    python scripts/results.py --demo runs/compare --real runs/smollm2 [--out docs/results.md]
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from ideal.compare.figures import rendered
from ideal.compare.tables import change, markdown
from ideal.compare.writing import JSON_FILE
from ideal.config import dump, flat, read_command
from ideal.report.files import write_atomically
from ideal.report.tables import MISSING
from ideal.run_folder import read_json
from main import ARGUMENTS

FIGURES = {
    "score_and_cost": "Average loss against cost; hollow: joint, scaled to the volume of a method that grew the data,"
    " or the mean of a method's tries",
    "mixtures": "Ratios and shares of the methods' results",
}

NOT_RUN = "This comparison was not at hand when the page was written."
TITLES = {"demo": "demo", "real": "SmolLM2"}


def settings(config: dict[str, Any]) -> str:
    """What the runs have in common, from the config.yaml of one."""
    train, mixing = config["train"], config["mixing"]
    model = config["model"]["name_or_path"] or "the embedded demo"
    model = Path(model).name if Path(model).is_absolute() else model  # where it lies is nobody's business
    steps = f"{train['max_steps']} steps" if train.get("max_steps", -1) > 0 else f"{train['num_train_epochs']} epochs"
    ratios = mixing["ratios"] or "1"
    step = "the surrogate's step" if mixing["step"] == "surrogate" else f"the fixed step, m = {mixing['max_change']:g}"
    return (
        f"Model and data: {model}. Each inner loop: {steps}, global batch {train['global_batch_size']}, learning rate"
        f" {train['learning_rate']:g}. Start ratios: {ratios}. ideal: budget {mixing['budget']},"
        f" {step}, {mixing['rounds']} outer steps."
    )


OWN = ("model.name_or_path", "data.domains", "mixing.method", "output_dir", "seed")
"""Keys (or beginnings of keys) that differ between machines or between the runs of a comparison."""


def command(compare: dict[str, Any], config: dict[str, Any]) -> str:
    """What makes such a comparison again: the keys that are not main.py's own, but for the model's and the data's
    places; of the data's the scorers."""
    demo = config["model"]["name_or_path"] is None
    places = [] if demo else ["--model.name_or_path", "MODEL", "--data.domains", "DATA"]
    usual = flat(dump(read_command(ARGUMENTS, places).config))
    given = {f"compare.{key}": value for key, value in compare.items() if value}
    given |= {
        key: value
        for key, value in flat(config).items()
        if (not key.startswith(OWN) or key.endswith(".scorer")) and value is not None and usual.get(key) != value
    }
    words = [f"--{key} {shlex.quote(v if isinstance(v, str) else json.dumps(v))}" for key, v in given.items()]
    return " ".join(["python main.py --stage compare", *places, *words])


def section(folder: Path, name: str, figures: Path) -> str:
    """What stands about one comparison: its settings, command, figures and tables. figures: relative to the page."""
    content = read_json(folder / JSON_FILE)
    config = yaml.safe_load((folder / "joint" / f"seed_{content['seeds'][0]}" / "config.yaml").read_text())
    body = markdown(content).removeprefix("# Leaderboard\n\n").replace("\n## ", "\n### ")
    return "\n\n".join(
        [
            f"Seeds {', '.join(map(str, content['seeds']))}. {settings(config)}{changed(folder, content, config)}",
            f"Made by\n\n    {command(content['compare'], config)}",
            *(f"![{text}]({figures}/{name}_{figure}.svg)" for figure, text in FIGURES.items()),
            body.strip(),
        ]
    )


def changed(folder: Path, content: dict[str, Any], config: dict[str, Any]) -> str:
    """Which mixing keys single methods had of their own."""
    found = []
    for row in content["rows"]:
        if row["beside"] is None:
            own = yaml.safe_load((folder / row["row"] / f"seed_{row['seeds'][0]}" / "config.yaml").read_text())
            different = {k: v for k, v in own["mixing"].items() if k != "method" and v != config["mixing"][k]}
            if different:
                found.append(f"{row['row']}: {', '.join(f'{key} {value}' for key, value in different.items())}")
    return f" Changed for single methods: {'; '.join(found)}." if found else ""


PAPER = {
    "base": ("the base model", 39.55, 39.55),
    "specific": ("one domain alone, best", 47.17, 49.86),
    "joint": ("joint", 54.79, 55.35),
    "random": ("random ratios, best", 55.64, 55.97),
    "doremi": ("DoReMi, best", 55.17, 56.25),
    "doge": ("DoGE, best", 54.71, 56.87),
    "ideal": ("IDEAL after two rounds", 57.87, 59.23),
}
"""Overall scores after 1 and 3 epochs (arXiv 2505.12762, its main table), by the method that is nearest here."""


def paper_table(found: dict[str, dict[str, Any]]) -> str:
    """The paper's scores beside the changes against joint of the comparisons found, by their name."""
    header = ["", "paper, 1 epoch", "3 epochs", *(f"{name}: loss - joint's" for name in found)]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for method, (label, *scores) in PAPER.items():
        line = [label, *(f"{score:.2f}" for score in scores)]
        for content in found.values():
            row = next((row for row in content["rows"] if row["row"] == method), None)
            average = row["losses"]["average"] if row and method != "joint" else None
            line.append(change(average["change"], average["change_error"]) if average else MISSING)
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(folders: dict[str, Path | None], figures: Path) -> str:
    """The template with what these comparisons (output_dir by name, None: not at hand) have come to."""
    text = Path(__file__).with_name("results.template.md").read_text(encoding="utf-8")
    for name, folder in folders.items():
        text = text.replace(f"{{{name}}}", NOT_RUN if folder is None else section(folder, name, figures))
    contents = {TITLES[name]: read_json(folder / JSON_FILE) for name, folder in folders.items() if folder}
    return text.replace("{paper}", paper_table(contents))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="output_dir of --stage compare on the demo")
    parser.add_argument("--real", type=Path, help="output_dir of --stage compare on SmolLM2 and the real domains")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    given = parser.parse_args()
    folders = {"demo": given.demo, "real": given.real}
    figures = given.out.parent / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for name, folder in folders.items():
        if folder is None:
            continue
        if not (folder / JSON_FILE).is_file() or not read_json(folder / JSON_FILE)["rows"]:
            raise SystemExit(f"{folder} holds no comparison with a finished run")
        for file, content in rendered(read_json(folder / JSON_FILE)).items():
            if file.endswith(".svg"):
                write_atomically(figures / f"{name}_{file}", content)
    write_atomically(given.out, page(folders, Path("figures")).encode())


if __name__ == "__main__":
    main()
