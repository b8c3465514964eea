"""Ranks of test_evaluation.py: losses of a sharded model, with sets that do not go around."""

import json
from pathlib import Path

import inner_loops
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from ideal.evaluation import EvaluationConfig, evaluate
from ideal.model import shard


def on_rank(folder: Path) -> None:
    dist.init_process_group("gloo")
    model = LlamaForCausalLM.from_pretrained(folder / "model").eval()
    shard(model, torch.device("cpu"))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    sets = inner_loops.make_pools()
    found = {size: evaluate(model, sets, EvaluationConfig(size), pad_id=0, description="") for size in (1, 2, 5)}
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
