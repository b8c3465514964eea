"""The embedded demo: five synthetic domains and a tiny Llama that ships with the package."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ideal.demo.domains import CAPABILITIES, DOMAINS, Example, draw
from ideal.seeding import generator

BASE_MODEL = Path(__file__).parent / "base_model"
"""The base model's folder (config, weights, tokenizer); ideal/demo/base_model.py made it."""

POOL, REFERENCE, TEST = 4000, 200, 400
SEED = 0

SCORERS = {
    "math": "number",
    "code": "number",
    "reasoning": "exact",
    "instruction": "exact",
    "safety": "option",
    "word_problems": "number",
}
"""How answers to each capability are scored: the number, the whole answer, or yes or no."""

STARTS = {
    "uniform": {"math": 0.1, "code": 0.1, "reasoning": 0.1, "instruction": 0.1, "safety": 0.1},
    "skewed": {"math": 0.25, "code": 0.175, "reasoning": 0.025, "instruction": 0.025, "safety": 0.025},
    "misplaced": {"math": 0.025, "code": 0.025, "reasoning": 0.175, "instruction": 0.025, "safety": 0.25},
}
"""Start ratios, 2000 examples each: 400 of every domain; 1000, 700, 100, 100 and 100 in the domains' order;
and the same sizes where they are of least use, half of all examples in the noisy domain."""


@dataclass(frozen=True)
class Demo:
    """Where the demo's parts lie."""

    base_model: Path
    domains: Path
    """A sub-folder per domain with train.jsonl, reference.jsonl and test.jsonl."""
    capabilities: Path
    """A sub-folder per capability without a domain of its own with reference.jsonl and test.jsonl."""


def _row(name: str, example: Example) -> dict[str, Any]:
    """The example in its set's format; the demo shows all five that hold a question and an answer."""
    prompt, answer = example.prompt, example.answer
    match name:
        case "math":
            return {"question": prompt, "answer": answer}
        case "code":
            return {"instruction": prompt, "input": "", "output": answer}
        case "reasoning":
            return {
                "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            }
        case "instruction":
            return {"conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]}
        case _:
            return {"prompt": prompt, "completion": answer}


def splits() -> dict[str, dict[str, list[Example]]]:
    """Per capability its train (domains only), reference and test examples; no prompt stands in two sets."""
    taken = set[str]()
    sets: dict[str, dict[str, list[Example]]] = {}
    # Capabilities without a domain come first: what others train on must not hold their questions.
    for name in sorted(CAPABILITIES, key=lambda name: name in DOMAINS):
        sizes = {"reference": REFERENCE, "test": TEST} | ({"train": POOL} if name in DOMAINS else {})
        examples = iter(draw(name, sum(sizes.values()), generator(SEED, "demo", name), taken))
        sets[name] = {split: [next(examples) for _ in range(size)] for split, size in sizes.items()}
    return sets


def prepare(folder: Path) -> Demo:
    """Writes the demo's data sets below `folder`, unless they are there, and says where all parts lie."""
    demo = Demo(BASE_MODEL, folder / "domains", folder / "capabilities")
    for name, sets in splits().items():
        place = (demo.domains if name in DOMAINS else demo.capabilities) / name
        place.mkdir(parents=True, exist_ok=True)
        for split, examples in sets.items():
            text = "".join(json.dumps(_row(name, example)) + "\n" for example in examples)
            file, part = place / f"{split}.jsonl", place / f"{split}.jsonl.{os.getpid()}.part"
            if not file.exists() or file.read_text() != text:
                part.write_text(text)
                part.replace(file)
    return demo
