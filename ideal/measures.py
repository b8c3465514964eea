"""What steered inner loops measure on a model: losses token by token, and gradients of chosen weights.

Everything but `losses_of_rows` and `trained_losses` is a sum over the ranks' parts. None of it goes through DDP.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ideal.data import ExampleSet, collate
from ideal.distributed import all_reduce_, broadcast_, progress, rank, world_size
from ideal.evaluation import batches_of_rank
from ideal.objective import IGNORED, token_losses


def agreed(tensor: torch.Tensor) -> torch.Tensor:
    """Summed over all ranks, and the same to the last bit on each, in place: what follows must not drift apart."""
    return broadcast_(all_reduce_(tensor), 0)


@torch.no_grad()
def trained_losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """The losses of each row's trained tokens (nats), in their order."""
    device = next(model.parameters()).device
    labels = batch["labels"].to(device)
    inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
    losses = token_losses(model(**inputs, use_cache=False).logits, labels)
    return iter([row[mask] for row, mask in zip(losses, labels[:, 1:] != IGNORED, strict=True)])


def losses_of_rows(
    model: torch.nn.Module, pool: ExampleSet, rows: np.ndarray, batch_size: int, pad_id: int
) -> dict[int, torch.Tensor]:
    """The losses of the trained tokens of these rows, by row, in float32 and host memory; ranks share the work."""
    ends = np.cumsum(pool.trained_tokens[rows])
    parameter = next(model.parameters())
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    found = torch.zeros(int(ends[-1]) if len(rows) else 0, dtype=dtype, device=parameter.device)
    batches = batches_of_rank(pool.lengths[rows], batch_size) if len(rows) else []
    was_training = model.training
    model.eval()
    with progress(len(batches), f"reference losses of {pool.name}") as bar:
        for numbers, counts in batches:
            batch = collate([pool[int(rows[number])] for number in numbers], pad_id)
            for number, losses in zip(numbers, trained_losses(model, batch), strict=True):
                if counts:
                    found[ends[number] - len(losses) : ends[number]] = losses
            bar.update()
    model.train(was_training)
    parts = agreed(found).cpu().split(pool.trained_tokens[rows].tolist())
    return dict(zip(rows.tolist(), parts, strict=True))


def gradient(
    model: torch.nn.Module,
    weights: Sequence[torch.Tensor],
    examples: Sequence[tuple[dict[str, list[int]], float]],
    batch_size: int,
    pad_id: int,
) -> list[torch.Tensor]:
    """The gradient of sum_e scale_e x (summed token loss of example e) with respect to `weights`.

    examples: all ranks', (example, scale) each; each rank takes its part. Nothing is left in .grad.
    """
    device = weights[0].device
    total = [torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
    mine = examples[rank() :: world_size()]
    for start in range(0, len(mine), batch_size):
        part = mine[start : start + batch_size]
        batch = {key: value.to(device) for key, value in collate([row for row, _ in part], pad_id).items()}
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        scales = torch.tensor([scale for _, scale in part], device=device, dtype=logits.dtype)
        loss = (token_losses(logits, labels).sum(1) * scales).sum()
        for sums, found in zip(total, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
            if found is not None:
                sums += found
    return [agreed(sums) for sums in total]


def inner(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """<one, other>, summed in float64."""
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(one, other, strict=True))


def clipped(found: list[torch.Tensor]) -> tuple[list[torch.Tensor], float]:
    """A gradient scaled down to norm 1 if it is longer, and its norm then."""
    norm = inner(found, found) ** 0.5
    return [part / max(norm, 1.0) for part in found], min(norm, 1.0)
