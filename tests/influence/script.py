"""What a training script has: collated batches, data loaders, an optimizer step; and a picture of its model."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tiny import Rows
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ideal.influence import DomainSample, Influence, InfluenceConfig, compute_influence

WHOLE = {"sample_fraction": 1.0, "factor_fraction": 1.0, "error_sequences": 0}


def collate(rows: list[dict[str, list[int]]], side: str = "right") -> dict[str, Tensor]:
    """Padded with token 0, which is also a real token, and an attention mask."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[list[int]], filler: int) -> Tensor:
        fill = [[filler] * (length - len(one)) for one in values]
        pairs = zip(values, fill, strict=True)
        return torch.tensor([one + rest if side == "right" else rest + one for one, rest in pairs])

    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": padded(ids, 0),
        "labels": padded([row["labels"] for row in rows], -100),
        "attention_mask": padded([[1] * len(one) for one in ids], 0),
    }


def loader(rows: Rows, batch_size: int = 4, side: str = "right", **options: Any) -> DataLoader[Any]:
    """Over the rows, padded on one side."""
    return DataLoader(rows.rows, batch_size=batch_size, collate_fn=lambda batch: collate(batch, side), **options)


def direct(model: nn.Module, domains: dict[str, Rows], references: dict[str, Rows], **options: Any) -> Influence:
    """compute_influence on the rows themselves."""
    samples = {name: DomainSample(rows, np.ones(len(rows), dtype=int)) for name, rows in domains.items()}
    return compute_influence(model, samples, references, InfluenceConfig(**{**WHOLE, **options}), 0)


def loss_of(model: nn.Module, rows: list[dict[str, list[int]]]) -> Tensor:
    """The loss as transformers gives it."""
    loss: Tensor = model(**collate(rows)).loss
    return loss


def picture(model: nn.Module) -> Iterator[Any]:
    """Everything about a model that could have changed; equal pictures, same model."""
    for name, module in model.named_modules():
        yield name, type(module), module.training, sorted(map(str, vars(module)))
        for kind in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks"):
            yield [(key, id(hook)) for key, hook in getattr(module, f"_{kind}").items()]
    for name, parameter in model.named_parameters():
        yield name, id(parameter), parameter.requires_grad, _bytes(parameter)
        yield id(parameter.grad), None if parameter.grad is None else _bytes(parameter.grad)
    for name, buffer in model.named_buffers():
        yield name, id(buffer), _bytes(buffer)


def _bytes(tensor: Any) -> bytes:
    """Of this rank's part of it."""
    mine: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return mine.detach().clone().numpy().tobytes()
