"""README's table: what different ways to choose the demo's mixture give, at a fixed volume.

    python scripts/demo_table.py [--seeds 5] [--processes 2]

For every start and seed: keep the start; as many examples of every domain; shares, or examples, in
proportion to the reference losses of the model trained on the start; as many random steps as IDEAL takes, of
the same size; and IDEAL with the paper's step and with the surrogate's, run by main.py. All hold as many
trained tokens as the start. Differences to keeping the start are taken seed by seed; what is shown is their
mean and its standard error.
Finished runs are kept in --output; the same command goes on where it was stopped.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
os.chdir(ROOT)

from demo_bench import Bench, Job, Results, Workers  # noqa: E402

from ideal.demo import STARTS  # noqa: E402
from ideal.mixers.paper_step import fixed_step, keep_volume  # noqa: E402
from ideal.seeding import generator  # noqa: E402

KEEP, UNIFORM, SHARES, EXAMPLES, RANDOM = CONTROLS = [
    "keep the start",
    "uniform examples",
    "shares by loss",
    "examples by loss",
    "random steps",
]
STEPS = {"IDEAL, the paper's step": "fixed", "IDEAL": "surrogate"}
"""IDEAL's rows and their `mixing.step`; the first step is the same mixture as the start in both."""


def ideal_folder(output: Path, start: str, seed: int, step: str = "fixed") -> Path:
    """Where main.py's run lies."""
    return output / f"{start}-{step}-{seed}"


def run_ideal(folder: Path, start: str, seed: int, step: str, max_change: float, rounds: int) -> None:
    """The whole loop in one process, by the command a user would give; raises if it fails."""
    values = {
        "output_dir": folder,
        "seed": seed,
        "mixing.ratios": json.dumps(STARTS[start]),
        "mixing.budget": "fixed",
        "mixing.step": step,
        "mixing.max_change": max_change,
        "mixing.rounds": rounds,
        "train.disable_tqdm": "true",
    }
    command = [
        sys.executable,
        "main.py",
        *(word for key, value in values.items() for word in (f"--{key}", str(value))),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def control_jobs(
    bench: Bench, start: str, seed: int, folder: Path, max_change: float, rounds: int
) -> list[Job]:
    """What IDEAL is compared with, from the same start and with the same seed."""
    begin = bench.mixture(bench.ratios(STARTS[start]), seed)
    evaluation = json.loads((folder / "round_00" / "evaluation.json").read_text())
    losses = np.array([evaluation["reference_loss"][name] for name in bench.domains])
    random, ratios = generator(seed, "random steps", start), begin.ratios
    for _ in range(rounds):
        shares = bench.mixture(ratios, seed, begin.total_tokens).shares
        ratios = ratios * (
            1 + keep_volume(fixed_step(random.standard_normal(len(ratios)), max_change), shares)
        )
    pools = np.array([domain.pool for domain in begin.domains.values()])
    proposals = {
        UNIFORM: 1 / pools,
        SHARES: bench.ratios_of_shares(losses),
        EXAMPLES: losses / pools,
        RANDOM: ratios,
    }
    return [
        Job(f"{start}/{name}/{seed}", dict(zip(bench.domains, r, strict=True)), seed, begin.total_tokens)
        for name, r in proposals.items()
    ]


def losses_of(results: Results, output: Path, start: str, method: str, seeds: Sequence[int]) -> np.ndarray:
    """[seeds] test Q; IDEAL's is that of the round it kept, which it chose by reference loss."""
    if method not in (KEEP, *STEPS):
        return np.array([results.found[f"{start}/{method}/{seed}"]["Q_test"] for seed in seeds])
    found = []
    for seed in seeds:
        folder = ideal_folder(output, start, seed, STEPS.get(method, "fixed"))
        best = 0 if method == KEEP else json.loads((folder / "mixture.json").read_text())["round"]
        found.append(json.loads((folder / f"round_{best:02d}" / "evaluation.json").read_text())["Q_test"])
    return np.array(found)


def cost(output: Path, start: str, method: str, seeds: Sequence[int]) -> str:
    """Inner loops and outer steps that lead to the method's model, the most over the seeds."""
    if method in STEPS:
        folders = [ideal_folder(output, start, seed, STEPS[method]) for seed in seeds]
        loops = max(len(list(folder.glob("round_*/evaluation.json"))) for folder in folders)
        steps = max(len(list(folder.glob("round_*/influence.json"))) for folder in folders)
        return f"{loops} + {steps}"
    return "2" if method in (SHARES, EXAMPLES) else "1"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--max-change", type=float, default=0.15, help="m of the paper's step and of the random ones")
    parser.add_argument("--rounds", type=int, default=2, help="outer steps")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/demo_table"))
    given = parser.parse_args()
    output = given.output / f"max_change_{given.max_change:g}_rounds_{given.rounds}"
    seeds = range(given.seeds)

    cases = [(start, seed) for start in STARTS for seed in seeds]
    bench = Bench.open()
    with ThreadPoolExecutor(given.processes) as threads:
        runs = [
            threads.submit(
                run_ideal, ideal_folder(output, start, seed, step), start, seed, step, given.max_change, given.rounds
            )
            for start, seed in cases
            for step in STEPS.values()
        ]
        for run in runs:
            run.result()
    results = Results(output / "controls.jsonl")
    jobs = [
        job
        for start, seed in cases
        for job in control_jobs(
            bench, start, seed, ideal_folder(output, start, seed), given.max_change, given.rounds
        )
    ]
    with Workers(given.processes) as workers:
        workers.do(jobs, results)

    print(f"test Q, mean of {given.seeds} seeds; difference to keeping the start (paired standard error)")
    print("\n| start | mixture | test Q | difference | inner loops + outer steps |")
    print("| --- | --- | --- | --- | --- |")
    for start in STARTS:
        kept = losses_of(results, output, start, KEEP, seeds)
        for method in (*CONTROLS, *STEPS):
            q = losses_of(results, output, start, method, seeds)
            change = q - kept
            error = change.std(ddof=1) / len(change) ** 0.5
            difference = "" if method == KEEP else f"{change.mean():+.4f} ({error:.4f})"
            loops = cost(output, start, method, seeds)
            print(f"| {start} | {method} | {q.mean():.4f} | {difference} | {loops} |")


if __name__ == "__main__":
    main()
