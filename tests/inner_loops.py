"""Inner loops on tiny models, for test_training.py: in its own process, and on two ranks.

Every case is in float64, so that what is the same mathematically differs by rounding of 1e-15 alone.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

import ideal.model
import ideal.training
from ideal.data import ExampleSet
from ideal.demo import BASE_MODEL
from ideal.distributed import rank
from ideal.evaluation import EvaluationConfig, evaluate
from ideal.mixture import Mixture, build_mixture
from ideal.model import ModelConfig, load_model
from ideal.online import Steering
from ideal.training import TrainConfig, TrainingOutcome, train, training_arguments

VOCABULARY = 256
SEED = 5
# Trained tokens of each row: as different as short answers and long solutions.
ROWS = {"short": [1, 1, 2, 1, 3, 1], "long": [24, 9, 31, 1, 17]}


class BigramConfig(PretrainedConfig):
    model_type = "bigram"


class Bigram(PreTrainedModel):
    """The next token's logits are a row of a table: a token's gradient stands in its input's row alone."""

    config_class = BigramConfig

    def __init__(self, config: BigramConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: Any = None, labels: Any = None, **_: Any
    ) -> CausalLMOutput:
        return CausalLMOutput(logits=self.table(input_ids))


AutoConfig.register("bigram", BigramConfig)
AutoModelForCausalLM.register(BigramConfig, Bigram)


def make_models(folder: Path) -> None:
    """Writes the models that the cases start from below `folder`."""
    torch.manual_seed(0)
    bigram = Bigram(BigramConfig())
    nn.init.normal_(bigram.table.weight)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=8, n_layer=2, n_head=2, n_positions=64,
                   resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.3)
    )  # fmt: skip
    for name, model in (("bigram", bigram), ("gpt2", gpt2)):
        model.to(torch.float64).save_pretrained(folder / name)


def make_pools() -> dict[str, ExampleSet]:
    """ROWS as pools in which every trained token follows an input of its own, found nowhere else."""
    fresh = iter(np.random.default_rng(0).permutation(np.arange(10, VOCABULARY)).tolist())
    pools = {}
    for name, counts in ROWS.items():
        ids = [[next(fresh) for _ in range(count + 1)] for count in counts]
        # A prompt token in front: the masked part; the last token is predicted and predicts nothing.
        rows = {"input_ids": [[3, *row] for row in ids], "labels": [[-100, -100, *row[1:]] for row in ids]}
        pools[name] = ExampleSet(
            name,
            datasets.Dataset.from_dict(rows),
            lengths=np.array(counts) + 2,
            trained_tokens=np.array(counts),
            positions=np.array(counts) + 1,
        )
    return pools


def make_mixture(pools: dict[str, ExampleSet]) -> Mixture:
    """Every row once."""
    return build_mixture({n: p.trained_tokens for n, p in pools.items()}, np.ones(2), seed=SEED, round=0)


SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.5, "max_grad_norm": 0.0,
       "num_train_epochs": 1}  # fmt: skip
ADAM = {"learning_rate": 1e-2, "num_train_epochs": 2, "warmup_steps": 1}


@dataclass(frozen=True)
class Case:
    """One inner loop."""

    model: str
    global_batch: int
    per_device: int
    arguments: dict[str, Any] = field(default_factory=lambda: dict(SGD))


def run_case(
    models: Path,
    case: Case,
    out: Path,
    log: Any = lambda step, values: None,
    steering: Steering | None = None,
    outcomes: list[TrainingOutcome] | None = None,
) -> dict[str, torch.Tensor]:
    """Trains as the loop does, an evaluation first; the weights that this rank holds at the end.

    outcomes: takes what train() returns.
    """
    pools = make_pools()
    config = ModelConfig(name_or_path=str(models / case.model))
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    base = load_model(config, None, torch.float64)
    evaluate(base, pools, EvaluationConfig(batch_size=4), pad_id=0, description="before")
    weights: dict[str, torch.Tensor] = {}
    check = ideal.training._check_equal_weights

    def keep_and_check(trainer: Any) -> None:
        weights.update({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        check(trainer)

    arguments = {"per_device_train_batch_size": case.per_device, "disable_tqdm": True, "logging_steps": 1}
    with (
        mock.patch.object(ideal.training, "_check_equal_weights", keep_and_check),
        # Here alone: other tests of the same process compute in the data type that they name.
        mock.patch.dict(ideal.model.DTYPES, float32=torch.float64),
    ):
        outcome = train(
            config,
            TrainConfig(case.global_batch, {**arguments, "use_cpu": True, **case.arguments}),
            tokenizer,
            pools,
            make_mixture(pools),
            folder=out / "model",
            checkpoints=out / "checkpoints",
            seed=SEED,
            log=log,
            on_step_time=lambda seconds, steps: None,
            steering=steering,
        )
    assert ideal.model.DTYPES["float32"] is torch.float32, "other tests of this process compute in what they name"
    if outcomes is not None:
        outcomes.append(outcome)
    return weights


TWO_RANKS = {
    "bigram 2 = 2 x 1": Case("bigram", 2, 1),
    "bigram 4 = 2 x 2": Case("bigram", 4, 2),
    "bigram 4 = 2 x 1 x 2": Case("bigram", 4, 1),
    "bigram 64 = 2 x 32": Case("bigram", 64, 32),
    "bigram 64 = 2 x 4 x 8": Case("bigram", 64, 4),
    "gpt2 4 = 2 x 2": Case("gpt2", 4, 2, ADAM),
    "gpt2 4 = 2 x 1 x 2": Case("gpt2", 4, 1, ADAM),
    "gpt2 4 = 2 x 2, sgd": Case("gpt2", 4, 2),
}


def ranks_drift_apart(models: Path, out: Path) -> str:
    """What train() says when the Trainer evaluates before it trains, which turns its DDP off."""

    class EvaluatesFirst(ideal.training.InnerLoopTrainer):
        def train(self, *args: Any, **options: Any) -> Any:
            self.evaluate(torch.utils.data.Subset(self.train_dataset, range(4)))
            return super().train(*args, **options)

    with mock.patch.object(ideal.training, "InnerLoopTrainer", EvaluatesFirst):
        try:
            run_case(models, Case("bigram", 4, 2), out)
        except RuntimeError as error:
            return str(error)
    return ""


def on_rank(models: Path, out: Path) -> None:
    torch.set_num_threads(1)
    # As the loop does: the process group is there before the first evaluation.
    training_arguments(TrainConfig(2, {"use_cpu": True, "per_device_train_batch_size": 1}), out, 0)
    found: dict[str, Any] = {name: run_case(models, case, out / name) for name, case in TWO_RANKS.items()}
    found["drift"] = ranks_drift_apart(models, out / "drift")
    torch.save(found, out / f"rank{rank()}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
