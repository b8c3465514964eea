"""What the engine's phases compute, in FLOPs, from shapes alone: to be divided by the seconds that they took.

A product of [a, b] and [b, c] is 2 a b c. Symmetric sums count as the half that is needed, attention as dense,
padding and the eigendecompositions not at all. Only for all statistics of all sequences: EK-FAC, empirical Fisher,
all gradients together, one part, no standard errors, and every pass through the model, as on a GPU by default (where
pairs are kept, the eigenvalues' forward and backward pass is not done).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from exchange import Rows, Workload


@dataclass(frozen=True)
class Tokens:
    """What a pass goes through."""

    positions: float
    squares: float
    """Sum of the sequences' squared positions."""
    trained: float

    @staticmethod
    def of(sets: list[Rows]) -> "Tokens":
        """Those of all sequences."""
        positions = np.concatenate([rows.positions for rows in sets]).astype(float)
        trained = float(sum(rows.trained_tokens.sum() for rows in sets))
        return Tokens(positions.sum(), (positions**2).sum(), trained)


def forward_backward(config: Any, tokens: Tokens) -> float:
    """Of a Llama, without weight gradients; logits only where a label is trained."""
    hidden, width = config.hidden_size, config.num_attention_heads * head_size(config)
    keys = config.num_key_value_heads * head_size(config)
    linear = hidden * (2 * width + 2 * keys) + 3 * hidden * config.intermediate_size
    forward = 2 * (
        config.num_hidden_layers * (tokens.positions * linear + 2 * tokens.squares * width)
        + tokens.trained * hidden * config.vocab_size
    )
    # Backward: one product per linear layer for its input's gradient, two per product of attention.
    attention = 4 * config.num_hidden_layers * tokens.squares * width
    return 2 * forward + attention


def head_size(config: Any) -> int:
    """Of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def phase_flops(config: Any, workload: Workload) -> dict[str, float]:
    """Per phase, by the names that the engine gives its seconds."""
    hidden, wide, blocks = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    domains, references = list(workload.domains.values()), list(workload.references.values())
    every, reference = Tokens.of(domains), Tokens.of(references)
    # Per position and block: A of what gate and up read and of what down reads, S of each of the three.
    squares = 2 * hidden**2 + 3 * wide**2
    outer = 3 * 2 * hidden * wide
    # Into the eigenbases, where the domains' gradients already are.
    rotation = 3 * 2 * (hidden**2 * wide + hidden * wide**2)
    return {
        "covariances": forward_backward(config, every) + blocks * every.positions * squares,
        "eigenvalues": forward_backward(config, every) + blocks * every.positions * (2 * squares + outer),
        "reference gradients": forward_backward(config, reference) + blocks * reference.positions * outer,
        "inverse": len(references) * blocks * rotation,
    }
