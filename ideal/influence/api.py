"""The influence from inside somebody's own training script: a model as it stands there, and data loaders.

`influence_of` reads the loaders, puts the ranks' rows together, takes the model out of its wrapper, and
gives model and process back as they were.
"""

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import DistributedSampler

from ideal.distributed import all_gather_objects, together
from ideal.errors import UserError
from ideal.influence.config import InfluenceConfig
from ideal.influence.engine import compute_influence
from ideal.influence.result import Influence
from ideal.influence.samples import DomainSample

MASKED = -100

Row = tuple[bytes, bytes]
"""A sequence without its padding: token ids (int32), and whether each is trained (bool)."""


def influence_of(
    model: nn.Module,
    domains: Mapping[str, Iterable[Any]],
    references: Mapping[str, Iterable[Any]],
    *,
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
    **options: Any,
) -> Influence:
    """What a little more of every domain would do to the loss on every reference set, at the model as it is.

    The model and the process are left as they were, also by an exception and in the middle of gradient
    accumulation: modes, requires_grad, hooks and gradients, random states, autocast, grad mode and precision
    flags. (FSDP2 parameters that lay gathered are sharded afterwards; the next forward pass gathers them.)

    Loaders yield batches as a causal language model of transformers takes them, mappings of [batch, length]
    tensors, arrays or lists (or single rows): `input_ids`; `labels`, each at its own token, -100 where
    masked; `attention_mask` where there is padding, on either side: without it every token counts as real,
    whatever its id. Where `position_ids` start again, a new sequence of a packed row begins. All rows are
    read into memory (5 bytes per token), so a loader must come to an end. The order of the rows and how
    they are batched do not matter; a row that comes twice counts twice, as in training.

    With several processes, every rank calls this with the same names, options and seed, and gets the same
    result from all ranks' rows:

    - a loader with a DistributedSampler, or prepared by accelerate, holds its rank's part; rows that the
      sampler repeats to give every rank as many are left out again;
    - any other loader holds the whole set if all ranks' rows are the same, in any order, and else a part,
      which may be empty. Such parts are put together as they are.

    Args:
        model: a causal language model of transformers, plain, with adapters of peft, compiled, wrapped in
            DistributedDataParallel, or sharded by FSDP2's `fully_shard`.
        domains: a loader for each domain, with the rows that the model is trained on.
        references: a loader for each capability, with the rows that measure it.
        weights: of the capabilities in the objective that `sample_fraction="auto"` makes certain; none: all alike.
        seed: decides which rows are sampled.
        options: the fields of `InfluenceConfig`: `damping`, `sample_fraction`, `layers`, `memory_budget`, ...

    Returns:
        `matrix` [capabilities, domains]: the change of each reference loss (nats per trained token) per
        relative change of each domain's volume; negative: more of the domain lowers the loss.

    Raises:
        UserError: a wrong option, a batch or loader that does not fit (on all ranks, if on one), a kind of
            model that is not supported, or what `compute_influence` refuses.
    """
    whole, config, of_objective = together(
        lambda: (_unwrapped(model), _config(options), _of_objective(weights, references))
    )
    _check_same_call(list(domains), list(references), of_objective, asdict(config), seed)
    with _untouched(whole):
        mixture = {}
        for name, loader in domains.items():
            counted = _all_rows(f"domains[{name!r}]", loader)
            rows = sorted(counted)
            mixture[name] = DomainSample(_Sequences(rows), np.array([counted[row] for row in rows]))
        measured = {
            name: _Sequences(sorted(_all_rows(f"references[{name!r}]", loader).elements()))
            for name, loader in references.items()
        }
        return compute_influence(whole, mixture, measured, config, seed, of_objective)


def _config(options: dict[str, Any]) -> InfluenceConfig:
    try:
        return TypeAdapter(InfluenceConfig).validate_python(options)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"influence_of: {key}={first['input']!r}: {first['msg']}") from None


def _of_objective(weights: Mapping[str, float] | None, references: Mapping[str, Any]) -> list[float] | None:
    """[R] the weights, of sum 1."""
    if not references:
        raise UserError("influence_of: references is empty; the influence is on a reference set's loss")
    if weights is None:
        return None
    if set(weights) != set(references) or min(weights.values()) < 0 or not sum(weights.values()):
        raise UserError(f"influence_of: weights {dict(weights)} must not be negative, and of {', '.join(references)}")
    return [weights[name] / sum(weights.values()) for name in references]


def _check_same_call(*arguments: Any) -> None:
    """Raises UserError on all ranks where one was called differently."""
    calls = all_gather_objects(arguments)
    for number, call in enumerate(calls):
        if call != calls[0]:
            raise UserError(f"influence_of: ranks were called differently: rank 0 {calls[0]}, rank {number} {call}")


# The model, as the engine wants it


def _unwrapped(model: nn.Module) -> nn.Module:
    """The causal language model inside DistributedDataParallel and torch.compile."""
    while isinstance(model, (DistributedDataParallel, DataParallel)) or hasattr(model, "_orig_mod"):
        inner = model.module if isinstance(model, (DistributedDataParallel, DataParallel)) else model._orig_mod
        assert isinstance(inner, nn.Module)
        model = inner
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise UserError("influence_of: the model is sharded by FSDP1; shard it with FSDP2's fully_shard instead")
    if not callable(getattr(model, "get_input_embeddings", None)):
        raise UserError(
            f"influence_of: {type(model).__name__} is no causal language model of transformers"
            " (it has no get_input_embeddings)"
        )
    return model


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """What the engine's own `frozen` does not see to: the process's state, compiled calls, FSDP2."""
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(_same_random_state(device))
        # In inference mode nothing could be differentiated; under autocast sums would be rounded.
        stack.enter_context(torch.inference_mode(False))
        for kind in {"cpu", device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_eager(model))
        stack.enter_context(_gradients_at_rest(model))
        yield


@contextmanager
def _same_random_state(device: torch.device) -> Iterator[None]:
    """Python's, numpy's and torch's global generators are put back: loaders draw from them."""
    python, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Modules compiled in place run as they are written: compiled code knows nothing of later hooks."""
    compiled = [(module, module._compiled_call_impl) for module in model.modules() if module._compiled_call_impl]
    try:
        for module, _ in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        for module, call in compiled:
            module._compiled_call_impl = call


@contextmanager
def _gradients_at_rest(model: nn.Module) -> Iterator[None]:
    """FSDP2: parameters are sharded, and gradients accumulated so far wait where they are.

    Gathered parameters do not follow their shards' requires_grad; and a backward pass of ours would
    otherwise reduce what the script's last one left (`set_requires_gradient_sync(False)`).
    """
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    states = [module._get_fsdp_state() for module in sharded]
    groups = [group for state in states for group in _parameter_groups(state)]
    kept = [(group, group.reduce_grads, group.all_reduce_grads, group._partial_reduce_output) for group in groups]
    for module in sharded:
        module.reshard()
        module.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
        for module in sharded:
            module.reshard()
    except BaseException:
        # A pass that broke off leaves FSDP2 in its middle, and the next one would fail.
        for state in states:
            if state._is_root:
                _end_pass(state)
        raise
    finally:
        for group, reduce, all_reduce, partly_reduced in kept:
            group.reduce_grads, group.all_reduce_grads = reduce, all_reduce
            group._partial_reduce_output = partly_reduced


def _end_pass(root: Any) -> None:
    """Has FSDP2 forget a pass that broke off: parameters sharded, nothing under way, ready for the next one."""
    if hasattr(root, "_reset_iter_state"):
        root._reset_iter_state()
        return
    # torch 2.11 has no such way back. What was under way is waited for, and nobody's any more.
    if root._device.type != "cpu":
        torch.accelerator.synchronize(root._device)
    root._comm_ctx.all_gather_state = root._comm_ctx.reduce_scatter_state = None
    root._comm_ctx.post_forward_order.clear()
    for state in root._state_ctx.all_states:
        idle = type(state._training_state).IDLE
        state._training_state = idle
        state._modules_to_run_forward.clear()
        for group in _parameter_groups(state):
            work = getattr(group._all_gather_result, "all_gather_work", None)
            if isinstance(work, dist.Work):
                work.wait()
            group._all_gather_result = group._post_reduce_event = None
            group._all_reduce_state = group._reshard_after_forward_event = None
            group._post_forward_indices.clear()
            group._training_state = idle
            group._to_sharded()
    root._state_ctx.iter_forward_root = None
    root._state_ctx.post_backward_final_callback_queued = False


def _parameter_groups(state: Any) -> list[Any]:
    """Those of one FSDP2 module; torch 2.11 has one or None instead of a list."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


# Rows: from loaders, and from all ranks


class _Sequences:
    """Rows as `Examples`."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows
        trained = [np.flatnonzero(np.frombuffer(mask, dtype=bool)) for _, mask in rows]
        self.positions = np.array([indices[-1] for indices in trained], dtype=np.int64)
        self.trained_tokens = np.array([len(indices) for indices in trained], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        """`input_ids` and `labels`."""
        ids, trained = (np.frombuffer(*pair) for pair in zip(self._rows[row], (np.int32, bool), strict=True))
        return {"input_ids": ids.tolist(), "labels": np.where(trained, ids, MASKED).tolist()}


@dataclass(frozen=True)
class _Part:
    """What one rank's loader gave."""

    rows: Counter[Row]
    """How often each came; those without a trained token are left out."""
    read: int
    """Rows, with those."""
    number: int | None
    """Which part its sampler says it is; None: it does not say."""
    parts: int
    """Of how many."""


def _all_rows(where: str, loader: Iterable[Any]) -> Counter[Row]:
    """The rows of all ranks' loaders and how often each counts."""
    parts = all_gather_objects(together(lambda: _read(where, loader)))
    numbers = {part.number: part for part in parts}
    if None in numbers:
        same = all(part.rows == parts[0].rows for part in parts)
        chosen = parts[:1] if same else parts
    else:
        chosen = list(numbers.values())
        if len(chosen) != parts[0].parts:
            raise UserError(
                f"{where}: its sampler deals the rows to {parts[0].parts} processes, but only {len(chosen)} of"
                " these parts are here: call influence_of on every rank, with torch.distributed initialized"
            )
    rows: Counter[Row] = Counter()
    for part in chosen:
        rows.update(part.rows)
    if not rows:
        read = sum(part.read for part in chosen)
        found = f"{read} rows, but no label that is not {MASKED}" if read else "no rows"
        raise UserError(f"{where}: the loader gave {found}")
    return rows


def _read(where: str, loader: Iterable[Any]) -> _Part:
    """One pass over this rank's loader."""
    batches: list[list[list[Row]]] = []
    with _same_generators(loader):
        try:
            for batch in loader:
                batches.append(list(_rows(batch)))
        except UserError as error:
            raise UserError(f"{where}, batch {len(batches)}: {error}") from None
        except Exception as error:
            # As a UserError it ends the call on every rank, where the others would wait for this one.
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{where}: the loader failed after {len(batches)} batches: {reason}") from error
    number, parts, rows = _without_repeats(loader, batches)
    sequences = [sequence for row in rows for sequence in row]
    return _Part(Counter(row for row in sequences if any(row[1])), len(sequences), number, parts)


def _rows(batch: Any) -> Iterator[list[Row]]:
    """Each row of a batch: the sequences in it, one unless it is packed.

    Raises:
        UserError: the batch is not what transformers' models take; without saying which batch.
    """
    if not isinstance(batch, Mapping):
        raise UserError(f"it is a {type(batch).__name__}, not a mapping with input_ids and labels")
    for key in ("input_ids", "labels"):
        if batch.get(key) is None:
            given = ", ".join(str(name) for name, value in batch.items() if value is not None)
            raise UserError(f"it has no {key}, only {given or 'nothing'}")
    ids = _array(batch["input_ids"])
    shape = ids.shape
    arrays = [ids]
    for key, default in (("labels", None), ("attention_mask", np.ones(shape)), ("position_ids", _counting(shape))):
        array = _array(batch[key]) if batch.get(key) is not None else default
        assert array is not None
        if array.shape != shape or array.ndim != 2:
            raise UserError(f"{key} is {list(array.shape)} and input_ids {list(shape)}; both must be [batch, length]")
        arrays.append(array)
    for number, row in enumerate(zip(*arrays, strict=True)):
        try:
            yield list(_sequences(*row))
        except UserError as error:
            raise UserError(f"row {number}: {error}") from None


def _array(value: Any) -> np.ndarray:
    """[batch, length] of what a batch holds; a row by itself is a batch of one."""
    return np.atleast_2d(value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value))


def _counting(shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(np.arange(shape[-1]), shape)


def _sequences(ids: np.ndarray, labels: np.ndarray, mask: np.ndarray, positions: np.ndarray) -> Iterator[Row]:
    """The sequences of one row [length], without padding.

    Raises:
        UserError: mask or labels are not as in transformers.
    """
    if not np.isin(mask, (0, 1)).all():
        raise UserError("attention_mask holds more than 0 and 1")
    real = np.flatnonzero(mask)
    if len(real) and real[-1] - real[0] >= len(real):
        raise UserError("attention_mask has a gap; padding stands before or behind a row")
    if (labels[mask == 0] != MASKED).any():
        raise UserError(f"labels of padding (attention_mask 0) must be {MASKED}, or padding would be trained")
    ids, labels, positions = ids[real], labels[real], positions[real]
    if (labels != ids)[labels != MASKED].any():
        raise UserError(
            f"labels must be the input_ids of their own position, not shifted, or {MASKED}, as in transformers"
        )
    for part in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(positions) != 1) + 1):
        trained = labels[part] != MASKED
        trained[:1] = False  # nothing predicts a sequence's first token
        yield ids[part].astype(np.int32).tobytes(), trained.tobytes()


@contextmanager
def _same_generators(loader: Iterable[Any]) -> Iterator[None]:
    """The loader's own generators are put back, so that the script's next epoch is shuffled as it would be."""
    places = (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    found = [getattr(place, "generator", None) for place in places]
    states = [(one, one.get_state()) for one in found if isinstance(one, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _without_repeats(loader: Iterable[Any], batches: list[list[list[Row]]]) -> tuple[int | None, int, list[list[Row]]]:
    """Which part of how many the loader's sampler deals to this rank, and its rows without the sampler's repeats.

    Samplers that give every rank as many rows begin again with the first rows where the last ones are too
    few. A row's place in the sampler's order over all ranks tells which these are.
    """
    rows = [row for batch in batches for row in batch]
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = (getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None))
    sampler = next((found for found in samplers if isinstance(found, DistributedSampler)), None)
    if isinstance(batch_sampler, BatchSamplerShard):
        number, parts = batch_sampler.process_index, batch_sampler.num_processes
        size = batch_sampler.batch_size // (parts if batch_sampler.split_batches else 1)
        most = len(batch_sampler) * size
        starts = [(turn * parts + number) * size for turn in range(len(batches))]
        places = [start + row for start, batch in zip(starts, batches, strict=True) for row in range(len(batch))]
    elif sampler is not None:
        number, parts, most = sampler.rank, sampler.num_replicas, len(sampler)
        places = [turn * parts + number for turn in range(len(rows))]
    else:
        return None, 1, rows
    if len(rows) > most:
        # A collate function made more rows than the sampler has: their places are not known.
        return number, parts, rows
    length = len(loader.dataset)  # type: ignore[attr-defined]
    return number, parts, [row for row, place in zip(rows, places, strict=True) if place < length]
