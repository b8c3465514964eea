"""Writes docs/scaling.md: what an outer step and an inner loop take, by model, GPUs, data, domains and capabilities.

    python scripts/scaling.py [--out docs/scaling.md]

Nothing is downloaded or run: the planner (ideal/plan.py) goes through every phase on fake tensors. About
half an hour on one core.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from shapes import SHAPES  # noqa: E402

from ideal.config import Config, validate  # noqa: E402
from ideal.errors import UserError  # noqa: E402
from ideal.influence import DomainSample  # noqa: E402
from ideal.machine import DEVICES  # noqa: E402
from ideal.plan import EVALUATION, Counts, DataSizes, Plan, gigabytes, make_plan  # noqa: E402
from ideal.report.tables import duration  # noqa: E402

GPUS = (1, 8, 64)
LENGTH, PROMPT = 512, 128
"""Tokens of every sequence, and how many of them are not trained."""
DEVICE = DEVICES["h100"]


@dataclass(frozen=True)
class Case:
    """What is planned."""

    model: str
    gpus: int
    sequences: int = 50_000
    domains: int = 5
    capabilities: int = 5
    budget: float | None = 40.0

    def plan(self) -> Plan:
        """Its plan; raises UserError where the outer step would refuse it."""
        return make_plan(self.config(), self.sizes(), self.gpus, DEVICE, LlamaConfig(**SHAPES[self.model]))

    def config(self) -> Config:
        """As in configs/llama-*.yaml."""
        train: dict[str, Any] = {
            "global_batch_size": 128,
            "per_device_train_batch_size": 1,
            "num_train_epochs": 1,
            "bf16": True,
            "fsdp": True,
            "fsdp_config": {"activation_checkpointing": True},
        }
        # Activations of 80 blocks are kept for the backward pass.
        batch = 1 if self.model == "llama-3.1-70b" else 4
        influence = {"batch_size": batch, "memory_budget": self.budget, "product_dtype": "bfloat16", "spill": "cpu"}
        if self.model in ("llama-3.1-8b", "llama-3.1-70b"):
            influence |= {"factor_fraction": 0.1, "eigenvalue_fraction": 0.1}
        return validate({"train": train, "influence": influence, "evaluation": {"batch_size": 4}})

    def sizes(self) -> DataSizes:
        """Sequences of one length, spread evenly."""

        def counts(rows: int) -> Counts:
            return Counts(np.full(rows, LENGTH), np.full(rows, LENGTH - PROMPT))

        rows = self.sequences // self.domains
        domains = {f"domain {k}": DomainSample(counts(rows), np.ones(rows, dtype=int)) for k in range(self.domains)}
        return DataSizes(domains, {f"capability {k}": counts(500) for k in range(self.capabilities)})


def models() -> Iterator[list[str]]:
    """A row for each model and number of GPUs."""
    yield [
        "model",
        "GPUs",
        "inner loop",
        "memory",
        "outer step",
        "memory",
        "of which statistics",
        "parts",
        "fits 80 GB",
    ]
    for model in SHAPES:
        for gpus in GPUS:
            yield [model, str(gpus), *row_of(Case(model, gpus))]


def row_of(case: Case) -> list[str]:
    """Time and memory of the inner loop and of the outer step."""
    progress(case)
    try:
        plan = case.plan()
    except UserError as error:
        return ["", "", "", "", "", "", str(error)]
    inner, outer = plan.phases[0], max(plan.outer, key=lambda phase: phase.peak)
    statistics = max(sum(phase.memory.get(kind, 0) for kind in ("factors", "gradients")) for phase in plan.outer)
    too_large = [
        name
        for name, peak in (
            ("inner loop", inner.peak),
            ("evaluation", plan.peak_of(EVALUATION)),
            ("outer step", outer.peak),
        )
        if peak > 80e9
    ]
    return [
        duration(inner.seconds),
        gigabytes(inner.peak),
        duration(sum(phase.seconds for phase in plan.outer)),
        gigabytes(outer.peak),
        gigabytes(statistics),
        "{} / {}".format(*plan.outer_parts) + (f", {plan.at_once} at a time" if plan.at_once else ""),
        "no: " + ", ".join(too_large) if too_large else "yes",
    ]


def phases(case: Case) -> Iterator[list[str]]:
    """A row per phase."""
    progress(case)
    yield ["phase", "passes", "sequences", "PFLOP per GPU", "time", "memory"]
    for phase in case.plan().phases:
        counted = [f"{phase.passes:.3g}", f"{phase.sequences:,}"] if phase.sequences else ["", ""]
        yield [phase.name, *counted, f"{phase.work.flops / 1e15:,.3g}", duration(phase.seconds), gigabytes(phase.peak)]


def growth() -> Iterator[list[str]]:
    """What doubling one thing does to an outer step."""
    yield ["", "inner loop", "memory", "outer step", "memory", "of which statistics", "parts", "fits 80 GB"]
    start = Case("llama-3.2-1b", 8, budget=None)
    yield ["start: llama-3.2-1b, 8 GPUs", *row_of(start)]
    yield ["twice the sequences", *row_of(replace(start, sequences=100_000))]
    yield ["twice the domains", *row_of(replace(start, domains=10))]
    yield ["twice the capabilities", *row_of(replace(start, capabilities=10))]
    yield ["twice the GPUs", *row_of(replace(start, gpus=16))]


def progress(case: Case) -> None:
    """One line on the terminal."""
    print(case, file=sys.stderr, flush=True)


def markdown(rows: Iterator[list[str]]) -> str:
    """A table."""
    head, *rest = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rest])


SECTIONS: dict[str, Callable[[], Iterator[list[str]]]] = {
    "{models}": models,
    "{phases}": lambda: phases(Case("llama-3.1-8b", 8)),
    "{growth}": growth,
}


def main() -> None:
    """Fills the template beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "scaling.md")
    arguments = parser.parse_args()
    text = Path(__file__).with_name("scaling.template.md").read_text(encoding="utf-8")
    for mark, rows in SECTIONS.items():
        text = text.replace(mark, markdown(rows()))
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
