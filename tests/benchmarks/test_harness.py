"""The real lm-evaluation-harness on a task made here, by the command that a person gives."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ideal.benchmarks.harness import Tasks, Wanted
from ideal.benchmarks.scores import KNOWN
from ideal.demo import BASE_MODEL
from ideal.errors import UserError

pytest.importorskip("lm_eval")

ROOT = Path(__file__).parents[2]
PROMPTS = ["math: 3 + 4 =", "code: print(2)", "Say it twice: ab", "What comes after 7?", "red, green,"]
TASK = """
task: echo
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{expected}}}}"
target_delimiter: ""
generation_kwargs: {{until: [], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
num_fewshot: 0
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(BASE_MODEL, tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def include(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three of five rows expect what greedy decoding behind the chat template gives, done here; two expect more."""
    folder = tmp_path_factory.mktemp("tasks")
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()
    rows = []
    for number, prompt in enumerate(PROMPTS):
        message = [{"role": "user", "content": prompt}]
        ids = torch.tensor([tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"]])
        answer = []
        for _ in range(6):
            best = int(network(ids).logits[0, -1].argmax())
            if best == tokenizer.eos_token_id:
                break
            answer.append(best)
            ids = torch.cat([ids, torch.tensor([[best]])], 1)
        right = tokenizer.decode(answer, skip_special_tokens=True)
        rows.append({"prompt": prompt, "expected": right if number < 3 else right + " and more"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "echo.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"))
    return folder


def command(*words: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "scripts/evaluate.py", *map(str, words)],
        capture_output=True, text=True, timeout=240, cwd=ROOT, env=dict(os.environ),
    )  # fmt: skip


def test_a_task_of_ones_own(model: Path, include: Path) -> None:
    """3 of 5; the harness' standard error is sqrt(p (1 - p) / (n - 1)) = sqrt(.06)."""
    done = command(model, "--include", include, "--tasks", "echo", "--batch-size", 2)
    assert done.returncode == 0, done.stderr
    found = json.loads((model / "benchmarks.json").read_text())["tasks"]["echo"]
    assert (found["score"], found["rows"], found["metric"]) == (0.6, 5, "exact_match,none")
    assert found["error"] == pytest.approx(0.06**0.5)
    assert found["settings"]["chat_template"] is True and found["higher_is_better"]
    again = command(model, "--include", include, "--tasks", "echo")
    assert "finished: echo; to do: none" in again.stdout and "requests" not in again.stderr
    # The task means something else now.
    text = (include / "echo.yaml").read_text()
    (include / "echo.yaml").write_text(text.replace("max_gen_toks: 6", "max_gen_toks: 1"))
    other = command(model, "--include", include, "--tasks", "echo")
    assert "to do: echo" in other.stdout
    (include / "echo.yaml").write_text(text.replace("max_gen_toks: 6", "max_gen_toks: 9000"))
    longer = command(model, "--include", include, "--tasks", "echo")
    assert longer.returncode == 2 and "Traceback" not in longer.stderr
    assert re.search(r"error: --tasks: echo cannot be run on .*9000", longer.stderr)
    (include / "echo.yaml").write_text(text)


@pytest.mark.parametrize(
    ("words", "line"),
    [(["--tasks", "gsm8k"], "gsm8k cannot be loaded .* come from the hub"), (["--limit", "0"], "--limit must be 1")],
)
def test_one_line_for_a_mistake(model: Path, words: list[str], line: str) -> None:
    done = command(model, *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not done.stdout
    assert re.search(line, done.stderr.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def known() -> Tasks:
    """All tasks with a short name; making the harness' list of its tasks takes ten seconds."""
    return Tasks(Wanted(tuple(KNOWN), run_code=True))


@pytest.fixture
def listed(known: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path: known.manager)


@pytest.mark.parametrize(
    ("wanted", "line"),
    [
        (Wanted(("nonsense",)), "nonsense is not known to lm-evaluation-harness"),
        (Wanted(("ai2_arc",)), "ai2_arc has no score of its own, name some of its tasks: arc_challenge, arc_easy"),
        (Wanted(("gsm8k", "mbpp")), "mbpp runs code that the model wrote"),
        (Wanted(("gsm8k",), include=Path("no/folder")), "--include: no/folder is no folder"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(listed: None, wanted: Wanted, line: str) -> None:
    with pytest.raises(UserError, match=line):
        Tasks(wanted)


def test_the_tasks_that_have_a_short_name(known: Tasks, listed: None) -> None:
    """The harness has them all, with the metric and the rule that are read as the score; two of them run code."""
    for short, task in KNOWN.items():
        metric, _, rule = task.metric.partition(",")
        for name in {task.plain, task.chat}:
            config = known.manager.task_index[name].cfg or {}
            text = str(config.get("aggregate_metric_list") or config["metric_list"])
            # The harness expands its own function pass_at_k to pass@1.
            assert metric.replace("pass@1", "pass_at_k") in text, (short, name)
            assert rule == "none" or name != task.plain or rule in str(config), (short, name)
        assert known.runs_code(task.plain) == known.runs_code(task.chat) == (short in ("humaneval", "mbpp"))
    Tasks(Wanted(tuple(task for task in KNOWN if task not in ("humaneval", "mbpp"))))


def test_a_group_is_as_its_parts(known: Tasks) -> None:
    parts = known.members("bbh")
    assert len(parts) == 27 and all(part.startswith("bbh_cot_fewshot_") for part in parts)
    assert known.settings("bbh", chat=True)["definition"] != known.settings("gsm8k", chat=True)["definition"]
    before = known.settings("bbh", chat=True)
    config = known.manager.task_index[parts[3]].cfg
    assert config is not None
    config["num_fewshot"] += 1
    assert known.settings("bbh", chat=True) != before, "a part means something else"
    config["num_fewshot"] -= 1
    assert known.settings("bbh", chat=True) == before
