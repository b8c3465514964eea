"""What a benchmark and the sides that it times hand each other: a workload's folder, and one line of JSON per run.

A side is a process of its own, which may live in another environment: this file needs numpy, torch and
transformers alone. The folder holds

    workload.json   {"domains": [...], "capabilities": [...], "layers": [...], "damping", "batch_size", "dtype", "seed"}
    rows.npz        per set "KIND.NUMBER.lengths" [rows], ".input_ids" and ".labels" (all rows end to end)
    model/          config.json and, unless the weights are random and made where they are used, safetensors
"""

import ctypes
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

PARENT_DEATH_SIGNAL = 1
"""Of prctl(2)."""
IGNORED = -100
# The positions whose x and d enter A and S. They are conventions: d is zero after a sequence's last trained label,
# so that S hardly knows them apart, but A does, and with it the eigenbasis.
LAST_LABEL = "before the last trained label"
ALL_BUT_LAST = "all tokens but the last"
EVERY_TOKEN = "every token"


@dataclass(frozen=True)
class Rows:
    """A set of sequences; satisfies ideal.influence.Examples under any convention of positions."""

    input_ids: list[list[int]]
    labels: list[list[int]]
    """labels[i] is input_ids[i] or IGNORED."""
    convention: str = LAST_LABEL

    @property
    def positions(self) -> np.ndarray:
        """[rows] how many of the first tokens carry statistics."""
        lengths = np.array([len(ids) for ids in self.input_ids])
        if self.convention == EVERY_TOKEN:
            return lengths
        if self.convention == ALL_BUT_LAST:
            return lengths - 1
        last = [np.flatnonzero(np.asarray(labels) != IGNORED)[-1:] for labels in self.labels]
        return np.array([int(found[0]) if len(found) else 0 for found in last])

    @property
    def trained_tokens(self) -> np.ndarray:
        """[rows] labels that are not masked; the first token's predicts nothing."""
        return np.array([int((np.asarray(labels[1:]) != IGNORED).sum()) for labels in self.labels])

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        ids, labels = self.input_ids[row], self.labels[row]
        if self.convention == EVERY_TOKEN:
            # A masked token more, so that the last one of the sequence has a label to predict, too: none.
            ids, labels = [*ids, ids[-1]], [*labels, IGNORED]
        return {"input_ids": ids, "labels": labels}

    def padding(self, batch_size: int, longest_first: bool = True) -> float:
        """The part of batches [B, longest] that is no position; in the engine's the longest sequences come first."""
        sizes = np.sort(self.positions)[::-1] if longest_first else self.positions
        batches = [sizes[start : start + batch_size] for start in range(0, len(sizes), batch_size)]
        return 1 - float(sizes.sum()) / max(sum(len(sizes) * int(sizes.max()) for sizes in batches), 1)

    def sorted(self) -> "Rows":
        """Longest first: whoever batches in this order pads little."""
        order = sorted(range(len(self)), key=lambda row: -len(self.input_ids[row]))
        return Rows([self.input_ids[row] for row in order], [self.labels[row] for row in order], self.convention)


@dataclass(frozen=True)
class Workload:
    """What is asked of every side: the n x n influence matrix of these domains and capabilities."""

    folder: Path
    domains: dict[str, Rows]
    references: dict[str, Rows]
    layers: list[str]
    """Names of the tracked linear layers."""
    damping: float = 0.1
    """Relative to each layer's mean eigenvalue."""
    batch_size: int = 8
    dtype: str = "float32"
    """Of the weights, and so of the forward and backward passes."""
    seed: int = 0
    """Of the weights, where model/ has none."""

    def save(self) -> None:
        """Writes everything but the model."""
        kinds = {"domain": self.domains, "reference": self.references}
        arrays = {}
        for kind, sets in kinds.items():
            for number, rows in enumerate(sets.values()):
                arrays[f"{kind}.{number}.lengths"] = np.array([len(ids) for ids in rows.input_ids])
                arrays[f"{kind}.{number}.input_ids"] = np.concatenate([np.array(ids) for ids in rows.input_ids])
                arrays[f"{kind}.{number}.labels"] = np.concatenate([np.array(labels) for labels in rows.labels])
        np.savez(self.folder / "rows.npz", allow_pickle=False, **arrays)
        settings = {
            "domains": list(self.domains),
            "capabilities": list(self.references),
            **{key: getattr(self, key) for key in ("layers", "damping", "batch_size", "dtype", "seed")},
        }
        (self.folder / "workload.json").write_text(json.dumps(settings))

    @staticmethod
    def load(folder: Path) -> "Workload":
        """What `save` wrote."""
        settings = json.loads((folder / "workload.json").read_text())
        with np.load(folder / "rows.npz", allow_pickle=False) as arrays:

            def rows(kind: str, number: int) -> Rows:
                """One set, from its rows laid end to end."""
                ends = np.cumsum(arrays[f"{kind}.{number}.lengths"])[:-1]
                ids, labels = (np.split(arrays[f"{kind}.{number}.{what}"], ends) for what in ("input_ids", "labels"))
                return Rows([part.tolist() for part in ids], [part.tolist() for part in labels])

            domains = {name: rows("domain", number) for number, name in enumerate(settings.pop("domains"))}
            references = {name: rows("reference", number) for number, name in enumerate(settings.pop("capabilities"))}
        return Workload(folder, domains, references, **settings)

    @property
    def device(self) -> torch.device:
        """Where every side computes."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def model(self) -> Any:
        """The model in evaluation mode, on the device."""
        from transformers import AutoConfig, AutoModelForCausalLM

        folder, dtype = self.folder / "model", getattr(torch, self.dtype)
        model: Any
        if list(folder.glob("*.safetensors")):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            model.to(self.device)
        else:
            torch.manual_seed(self.seed)
            with self.device:
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
        if self.device.type == "cuda":
            self._warm_up(model.eval())
        return model.eval()

    def _warm_up(self, model: Any) -> None:
        """What a GPU loads and chooses at first use, for all sides alike: no run is timed with it."""
        rows = next(iter(self.domains.values()))
        summed_loss(model, padded([rows[0]], self.device)).backward()
        model.zero_grad(set_to_none=True)
        torch.linalg.eigh(torch.eye(256, dtype=torch.float64, device=self.device))


def padded(rows: list[dict[str, list[int]]], device: torch.device) -> dict[str, torch.Tensor]:
    """input_ids, labels and attention_mask, [B, S], right padded."""
    longest = max(len(row["input_ids"]) for row in rows)

    def tensor(key: str, filler: int) -> torch.Tensor:
        """[B, S] of one key."""
        return torch.tensor([row[key] + [filler] * (longest - len(row[key])) for row in rows], device=device)

    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": tensor("input_ids", 0),
        "labels": tensor("labels", IGNORED),
        "attention_mask": torch.tensor(mask, device=device),
    }


def summed_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy summed over the trained tokens; right padding needs no mask in a causal model."""
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum", ignore_index=IGNORED
    )


@dataclass
class Stopwatch:
    """Seconds per phase, until the device has done its work."""

    phases: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds what is done inside to a phase."""
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.phases[phase] = self.phases.get(phase, 0.0) + time.perf_counter() - start


def reset_peak() -> None:
    """Peak memory counts from here."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        # Linux: sets the peak of the resident size back to what it is now.
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Peak memory since `reset_peak`, the model and the libraries included: the GPU's, or else the resident size."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def serve(prepare: Callable[[Workload], Callable[[dict[str, Any], Stopwatch], dict[str, Any]]]) -> None:
    """A side's process: reads the folder in argv, then answers each request, a line of JSON, by a line of JSON.

    `prepare` loads model and data, untimed, and returns what does one run; its answer gets the keys seconds, cpu
    (processor seconds of all threads), phases and peak added. Requests come from the standard input, answers go to
    the file descriptor $ANSWERS. Where the system can, a benchmark that is killed takes its sides with it, in the
    middle of a run too.
    """
    libc = ctypes.CDLL("libc.so.6") if sys.platform == "linux" else None
    if libc:
        libc.prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    answers = os.fdopen(int(os.environ["ANSWERS"]), "w")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    run = prepare(Workload.load(Path(sys.argv[1])))
    for line in sys.stdin:
        watch, whole = Stopwatch(), Stopwatch()
        reset_peak()
        processor = time.process_time()
        with whole("seconds"):
            answer = run(json.loads(line), watch)
        processor = time.process_time() - processor
        answer = {**whole.phases, "cpu": processor, "phases": watch.phases, "peak": peak_bytes(), **answer}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        # What this side held must not crowd out the next one's run.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if libc:
            libc.malloc_trim(0)
