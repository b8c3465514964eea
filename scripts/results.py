"""Writes docs/results.md and its figures from a comparison (scripts/compare.sh); nothing there is typed by hand.

    python scripts/results.py runs/compare [--out docs/results.md]
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
from ideal.compare.tables import markdown
from ideal.compare.writing import JSON_FILE
from ideal.errors import UserError
from ideal.run_folder import read_json

FIGURES = {
    "score_and_cost": "Average loss against cost; hollow: joint, scaled to the volume of a method that grew the data,"
    " or the mean of a method's tries",
    "mixtures": "Ratios and shares of the methods' results",
}


def settings(config: dict[str, Any]) -> str:
    """What the runs have in common, from the config.yaml of one."""
    train, mixing = config["train"], config["mixing"]
    model = config["model"]["name_or_path"] or "the embedded demo"
    steps = f"{train['max_steps']} steps" if train.get("max_steps", -1) > 0 else f"{train['num_train_epochs']} epochs"
    ratios = mixing["ratios"] or "1"
    return (
        f"Model and data: {model}. Each inner loop: {steps}, global batch {train['global_batch_size']}, learning rate"
        f" {train['learning_rate']:g}. Start ratios: {ratios}. ideal: budget {mixing['budget']}, m ="
        f" {mixing['max_change']:g}, {mixing['rounds']} outer steps."
    )


def command(compare: dict[str, Any], config: dict[str, Any]) -> str:
    """What makes such a comparison again, but for the data's and the model's places."""
    own = "" if config["model"]["name_or_path"] is None else " --config FILE"
    given = [f"--compare.{key} {shlex.quote(json.dumps(value))}" for key, value in compare.items() if value]
    return f"python main.py{own} --stage compare {' '.join(given)}"


def page(folder: Path, figures: Path) -> str:
    """The page's text. figures: where they lie, relative to it."""
    content = read_json(folder / JSON_FILE)
    config = yaml.safe_load((folder / "joint" / f"seed_{content['seeds'][0]}" / "config.yaml").read_text())
    body = markdown(content).removeprefix("# Leaderboard\n\n")
    changed = {}
    for row in content["rows"]:
        method = row["row"]
        if row["beside"] is None:
            own = yaml.safe_load((folder / method / f"seed_{row['seeds'][0]}" / "config.yaml").read_text())["mixing"]
            different = {key: own[key] for key in own if key != "method" and own[key] != config["mixing"][key]}
            changed |= {method: different} if different else {}
    other = "; ".join(f"{name}: {', '.join(f'{k} {v}' for k, v in keys.items())}" for name, keys in changed.items())
    pictures = [f"![{text}]({figures}/{name}.svg)" for name, text in FIGURES.items()]
    return "\n\n".join(
        [
            "# Results: every method on equal terms",
            f"Seeds {', '.join(map(str, content['seeds']))}. {settings(config)}"
            + (f" Changed for single methods: {other}." if other else ""),
            "What the methods are: [methods.md](methods.md). Written by `python scripts/results.py` from the"
            f" leaderboard.json that this makes:\n\n    {command(content['compare'], config)}",
            *pictures,
            body,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output_dir of --stage compare")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    given = parser.parse_args()
    if not (given.folder / JSON_FILE).is_file() or not read_json(given.folder / JSON_FILE)["rows"]:
        raise SystemExit(f"{given.folder} holds no comparison with a finished run")
    figures = given.out.parent / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for name, file in rendered(read_json(given.folder / JSON_FILE)).items():
        if name.endswith(".svg"):
            (figures / name).write_bytes(file)
    try:
        given.out.write_text(page(given.folder, Path("figures")), encoding="utf-8")
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
