"""Ranks of test_engine.py: the same matrices on several ranks, each rank's result to a file."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from tiny import World, tiny_llama
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from ideal.errors import UserError
from ideal.influence import Influence, InfluenceConfig, compute_influence, curvature, selection, statistics
from ideal.influence.curvature import Curvatures

BASE = InfluenceConfig(
    sample_fraction=0.95, factor_fraction=0.5, eigenvalue_fraction=0.8, error_sequences=11, pair_budget=1
)
CASES = {
    "ekfac": BASE,
    "ragged": replace(BASE, batch_size=1, error_sequences=5, factors="kfac"),
    "partitions": replace(BASE, memory_budget=40e-6),
    "small budget": replace(BASE, memory_budget=50e-6),
    "few pairs": replace(BASE, pair_budget=50e-6),
    "no pairs": replace(BASE, pair_budget=0),
    "sampled": replace(BASE, fisher="sampled"),
    "diagonal": replace(BASE, factors="diagonal"),
    "sketch": replace(BASE, factor_fraction=0.9, eigenvalue_fraction=0.3, sketch_fraction=0.4),
    "kept": replace(BASE, keep_layers=0.6),
    "in bases": replace(BASE, factor_fraction=1.0, eigenvalue_fraction=0.3, keep_layers=0.6),
    "auto": replace(BASE, sample_fraction="auto"),
    "joint": replace(BASE, solver="cg", layers=["*.down_proj", "*.up_proj"], solver_iterations=3),
}
SHARDED = ["ekfac", "ragged", "partitions", "sampled", "sketch", "in bases", "auto", "joint"]
"""Cases that are computed with parameters sharded by FSDP2 too."""


def compute(world: World, case: str) -> Influence:
    with (
        patch.multiple(selection, LEAST_SEQUENCES=8, FACTOR_SEQUENCES=8),
        patch.object(curvature, "SUMS_PER_DIMENSION", 0),
    ):
        return compute_influence(world.model, world.domains, world.references, CASES[case], 3)


def spoiled(world: World) -> str:
    """What is said when a covariance that rank 1 owns is not finite."""
    check = Curvatures._check

    def spoil(curvatures: Curvatures, totals: Sequence[Tensor]) -> None:
        if dist.get_rank() == 1:
            totals[0][0, 0] = torch.inf
        check(curvatures, totals)

    with patch.object(Curvatures, "_check", spoil):
        try:
            compute(world, "ekfac")
        except UserError as error:
            return str(error)
    return ""


def on_rank(folder: Path) -> None:
    torch.set_num_threads(1)
    # A rank that waits for one that has given up says so then.
    dist.init_process_group("gloo", timeout=timedelta(minutes=1))
    state, domains, references = torch.load(folder / "world.pt", weights_only=False)
    model = tiny_llama()
    model.load_state_dict(state)
    world = World(model, domains, references)
    found = {case: compute(world, case) for case in CASES}
    # Pairs leave layer by layer, not all at the end of a backward pass.
    statistics.OUTBOX_BYTES = 1
    found["posted"] = compute(world, "ragged")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    found |= {f"sharded {case}": compute(world, case) for case in SHARDED}
    found["spoiled"] = spoiled(world)
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
