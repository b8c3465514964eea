"""Benchmarks of finished models by lm-evaluation-harness; what is finished is not run again.

    bash scripts/evaluate.sh runs/mine                              gsm8k, humaneval, bbh, ifeval
    bash scripts/evaluate.sh runs/compare --tasks gsm8k,math        every result of a comparison
    bash scripts/evaluate.sh MODEL --tasks humaneval --run-code

A MODEL is a folder with a model, a run's output_dir (its result, model/), or that of --stage compare. Results go to
benchmarks.json beside the run (or in the model's folder), into the run's report and into the leaderboard.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ideal.benchmarks.harness import Wanted  # noqa: E402
from ideal.benchmarks.scores import DEFAULT, KNOWN  # noqa: E402
from ideal.benchmarks.stage import evaluate_models  # noqa: E402
from ideal.cli import quiet_libraries  # noqa: E402
from ideal.errors import UserError  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="evaluate.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument(
        "--tasks",
        default=",".join(DEFAULT),
        help=f"by comma: {', '.join(KNOWN)}, or any other task of the harness (default: %(default)s)",
    )
    parser.add_argument("--run-code", action="store_true", help="let humaneval and mbpp run code that the model wrote")
    parser.add_argument("--include", type=Path, help="a folder with tasks of your own, in the harness' YAML form")
    parser.add_argument("--limit", type=int, help="only so many rows per task, to try it out")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts at a time and GPU (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights; auto: as they were saved",
    )
    given = parser.parse_args()
    for name in ("limit", "batch_size"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")
    tasks = tuple(dict.fromkeys(name.strip() for name in given.tasks.split(",") if name.strip()))
    if not tasks:
        parser.error("--tasks names no task")
    quiet_libraries()
    wanted = Wanted(tasks, given.include, given.run_code, given.limit, given.batch_size, given.dtype)
    try:
        evaluate_models(given.models, wanted)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues with the next task", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
