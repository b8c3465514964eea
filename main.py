"""IDEAL: how much of each SFT data set to train on (arXiv 2505.12762).

    torchrun --nproc_per_node=8 main.py          with the arguments below
    torchrun --nproc_per_node=8 main.py --config configs/llama-3.1-8b.yaml --train.learning_rate 1e-5
    python main.py --help                        every key

The command line wins over a YAML file, which wins over this block.
"""

import sys

from ideal.cli import main

ARGUMENTS = {
    # --- what to train, on what -------------------------------------------------------------------------------
    "model.name_or_path": None,  # hub name or folder; with data.domains None too: the embedded demo
    "data.domains": None,  # {"math": "data/math", "code": {"train": "owner/dataset:train"}}, or a folder of folders
    "data.max_length": 1024,  # tokens; longer examples are cut
    "data.max_examples": None,  # at most so many examples of each file
    "output_dir": "runs/ideal",  # the same command again resumes here
    "seed": 0,
    "keep_models": "final",  # final: the best round's model; all: every round's
    # --- inner loop: transformers.TrainingArguments by their own names -----------------------------------------
    "train.global_batch_size": 32,  # sequences per step, over all processes
    "train.per_device_train_batch_size": 4,
    "train.num_train_epochs": 1,
    "train.learning_rate": 1e-5,
    "train.lr_scheduler_type": "cosine",
    "train.warmup_steps": 0.03,  # below 1: a fraction of all steps
    "train.bf16": False,
    "model.lora.rank": 0,  # 0: full fine-tuning
    # --- outer step ----------------------------------------------------------------------------------------------
    "influence.factors": "ekfac",  # ekfac, kfac, diagonal, identity
    "influence.damping": 0.1,  # relative to each layer's mean eigenvalue
    "influence.sample_fraction": 0.5,  # sigma: the part of the mixture that is used
    "influence.layers": ["*.mlp.*_proj"],  # names of the tracked linear layers
    "mixing.method": "ideal",  # see docs/methods.md: joint, uniform, temperature, loss, specific, random, ...
    "mixing.rounds": 2,  # outer steps; one inner loop more than that
    "mixing.step": "surrogate",  # surrogate: learns from all rounds; fixed: the paper's step, by max_change at most
    "mixing.max_change": 0.15,  # m: the largest relative change of a domain (surrogate: of the total) in one step
    "mixing.budget": "free",  # free: the total may grow (paper); fixed: trained tokens stay the same
    "mixing.start": "base",  # base: each inner loop from the base model; continue: one training run in parts
}

if __name__ == "__main__":
    sys.exit(main(ARGUMENTS, sys.argv[1:]))
