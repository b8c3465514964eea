"""What there is to know about the data before it is trained on: counts, copies, examples with their mask."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from ideal.data.encoding import MASKED, ExampleSet

SHOWN_ROWS = 5


@dataclass
class Dropped:
    """Rows that were left out for one reason."""

    reason: str
    count: int
    rows: list[int]
    """The first few, numbered from 1."""


@dataclass
class SetReport:
    """One pool, reference set or test set; every field can be written as JSON."""

    kind: str
    """pool, reference or test."""
    name: str
    """The domain or capability."""
    source: str
    format: str = ""
    rows: int = 0
    """Rows read."""
    held_out: int = 0
    """Of a pool: rows that became the domain's reference set."""
    not_drawn: int = 0
    """Rows beyond data.max_examples."""
    kept: int = 0
    """Examples that can be used."""
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    """Tokens of the longest example, after truncation."""
    truncated: int = 0
    """Examples kept that were cut off at data.max_length."""
    dropped: list[Dropped] = field(default_factory=list)
    copies_inside: int = 0
    """Rows whose conversation equals an earlier one's in this set."""
    copies_across: dict[str, int] = field(default_factory=dict)
    """Of a pool: rows that also stand in each other pool."""
    copies_measured: dict[str, int] = field(default_factory=dict)
    """Rows that also stand in a reference or test set other than this one, by label ("math reference")."""
    ignored_columns: list[str] = field(default_factory=list)
    scorer: str = ""
    """Of a reference or test set: what its answers are scored by, if they are."""
    unscorable: list[Dropped] = field(default_factory=list)
    """Rows that the scorer cannot use; they are kept, for the losses."""
    notes: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The set in words: "math" for a pool, "math reference", "math test"."""
        return self.name if self.kind == "pool" else f"{self.name} {self.kind}"

    def drop(self, reasons: Sequence[str], rows: Sequence[int]) -> None:
        """Counts rows (numbered from 0) that are left out, each with its reason."""
        count(self.dropped, reasons, rows)


def count(found: list[Dropped], reasons: Sequence[str], rows: Sequence[int]) -> None:
    """Adds rows (numbered from 0) to `found`, each to those of its reason."""
    known = {dropped.reason: dropped for dropped in found}
    for reason, row in zip(reasons, rows, strict=True):
        if reason not in known:
            known[reason] = Dropped(reason, 0, [])
            found.append(known[reason])
        known[reason].count += 1
        if len(known[reason].rows) < SHOWN_ROWS:
            known[reason].rows.append(int(row) + 1)


def repeated(keys: Sequence[str]) -> list[bool]:
    """Which of the keys equal an earlier one."""
    first = {key: row for row, key in reversed(list(enumerate(keys)))}
    return [first[key] != row for row, key in enumerate(keys)]


def report_table(reports: Sequence[SetReport], notes: Sequence[str] = ()) -> str:
    """The reports as an aligned table for the console, then a line for whatever was dropped or repeats."""
    header = ("set", "rows", "kept", "tokens", "trained", "longest", "truncated", "dropped")
    body = [
        (
            r.label,
            *(
                f"{value:,}"
                for value in (
                    r.rows,
                    r.kept,
                    r.tokens,
                    r.trained_tokens,
                    r.longest,
                    r.truncated,
                    sum(d.count for d in r.dropped),
                )
            ),
        )
        for r in reports
    ]
    widths = [max(len(row[column]) for row in (header, *body)) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *body)
    ]
    remarks = [f"{report.label}: {remark}" for report in reports for remark in remarks_on(report)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *remarks, *notes])


def remarks_on(report: SetReport) -> list[str]:
    """What the table's numbers do not say, one short phrase each."""
    remarks = list(report.notes)
    if report.held_out:
        remarks.append(f"{_rows(report.held_out)} held out as its reference set")
    if report.not_drawn:
        remarks.append(f"{_rows(report.not_drawn)} not drawn (data.max_examples)")
    remarks += [f"{dropped.count:,} dropped, {_reason(dropped)}" for dropped in report.dropped]
    remarks += [
        f"{found.count:,} of {_rows(report.kept)} cannot be scored: {_reason(found)}" for found in report.unscorable
    ]
    if report.copies_inside:
        remarks.append(f"{_rows(report.copies_inside)} repeating an earlier one")
    said = {dropped.reason for dropped in report.dropped}
    copies = {**report.copies_across, **report.copies_measured}
    remarks += [
        f"{_rows(count)} also in {label}" for label, count in copies.items() if f"also in {label}" not in said
    ]
    return remarks


def _rows(number: int) -> str:
    return f"{number:,} row" + ("s" if number != 1 else "")


def _reason(dropped: Dropped) -> str:
    more = ", ..." if dropped.count > len(dropped.rows) else ""
    return f"{dropped.reason} (row {', '.join(map(str, dropped.rows))}{more})"


@dataclass
class Run:
    """A stretch of an example's text that is trained, or is not."""

    trained: bool
    text: str


def decoded_runs(examples: ExampleSet, row: int, tokenizer: PreTrainedTokenizerBase) -> list[Run]:
    """An example's text, taken apart where its mask changes."""
    example = examples[row]
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    return [
        Run(trained, tokenizer.decode([token for token, _ in run]))  # type: ignore[arg-type]
        for trained, run in groupby(pairs, key=lambda pair: pair[1] != MASKED)
    ]


def show_example(
    examples: ExampleSet, row: int, tokenizer: PreTrainedTokenizerBase, longest: int = 600
) -> str:
    """An example with its mask as plain text: trained lines are marked `>`, the others `|`.

    Args:
        longest: characters of a run beyond which its middle is left out.
    """
    counts = f"{examples.lengths[row]} tokens, {examples.trained_tokens[row]} trained (marked >)"
    lines = [f"{examples.name}, example {row + 1} of {len(examples):,}: {counts}"]
    for run in decoded_runs(examples, row, tokenizer):
        mark = "  > " if run.trained else "  | "
        lines += [mark + line for line in shorten(run.text.removesuffix("\n"), longest).split("\n")]
    return "\n".join(lines)


def shorten(text: str, longest: int) -> str:
    """`text`, or its beginning and end with a word on how much is missing between."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"
