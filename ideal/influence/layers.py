"""Which layers are tracked, which of them read the same input, and which rank holds their statistics."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ideal.errors import UserError
from ideal.influence.config import InfluenceConfig

PROBE_TOKENS = 8
"""Length of the sequence that shows which layers read the same input."""


@dataclass(frozen=True)
class Group:
    """Tracked layers that read the same input, as a block's gate and up projection do."""

    name: str
    """Its first layer's."""
    layers: dict[str, nn.Linear]

    @property
    def width(self) -> int:
        """I, the length of the input that they share."""
        return next(iter(self.layers.values())).in_features

    @property
    def outputs(self) -> dict[str, int]:
        """O of each layer."""
        return {name: layer.out_features for name, layer in self.layers.items()}

    @property
    def eigenwork(self) -> int:
        """What the eigendecompositions cost, up to a constant: the sum of cubed sizes."""
        return self.width**3 + sum(size**3 for size in self.outputs.values())

    def only(self, names: set[str]) -> "Group":
        """The group with some of its layers."""
        return Group(self.name, {name: layer for name, layer in self.layers.items() if name in names})


def tracked_layers(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers whose name, or the name of a module around them, matches one of the patterns.

    In a model with LoRA adapters only the adapters' own layers count: the others were not trained.

    Raises:
        UserError: a pattern matches none.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    adapters = {name: module for name, module in linear.items() if ".lora_A." in name or ".lora_B." in name}
    linear = adapters or linear
    chosen: set[str] = set()
    for pattern in patterns:
        matching = {name for name in linear if any(fnmatchcase(part, pattern) for part in _and_parents(name))}
        if not matching:
            some = ", ".join(list(linear)[:8]) or "none"
            kind = "LoRA layer" if adapters else "linear layer"
            raise UserError(
                f"influence.layers: {pattern!r} (of {', '.join(map(repr, patterns))}) matches no {kind};"
                f" the model has for example: {some}"
            )
        chosen |= matching
    return {name: module for name, module in linear.items() if name in chosen}


def _and_parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(len(parts), 0, -1))


@torch.no_grad()
def shared_inputs(model: nn.Module, layers: dict[str, nn.Linear], input_ids: Tensor) -> list[Group]:
    """The layers in groups that are given the same tensor, in the model's order.

    Args:
        input_ids: [1, any] tokens to run the model on. A layer that does not run is a group of its own.

    Raises:
        UserError: a layer runs more than once in one forward pass, or none runs at all.
    """
    inputs: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Keeps the layer's input [1, S, I]."""
        if name in inputs:
            raise UserError(
                f"influence.layers: {name} runs several times in a forward pass, which would mix its statistics:"
                " leave it out"
            )
        inputs[name] = args[0]

    handles = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in layers.items()]
    try:
        model(input_ids=input_ids[:, :PROBE_TOKENS], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not inputs:
        raise UserError(
            f"influence.layers: none of the {len(layers)} tracked layers takes part in a forward pass"
            " (are the adapters merged or disabled?)"
        )
    groups: dict[int, dict[str, nn.Linear]] = {}
    for number, (name, layer) in enumerate(layers.items()):
        # The tensors are kept in `inputs`, so an identity stands for one tensor; -1 - number for none.
        groups.setdefault(id(inputs[name]) if name in inputs else -1 - number, {})[name] = layer
    return [Group(next(iter(members)), members) for members in groups.values()]


def deal_out(groups: Sequence[Group], ranks: int) -> dict[str, int]:
    """The rank that owns each group's statistics, by name: the dearest first, each to the least loaded."""
    load = [0] * ranks
    owners = {}
    for group in sorted(groups, key=lambda group: -group.eigenwork):
        owners[group.name] = load.index(min(load))
        load[owners[group.name]] += group.eigenwork
    return owners


def widest(groups: Sequence[Group]) -> int:
    """The largest dimension of a covariance."""
    return max(max(group.width, *group.outputs.values()) for group in groups)


@dataclass(frozen=True)
class Sizes:
    """Bytes that one group's owner holds."""

    factors: int
    """Covariances, which become eigenbases in place, and eigenvalues."""
    halves: int
    """A second sum for the eigenvalues of few sequences, while they are estimated."""
    copies: int
    """What bases in bfloat16 take besides when all of them are used together."""
    gradient: int
    """One gradient, of a domain or a capability; its solution takes its place."""


def sizes_of(group: Group, config: InfluenceConfig, itemsize: int) -> Sizes:
    """What `group` takes at its owner; itemsize: bytes per number, 4 for float32."""
    weights = sum(group.width * size for size in group.outputs.values())
    factors = 0 if config.factors == "identity" else weights * itemsize
    few = config.fractions.eigenvalue_fraction < 1 or config.sample_fraction == "auto"
    halves = factors if few and config.factors in ("ekfac", "diagonal") else 0
    copies = 0
    if config.factors in ("ekfac", "kfac"):
        squares = group.width**2 + sum(size**2 for size in group.outputs.values())
        # bfloat16 products rotate with a copy of the bases.
        copied = config.product_dtype == "bfloat16" and config.basis_dtype == "float32" and itemsize == 4
        factors += squares * (itemsize + 2 * copied)
        # Kept in 2 bytes where 4 are counted, and used in 4.
        copies = 2 * squares * (config.basis_dtype == "bfloat16" and itemsize == 4)
    return Sizes(factors, halves, copies, weights * itemsize)


@dataclass(frozen=True)
class Layout:
    """In which parts the layers are worked on, so that no rank holds more than its budget."""

    factor_parts: list[list[Group]]
    """For the curvature."""
    gradient_parts: list[list[Group]]
    """For the gradients and the matrix."""
    at_once: int
    """Gradients of each layer that are held at a time; with the joint solver, what else is of their size too."""
    in_turns: bool
    """Whether these are not all domains' and capabilities' together: then at most `at_once` of them take turns."""
    spilled: bool
    """Whether finished curvatures wait elsewhere than with the model."""

    def holds_beside_curvature(self, gradients: int) -> bool:
        """Whether there is room for so many gradients of each layer while the curvature is estimated."""
        whole = len(self.factor_parts) == len(self.gradient_parts) == 1 and not self.spilled
        return whole and gradients <= self.at_once


def lay_out(
    groups: list[Group], owners: dict[str, int], config: InfluenceConfig, domains: int, capabilities: int, itemsize: int
) -> Layout:
    """The fewest parts that fit `config.memory_budget`, and as many gradients at once as these leave room for.

    Raises:
        UserError: a group alone does not fit, or with `auto` or the joint solver, which look at all gradients again
            and again, not all groups together do.
    """
    sizes = {group.name: sizes_of(group, config, itemsize) for group in groups}
    budget = math.inf if config.memory_budget is None else config.memory_budget * 1e9
    factors = {name: size.factors + size.halves for name, size in sizes.items()}
    auto, joint = config.sample_fraction == "auto", config.solver == "cg"
    together = (_while_solving if joint else _all_gradients)(config, domains, capabilities)
    # With several owners every rank has a direction and its product of all layers, not of its own alone.
    everywhere = 2 if joint and len(set(owners.values())) > 1 else 0
    # The capabilities' gradients come where second halves were, but for auto's: it estimates these with all there.
    whole = {
        name: size.factors + auto * size.halves + joint * size.copies + (together - everywhere) * size.gradient
        for name, size in sizes.items()
    }
    need = everywhere * sum(size.gradient for size in sizes.values()) + max(_loads(groups, owners, whole).values())
    if need <= budget:
        return Layout([groups], [groups], together, in_turns=False, spilled=False)
    if auto or joint:
        key = "sample_fraction: auto" if auto else "solver: cg"
        raise UserError(
            f"influence.{key} needs the statistics of all layers at once, {need / 1e9:.3g} GB: raise"
            " influence.memory_budget"
        )
    factor_parts = _parts(groups, owners, factors, budget)
    # Curvatures stay where they were made, or are fetched one group at a time; what is left is for gradients.
    resident = budget - max(_loads(groups, owners, factors).values())
    fetched = budget - max(factors.values())
    counts = [together, *range(max(domains, capabilities), 0, -1)]
    found = [
        Layout(factor_parts, parts, count, in_turns=count < together, spilled=room is fetched)
        for room in (resident, fetched)
        for count in counts
        if factor_parts
        and (parts := _parts(groups, owners, {name: count * size.gradient for name, size in sizes.items()}, room))
    ]
    if not found:
        alone = {name: factors[name] + counts[-1] * size.gradient for name, size in sizes.items()}
        name = max(alone, key=alone.__getitem__)
        raise UserError(
            f"influence.memory_budget: {config.memory_budget:g} GB, but the statistics of {name} alone"
            f" take {alone[name] / 1e9:.3g} GB: allow at least that, or leave the layer out of influence.layers"
        )
    return min(found, key=lambda layout: len(layout.gradient_parts))


def _all_gradients(config: InfluenceConfig, domains: int, capabilities: int) -> int:
    """Of each layer, where no gradients take turns."""
    # auto keeps the capabilities' gradients beside the V_r: it may need them again, with a new curvature.
    return domains + capabilities * (2 if config.sample_fraction == "auto" else 1)


def _while_solving(config: InfluenceConfig, domains: int, capabilities: int) -> int:
    """Tensors of a gradient's size that an owner holds of each of its layers with the joint solver.

    `solve_joint` has four for each right-hand side (residual, solution, direction, product), and the preconditioner's
    damped eigenvalues. It solves for the capabilities, and for the domains if there are errors to estimate.
    """
    auto = config.sample_fraction == "auto"
    there = domains if auto or config.fisher == "empirical" and config.factors in ("ekfac", "diagonal") else 0
    # auto's: the gradients, and the first V_r.
    kept = 2 * capabilities if auto else 0
    for_errors = 4 * domains if config.error_sequences else 0
    return 1 + max(there + kept + 4 * capabilities, domains + kept + 2 * capabilities, for_errors)


def _loads(groups: list[Group], owners: dict[str, int], sizes: dict[str, int]) -> dict[int, int]:
    """Bytes per owner."""
    loads: dict[int, int] = {}
    for group in groups:
        loads[owners[group.name]] = loads.get(owners[group.name], 0) + sizes[group.name]
    return loads


def _parts(groups: list[Group], owners: dict[str, int], sizes: dict[str, int], budget: float) -> list[list[Group]]:
    """Consecutive groups such that no owner holds more than `budget` bytes; none if a group exceeds it."""
    parts: list[list[Group]] = []
    held: dict[int, int] = {}
    for group in groups:
        size, owner = sizes[group.name], owners[group.name]
        if size > budget:
            return []
        if not parts or held.get(owner, 0) + size > budget:
            parts.append([])
            held = {}
        parts[-1].append(group)
        held[owner] = held.get(owner, 0) + size
    return parts
