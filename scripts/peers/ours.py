"""This project's engine on a workload, and the floors: a plain forward and backward pass over the same data.

Under several processes (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set) they work together, over gloo on a CPU.
"""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from exchange import LAST_LABEL, Stopwatch, Workload, padded, serve, summed_loss

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from ideal.influence import DomainSample, InfluenceConfig, compute_influence  # noqa: E402
from ideal.influence.statistics import make_batch  # noqa: E402

Run = Callable[[dict[str, Any], Stopwatch], dict[str, Any]]


def prepare(workload: Workload) -> Run:
    """The model, once; a run is that of the side that the request names."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if workload.device.type == "cuda" else "gloo")
    model = workload.model()
    sides = {"engine": engine, "floor": floor, "padded floor": padded_floor}
    return lambda request, watch: sides[request["side"]](workload, model, request, watch)


def engine(workload: Workload, model: Any, request: dict[str, Any], watch: Stopwatch) -> dict[str, Any]:
    """The influence matrix; keys of the request: config (of InfluenceConfig), convention, seed."""
    convention = request.get("convention", LAST_LABEL)
    domains = {name: replace(rows, convention=convention) for name, rows in workload.domains.items()}
    found = compute_influence(
        model,
        {name: DomainSample(rows, np.ones(len(rows), dtype=int)) for name, rows in domains.items()},
        # Gradients do not depend on the convention: positions after the last trained label add nothing to them.
        workload.references,
        configuration(workload, request.get("config", {})),
        request.get("seed", 0),
    )
    watch.phases.update(found.seconds)
    return {
        "matrix": found.matrix.tolist(),
        "shares": found.shares.tolist(),
        "first_position_share": found.first_position_share,
        "sequences": found.sequences,
    }


def configuration(workload: Workload, given: dict[str, Any]) -> InfluenceConfig:
    """By default everything is used and no standard errors are estimated, as in the peers."""
    return InfluenceConfig(
        **{
            "damping": workload.damping,
            "layers": workload.layers,
            "batch_size": workload.batch_size,
            "sample_fraction": 1.0,
            "factor_fraction": 1.0,
            "error_sequences": 0,
            **given,
        }
    )


def floor(workload: Workload, model: Any, request: dict[str, Any], watch: Stopwatch) -> dict[str, Any]:
    """Forward and backward with weight gradients over the batches that the engine makes, once each."""
    losses = []
    for batch in batches(workload):
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        logits = output.logits.flatten(0, 1).index_select(0, batch.trained).float()
        losses.append(backward(model, torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum")))
    return {"loss": float(torch.stack(losses).sum())}


def batches(workload: Workload) -> Iterator[Any]:
    """The engine's: each of one set, of sequences of similar length, cut after the last trained label."""
    for number, rows in enumerate([*workload.domains.values(), *workload.references.values()]):
        longest_first = np.argsort(-rows.positions, kind="stable")
        for start in range(0, len(rows), workload.batch_size):
            chosen = longest_first[start : start + workload.batch_size].tolist()
            sizes = rows.positions[chosen].tolist()
            yield make_batch(
                number,
                [rows[row] for row in chosen],
                sizes,
                [1.0] * len(sizes),
                chosen,
                None,
                workload.device,
                torch.float32,
            )


def padded_floor(workload: Workload, model: Any, request: dict[str, Any], watch: Stopwatch) -> dict[str, Any]:
    """The same over whole sequences in file order, padded to the longest of each batch, as a plain loop would."""
    losses = []
    for rows in [*workload.domains.values(), *workload.references.values()]:
        for start in range(0, len(rows), workload.batch_size):
            part = [rows[row] for row in range(start, min(start + workload.batch_size, len(rows)))]
            losses.append(backward(model, summed_loss(model, padded(part, workload.device))))
    return {"loss": float(torch.stack(losses).sum())}


def backward(model: Any, loss: torch.Tensor) -> torch.Tensor:
    """The gradients of all weights, which are then dropped: adding them up would cost more."""
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.detach()


if __name__ == "__main__":
    serve(prepare)
