"""What the benchmark asks the sides to do: sequences and a model, made or taken."""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exchange import IGNORED, Rows, Workload
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from shapes import SHAPES as LLAMAS  # noqa: E402

from ideal.data import DataConfig, ExampleSet, load_data  # noqa: E402
from ideal.mixture import build_mixture  # noqa: E402
from ideal.model import ModelConfig, load_tokenizer  # noqa: E402
from ideal.seeding import generator  # noqa: E402
from ideal.training import TrainConfig, train  # noqa: E402

MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Sizes:
    """How many sequences, and how long."""

    domains: int
    training: int
    """Per domain."""
    references: int
    """Per capability; there is one for each domain."""
    length: int
    """Tokens of a sequence."""
    masked: int
    """Of its labels, the first ones."""


W = Sizes(domains=4, training=128, references=32, length=128, masked=32)
QUICK = Sizes(domains=4, training=64, references=8, length=32, masked=8)
W_MODEL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
QUICK_MODEL: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {**QUICK_MODEL, "num_key_value_heads": 1, "vocab_size": 512, "tie_word_embeddings": True},
    **{name: shape for name, shape in LLAMAS.items() if name != "llama-3.1-70b"},  # no single device holds that one
}


def random_rows(sizes: Sizes, vocabulary: int, domain: int, kind: str, count: int, seed: int) -> Rows:
    """Sequences of a domain's own statistics: half the tokens follow from the one before, half are drawn by rank.

    Which token follows which, and which are frequent, is the domain's; reference rows are other draws of the same.
    """
    own = generator(seed, "benchmark", domain)
    follows, ranked = own.permutation(vocabulary), own.permutation(vocabulary)
    chances = 1.0 / np.arange(1, vocabulary + 1)
    rng = generator(seed, "benchmark", domain, kind)
    ids = np.empty((count, sizes.length), dtype=np.int64)
    drawn = ranked[rng.choice(vocabulary, size=ids.shape, p=chances / chances.sum())]
    follow = rng.random(ids.shape) < 0.5
    ids[:, 0] = drawn[:, 0]
    for place in range(1, sizes.length):
        ids[:, place] = np.where(follow[:, place], follows[ids[:, place - 1]], drawn[:, place])
    labels = ids.copy()
    labels[:, : sizes.masked] = IGNORED
    return Rows(ids.tolist(), labels.tolist())


def random_sets(sizes: Sizes, vocabulary: int, seed: int) -> tuple[dict[str, Rows], dict[str, Rows]]:
    """Domains and references of the same names."""
    names = [f"domain_{number}" for number in range(sizes.domains)]
    counts = {"training": sizes.training, "reference": sizes.references}
    training, references = (
        {name: random_rows(sizes, vocabulary, number, kind, count, seed) for number, name in enumerate(names)}
        for kind, count in counts.items()
    )
    return training, references


def mlp_layers(config: Any) -> list[str]:
    """The names of all MLP projections of a Llama."""
    return [f"model.layers.{number}.mlp.{part}" for number in range(config.num_hidden_layers) for part in MLP]


def random_workload(folder: Path, quick: bool, seed: int) -> Workload:
    """W, or a smaller one of its kind: random weights, random sequences."""
    sizes = QUICK if quick else W
    config = LlamaConfig(
        **(QUICK_MODEL if quick else W_MODEL),
        vocab_size=256 if quick else 2048,
        max_position_embeddings=sizes.length,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return Workload(folder, *random_sets(sizes, config.vocab_size, seed), mlp_layers(config), seed=seed)


def shaped_workload(
    folder: Path, shape: str, blocks: int | None, sizes: Sizes, batch_size: int, dtype: str, seed: int
) -> Workload:
    """A Llama of a known model's sizes, with as many blocks (None: its own); each side makes its random weights on its
    device."""
    config = LlamaConfig(**SHAPES[shape])
    config.num_hidden_layers = blocks or config.num_hidden_layers
    config.save_pretrained(folder / "model")
    sets = random_sets(sizes, config.vocab_size, seed)
    return Workload(folder, *sets, mlp_layers(config), batch_size=batch_size, dtype=dtype, seed=seed)


def real_workload(folder: Path, args: argparse.Namespace) -> Workload:
    """A checkpoint, and the first rows of each real domain in a random order; trained here if asked for."""
    settings = ModelConfig(name_or_path=args.model)
    tokenizer = load_tokenizer(settings)
    data = load_data(DataConfig(domains=args.data, max_length=args.max_length), tokenizer, args.seed)
    model = Path(args.model)
    if args.train_steps:
        model = Path(args.keep or folder / "trained")
        trained(settings, tokenizer, data.pools, args.train_steps, args.seed, model)
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(folder / "model")

    def some(sets: Mapping[str, ExampleSet], kind: str, count: int) -> dict[str, Rows]:
        found = {}
        for name, examples in sets.items():
            order = generator(args.seed, "benchmark", name, kind).permutation(len(examples))[:count]
            rows = [examples[int(row)] for row in order]
            found[name] = Rows([row["input_ids"] for row in rows], [row["labels"] for row in rows])
        return found

    sets = some(data.pools, "training", args.sequences), some(data.references, "reference", args.references)
    return Workload(folder, *sets, mlp_layers(AutoConfig.from_pretrained(model)), seed=args.seed)


def trained(
    settings: ModelConfig, tokenizer: Any, pools: Mapping[str, ExampleSet], steps: int, seed: int, folder: Path
) -> None:
    """Trains a checkpoint on all domains for some steps of 16 sequences, and writes it to `folder`."""
    mixture = build_mixture(
        {name: pool.trained_tokens for name, pool in pools.items()}, np.ones(len(pools)), seed=seed, round=0
    )
    # Where bfloat16 is emulated a step of SmolLM2 takes minutes.
    bf16 = torch.cuda.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    arguments = {"max_steps": steps, "learning_rate": 1e-4, "warmup_steps": 3, "bf16": bf16, "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as checkpoints:
        train(
            settings,
            TrainConfig(16, {"per_device_train_batch_size": 16, "lr_scheduler_type": "cosine", **arguments}),
            tokenizer,
            pools,
            mixture,
            folder=folder,
            checkpoints=Path(checkpoints),
            seed=seed,
            log=lambda *_: None,
            on_step_time=lambda *_: None,
        )
