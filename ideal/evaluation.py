"""Losses of a model on reference and test sets: summed token loss / trained tokens, over all ranks.

Outside the Trainer on purpose: its evaluate() averages batch means, and called before train() it turns DDP off.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from ideal.data import ExampleSet, collate
from ideal.distributed import all_reduce_, progress, rank, world_size
from ideal.objective import summed_token_loss
from ideal.settings import STRICT


@dataclass
class EvaluationConfig:
    """`evaluation.*`: how reference and test losses are taken, and scores."""

    __pydantic_config__ = STRICT

    batch_size: Annotated[int, Field(ge=1)] = 8
    """sequences per forward pass and process"""
    generate: Literal["never", "end", "rounds"] = "never"
    """when the model answers the prompts of capabilities that have a scorer (data.domains.NAME.scorer,
    data.capabilities.NAME.scorer) and is scored; end: the base model and the result, when the run is through; rounds:
    the base model and every round whose model may be the result"""
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """an answer's length at most, in tokens; it also ends where the model's context is full"""
    score_examples: Annotated[int, Field(ge=1)] | None = None
    """answer at most so many rows of each reference and test set, drawn by the seed; none: all"""
    run_code: bool = False
    """run code that the model has written, isolated (Linux): what scorer unit_tests needs"""
    choose_by: Literal["loss", "score"] = "loss"
    """which round is the best one, and what mixing.patience waits for: the lowest Q, or the highest weighted score on
    the reference sets (with generate: rounds); the steps follow the reference losses either way"""


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    sets: Mapping[str, ExampleSet],
    config: EvaluationConfig,
    *,
    pad_id: int,
    description: str,
) -> dict[str, float]:
    """Mean loss per trained token (nats) of each set; the same on every rank.

    Rows are dealt to ranks by length, so that batches hold little padding and ranks finish together.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    batches = {name: batches_of_rank(examples.lengths, config.batch_size) for name, examples in sets.items()}
    # The sums stay on the device until the end: no synchronisation per batch.
    sums = torch.zeros(len(sets), 2, dtype=torch.float64, device=device)
    with progress(sum(map(len, batches.values())), description) as bar:
        for index, (name, examples) in enumerate(sets.items()):
            for rows, counts in batches[name]:
                batch = collate([examples[int(row)] for row in rows], pad_id)
                labels = batch.pop("labels").to(device)
                logits = model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False).logits
                if counts:
                    sums[index, 0] += summed_token_loss(logits, labels)
                    sums[index, 1] += int(examples.trained_tokens[rows].sum())
                bar.update()
    model.train(was_training)
    totals = all_reduce_(sums).tolist()
    return {name: loss / tokens for name, (loss, tokens) in zip(sets, totals, strict=True)}


def batches_of_rank(lengths: np.ndarray, batch_size: int) -> list[tuple[np.ndarray, bool]]:
    """This rank's rows in batches, and whether they count; as many batches on every rank. lengths: [rows] tokens.

    Ranks that share a sharded model take part in each other's forward passes: one that has nothing left runs a
    row that does not count.
    """
    longest_first = np.argsort(-lengths, kind="stable")
    mine = longest_first[rank() :: world_size()]
    batches = [(mine[start : start + batch_size], True) for start in range(0, len(mine), batch_size)]
    most = -(-len(longest_first[:: world_size()]) // batch_size)
    return batches + [(longest_first[:1], False)] * (most - len(batches))


def weighted(losses: Mapping[str, float], weights: Mapping[str, float]) -> float | None:
    """Q = sum_r w_r L_r; None where a capability that counts has no loss."""
    counting = {name: weight for name, weight in weights.items() if weight > 0}
    if not counting or any(name not in losses for name in counting):
        return None
    return sum(weight * losses[name] for name, weight in counting.items())
