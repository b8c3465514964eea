"""Which of a task's numbers is its score: pure functions.

A benchmark is what benchmarks.json holds of one task: {"score", "error", "metric", "higher_is_better", "rows",
"metrics", "settings", "seconds"}. A score is as the task defines it, in [0, 1] for all tasks named here.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ideal.report.files import Json, number

DEFAULT = ("gsm8k", "humaneval", "bbh", "ifeval")
"""What the paper reports."""


class Known(NamedTuple):
    """A task under the short name that people use."""

    plain: str
    """The harness' name of it, for a model without a chat template."""
    chat: str
    """The same for one with a chat template: where the answer's beginning must be given, that differs."""
    metric: str
    """The harness' "metric,filter" that is the score."""


KNOWN = {
    # The last number of an answer, not only one behind "####": a model that was trained on other answers than
    # GSM8K's own does not write that.
    "gsm8k": Known("gsm8k", "gsm8k", "exact_match,flexible-extract"),
    "humaneval": Known("humaneval", "humaneval_instruct", "pass@1,create_test"),
    "bbh": Known("bbh", "bbh", "exact_match,get-answer"),
    "ifeval": Known("ifeval", "ifeval", "prompt_level_strict_acc,none"),
    # 500 problems of MATH, four in the prompt, compared as mathematics and not as text.
    "math": Known("minerva_math500", "minerva_math500", "math_verify,none"),
    "arc_challenge": Known("arc_challenge", "arc_challenge", "acc_norm,none"),
    "mbpp": Known("mbpp", "mbpp_instruct", "pass_at_1,none"),
    "truthfulqa": Known("truthfulqa_mc2", "truthfulqa_mc2", "acc,none"),
}


def harness_name(task: str, chat: bool) -> str:
    """The harness' name of a task that may be given by its short one."""
    known = KNOWN.get(task)
    return task if known is None else known.chat if chat else known.plain


def score_key(task: str, metrics: Mapping[str, Any]) -> str | None:
    """The "metric,filter" that is the score of `task`; of a task that is not known here its first number.

    metrics: of the harness' results, in the task's own order. None where there is no such number.
    """
    keys = [key for key, value in metrics.items() if "," in key and "_stderr" not in key and number(value) is not None]
    if task in KNOWN:
        wanted = KNOWN[task].metric
        # A task's variants may name their filters otherwise.
        keys = [key for key in keys if key == wanted] or [k for k in keys if k.split(",")[0] == wanted.split(",")[0]]
    return next(iter(keys), None)


def benchmark(task: str, name: str, results: Mapping[str, Any], settings: Json, seconds: float) -> Json:
    """What benchmarks.json holds of a finished task.

    Args:
        task: as it was asked for.
        name: the harness' own name of it.
        results: what the harness' `simple_evaluate` returned for this task alone.
    Raises ValueError where the harness found no number.
    """
    metrics = (results.get("groups") or {}).get(name) or results["results"][name]
    key = score_key(task, metrics)
    if key is None:
        raise ValueError(f"lm-evaluation-harness returned no score for {task}")
    metric, _, rule = key.partition(",")
    higher = results.get("higher_is_better", {}).get(name, {}).get(metric)
    counts = results.get("n-samples", {})
    parts = [part for part in counts if part != name] if name not in counts else [name]
    return {
        "score": float(metrics[key]),
        # The harness has no standard error for some aggregates ("N/A").
        "error": number(metrics.get(f"{metric}_stderr,{rule}")),
        "metric": key,
        "higher_is_better": higher is not False,
        "rows": sum(counts[part]["effective"] for part in parts),
        "metrics": {name: float(value) for name, value in metrics.items() if "," in name and number(value) is not None},
        "settings": {**settings, "task": name, "version": results.get("versions", {}).get(name)},
        "seconds": seconds,
    }
