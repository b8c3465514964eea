"""The numbers of a run as tables, for the console and for the page alike: pure functions on its files."""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from ideal.influence.matrix import NORMAL_95, Errors
from ideal.report.files import Json, RoundFiles, RunFiles, load_answers, number

WIDTH = 100
EXAMPLE = 300
"""Characters of a prompt or an answer that a page shows."""
MISSING = "-"
WEIGHTED = {"reference": "score", "test": "score_test"}
"""Where the weighted mean score of each kind of sets stands in evaluation.json."""
UNCERTAIN = " ?"
"""After a number whose 95% interval holds zero."""
DOUBT = f"zero lies within {NORMAL_95} standard errors, so the sign is uncertain"
SINGLE_SEED = (
    "These are differences within one run with one seed. Runs that differ in nothing but the seed differ "
    "too: a small change may be noise, and only repeats with other seeds can tell."
)


@dataclass(frozen=True)
class Table:
    """A table of formatted cells; the first column holds names."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def __bool__(self) -> bool:
        return bool(self.rows)


def as_text(table: Table, width: int = WIDTH) -> str:
    """The table as aligned plain text; names are shortened so that lines fit `width`, if that is enough."""
    cells = [table.header, *table.rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    others = sum(widths[1:]) + 2 * (len(widths) - 1)
    widths[0] = min(widths[0], max(width - others, 12))
    lines = [
        "  ".join(
            [shorten(row[0], widths[0]).ljust(widths[0])]
            + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in cells
    ]
    rule = "-" * max(map(len, lines))
    title = [table.title] if table.title else []
    return "\n".join([*title, lines[0], rule, *lines[1:]])


def shorten(name: str, length: int, mark: str = "..") -> str:
    """`name` on one line, in at most `length` characters; its middle goes: the ends tell names apart."""
    name = " ".join(name.split())
    if len(name) <= length:
        return name
    kept = length - len(mark)
    return name[: kept - kept // 2] + mark + name[len(name) - kept // 2 :]


def mixture_table(run: RunFiles, round_number: int, next_mixture: Json | None = None) -> Table:
    """One row per domain: what round `round_number` trained on, alpha, and what follows for the next round.

    `next_mixture` has the shape of mixture.json; without it the next round's own file is read, if it exists.
    """
    this = run.round(round_number)
    following = next_mixture or run.round(round_number + 1).mixture
    domains = this.mixture.get("domains", {})
    names, values = this.influence.get("domains", []), this.influence.get("alpha") or []
    alpha = dict(zip(names, values, strict=False))
    doubts = dict(zip(names, map(doubt, values, alpha_errors(this.influence).combined), strict=False))
    mark = max(map(len, doubts.values()), default=0)
    header = ["domain", "pool", "size", "ratio", "share"]
    header += ["alpha"] * bool(alpha) + ["beta", "next ratio"] * bool(following)
    rows = []
    for name, entry in domains.items():
        row = [name, count(entry.get("pool")), count(entry.get("size"))]
        row += [ratio(entry.get("ratio")), percent(entry.get("share"))]
        if alpha:
            row.append(scientific(alpha.get(name)) + doubts.get(name, "").ljust(mark))
        if following:
            then = following.get("domains", {}).get(name, {})
            row += [change(then.get("beta")), ratio(then.get("ratio"))]
        rows.append(row)
    if rows:
        sizes = [number(entry.get("size")) for entry in domains.values()]
        total = ["total", "", count(sum(s for s in sizes if s is not None)), "", ""]
        rows.append(total + [""] * (len(header) - len(total)))
    return Table("", header, rows)


def loss_table(run: RunFiles, round_number: int, against: int | None = None) -> Table:
    """One row per capability, then Q: the losses of the base model, an earlier round and this one.

    `against` is that earlier round's number, the round before by default.
    """
    this, base = run.round(round_number).evaluation, run.base
    earlier = round_number - 1 if against is None else against
    before = run.round(earlier).evaluation if earlier < round_number else {}
    header = ["mean loss per token", "base"]
    header += [f"round {earlier}"] * bool(before)
    header += [f"round {round_number}", "vs base"]
    header += [f"vs round {earlier}"] * bool(before)
    header += ["test: base", f"round {round_number}"] * run.has_tests

    def row(name: str, kind: str, test_kind: str, capability: str | None) -> list[str]:
        now, old, first = (_loss(e, kind, capability) for e in (this, before, base))
        cells = [name, loss(first)] + [loss(old)] * bool(before)
        cells += [loss(now), relative(first, now)] + [relative(old, now)] * bool(before)
        if run.has_tests:
            cells += [loss(_loss(base, test_kind, capability)), loss(_loss(this, test_kind, capability))]
        return cells

    rows = [row(name, "reference_loss", "test_loss", name) for name in this.get("reference_loss") or {}]
    if number(this.get("Q")) is not None:
        rows.append(row("Q (objective)", "Q", "Q_test", None))
    return Table("", header, rows)


def score_table(run: RunFiles, round_number: int, against: int | None = None) -> Table:
    """One row per capability with a scorer, then the weighted mean: the scores of the base model, an earlier round
    (`against`, the round before by default) and this one, each with its standard error over rows."""
    this, base = run.round(round_number).evaluation, run.base
    earlier = round_number - 1 if against is None else against
    before = run.round(earlier).evaluation if earlier < round_number else {}
    columns = [("base", base, "reference")] if base.get("reference_score") else []
    columns += [(f"round {earlier}", before, "reference")] if before.get("reference_score") else []
    columns += [(f"round {round_number}", this, "reference")]
    if this.get("test_score"):
        columns += [("test: base", base, "test")] if base.get("test_score") else []
        columns += [(f"round {round_number}", this, "test")]
    names = list(this.get("reference_score") or {})
    rows = [[name, *(score(e, kind, name) for _, e, kind in columns)] for name in names]
    if number(this.get("score")) is not None:
        rows.append(["score (weighted)", *(score(e, kind, None) for _, e, kind in columns)])
    return Table("", ["score, 0 to 1", *(name for name, _, _ in columns)], rows)


def best_scores(run: RunFiles, best: int) -> Table:
    """The best round's scores, beside the start's where one led to the other."""
    return score_table(run, best, against=0 if run.method.successive else best)


def scores_table(run: RunFiles, kind: str) -> Table:
    """One row per capability with a scorer, then the weighted mean; one column per model that was scored: `kind` is
    "reference" or "test"."""
    columns = [("base", run.base), *((f"round {r.number}", r.evaluation) for r in run.rounds)]
    columns = [(name, e) for name, e in columns if e.get(f"{kind}_score")]
    names = list(dict.fromkeys(name for _, e in columns for name in e[f"{kind}_score"]))
    rows = [[name, *(score(e, kind, name) for _, e in columns)] for name in names]
    key = WEIGHTED[kind]
    if any(number(e.get(key)) is not None for _, e in columns):
        rows.append(["weighted", *(score(e, kind, None) for _, e in columns)])
    return Table("", [f"{kind} score", *(name for name, _ in columns)], rows)


def answers_table(run: RunFiles, round_number: int | None) -> Table:
    """A few answers of one round (None: the base model): of each capability the first two that are right and the
    first two that are not, of its test set where it has one."""
    lines, rows = load_answers(run, round_number), []
    for name in dict.fromkeys(line["capability"] for line in lines):
        own = [line for line in lines if line["capability"] == name]
        shown = [line for line in own if line["set"] == "test"] or own
        for right in (True, False):
            for line in [line for line in shown if (line["score"] == 1) == right][:2]:
                texts = [shorten(str(line[key]), EXAMPLE) for key in ("prompt", "answer", "expected", "detail")]
                rows.append([f"{name}, {line['set']} row {line['row']}", f"{line['score']:g}", *texts])
    return Table("", ["row", "score", "prompt", "answer", "expected", "found"], rows)


def change_of_losses_table(run: RunFiles, round_number: int) -> Table:
    """One row per capability, then Q and another objective: predicted and observed changes since the round before.

    Empty for a round that no prediction led to.
    """
    found = run.round(round_number).change
    kinds = [kind for kind in ("unscaled", "predicted", "observed") if kind in found]
    names = list((found.get("observed") or {}).get("reference_loss") or {})
    cells = [[name, *(signed(found[kind]["reference_loss"].get(name)) for kind in kinds)] for name in names]
    for key in ("Q", "objective"):
        cells += [[key, *(signed(found[kind].get(key)) for kind in kinds)]] * (key in found.get("observed", {}))
    return Table("", [f"change of loss since round {found.get('from_round')}", *kinds], cells)


def held_in_words(mixture: Json) -> str:
    """Which domains have come to a limit, and to which; empty where none has."""
    held = mixture.get("held") or {}
    return "At a limit: " + ", ".join(f"{name} ({key})" for name, key in held.items()) if held else ""


def best_table(run: RunFiles, best: int) -> Table:
    """The best round's losses, beside the start's where one led to the other."""
    return loss_table(run, best, against=0 if run.method.successive else best)


def overview_table(run: RunFiles) -> Table:
    """One row per round, the base model first: trained tokens, Q and its change against round 0."""
    against = "vs start" if run.method.successive else "vs round 0"
    header = ["round", "trained tokens", "Q", against] + ["Q (test)", against] * run.has_tests
    start, best = run.round(0).evaluation, run.best
    keys = ["Q", *["Q_test"] * run.has_tests]
    if "objective" in start:
        header, keys = [*header, "objective", against], [*keys, "objective"]

    def row(name: str, tokens: Any, evaluation: Json) -> list[str]:
        cells = [name, count(tokens)]
        for key in keys:
            value = number(evaluation.get(key))
            known = evaluation is not start and evaluation is not run.base
            cells += [loss(value), relative(number(start.get(key)), value) if known else ""]
        return cells

    rows = [row("base model", None, run.base)] if run.base else []
    for this in run.rounds:
        note = " (start)" if this.number == 0 and run.method.successive else ""
        if best is not None and this.number == best.number and len(run.evaluated) > 1:
            note += " (best)"
        rows.append(row(f"round {this.number}{note}", this.mixture.get("total_tokens"), this.evaluation))
    return Table("", header, rows)


def ratio_table(run: RunFiles, key: str) -> Table:
    """One row per domain, one column per round: `key` is "ratio" or "share"."""
    show = {"ratio": ratio, "share": percent}[key]
    rounds = [r for r in run.rounds if r.mixture]
    names = run.domains if rounds else []
    cells = [[show(r.mixture.get("domains", {}).get(name, {}).get(key)) for r in rounds] for name in names]
    rows = [[name, *row] for name, row in zip(names, cells, strict=True)]
    return Table("", [key, *(f"round {r.number}" for r in rounds)], rows)


def losses_table(run: RunFiles, kind: str) -> Table:
    """One row per capability, then Q; one column per model: `kind` is "reference" or "test"."""
    columns = [("base", run.base)] if run.base else []
    columns += [(f"round {r.number}", r.evaluation) for r in run.rounds if r.evaluation]
    rows = []
    for name in run.capabilities:
        values = [_loss(e, f"{kind}_loss", name) for _, e in columns]
        if any(v is not None for v in values):
            rows.append([name, *map(loss, values)])
    if rows:
        key = "Q" if kind == "reference" else "Q_test"
        rows.append(["Q", *(loss(e.get(key)) for _, e in columns)])
    return Table("", [f"{kind} loss", *(name for name, _ in columns)], rows)


def benchmarks_table(run: RunFiles) -> Table:
    """One row per public benchmark that the result was evaluated on: its score, which number that is, its rows."""
    rows = []
    for task, found in run.benchmarks.items():
        settings = found.get("settings") or {}
        prompt = "chat template" if settings.get("chat_template") else "plain"
        part = f" (the first {settings['limit']} of each task)" if settings.get("limit") else ""
        spread = "" if number(found.get("error")) is None else f" ± {found['error']:.4f}"
        score, rows_used = loss(found.get("score")) + spread, count(found.get("rows")) + part
        rows.append([task, score, str(found.get("metric", MISSING)), rows_used, prompt])
    return Table("", ["benchmark", "score", "which is", "rows", "prompt"], rows)


def change_table(run: RunFiles) -> Table:
    """One row per domain: ratio, size and share at the start and in the best round, where one led to the other."""
    best = run.best
    if best is None or best.number == 0 or not run.method.successive:
        return Table("", [], [])
    first, last = (r.mixture.get("domains", {}) for r in (run.round(0), best))
    header = ["domain", "ratio: start", "best", "change", "size: start", "best", "share: start", "best"]
    rows = []
    for name in run.domains:
        old, new = first.get(name, {}), last.get(name, {})
        row = [name, ratio(old.get("ratio")), ratio(new.get("ratio"))]
        row += [relative(number(old.get("ratio")), number(new.get("ratio")))]
        row += [count(old.get("size")), count(new.get("size"))]
        rows.append([*row, percent(old.get("share")), percent(new.get("share"))])
    return Table("", header, rows)


def influence_table(run: RunFiles, round_number: int, form: str) -> Table:
    """The influence matrix in its `form`, "free" or "fixed": capabilities, then the objective, by domains.

    Entries carry their standard errors, where they were estimated: of the training sequences, then of the reference
    rows (of both together in files that do not tell them apart); an uncertain sign is marked.
    """
    influence = run.round(round_number).influence
    matrix = influence_matrix(influence, form)
    if matrix is None:
        return Table("", [], [])
    errors = influence_errors(influence, form)
    rows = [
        [name, *map(with_errors, values, *spread)]
        for name, values, *spread in zip(influence["capabilities"], matrix, *errors, strict=True)
    ]
    objective = influence_objective(run, round_number, form)
    if objective is not None:
        rows.append(["objective", *map(with_errors, objective, *objective_errors(influence, form))])
    return Table("", ["capability", *influence["domains"]], rows)


def alpha_table(run: RunFiles, round_number: int) -> Table:
    """One row per domain: alpha as the step used it, its standard error by source, and whether its sign is known.

    Empty where no error was estimated.
    """
    influence = run.round(round_number).influence
    names, errors = influence.get("domains", []), alpha_errors(influence)
    alpha = _array(influence.get("alpha"), (len(names),))
    if alpha is None or not np.isfinite(errors).any():
        return Table("", [], [])
    header = ["domain", "alpha", "± training sequences", "± reference rows", "± together", "sign"]
    rows = []
    for name, value, *known in zip(names, alpha, *errors, errors.combined, strict=True):
        certain = MISSING if not np.isfinite(known[-1]) else "uncertain" if doubt(value, known[-1]) else "certain"
        rows.append([name, scientific(value), *map(plain, known), certain])
    return Table("", header, rows)


def influence_matrix(influence: Json, form: str) -> np.ndarray | None:
    """M [R, n] of one round in its "free" or "fixed" form; None if it is not there or not whole."""
    shape = (len(influence.get("capabilities", [])), len(influence.get("domains", [])))
    return _array(influence.get("matrix" if form == "free" else "matrix_fixed"), shape)


def influence_objective(run: RunFiles, round_number: int, form: str) -> np.ndarray | None:
    """dQ/dbeta [n] in its "free" or "fixed" form; None where the files do not tell."""
    this = run.round(round_number)
    domains = this.influence.get("domains", [])
    if form == ("fixed" if run.fixed_budget else "free"):
        return _array(this.influence.get("alpha"), (len(domains),))
    free = _array([this.free_objective.get(name) for name in domains], (len(domains),))
    if form == "free":
        return free
    shares = _array(this.influence.get("shares"), (len(domains),))
    return None if free is None or shares is None else free - shares * free.sum()


def influence_errors(influence: Json, form: str) -> tuple[np.ndarray, ...]:
    """Standard errors [R, n] of M in its "free" or "fixed" form, by source; nan where the file has none.

    Of both sources together, in one array, where the file is from before they were told apart.
    """
    shape = (len(influence.get("capabilities", [])), len(influence.get("domains", [])))
    found = influence.get("standard_errors")
    if isinstance(found, list):
        old = _array(found, shape) if form == "free" else None
        return (np.full(shape, np.nan) if old is None else old,)
    return _errors(influence, "matrix" if form == "free" else "matrix_fixed", shape)


def objective_errors(influence: Json, form: str) -> Errors:
    """Standard errors [n] of dQ/dbeta in its "free" or "fixed" form, by source; nan where the file has none."""
    return _errors(influence, f"objective_{form}", (len(influence.get("domains", [])),))


def alpha_errors(influence: Json) -> Errors:
    """Standard errors [n] of alpha as the step used it, by source; nan where the file has none."""
    return _errors(influence, "alpha", (len(influence.get("domains", [])),))


def _errors(influence: Json, name: str, shape: tuple[int, ...]) -> Errors:
    found = influence.get("standard_errors")
    entry = found.get(name) if isinstance(found, dict) else None
    columns = [_array(entry.get(source), shape) if isinstance(entry, dict) else None for source in Errors._fields]
    return Errors(*(np.full(shape, np.nan) if column is None else column for column in columns))


def phase_table(run: RunFiles) -> Table:
    """How long each phase took by the logged events: their own `seconds`, else from first to last event."""
    phases: dict[tuple[str, str], list[Json]] = {}
    for event in run.metrics:
        if event.get("phase"):
            place = event.get("round")
            name = MISSING if place is None else str(place)
            phases.setdefault((name, str(event["phase"])), []).append(event)
    rows = []
    for (name, phase), events in phases.items():
        spent = [number((e.get("values") or {}).get("seconds")) for e in events]
        times = [t for e in events if (t := _timestamp(e.get("time"))) is not None]
        stated = [s for s in spent if s is not None]
        seconds = sum(stated) if stated else (max(times) - min(times) if len(times) > 1 else None)
        if seconds is not None:
            rows.append([phase, name, duration(seconds)])
    return Table("", ["phase", "round", "time"], rows)


def report_table(reports: list[Json]) -> Table:
    """The data report: one row per set, one column per scalar that any set reports."""
    scalars = [{k: v for k, v in r.items() if v is None or isinstance(v, str | int | float)} for r in reports]
    keys = list(dict.fromkeys(key for row in scalars for key in row))
    # The set's name leads, whatever the report calls it.
    keys.sort(key=lambda key: key not in ("name", "set"))
    rows = [[_cell(row.get(key)) for key in keys] for row in scalars]
    return Table("", [key.replace("_", " ") for key in keys], rows if keys else [])


def round_table(run: RunFiles, round_number: int, next_mixture: Json | None = None) -> str:
    """What one round did, as text for the console: its mixture, the step that follows, and its losses.

    `next_mixture` (shaped like mixture.json) is the step's result, before the next round has its own file.
    """
    parts = [f"Round {round_number}" + _tokens(run.round(round_number).mixture)]
    mixture, losses = mixture_table(run, round_number, next_mixture), loss_table(run, round_number)
    if mixture:
        doubtful = any(cell.endswith(UNCERTAIN) for row in mixture.rows for cell in row[1:])
        held = held_in_words(next_mixture or run.round(round_number).mixture)
        notes = [f"{UNCERTAIN.strip()}: {DOUBT}"] * doubtful
        notes += [f"Next mixture: {held}" if next_mixture else held] * bool(held)
        parts.append("\n".join([as_text(mixture), *notes]))
    scores, changes = score_table(run, round_number), change_of_losses_table(run, round_number)
    parts += [as_text(table) for table in (losses, scores, changes) if table]
    if len(parts) == 1:
        parts.append("nothing recorded yet")
    best = run.best
    if best is not None and best.number == round_number and len(run.evaluated) > 1:
        parts.append(f"The best round so far, by {run.measure}.")
    advice = advice_of_round(run, round_number)
    if advice:
        parts.append(textwrap.fill(advice, WIDTH))
    return "\n\n".join(parts)


def advice_of_round(run: RunFiles, round_number: int) -> str:
    """Whether the run after this one is worth its cost, as a sentence; empty where the method does not say."""
    advice = run.round(round_number).step.get("advice")
    return f"Outlook: {advice}." if advice else ""


def final_summary(run: RunFiles) -> str:
    """What changed over the run and where its files are, as text for the console."""
    parts = ["\n".join(textwrap.fill(line, WIDTH, subsequent_indent="    ") for line in outcome(run))]
    change_of_mixture = change_table(run)
    if change_of_mixture:
        parts.append(as_text(change_of_mixture))
    if run.best is not None:
        parts.append(as_text(best_table(run, run.best.number)))
        scores = best_scores(run, run.best.number)
        parts += [as_text(scores)] * bool(scores)
    parts += [textwrap.fill(sentence, WIDTH) for sentence in caveats(run)]
    files = [[name, what] for name, what in present_files(run)]
    if files:
        width = max(len(name) for name, _ in files)
        lines = [f"  {name.ljust(width)}  {what}" for name, what in files]
        parts.append("\n".join([f"Files in {run.folder}:", *lines]))
    return "\n\n".join(parts)


def outcome(run: RunFiles) -> list[str]:
    """The result in a few plain sentences, the most important first."""
    best, start = run.best, run.round(0)
    if best is None:
        of = " whose model may be the result" if run.evaluated else ""
        return [f"No round{of} has been evaluated yet."]
    last = run.evaluated[-1].number
    if not run.method.successive:
        lines = tries_in_words(run, best)
    elif len(run.evaluated) == 1:
        lines = ["One round was evaluated: there is nothing to compare the start's mixture with yet."]
    elif best.number == 0:
        lines = [f"The start's mixture (round 0) is kept of rounds 0 to {last}: no step improved it, by {run.measure}."]
    else:
        lines = [f"Best round: {best.number} of rounds 0 to {last}, by {run.measure}."]
    names = {"Q": "Q on the reference sets", "Q_test": "Q on the test sets (not used for choosing)"}
    names |= {"score": "Score on the reference sets", "score_test": "Score on the test sets (not used for choosing)"}
    for key, name in names.items():
        values = [("base model", run.base.get(key))]
        values += [("start", start.evaluation.get(key))] if run.method.successive else []
        values += [("best", best.evaluation.get(key))] if best.number or not run.method.successive else []
        known = [(label, v) for label, value in values if (v := number(value)) is not None]
        if not known:
            continue
        text = " -> ".join(f"{label} {loss(v)}" for label, v in known)
        if best.number and len(known) > 1 and known[-1][0] == "best" and known[-2][0] == "start":
            text += f" ({relative(known[-2][1], known[-1][1])} against the start)"
        lines.append(f"{name}: {text}")
    tokens = [number(r.mixture.get("total_tokens")) for r in (start, best)]
    if best.number and None not in tokens and run.method.successive:
        pair = f"{count(tokens[0])} -> {count(tokens[1])}"
        lines.append(f"Trained tokens in the mixture: {pair} ({relative(tokens[0], tokens[1])})")
    if run.state.get("advice"):
        lines.append(f"Outlook: {run.state['advice']} (more rounds: a larger mixing.rounds goes on from here).")
    return lines


def tries_in_words(run: RunFiles, best: RoundFiles) -> list[str]:
    """The best of rounds that stand beside each other, and their mean: the best of several is flattered by chance."""
    number_of = len(run.results)
    if number_of == 1:
        return [f"Result: round {best.number}."]
    lines = [f"Best of {number_of} results: round {best.number}, by {run.measure}."]
    for key, name in {"Q": "reference", "Q_test": "test"}.items():
        values = [number(r.evaluation.get(key)) for r in run.results]
        known = [value for value in values if value is not None]
        if len(known) == number_of:
            spread = f"{loss(min(known))} to {loss(max(known))}"
            lines.append(f"Mean Q of all {number_of} on the {name} sets: {loss(float(np.mean(known)))} ({spread})")
    return lines


def caveats(run: RunFiles) -> list[str]:
    """What a reader must know before relying on the outcome."""
    best, sentences = run.best, []
    if run.state.get("finished") is False:
        sentences.append("The run has not finished: all of this is what is known so far.")
    if best is not None and best.number:
        old, new = (number(r.mixture.get("total_tokens")) for r in (run.round(0), best))
        if not run.fixed_budget and old is not None and new is not None:
            sentences.append(
                f"The budget was free and the total of trained tokens changed by {relative(old, new)}: part "
                "of a gain may be volume and not proportion. The start's mixture scaled to the same total is "
                "the comparison that tells them apart."
            )
        sentences.append(SINGLE_SEED)
    return sentences


def present_files(run: RunFiles) -> list[tuple[str, str]]:
    """The files and folders of the run that exist, with what they hold."""
    known = {
        "report.html": "this run for a person, in one page",
        "mixture.json": "the best round's mixture, valid as --mixing.ratios",
        "model": "the best round's model, for from_pretrained",
        "export": "the final mixture as JSONL, and for other trainers",
        "figures": "the figures, as PNG and SVG",
        "config.yaml": "the resolved configuration",
        "metrics.jsonl": "every logged event",
        "benchmarks.json": "the result's scores on public benchmarks",
    }
    found = [(name, what) for name, what in known.items() if (run.folder / name).exists()]
    if run.rounds:
        found.append(("round_*", "per round: mixture, losses, influence matrix" + ", answers" * run.has_scores))
    return found


def count(value: Any) -> str:
    """A whole number with separators between thousands."""
    found = number(value)
    return MISSING if found is None else f"{found:,.0f}"


def ratio(value: Any) -> str:
    """A ratio with three decimals."""
    found = number(value)
    return MISSING if found is None else f"{found:.3f}"


def loss(value: Any) -> str:
    """A loss with four decimals."""
    found = number(value)
    return MISSING if found is None else f"{found:.4f}"


def score(evaluation: Json, kind: str, capability: str | None) -> str:
    """A score and its standard error over rows; without a capability the weighted mean's (of `kind` sets)."""
    if capability is None:
        return loss(evaluation.get(WEIGHTED[kind]))
    found, error = (number((evaluation.get(f"{kind}_{key}") or {}).get(capability)) for key in ("score", "score_error"))
    if found is None:
        return MISSING
    return f"{found:.3f}" + ("" if error is None else f" ± {error:.3f}")


def signed(value: Any) -> str:
    """A difference of losses with its sign and four decimals."""
    found = number(value)
    return MISSING if found is None else f"{found:+.4f}"


def percent(value: Any) -> str:
    """A part of one, in percent."""
    found = number(value)
    return MISSING if found is None else f"{100 * found:.1f}%"


def change(value: Any) -> str:
    """A relative change (0.1: 10% more), in percent with its sign."""
    found = number(value)
    return MISSING if found is None else f"{100 * found:+.1f}%"


def relative(old: float | None, new: float | None) -> str:
    """The relative change from `old` to `new`."""
    return MISSING if not old or new is None else change(new / old - 1)


def scientific(value: Any) -> str:
    """A number of any size with its sign and three digits."""
    found = number(value)
    return MISSING if found is None else f"{found:+.2e}"


def plain(value: Any) -> str:
    """A number of any size with two digits, a standard error for example."""
    found = number(value)
    return MISSING if found is None else f"{found:.1e}"


def with_errors(value: Any, *errors: Any) -> str:
    """A number with its independent standard errors, if any is known, and a mark if they leave its sign open."""
    if all(number(error) is None for error in errors):
        return scientific(value)
    return " ± ".join([scientific(value), *map(plain, errors)]) + doubt(value, np.linalg.norm(errors))


def doubt(value: Any, error: Any) -> str:
    """The mark of an uncertain sign, where the 95% interval around `value` is known and holds zero."""
    found, known = number(value), number(error)
    if found is None or known is None:
        return ""
    return UNCERTAIN if abs(found) <= NORMAL_95 * known else ""


def duration(seconds: float) -> str:
    """A duration for a person."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _loss(evaluation: Mapping[str, Any], kind: str, capability: str | None) -> float | None:
    value = evaluation.get(kind)
    return number(value if capability is None else (value or {}).get(capability))


def _array(values: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return array if array.shape == shape and array.size else None


def _timestamp(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value).timestamp()
        except ValueError:
            return None
    return number(value)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    return MISSING if value is None else f"{value:.4g}" if isinstance(value, float) else value


def _tokens(mixture: Json) -> str:
    total = number(mixture.get("total_tokens"))
    return "" if total is None else f": {count(total)} trained tokens in the mixture"
