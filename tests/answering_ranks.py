"""Ranks of test_answering.py: answers and likelihoods on two ranks, of a whole and of a sharded model."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FSDPModule
from transformers import LlamaForCausalLM

from ideal.answering import greedy_answers, mean_log_probabilities
from ideal.model import shard
from ideal.scores import merged

END, PAD, MOST = [2, 5], 0, 12


def measured(model: torch.nn.Module, cases: dict, batch_size: int) -> dict:
    """What all ranks found together, by number."""
    answers = greedy_answers(
        model, cases["prompts"], most=MOST, batch_size=batch_size, end_ids=END, pad_id=PAD, description=""
    )
    means = mean_log_probabilities(model, cases["examples"], batch_size=batch_size, pad_id=PAD, description="")
    return {"answers": merged(answers), "means": merged(means)}


def adapted(model: LlamaForCausalLM) -> torch.nn.Module:
    """With adapters that change what it says, the same on every rank."""
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).double()


def on_rank(folder: Path) -> None:
    dist.init_process_group("gloo")
    cases = json.loads((folder / "cases.json").read_text())
    found = {}
    for kind in ("whole", "sharded", "adapted"):
        model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
        if kind == "adapted":
            model = adapted(model)
        if kind != "whole":
            shard(model, torch.device("cpu"))
            assert isinstance(model, FSDPModule)
        found[kind] = measured(model, cases, 2)
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
