"""The inner loops of scripts/validate_influence.py: settings, sizes, and what a worker does for each."""

import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from demo_bench import Bench, Job
from validate_estimates import (
    DAMPINGS,
    FAMILIES,
    JOINT,
    JOINT_DAMPINGS,
    Mixed,
    Trail,
    all_matrices,
    source_matrices,
)

from ideal.demo import STARTS
from ideal.influence import DomainSample
from ideal.mixture import Mixture
from ideal.preparation import start_ratios
from ideal.training import RoundPlan

Volume = Literal["free", "fixed"]
CENTRE = "centre"
CLIP = 1.0
"""max_grad_norm, as transformers has it by itself."""


@dataclass(frozen=True)
class Passes:
    """How often the examples are seen: the start's ratios times `scale`, for `epochs` passes (None: as configured)."""

    scale: float
    epochs: float | None


PASSES = {"few passes": Passes(1.0, 2), "overfit": Passes(0.25, 8)}
"""Both take as many steps. Two passes are the demo's own setting."""


@dataclass(frozen=True)
class Size:
    """How large a validation is.

    starts: ratios by domain. beta: the change of a domain, up and down. segments: of SOURCE; 0: leave it out.
    seeds: of the numbers reported. choosing: of those that choose the estimator; none: it is `estimator`.
    more: further arguments of main.py.
    """

    starts: Mapping[str, Mapping[str, float]] = field(
        default_factory=lambda: {name: STARTS[name] for name in ("uniform", "skewed")}
    )
    passes: Mapping[str, Passes] = field(default_factory=lambda: PASSES)
    volumes: Sequence[Volume] = ("free", "fixed")
    beta: float = 0.3
    seeds: Sequence[int] = tuple(range(8))
    choosing: Sequence[int] = tuple(range(100, 103))
    estimator: str = "EK-FAC 0.1"
    segments: int = 4
    families: Sequence[str] = tuple(FAMILIES)
    dampings: Sequence[float] = DAMPINGS
    joint: Sequence[str] = tuple(JOINT)
    joint_dampings: Sequence[float] = JOINT_DAMPINGS
    more: Sequence[str] = ()

    @property
    def settings(self) -> list["Setting"]:
        """All that are reported."""
        return [Setting(*each) for each in product(self.starts, self.passes, self.volumes)]

    @property
    def centres(self) -> list["Setting"]:
        """Those whose centre runs differ: volume is a way to change the mixture, not to start."""
        return [Setting(start, passes, "free") for start, passes in product(self.starts, self.passes)]

    @property
    def every_seed(self) -> list[int]:
        """Those that choose come first: without them there is no page of a run that was stopped."""
        return [*self.choosing, *self.seeds]

    def loops(self, domains: int) -> tuple[int, int]:
        """Inner loops of the oracle, and of the centres."""
        seeds = len(self.every_seed)
        return 2 * domains * len(self.settings) * seeds, len(self.centres) * seeds


QUICK = Size(
    starts={"skewed": STARTS["skewed"]},
    passes={"few passes": Passes(4.0, 1)},
    seeds=(0, 1),
    choosing=(100, 101),
    segments=2,
    families=("identity", "EK-FAC"),
    dampings=(1e-2, 1.0),
    joint=("joint",),
    joint_dampings=(1.0,),
    more=("--data.max_examples", "80"),
)
"""To see that everything works; its numbers say nothing."""


def size_of_model(more: Sequence[str], bench: Bench, seeds: int) -> Size:
    """For a model and data of one's own, dear to train: one setting, whose volume is fixed, and few estimators."""
    ratios = start_ratios(bench.config, bench.data)
    return Size(
        starts={"given": dict(zip(bench.domains, ratios.tolist(), strict=True))},
        passes={"as configured": Passes(1.0, None)},
        volumes=("fixed",),
        seeds=tuple(range(seeds)),
        choosing=(),
        segments=0,
        families=("identity", "EK-FAC"),
        dampings=(1e-2, 0.1, 1.0, 10.0),
        joint=(),
        more=more,
    )


@dataclass(frozen=True)
class Setting:
    """A start, how often examples are seen, and what stays when a domain changes."""

    start: str
    passes: str
    volume: Volume

    @property
    def name(self) -> str:
        """For people and keys."""
        return f"{self.start} start, {self.passes}, {self.volume} volume"

    def centre_key(self, seed: int) -> str:
        """Of the run without a change."""
        return f"{self.start}/{self.passes}/{CENTRE}/{seed}"

    def key(self, domain: str, sign: int, seed: int) -> str:
        """Of a run with one domain changed."""
        return f"{self.start}/{self.passes}/{self.volume}/{domain}{'+' if sign > 0 else '-'}/{seed}"

    def ratios(self, size: Size) -> dict[str, float]:
        """By domain, at the centre."""
        return {name: ratio * size.passes[self.passes].scale for name, ratio in size.starts[self.start].items()}

    def training(self, size: Size) -> dict[str, Any]:
        """The TrainingArguments that the setting has of its own."""
        epochs = size.passes[self.passes].epochs
        return {} if epochs is None else {"num_train_epochs": epochs}


def centre_mixture(bench: Bench, setting: Setting, size: Size, seed: int) -> Mixture:
    """The start's, by ratios."""
    return bench.mixture(bench.ratios(setting.ratios(size)), seed)


def oracle_jobs(bench: Bench, size: Size, seeds: Iterable[int]) -> list[Job]:
    """Every domain up and down by beta, in every setting; seed after seed.

    Free: the domain's own examples change and nothing else, so that steps follow the volume. Fixed: the same
    proportions at the centre's trained tokens.
    """
    jobs = []
    for seed, setting in product(seeds, size.settings):
        ratios = setting.ratios(size)
        total = None if setting.volume == "free" else centre_mixture(bench, setting, size, seed).total_tokens
        for domain, sign in product(bench.domains, (1, -1)):
            changed = ratios | {domain: ratios[domain] * (1 + sign * size.beta)}
            jobs.append(Job(setting.key(domain, sign, seed), changed, seed, total, setting.training(size)))
    return jobs


@dataclass(frozen=True)
class Estimation:
    """A centre run, and every estimator at its model."""

    setting: Setting
    seed: int
    size: Size

    @property
    def key(self) -> str:
        """In the results."""
        return self.setting.centre_key(self.seed)

    def run(self, bench: Bench) -> dict[str, Any]:
        """Trains with checkpoints, measures, estimates."""
        size, seed = self.size, self.seed
        mixture = centre_mixture(bench, self.setting, size, seed)
        bench = bench.training(self.setting.training(size))
        if size.segments:
            plan = RoundPlan.of(mixture.total_rows, mixture.total_tokens, bench.config.train)
            # The middle of each segment is a multiple of half a segment.
            saving = {"save_strategy": "steps", "save_steps": max(1, plan.steps // (2 * size.segments))}
            bench = bench.training({**saving, "logging_steps": 1, "max_grad_norm": CLIP})
        rates: dict[int, float] = {}
        norms: dict[int, float] = {}

        def note(step: int, values: dict[str, float]) -> None:
            if "grad_norm" in values:
                rates[step], norms[step] = values["learning_rate"], values["grad_norm"]

        with tempfile.TemporaryDirectory() as scratch:
            trained, model = bench.train(mixture, seed, Path(scratch), note)
            outcome = bench.measure(mixture, trained, model)
            began = time.monotonic()
            mixed = Mixed(
                {name: DomainSample(bench.data.pools[name], domain.counts) for name, domain in mixture.domains.items()},
                bench.data.references,
                seed,
            )
            unrolled = {}
            if size.segments:
                trail = Trail(rates, norms, CLIP, trained.steps, checkpoints_in(Path(scratch) / "checkpoints"))
                models = {
                    step: bench.model(trail.checkpoints[step])
                    for _, _, step in trail.bounds(size.segments)
                }
                unrolled = source_matrices(model, mixed, trail, models, size.segments)
        matrices, solver = all_matrices(
            model,
            mixed,
            {family: FAMILIES[family] for family in size.families},
            size.dampings,
            {family: JOINT[family] for family in size.joint},
            size.joint_dampings,
        )
        matrices |= {f"SOURCE, {averaging}": matrix for averaging, matrix in unrolled.items()}
        return {
            "seed": seed,
            **outcome.to_json(),
            "estimates": {name: matrix.tolist() for name, matrix in matrices.items()},
            "solver": solver,
            "estimation_seconds": time.monotonic() - began,
        }


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """By step."""
    return {int(path.name.rpartition("-")[2]): path for path in sorted(folder.glob("checkpoint-*"))}


def estimations(size: Size, seeds: Iterable[int]) -> list[Estimation]:
    """One for every centre; seed after seed."""
    return [Estimation(setting, seed, size) for seed, setting in product(seeds, size.centres)]
