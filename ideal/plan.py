"""What a run takes: memory per process and phase, disk, passes over the data, FLOPs, time; before it runs.

Every phase is gone through on fake tensors (footprint.py) by the code that will run, so only shapes, lengths and
counts are needed: `--stage plan` prints all of it, a run the short form. Memory is that of tensors; libraries,
an allocator's waste and, on a GPU, CUDA's context come on top.
"""

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from ideal.config import Config
from ideal.errors import UserError
from ideal.footprint import Footprint, Work, fake
from ideal.influence import DomainSample
from ideal.influence.pairs import free_room, room_for_pairs
from ideal.influence.rehearsal import Rehearsal, rehearse
from ideal.influence.samples import draw_domain, whole_reference
from ideal.machine import Machine
from ideal.mixers import MIXERS, Setup
from ideal.model import DTYPES, checkpoint_config, with_adapters
from ideal.objective import summed_token_loss
from ideal.report.tables import duration
from ideal.training import RoundPlan

UPDATE_PASSES = 13
"""Times that a weight-sized tensor is read or written per optimizer step: 7 by AdamW, 6 by clipping and zeroing."""
LITTLE_ROOM = 1.1
"""Free disk / disk needed below which the plan says so."""
LOGITS = "logits"
MOMENTS = {"sgd": 0.0, "adagrad": 1.0, "adafactor": 0.0, "rmsprop": 1.0, "8bit": 0.5}
"""Optimizer state / weights, by what the optimizer's name holds; 2 for all others, AdamW among them."""


class CannotPlan(UserError):
    """A model cannot be gone through without its weights; it may well run with them."""


class Counts:
    """A set of examples of which only sizes are known."""

    def __init__(self, lengths: np.ndarray, trained_tokens: np.ndarray, positions: np.ndarray | None = None) -> None:
        """All [rows]: tokens, trained tokens, index of the last trained label (None: the last token's)."""
        self.lengths, self.trained_tokens = lengths, trained_tokens
        self.positions = lengths - 1 if positions is None else positions

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        """A row of that size; its last labels are the trained ones."""
        length, end, trained = int(self.lengths[row]), int(self.positions[row]) + 1, int(self.trained_tokens[row])
        labels = [-100] * length
        labels[max(end - trained, 0) : end] = [0] * min(trained, end)
        return {"input_ids": [0] * length, "labels": labels}


@dataclass(frozen=True)
class DataSizes:
    """What is known of the data: per domain examples and how often each stands in the mixture, and the other sets."""

    domains: Mapping[str, DomainSample]
    references: Mapping[str, Counts]
    tests: Mapping[str, Counts] = field(default_factory=dict)

    @staticmethod
    def of(
        pools: Mapping[str, Any],
        counts: Mapping[str, np.ndarray],
        references: Mapping[str, Any],
        tests: Mapping[str, Any],
    ) -> "DataSizes":
        """From loaded sets (`ideal.data.ExampleSet`)."""

        def sizes(sets: Mapping[str, Any]) -> dict[str, Counts]:
            """What the plan needs of each set."""
            return {name: Counts(s.lengths, s.trained_tokens, s.positions) for name, s in sets.items()}

        domains = {name: DomainSample(pool, counts[name]) for name, pool in sizes(pools).items()}
        return DataSizes(domains, sizes(references), sizes(tests))

    @property
    def lengths(self) -> np.ndarray:
        """[rows] tokens of every row of the mixture."""
        return np.concatenate([np.repeat(d.examples.lengths, d.counts) for d in self.domains.values()])  # type: ignore[attr-defined]

    def setup(self, seed: int) -> Setup:
        """What a mixer knows of it, every capability with the same weight."""
        pools = [d.examples for d in self.domains.values()]
        return Setup(
            seed=seed,
            domains=tuple(self.domains),
            capabilities=tuple(self.references),
            weights=np.full(len(self.references), 1 / len(self.references)),
            pool_sizes=np.array([len(pool) for pool in pools], dtype=np.float64),
            pool_tokens=np.array([pool.trained_tokens.sum() for pool in pools], dtype=np.float64),
            base_loss=None,
        )

    @property
    def trained_tokens(self) -> int:
        """Of an epoch."""
        return int(sum(d.counts @ d.examples.trained_tokens for d in self.domains.values()))


@dataclass(frozen=True)
class Phase:
    """One phase of a run, at the process that holds most."""

    name: str
    memory: dict[str, int]
    """Bytes by kind at its peak."""
    work: Work
    """Of one process, each time."""
    times: int
    """How often in a run."""
    sequences: int
    """That go through the model each time, over all processes and passes."""
    passes: float
    """Over the data of this phase."""
    seconds: float
    """Each time."""

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Plan:
    """What a run takes."""

    parameters: int
    trained: int
    processes: int
    machine: Machine | None
    round: RoundPlan
    phases: list[Phase]
    outer_parts: tuple[int, int]
    """In how many parts the outer step works on the layers: for the curvature, for the gradients."""
    at_once: int | None
    """Gradients of each layer that are held at a time, where these take turns; None: all together."""
    spilled: int
    """Bytes of eigenbases per process that wait in host memory or on disk."""
    disk: dict[str, int]
    """Bytes by what for."""

    @property
    def peak(self) -> Phase:
        """The phase that needs most memory."""
        return max(self.phases, key=lambda phase: phase.peak)

    def peak_of(self, *names: str) -> int:
        """The most of some phases, bytes per process."""
        return max((phase.peak for phase in self.phases if phase.name in names), default=0)

    @property
    def outer(self) -> list[Phase]:
        """The outer step's phases."""
        return [phase for phase in self.phases if phase not in self.training and phase.name != EVALUATION]

    @property
    def training(self) -> list[Phase]:
        """The inner loops, the longest first."""
        return [phase for phase in self.phases if phase.name.startswith(TRAINING)]

    @property
    def seconds(self) -> float:
        """Of the run."""
        return sum(phase.seconds * phase.times for phase in self.phases)


TRAINING, EVALUATION = "training", "evaluation"


def make_plan(config: Config, sizes: DataSizes, processes: int, machine: Machine | None, shape: Any = None) -> Plan:
    """The plan of a run.

    Args:
        machine: None: FLOPs and time are not wanted, which halves the plan's own time.
        shape: the model's transformers configuration; None: that of config.model.

    Raises:
        UserError: a setting that the run would refuse.
        CannotPlan: a model that cannot be gone through without its weights.
    """
    shape = checkpoint_config(config.model) if shape is None else shape
    plan = RoundPlan.of(int(len(sizes.lengths)), sizes.trained_tokens, config.train)
    mixer = MIXERS[config.mixing.method](config.mixing, sizes.setup(config.seed))
    last = mixer.last_round()
    lengths = Counter(mixer.length(number) for number in range(last + 1))
    try:
        with fake():
            # FSDP gathers weights in what is computed in; without it autocast copies them to that.
            sharded = _shards(config, processes) > 1
            model = empty_model(config, shape, _compute_dtype(config) if sharded else DTYPES[config.model.dtype])
            parameters = sum(p.numel() for p in model.parameters())
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            phases = _inner_loops(_training(model, config, sizes, plan, processes, machine), plan, lengths)
            model = empty_model(config, shape, _compute_dtype(config))
            phases.append(_evaluation(model, config, sizes, processes, machine, last + 2))
            outer = None
            if mixer.needs_influence:
                outer = _outer_step(model, config, sizes, processes, machine)
                phases += _outer_phases(_computing_weights(model, config, processes), outer, machine, max(last, 1))
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CannotPlan(f"plan: this model cannot be gone through without its weights: {reason}") from error
    return Plan(
        parameters,
        trained,
        processes,
        machine,
        plan,
        phases,
        (len(outer.layout.factor_parts), len(outer.layout.gradient_parts)) if outer else (0, 0),
        outer.layout.at_once if outer and outer.layout.in_turns else None,
        outer.spilled if outer else 0,
        _disk(config, shape, parameters, trained, plan, last + 1, _temporary(config, outer, processes)),
    )


def empty_model(config: Config, shape: Any, dtype: torch.dtype) -> torch.nn.Module:
    """The model without its weights, inside `footprint.fake()`; adapters included."""
    attention = config.model.attn_implementation
    model = AutoModelForCausalLM.from_config(
        shape,
        dtype=dtype,
        trust_remote_code=config.model.trust_remote_code,
        # flash kernels exist on GPUs only; sdpa's take as much memory.
        attn_implementation="eager" if attention == "eager" else "sdpa",
    )
    return with_adapters(model, config.model.lora)


def _trained_size(config: Config) -> int:
    """Bytes of a weight that is trained: adapters are float32, whatever the model is in (peft)."""
    size = DTYPES[config.model.dtype].itemsize
    return max(size, torch.float32.itemsize) if config.model.lora.rank else size


def _compute_dtype(config: Config) -> torch.dtype:
    return config.train.compute_dtype or DTYPES[config.model.dtype]


def _shards(config: Config, processes: int) -> int:
    """Among how many processes the weights are split."""
    return processes if config.train.arguments.get("fsdp") else 1


def _vocabulary(model: torch.nn.Module) -> int:
    return int(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]


def _kind(vocabulary: int) -> Callable[[torch.Tensor], str]:
    return lambda tensor: LOGITS if tensor.shape[-1:] == (vocabulary,) else "activations"


def _seconds(machine: Machine | None, work: Work) -> float:
    return machine.seconds(work) if machine else math.nan


def _count(tensors: Iterable[torch.Tensor]) -> int:
    """Numbers in them."""
    return sum(tensor.numel() for tensor in tensors)


# Training


def _training(
    model: torch.nn.Module,
    config: Config,
    sizes: DataSizes,
    plan: RoundPlan,
    processes: int,
    machine: Machine | None,
) -> Phase:
    """A whole inner loop."""
    given = config.train.arguments
    rows = given.get("per_device_train_batch_size", min(8, config.train.global_batch_size))
    accumulation = accumulation_steps(config, rows, processes)
    shards = _shards(config, processes)
    names = ("activation_checkpointing", "gradient_checkpointing")  # the second is the first's old name
    if any(given.get(name) for name in names) or (given.get("fsdp_config") or {}).get(names[0]):
        options = dict(given.get(f"{names[0]}_kwargs") or given.get(f"{names[1]}_kwargs") or {})
        every = options.pop("every_n_layers", 1)
        options.pop("offload", None)
        enable: Any = getattr(model, f"{names[0]}_enable", None) or getattr(model, f"{names[1]}_enable")
        enable(options or None, every_n_layers=every)
    model.train()
    lengths = sizes.lengths
    # The gradients of the first micro-batch are there during all that follow.
    run = partial(_steps, model, rows, amp=bool(given.get("bf16")))
    footprint = run(int(lengths.max()), min(accumulation, 2))
    memory = footprint.peaks(without="gradients" if shards > 1 else "")[""]
    memory = _held_in_training(model, config, shards, processes > 1) | memory
    work = Work()
    if machine:
        typical, count = math.ceil(_mean_longest(lengths, rows)), min(accumulation, 2)
        if typical < lengths.max():
            footprint, count = run(typical, 1), 1
        work = footprint.work[""].times(plan.steps * accumulation / count)
        trained = _count(p for p in model.parameters() if p.requires_grad)
        work += Work(moved=UPDATE_PASSES * trained * _trained_size(config) * plan.steps / shards)
    sequences = plan.steps * config.train.global_batch_size
    return Phase(TRAINING, memory, work, 1, sequences, plan.epochs, _seconds(machine, work))


def _inner_loops(whole: Phase, plan: RoundPlan, lengths: Mapping[float, int]) -> list[Phase]:
    """The inner loops of a run, the longest first, by their `lengths` (parts of a whole one) and how many there are."""
    phases = []
    for length, count in sorted(lengths.items(), reverse=True):
        part = math.ceil(length * plan.steps) / plan.steps
        phases.append(
            replace(
                whole,
                name=TRAINING if length == 1 else f"{TRAINING} x {length:g}",
                work=whole.work.times(part),
                times=count,
                sequences=round(whole.sequences * part),
                passes=whole.passes * part,
                seconds=whole.seconds * part,
            )
        )
    return phases


def accumulation_steps(config: Config, rows: int, processes: int) -> int:
    """Micro-batches of `rows` sequences per optimizer step; raises UserError where the global batch does not divide."""
    if config.train.global_batch_size % (rows * processes):
        raise UserError(
            f"train.global_batch_size: {config.train.global_batch_size} is not a multiple of "
            f"train.per_device_train_batch_size x processes = {rows} x {processes}"
        )
    return config.train.global_batch_size // (rows * processes)


def _steps(model: torch.nn.Module, rows: int, length: int, count: int, amp: bool) -> Footprint:
    """`count` forward and backward passes, as the Trainer makes them; gradients are named."""
    footprint = Footprint(_kind(_vocabulary(model)))
    with footprint:
        for _ in range(count):
            _loss(model, rows, length, amp).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                footprint.rename(parameter.grad, "gradients")
    for parameter in model.parameters():
        parameter.grad = None
    return footprint


def _loss(model: torch.nn.Module, rows: int, length: int, amp: bool) -> torch.Tensor:
    """The summed loss of a padded batch; accelerate turns what comes out of mixed precision into float32."""
    ids = torch.zeros(rows, length, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return summed_token_loss(logits.float() if amp else logits, ids) / 1.0


def _held_in_training(model: torch.nn.Module, config: Config, shards: int, several: bool) -> dict[str, int]:
    """Weights and what goes with them, bytes per process."""
    held, computed = DTYPES[config.model.dtype].itemsize, _compute_dtype(config).itemsize
    trained = _trained_size(config) * _count(p for p in model.parameters() if p.requires_grad)
    name = str(config.train.arguments.get("optim", "adamw"))
    moments = next((factor for part, factor in MOMENTS.items() if part in name), 2.0)
    found = _weights(model, shards, held, computed) | {"optimizer": int(moments * trained) // shards}
    if shards > 1:
        found["gradients"] = trained // shards + computed * _largest_block(model)
    elif several:
        found["buckets"] = trained  # DDP's copies of all gradients
    return found


def _weights(model: torch.nn.Module, shards: int, held: int, computed: int) -> dict[str, int]:
    """The weights of one process, bytes; held, computed: bytes of one as it is kept and in computation.

    Where FSDP2 shards them, a block's are gathered while it runs and the next block's meanwhile; what is in no block
    (embeddings, head) stays whole. They are added to the peak of all else, which may fall when nothing is gathered.
    """
    whole = _count(model.parameters())
    # Adapters are float32 in a narrower model.
    wider = sum(p.numel() * max(p.element_size() - held, 0) for p in model.parameters() if p.requires_grad)
    kept = (held * whole + wider) // shards
    if shards == 1:
        return {"weights": kept}
    outside = whole - sum(_count(block.parameters()) for block in _blocks(model))
    return {"weights": kept, "gathered": computed * (outside + 2 * _largest_block(model))}


def _largest_block(model: torch.nn.Module) -> int:
    """Weights of the largest block."""
    return max((_count(block.parameters()) for block in _blocks(model)), default=0)


def _blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that FSDP shards one by one."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def _mean_longest(lengths: np.ndarray, rows: int) -> float:
    """The expected longest of `rows` rows drawn at random: what a batch is padded to."""
    below = (np.arange(len(lengths) + 1) / len(lengths)) ** rows
    return float(np.sort(lengths) @ np.diff(below))


# Evaluation and the outer step


def _evaluation(
    model: torch.nn.Module,
    config: Config,
    sizes: DataSizes,
    processes: int,
    machine: Machine | None,
    times: int,
) -> Phase:
    """Reference and test losses."""
    lengths = np.concatenate([s.lengths for s in [*sizes.references.values(), *sizes.tests.values()]]).astype(float)
    rows = config.evaluation.batch_size
    model.eval()

    def run(length: int) -> Footprint:
        """One batch of sequences of so many tokens."""
        with Footprint(_kind(_vocabulary(model))) as footprint, torch.no_grad():
            _loss(model, rows, length, amp=False)
        return footprint

    memory = _computing_weights(model, config, processes) | run(int(lengths.max())).peaks()[""]
    work = Work()
    if machine:
        typical = round(lengths.mean())
        work = run(typical).work[""].times(lengths.sum() / (rows * typical), (lengths**2).sum() / (rows * typical**2))
        work = work.times(1 / processes)
    return Phase(EVALUATION, memory, work, times, len(lengths), 1, _seconds(machine, work))


def _computing_weights(model: torch.nn.Module, config: Config, processes: int) -> dict[str, int]:
    """Those of a model that is not trained, held in what is computed in."""
    size = _compute_dtype(config).itemsize
    return _weights(model, _shards(config, processes), size, size)


def _outer_step(
    model: torch.nn.Module, config: Config, sizes: DataSizes, processes: int, machine: Machine | None
) -> Rehearsal:
    """One outer step's phases, without the model's weights."""
    fraction = 1.0 if config.influence.sample_fraction == "auto" else config.influence.sample_fraction
    training = [draw_domain(name, domain, fraction, config.seed) for name, domain in sizes.domains.items()]
    reference = [whole_reference(name, examples) for name, examples in sizes.references.items()]
    on_gpu = machine.gpu if machine else torch.accelerator.is_available()
    room = room_for_pairs(config.influence.pair_budget, on_gpu)
    return rehearse(
        model,
        training,
        reference,
        config.influence,
        processes,
        vocabulary=_vocabulary(model),
        pair_room=room if on_gpu else min(room, free_room(processes)),
        on_gpu=on_gpu,
        timed=machine is not None,
    )


def _outer_phases(weights: dict[str, int], outer: Rehearsal, machine: Machine | None, steps: int) -> list[Phase]:
    return [
        Phase(
            name,
            weights | phase.memory,
            phase.work,
            steps,
            phase.sequences,
            phase.passes,
            _seconds(machine, phase.work),
        )
        for name, phase in outer.phases.items()
    ]


def _disk(
    config: Config, shape: Any, parameters: int, trained: int, plan: RoundPlan, loops: int, temporary: dict[str, int]
) -> dict[str, int]:
    """Bytes by what for, over all processes."""
    stored = getattr(shape, "dtype", None)
    size = (stored if isinstance(stored, torch.dtype) else DTYPES[config.model.dtype]).itemsize
    saved = trained if config.model.lora.rank else parameters
    kept = 2 if config.keep_models == "final" else loops + 1
    disk = {f"{kept} models": kept * saved * size}
    given = config.train.arguments
    checkpoint = trained * 3 * _trained_size(config)
    if config.mixing.start == "continue" and loops > 1:
        disk["2 checkpoints between rounds"] = 2 * checkpoint
    strategy = str(given.get("save_strategy", "no"))
    if strategy not in ("no", "SaveStrategy.NO"):
        every = given.get("save_steps", 500) if "steps" in strategy.lower() else plan.steps_per_epoch
        count = max(1, plan.steps // max(int(every), 1)) if every >= 1 else math.ceil(1 / every)
        count = min(count, given.get("save_total_limit") or count)
        disk[f"{count} checkpoints"] = count * checkpoint
    return disk | temporary


def _temporary(config: Config, outer: Rehearsal | None, processes: int) -> dict[str, int]:
    """Bytes on disk during an outer step, by what for, over all processes."""
    spilled = outer.spilled if outer and config.influence.spill == "disk" else 0
    sizes = {"spilled eigenbases": spilled, "pairs of sequences": outer.pairs if outer else 0}
    return {name: size * processes for name, size in sizes.items() if size}


# Words


def gigabytes(size: float) -> str:
    """Bytes for a person."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def short_text(config: Config, sizes: DataSizes, plan: Plan) -> str:
    """What a run says before its first expensive step; the time follows once a step was measured."""
    rows, batch = len(sizes.lengths), config.train.global_batch_size
    loops = ", ".join(f"{phase.times} of {phase.sequences // batch:,} steps" for phase in plan.training)
    keeps_volume = MIXERS[config.mixing.method](config.mixing, sizes.setup(config.seed)).keeps_volume
    per_process = config.train.arguments.get("per_device_train_batch_size", min(8, batch))
    accumulation = accumulation_steps(config, per_process, plan.processes)
    memory = f"training {gigabytes(plan.training[0].peak)}, evaluation {gigabytes(plan.peak_of(EVALUATION))}"
    if plan.outer:
        parts = f" in {plan.outer_parts[1]} parts" if plan.outer_parts[1] > 1 else ""
        memory += f", outer step {gigabytes(plan.peak_of(*(phase.name for phase in plan.outer)))}{parts}"
    return "\n".join(
        [
            f"inner loops: {loops}; a step is {batch} sequences"
            f" ({per_process} per process x {plan.processes} process(es) x {accumulation} accumulation)",
            f"round 0: {rows:,} examples, {sizes.trained_tokens:,} trained tokens per epoch"
            + ("; later rounds hold as many tokens" if keeps_volume else "; later rounds may differ"),
            f"memory per process, beside the libraries: {memory}"
            f" ({plan.parameters / 1e6:,.1f} M parameters, {plan.trained / 1e6:,.1f} M trained)",
            _disk_line(config, plan),
            "time: said as soon as a step has been measured",
        ]
    )


def long_text(config: Config, sizes: DataSizes, plan: Plan) -> str:
    """Everything, for `--stage plan`."""
    machine = plan.machine
    assert machine, "a plan in full has a machine"
    lines = [
        f"{plan.parameters / 1e6:,.1f} M parameters, {plan.trained / 1e6:,.1f} M trained; {plan.processes} process(es),"
        f" each on {machine.name}: {machine.wide / 1e12:,.3g} TFLOP/s in float32, {machine.narrow / 1e12:,.3g} in"
        f" bfloat16, {machine.moved / 1e9:,.3g} GB/s",
        f"{len(sizes.domains)} domains of {len(sizes.lengths):,} examples, {len(sizes.references)} capabilities of"
        f" {sum(map(len, sizes.references.values())):,}; a whole inner loop has {plan.round.steps:,} steps of"
        f" {config.train.global_batch_size} sequences",
        "",
        *table(plan),
        "",
        "times: how often in the run; the other columns are for one time, and per process but for the sequences.",
        "memory: tensors at the phase's peak, on the process that holds most; libraries come on top.",
        _fits(plan),
        _disk_line(config, plan),
        f"time: about {duration(plan.seconds)} in all, loading and communication not counted"
        + (" (sample_fraction auto: at most)" if config.influence.sample_fraction == "auto" else ""),
    ]
    if plan.outer:
        turns = f", {plan.at_once} of each layer's at a time" if plan.at_once else ""
        spilled = f"; {gigabytes(plan.spilled)} per process wait in {config.influence.spill}" if plan.spilled else ""
        parts = "{} part(s) of the layers for the curvature, {} for the gradients".format(*plan.outer_parts)
        lines.insert(-2, f"outer step: {parts}{turns}{spilled}")
    return "\n".join(lines)


def table(plan: Plan) -> list[str]:
    """A row per phase."""
    head = ["phase", "times", "passes", "sequences", "TFLOP", "time", "memory", "of which"]
    rows = [head]
    for phase in plan.phases:
        parts = sorted(phase.memory.items(), key=lambda item: -item[1])
        rows.append(
            [
                phase.name,
                str(phase.times),
                f"{phase.passes:.3g}" if phase.sequences else "",
                f"{phase.sequences:,}" if phase.sequences else "",
                f"{phase.work.flops / 1e12:,.3g}",
                duration(phase.seconds),
                gigabytes(phase.peak),
                ", ".join(f"{kind} {gigabytes(size)}" for kind, size in parts if size > phase.peak / 100),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head) - 1)]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:], strict=True)),
                row[-1],
            ]
        ).rstrip()
        for row in rows
    ]


def _fits(plan: Plan) -> str:
    highest, room = plan.peak, plan.machine.memory if plan.machine else None
    line = f"peak: {gigabytes(highest.peak)} per process, in {highest.name}"
    if room is None:
        return line
    too_large = [phase.name for phase in plan.phases if phase.peak > room]
    if too_large:
        return f"{line}; does NOT fit {gigabytes(room)}: {', '.join(too_large)}"
    return f"{line}; fits {gigabytes(room)}"


def _disk_line(config: Config, plan: Plan) -> str:
    needed = sum(plan.disk.values())
    what = ", ".join(f"{name} {gigabytes(size)}" for name, size in plan.disk.items())
    folder = Path(config.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    room = "" if free > LITTLE_ROOM * needed else f" (only {gigabytes(free)} are free!)"
    return f"disk: about {gigabytes(needed)} ({what}){room}"
