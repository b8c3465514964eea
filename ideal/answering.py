"""What a model answers: greedy answers to prompts, and how likely it finds given ones; ranks share the work.

Every function gives this rank's part by number, and takes a forward pass on every rank for each on any: ranks may
share a sharded model.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from ideal.data import collate
from ideal.distributed import progress, rank, world_size
from ideal.evaluation import batches_of_rank
from ideal.objective import IGNORED, token_losses


class Room(StoppingCriteria):
    """Ends each row's answer where its room is full. room: [rows] tokens after `start`."""

    def __init__(self, start: int, room: torch.Tensor) -> None:
        self.start, self.room = start, room

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """[rows] whether the row is at its end."""
        return input_ids.shape[1] - self.start >= self.room


def room_for_answers(model: torch.nn.Module, lengths: np.ndarray, most: int) -> np.ndarray:
    """[rows] tokens that may follow prompts of `lengths`: at most `most`, and what the model's context holds."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[operator,union-attr]
    return np.full(len(lengths), most) if context is None else np.clip(context - lengths, 0, most)


@torch.no_grad()
def greedy_answers(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    most: int,
    batch_size: int,
    end_ids: Sequence[int],
    pad_id: int,
    description: str,
) -> dict[int, list[int]]:
    """The likeliest next tokens after each prompt, one at a time, up to an end token (left out) or `most` of them.

    An answer also ends where the model's context is full. The checkpoint's own settings for generation are not used.
    """
    if not prompts:
        return {}
    lengths = np.array([len(prompt) for prompt in prompts])
    room = room_for_answers(model, lengths, most)
    # Nothing follows a prompt that fills the context.
    answers: dict[int, list[int]] = {int(row): [] for row in np.flatnonzero(room == 0) if rank() == 0}
    able = np.flatnonzero(room > 0)
    batches = batches_of_rank(lengths[able], batch_size) if len(able) else []
    with evaluating(model), plain_generation(model), progress(len(batches), description) as bar:
        for chosen, counts in batches:
            rows = able[chosen]
            found = _answer_batch(model, [prompts[row] for row in rows], room[rows], end_ids, pad_id)
            answers |= dict(zip(rows.tolist(), found, strict=True)) if counts else {}
            bar.update()
    return answers


def _answer_batch(
    model: Any, prompts: Sequence[Sequence[int]], room: np.ndarray, end_ids: Sequence[int], pad_id: int
) -> list[list[int]]:
    """The answers to one batch of prompts, padded on the left."""
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    ends = Room(longest, torch.tensor(room, device=device))
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=int(room.max()), eos_token_id=list(end_ids), pad_token_id=pad_id
    )
    output = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        generation_config=settings,
        stopping_criteria=StoppingCriteriaList([ends]),
        synced_gpus=isinstance(model, FSDPModule) and world_size() > 1,
    )
    return [
        up_to_end(row[:most], end_ids) for row, most in zip(output[:, longest:].tolist(), room.tolist(), strict=True)
    ]


def up_to_end(tokens: list[int], end_ids: Sequence[int]) -> list[int]:
    """The tokens before the first that ends an answer."""
    return tokens[: next((place for place, token in enumerate(tokens) if token in end_ids), len(tokens))]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout; the model's mode is as before afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def plain_generation(model: torch.nn.Module) -> Iterator[None]:
    """Without the checkpoint's own settings (sampling, penalties), which `generate` takes where ours say nothing."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(model, PeftModel) and isinstance(model, FSDPModule):
        register_fsdp_forward_method(model, "generate")  # it calls the base model, not the root of the shards
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


@torch.no_grad()
def mean_log_probabilities(
    model: torch.nn.Module,
    examples: Sequence[Mapping[str, list[int]]],
    *,
    batch_size: int,
    pad_id: int,
    description: str,
) -> dict[int, float]:
    """The mean log-probability (nats) of each example's tokens that are not masked."""
    if not examples:
        return {}
    device = next(model.parameters()).device
    lengths = np.array([len(example["input_ids"]) for example in examples])
    found: dict[int, float] = {}
    batches = batches_of_rank(lengths, batch_size)
    with evaluating(model), progress(len(batches), description) as bar:
        for rows, counts in batches:
            batch = collate([dict(examples[row]) for row in rows], pad_id)
            labels = batch.pop("labels").to(device)
            logits = model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False).logits
            sums = token_losses(logits, labels).double().sum(1)
            means = -sums / (labels[:, 1:] != IGNORED).sum(1)
            found |= dict(zip(rows.tolist(), means.tolist(), strict=True)) if counts else {}
            bar.update()
    return found
