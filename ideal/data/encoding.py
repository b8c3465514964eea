"""Encoding: conversations -> tokens and labels, by the tokenizer's own chat template.

A conversation is rendered to text once and tokenized once, so that its ids are exactly those that the
template gives. Which tokens are trained is read off the text: a turn's span starts where the template's
prompt for it ends, and ends with the end token behind its content. Token ids decide nothing, so pad may equal
the end token.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import jinja2
import numpy as np
import torch
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from ideal.data import formats
from ideal.data.formats import TEXT, DroppedRow, Message
from ideal.errors import UserError

MASKED = -100
# Some templates write today's date into the prompt (Llama 3); results must not depend on the day.
TODAY = date(2024, 7, 26)
NO_ROOM = "no trained token within data.max_length"

# For a tokenizer without a template: named turns, the end token after each answer. It is set on the
# tokenizer, so that it is saved with the model and used at inference.
CHAT_TEMPLATE = """\
{%- if bos_token is defined and bos_token %}{{ bos_token }}{% endif -%}
{%- for message in messages -%}
{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] -}}
{%- if message['role'] == 'assistant' and eos_token is defined and eos_token %}{{ eos_token }}{% endif -%}
{{ '\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif -%}
"""

MESSAGES = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
COLUMNS = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "messages": MESSAGES,
        "row": datasets.Value("int64"),
        "length": datasets.Value("int64"),
        "trained": datasets.Value("int64"),
        "position": datasets.Value("int64"),
        "truncated": datasets.Value("bool"),
        "dropped": datasets.Value("string"),
    }
)


@dataclass(frozen=True)
class ExampleSet:
    """One pool, reference set or test set, encoded."""

    name: str
    examples: datasets.Dataset
    """Columns input_ids and labels (as long as each other; -100: not trained, labels[0] always), and
    messages, a list of {role, content} (plain text: one message of role "text")."""
    lengths: np.ndarray
    """[rows] tokens."""
    trained_tokens: np.ndarray
    """[rows] labels that are not -100, at least 1."""
    positions: np.ndarray
    """[rows] the last trained label's index: positions 0 to that minus 1 carry statistics."""

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        """`input_ids` and `labels` of one example."""
        return self._encoded[int(row)]

    @cached_property
    def _encoded(self) -> datasets.Dataset:
        return self.examples.select_columns(["input_ids", "labels"])


def collate(rows: list[dict[str, list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """Pads examples on the right.

    Returns:
        input_ids, attention_mask, labels: [rows, longest] int64. The mask follows lengths, never ids.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    shape = (len(rows), longest)
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, MASKED),
    }
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        batch["input_ids"][number, :length] = torch.tensor(row["input_ids"])
        batch["attention_mask"][number, :length] = 1
        batch["labels"][number, :length] = torch.tensor(row["labels"])
    return batch


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Gives a tokenizer without a chat template CHAT_TEMPLATE, on the object; returns whether it did."""
    if tokenizer.chat_template is not None:
        return False
    tokenizer.chat_template = CHAT_TEMPLATE
    return True


def without_today(template: str) -> str:
    """A template with its calls for today's date replaced by a fixed one."""
    return re.sub(
        r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda call: repr(TODAY.strftime(call[2])), template
    )


class Encoder:
    """Turns conversations into tokens and labels.

    Raises:
        UserError: the tokenizer is not a fast one (character offsets are needed), or its template fails.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"model.name_or_path: the tokenizer of {tokenizer.name_or_path} is not a fast one "
                "(tokenizer.json), whose character offsets the labels need; convert it first"
            )
        self.notes: list[str] = []
        """What a user should know about the template."""
        if ensure_chat_template(tokenizer):
            self.notes.append(
                "the tokenizer has no chat template: a simple one is used and saved with the model"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        try:
            self.template = without_today(tokenizer.get_chat_template())
            self._probe()
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise UserError(
                f"model.name_or_path: the chat template of {tokenizer.name_or_path} does not render a "
                f"plain conversation ({_first_line(error)})"
            ) from error
        if not self.end_between:
            which = "an answer" if not self.end_last else "an answer that another turn follows"
            self.notes.append(
                f"the chat template puts no end token after {which}: the model will not learn to stop there"
            )
        begins = tokenizer("", verbose=False)["input_ids"][:1] == [tokenizer.bos_token_id]
        self.text_start = tokenizer.bos_token if begins else ""
        self.text_end = tokenizer.eos_token or ""

    @cached_property
    def fingerprint(self) -> str:
        """Changes with anything that the encoded tokens depend on, this code included."""
        code = [Path(module).read_bytes() for module in (__file__, formats.__file__)]
        rules = self.tokenizer.backend_tokenizer.to_str()
        return Hasher.hash((code, rules, self.template, self.tokenizer.special_tokens_map, self.max_length))

    def render(self, messages: list[Message], prompt: bool = False) -> str:
        """The template's text; `prompt`: with the header that makes the assistant answer."""
        return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
            messages,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=prompt,
            date_string=TODAY.strftime("%d %b %Y"),
        )

    def _probe(self) -> None:
        """Learns what the template puts around an answer, from one whose place is plain to see."""
        user = {"role": "user", "content": "question"}
        answer = {"role": "assistant", "content": "IDEAL-PROBE"}
        asked, prompted = self.render([user]), self.render([user], prompt=True)
        before, _, self.tail = self.render([user, answer]).partition("IDEAL-PROBE")
        _, _, between = self.render([user, answer, user, answer]).partition("IDEAL-PROBE")
        self.prompts = prompted != asked
        """Whether the template knows prompts that make the assistant answer."""
        self.header = before[len(asked) :] if before.startswith(asked) else None
        """What stands between a question and its answer."""
        self.end_last = self._through_end_token(self.tail)
        """What closes the last answer, through its end token."""
        self.end_between = self.end_last if self.end_last and between.startswith(self.end_last) else ""
        """The same for an answer that a question follows."""

    def _through_end_token(self, tail: str) -> str:
        special = {*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab()}
        ends = [
            (tail.index(token), -len(token), token) for token in special if token.strip() and token in tail
        ]
        if not ends:
            return ""
        place, _, token = min(ends)
        return tail[: place + len(token)]

    def spans(self, messages: list[Message]) -> tuple[str, list[tuple[int, int]]]:
        """A conversation's text and the (start, end) characters of what is trained in it.

        Raises:
            DroppedRow: the template refuses the conversation, or what it trains cannot be told for sure.
        """
        if messages[0]["role"] == TEXT:
            text = self.text_start + messages[0]["content"] + self.text_end
            return text, [(len(self.text_start), len(text))]
        try:
            text = self.render(messages)
            answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
            return text, [self._answer(text, messages, number) for number in answers]
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise DroppedRow(f"the chat template refuses it: {_first_line(error)}") from error

    def _answer(self, text: str, messages: list[Message], number: int) -> tuple[int, int]:
        """The span of one answer: from the end of its prompt through its end token."""
        if number == 0:
            raise DroppedRow("it begins with the assistant's turn")
        content = messages[number]["content"]
        variants = list(dict.fromkeys([content, content.strip(), content.rstrip(), content.lstrip()]))
        end = self.end_last if number == len(messages) - 1 else self.end_between
        prompt = self.render(messages[:number], prompt=True)
        if self.prompts and text.startswith(prompt):
            for variant in variants:
                if text.startswith(variant + end, len(prompt)):
                    return len(prompt), len(prompt) + len(variant + end)
            # What the template puts before the content (an empty <think> block) the model must write too.
            through = self.render(messages[: number + 1])
            closed = through.removesuffix(self.tail) + self.end_last
            ends = any(closed.endswith(variant + self.end_last) for variant in variants)
            if through.endswith(self.tail) and text.startswith(closed) and ends:
                return len(prompt), len(closed)
        asked = self.render(messages[:number])
        if self.header is not None and text.startswith(asked + self.header):
            start = len(asked + self.header)
            for variant in variants:
                if text.startswith(variant + end, start):
                    return start, start + len(variant + end)
        raise DroppedRow(
            "the chat template rewrites earlier turns, so that its answers cannot be told from the rest"
        )

    @cached_property
    def end_ids(self) -> list[int]:
        """The tokens that end an answer: the template's, and the tokenizer's own."""
        ids = [self.tokenizer.eos_token_id]
        ids += self._tokens(self.end_last)["input_ids"][-1:] if self.end_last else []
        return sorted({int(token) for token in ids if token is not None})

    def prompt(self, messages: list[Message]) -> list[int]:
        """The tokens that stand before the last answer in training. Raises DroppedRow.

        Cut by tokens: where a template ends a prompt with a space, the answer's first token holds that space.
        """
        found = self.last_answer(messages)
        start = next(place for place, label in enumerate(found["labels"]) if label != MASKED)
        return found["input_ids"][:start]

    def last_answer(self, messages: list[Message]) -> dict[str, list[int]]:
        """`input_ids` and `labels`, in which the last answer alone is not masked. Raises DroppedRow."""
        text, spans = self.spans(messages)
        tokens = self._tokens(text)
        trained = trained_mask(tokens["offset_mapping"], spans[-1:])
        ids = np.array(tokens["input_ids"], dtype=np.int64)
        return {"input_ids": ids.tolist(), "labels": np.where(trained, ids, MASKED).tolist()}

    def _tokens(self, text: str | list[str]) -> Any:
        return self.tokenizer(
            text,
            add_special_tokens=False,
            verbose=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
        )

    def encode(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """A batch of `messages` and `row` -> COLUMNS; `dropped` says why a row is of no use, or is empty."""
        rendered: list[tuple[str, list[tuple[int, int]]]] = []
        dropped = []
        for messages in batch["messages"]:
            reason = ""
            try:
                rendered.append(self.spans(messages))
            except DroppedRow as problem:
                rendered.append(("", []))
                reason = str(problem)
            dropped.append(reason)
        tokens = self._tokens([text for text, _ in rendered])
        columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        for number, (ids, offsets) in enumerate(
            zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
        ):
            trained = trained_mask(offsets, rendered[number][1])[: self.max_length]
            kept = np.array(ids[: self.max_length], dtype=np.int64)
            count = int(trained.sum())
            columns["input_ids"].append(kept)
            columns["labels"].append(np.where(trained, kept, MASKED))
            columns["length"].append(len(kept))
            columns["trained"].append(count)
            columns["position"].append(int(trained.nonzero()[0][-1]) if count else 0)
            columns["truncated"].append(len(ids) > self.max_length)
            columns["dropped"].append(dropped[number] or ("" if count else NO_ROOM))
        return {**columns, "messages": batch["messages"], "row": batch["row"]}


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def trained_mask(offsets: list[tuple[int, int]], spans: Iterable[tuple[int, int]]) -> np.ndarray:
    """Which tokens overlap one of the spans of characters; the first never is trained.

    A byte-level tokenizer with trim_offsets gives whitespace no width, at its right end: such a token belongs
    to the span that ends there, not to the one that starts there.
    """
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    mask = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        mask |= (ends > start) & ((starts < end) | ((starts == ends) & (ends == end)))
    mask[:1] = False
    return mask


def encode_conversations(conversations: datasets.Dataset, encoder: Encoder, name: str) -> datasets.Dataset:
    """Encodes `messages` and `row` to COLUMNS, with a progress bar, through the cache of `datasets`."""
    fingerprint = Hasher.hash(("encoded", conversations._fingerprint, encoder.fingerprint))
    return conversations.map(
        encoder.encode,
        batched=True,
        batch_size=256,
        features=COLUMNS,
        desc=f"Encoding {name}",
        remove_columns=conversations.column_names,
        new_fingerprint=fingerprint,
    )


def example_set(encoded: datasets.Dataset, name: str) -> ExampleSet:
    """The usable rows of COLUMNS as an ExampleSet."""
    dropped = encoded["dropped"][:]
    if any(dropped):
        encoded = encoded.select([row for row, reason in enumerate(dropped) if not reason])
    lengths, trained, positions = (np.array(encoded[name][:]) for name in ("length", "trained", "position"))
    examples = encoded.select_columns(["input_ids", "labels", "messages"])
    return ExampleSet(name, examples, lengths=lengths, trained_tokens=trained, positions=positions)
