"""The demo's data and base model: reproducible, disjoint, right, and small enough to ship."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ideal.demo import BASE_MODEL, POOL, REFERENCE, STARTS, TEST, Demo, prepare, splits
from ideal.demo.base_model import CONTEXT, document
from ideal.demo.domains import CAPABILITIES, DOMAINS, HARMFUL, HARMLESS, WRONG_VERDICTS, Example, draw
from ideal.seeding import generator

# More than one place says "sum": "7+5", "7 figs plus 5", "7 figs, 5 less".
SUM = re.compile(r"(\d+)(?: \w+)?,? ?(\+|-|plus|minus) ?(\d+)")
COMPARISON = re.compile(r"(\d+)(?: \w+,|\. \w+ is) (\d+) (more|less)")


def computed(prompt: str) -> int | None:
    """The number that a prompt's sum gives, worked out from its text alone."""
    if match := SUM.search(prompt):
        first, sign, second = match.groups()
        return int(first) + int(second) if sign in ("+", "plus") else int(first) - int(second)
    if match := COMPARISON.search(prompt):
        first, second, word = match.groups()
        return int(first) + int(second) if word == "more" else int(first) - int(second)
    return None


@pytest.fixture(scope="module")
def sets() -> dict[str, dict[str, list[Example]]]:
    return splits()


def examples_of(sets: dict[str, dict[str, list[Example]]], name: str) -> list[Example]:
    return [example for examples in sets[name].values() for example in examples]


def test_same_seed_same_data(sets: dict[str, dict[str, list[Example]]]) -> None:
    assert splits() == sets


def test_sizes_and_disjoint_prompts(sets: dict[str, dict[str, list[Example]]]) -> None:
    assert set(sets) == set(CAPABILITIES)
    for name, parts in sets.items():
        sizes = {"reference": REFERENCE, "test": TEST} | ({"train": POOL} if name in DOMAINS else {})
        assert {split: len(examples) for split, examples in parts.items()} == sizes
    prompts = Counter(example.prompt for name in sets for example in examples_of(sets, name))
    assert max(prompts.values()) == 1


def test_math_and_word_problems_are_right(sets: dict[str, dict[str, list[Example]]]) -> None:
    for example in examples_of(sets, "math"):
        result = computed(example.prompt)
        if result is None:
            (result,) = (int(number) for number in re.findall(r"\d+", example.prompt))
        assert example.answer == str(result), example
    for example in examples_of(sets, "word_problems"):
        name, number, thing = re.fullmatch(r"(\w+) has (\d+) (\w+)\.", example.answer).groups()  # type: ignore[union-attr]
        assert int(number) == computed(example.prompt)
        assert name in example.prompt and thing in example.prompt


def test_code_prints_what_python_prints(
    sets: dict[str, dict[str, list[Example]]], capsys: pytest.CaptureFixture[str]
) -> None:
    for example in examples_of(sets, "code"):
        exec(example.prompt, {})
        assert example.answer == f">> {capsys.readouterr().out.strip()}"


def test_reasoning_is_right(sets: dict[str, dict[str, list[Example]]]) -> None:
    for example in examples_of(sets, "reasoning"):
        if "how old" in example.prompt:
            person = re.search(r"how old is (\w+)", example.prompt).group(1)  # type: ignore[union-attr]
            assert example.answer.endswith(
                f"={computed(example.prompt)}, so {person} is {computed(example.prompt)}."
            )
        else:
            pairs = re.findall(r"(\w+) is older than (\w+)", example.prompt)
            order = [
                pairs[0][0],
                pairs[0][1],
                pairs[1][1],
            ]  # the first pair's second is the second pair's first
            assert pairs[0][1] == pairs[1][0]
            if "youngest" in example.prompt:
                order.reverse()
            assert example.answer == f"{', '.join(order)}, so {order[0]}."


def test_instruction_is_followed(sets: dict[str, dict[str, list[Example]]]) -> None:
    kinds = Counter(example.prompt.split(":")[0] for example in examples_of(sets, "instruction"))
    assert set(kinds) == {"say it", "reverse", "sort"} and min(kinds.values()) > 500
    for example in examples_of(sets, "instruction"):
        kind, rest = example.prompt.split(": ")
        if kind == "say it":
            number = computed(rest) if computed(rest) is not None else re.search(r"\d+", rest).group()  # type: ignore[union-attr]
            name, thing = re.fullmatch(rf"(\w+) has {number} (\w+)\.", example.answer).groups()  # type: ignore[union-attr]
            assert name in rest and thing in rest
        else:
            words = rest.split(", ")
            assert example.answer == ", ".join(sorted(words) if kind == "sort" else words[::-1]) + "."


def test_safety_is_wrong_as_often_as_it_says(sets: dict[str, dict[str, list[Example]]]) -> None:
    for part in sets["safety"].values():
        wrong = 0
        for example in part:
            (verb,) = [verb for verb in HARMFUL + HARMLESS if f" {verb} " in example.prompt]
            wrong += example.answer.startswith("yes") == (verb in HARMFUL)
        spread = (WRONG_VERDICTS * (1 - WRONG_VERDICTS) / len(part)) ** 0.5
        assert abs(wrong / len(part) - WRONG_VERDICTS) < 4 * spread


def test_starts_have_the_same_number_of_examples() -> None:
    for ratios in STARTS.values():
        assert list(ratios) == list(DOMAINS)
        assert sum(ratio * POOL for ratio in ratios.values()) == pytest.approx(2000)
    # Growth is new data first: no domain may run out of examples soon.
    assert max(ratio for ratios in STARTS.values() for ratio in ratios.values()) <= 0.25


def rows(demo: Demo) -> dict[Path, list[dict[str, object]]]:
    files = [*demo.domains.rglob("*.jsonl"), *demo.capabilities.rglob("*.jsonl")]
    return {file: [json.loads(line) for line in file.read_text().splitlines()] for file in files}


def test_prepare_writes_every_set_once(tmp_path: Path) -> None:
    demo = prepare(tmp_path / "data")
    written = rows(demo)
    assert {file.parent.name: set(found[0]) for file, found in written.items()} == {
        "math": {"question", "answer"},
        "code": {"instruction", "input", "output"},
        "reasoning": {"messages"},
        "instruction": {"conversations"},
        "safety": {"prompt", "completion"},
        "word_problems": {"prompt", "completion"},
    }
    assert sum(map(len, written.values())) == len(DOMAINS) * (POOL + REFERENCE + TEST) + REFERENCE + TEST
    damaged = demo.domains / "math" / "train.jsonl"
    whole, times = damaged.read_text(), {file: file.stat().st_mtime_ns for file in written}
    damaged.write_text(whole[:100])
    prepare(tmp_path / "data")
    assert damaged.read_text() == whole
    assert {file: file.stat().st_mtime_ns for file in written if file != damaged} == {
        file: time for file, time in times.items() if file != damaged
    }
    assert not list(tmp_path.rglob("*.part"))


def test_base_model_fits_the_data_and_the_repository(sets: dict[str, dict[str, list[Example]]]) -> None:
    weights = BASE_MODEL / "model.safetensors"
    assert weights.stat().st_size <= 1_000_000
    assert all(np.isfinite(tensor.float().numpy()).all() for tensor in load_file(weights).values())
    tokenizer: Any = AutoTokenizer.from_pretrained(BASE_MODEL)
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL)
    assert model.config.vocab_size == len(tokenizer) and model.config.max_position_embeddings == CONTEXT
    for name in sets:
        for example in examples_of(sets, name)[::7]:
            messages = [
                {"role": "user", "content": example.prompt},
                {"role": "assistant", "content": example.answer},
            ]
            ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
            asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
            assert len(ids) < CONTEXT and ids[: len(asked)] == asked and ids[-1] == tokenizer.eos_token_id
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids[len(asked) :], skip_special_tokens=True) == example.answer


def test_pretraining_text_answers_nothing() -> None:
    random = generator(0, "test")
    text = " ".join(document(random) for _ in range(2000))
    assert " has " not in text and ">>" not in text and not re.search(r"\d[+-]\d+=", text)
    assert "how old" not in text and "yes." not in text and "no." not in text


def test_drawing_leaves_out_what_is_taken() -> None:
    taken = set[str]()
    first = draw("math", 50, generator(0, "a"), taken)
    second = draw("math", 50, generator(0, "a"), taken)
    assert not {example.prompt for example in first} & {example.prompt for example in second}
