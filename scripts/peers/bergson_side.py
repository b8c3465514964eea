"""bergson 2.5.1 (kfac with eigenvalue correction) on a workload: the steps of its hessian_pipeline, in one process.

The steps are called with a model that is loaded already, and gradients and scores stay in memory where it allows
that: its command line would load the model from disk once per step and capability.

What it computes, as read in its code, against DESIGN 1 (N sequences, T trained tokens, T_r those of a capability):
- positions: A and S sum over all tokens but each sequence's last, whatever is masked (data.py, pad_and_tensor:
  collection_masks), divided by their number, which the eigenvectors do not see.
- eigenvalues: the sum over sequences of (Q_S^T G Q_A)^2 / N (hessians/eigenvectors.py, LambdaCollector), that is
  (T / N) Lambda, plus damping x their mean (hessians/inversion.py, damped_inverse): (T / N) (H + D).
- scores: of *summed* gradients (loss_reduction="sum"), so that, as for kronfluence,

      M[r, j] = -s_j <g_r, (H + D)^-1 g_j> = -sum over j's sequences of score / (N T_r).
"""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bergson.collection import collect_gradients
from bergson.config.config import HessianConfig, IndexConfig, InversionConfig, PreprocessConfig
from bergson.data import allocate_batches, column_offsets, load_gradients
from bergson.gradients import GradientProcessor
from bergson.hessians.hessian_approximations import fit_factored_hessians
from bergson.hessians.preconditioner import FactoredPreconditioner
from bergson.score.score_writer import InMemorySequenceScoreWriter
from bergson.score.scorer import Scorer
from datasets import Dataset
from exchange import Rows, Stopwatch, Workload, serve


def dataset(sets: list[Rows]) -> Dataset:
    """The sequences as bergson reads them."""
    ids = [ids for rows in sets for ids in rows.input_ids]
    labels = [labels for rows in sets for labels in rows.labels]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "length": [len(row) for row in ids]})


def prepare(workload: Workload) -> Any:
    """Model and data, once; a run does every step."""
    model = workload.model()
    # As bergson's setup_model_and_peft does.
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    # It names layers from the base model's root.
    layers = [name.removeprefix(f"{model.base_model_prefix}.") for name in workload.layers]
    training = dataset(list(workload.domains.values()))
    references = [dataset([rows]) for rows in workload.references.values()]
    tokens = torch.tensor([float(rows.trained_tokens.sum()) for rows in workload.references.values()])
    sizes = [len(rows) for rows in workload.domains.values()]
    longest = max(max(data["length"]) for data in [training, *references])
    config = IndexConfig(run_path="", model="", token_batch_size=workload.batch_size * longest)
    hessian = HessianConfig(method="kfac", ev_correction=True, use_dataset_labels=True)
    common: dict[str, Any] = {"model": model, "target_modules": set(layers), "attention_cfgs": {}}

    def batches(data: Dataset) -> list[list[int]]:
        return allocate_batches(data["length"][:], config.token_batch_size)

    def query(number: int, folder: str) -> dict[str, torch.Tensor]:
        """The summed gradient of a reference set, [1, O I] per layer."""
        index = replace(config, run_path=f"{folder}/query{number}")
        data, summed = references[number], PreprocessConfig(aggregation="sum")
        processor = GradientProcessor()
        collect_gradients(
            data=data, processor=processor, cfg=index, batches=batches(data), preprocess_cfg=summed, **common
        )
        written = torch.from_numpy(load_gradients(index.partial_run_path).copy())
        offsets = column_offsets(json.loads((index.partial_run_path / "info.json").read_text())["grad_sizes"])
        return {name: written[:, offsets[name][0] : offsets[name][1]] for name in layers}

    def run(request: dict[str, Any], watch: Stopwatch) -> dict[str, Any]:
        folder = tempfile.mkdtemp(dir=workload.folder)
        with watch("factors"):
            index = replace(config, run_path=f"{folder}/factors")
            index.partial_run_path.mkdir()
            fit_factored_hessians(
                data=training,
                index_cfg=index,
                hessian_cfg=hessian,
                batches=batches(training),
                path=str(index.partial_run_path),
                do_eigendecomposition=True,
                **common,
            )
        with watch("reference gradients"):
            queries = [query(number, folder) for number in range(len(references))]
        with watch("inverse"):
            inverse = FactoredPreconditioner.from_shards(
                Path(index.partial_run_path),
                rank=0,
                device=workload.device,
                inversion_cfg=InversionConfig("damped_inverse", workload.damping),
                ev_correction=True,
            )
            solved = inverse.apply({name: torch.cat([query[name] for query in queries]) for name in layers})
        with watch("scores"):
            writer = InMemorySequenceScoreWriter(len(training), len(references))
            scorer = Scorer(solved, layers, writer, workload.device, torch.float32)
            index = replace(config, run_path=f"{folder}/scores")
            index.partial_run_path.mkdir()
            collect_gradients(
                data=training,
                processor=GradientProcessor(),
                cfg=index,
                batches=batches(training),
                scorer=scorer,
                **common,
            )
            sums = torch.stack([part.sum(0) for part in writer.scores.double().split(sizes)], dim=1)
        shutil.rmtree(folder)
        return {"matrix": (-sums / (len(training) * tokens[:, None])).tolist()}

    return run


if __name__ == "__main__":
    serve(prepare)
