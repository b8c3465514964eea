"""A run's models: where they lie, loaded for a phase, placed or dropped at the end."""

import gc
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ideal.distributed import world_size
from ideal.model import DTYPES, load_model, merge_adapters, shard
from ideal.rounds.run import Run, exists
from ideal.run_folder import RoundFolder, read_json, remove, write_atomically


def find_model(run: Run, here: RoundFolder) -> Path | None:
    """Where a round's trained model lies: in its folder, or as the best one of a run that was finished."""
    if exists(here.model):
        return here.model
    moved = run.config.model.lora.rank == 0 and exists(run.folder.model) and exists(run.folder.mixture)
    if moved and read_json(run.folder.mixture)["round"] == here.number:
        return run.folder.model
    return None


@contextmanager
def loaded_model(run: Run, here: RoundFolder | None) -> Iterator[torch.nn.Module]:
    """The base model (None) or a round's, on this process's device, gone afterwards.

    Not wrapped in DDP; its weights are sharded where training shards them.
    """
    checkpoint = None if here is None else find_model(run, here)
    dtype = run.config.train.compute_dtype or DTYPES[run.config.model.dtype]
    free_device_memory()  # of what the inner loop held
    model = load_model(run.config.model, checkpoint, dtype)
    if run.arguments.fsdp and world_size() > 1:
        shard(model, run.arguments.device)
    else:
        model.to(run.arguments.device)  # type: ignore[arg-type]
    try:
        yield model
    finally:
        del model
        free_device_memory()


def free_device_memory() -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def drop_models(run: Run, number: int, best: int | None) -> None:
    """Removes the models of the rounds before `number` but the best one's and those that a later round reads."""
    mixer = run.mixer
    needed = {before for later in range(number + 1, mixer.last_round() + 1) for before in mixer.reads(later)}
    for before in set(range(number)) - needed - {best}:
        remove(run.folder.round(before).model)


def place_model(run: Run, source: Path | None) -> None:
    """Puts the best round's model at output_dir/model, loadable by itself, and keeps or drops the others."""
    keep_all = run.config.keep_models == "all"
    if source is not None and source != run.folder.model:
        if run.config.model.lora.rank:
            write_atomically(run.folder.model, lambda p: merge_adapters(run.config.model, source, run.tokenizer, p))
        elif keep_all:
            write_atomically(run.folder.model, lambda part: link_tree(source, part))
        else:
            remove(run.folder.model)
            os.replace(source, run.folder.model)
    if not keep_all:
        for path in run.folder.path.glob("round_*/model"):
            remove(path)


def link_tree(source: Path, target: Path) -> None:
    """A copy that takes no room where the file system can link."""

    def link(a: str, b: str) -> None:
        try:
            os.link(a, b)
        except OSError:
            shutil.copy2(a, b)

    shutil.copytree(source, target, copy_function=link)
