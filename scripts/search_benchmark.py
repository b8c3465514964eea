"""How near to the best mixture known each method comes with the training runs it may spend, on the embedded demo.

    python scripts/search_benchmark.py [sweep | tune | methods | page] [--processes 2] [--output runs/search]

sweep: the reference, many mixtures of the same trained tokens, and what the best of them is worth. tune: each method's
constant, with seeds of its own. methods: the reported runs, by main.py. page: docs/search.md, its figure, its numbers
and the sweep, from whatever is finished. Without a word all four, in this order. Every part goes on where it was
stopped; what was tuned stays as it was when the methods run.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.chdir(ROOT)

from demo_bench import Bench, Results, Workers  # noqa: E402
from search_page import markdown, rendered  # noqa: E402
from search_regret import BUDGETS, TOLERANCE, start_content  # noqa: E402
from search_runs import BY_LOSS, TUNED, TUNING_SEEDS, Runs, Setting, Size  # noqa: E402
from search_sweep import FRESH, Plan, Row, Sweep, best_of, mixture_of_key, stored  # noqa: E402

from ideal.compare.leaderboard import spread  # noqa: E402
from ideal.demo import STARTS  # noqa: E402
from ideal.errors import UserError  # noqa: E402
from ideal.evaluation import evaluate  # noqa: E402
from ideal.mixers.loss import shares_by_loss  # noqa: E402
from ideal.report.files import Json, write_atomically  # noqa: E402
from ideal.run_folder import read_json, write_json, write_text  # noqa: E402

PARTS = ("sweep", "tune", "methods", "page")
UNIFORM, SKEWED = "uniform", "skewed"


@dataclass(frozen=True)
class Benchmark:
    """The whole benchmark in a folder."""

    output: Path
    processes: int
    plan: Plan
    size: Size

    def run(self, parts: Sequence[str], page: Path) -> None:
        """The parts asked for; page: where the page goes, its figure and its data beside it."""
        bench = Bench.open(self.size.more)
        runs = Runs(self.output, equal_starts(bench), self.size, self.processes)
        results = Results(self.output / "sweep.jsonl")
        tuning = self.output / "tuning.json"
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
            write_page(page, list(results.found.values()), runs, settings, read_json(tuning))


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


def write_page(page: Path, rows: Sequence[Row], runs: Runs, settings: Sequence[Setting], tuning: Json) -> None:
    """The page, its figure, and beside it the sweep as used and all numbers. Raises UserError without a sweep."""
    if not any(row["seed"] >= FRESH for row in rows):
        raise UserError(f"{runs.output}: the sweep is not finished; the part sweep comes before the part page")
    best, (content, digest) = best_of(rows), stored(rows)
    data = page.parent / page.stem
    write_atomically(data / "sweep.jsonl", content)
    starts, unfinished = {}, dict[str, None]()
    for start, ratios in runs.starts.items():
        curves, missing = runs.curves(settings, start)
        unfinished |= dict.fromkeys(missing)
        starts[start] = {"ratios": in_words(ratios), **start_content(curves, best.q)}
    found = {
        "sweep": {
            **asdict(best),
            **spread((best.q, best.error), "q"),
            "mixtures": len({mixture_of_key(row["key"]) for row in rows}),
            "runs": len(rows),
            "total_tokens": rows[0]["total_tokens"],
            "file": f"{page.stem}/sweep.jsonl",
            "sha256": digest,
        },
        "seeds": list(runs.size.seeds),
        "budgets": list(BUDGETS),
        "tolerance": TOLERANCE,
        "tuning": tuning,
        "tuning_seeds": list(TUNING_SEEDS),
        "tuning_loops": runs.size.tuning_loops,
        "unfinished": list(unfinished),
        "starts": starts,
    }
    write_json(data / "search.json", found)
    write_atomically(page.parent / "figures" / f"{page.stem}.svg", rendered(found))
    write_text(page, markdown(found, f"figures/{page.stem}.svg"))
    print(f"wrote {page}")


def in_words(ratios: Mapping[str, float]) -> str:
    """Ratios by domain."""
    return ", ".join(f"{name} {ratio:.3g}" for name, ratio in ratios.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="all by default")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/search"))
    parser.add_argument("--methods", nargs="+", default=(), help="run only these besides joint")
    parser.add_argument("--page", type=Path, default=Path("docs/search.md"))
    given = parser.parse_args()
    unknown = set(given.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    benchmark = Benchmark(given.output, given.processes, Plan(), Size(methods=given.methods))
    try:
        benchmark.run(given.parts or PARTS, given.page)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
