"""Loading: the configuration -> encoded pools, reference sets and test sets, and a report on each."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from ideal.data import formats
from ideal.data.config import NO_REFERENCE, CapabilityConfig, DataConfig, DomainConfig, Source
from ideal.data.encoding import MESSAGES, NO_ROOM, Encoder, ExampleSet, encode_conversations, example_set
from ideal.data.formats import (
    BrokenRow,
    DroppedRow,
    Format,
    Message,
    MissingValue,
    Row,
    choose_format,
    conversation,
    conversation_key,
)
from ideal.data.inspection import SetReport, count, repeated
from ideal.data.sources import Rows, data_files, files_for, progress_bars, read_rows
from ideal.data.tasks import ScoredSet, scorable
from ideal.distributed import main_first, together
from ideal.errors import UserError
from ideal.scoring.scorers import SCORERS
from ideal.seeding import generator

HELD_OUT_FRACTION = 0.1
HELD_OUT_MOST = 128
MANY_ROWS = 5000  # with fewer, a progress bar would only flash up
FEWEST_REFERENCES = 8  # with fewer, the noise of the mean hides any difference between domains

CONVERSATIONS = datasets.Features(
    {
        "messages": MESSAGES,
        "key": datasets.Value("string"),
        "row": datasets.Value("int64"),
        "fields": datasets.Value("string"),  # JSON of the scorer's columns: what they hold differs
        "dropped": datasets.Value("string"),
    }
)


@dataclass(frozen=True)
class Data:
    """Everything that is trained on and measured by."""

    pools: dict[str, ExampleSet]
    """Per domain, in the configuration's order."""
    references: dict[str, ExampleSet]
    """Per capability."""
    tests: dict[str, ExampleSet]
    """Per capability that has one."""
    weights: dict[str, float]
    """Per capability, sum 1."""
    domains: dict[str, DomainConfig]
    """The domains as configured, short forms written out."""
    served_by: dict[str, str]
    """Per capability without a domain of its own that names one: the domain that serves it."""
    reports: list[SetReport]
    """Pools, then reference sets, then test sets."""
    notes: list[str]
    """What else a user should know, about the chat template."""
    scored: list[ScoredSet]
    """Of every reference and test set whose capability has a scorer: what can be scored."""
    end_ids: list[int]
    """The tokens that end an answer."""

    @property
    def ratios(self) -> dict[str, float]:
        """Per domain, the start ratios."""
        return {name: domain.ratio for name, domain in self.domains.items()}


@dataclass
class Draft:
    """A set on its way: its conversations in the rows' order, and its report so far."""

    conversations: datasets.Dataset
    report: SetReport
    key: str
    """Where the configuration names it, for messages."""
    keys: list[str] = field(init=False)
    """Per row, equal exactly where the conversations are."""

    def __post_init__(self) -> None:
        self.keys = self.conversations["key"][:]

    def keep(self, wanted: np.ndarray) -> None:
        """Leaves only the rows where `wanted`, in their order."""
        if not wanted.all():
            self.conversations = self.conversations.select(np.flatnonzero(wanted))
            self.keys = self.conversations["key"][:]


def load_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> Data:
    """Reads, checks and encodes everything; rank 0 first, so that the others find its cache.

    A tokenizer without a chat template is given one (encoding.CHAT_TEMPLATE).

    Raises:
        UserError: on all ranks, one line that names the file and row or the key.
    """

    def load() -> Data:
        with main_first():
            return _load(config, tokenizer, seed)

    return together(load)


def _load(config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> Data:
    domains = resolve_domains(config)
    capabilities = resolve_capabilities(config, domains)
    encoder = Encoder(tokenizer, config.max_length)

    pools = {
        name: _draft("pool", name, domain.train, domain, f"data.domains.{name}.train")
        for name, domain in domains.items()
    }
    references, tests = {}, {}
    for name, capability in capabilities.items():
        key = f"data.domains.{name}" if name in domains else f"data.capabilities.{name}"
        if capability.reference is not None:
            references[name] = _draft("reference", name, capability.reference, capability, f"{key}.reference")
        if capability.test is not None:
            tests[name] = _draft("test", name, capability.test, capability, f"{key}.test")

    drafts, given = list(pools.values()), [*references.values(), *tests.values()]
    for draft, copies in zip(drafts, _copies(drafts, drafts), strict=True):
        draft.report.copies_across = copies
    for draft, copies in zip(given, _copies(given, given), strict=True):
        draft.report.copies_measured = copies
    _set_apart(drafts, given, config.drop_reference_copies)
    cuts = {name: _hold_out(pools[name], seed) for name in capabilities if name not in references}
    _set_apart(drafts, list(cuts.values()), config.drop_reference_copies)
    references = {name: references.get(name) or cuts[name] for name in capabilities}

    def encode(drafts: dict[str, Draft]) -> dict[str, ExampleSet]:
        return {name: _encode(draft, encoder, config.max_examples, seed) for name, draft in drafts.items()}

    measured, tested = encode(references), encode(tests)  # first, as they are small and can end the run
    for name, reference in references.items():
        _check_reference(reference, len(measured[name]))
    scored = [
        _scored_set(draft, scorer, encoder)
        for drafts in (references, tests)
        for name, draft in drafts.items()
        if (scorer := capabilities[name].scorer) is not None
    ]
    return Data(
        encode(pools),
        measured,
        tested,
        weights=_weights(capabilities),
        domains=domains,
        served_by={name: given.domain for name, given in config.capabilities.items() if given.domain is not None},
        reports=[draft.report for drafts in (pools, references, tests) for draft in drafts.values()],
        notes=encoder.notes,
        scored=scored,
        end_ids=encoder.end_ids,
    )


def resolve_domains(config: DataConfig) -> dict[str, DomainConfig]:
    """The domains with their short forms written out.

    Raises:
        UserError: fewer than two domains, or a folder without what is needed.
    """
    given = config.domains
    if given is None:
        raise UserError("data.domains: no domains given")
    if isinstance(given, str):
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise UserError(
                f"data.domains: there is no folder {given}; give a folder with a sub-folder per domain, or "
                "a mapping of names to sources"
            )
        given = {
            path.name: str(path)
            for path in sorted(folder.iterdir())
            if path.is_dir() and not path.name.startswith(".")
        }
    if len(given) < 2:
        names = f"only {', '.join(given)}" if given else "none"
        where = f" in the folder {config.domains}" if isinstance(config.domains, str) else ""
        raise UserError(f"data.domains: at least two domains are needed to mix, there is {names}{where}")
    return {
        name: _domain_at(name, domain) if isinstance(domain, str) else domain
        for name, domain in given.items()
    }


def _domain_at(name: str, path: str) -> DomainConfig:
    """The short form: a folder with train.*, reference.*, test.*; anything else is a source to train on."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return DomainConfig(train=path)
    if not files_for(folder, "train"):
        found = ", ".join(file.name for file in data_files(folder)[:5]) or "no data files"
        raise UserError(f"data.domains.{name}: the folder {path} holds no train.* (found: {found})")
    reference, test = (path if files_for(folder, role) else None for role in ("reference", "test"))
    return DomainConfig(train=path, reference=reference, test=test)


@dataclass(frozen=True)
class Capability:
    """What a domain or a capability says about how it is measured."""

    reference: Source | None
    """None: to be cut from the domain."""
    test: Source | None
    weight: float
    format: str | None
    columns: Mapping[str, str]
    scorer: str | None


def resolve_capabilities(config: DataConfig, domains: Mapping[str, DomainConfig]) -> dict[str, Capability]:
    """The domains' own capabilities, then the others.

    Raises:
        UserError: there is none, two have one name, one names a domain that is not there, or all weights are 0.
    """

    def capability(given: DomainConfig | CapabilityConfig) -> Capability:
        return Capability(given.reference, given.test, given.weight, given.format, given.columns, given.scorer)

    own = {name: capability(domain) for name, domain in domains.items() if domain.reference != NO_REFERENCE}
    for name, given in config.capabilities.items():
        if given.domain is not None and given.domain not in domains:
            raise UserError(
                f"data.capabilities.{name}.domain: there is no domain {given.domain!r}; there are {', '.join(domains)}"
            )
        if name in own:
            raise UserError(
                f"data.capabilities.{name}: the domain {name} has a capability of this name already; "
                f"rename one, or set data.domains.{name}.reference to none"
            )
    both = own | {name: capability(given) for name, given in config.capabilities.items()}
    if not both:
        raise UserError(
            "data.domains: no domain has a reference set, so nothing says what a good mixture is; give one"
        )
    if not sum(given.weight for given in both.values()):
        raise UserError("data.domains: the weights of all capabilities are 0; give one a weight")
    return both


def _weights(capabilities: Mapping[str, Capability]) -> dict[str, float]:
    total = sum(capability.weight for capability in capabilities.values())
    return {name: capability.weight / total for name, capability in capabilities.items()}


def _draft(kind: str, name: str, source: Source, given: DomainConfig | Capability, key: str) -> Draft:
    """Reads a source into conversations, each row's copy key beside it; counts what is dropped."""
    rows = read_rows(source, "train" if kind == "pool" else kind, key)
    present = rows.dataset.column_names
    of_scorer = SCORERS[given.scorer].fields if given.scorer else ()
    try:
        fmt, where = choose_format(
            present, given.format, {name: column for name, column in given.columns.items() if name not in of_scorer}
        )
        # A pool is scored only where a part of it is held out.
        scored = kind != "pool" or given.reference is None
        fields = locate_fields(present, of_scorer, given.columns) if scored else {}
    except UserError as error:
        raise UserError(f"{key}: {rows.source}: {error}") from error
    report = SetReport(kind, name, rows.source, format=fmt.name, rows=len(rows.dataset))
    used = {*where.values(), *fields.values()}
    report.ignored_columns = [column for column in present if column not in used]
    conversations = _convert(rows, fmt, where, fields, key, report.label)
    dropped = np.array(conversations["dropped"][:], dtype=object)
    bad = np.flatnonzero(dropped != "")
    report.drop(dropped[bad].tolist(), bad.tolist())
    draft = Draft(conversations.select_columns(["messages", "key", "row", "fields"]), report, key)
    draft.keep(dropped == "")
    _check_not_empty(draft, len(draft.keys))
    report.copies_inside = sum(repeated(draft.keys))
    return draft


def locate_fields(present: list[str], fields: tuple[str, ...], renamed: Mapping[str, str]) -> dict[str, str]:
    """The column of each of a scorer's fields that has one. Raises UserError where the user names one that is not
    there (without the source's name)."""
    for name in fields:
        if name in renamed and renamed[name] not in present:
            raise UserError(f"there is no column '{renamed[name]}' for '{name}'; its columns are {', '.join(present)}")
    return {name: renamed.get(name, name) for name in fields if renamed.get(name, name) in present}


def _convert(
    rows: Rows, fmt: Format, where: Mapping[str, str], fields: Mapping[str, str], key: str, label: str
) -> datasets.Dataset:
    """Rows -> CONVERSATIONS; a row that the format cannot read ends the run."""

    def convert(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
        columns: dict[str, list] = {"messages": [], "key": [], "row": numbers, "fields": [], "dropped": []}
        for index, number in enumerate(numbers):
            row = {name: batch[column][index] for name, column in where.items()}
            messages, reason = _conversation(rows, fmt, row, number, key)
            columns["messages"].append(messages)
            columns["key"].append(conversation_key(messages))
            columns["fields"].append(
                json.dumps({name: batch[column][index] for name, column in fields.items()}, default=str)
            )
            columns["dropped"].append(reason)
        return columns

    code = Path(formats.__file__).read_bytes()
    fingerprint = Hasher.hash(
        (
            "conversations", rows.dataset._fingerprint, fmt.name, sorted(where.items()), sorted(fields.items()),
            rows.from_json, code,
        )
    )
    try:
        with progress_bars(len(rows.dataset) >= MANY_ROWS):
            return rows.dataset.map(
                convert,
                batched=True,
                with_indices=True,
                features=CONVERSATIONS,
                remove_columns=rows.dataset.column_names,
                desc=f"Reading {label}",
                new_fingerprint=fingerprint,
            )
    except UnicodeDecodeError as error:  # the builders pass bytes on as they are
        rows.check_text(key)
        raise UserError(f"{key}: {rows.source} is not UTF-8 text ({error.reason})") from error


def _conversation(rows: Rows, fmt: Format, row: Row, number: int, key: str) -> tuple[list[Message], str]:
    """A row's conversation, or none and why."""
    try:
        return conversation(fmt, row), ""
    except DroppedRow as problem:
        return [], str(problem)
    except BrokenRow as problem:
        if isinstance(problem, MissingValue) and not rows.from_json:
            return [], str(problem)
        raise UserError(
            f"{key}: {rows.place(number)}: {problem} (format {fmt.name}); mend or remove the row"
        ) from problem


def _copies(drafts: list[Draft], others: list[Draft]) -> list[dict[str, int]]:
    """For each of the drafts, how many of its rows also stand in each other set, by label; zeros left out."""
    sets = {other.report.label: set(other.keys) for other in others}

    def count(draft: Draft) -> dict[str, int]:
        found = {label: sum(key in keys for key in draft.keys) for label, keys in sets.items()}
        return {label: number for label, number in found.items() if number and label != draft.report.label}

    return [count(draft) for draft in drafts]


def _set_apart(pools: list[Draft], measured: list[Draft], drop: bool) -> None:
    """Reports, and leaves out if told so, what of the pools also stands in a reference or test set."""
    where = {key: draft.report.label for draft in reversed(measured) for key in draft.keys}
    for pool, counts in zip(pools, _copies(pools, measured), strict=True):
        pool.report.copies_measured |= counts
        copies = np.array([key in where for key in pool.keys], dtype=bool)
        if drop and copies.any():
            rows = np.array(pool.conversations["row"][:])[copies]
            pool.report.drop([f"also in {where[key]}" for key in pool.keys if key in where], rows.tolist())
            pool.keep(~copies)
            _check_not_empty(pool, len(pool.keys))


def _hold_out(pool: Draft, seed: int) -> Draft:
    """Cuts a reference set from a pool: 10% of its rows, at most 128, none of them twice."""
    size = min(HELD_OUT_MOST, round(HELD_OUT_FRACTION * len(pool.keys)))
    firsts = np.flatnonzero(~np.array(repeated(pool.keys), dtype=bool))
    key = pool.key.removesuffix("train") + "reference"
    if min(size, len(firsts)) < FEWEST_REFERENCES:
        raise UserError(
            f"{key}: none is given, and {HELD_OUT_FRACTION:.0%} of the domain's {len(pool.keys)} examples "
            f"held out are too few to rank domains ({FEWEST_REFERENCES} needed); give a reference set, or "
            "`none` for no capability of its own"
        )
    drawn = generator(seed, pool.report.name, "held-out").permutation(firsts)[:size]
    chosen = np.isin(np.arange(len(pool.keys)), drawn)
    report = SetReport("reference", pool.report.name, pool.report.source, pool.report.format, rows=len(drawn))
    report.notes.append(
        f"held out of the domain, {len(drawn)} of {len(pool.keys):,} examples, as no reference set is given"
    )
    report.ignored_columns = pool.report.ignored_columns
    cut = Draft(pool.conversations.select(np.flatnonzero(chosen)), report, key)
    pool.report.held_out = len(drawn)
    pool.keep(~chosen)
    return cut


def _encode(draft: Draft, encoder: Encoder, most: int | None, seed: int) -> ExampleSet:
    """Draws `most` conversations, encodes them, and completes the report."""
    report = draft.report
    if most is not None and len(draft.keys) > most:
        drawn = generator(seed, report.kind, report.name, "max_examples").permutation(len(draft.keys))[:most]
        report.not_drawn = len(draft.keys) - most
        draft.keep(np.isin(np.arange(len(draft.keys)), drawn))
    with progress_bars(len(draft.keys) >= MANY_ROWS):
        encoded = encode_conversations(draft.conversations, encoder, report.label)
    reasons = np.array(encoded["dropped"][:], dtype=object)
    bad = np.flatnonzero(reasons != "")
    report.drop(reasons[bad].tolist(), np.array(encoded["row"][:])[bad].tolist())
    if len(bad) == len(reasons) and NO_ROOM in reasons:
        raise UserError(
            f"{draft.key}: with data.max_length = {encoder.max_length} every example of {report.source} is "
            "cut to nothing, since the prompts alone are longer; raise data.max_length"
        )
    _check_not_empty(draft, len(reasons) - len(bad))
    examples = example_set(encoded, report.label)
    report.kept = len(examples)
    report.tokens = int(examples.lengths.sum())
    report.trained_tokens = int(examples.trained_tokens.sum())
    report.longest = int(examples.lengths.max())
    report.truncated = int(np.array(encoded["truncated"][:])[reasons == ""].sum())
    draft.keep(reasons == "")
    return examples


def _scored_set(draft: Draft, scorer: str, encoder: Encoder) -> ScoredSet:
    """What of an encoded set can be scored; the rest is counted. Raises UserError where nothing can."""
    report = draft.report
    found = draft.conversations.select_columns(["row", "messages", "fields"])
    rows, left_out = scorable(scorer, ((r["row"], r["messages"], json.loads(r["fields"])) for r in found), encoder)
    report.scorer = scorer
    count(report.unscorable, [reason for reason, _ in left_out], [number for _, number in left_out])
    if not rows:
        reason, number = left_out[0]
        raise UserError(
            f"{draft.key}: no row of {report.source} can be scored by {scorer}: row {number + 1}: {reason}; "
            "mend the rows or leave the scorer out"
        )
    return ScoredSet(report.kind, report.name, scorer, rows)


def _check_not_empty(draft: Draft, left: int) -> None:
    if not left:
        reasons = "; ".join(f"{dropped.count} dropped, {dropped.reason}" for dropped in draft.report.dropped)
        raise UserError(
            f"{draft.key}: no usable example among the {draft.report.rows} rows of {draft.report.source} "
            f"({reasons})"
        )


def _check_reference(draft: Draft, left: int) -> None:
    if left < FEWEST_REFERENCES:
        raise UserError(
            f"{draft.key}: {left} usable examples in {draft.report.source} are too few to rank domains "
            f"({FEWEST_REFERENCES} needed); give more, or leave it out to hold some of the domain out"
        )
