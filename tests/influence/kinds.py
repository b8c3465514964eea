"""Tiny trained models of many kinds, and EK-FAC and K-FAC written out for any of their linear layers.

As in tiny.py everything explicit goes through autograd, one sequence at a time; letters as there.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny import (
    VOCABULARY,
    Rows,
    World,
    counted,
    mean_gradients,
    summed_loss,
    tiny_llama,
    total_tokens,
    toy_rows,
    train,
    weighted_gradients,
)
from torch import Tensor, nn

from ideal.influence import DomainSample

DAMPING = 0.1
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def in_float64(config: transformers.PretrainedConfig) -> nn.Module:
    """Random weights; norms of llama's kind compute in float64 too, which transformers' own do not."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ in ("Phi3RMSNorm", "MixtralRMSNorm", "Qwen2MoeRMSNorm"):
                norm = nn.RMSNorm(child.weight.numel(), eps=1e-6, dtype=torch.float64)
                setattr(module, name, norm)
    return model


def phi3() -> nn.Module:
    """Queries, keys and values in one projection, with fewer heads of keys; gate and up in one."""
    return in_float64(transformers.Phi3Config(**{**SMALL, "num_key_value_heads": 1}))


def gpt_neox() -> nn.Module:
    """Queries, keys and values in one projection, head by head; biases; MLP and attention side by side."""
    return in_float64(transformers.GPTNeoXConfig(**SMALL, rotary_pct=0.5))


def opt() -> nn.Module:
    """Biases, learned positions, tied embeddings."""
    sizes = {name: value for name, value in SMALL.items() if name != "intermediate_size"}
    return in_float64(transformers.OPTConfig(**sizes, ffn_dim=20, word_embed_proj_dim=12, dropout=0.0))


def llama(**options: Any) -> nn.Module:
    """Two heads of queries to one of keys and values; tied embeddings."""
    return tiny_llama(hidden_size=12, intermediate_size=20, num_attention_heads=2, num_key_value_heads=1, **options)


def gemma2() -> nn.Module:
    """Capped logits, attention in a window, scaled embeddings; its norms compute in float32."""
    sizes = {**SMALL, "num_key_value_heads": 1, "head_dim": 6, "sliding_window": 8}
    return in_float64(transformers.Gemma2Config(**sizes, final_logit_softcapping=2.0))


def mixtral() -> nn.Module:
    """Experts that tokens are routed to, all of them in two tensors."""
    sizes = {**SMALL, "num_key_value_heads": 1, "num_local_experts": 4}
    return in_float64(transformers.MixtralConfig(**sizes, experts_implementation="eager"))


def qwen2_moe() -> nn.Module:
    """Such experts, and beside them a shared one that all tokens pass through."""
    sizes = {**SMALL, "num_key_value_heads": 1, "num_experts": 4, "moe_intermediate_size": 8}
    options = {"shared_expert_intermediate_size": 8, "decoder_sparse_step": 1, "experts_implementation": "eager"}
    return in_float64(transformers.Qwen2MoeConfig(**sizes, **options))


class RoutedLinears(nn.Module):
    """An MLP of two linear experts, for tokens whose first feature is positive and for the others."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(12, 12, dtype=torch.float64) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        output = torch.zeros_like(x)
        for expert, mask in zip(self.experts, (x[..., 0] > 0, x[..., 0] <= 0), strict=True):
            output[mask] = expert(x[mask])
        return output


def gpt2() -> nn.Module:
    """transformers' Conv1D instead of linear layers."""
    sizes = {"vocab_size": VOCABULARY, "n_embd": 12, "n_layer": 1, "n_head": 2, "n_positions": 64}
    ends = {"bos_token_id": None, "eos_token_id": None}
    return in_float64(transformers.GPT2Config(**sizes, **ends, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def adapted(base: Callable[[], nn.Module], targets: list[str], dropout: float = 0.0) -> nn.Module:
    """With LoRA adapters, neither of whose factors is zero."""
    config = LoraConfig(r=2, target_modules=targets, lora_dropout=dropout, init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = get_peft_model(base(), config).double().eval()
    return model


def world_of(model: nn.Module, steps: int = 25) -> World:
    """The model trained on three small domains, some rows repeated, and two reference sets."""
    domains, mixture = {}, []
    for number, kind in enumerate(["up", "leap", "noise"]):
        rows = toy_rows(kind, 8, 1)
        counts = np.array([1 + (row + number) % 2 for row in range(8)])
        domains[kind] = DomainSample(rows, counts)
        mixture += [row for row, times in zip(rows.rows, counts, strict=True) for _ in range(times)]
    if steps:
        train(model, mixture, steps)
    return World(model, domains, {kind: toy_rows(kind, 5, 1001) for kind in ("up", "either")})  # type: ignore[arg-type]


# The explicit computation


def for_autograd(model: nn.Module) -> nn.Module:
    """A copy whose weights all have gradients, the output layer's its own: it is tracked as a layer."""
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(head, nn.Linear):
        head.weight = nn.Parameter(head.weight.detach().clone())
    return model.requires_grad_(True)


def layer_pairs(model: nn.Module, row: dict[str, list[int]], names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """x [L, I] and d [L, O] of the layers, for the positions before the last trained label.

    As in tiny.py, for all layers at once, and for models that hand a layer [B x S, I].
    """
    layers = {name: model.get_submodule(name) for name in names}
    inputs: dict[str, Tensor] = {}
    zeros: dict[str, Tensor] = {}

    def instead(name: str, layer: nn.Module, x: Tensor) -> Tensor:
        inputs[name] = x.detach().flatten(0, -2)
        output = type(layer).forward(layer, x)
        zeros[name] = torch.zeros_like(output, requires_grad=True)
        return output + zeros[name]

    for name, layer in layers.items():
        layer.forward = partial(instead, name, layer)
    try:
        loss = summed_loss(model, [row])
    finally:
        for layer in layers.values():
            del layer.forward
    used = last_label(row)
    found = torch.autograd.grad(loss, list(zeros.values()))
    return {name: (inputs[name][:used], d.flatten(0, -2)[:used]) for name, d in zip(zeros, found, strict=True)}


def last_label(row: dict[str, list[int]]) -> int:
    """Where the last trained label stands."""
    return max(position for position, label in enumerate(row["labels"]) if label != -100)


def factors_of(world: World, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Per layer A [I, I] and S [O, O], and the number of positions P, by a loop over all sequences."""
    A: dict[str, Any] = dict.fromkeys(names, 0.0)
    S: dict[str, Any] = dict.fromkeys(names, 0.0)
    positions = 0.0
    for domain in world.domains.values():
        for row, count in counted(domain):
            positions += count * last_label(row)
            for name, (x, d) in layer_pairs(world.model, row, names).items():
                A[name] = A[name] + count * x.T @ x
                S[name] = S[name] + count * d.T @ d
    return {name: A[name] / positions for name in A}, {name: S[name] / positions for name in S}, positions


def explicit_layers(world: World, pattern: str, *curvatures: str) -> list[dict[str, np.ndarray]]:
    """Each layer's part of M [R, n] for each of "ekfac" and "kfac", with a dense Hessian inverted as it is."""
    world = replace(world, model=for_autograd(world.model))  # type: ignore[arg-type]
    tokens = total_tokens(world)
    total = sum(tokens.values())
    shares = torch.tensor(list(tokens.values()), dtype=torch.float64) / total
    references, domains = mean_gradients(world, pattern)
    sequences, counts = weighted_gradients(world, pattern)
    A, S, positions = factors_of(world, list(sequences))

    def hessian(curvature: str, name: str) -> Tensor:
        if curvature == "kfac":
            return positions / total * torch.kron(S[name], A[name])
        basis = torch.kron(torch.linalg.eigh(S[name])[1], torch.linalg.eigh(A[name])[1])
        eigenvalues = counts @ (sequences[name].flatten(1) @ basis) ** 2 / total
        return basis @ torch.diag(eigenvalues) @ basis.T

    def part(curvature: str, name: str) -> np.ndarray:
        dense = hessian(curvature, name)
        damped = dense + DAMPING * dense.trace() / len(dense) * torch.eye(len(dense), dtype=torch.float64)
        solved = torch.linalg.solve(damped, domains[name].flatten(1).T)
        found: np.ndarray = (-shares * (references[name].flatten(1) @ solved)).numpy()
        return found

    return [{name: part(curvature, name) for name in sequences} for curvature in curvatures]


def lengths_world(model: nn.Module) -> World:
    """Sequences of 2 to 60 tokens in one domain, the longest beside the shortest; also in a reference set."""
    rng = np.random.default_rng(0)

    def row(length: int, prompt: int) -> dict[str, list[int]]:
        ids = rng.integers(0, VOCABULARY, length).tolist()
        return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}

    some = [row(2, 1), row(60, 59), row(60, 1), row(3, 2), row(2, 1), row(31, 17)]
    domains = {"mixed": Rows(some), "short": Rows([row(2, 1), row(3, 1)]), "long": Rows([row(58, 5), row(60, 30)])}
    return World(
        model,  # type: ignore[arg-type]
        {name: DomainSample(rows, np.ones(len(rows), dtype=int)) for name, rows in domains.items()},
        {"mixed": Rows([row(2, 1), row(60, 40), row(5, 1)]), "long": Rows([row(50, 3)])},
    )
