"""The exported mixture holds every example as often as the counts say, in files that other trainers read."""

import json
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml

from ideal.data.formats import TEXT
from ideal.report import export_mixture


@dataclass
class Pool:
    name: str
    examples: datasets.Dataset

    def __len__(self) -> int:
        return len(self.examples)


def chat_pool(name: str, rows: int) -> Pool:
    def messages(i: int) -> list[dict[str, str]]:
        turns = [{"role": "user", "content": f"{name} ünï {i}\n?"}, {"role": "assistant", "content": f"{i}"}]
        return [{"role": "system", "content": "s"}, *turns] if i % 2 else turns

    columns = {"input_ids": [[i] for i in range(rows)], "messages": [messages(i) for i in range(rows)]}
    return Pool(name, datasets.Dataset.from_dict(columns))


def text_pool(name: str, rows: int) -> Pool:
    messages = [[{"role": TEXT, "content": f"{name} text {i}"}] for i in range(rows)]
    return Pool(name, datasets.Dataset.from_dict({"messages": messages}))


def export(folder: Path, pools: dict[str, Pool], counts: dict[str, list[int]]) -> Path:
    return export_mixture(folder, pools, {name: np.array(row_counts) for name, row_counts in counts.items()})


def load(path: Path, cache: Path) -> datasets.Dataset:
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache))
    assert isinstance(loaded, datasets.Dataset)
    return loaded


def test_lines_are_the_counts(tmp_path: Path) -> None:
    pools = {"math": chat_pool("math", 4), "code": chat_pool("code", 3), "none": chat_pool("none", 2)}
    counts = {"math": [2, 0, 1, 3], "code": [1, 1, 1], "none": [0, 0]}
    folder = export(tmp_path, pools, counts)
    rows = load(folder / "mixture.jsonl", tmp_path / "cache")
    found = [(row["domain"], json.dumps(row["messages"])) for row in rows]
    for name, pool in pools.items():
        for i, times in enumerate(counts[name]):
            assert found.count((name, json.dumps(pool.examples[i]["messages"]))) == times
    assert len(found) == 9
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "axolotl.yaml",
        "dataset_info.json",
        "mixture.jsonl",
    ]
    assert "9 lines" in (folder / "README.md").read_text()


def test_repeats_stand_apart(tmp_path: Path) -> None:
    folder = export(tmp_path, {"a": chat_pool("a", 3)}, {"a": [2, 2, 1]})
    lines = (folder / "mixture.jsonl").read_text().splitlines()
    assert [json.loads(line)["messages"][-1]["content"] for line in lines] == ["0", "1", "2", "0", "1"]


def test_plain_text_has_its_own_file(tmp_path: Path) -> None:
    pools = {"chat": chat_pool("chat", 2), "books": text_pool("books", 2)}
    folder = export(tmp_path, pools, {"chat": [1, 1], "books": [0, 2]})
    rows = load(folder / "mixture_text.jsonl", tmp_path / "cache")
    assert rows.to_list() == [{"domain": "books", "text": "books text 1"}] * 2
    info = json.loads((folder / "dataset_info.json").read_text())
    assert info["ideal_mixture_text"] == {"file_name": "mixture_text.jsonl", "columns": {"prompt": "text"}}
    assert info["ideal_mixture"]["formatting"] == "sharegpt"
    assert info["ideal_mixture"]["tags"]["role_tag"] == "role"
    snippet = yaml.safe_load((folder / "axolotl.yaml").read_text())["datasets"]
    assert [(d["path"], d["type"]) for d in snippet] == [
        ("mixture.jsonl", "chat_template"),
        ("mixture_text.jsonl", "completion"),
    ]


def test_exporting_again_replaces_everything(tmp_path: Path) -> None:
    export(tmp_path, {"a": text_pool("a", 2)}, {"a": [1, 1]})
    folder = export(tmp_path, {"a": chat_pool("a", 2)}, {"a": [0, 1]})
    assert not (folder / "mixture_text.jsonl").exists()
    assert len((folder / "mixture.jsonl").read_text().splitlines()) == 1


def test_a_failure_leaves_the_old_files(tmp_path: Path) -> None:
    folder = export(tmp_path, {"a": chat_pool("a", 2)}, {"a": [1, 1]})
    before = (folder / "mixture.jsonl").read_text()
    with pytest.raises(ValueError, match="3 counts for a pool of 2 rows"):
        export(tmp_path, {"a": chat_pool("a", 2)}, {"a": [1, 1, 1]})
    assert (folder / "mixture.jsonl").read_text() == before
    assert not list(folder.glob(".*"))
