"""The plan beside what real processes take, and what it says of what is not there."""

import json
import os
import random
import shutil
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import peaks
import processes
import pytest
import torch
from peaks import Task, make_set
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from ideal.config import validate
from ideal.distributed import rehearsed, world_size
from ideal.errors import UserError
from ideal.footprint import Footprint, fake
from ideal.influence import DomainSample, selection
from ideal.influence.samples import LEAST_SEQUENCES
from ideal.influence.scratch import BUFFER_BYTES, ScratchFile
from ideal.machine import DEVICES, Machine, PlanConfig, machine_of
from ideal.plan import CannotPlan, Counts, DataSizes, Plan, _mean_longest, long_text, make_plan
from main import ARGUMENTS

SMOLLM2 = Path(os.environ.get("SMOLLM2", "/tmp/smollm2"))
TOLERANCE = 0.15
"""Of the measured peak, as issue 3 asks. What the plan cannot see: kernels' own workspaces, the allocator's waste."""
TRAINING = {"global_batch_size": 8, "per_device_train_batch_size": 4, "use_cpu": True, "num_train_epochs": 1,
            "disable_tqdm": True}  # fmt: skip


EARLY = {"sample_fraction": 1.0, "factor_fraction": 1.0, "eigenvalue_fraction": 0.1}


def random_shape(draw: random.Random) -> dict[str, int]:
    """A Llama of proportions of its own, with 150 to 600 MB for its parts to show beside the interpreter's noise."""
    heads = draw.choice([4, 6, 8])
    hidden = heads * draw.choice([48, 64])
    return {
        "hidden_size": hidden,
        "intermediate_size": int(hidden * draw.uniform(1.5, 4.5)) // 8 * 8,
        "num_hidden_layers": draw.randint(2, 5),
        "num_attention_heads": heads,
        "num_key_value_heads": heads // draw.choice([1, 2]),
        "vocab_size": draw.choice([4000, 8000, 16000]),
    }


def random_task(seed: int, early: bool = False) -> Task:
    """Sizes that no one has chosen.

    early: gradients come with covariances from all sequences, and eigenvalues from two halves of fewer.
    """
    draw = random.Random(seed)
    rows = (LEAST_SEQUENCES + 1, LEAST_SEQUENCES + 4) if early else (8, 14)
    return Task(
        model=random_shape(draw),
        domains={name: draw.randint(*rows) for name in ("a", "bb", "ccc")[: 2 if early else draw.randint(2, 3)]},
        references={name: draw.randint(6, 8) for name in ("r", "ss")[: draw.randint(1, 2)]},
        length=draw.choice([48, 64] if early else [96, 128]),  # its domains are larger
        arguments=TRAINING,
        influence={"batch_size": draw.choice([4, 8]), **(EARLY if early else {})},
    )


def sizes_of(task: Task) -> DataSizes:
    """What the plan is told of the task's data."""
    pools = {name: make_set(name, rows, task.length, 100) for name, rows in task.domains.items()}
    references = {name: make_set(name, rows, task.length, 100) for name, rows in task.references.items()}
    return DataSizes.of(pools, {name: np.ones(len(pool), dtype=int) for name, pool in pools.items()}, references, {})


def planned(task: Task, ranks: int) -> Plan:
    """The plan of a run on the task's data."""
    tree = {"train": task.arguments, "influence": task.influence, "model": {"lora": {"rank": task.rank}}}
    config = validate(tree)
    folder = isinstance(task.model, str)
    shape = AutoConfig.from_pretrained(task.model) if folder else peaks.configuration(task.model)
    return make_plan(config, sizes_of(task), ranks, None, shape)


def measured(task: Task, phase: str, ranks: int, folder: Path) -> int:
    """The highest peak of any process above its base, bytes."""
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps(asdict(task)))
    processes.run(peaks.on_rank, phase, folder, ranks=ranks if ranks > 1 else None, timeout=1200)
    found = [json.loads(path.read_text()) for path in folder.glob("rank*.json")]
    assert len(found) == ranks
    return max(one["peak"] - one["base"] for one in found)


def compare(task: Task, phase: str, ranks: int, folder: Path, above: float = TOLERANCE) -> None:
    """Asserts that the plan is at most TOLERANCE below the measurement and `above` above it, and says both."""
    # On a CPU the Trainer leaves train.fsdp aside; the model is sharded by hand there.
    # In a process of its own, as a user's plan is: after the other tests' files, in one session, it came out double.
    with ProcessPoolExecutor(1, mp_context=processes.CONTEXT) as pool:
        on_shards = replace(task, arguments={**task.arguments, "fsdp": phase == "sharded"})
        plan = pool.submit(planned, on_shards, ranks).result()
    names = ["training"] if phase == "training" else [one.name for one in plan.outer]
    expected, found = plan.peak_of(*names), measured(task, phase, ranks, folder)
    print(f"{phase}, {ranks} process(es), {task}: planned {expected / 1e6:.1f} MB, measured {found / 1e6:.1f} MB")
    assert 1 - TOLERANCE <= expected / found <= 1 + above


@pytest.mark.parametrize("phase", ["training", "influence"])
@pytest.mark.parametrize("number", [0, 1])
def test_peaks_of_random_shapes(phase, number, tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")  # pytest shows it where the test fails
    task = random_task(seed, early=phase == "influence" and number == 1)
    for ranks in (1, 2):
        compare(task, phase, ranks, tmp_path / str(ranks))


@pytest.mark.parametrize("phase", ["training", "influence"])
@pytest.mark.parametrize(("kind", "layers"), [("gpt_neox", ["*.mlp.dense_*"]), ("phi3", ["*.mlp.*_proj"])])
def test_peaks_of_other_architectures(kind, layers, phase, tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    task = random_task(seed)
    model = {**task.model, "model_type": kind, "pad_token_id": 0}
    compare(replace(task, model=model, influence={**task.influence, "layers": layers}), phase, 1, tmp_path / "out")


@pytest.mark.parametrize("phase", ["training", "influence"])
def test_peaks_of_adapters(phase, tmp_path):
    """Nothing of the base model's weights is trained; the tracked layers are the adapters' own."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    compare(replace(random_task(seed), rank=16), phase, 1, tmp_path / "out")


def test_peak_of_long_sequences_with_shared_keys(tmp_path):
    """Attention that is given no mask makes none, nor copies of the keys and values that its heads share."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 1}
    shape = {**heads, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 6, "vocab_size": 512}
    compare(Task(shape, {"a": 4}, {"r": 4}, 1024, TRAINING, {"batch_size": 4}), "influence", 1, tmp_path / "out")


def test_peaks_within_a_budget(tmp_path):
    """Gradients take turns, or layers are worked on in parts, and what is finished waits in files."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    task = random_task(seed)
    few = {"domains": dict.fromkeys(task.domains, 4), "references": dict.fromkeys(task.references, 4)}
    task = replace(task, **few)
    held = [phase.memory.get("factors", 0) + phase.memory.get("gradients", 0) for phase in planned(task, 1).outer]
    budget = max(held) * random.Random(seed).uniform(0.4, 0.9) / 1e9
    task = replace(task, influence={**task.influence, "memory_budget": budget})
    compare(task, "influence", 1, tmp_path / "out")


def test_peak_of_a_sharded_outer_step(tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    # What is gathered of the weights is added to the peak of all else, which may fall at another time.
    compare(random_task(seed), "sharded", 2, tmp_path / "out", above=0.25)


def test_peak_of_the_joint_solver(tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    task = random_task(seed)
    few = {"domains": dict.fromkeys(task.domains, 4), "references": dict.fromkeys(task.references, 4)}
    task = replace(task, **few, influence={**task.influence, "solver": "cg", "solver_iterations": 2})
    compare(task, "influence", 2, tmp_path / "out")


@pytest.mark.skipif(not (SMOLLM2 / "config.json").is_file(), reason="no SmolLM2 at $SMOLLM2")
@pytest.mark.skipif("SMOLLM2" not in os.environ, reason="ten minutes: set SMOLLM2=FOLDER")
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("phase", ["training", "influence"])
def test_peaks_of_smollm2(phase, ranks, tmp_path):
    task = Task(str(SMOLLM2), {"a": 12, "bb": 16}, {"c": 8}, 128, TRAINING, {"batch_size": 4})
    compare(task, phase, ranks, tmp_path / "out")


@pytest.mark.parametrize(
    "influence",
    [{}, {"product_dtype": "bfloat16"}, {"memory_budget": 2e-5}, {"pair_budget": 5e-3}, {"layers": ["*up*"]}],
)
def test_disk_of_kept_pairs(influence, tmp_path, monkeypatch):
    settings = {"batch_size": 4, "pair_budget": 1, **influence}
    task = Task(dict(peaks.TINY), {"a": 50, "bb": 60}, {"r": 40}, 64, TRAINING, settings)
    sizes = []
    write = ScratchFile.write

    def noted(self, *args):
        block = write(self, *args)
        sizes.append(self.end)
        return block

    monkeypatch.setattr(ScratchFile, "write", noted)
    peaks.run_influence(task, peaks.make_model(task.model, tmp_path / "model"), tmp_path)
    assert planned(task, 1).disk["pairs of sequences"] == max(sizes) > 0


def test_buffers_of_kept_pairs_are_there_from_the_first_step():
    """Also at the peak of the first batch, which comes before anything of it is written."""

    def peak(budget: float) -> int:
        every = {"influence__sample_fraction": 1.0, "influence__factor_fraction": 1.0}
        plan = tiny_plan(longer=960, influence__pair_budget=budget, **every)
        return next(phase.peak for phase in plan.outer if phase.name == "covariances")

    # 39 sequences of 63 positions in each of two domains, and one of 1,023.
    written = 2 * (39 * 63 + 1023) * 4 * BLOCKS * (2 * peaks.TINY["hidden_size"] + 3 * peaks.TINY["intermediate_size"])
    assert peak(1) - peak(0) == written < 2 * BUFFER_BYTES


def test_disk_of_kept_pairs_is_no_more_than_may_be_taken(monkeypatch):
    key = "pairs of sequences"
    whole = tiny_plan(influence__pair_budget=1).disk[key]
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(8 * whole, 7 * whole, whole))
    assert whole / 4 < tiny_plan(influence__pair_budget=1).disk[key] <= whole / 2
    # On a GPU as much as was asked for: nothing unless it was.
    assert tiny_plan(machine=DEVICES["h100"], influence__pair_budget=1).disk[key] == whole
    assert key not in tiny_plan(machine=DEVICES["h100"]).disk
    # auto may keep all of 2 domains of 40, beside 32 reference rows for errors; 63 positions each.
    auto = tiny_plan(influence__sample_fraction="auto", influence__pair_budget=1, machine=DEVICES["h100"]).disk[key]
    per_position = 4 * BLOCKS * (2 * peaks.TINY["hidden_size"] + 3 * peaks.TINY["intermediate_size"])
    assert auto == (80 + 32) * 63 * per_position


# The footprint, against sums by hand


def test_live_bytes_and_flops_by_hand():
    with fake():
        weight = torch.zeros(30, 20)
        with Footprint(lambda tensor: "wide" if tensor.shape[-1] == 30 else "other") as footprint:
            x = torch.zeros(50, 20)
            y = x @ weight.mT
            del x
            z = y + 1.0
            del y, z
    # x and y, then y and z: the second pair is larger.
    assert footprint.peaks()[""] == {"other": 0, "wide": 2 * 50 * 30 * 4}
    assert footprint.work[""].wide == 2 * 50 * 20 * 30
    assert footprint.work[""].moved == 4 * (50 * 20 + 2 * 50 * 30)  # zeros writes, + reads and writes


def test_a_kind_can_be_left_out_and_phases_are_apart():
    with fake(), Footprint(lambda tensor: str(tensor.ndim)) as footprint:
        footprint.phase = "first"
        kept = torch.zeros(1000)
        footprint.phase = "second"
        square = torch.zeros(100, 100)
        footprint.rename(kept, "kept")
        del square
        footprint.passing({"workspace": 50})
    assert footprint.peaks() == {"first": {"kept": 4000}, "second": {"kept": 4000, "2": 40000}}
    assert footprint.peaks(without="2")["second"] == {"kept": 4000, "workspace": 50}


def test_checks_of_values_pass_and_eigenvectors_have_their_shape():
    with fake(), Footprint(lambda tensor: "any") as footprint:
        values, vectors = torch.linalg.eigh(torch.zeros(40, 40, dtype=torch.float64))
        assert bool(vectors.isfinite().all()) and values.numpy().tolist() == [1.0] * 40
    assert vectors.shape == (40, 40) and footprint.work[""].eigen == 40**3


def test_a_rehearsed_rank_is_one_of_many():
    assert world_size() == 1
    with rehearsed(3, 8):
        assert world_size() == 8
    assert world_size() == 1


# What the plan says


BLOCKS = 2
MLP = peaks.TINY["hidden_size"] * peaks.TINY["intermediate_size"]


def block_weights(blocks: int = BLOCKS) -> int:
    """Weights of tiny_plan's blocks, but for norms."""
    hidden, heads = peaks.TINY["hidden_size"], peaks.TINY["num_attention_heads"]
    return blocks * (3 * MLP + 2 * hidden * (hidden + hidden // heads * peaks.TINY["num_key_value_heads"]))


def tiny_plan(
    processes: int = 1,
    machine: Machine | None = None,
    blocks: int = BLOCKS,
    longer: int = 0,
    capabilities: str = "r",
    **keys: Any,
) -> Plan:
    """longer: tokens that one sequence of each set has beyond the others' 64. capabilities: a letter for each."""
    shape = LlamaConfig(**{**peaks.TINY, "num_hidden_layers": blocks})
    rows = Counts(np.array([64 + longer] + [64] * 39), np.full(40, 48))
    domains = {name: DomainSample(rows, np.ones(40, dtype=int)) for name in "ab"}
    sizes = DataSizes(domains, dict.fromkeys(capabilities, rows))
    tree = {"train": {"global_batch_size": 16, "per_device_train_batch_size": 4}}
    for key, value in keys.items():
        group, name = key.split("__")
        tree.setdefault(group, {})[name] = value
    return make_plan(validate(tree), sizes, processes, machine, shape)


def test_training_holds_weights_moments_and_buckets():
    alone, two = (tiny_plan(processes).phases[0].memory for processes in (1, 2))
    assert alone["optimizer"] == 2 * alone["weights"] and "buckets" not in alone
    assert two["buckets"] == two["weights"]
    sharded = tiny_plan(4, train__fsdp=True).phases[0].memory
    assert sharded["weights"] == alone["weights"] // 4 and sharded["optimizer"] == alone["optimizer"] // 4
    assert tiny_plan(train__optim="sgd").phases[0].memory["optimizer"] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_alone_have_moments(dtype):
    """A x B of rank 4 at every linear layer of the blocks, in float32 whatever the model is in."""
    memory = tiny_plan(model__lora={"rank": 4}, model__dtype=dtype).phases[0].memory
    hidden, wide = peaks.TINY["hidden_size"], peaks.TINY["intermediate_size"]
    keys = hidden // peaks.TINY["num_attention_heads"] * peaks.TINY["num_key_value_heads"]
    sizes = 3 * (hidden + wide) + 2 * (hidden + hidden) + 2 * (hidden + keys)
    assert memory["optimizer"] == 2 * 4 * BLOCKS * 4 * sizes


def test_checkpointing_takes_fewer_activations_and_more_flops():
    plain = tiny_plan(machine=DEVICES["h100"]).phases[0]
    frugal = tiny_plan(machine=DEVICES["h100"], train__gradient_checkpointing=True).phases[0]
    assert frugal.memory["activations"] < 0.7 * plain.memory["activations"]
    # The blocks' forward once more, but for down's: nothing needs its output.
    assert frugal.work.wide - plain.work.wide == 2 * (block_weights() - BLOCKS * MLP) * 15 * 16 * 64


def test_statistics_are_split_among_owners_and_parts():
    def held(plan: Plan) -> int:
        return max(p.memory.get("factors", 0) + p.memory.get("gradients", 0) for p in plan.outer)

    whole = tiny_plan(blocks=4)
    assert whole.outer_parts == (1, 1) and whole.at_once is None
    assert held(tiny_plan(4, blocks=4)) == pytest.approx(held(whole) / 4, rel=0.25)
    parts = tiny_plan(blocks=4, influence__memory_budget=held(whole) / 3 / 1e9, influence__pair_budget=0)
    assert parts.outer_parts[0] > 1 and (parts.outer_parts[1] > 1 or parts.at_once)
    assert held(parts) <= held(whole) / 3
    # One gradient at a time: no domain is passed over twice, the reference set is for each of two.
    passes = {phase.name: phase.passes for phase in parts.outer}
    assert parts.at_once == 1 and passes["domain gradients"] == 1 and passes["reference scores"] == 2
    # With its pairs kept it is not.
    budgets = {"influence__memory_budget": held(whole) / 3 / 1e9, "influence__pair_budget": 1}
    kept = {phase.name: phase.passes for phase in tiny_plan(blocks=4, **budgets).outer}
    assert kept["reference scores"] == 1
    # Also where the domains' gradients come with the eigenvalues.
    budgets = {"influence__memory_budget": 0.9 * held(whole) / 1e9, "influence__factor_fraction": 1.0}
    turns = tiny_plan(blocks=4, **budgets)
    assert turns.outer_parts == (1, 1) and turns.at_once == 2
    assert "domain gradients" not in [phase.name for phase in turns.outer]
    assert held(turns) <= 0.9 * held(whole)


def test_two_halves_of_few_eigenvalues_are_within_the_budget():
    """32 of 40 sequences: a second sum for each weight, which the capability's gradient takes the place of."""
    keys = {f"influence__{key}": value for key, value in EARLY.items()}

    def statistics(plan: Plan, name: str | None = None) -> int:
        chosen = [phase.memory for phase in plan.outer if name in (None, phase.name)]
        return max(memory.get("factors", 0) + memory.get("gradients", 0) for memory in chosen)

    every = {**keys, "influence__eigenvalue_fraction": 1.0}
    whole, few = (tiny_plan(blocks=4, **given) for given in (every, keys))
    assert statistics(few, "eigenvalues") - statistics(whole, "eigenvalues") == 4 * 4 * 3 * MLP
    assert statistics(few) == statistics(whole) == statistics(few, "eigenvalues")
    for part, at_once in ((1.0, True), (0.9, False), (0.6, False), (0.4, False)):
        budget = part * statistics(few)
        plan = tiny_plan(blocks=4, **keys, influence__memory_budget=budget / 1e9)
        assert (plan.at_once is None and plan.outer_parts == (1, 1)) == at_once
        assert statistics(plan, "eigenvalues") <= budget


def test_auto_estimates_its_curvature_anew_within_the_budget(monkeypatch):
    """With all gradients there, the capability's twice; the earlier curvature is gone, and second halves are not."""
    monkeypatch.setattr(selection, "LEAST_SEQUENCES", 8)
    monkeypatch.setattr(selection, "POSITIONS_PER_DIMENSION", 0)
    keys = {"influence__sample_fraction": "auto", "influence__pair_budget": 0}
    gradient, blocks = 4 * 4 * 3 * MLP, 4
    hidden, wide = peaks.TINY["hidden_size"], peaks.TINY["intermediate_size"]
    expected = 4 * blocks * (2 * hidden**2 + 3 * wide**2) + (2 + 2 + 2) * gradient
    plan = tiny_plan(blocks=blocks, **keys, influence__memory_budget=1.001 * expected / 1e9)
    held = {p.name: p.memory.get("factors", 0) + p.memory.get("gradients", 0) for p in plan.outer}
    # First positions' sums are a few bytes more.
    assert max(held.values()) == held["eigenvalues"] == pytest.approx(expected, rel=1e-3)
    with pytest.raises(UserError, match="needs the statistics of all layers at once"):
        tiny_plan(blocks=blocks, **keys, influence__memory_budget=0.98 * expected / 1e9)


@pytest.mark.parametrize(
    ("processes", "capabilities", "options", "tensors"),
    [
        (1, "r", {}, 4 * 2),
        (2, "r", {}, 4 * 2),
        (1, "rst", {}, 2 + 4 * 3),
        (2, "rst", {}, 2 + 4 * 3),
        (1, "r", {"error_sequences": 0}, 2 + 4 * 1),
        (1, "rst", {"factors": "kfac"}, 4 * 3),
        (1, "r", {"factors": "kfac", "error_sequences": 0}, 2 + 2 * 1),
    ],
)
def test_the_joint_solver_keeps_within_the_budget(processes, capabilities, options, tensors, monkeypatch):
    """Per owned layer the curvature, its damped eigenvalues, and tensors of a gradient's size: for each right-hand side
    four, first of the capabilities beside the two domains' gradients (which K-FAC has none of then) and, for errors, of
    the domains; or the domains' gradients beside what was solved. Of another rank's layers a direction and its
    product."""
    monkeypatch.setattr(selection, "FACTOR_SEQUENCES", 8)
    hidden, wide, blocks = peaks.TINY["hidden_size"], peaks.TINY["intermediate_size"], 4
    # Of gate and up, and of down.
    squares, weights = np.array([hidden**2 + 2 * wide**2, hidden**2 + wide**2]), np.array([2, 1]) * hidden * wide
    owned = 4 * blocks * (squares + (1 + 1 + tensors) * weights).sum() // processes
    expected = owned + 4 * blocks * 2 * weights.sum() * (processes - 1) // processes
    keys = {"influence__solver": "cg", "influence__pair_budget": 0, "capabilities": capabilities}
    keys |= {f"influence__{key}": value for key, value in options.items()}
    plan = tiny_plan(processes, blocks=blocks, **keys, influence__memory_budget=1.001 * expected / 1e9)
    held = max(phase.memory.get("factors", 0) + phase.memory.get("gradients", 0) for phase in plan.outer)
    # Besides, two sums of each of eight groups for first positions, and for a moment one layer's solutions twice.
    sums, twice = 4 * 2 * 2 * blocks, 4 * max(2, len(capabilities)) * hidden * wide
    assert expected <= held <= expected + sums + twice
    with pytest.raises(UserError, match=f"all layers at once, {expected / 1e9:.3g} GB: raise influence.memory_budget"):
        tiny_plan(processes, blocks=blocks, **keys, influence__memory_budget=0.99 * expected / 1e9)


def test_what_more_the_joint_solver_holds():
    """With auto the capabilities' gradients and the first V_r, and no second halves there are; with bases in bfloat16
    their copies."""

    def need(**options):
        keys = {"influence__solver": "cg"} | {f"influence__{key}": value for key, value in options.items()}
        with pytest.raises(UserError, match="all layers at once") as refused:
            tiny_plan(**keys, influence__memory_budget=1e-9, capabilities="rst")
        return float(str(refused.value).split("once, ")[1].split(" GB")[0])

    hidden, wide = peaks.TINY["hidden_size"], peaks.TINY["intermediate_size"]
    squares, weights = BLOCKS * (2 * hidden**2 + 3 * wide**2), BLOCKS * 3 * hidden * wide
    usual = 4 * (squares + (1 + 1 + 2 + 4 * 3) * weights)
    # Three digits are said.
    assert need() == pytest.approx(usual / 1e9, rel=5e-3)
    assert need(basis_dtype="bfloat16") == pytest.approx((usual + 2 * squares) / 1e9, rel=5e-3)
    halves = 4 * weights
    assert need(sample_fraction="auto") == pytest.approx((usual + 4 * 2 * 3 * weights + halves) / 1e9, rel=5e-3)


def test_work_is_that_of_six_flops_per_weight_and_token():
    """Forward and backward are 6 FLOPs per weight and token; frozen, 4, and the statistics on top."""
    plan = tiny_plan(machine=DEVICES["h100"])
    weights = block_weights() + peaks.TINY["hidden_size"] * peaks.TINY["vocab_size"]
    tokens = plan.round.steps * 16 * 64
    # transformers 5.17 finds rotary angles by a product too: 2 FLOPs for each of half a head's, once for a batch.
    rotary = plan.round.steps * (16 // 4) * 64 * peaks.TINY["hidden_size"] // peaks.TINY["num_attention_heads"]
    beside = plan.phases[0].work.wide - 6 * weights * tokens
    assert beside == pytest.approx(0, abs=1) or beside == pytest.approx(rotary, abs=1)
    frozen = next(phase for phase in plan.outer if phase.name == "covariances")
    assert frozen.work.wide > 3.5 * block_weights() * 80 * 63


def test_a_gpus_products_are_in_bfloat16_whatever_machine_plans_them(monkeypatch):
    """On a processor without such instructions they would be float32, and four times as long."""
    works = []
    for supported in (False, True):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda answer=supported: answer)
        keys = {"influence__product_dtype": "bfloat16", "influence__eigenvalue_fraction": 1.0}
        plan = tiny_plan(machine=DEVICES["h100"], **keys)
        works.append({phase.name: phase.work for phase in plan.outer})
    assert works[0] == works[1]
    plain = tiny_plan(machine=DEVICES["h100"], influence__eigenvalue_fraction=1.0).outer
    by_name = {phase.name: phase.work for phase in plain}
    # Rotations and outer products of 64 sequences of 63 positions, by hand.
    hidden, wide = peaks.TINY["hidden_size"], peaks.TINY["intermediate_size"]
    rotated = 2 * (hidden**2 + wide**2) + 2 * 2 * (wide**2) + 2 * hidden**2
    expected = BLOCKS * 64 * 63 * (rotated + 3 * 2 * hidden * wide)
    assert works[0]["eigenvalues"].narrow == pytest.approx(expected, rel=1e-6)
    assert works[0]["eigenvalues"].wide == pytest.approx(by_name["eigenvalues"].wide - expected, rel=1e-6)


def test_work_is_the_same_where_the_longest_step_is_not_the_typical_one():
    """One token more in one of 40 sequences, with half of the pairs kept: the covariances are two passes, of those
    that are kept and of the others. Work goes by lengths and their squares, 1 and 2 parts in 2,560 larger."""
    key = "pairs of sequences"
    half = tiny_plan(machine=DEVICES["h100"], influence__pair_budget=1).disk[key] / 2
    works = []
    for longer in (0, 1):
        plan = tiny_plan(longer=longer, machine=DEVICES["h100"], influence__pair_budget=half / 1e9)
        assert 0 < plan.disk[key] <= half
        works.append(next(phase.work.flops for phase in plan.outer if phase.name == "covariances"))
    assert works[0] == pytest.approx(works[1], rel=2 * 2 / 2560)


def test_work_of_the_joint_solver_by_hand():
    """Each iteration: a forward pass for either solution, of one right-hand side (a capability) and of two (domains);
    for each of these three a tangent and a backward pass, with the direction's and the gradient's products at the
    tracked layers on top. Nothing changes before the first block's down projection, so no tangent is there."""

    def inverse(iterations: int) -> float:
        keys = {"influence__solver": "cg", "influence__solver_iterations": iterations}
        phases = tiny_plan(machine=DEVICES["h100"], **keys).outer
        return next(phase.work.wide for phase in phases if phase.name == "inverse")

    sequences, positions, trained = 64, 63, 48
    hidden, head = peaks.TINY["hidden_size"], peaks.TINY["hidden_size"] * peaks.TINY["vocab_size"]
    blocks, tracked = block_weights(), BLOCKS * 3 * MLP
    silent = block_weights(1) - MLP
    of_blocks = 2 * blocks + 3 * (blocks - silent + blocks + 2 * tracked)
    # Attention in plain products: of two tensors 2, of two with their tangents 6.
    attention = 3 * ((BLOCKS - 1) * 6 + 2) * positions**2 * hidden
    expected = 2 * sequences * (positions * of_blocks + trained * head * (2 + 3 * 2) + attention)
    # Solutions by EK-FAC and scalar products of vectors are small beside it.
    assert (inverse(3) - inverse(1)) / 2 == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("keys", "rotations"),
    [
        ({"sample_fraction": 1.0, "error_sequences": 0}, 1),
        ({"sample_fraction": 1.0, "error_sequences": 8}, 1 + 2),
        ({"sample_fraction": 0.1, "error_sequences": 8}, 2 + 2),
        ({"sample_fraction": 1.0, "error_sequences": 0, "eigenvalue_fraction": 0.2}, 2),
        ({"sample_fraction": 1.0, "error_sequences": 8, "eigenvalue_fraction": 0.2}, 1 + 2 + 2),
        ({"sample_fraction": 1.0, "error_sequences": 0, "factor_fraction": 0.5, "eigenvalue_fraction": 0.8}, 2 + 2),
        ({"sample_fraction": 1.0, "error_sequences": 0, "fisher": "sampled"}, 2),
        ({"sample_fraction": 1.0, "error_sequences": 8, "fisher": "sampled"}, 2 + 2 * 2),
    ],
)
def test_work_of_the_inverse_by_hand(keys, rotations, monkeypatch):
    """Of two domains' gradients and a capability's: into the bases those that did not come in them, and out of them
    what scores sequences: V_r where domains are not used whole, the W_j for reference rows. M is found outside of
    them where it takes no more or gradients are added."""
    monkeypatch.setattr(selection, "POSITIONS_PER_DIMENSION", 0)
    for least in ("LEAST_SEQUENCES", "FACTOR_SEQUENCES"):
        monkeypatch.setattr(selection, least, 8)
    keys = {f"influence__{key}": value for key, value in keys.items()}
    fractions = {"influence__factor_fraction": 1.0, "influence__eigenvalue_fraction": 1.0}
    phases = tiny_plan(machine=DEVICES["h100"], **(fractions | keys)).outer
    found = next(phase.work.wide for phase in phases if phase.name == "inverse")
    hidden, wide = peaks.TINY["hidden_size"], peaks.TINY["intermediate_size"]
    rotation = BLOCKS * 3 * 2 * hidden * wide * (hidden + wide)
    assert found == pytest.approx(rotations * rotation, rel=1e-6)


def test_mean_longest_is_that_of_random_batches():
    lengths = np.random.default_rng(0).integers(5, 400, 60)
    drawn = np.random.default_rng(1).choice(lengths, (20000, 4)).max(axis=1)
    # The mean of 20,000 maxima of spread about 80 is within 2.3 (4 standard errors) of the expectation.
    assert _mean_longest(lengths, 4) == pytest.approx(drawn.mean(), abs=2.3)


def test_time_adds_up():
    plan = tiny_plan(machine=Machine("x", wide=1e9, narrow=1e9, moved=1e9, eigen=1e-9, memory=10.0))
    phase = plan.phases[0]
    assert phase.seconds == pytest.approx((phase.work.flops + phase.work.moved) / 1e9)
    assert plan.seconds == pytest.approx(sum(phase.seconds * phase.times for phase in plan.phases))
    assert [phase.times for phase in plan.phases[:3]] == [3, 4, 2]  # inner loops, evaluations, outer steps
    rows = Counts(np.full(40, 64), np.full(40, 48))
    sizes = DataSizes({"a": DomainSample(rows, np.ones(40, dtype=int))}, {"r": rows})
    assert "does NOT fit 0.0 MB" in long_text(validate({}), sizes, plan)


def test_short_inner_loops_are_counted_by_their_length():
    """Ten proxies and the result's round: of 80 rows in batches of 16, 15 steps in three epochs and 4 of them."""
    machine = Machine("x", wide=1e9, narrow=1e9, moved=1e9, eigen=1e-9, memory=10.0)
    plan = tiny_plan(machine=machine, mixing__method="regmix", mixing__rounds=10)
    whole, short = plan.training
    assert (whole.times, whole.sequences, short.times, short.sequences) == (1, 15 * 16, 10, 4 * 16)
    assert short.seconds == pytest.approx(whole.seconds * 4 / 15) and short.passes == pytest.approx(0.8)
    assert short.peak == whole.peak and not plan.outer
    evaluation = plan.phases[2]
    assert evaluation.times == 12
    assert plan.seconds == pytest.approx(whole.seconds + 10 * short.seconds + 12 * evaluation.seconds)


def test_refusals():
    with pytest.raises(UserError, match="train.global_batch_size: 16 is not a multiple"):
        tiny_plan(3)
    with pytest.raises(UserError, match="influence.layers"):
        tiny_plan(influence__layers=["nothing"])
    with pytest.raises(UserError, match="influence.memory_budget"):
        tiny_plan(influence__memory_budget=1e-9)
    with pytest.raises(CannotPlan, match="without its weights"):
        make_plan(validate({}), sizes_of(random_task(0)), 1, None, PretrainedConfig())


def test_flops_given_by_hand():
    machine = machine_of(PlanConfig(device="a100", flops=1e12))
    assert (machine.wide, machine.narrow, machine.memory) == (1e12, 1e12, 80e9)


def test_stage_plan_writes_nothing(tmp_path, capsys):
    from ideal.cli import main

    data = miniature.make_data(tmp_path / "data")
    words = miniature.arguments(data, tmp_path / "run")
    assert main(ARGUMENTS, [*words, "--stage", "plan", "--plan.processes", "2", "--plan.device", "h100"]) == 0
    out = capsys.readouterr().out
    assert "2 process(es), each on H100" in out and "covariances" in out and "buckets" in out
    assert not (tmp_path / "run").exists()
    assert main(ARGUMENTS, [*words, "--stage", "plan", "--plan.device", "abacus"]) == 2
    assert "plan.device" in capsys.readouterr().err


def test_checkpoints_between_the_parts_of_one_training_run_are_counted():
    """Two lie there at a time, each of the weights and AdamW's two moments."""
    alone, parts = (tiny_plan(mixing__method="loss", mixing__start=start) for start in ("base", "continue"))
    key = "2 checkpoints between rounds"
    assert {name: size for name, size in parts.disk.items() if name != key} == alone.disk
    assert parts.disk[key] == 3 * alone.disk["2 models"]
