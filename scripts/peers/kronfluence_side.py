"""kronfluence 1.0.1 on a workload, by the cheapest of its routes: each domain's gradient as one aggregated query.

What it computes, as read in its code, against DESIGN 1 (N sequences, T trained tokens, T_r and T_j those of a set):
- positions: A sums x x^T where the attention mask that the task hands over is 1 (module/linear.py,
  get_flattened_activation): usually every token, also the last one and those after the last trained label. S sums
  d d^T over all positions. Both are divided by the mask's sum, which the eigenvectors do not see.
- eigenvalues: the mean over sequences of (Q_S^T G Q_A)^2 (factor/config.py), that is (T / N) Lambda, plus
  0.1 x their mean if damping_factor is None: (T / N) (H + D).
- scores: of *summed* gradients, so that <g_r, (H + D)^-1 g_j> = score (T / N) / (T_r T_j), and

      M[r, j] = -s_j <g_r, (H + D)^-1 g_j> = -score / (N T_r),    s_j = T_j / T.

The other route (the reference sets as queries) goes through the training data once per capability.
"""

import tempfile
from typing import Any

import torch
from exchange import Rows, Stopwatch, Workload, padded, serve, summed_loss
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.common.factor_arguments import all_low_precision_factor_arguments
from kronfluence.utils.common.score_arguments import all_low_precision_score_arguments
from kronfluence.utils.dataset import DataLoaderKwargs


class SummedLoss(Task):
    """The loss summed over a batch's trained tokens, for training and reference sequences alike."""

    def __init__(self, layers: list[str]) -> None:
        self.layers = layers

    def compute_train_loss(self, batch: Any, model: torch.nn.Module, sample: bool = False) -> torch.Tensor:
        assert not sample, "the empirical Fisher is asked for"
        return summed_loss(model, batch)

    def compute_measurement(self, batch: Any, model: torch.nn.Module) -> torch.Tensor:
        return summed_loss(model, batch)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.layers

    def get_attention_mask(self, batch: Any) -> torch.Tensor:
        return batch["attention_mask"]


def prepare(workload: Workload) -> Any:
    """The analyzer, once; a run fits all factors and computes all scores."""
    assert workload.damping == 0.1, "kronfluence's relative damping is fixed"
    task = SummedLoss(workload.layers)
    # Sorted by length: kronfluence batches in the order of the data set.
    domains = [rows.sorted() for rows in workload.domains.values()]
    training = joined(domains)
    references = joined([rows.sorted() for rows in workload.references.values()])
    loader = DataLoaderKwargs(collate_fn=lambda rows: padded(rows, torch.device("cpu")))
    size = workload.batch_size
    model = prepare_model(workload.model(), task)
    folder = tempfile.TemporaryDirectory(dir=workload.folder)
    analyzer = Analyzer(
        "benchmark", model, task, cpu=workload.device.type == "cpu", disable_tqdm=True, output_dir=folder.name
    )
    analyzer.set_dataloader_kwargs(loader)
    tokens = torch.tensor([float(rows.trained_tokens.sum()) for rows in workload.references.values()])
    sizes = [len(rows) for rows in workload.references.values()]

    def run(request: dict[str, Any], watch: Stopwatch) -> dict[str, Any]:
        assert folder.name, "the folder lives as long as the analyzer"
        low = request.get("dtype") == "bfloat16"
        factor = all_low_precision_factor_arguments(dtype=torch.bfloat16) if low else FactorArguments()
        factor.use_empirical_fisher, factor.covariance_max_examples, factor.lambda_max_examples = True, None, None
        score = all_low_precision_score_arguments(dtype=torch.bfloat16) if low else ScoreArguments()
        score.damping_factor, score.aggregate_query_gradients = None, True
        factors: dict[str, Any] = {"factors_name": "factors", "factor_args": factor, "overwrite_output_dir": True}
        with watch("covariances"):
            analyzer.fit_covariance_matrices(dataset=training, per_device_batch_size=size, **factors)
        with watch("eigenbases"):
            analyzer.perform_eigendecomposition(**factors)
        with watch("eigenvalues"):
            analyzer.fit_lambda_matrices(dataset=training, per_device_batch_size=size, **factors)
        columns = []
        with watch("scores"):
            for rows in domains:
                analyzer.compute_pairwise_scores(
                    "scores",
                    "factors",
                    query_dataset=rows,
                    train_dataset=references,
                    per_device_query_batch_size=size,
                    per_device_train_batch_size=size,
                    score_args=score,
                    overwrite_output_dir=True,
                )
                scores = analyzer.load_pairwise_scores("scores")
                parts = scores["all_modules"].double().flatten().split(sizes)
                columns.append(torch.stack([part.sum() for part in parts]))
        matrix = -torch.stack(columns, dim=1) / (len(training) * tokens[:, None])
        return {"matrix": matrix.tolist()}

    return run


def joined(sets: list[Rows]) -> Rows:
    """One set after the other."""
    return Rows([ids for rows in sets for ids in rows.input_ids], [labels for rows in sets for labels in rows.labels])


if __name__ == "__main__":
    serve(prepare)
