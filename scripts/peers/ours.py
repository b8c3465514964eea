"""This project's engine on a workload, and the floors: a plain forward and backward pass over the same data.

Under several processes (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set) they work together, over gloo on a CPU.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from exchange import LAST_LABEL, Stopwatch, Workload, padded, serve, summed_loss
from first_position import matrix_without

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from ideal.influence import DomainSample, InfluenceConfig, compute_influence  # noqa: E402
from ideal.influence.passes import Passes  # noqa: E402
from ideal.influence.samples import whole_reference  # noqa: E402

Run = Callable[[dict[str, Any], Stopwatch], dict[str, Any]]


def prepare(workload: Workload) -> Run:
    """The model, once; a run is that of the side that the request names."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if workload.device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if workload.device.type == "cuda" else "gloo")
    model = workload.model()
    sides = {"engine": engine, "floor": floor, "padded floor": padded_floor, "first positions": first_positions}
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
        "sequences": sum(found.sequences.values()),
        "factor_sequences": sum(found.factor_sequences.values()),
        "eigenvalue_sequences": sum(found.eigenvalue_sequences.values()),
        "solver": found.solver,
    }


def first_positions(workload: Workload, model: Any, request: dict[str, Any], watch: Stopwatch) -> dict[str, Any]:
    """The matrix with the first positions left out of the curvature."""
    return {"matrix": matrix_without(workload, model, configuration(workload, {}), leave_out=True).tolist()}


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
    """Forward and backward with weight gradients over the batches that the engine makes, once each.

    A plain model computes logits everywhere; with `selected`, only where a label is trained, as the engine does.
    """
    losses = []
    sets = {**workload.domains, **{f"{name} reference": rows for name, rows in workload.references.items()}}
    passes = Passes(model, {}, configuration(workload, {}), 0)
    for batch in passes.batches([whole_reference(name, rows) for name, rows in sets.items()], drawn=False):
        hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        if request.get("selected"):
            logits = model.get_output_embeddings()(hidden.flatten(0, 1).index_select(0, batch.trained))
        else:
            logits = model.get_output_embeddings()(hidden).flatten(0, 1).index_select(0, batch.trained)
        loss = torch.nn.functional.cross_entropy(logits.float(), batch.targets, reduction="sum")
        losses.append(backward(model, loss))
    return {"loss": float(torch.stack(losses).sum())}


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
