"""The calls into lm-evaluation-harness, the only module that imports it."""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ideal.benchmarks.scores import benchmark, harness_name
from ideal.errors import UserError
from ideal.report.files import Json


@dataclass(frozen=True)
class Wanted:
    """What is to be run, the same for every model."""

    tasks: tuple[str, ...]
    """Short names, or names that lm-evaluation-harness or `include` knows."""
    include: Path | None = None
    """A folder with tasks of the user's own, in the harness' YAML form."""
    run_code: bool = False
    """Whether tasks may run code that the model wrote."""
    limit: int | None = None
    """Rows per task, the first ones; None: all."""
    batch_size: int = 8
    dtype: str = "auto"
    """Of the weights: what the model was saved in, or float32, bfloat16, float16."""


def check_installed() -> None:
    """Raises UserError where the extra is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed: pip install -r requirements-benchmarks.txt")


class Tasks:
    """The tasks that are wanted, found, allowed and loaded before any model is."""

    def __init__(self, wanted: Wanted) -> None:
        """Raises UserError for a task that is not known, that has no score of its own, or that runs code unasked."""
        check_installed()
        if wanted.include is not None and not wanted.include.is_dir():
            raise UserError(f"--include: {wanted.include} is no folder")
        # Tasks that check code read it while they load.
        os.environ["HF_ALLOW_CODE_EVAL"] = "1" if wanted.run_code else "0"
        from lm_eval.tasks import TaskManager

        self.wanted = wanted
        self.manager = TaskManager(include_path=None if wanted.include is None else str(wanted.include))
        for task in wanted.tasks:
            for chat in (False, True):
                self._check(task, harness_name(task, chat))

    def _check(self, task: str, name: str) -> None:
        entry = self.manager.task_index.get(name)
        if entry is None:
            raise UserError(f"--tasks: {task} is not known to lm-evaluation-harness; lm-eval ls tasks lists what is")
        parts = self.members(name)
        if name in self.manager.all_tags or (parts != [name] and not (entry.cfg or {}).get("aggregate_metric_list")):
            raise UserError(f"--tasks: {task} has no score of its own, name some of its tasks: {', '.join(parts)}")
        if not self.wanted.run_code and self.runs_code(name):
            raise UserError(
                f"--tasks: {task} runs code that the model wrote, with this user's rights: add --run-code, best on a"
                " machine that holds nothing else, or leave it out"
            )

    def _config(self, name: str) -> Mapping[str, Any]:
        entry = self.manager.task_index.get(name)
        return (entry.cfg if entry else None) or {}

    def runs_code(self, name: str) -> bool:
        """Whether the task, or one of the group's, runs code that the model wrote."""
        return any(self._config(part).get("unsafe_code") for part in self.members(name))

    def members(self, name: str) -> list[str]:
        """The single tasks of a group or tag, or the task itself."""
        if name in self.manager.all_tags:
            return [task for task, entry in self.manager.task_index.items() if name in entry.tags]
        inside = self._config(name).get("task")
        if not isinstance(inside, list):
            return [name]
        names = [each if isinstance(each, str) else each.get("task") or each.get("group") for each in inside]
        return [part for each in names for part in self.members(str(each))]

    def settings(self, task: str, chat: bool) -> Json:
        """What a result depends on besides the model: equal settings mean that it need not be made again."""
        name = harness_name(task, chat)
        definition = [self._config(part) for part in [name, *self.members(name)]]
        return {
            "chat_template": chat,
            "limit": self.wanted.limit,
            "dtype": self.wanted.dtype,
            "harness": importlib.metadata.version("lm_eval"),
            "definition": hashlib.sha256(json.dumps(definition, default=str).encode()).hexdigest()[:16],
        }

    def load(self, task: str, chat: bool) -> Any:
        """The task with its data. Raises UserError where they cannot be had."""
        name = harness_name(task, chat)
        try:
            loaded = self.manager.load(name)
            if "ifeval" in name:
                import nltk

                # The harness tries to fetch it and would only fail when all answers are there.
                nltk.data.find("tokenizers/punkt_tab")
        except Exception as error:
            # Whatever a task's own code and the hub's client raise.
            text = next(iter(str(error).strip().splitlines()), "")
            place = self._config(self.members(name)[0]).get("dataset_path")
            raise UserError(
                f"--tasks: {task} cannot be loaded ({type(error).__name__}: {text[:200]}): its data ({place}) and"
                " what checks code or sentences come from the hub unless they were loaded before: load it once with a"
                " network, or leave it out"
            ) from error
        return loaded


def has_chat_template(model: Path) -> bool:
    """Whether the tokenizer in the folder `model` has a chat template, as those of our runs' results do."""
    from transformers import AutoTokenizer

    try:
        return bool(AutoTokenizer.from_pretrained(str(model)).chat_template)
    except (OSError, ValueError) as error:
        raise UserError(f"{model} cannot be loaded as a tokenizer: {str(error).splitlines()[0]}") from None


def run_tasks(
    model: Path, tasks: Tasks, missing: Sequence[str], chat: bool, say: Callable[[str], None]
) -> Iterator[tuple[str, Json | None]]:
    """Evaluates the model in a folder on one task after the other.

    Yields: each task with its benchmark when it is finished; None on all processes but the first.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wanted = tasks.wanted
    lm = HFLM(
        pretrained=str(model),
        dtype=wanted.dtype,
        batch_size=wanted.batch_size,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    for task in missing:
        say(f"{model}: {task}")
        started = time.perf_counter()
        try:
            results = simple_evaluate(
                lm,
                tasks=[harness_name(task, chat)],
                task_manager=tasks.manager,
                limit=wanted.limit,
                apply_chat_template=chat,
                log_samples=False,
                confirm_run_unsafe_code=wanted.run_code,
            )
        except (AssertionError, ValueError) as error:
            # What the harness refuses: a task that asks for longer answers than the model has room for, for one.
            text = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(f"--tasks: {task} cannot be run on {model}: {text}") from error
        settings, seconds = tasks.settings(task, chat), time.perf_counter() - started
        name = harness_name(task, chat)
        yield task, None if results is None else benchmark(task, name, results, settings, seconds)
