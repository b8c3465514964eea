"""Inner loops that a controller steers: the mixture of each step follows from what the steps before measured.

The Trainer's own data loader reads ahead, so here it yields places alone; which rows fill them is decided when the
step begins. Every rank draws the same rows of the whole step and takes its part, measurements are sums over all
ranks, and the controller computes the same on each: processes and accumulation change nothing.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from ideal.data import ExampleSet, collate
from ideal.distributed import rank, world_size
from ideal.draws import Draws
from ideal.evaluation import EvaluationConfig, evaluate
from ideal.influence.layers import tracked_layers
from ideal.measures import agreed, clipped, gradient, inner, losses_of_rows, trained_losses
from ideal.mixers.controller import Controller, Measurement, SteeredRound, StepStatistics
from ideal.mixture import Mixture, row_order
from ideal.objective import IGNORED, token_losses

Row = tuple[int, int]
"""(domain, row of its pool); FILLER fills up."""
FILLER: Row = (0, -1)
TARGET_ROWS = 4
"""Rows of each reference set that a step's gradients are compared with."""


@dataclass(frozen=True)
class Steering:
    """What a steered inner loop needs besides what every inner loop has.

    references: the reference sets, which some controllers have evaluated, with their weights w_r by name.
    layers: patterns of the layers whose gradients are compared (`influence.layers`).
    reference_model: the frozen model that losses are compared with, for controllers that measure excess losses.
    """

    controller: Controller
    references: Mapping[str, ExampleSet]
    weights: Mapping[str, float]
    evaluation: EvaluationConfig
    layers: Sequence[str]
    reference_model: Callable[[], AbstractContextManager[torch.nn.Module]] | None = None


class Places(Dataset):
    """As many places as the inner loop's steps have in whole global batches; what fills them is drawn later."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return index


class Stopwatch:
    """The seconds that pass inside `with`, all in all."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self.started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.monotonic() - self.started


class SteeredRows:
    """The rows of one inner loop's steps, and the controller that they follow."""

    def __init__(
        self,
        steering: Steering,
        pools: Mapping[str, ExampleSet],
        mixture: Mixture,
        *,
        steps: int,
        passes: float,
        tokens_per_step: float,
        vocabulary: int,
        pad_id: int,
        seed: int,
    ) -> None:
        self.steering, self.controller, self.pad_id = steering, steering.controller, pad_id
        self.measuring = Stopwatch()
        """What the controller's measurements take, on top of training on the rows."""
        taking_part = {name: domain for name, domain in mixture.domains.items() if domain.size}
        self.pools = [pools[name] for name in taking_part]
        sizes = np.array([domain.size for domain in taking_part.values()], dtype=np.float64)
        tokens = np.array([domain.trained_tokens for domain in taking_part.values()], dtype=np.float64)
        self.steps, self.passes, self.tokens_per_step, self.seed = steps, passes, tokens_per_step, seed
        self.draws = Draws(
            {pool.name: pool.trained_tokens for pool in self.pools},
            tokens_per_step,
            seed,
            mixture.round,
            self.controller.backwards,
        )
        self.controller.begin(
            SteeredRound(
                steps=steps,
                domains=tuple(taking_part),
                capabilities=tuple(steering.references),
                weights=np.array([steering.weights[name] for name in steering.references]),
                rows=sizes / sizes.sum(),
                shares=tokens / tokens.sum(),
                mean_tokens=self.draws.mean_tokens,
                vocabulary=vocabulary,
            )
        )

    def compare_with(self, model: torch.nn.Module, batch_size: int) -> None:
        """Takes the reference model's loss of every token that will be drawn, once per row.

        Only for controllers whose probabilities never change: which rows will be drawn is known then.
        """
        draws, needed = self.draws.fresh(), [set[int]() for _ in self.pools]
        for _ in range(self.steps):
            for domain, row in draws.next(self.controller.probabilities()):
                needed[domain].add(row)
        self.reference_losses = [
            losses_of_rows(model, pool, np.array(sorted(rows), dtype=np.int64), batch_size, self.pad_id)
            for pool, rows in zip(self.pools, needed, strict=True)
        ]

    def excess(self, model: torch.nn.Module, mine: list[Row], batch_size: int) -> np.ndarray:
        """[n] summed max(loss - the reference model's, 0) of the rows of all ranks, of which `mine` are here."""
        device = next(model.parameters()).device
        sums = torch.zeros(len(self.pools), dtype=torch.float64, device=device)
        for start in range(0, len(mine), batch_size):
            rows = mine[start : start + batch_size]
            for place, losses in zip(rows, trained_losses(model, self.batch(rows)), strict=True):
                if place != FILLER:
                    domain, row = place
                    reference = self.reference_losses[domain][row].to(device)
                    sums[domain] += (losses - reference).clamp(min=0).sum(dtype=torch.float64)
        return agreed(sums).cpu().numpy()

    def alignment(
        self, model: torch.nn.Module, rows: list[Row], step: int, batch_size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """[n] <g_j, g_V> and [n] |g_j|, each gradient clipped to norm 1; 0 where the step has no row of a domain.

        g_j: of the mean loss of domain j's rows in the step. g_V: sum_r w_r of the mean loss of the next
        TARGET_ROWS of reference set r. Over the weights of the tracked layers.
        """
        steering = self.steering
        layers = tracked_layers(model, steering.layers).values()
        weights = [layer.weight for layer in layers if layer.weight.requires_grad]
        target = []
        for name, references in steering.references.items():
            if steering.weights[name] > 0:
                order = row_order(self.seed, name, len(references))
                taken = order[((step - 1) * TARGET_ROWS + np.arange(TARGET_ROWS)) % len(order)]
                scale = steering.weights[name] / references.trained_tokens[taken].sum()
                target += [(references[int(row)], float(scale)) for row in taken]
        towards = clipped(gradient(model, weights, target, batch_size, self.pad_id))[0]
        alignment, norms = np.zeros(len(self.pools)), np.zeros(len(self.pools))
        # One domain after the other: two gradients are held, not n + 1.
        for domain, pool in enumerate(self.pools):
            own = [row for j, row in rows if j == domain]
            if own:
                scale = 1 / pool.trained_tokens[own].sum()
                found, norms[domain] = clipped(
                    gradient(model, weights, [(pool[row], scale) for row in own], batch_size, self.pad_id)
                )
                alignment[domain] = inner(found, towards)
        return alignment, norms

    def state(self) -> dict[str, Any]:
        """What a killed inner loop needs again, JSON-able."""
        return {"draws": self.draws.state(), "controller": self.controller.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken."""
        self.draws.restore(state["draws"])
        self.controller.restore(state["controller"])

    def observed(self) -> dict[str, Any]:
        """What the controller left, and what was drawn in all `passes`: rows and trained tokens by domain."""
        names = [pool.name for pool in self.pools]
        return {
            **self.controller.observed(),
            "passes": self.passes,
            "rows": dict(zip(names, self.draws.drawn.tolist(), strict=True)),
            "trained_tokens": dict(zip(names, self.draws.tokens.tolist(), strict=True)),
        }

    def batch(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """The collated rows; fillers hold no trained token."""
        filler = {"input_ids": [self.pad_id], "labels": [IGNORED]}
        return collate(
            [filler if place == FILLER else self.pools[place[0]][place[1]] for place in rows], self.pad_id
        )

    def training_batch(self, rows: Sequence[Row], weights: np.ndarray) -> dict[str, torch.Tensor]:
        """The same with `domains` [rows] and the `weights` [rows] of their losses."""
        domains = torch.tensor([domain for domain, _ in rows])
        return {**self.batch(rows), "domains": domains, "weights": torch.from_numpy(weights)[domains]}


def dealt(rows: Sequence[Row], parts: int, part: int) -> list[Row]:
    """Part `part` of the step's rows when `parts` parts hold equally many, the last ones filled up."""
    return [*rows[part::parts], *([FILLER] if part >= len(rows) % parts > 0 else [])]


def pieces(batch: dict[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    """A batch in pieces of at most `size` rows, each as long as its longest row."""
    cut = []
    for start in range(0, len(batch["labels"]), size):
        part = {key: value[start : start + size] for key, value in batch.items()}
        longest = int(part["attention_mask"].sum(1).max())
        cut.append({key: value[:, :longest] if value.dim() == 2 else value for key, value in part.items()})
    return cut


class SteeredTrainer(Trainer):
    """Trainer whose steps hold the rows that a controller asks for at that time."""

    def __init__(self, rows: SteeredRows, log_step: Callable[[int, dict[str, float]], None], **options: Any) -> None:
        super().__init__(data_collator=lambda places: {"places": torch.tensor(places)}, **options)
        self.rows, self.log_step = rows, log_step
        self.loss_is_scaled_for_ga = True  # by the round's constant
        self.sums = torch.zeros(len(rows.pools), 3, dtype=torch.float64, device=self.args.device)
        self.add_callback(SteeredSteps(self))

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """This rank's micro-batches of the next step: its places are taken from the loader, its rows drawn now."""
        for _ in range(num_batches):
            next(epoch_iterator)
        controller, step = self.rows.controller, self.state.global_step + 1
        if controller.wants_losses(step):
            with self.rows.measuring:
                losses = self.reference_losses()
            controller.evaluated(step, losses)
        self.probabilities = controller.probabilities()
        rows = self.rows.draws.next(self.probabilities)
        parts = num_batches * world_size()
        mine = [dealt(rows, parts, number * world_size() + rank()) for number in range(num_batches)]
        if controller.measures != "nothing":
            with self.rows.measuring:
                measurement = self.measure(rows, [row for part in mine for row in part], step)
            controller.measured(measurement)
        weights = controller.loss_weights()
        # None: the loss is divided by a constant of the round, not by this step's tokens.
        return [self.rows.training_batch(part, weights) for part in mine], None

    def measure(self, rows: list[Row], mine: list[Row], step: int) -> Measurement:
        """What the controller asks for, on the rows of the step to come: all of them, of which `mine` are here."""
        assert self.model is not None
        mode, peak = self.model.training, self.args.learning_rate
        self.model.eval()
        excess = alignment = norms = None
        if self.rows.controller.measures == "excess":
            excess = self.rows.excess(self.model, mine, self.args.per_device_train_batch_size)
        else:
            alignment, norms = self.rows.alignment(self.model, rows, step, self.args.per_device_train_batch_size)
        self.model.train(mode)
        tokens = np.zeros(len(self.rows.pools))
        for domain, row in rows:
            tokens[domain] += self.rows.pools[domain].trained_tokens[row]
        rate = self._get_learning_rate() / peak if peak else 0.0
        return Measurement(tokens=tokens, excess=excess, alignment=alignment, norms=norms, rate=rate)

    def reference_losses(self) -> np.ndarray:
        """[R] of the model as it is now."""
        assert self.model is not None
        steering = self.rows.steering
        # Through the unwrapped model: DDP must not see a forward pass that no backward pass follows.
        losses = evaluate(
            self.model,
            steering.references,
            steering.evaluation,
            pad_id=self.rows.pad_id,
            description="reference losses",
        )
        return np.array([losses[name] for name in steering.references])

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """Forward and backward of a micro-batch, at most per_device_train_batch_size rows at a time.

        A step holds more rows than global_batch_size where it draws short ones; memory stays what it was.
        """
        *first, last = pieces(inputs, self.args.per_device_train_batch_size)
        loss: Any = 0.0
        for piece in first:
            with self.accelerator.no_sync(model):
                loss = loss + super().training_step(model, piece, num_items_in_batch)
        return loss + super().training_step(model, last, num_items_in_batch)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The summed token loss, domains weighted, by the round's constant; takes each domain's sums on the way."""
        labels, domains, weights = (inputs.pop(key) for key in ("labels", "domains", "weights"))
        outputs = model(**inputs)
        losses = token_losses(outputs.logits, labels).sum(1)
        trained = (labels[:, 1:] != IGNORED).sum(1)
        terms = torch.stack([losses.detach().double(), trained.double(), (trained > 0).double()], dim=1)
        self.sums.index_add_(0, domains, terms)
        # Times the number of processes, because DDP averages over them.
        loss = (losses * weights.to(losses.dtype)).sum() / self.rows.tokens_per_step * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def step_statistics(self) -> StepStatistics:
        """What the step measured, over all ranks; the sums start again."""
        losses, tokens, rows = agreed(self.sums).T.cpu().numpy().copy()
        self.sums.zero_()
        return StepStatistics(rows=rows, tokens=tokens, losses=losses)


class SteeredSteps(TrainerCallback, ExportableState):
    """Hands the controller each step's statistics, and keeps its state in the Trainer's checkpoints.

    The state is part of trainer_state.json, so no checkpoint is ever without it.
    """

    def __init__(self, trainer: SteeredTrainer) -> None:
        self.trainer = trainer

    def state(self) -> dict[str, Any]:
        """What the checkpoint keeps."""
        return self.trainer.rows.state()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Continues a killed inner loop's draws (a fresh one's state is the one it has)."""
        self.trainer.rows.restore(state.stateful_callbacks[type(self).__name__])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before anything is logged or saved."""
        self.trainer.rows.controller.observe(self.trainer.step_statistics())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Logs the probabilities beside the loss."""
        if logs and "loss" in logs:
            named = self.trainer.rows.controller.by_name(self.trainer.probabilities)
            self.trainer.log_step(state.global_step, {f"probability/{name}": value for name, value in named.items()})
