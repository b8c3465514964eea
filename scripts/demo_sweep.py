"""Where the demo's best mixture lies: many mixtures with the same trained tokens, each trained and evaluated.

    python scripts/demo_sweep.py [--start skewed] [--mixtures 40] [--refine 20] [--processes 2]

First random mixtures, then ones near the best of those, two seeds each; at the end the best by reference
loss, all starts and equal token shares are run again with fresh seeds, so that the choice does not flatter
itself. Finished runs are kept in --output; the same command goes on where it was stopped.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

from demo_bench import Bench, Job, Results, Workers  # noqa: E402

from ideal.demo import STARTS  # noqa: E402
from ideal.seeding import generator  # noqa: E402

SEARCH_SEEDS, FINAL_SEEDS = range(100, 102), range(5)


def mean_of(results: Results, name: str, seeds: range, value: str) -> float:
    return float(np.mean([results.found[f"{name}/{seed}"][value] for seed in seeds]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--start", choices=STARTS, default="skewed", help="whose trained tokens all mixtures have"
    )
    parser.add_argument("--mixtures", type=int, default=40, help="random mixtures")
    parser.add_argument("--refine", type=int, default=20, help="mixtures near the best five of those")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/demo_sweep"))
    given = parser.parse_args()

    bench = Bench.open()
    total = bench.mixture(bench.ratios(STARTS[given.start]), 0).total_tokens
    results = Results(given.output / f"{given.start}.jsonl")

    def jobs(shares: dict[str, np.ndarray], seeds: range) -> list[Job]:
        return [
            Job(
                f"{name}/{seed}",
                dict(zip(bench.domains, bench.ratios_of_shares(p), strict=True)),
                seed,
                total,
            )
            for name, p in shares.items()
            for seed in seeds
        ]

    n = len(bench.domains)
    random = generator(0, "sweep", given.start)
    candidates = {f"random {i}": random.dirichlet(np.full(n, 1.5)) for i in range(given.mixtures)}
    with Workers(given.processes) as workers:
        workers.do(jobs(candidates, SEARCH_SEEDS), results)
        ranked = sorted(candidates, key=lambda name: mean_of(results, name, SEARCH_SEEDS, "Q"))
        middle = np.mean([candidates[name] for name in ranked[:5]], axis=0)
        candidates |= {f"near {i}": random.dirichlet(20 * middle) for i in range(given.refine)}
        workers.do(jobs(candidates, SEARCH_SEEDS), results)
        ranked = sorted(candidates, key=lambda name: mean_of(results, name, SEARCH_SEEDS, "Q"))
        starts = {f"start {name}": bench.mixture(bench.ratios(STARTS[name]), 0).shares for name in STARTS}
        final = {
            "equal shares": np.full(n, 1 / n),
            **starts,
            **{name: candidates[name] for name in ranked[:3]},
        }
        workers.do(jobs(final, FINAL_SEEDS), results)

    print(f"{given.mixtures + given.refine} mixtures of {total} trained tokens; Q on the reference sets:")
    spread = [mean_of(results, name, SEARCH_SEEDS, "Q") for name in ranked]
    print(
        "  lowest {:.3f}, quartiles {:.3f} {:.3f} {:.3f}, highest {:.3f}".format(
            *np.quantile(spread, [0, 0.25, 0.5, 0.75, 1])
        )
    )
    print(f"\nAgain, with {len(FINAL_SEEDS)} fresh seeds: test Q (standard error), examples per domain")
    for name in final:
        runs = [results.found[f"{name}/{seed}"] for seed in FINAL_SEEDS]
        q = np.array([run["Q_test"] for run in runs])
        sizes = ", ".join(f"{domain} {size}" for domain, size in runs[0]["sizes"].items())
        print(f"  {name:14s} {q.mean():.3f} ({q.std(ddof=1) / len(q) ** 0.5:.3f})  {sizes}")


if __name__ == "__main__":
    main()
