"""Does the influence predict what retraining does? On the embedded demo, over settings, estimators and seeds.

    python scripts/validate_influence.py [estimate | oracle | page | text] [--processes 2] [--output runs/validation]
        [--quick]

estimate: an unchanged inner loop for each start, passes and seed, and every estimator's influence matrix at its model.
oracle: inner loops with every domain's volume changed up and down, in every setting. page: docs/validation.md, its
figure and its numbers, from whatever is finished. Without a word these three, in this order. Every part goes on where
it was stopped, run by run. text: page and figure once more from the numbers beside the page, as when the search
benchmarks' have changed. --quick: a minute's worth, to see that everything works; its page goes to the output folder.

With --config FILE, a configuration of main.py with a model and data of your own, in one setting as configured (fixed
volume), with two seeds: an unchanged inner loop each, and two for each domain. Give --page and --output a name.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.chdir(ROOT)

from demo_bench import Bench, Results, Workers  # noqa: E402
from validate_content import Stored, content_of  # noqa: E402
from validate_page import markdown, rendered  # noqa: E402
from validate_runs import QUICK, Size, estimations, oracle_jobs, size_of_model  # noqa: E402

from ideal.config import flat  # noqa: E402
from ideal.errors import UserError  # noqa: E402
from ideal.report.files import Json, write_atomically  # noqa: E402
from ideal.run_folder import read_json, write_text  # noqa: E402

PARTS = ("estimate", "oracle", "page")
TEXT = "text"
PLACES = ("model.name_or_path", "data.domains", "output_dir")
"""Keys that a page does not repeat."""


def run(bench: Bench, output: Path, processes: int, size: Size, parts: Sequence[str], page: Path) -> None:
    """The parts asked for. page: where the page goes, its figure and its numbers beside it."""
    oracle, centres = Results(output / "oracle.jsonl"), Results(output / "centres.jsonl")
    if {"estimate", "oracle"} & set(parts):
        of_oracle, of_centres = size.loops(len(bench.domains))
        print(f"{of_oracle} inner loops for the oracle, {of_centres} unchanged ones")
        with Workers(processes, size.more) as workers:
            if "estimate" in parts:
                workers.do(estimations(size, size.every_seed), centres, "estimates", "model")
            if "oracle" in parts:
                workers.do(oracle_jobs(bench, size, size.every_seed), oracle)
    if "page" in parts:
        write_page(page, stored(bench, oracle, centres), size)


def stored(bench: Bench, oracle: Results, centres: Results) -> Stored:
    """The finished runs, in the demo's order of names."""
    capabilities = list(bench.data.references)
    weights = np.array([bench.data.weights[name] for name in capabilities])
    return Stored(oracle.found, centres.found, bench.domains, capabilities, weights)


def write_page(page: Path, runs: Stored, size: Size) -> None:
    """The page, its figure, and all numbers. Raises UserError while there is too little."""
    needed = [seeds for seeds in (size.seeds, size.choosing) if seeds]
    if not all(any(len(runs.complete(s, seeds)) > 1 for s in size.settings) for seeds in needed):
        raise UserError("no setting has two finished seeds of each kind yet: the parts estimate and oracle come first")
    content = content_of(runs, size) | {"setup": setup_in_words(size.more)}
    write_text(numbers_of(page), compact(content) + "\n")
    write_again(page)


def numbers_of(page: Path) -> Path:
    """The file of a page's numbers."""
    return page.parent / page.stem / "validation.json"


def write_again(page: Path) -> None:
    """The page and its figure from its numbers and the search benchmarks'. Raises UserError where it has none."""
    if not numbers_of(page).is_file():
        raise UserError(f"{numbers_of(page)} is not there: the part page writes it")
    content = read_json(numbers_of(page))
    write_atomically(page.parent / "figures" / f"{page.stem}.svg", rendered(content))
    searches = {f"{file.parent.name}.md": read_json(file) for file in sorted(page.parent.glob("search*/search.json"))}
    write_text(page, markdown(content, f"figures/{page.stem}.svg", searches))
    print(f"wrote {page}")


def setup_in_words(more: Sequence[str]) -> str:
    """What the configuration of a model of one's own says, but for places; empty without one."""
    if "--config" not in more:
        return ""
    given = yaml.safe_load(Path(more[more.index("--config") + 1]).read_text(encoding="utf-8"))
    model = Path(str(given["model"]["name_or_path"])).name  # where it lies is nobody's business
    keys = [f"`{key}: {value}`" for key, value in flat(given).items() if not key.startswith(PLACES)]
    return f"The model: {model}. The domains: {', '.join(given['data']['domains'])}. Configured: {', '.join(keys)}."


def compact(content: Json) -> str:
    """JSON with six digits of every number, which is more than any of them has."""
    rounded = json.loads(json.dumps(content), parse_float=lambda text: float(f"{float(text):.6g}"))
    return json.dumps(rounded, separators=(",", ":"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="all by default")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/validation"))
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help="the smallest size, in a folder of its own")
    kind.add_argument("--config", type=Path, help="a model and data of your own")
    parser.add_argument("--seeds", type=int, default=2, help="with --config: how many (default: %(default)s)")
    parser.add_argument("--page", type=Path, default=Path("docs/validation.md"))
    given = parser.parse_args()
    unknown = set(given.parts) - {*PARTS, TEXT}
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join((*PARTS, TEXT))}")
    if given.seeds < 2:
        parser.error("--seeds must be 2 or more: a seed's prediction is compared with what the others measured")
    output = given.output / "quick" if given.quick else given.output
    page = output / "validation.md" if given.quick else given.page
    more = ("--config", str(given.config)) if given.config else QUICK.more if given.quick else ()
    try:
        if given.parts == [TEXT]:
            write_again(page)
            return
        bench = Bench.open(more)
        size = size_of_model(more, bench, given.seeds) if given.config else QUICK if given.quick else Size()
        run(bench, output, given.processes, size, given.parts or PARTS, page)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
