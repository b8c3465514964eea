"""The influence engine beside kronfluence and bergson: the same matrix? how fast, against a plain training pass?

    scripts/setup_peers.sh                                       once: .venv-peers, where the peers live
    python scripts/benchmark_influence.py                        workload W (a small Llama with random weights)
    python scripts/benchmark_influence.py --model DIR            a trained checkpoint on real sequences
    python scripts/benchmark_influence.py --model DIR --train-steps 30 --keep DIR2        ... trained here first
    python scripts/benchmark_influence.py --model DIR --sequences 100 --fractions 0.5 0.25 0.1 --draws 3
    python scripts/benchmark_influence.py --variant "half: keep_layers=0.5" --variant "pair: processes=2"
    python scripts/benchmark_influence.py --shape llama-3.2-1b --sides engine engine-bf16 kronfluence    on a GPU

Every side is a process of its own that times itself, in turns with the others: loading does not count,
eigendecompositions do. Tables go to the standard output as Markdown, and with --json FILE to a file too.
docs/performance.md says what they mean.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "peers")]

from comparison import (  # noqa: E402
    Agreement,
    agreement,
    agreement_table,
    median,
    phase_table,
    sink_table,
    solver_table,
    speed_table,
    table,
    timing_table,
)
from exchange import Rows, Workload  # noqa: E402
from flops import phase_flops  # noqa: E402
from sides import (  # noqa: E402
    CONVENTIONS,
    DEFAULT_SIDES,
    PEER_PYTHON,
    PEERS,
    SIDES,
    Worker,
    engine_side,
    in_turns,
    variant,
    workers,
)
from workloads import SHAPES, Sizes, random_workload, real_workload, shaped_workload  # noqa: E402

from ideal.errors import UserError  # noqa: E402


def main(arguments: list[str]) -> None:
    """One workload, in one of three modes."""
    args = parse(arguments)
    report = Report(args.json)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        workload = replace(make_workload(Path(scratch), args), damping=args.damping)
        workload.save()
        report.describe(workload, args)
        for threads in args.threads:
            if args.fractions is not None:
                compare_fractions(workload, args, threads, report)
            else:
                compare_sides(workload, args, threads, report)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a smaller W, in seconds")
    add("--model", metavar="DIR", help="a Llama checkpoint, on --data instead of random sequences")
    add("--data", default="../shared/data/real", metavar="DIR", help="a folder with a sub-folder per domain")
    add("--max-length", type=int, default=128, help="tokens of a real sequence")
    add("--train-steps", type=int, default=0, help="train --model on --data for so many steps first")
    add("--keep", metavar="DIR", help="where the model trained here is kept")
    add("--shape", choices=SHAPES, help="a Llama of these sizes with random weights")
    add("--sequences", type=int, default=64, help="per domain, with --model or --shape")
    add("--references", type=int, default=16, help="per capability, with --model or --shape")
    add("--domains", type=int, default=4, help="with --shape")
    add("--blocks", type=int, metavar="N", help="with --shape, in place of the model's own number")
    add("--length", type=int, default=1024, help="tokens of a sequence, with --shape")
    add("--batch-size", type=int, default=8, help="of all sides, with --shape")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights, with --shape")
    add("--sides", nargs="+", default=DEFAULT_SIDES, choices=SIDES, metavar="SIDE", help=", ".join(SIDES))
    add("--variant", action="append", default=[], type=variant, metavar='"NAME: KEY=VALUE, ..."', help="more engines")
    add("--fractions", nargs="*", type=float, help="factor_fractions, and variants, to compare with the engine's 1")
    add("--draws", type=int, default=3, help="of the sequences, with --fractions")
    add("--damping", type=float, default=0.1, help="of all sides; kronfluence has no other")
    add("--threads", nargs="+", type=int, default=[1], help="per process, one after the other")
    add("--repeats", type=int, default=5, help="runs of each side, whose median counts")
    add("--seed", type=int, default=0)
    add("--scratch", metavar="DIR", help="where the model is copied to, and the peers' files go")
    add("--json", type=Path, metavar="FILE", help="everything that was measured")
    args = parser.parse_args(arguments)
    if args.model and args.shape:
        parser.error("--model and --shape exclude each other")
    if args.train_steps and not args.model:
        parser.error("--train-steps needs --model")
    if args.blocks and not args.shape:
        parser.error("--blocks needs --shape")
    peers = [name for name in args.sides if SIDES[name].program != "ours"]
    if args.damping != 0.1 and args.fractions is None and any("kronfluence" in name for name in peers):
        parser.error("--damping: kronfluence has 0.1 alone; name other --sides")
    if peers and args.fractions is None and not PEER_PYTHON.exists():
        parser.error(f"--sides {' '.join(peers)}: {PEER_PYTHON} is not there; run scripts/setup_peers.sh first")
    return args


def make_workload(folder: Path, args: argparse.Namespace) -> Workload:
    """What the command line asks for."""
    if args.model:
        return real_workload(folder, args)
    if args.shape:
        sizes = Sizes(args.domains, args.sequences, args.references, args.length, args.length // 4)
        return shaped_workload(folder, args.shape, args.blocks, sizes, args.batch_size, args.dtype, args.seed)
    return random_workload(folder, args.quick, args.seed)


# Modes


def compare_sides(workload: Workload, args: argparse.Namespace, threads: int, report: "Report") -> None:
    """All sides in turns: the same matrix, and how fast."""
    sides = [SIDES[name] for name in args.sides] + args.variant
    with workers(sides, workload.folder, threads) as running:
        answers = in_turns(running, args.repeats, lambda so_far: report.keep(threads, so_far))
        found = agreements(workload, running, answers) if "engine" in running else {}
    title = f"{threads} thread{'s' if threads > 1 else ''}"
    report.section(f"Time, {title}", timing_table(answers), answers=answers)
    report.section(f"Speed, {title}", speed_table(answers, PEERS))
    counts = operations(workload, answers) if args.shape else None
    report.section(f"Phases, {title}", phase_table(answers, counts), flops=counts)
    agreed = {name: asdict(one) | {"same": one.same} for name, one in found.items()}
    report.section(f"Agreement with the engine, {title}", agreement_table(found), agreement=agreed)
    if "engine" in answers and args.model:
        report.section("First positions", sink_table(answers["engine"][-1]["first_position_share"]))


def agreements(
    workload: Workload, running: Mapping[str, Worker], answers: Mapping[str, list[dict[str, Any]]]
) -> dict[str, Agreement]:
    """Each matrix against the engine's: the peers' in their own convention of positions."""
    engine, found = answers["engine"][-1], {}
    expected: dict[str | None, dict[str, Any]] = {None: engine}
    for name, runs in answers.items():
        if name == "engine" or "matrix" not in runs[-1]:
            continue
        convention = CONVENTIONS.get(running[name].side.program)
        if convention not in expected:
            expected[convention] = running["engine"].run(convention=convention)
        matrices = runs[-1]["matrix"], expected[convention]["matrix"]
        found[name] = agreement(*matrices, engine["shares"], own_entries(workload))
    return found


def operations(workload: Workload, answers: Mapping[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """FLOPs per phase of the engine's sides that compute everything."""
    config = AutoConfig.from_pretrained(workload.folder / "model")
    return {name: phase_flops(config, workload) for name in ("engine", "engine-bf16") if name in answers}


def own_entries(workload: Workload) -> np.ndarray:
    """[R, n] whether a capability and a domain share their name."""
    return np.array([[domain == capability for domain in workload.domains] for capability in workload.references])


def compare_fractions(workload: Workload, args: argparse.Namespace, threads: int, report: "Report") -> None:
    """The factors from some of the sequences, against all: what it saves and what it changes, for several draws."""
    fewer = [engine_side(f"{fraction:g}", factor_fraction=fraction) for fraction in args.fractions]
    answers: dict[str, list[dict[str, Any]]] = {}
    # One process for all: several models of this size side by side might not fit.
    with workers([SIDES["engine"]], workload.folder, threads) as running:
        for draw in range(args.draws):
            # What uses all sequences is the same in every draw.
            for side in [SIDES["floor"], *([] if draw else [SIDES["engine"]]), *fewer, *args.variant]:
                found = running["engine"].run(**side.request, seed=draw)
                answers.setdefault(side.name, []).append(found)
                report.keep(threads, answers)
                print(f"draw {draw} {side.name}: {found['seconds']:.1f} s", file=sys.stderr, flush=True)
    rows, agreed = [], {}
    for side in [*fewer, *args.variant]:
        for draw, run in enumerate(answers[side.name]):
            one = agreement(run["matrix"], answers["engine"][0]["matrix"], run["shares"], own_entries(workload))
            agreed[f"{side.name}, draw {draw}"] = asdict(one)
            used = [run["sequences"], run["factor_sequences"], run["eigenvalue_sequences"]]
            cosines = [f"{value:.6f}" for value in (one.cosine, one.alpha_free, one.alpha_centred)]
            ratio = run["seconds"] / median(answers["floor"])
            rows.append([side.name, draw, *used, f"{one.error:.4f}", *cosines, f"{ratio:.2f}"])
    header = ["side", "draw", "sequences", "for covariances", "for eigenvalues", "largest error / largest entry"]
    header += ["off-diagonal cosine", "alpha free", "alpha centred", "x floor"]
    report.section("Fewer sequences", table(header, rows), answers=answers, agreement=agreed)
    report.section("Time", timing_table(answers))
    report.section("Phases", phase_table(answers))
    if residuals := solver_table(answers):
        report.section("Joint solver", residuals)


# Output


class Report:
    """Markdown to the standard output, and what was measured to a file after every run and table."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.content: dict[str, Any] = {"machine": machine(), "sections": []}

    def describe(self, workload: Workload, args: argparse.Namespace) -> None:
        """What is about to be measured, where."""
        sets = {"training": workload.domains, "reference": workload.references}
        rows = [
            [kind, name, *_counts(rows), *(f"{rows.padding(workload.batch_size, ours):.1%}" for ours in (True, False))]
            for kind, named in sets.items()
            for name, rows in named.items()
        ]
        header = ["set", "name", "sequences", "tokens", "positions", "trained tokens", "padding", "in file order"]
        print(f"{args.model or args.shape or 'W'} on {self.content['machine']}; {workload.dtype} weights")
        self.content["arguments"] = {key: str(value) for key, value in vars(args).items()}
        self.section("Sequences", table(header, rows), sequences=rows)

    def keep(self, threads: int, answers: Mapping[str, list[dict[str, Any]]]) -> None:
        """What the sides have answered so far, which a benchmark that is ended has not lost."""
        self.content["so far"] = {"threads": threads, "answers": answers}
        self._write()

    def section(self, title: str, text: str, **content: Any) -> None:
        """A titled table, and what it was made of."""
        print(f"\n**{title}**\n\n{text}", flush=True)
        self.content["sections"].append({"title": title, **content})
        self.content.pop("so far", None)
        self._write()

    def _write(self) -> None:
        if self.file:
            # What is there already outlives a benchmark that is ended while it writes.
            other = self.file.with_name(f"{self.file.name}.tmp")
            other.write_text(json.dumps(self.content, indent=1))
            other.replace(self.file)


def _counts(rows: Rows) -> list[int]:
    """Sequences, tokens, positions that carry statistics, trained tokens."""
    return [len(rows), sum(map(len, rows.input_ids)), int(rows.positions.sum()), int(rows.trained_tokens.sum())]


def machine() -> str:
    """The processor or GPU, and the versions that matter."""
    name = platform.processor() or platform.machine()
    processors = Path("/proc/cpuinfo")
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    elif processors.exists():
        lines = processors.read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} CPUs, torch {torch.__version__}"


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
