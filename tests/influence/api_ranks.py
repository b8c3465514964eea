"""Ranks of test_api.py: influence_of in scripts on two ranks; what each found, to a file."""

import copy
import faulthandler
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from script import WHOLE, collate, loader, loss_of, picture
from tiny import Rows, tiny_llama
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from ideal.errors import UserError
from ideal.influence import api, influence_of
from ideal.influence.statistics import frozen

Sets = tuple[dict[str, Rows], dict[str, Rows]]
STEPS = 3


class Boom(Exception):
    pass


def dealt(sets: Sets) -> Any:
    """Loaders with a DistributedSampler, whose last rows repeat the first."""
    return tuple(
        {name: loader(rows, 2, "left", sampler=DistributedSampler(rows.rows)) for name, rows in kind.items()}
        for kind in sets
    )


def same(sets: Sets) -> Any:
    """The whole set on every rank, shuffled by each in its own way."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    return tuple(
        {name: loader(rows, shuffle=True, generator=generator) for name, rows in kind.items()} for kind in sets
    )


def apart(sets: Sets) -> Any:
    """Parts without a sampler: all but the first row of each set is rank 0's, of "noise" all rows are."""

    def part(name: str, rows: Rows) -> list[Any]:
        mine = rows.rows[1:] if dist.get_rank() == 0 else rows.rows[:1]
        if name == "noise":
            mine = rows.rows if dist.get_rank() == 0 else []
        return [collate(mine)] if mine else []

    return tuple({name: part(name, rows) for name, rows in kind.items()} for kind in sets)


def probe(model: nn.Module, sets: Sets, loaders: Callable[[Sets], Any] = dealt) -> Any:
    return influence_of(model, *loaders(sets), **WHOLE)


def failing_probe(model: nn.Module, sets: Sets, layer: nn.Module, call: int, backward: bool = False) -> None:
    """Breaks off in the layer's n-th forward pass, or in the backward pass after it."""
    calls = iter(range(call + 1))
    before = list(map(id, model.parameters()))

    def boom(*_: Any) -> None:
        raise Boom

    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if next(calls) == call:
            output.register_hook(boom) if backward else boom()

    handle = layer.register_forward_hook(hook)
    with pytest.raises(Boom):
        probe(model, sets)
    handle.remove()
    assert list(map(id, model.parameters())) == before, "parameters are still gathered"


def train(model: nn.Module, rows: Rows, first: Callable[[], None], between: Callable[[], Any]) -> Any:
    """Steps of two accumulated halves: `first` before the second, then `between`; the parameters afterwards."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    mine = rows.rows[dist.get_rank() :: 2]
    for step in range(STEPS):
        if isinstance(model, DistributedDataParallel):
            with model.no_sync():
                loss_of(model, mine[step : step + 1]).backward()
        else:
            model.set_requires_gradient_sync(False)  # type: ignore[operator]
            loss_of(model, mine[step : step + 1]).backward()
            model.set_requires_gradient_sync(True)  # type: ignore[operator]
        first()
        between()
        loss_of(model, mine[step + 1 : step + 2]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [local(parameter).clone() for parameter in model.parameters()]


def local(tensor: Any) -> torch.Tensor:
    """This rank's part of a parameter."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


def nothing() -> None:
    pass


def evaluate(model: nn.Module, rows: Rows) -> None:
    """Leaves FSDP2's outermost parameters gathered."""
    with torch.no_grad():
        loss_of(model, rows.rows)


def leaves_as_it_was(fresh: nn.Module, wrap: Callable[[nn.Module], Any], sets: Sets) -> bool:
    """A model with gradients in training mode, but for a part, and with a hook and a frozen parameter."""
    bare = copy.deepcopy(fresh)
    bare.model.norm.weight.requires_grad_(False)  # type: ignore[union-attr]
    model = wrap(bare).train()
    part = bare.model.layers[0].mlp.eval()  # type: ignore[union-attr,index]
    part.register_forward_hook(lambda *_: None)
    loss_of(model, sets[0]["up"].rows).backward()
    before = list(picture(model))
    probe(model, sets)
    return list(picture(model)) == before and model.training and not part.training


def under_ddp(fresh: nn.Module, sets: Sets) -> dict[str, Any]:
    """Whether training ends in the same weights, and the matrix on the way."""
    rows = sets[0]["up"]
    plain = DistributedDataParallel(copy.deepcopy(fresh))
    model = DistributedDataParallel(copy.deepcopy(fresh))
    unchanged = leaves_as_it_was(fresh, DistributedDataParallel, sets)
    before = list(picture(model))
    found = probe(model, sets)
    unchanged = unchanged and list(picture(model)) == before
    layer = model.module.model.layers[0].mlp
    expected = train(plain, rows, nothing, nothing)
    once = train(model, rows, partial(failing_probe, model, sets, layer, 4), partial(probe, model, sets))
    return {"matrix": found.matrix, "unchanged": unchanged, "trains": all(map(torch.equal, once, expected))}


def sharded(model: nn.Module, policy: MixedPrecisionPolicy) -> Any:
    for layer in model.model.layers:  # type: ignore[union-attr,operator]
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def stays_sharded(model: nn.Module, sets: Sets) -> bool:
    """Also if the engine ends with a forward pass, after which FSDP2 keeps its outermost parameters gathered."""
    before = [(id(parameter), parameter.requires_grad) for parameter in model.parameters()]

    def forward_only(whole: nn.Module, *_: Any) -> None:
        with frozen(whole), torch.no_grad():
            whole(input_ids=torch.tensor([[1, 2]]))

    right, api.compute_influence = api.compute_influence, forward_only  # type: ignore[assignment]
    try:
        probe(model, sets)
    finally:
        api.compute_influence = right
    return before == [(id(parameter), parameter.requires_grad) for parameter in model.parameters()]


def under_fsdp(fresh: nn.Module, sets: Sets, policy: MixedPrecisionPolicy) -> dict[str, Any]:
    """As under_ddp; probed first of all, and while evaluation has left parameters gathered."""
    rows = sets[0]["up"]
    plain, model = (sharded(copy.deepcopy(fresh), policy) for _ in range(2))
    found = probe(model, sets)
    unchanged = all(
        parameter.requires_grad and parameter.grad is None and hasattr(parameter, "to_local")
        for parameter in model.parameters()
    )
    unchanged = unchanged and stays_sharded(model, sets)
    unchanged = unchanged and leaves_as_it_was(fresh, partial(sharded, policy=policy), sets)
    layer = model.model.layers[0].mlp
    expected = train(plain, rows, partial(evaluate, plain, rows), nothing)

    def first() -> None:
        for backward in (False, True):
            failing_probe(model, sets, layer, 4, backward)
        evaluate(model, rows)

    once = train(model, rows, first, partial(probe, model, sets))
    return {"matrix": found.matrix, "unchanged": unchanged, "trains": all(map(torch.equal, once, expected))}


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except UserError as error:
        return str(error)
    return ""


def mistakes(model: nn.Module, sets: Sets) -> dict[str, str]:
    """What each rank is told where only one of them did something wrong."""
    domains, references = dealt(sets)
    mine = dist.get_rank() == 1
    bad = [{"input_ids": [1, 2]}] if mine else domains["up"]
    return {
        "labels": message(lambda: influence_of(model, {"up": bad}, references)),
        "option": message(lambda: influence_of(model, domains, references, damping=-1 if mine else 1)),
        "names": message(lambda: influence_of(model, {"down" if mine else "up": domains["up"]}, references)),
        "empty": message(lambda: influence_of(model, {"up": []}, references)),
    }


def on_rank(folder: Path) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(180, exit=True)  # ranks that wait for each other say where
    dist.init_process_group("gloo")
    state, domains, references = torch.load(folder / "world.pt", weights_only=False)
    model = tiny_llama()
    model.load_state_dict(state)
    sets = (domains, references)
    found: dict[str, Any] = {
        "loaders": {deal.__name__: probe(model, sets, deal) for deal in (dealt, same, apart)},
        "mistakes": mistakes(model, sets),
        "ddp": under_ddp(model, sets),
        "fsdp": under_fsdp(model, sets, MixedPrecisionPolicy()),
        # Gradients not yet reduced are then kept in a place of their own.
        "mixed": under_fsdp(model, sets, MixedPrecisionPolicy(torch.float32, reduce_dtype=torch.float64)),
    }
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
