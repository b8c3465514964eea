"""A tiny trained Llama, toy domains, and the influence matrix written out without the package.

Everything explicit goes through autograd on the weights, one sequence at a time: no hook, no factor,
no sampling, no batch. Letters: R capabilities, n domains, O out, I in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ideal.influence import DomainSample, Examples

VOCABULARY = 24
MLP = "*.mlp.*_proj"


@dataclass(frozen=True)
class Rows:
    """Examples as lists, with the lengths that `Examples` asks for."""

    rows: list[dict[str, list[int]]]

    @property
    def positions(self) -> np.ndarray:
        return np.array(
            [
                max((i for i, label in enumerate(row["labels"]) if label != -100), default=0)
                for row in self.rows
            ]
        )

    @property
    def trained_tokens(self) -> np.ndarray:
        return np.array([sum(label != -100 for label in row["labels"]) for row in self.rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        return self.rows[row]


STEPS = {"up": [1], "down": [-1], "leap": [5], "either": [1, -1], "noise": list(range(20))}
LENGTHS = {"up": 3, "down": 6, "leap": 9, "either": 5, "noise": 4}


def toy_rows(kind: str, count: int, seed: int) -> Rows:
    """A prompt that names the kind, and an answer that walks on from its last token by the kind's steps.

    A fifth of the steps are random, kinds differ in length, and one or two tokens without label come
    after the last trained one.
    """
    rng = np.random.default_rng([seed, *kind.encode()])
    rows = []
    for _ in range(count):
        prompt = [list(STEPS).index(kind) % 3, *rng.integers(4, VOCABULARY, size=rng.integers(1, 5)).tolist()]
        answer = [prompt[-1]]
        for _ in range(LENGTHS[kind] + int(rng.integers(0, 3))):
            step = rng.choice(STEPS["noise"] if rng.random() < 0.2 else STEPS[kind])
            answer.append(int((answer[-1] - 4 + step) % 20 + 4))
        ids = [*prompt, *answer[1:], *[3] * int(rng.integers(1, 3))]
        labels = [-100] * len(prompt) + answer[1:]
        rows.append({"input_ids": ids, "labels": labels + [-100] * (len(ids) - len(labels))})
    return Rows(rows)


def tiny_llama(layers: int = 1, seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """Random weights, float64, evaluation mode."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        **options,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.double().eval()
    # transformers' norm computes in float32 whatever the model: that alone would cost seven digits.
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, LlamaRMSNorm):
                setattr(module, name, nn.RMSNorm(child.weight.numel(), eps=1e-6, dtype=torch.float64))
    return model


def padded(rows: list[dict[str, list[int]]]) -> tuple[Tensor, Tensor]:
    """input_ids and labels, [B, S]; a causal model needs no mask where padding comes last."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    labels = [torch.tensor(row["labels"]) for row in rows]
    return ids, nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)


def summed_loss(model: nn.Module, rows: list[dict[str, list[int]]]) -> Tensor:
    """Cross entropy summed over the trained tokens."""
    ids, labels = padded(rows)
    logits = model(input_ids=ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def train(model: nn.Module, rows: list[dict[str, list[int]]], steps: int = 200) -> None:
    """AdamW on the mean loss per trained token, with random batches of 32."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        batch = [rows[i] for i in rng.integers(0, len(rows), size=32)]
        tokens = sum(label != -100 for row in batch for label in row["labels"])
        (summed_loss(model, batch) / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


@dataclass(frozen=True)
class World:
    """A trained model, its mixture and its reference sets."""

    model: LlamaForCausalLM
    domains: dict[str, DomainSample]
    references: dict[str, Rows]


def counted(domain: DomainSample) -> list[tuple[dict[str, list[int]], float]]:
    """Every row with its count."""
    return [(domain.examples[row], float(count)) for row, count in enumerate(domain.counts)]


def make_world(layers: int = 1, count: int = 48, seed: int = 0) -> World:
    """Three domains, a quarter of their rows left out and half repeated, and three capabilities of 9 rows."""
    model = tiny_llama(layers, seed)
    domains, mixture = {}, []
    for number, kind in enumerate(["up", "down", "noise"]):
        rows = toy_rows(kind, count, seed)
        counts = np.array([(i + number) % 4 for i in range(count)])
        domains[kind] = DomainSample(rows, counts)
        mixture += [row for row, times in zip(rows.rows, counts, strict=True) for _ in range(times)]
    train(model, mixture)
    references = {kind: toy_rows(kind, 9, seed + 1000) for kind in ["up", "down", "either"]}
    return World(model, domains, references)


# The explicit computation


def weights_of(model: nn.Module, pattern: str = MLP) -> dict[str, Tensor]:
    """The tracked layers' weights by the layers' names."""
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and fnmatchcase(name, pattern)
    }


def sequence_gradients(model: nn.Module, rows: Examples, pattern: str = MLP) -> dict[str, Tensor]:
    """Per layer, the gradient of each sequence's summed loss, [rows, O, I]."""
    weights = weights_of(model, pattern)
    gradients = [
        torch.autograd.grad(summed_loss(model, [rows[i]]), list(weights.values())) for i in range(len(rows))
    ]
    return {
        name: torch.stack(parts) for name, parts in zip(weights, zip(*gradients, strict=True), strict=True)
    }


def layer_pairs(model: nn.Module, row: dict[str, list[int]], name: str) -> tuple[Tensor, Tensor]:
    """x [L, I] and d [L, O] of one layer, for the positions before the last trained label.

    x from the layer's own arguments; d as the gradient with respect to a zero added to its output.
    """
    layer = model.get_submodule(name)
    seen: dict[str, Tensor] = {}
    forward = type(layer).forward

    def instead(x: Tensor) -> Tensor:
        seen["x"] = x.detach()
        output = forward(layer, x)
        seen["zero"] = torch.zeros_like(output, requires_grad=True)
        return output + seen["zero"]

    layer.forward = instead  # type: ignore[assignment]
    try:
        loss = summed_loss(model, [row])
    finally:
        del layer.forward
    (d,) = torch.autograd.grad(loss, [seen["zero"]])
    used = max(i for i, label in enumerate(row["labels"]) if label != -100)
    return seen["x"][0, :used], d[0, :used]


Sums = Callable[[str, int, int], Tensor]
"""P [n, N] of a domain's row with N positions: what its covariances are made of is P x and P d."""


def factors(world: World, name: str, sums: Sums | None = None) -> tuple[Tensor, Tensor, float]:
    """A [I, I], S [O, O] and the number of positions P, by a loop over all sequences of the mixture."""
    A, S, positions = torch.tensor(0.0), torch.tensor(0.0), 0.0
    for kind, domain in world.domains.items():
        for number, (row, count) in enumerate(counted(domain)):
            x, d = layer_pairs(world.model, row, name)
            positions += count * len(x)
            if sums and count:
                P = sums(kind, number, len(x))
                x, d = P @ x, P @ d
            A = A + count * sum(torch.outer(one, one) for one in x)
            S = S + count * sum(torch.outer(one, one) for one in d)
    return A / positions, S / positions, positions


def total_tokens(world: World) -> dict[str, float]:
    """T_j."""
    return {name: float(d.counts @ d.examples.trained_tokens) for name, d in world.domains.items()}


def mean_gradients(world: World, pattern: str = MLP) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Per layer, g_r [R, O, I] and g_j [n, O, I], from autograd on the whole set's loss."""
    weights = weights_of(world.model, pattern)

    def mean(rows: Examples, counts: np.ndarray) -> tuple[Tensor, ...]:
        losses = torch.stack([summed_loss(world.model, [rows[i]]) for i in range(len(rows))])
        loss = torch.tensor(counts, dtype=torch.float64) @ losses / float(counts @ rows.trained_tokens)
        return torch.autograd.grad(loss, list(weights.values()))

    references = [mean(rows, np.ones(len(rows))) for rows in world.references.values()]
    domains = [mean(domain.examples, domain.counts) for domain in world.domains.values()]
    stacked = [[torch.stack(parts) for parts in zip(*found, strict=True)] for found in (references, domains)]
    return dict(zip(weights, stacked[0], strict=True)), dict(zip(weights, stacked[1], strict=True))


def weighted_gradients(world: World, pattern: str = MLP) -> tuple[dict[str, Tensor], Tensor]:
    """Per layer the gradients of all the mixture's sequences [m, O, I], and their counts [m]."""
    found = [sequence_gradients(world.model, d.examples, pattern) for d in world.domains.values()]
    counts = torch.tensor(np.concatenate([d.counts for d in world.domains.values()]), dtype=torch.float64)
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}, counts


Spectra = dict[str, tuple[Tensor, Tensor]]
"""Per layer the eigenvectors [OI, OI], as columns, and what each sequence adds to the eigenvalues [m, OI]."""


def ekfac_spectra(world: World, bases_of: World | None = None, sums: Sums | None = None) -> Spectra:
    """Eigenvectors of `bases_of`'s covariances, of `sums` of its positions; eigenvalues of the world's sequences."""
    total = sum(total_tokens(world).values())
    gradients, counts = weighted_gradients(world)
    found = {}
    for name, g in gradients.items():
        A, S, _ = factors(bases_of or world, name, sums)
        # The eigenvectors of S (x) A, as the columns of one big matrix.
        basis = torch.kron(torch.linalg.eigh(S)[1], torch.linalg.eigh(A)[1])
        found[name] = basis, counts[:, None] * (g.flatten(1) @ basis) ** 2 / total
    return found


def diagonal_spectra(world: World) -> Spectra:
    """Mean squared gradients in the weights' own basis."""
    total = sum(total_tokens(world).values())
    gradients, counts = weighted_gradients(world)
    return {
        name: (torch.eye(g[0].numel(), dtype=torch.float64), counts[:, None] * g.flatten(1) ** 2 / total)
        for name, g in gradients.items()
    }


def dense_of(spectra: Spectra) -> dict[str, Tensor]:
    """Per layer the Hessian as a dense matrix [OI, OI] over the weight's entries, row by row."""
    return {name: basis @ torch.diag(squares.sum(0)) @ basis.T for name, (basis, squares) in spectra.items()}


def damped_of_few(spectra: Spectra, signs: Tensor, damping: float = 0.1) -> dict[str, Tensor]:
    """Per layer H + D, whose eigenvalues are those of few sequences and corrected for their noise.

    signs: [m] of each sequence + or - the root of the part of its domain that is left out.
    """
    found = {}
    for name, (basis, squares) in spectra.items():
        eigenvalues = squares.sum(0)
        whole = eigenvalues + damping * eigenvalues.mean()
        found[name] = basis @ torch.diag(whole + (signs @ squares) ** 2 / whole) @ basis.T
    return found


def ekfac_dense(world: World) -> dict[str, Tensor]:
    """Per layer, EK-FAC's Hessian as a dense matrix [OI, OI]."""
    return dense_of(ekfac_spectra(world))


def kfac_dense(world: World) -> dict[str, Tensor]:
    """Per layer, (P / T) S (x) A as a dense matrix."""
    total = sum(total_tokens(world).values())
    dense = {}
    for name in weights_of(world.model):
        A, S, positions = factors(world, name)
        dense[name] = positions / total * torch.kron(S, A)
    return dense


def diagonal_dense(world: World) -> dict[str, Tensor]:
    """Per layer, the mean of squared sequence gradients on the diagonal of a dense matrix."""
    return dense_of(diagonal_spectra(world))


def logit_curvature(logits: Tensor, jacobian: Tensor) -> Tensor:
    """J^T (diag p - p p^T) J, summed over positions; logits [N, V], J [N V, weights].

    diag p - p p^T is the sum over v of p_v (e_v - p)(e_v - p)^T; numpy computes half of what is symmetric.
    """
    p = logits.detach().softmax(-1)[:, :, None]
    parts = jacobian.view(*p.shape[:2], -1)
    root = (p.sqrt() * (parts - p.mT @ parts)).flatten(0, 1).numpy()
    return torch.from_numpy(root.T @ root)


def gauss_newton_dense(world: World) -> dict[str, Tensor]:
    """Per layer, the exact Gauss-Newton matrix of the mean training loss, [OI, OI].

    sum over trained positions of J^T (diag p - p p^T) J / T, with J the Jacobian of the logits there.
    """
    weights = weights_of(world.model)
    total = sum(total_tokens(world).values())
    dense = {name: torch.zeros(w.numel(), w.numel(), dtype=torch.float64) for name, w in weights.items()}
    for domain in world.domains.values():
        for row, count in counted(domain):
            if not count:
                continue
            ids, labels = padded([row])
            trained = labels[0, 1:] != -100
            logits = world.model(input_ids=ids).logits[0, :-1][trained]
            eye = torch.eye(logits.numel(), dtype=torch.float64).view(-1, *logits.shape)
            jacobians = torch.autograd.grad(logits, list(weights.values()), eye, is_grads_batched=True)
            for name, jacobian in zip(weights, jacobians, strict=True):
                dense[name] += count * logit_curvature(logits, jacobian.flatten(1)) / total
    return dense


def explicit_matrix(world: World, dense: dict[str, Tensor], damping: float = 0.1) -> np.ndarray:
    """M [R, n] with each layer's dense Hessian, damped by its mean eigenvalue and inverted as it is."""
    tokens = total_tokens(world)
    shares = torch.tensor(list(tokens.values()), dtype=torch.float64) / sum(tokens.values())
    reference, domain = mean_gradients(world)
    matrix = torch.zeros(len(world.references), len(world.domains), dtype=torch.float64)
    for name, hessian in dense.items():
        size = len(hessian)
        inverse = torch.linalg.inv(
            hessian + damping * hessian.trace() / size * torch.eye(size, dtype=torch.float64)
        )
        matrix -= shares * (reference[name].flatten(1) @ inverse @ domain[name].flatten(1).T)
    return matrix.numpy()


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest entry's error, relative to the largest entry."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
