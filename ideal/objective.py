"""The loss that is trained, evaluated and differentiated: one definition for all."""

import torch
import torch.nn.functional as F

IGNORED = -100


def summed_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy summed over the trained tokens, in float32 at least, in nats.

    logits: [batch, length, vocabulary]; labels: [batch, length], -100 where masked. The token at position p is
    predicted from position p - 1, as in every causal language model of transformers.
    """
    return _cross_entropy(logits, labels, "sum")


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[batch, length - 1] the terms of that sum by the position that predicts; 0 where masked."""
    return _cross_entropy(logits, labels, "none").view(labels[:, 1:].shape)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, reduction: str) -> torch.Tensor:
    predictions = logits[:, :-1].flatten(0, 1)
    if predictions.dtype in (torch.float16, torch.bfloat16):
        predictions = predictions.float()
    return F.cross_entropy(predictions, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction=reduction)
