"""How near to the best mixture known each method comes with the training runs it may spend, on the embedded demo.

    python scripts/search_benchmark.py [sweep | tune | methods | page] [--processes 2] [--output runs/search]

sweep: the reference, many mixtures of the same trained tokens, and what the best of them is worth. tune: each method's
constant, with seeds of its own. methods: the reported runs, by main.py. page: docs/search.md, its figure, its numbers
and the sweep, from whatever is finished. Without a word all four, in this order. Every part goes on where it was
stopped; what was tuned stays as it was when the methods run.

Other weights of the capabilities in Q are another benchmark: --weight code=4 --based-on runs/search --output
runs/search_code --page docs/search_code.md. What it is based on gives it the losses of the mixtures drawn from the
whole simplex, and the constants, tuned with other seeds and other weights.
"""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.chdir(ROOT)

from demo_bench import Bench, Results, Workers  # noqa: E402
from search_page import markdown, rendered  # noqa: E402
from search_regret import BUDGETS, TOLERANCE, start_content  # noqa: E402
from search_runs import BY_LOSS, TUNED, TUNING_SEEDS, Runs, Setting, Size  # noqa: E402
from search_sweep import FRESH, SMALLER, Plan, Row, Sweep, best_of, mixture_of_key, reweighed, stored  # noqa: E402

from ideal.compare.leaderboard import spread  # noqa: E402
from ideal.config import dump, read_command  # noqa: E402
from ideal.demo import STARTS  # noqa: E402
from ideal.errors import UserError  # noqa: E402
from ideal.evaluation import evaluate  # noqa: E402
from ideal.mixers.loss import shares_by_loss  # noqa: E402
from ideal.preparation import with_demo  # noqa: E402
from ideal.report.files import Json, write_atomically  # noqa: E402
from ideal.run_folder import read_json, write_json, write_text  # noqa: E402
from main import ARGUMENTS  # noqa: E402

PARTS = ("sweep", "tune", "methods", "page")
UNIFORM, SKEWED = "uniform", "skewed"


@dataclass(frozen=True)
class Benchmark:
    """The whole benchmark in a folder.

    based_on: another benchmark's folder, whose weights in Q are others. command: what makes this one.
    """

    output: Path
    processes: int
    plan: Plan
    size: Size
    based_on: Path | None
    command: str

    def run(self, parts: Sequence[str], page: Path) -> None:
        """The parts asked for; page: where the page goes, its figure and its data beside it."""
        bench = Bench.open(self.size.more)
        starts = equal_starts(bench)
        runs = Runs(self.output, {start: starts[start] for start in self.size.starts}, self.size, self.processes)
        results = Results(self.output / "sweep.jsonl")
        tuning = self.output / "tuning.json"
        if self.based_on is not None:
            adopt(self.based_on, results, tuning, bench.data.weights)
        if "sweep" in parts:
            total = round(volume(bench, STARTS[UNIFORM]))
            with Workers(self.processes, self.size.more) as workers:
                print(Sweep(bench, total, results, self.plan, workers).run())
        if "tune" in parts:
            tune(runs, tuning)
        settings = runs.settings(self.size.loops, constants(tuning))
        if {"methods", "page"} & set(parts) and not tuning.is_file():
            raise UserError(f"{tuning} is not there: the part tune comes first")
        if "methods" in parts:
            runs.reported(settings)
        if "page" in parts:
            content: Json = content_of(f"{page.stem}/sweep.jsonl", list(results.found.values()), runs, settings)
            content |= {
                "command": self.command,
                "weights": dict(bench.data.weights),
                "tuning": read_json(tuning),
                "tuned_elsewhere": self.based_on is not None,
            }
            write_page(page, content, list(results.found.values()))


def volume(bench: Bench, ratios: Mapping[str, float]) -> float:
    """Trained tokens of these ratios, on average over seeds."""
    return float(bench.ratios(ratios) @ [int(pool.trained_tokens.sum()) for pool in bench.data.pools.values()])


def equal_starts(bench: Bench) -> dict[str, dict[str, float]]:
    """The starts' ratios by domain, scaled to the trained tokens of the uniform one, so that one sweep serves all."""
    starts = {UNIFORM: STARTS[UNIFORM], SKEWED: STARTS[SKEWED], BY_LOSS: ratios_by_loss(bench)}
    wanted = volume(bench, STARTS[UNIFORM])
    return {
        start: {name: ratio * wanted / volume(bench, ratios) for name, ratio in ratios.items()}
        for start, ratios in starts.items()
    }


def ratios_by_loss(bench: Bench) -> dict[str, float]:
    """The ratios, up to a common factor, that the method `loss` begins with: shares by the base model's losses."""
    pad_id = int(bench.tokenizer.pad_token_id)
    settings = bench.config.evaluation
    losses = evaluate(bench.model(None), bench.data.references, settings, pad_id=pad_id, description="base model")
    rows = [[list(losses).index(name)] for name in bench.domains]
    weights = np.array([bench.data.weights[name] for name in losses])
    shares = shares_by_loss(np.array(list(losses.values())), weights, rows)
    return dict(zip(bench.domains, bench.ratios_of_shares(shares).tolist(), strict=True))


def tune(runs: Runs, file: Path) -> None:
    """Tunes the methods that have not been, and writes what was found; what is there stays."""
    table = read_json(file) if file.is_file() else []
    rows = {setting.row for setting in runs.settings(runs.size.loops, {})}
    missing = [row for row in TUNED if row in rows - {found["row"] for found in table}]
    write_json(file, table + runs.tune(missing))


def constants(file: Path) -> dict[str, float]:
    """By row, the value that was taken; empty before anything was tuned."""
    return {found["row"]: found["taken"] for found in read_json(file)} if file.is_file() else {}


def adopt(folder: Path, results: Results, tuning: Path, weights: Mapping[str, float]) -> None:
    """Takes over from another benchmark what holds with these `weights` too, as far as it is not there yet.

    Raises UserError where that benchmark's sweep or tuning is missing.
    """
    for file in (folder / "sweep.jsonl", folder / "tuning.json"):
        if not file.is_file():
            raise UserError(f"--based-on {folder}: {file.name} is not there; run that benchmark's sweep and tune first")
    for row in reweighed(Results(folder / "sweep.jsonl").found.values(), weights):
        if row["key"] not in results.found:
            results.add(row["key"], row)
    if not tuning.is_file():
        shutil.copyfile(folder / "tuning.json", tuning)


def content_of(sweep: str, rows: Sequence[Row], runs: Runs, settings: Sequence[Setting]) -> Json:
    """The page's numbers. sweep: where its runs go, beside the page. Raises UserError without a sweep."""
    if not any(row["seed"] >= FRESH for row in rows):
        raise UserError(f"{runs.output}: the sweep is not finished; the part sweep comes before the part page")
    best = best_of(rows)
    starts, unfinished = {}, dict[str, None]()
    for start, ratios in runs.starts.items():
        curves, missing = runs.curves(settings, start)
        unfinished |= dict.fromkeys(missing)
        starts[start] = {"ratios": in_words(ratios), **start_content(curves, best.q)}
    return {
        "sweep": {
            **asdict(best),
            **spread((best.q, best.error), "q"),
            "mixtures": len({mixture_of_key(row["key"]) for row in rows}),
            "runs": len(rows),
            "total_tokens": rows[0]["total_tokens"],
            "file": sweep,
            "sha256": stored(rows)[1],
        },
        "seeds": list(runs.size.seeds),
        "budgets": list(BUDGETS),
        "tolerance": TOLERANCE,
        "tuning_seeds": list(TUNING_SEEDS),
        "tuning_loops": runs.size.tuning_loops,
        "unfinished": list(unfinished),
        "starts": starts,
    }


def write_page(page: Path, content: Json, rows: Sequence[Row]) -> None:
    """The page, its figure, and beside it the sweep as used and all numbers."""
    data = page.parent / page.stem
    write_atomically(data / "sweep.jsonl", stored(rows)[0])
    write_json(data / "search.json", content)
    write_atomically(page.parent / "figures" / f"{page.stem}.svg", rendered(content))
    write_text(page, markdown(content, f"figures/{page.stem}.svg"))
    print(f"wrote {page}")


def in_words(ratios: Mapping[str, float]) -> str:
    """Ratios by domain."""
    return ", ".join(f"{name} {ratio:.3g}" for name, ratio in ratios.items())


def domain_and_weight(text: str) -> tuple[str, float]:
    """The parts of DOMAIN=WEIGHT. Raises argparse's error where it is something else."""
    domain, _, weight = text.partition("=")
    try:
        return domain, float(weight)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: write DOMAIN=WEIGHT, as in code=4") from None


def weighed_demo(weights: Sequence[tuple[str, float]], file: Path) -> Sequence[str]:
    """Arguments of main.py for the demo with other weights of its domains' capabilities: its configuration, written to
    `file`. Raises UserError for a domain that it has not."""
    if not weights:
        return ()
    tree = dump(with_demo(read_command(ARGUMENTS, []).config))
    domains = tree["data"]["domains"]
    for domain, weight in weights:
        if domain not in domains:
            raise UserError(f"--weight: there is no domain {domain}; there are {', '.join(domains)}")
        domains[domain]["weight"] = weight
    write_text(file, yaml.safe_dump(tree, sort_keys=False))
    return "--config", str(file)


def command_of(parser: argparse.ArgumentParser, given: argparse.Namespace) -> str:
    """The command that makes the same benchmark; how many processes do it, and in which order, is not part of it."""
    words = ["bash scripts/search_benchmark.sh"]
    for key in ("weight", "based_on", "starts", "loops", "methods", "output", "page"):
        value = getattr(given, key)
        if value != parser.get_default(key):
            values = [f"{domain}={weight:g}" for domain, weight in value] if key == "weight" else value
            listed = map(str, values) if isinstance(values, list) else [str(values)]
            words += [f"--{key.replace('_', '-')}", *map(shlex.quote, listed)]
    return " ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="all by default")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/search"))
    parser.add_argument("--methods", nargs="+", default=(), help="only these besides joint, also on the page")
    parser.add_argument(
        "--starts", nargs="*", default=[SKEWED, BY_LOSS], choices=(SKEWED, BY_LOSS),
        help="besides uniform (default: both)",
    )  # fmt: skip
    parser.add_argument("--loops", type=int, default=Size.loops, help="of the longest runs (default: %(default)s)")
    parser.add_argument(
        "--weight", nargs="+", default=[], type=domain_and_weight, metavar="DOMAIN=WEIGHT",
        help="of a domain's capability in Q (default: 1 each)",
    )  # fmt: skip
    parser.add_argument("--based-on", type=Path, metavar="FOLDER", help="the benchmark whose weights are the demo's")
    parser.add_argument("--page", type=Path, default=Path("docs/search.md"))
    given = parser.parse_args()
    unknown = set(given.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    try:
        more = weighed_demo(given.weight, given.output / "demo.yaml")
        size = Size(loops=given.loops, starts=(UNIFORM, *given.starts), methods=given.methods, more=more)
        benchmark = Benchmark(
            given.output, given.processes, SMALLER if given.based_on else Plan(), size, given.based_on,
            command_of(parser, given),
        )  # fmt: skip
        benchmark.run(given.parts or PARTS, given.page)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
