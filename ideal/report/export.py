"""The final mixture as plain files, for any trainer."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import numpy as np
import yaml

from ideal.data.formats import TEXT
from ideal.report.files import write_atomically

if TYPE_CHECKING:
    import datasets

MESSAGES, TEXTS = "mixture.jsonl", "mixture_text.jsonl"
README = """# The mixture that the run chose

{files}
One line per occurrence: an example that the mixture holds three times stands on three lines. The lines are
ordered by domain, so **let the trainer shuffle** (all of those below do unless told otherwise).

- TRL: `SFTTrainer` takes these files as they are, `messages` (or `text`) is its own format:
  `load_dataset("json", data_files="{first}", split="train")`, `assistant_only_loss=True` for messages.
- LLaMA-Factory: `dataset_info.json` here describes the files. Pass `dataset_dir: THIS_FOLDER` and
  `dataset: {names}`, or copy its entries into your own.{stage}
- axolotl: `axolotl.yaml` holds the `datasets:` part of a configuration, with paths relative to this folder.
- IDEAL: the mixture's ratios are in `../mixture.json` (`--mixing.ratios`).
"""
PRETRAINING = "\n  Plain text is for its stage `pt`, messages are for `sft`: two runs."


class Pool(Protocol):
    """All of a domain's examples (an ExampleSet is one)."""

    @property
    def name(self) -> str: ...

    @property
    def examples(self) -> "datasets.Dataset":
        """Column messages: lists of {role, content}; plain text is one message of its own role."""

    def __len__(self) -> int: ...


def export_mixture(folder: Path, pools: Mapping[str, Pool], counts: Mapping[str, np.ndarray]) -> Path:
    """Writes the mixture to `folder`/export: JSONL in the messages format, and what other trainers need.

    Conversations go to mixture.jsonl (`{"domain", "messages"}`), plain-text rows to mixture_text.jsonl
    (`{"domain", "text"}`), one line per occurrence; rows are streamed, and a file appears only when complete.

    Args:
        folder: the run's folder.
        pools: the pool of every domain.
        counts: per domain [rows of its pool], how often each row stands in the mixture.

    Returns:
        The export's folder.

    Raises:
        ValueError: counts do not fit their pool.
    """
    export = folder / "export"
    export.mkdir(parents=True, exist_ok=True)
    written = {MESSAGES: 0, TEXTS: 0}
    with _renamed_at_end(export / MESSAGES) as messages, _renamed_at_end(export / TEXTS) as texts:
        for domain, domain_counts in counts.items():
            for row in _occurrences(pools[domain], domain_counts):
                name, file = (TEXTS, texts) if "text" in row else (MESSAGES, messages)
                file.write(json.dumps({"domain": domain, **row}, ensure_ascii=False) + "\n")
                written[name] += 1
    for name in [name for name, lines in written.items() if lines == 0]:
        (export / name).unlink()
    kept = [name for name, lines in written.items() if lines]
    info = {_dataset_name(name): _llama_factory(name) for name in kept}
    write_atomically(export / "dataset_info.json", (json.dumps(info, indent=2) + "\n").encode())
    snippet = yaml.safe_dump({"datasets": [_axolotl(name) for name in kept]}, sort_keys=False)
    write_atomically(export / "axolotl.yaml", snippet.encode())
    lines = "".join(f"- `{name}`: {written[name]:,} lines\n" for name in kept)
    names = ",".join(_dataset_name(name) for name in kept)
    stage = PRETRAINING if TEXTS in kept else ""
    readme = README.format(files=lines, first=kept[0] if kept else MESSAGES, names=names, stage=stage)
    write_atomically(export / "README.md", readme.encode())
    return export


def _occurrences(pool: Pool, counts: np.ndarray) -> Iterator[dict[str, Any]]:
    """The pool's rows as often as `counts` [rows] says, pass by pass, so that repeats stand far apart."""
    if len(counts) != len(pool):
        raise ValueError(f"{pool.name}: {len(counts)} counts for a pool of {len(pool)} rows")
    conversations = pool.examples.select_columns(["messages"])
    for already in range(int(counts.max(initial=0))):
        for row in conversations.select(np.flatnonzero(counts > already)):
            messages = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
            plain = len(messages) == 1 and messages[0]["role"] == TEXT
            yield {"text": messages[0]["content"]} if plain else {"messages": messages}


@contextmanager
def _renamed_at_end(path: Path) -> Iterator[TextIO]:
    """A text file under a temporary name, which gets its own name when the body ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _dataset_name(file: str) -> str:
    return "ideal_" + file.removesuffix(".jsonl")


def _llama_factory(file: str) -> dict[str, Any]:
    """An entry of LLaMA-Factory's dataset_info.json (its data/README.md: OpenAI and pre-training formats)."""
    if file == TEXTS:
        return {"file_name": file, "columns": {"prompt": "text"}}
    roles = {f"{role}_tag": role for role in ("user", "assistant", "system")} | {"observation_tag": "tool"}
    tags = {"role_tag": "role", "content_tag": "content", **roles}
    return {"file_name": file, "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}


def _axolotl(file: str) -> dict[str, Any]:
    """An entry of axolotl's `datasets` (its docs/dataset-formats: chat_template, completion)."""
    if file == TEXTS:
        return {"path": file, "ds_type": "json", "type": "completion", "field": "text"}
    return {
        "path": file,
        "ds_type": "json",
        "type": "chat_template",
        "field_messages": "messages",
        "message_property_mappings": {"role": "role", "content": "content"},
        "roles_to_train": ["assistant"],
        "train_on_eos": "turn",
    }
