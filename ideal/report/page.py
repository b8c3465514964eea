"""report.html: what happened in a run, for a person, in one self-contained page."""

import base64
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from ideal.influence.matrix import NORMAL_95
from ideal.influence.result import NO_SOLUTION
from ideal.report import tables
from ideal.report.figures import draw_figures
from ideal.report.files import Json, RoundFiles, RunFiles, load_run, number, write_atomically
from ideal.report.tables import Table

# What a reader wants to know first (the page holds the whole configuration too); a group's name is all of it.
SETTINGS = (
    "model.name_or_path",
    "model.lora",
    "seed",
    "train.seed",
    "data.max_length",
    "data.max_examples",
    "train.num_train_epochs",
    "train.max_steps",
    "train.learning_rate",
    "train.lr_scheduler_type",
    "train.global_batch_size",
    "train.bf16",
    "mixing",
    "evaluation",
    "influence",
)


def render_report(folder: Path) -> Path:
    """Draws the figures and writes report.html for the run in `folder`, in whatever state it is.

    Returns the page's path. Files appear under their names only when they are complete.
    """
    run = load_run(folder)
    names = draw_figures(run)
    page = folder / "report.html"
    write_atomically(page, render_page(run, names).encode())
    return page


def render_page(run: RunFiles, figures: list[str]) -> str:
    """The page's HTML; `figures` are the names of those drawn, which are embedded as SVG."""
    best = run.best
    files = [("report.html", "this page"), *(f for f in tables.present_files(run) if f[0] != "report.html")]
    return template("page.html.jinja").render(
        title=str(run.setting("model.name_or_path") or run.folder.resolve().name),
        method=run.setting("mixing.method"),
        domains=run.domains,
        capabilities=run.capabilities,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        outcome=tables.outcome(run),
        caveats=tables.caveats(run),
        warnings=warnings(run),
        change=tables.change_table(run),
        best_number=best.number if best else None,
        best_losses=tables.best_table(run, best.number) if best else None,
        best_scores=tables.best_scores(run, best.number) if best else None,
        answers=tables.answers_table(run, best.number) if best else None,
        base_answers=tables.answers_table(run, None),
        reference_scores=tables.scores_table(run, "reference"),
        test_scores=tables.scores_table(run, "test"),
        measure=run.measure,
        benchmarks=tables.benchmarks_table(run),
        overview=tables.overview_table(run),
        reference_losses=tables.losses_table(run, "reference"),
        test_losses=tables.losses_table(run, "test"),
        ratios=tables.ratio_table(run, "ratio"),
        shares=tables.ratio_table(run, "share"),
        rounds=[_round(run, this) for this in run.rounds],
        data=tables.report_table(run.data_reports),
        settings=_settings(run),
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else "",
        phases=tables.phase_table(run),
        folder=str(run.folder.resolve()),
        files=Table("", ["file", "what it holds"], [list(f) for f in files]),
        interval=NORMAL_95,
        figures={name: embedded((run.folder / "figures" / f"{name}.svg").read_bytes()) for name in figures},
    )


def warnings(run: RunFiles) -> list[str]:
    """What the run warned about (state.json, logged events, the data report), and what its files show."""
    found = [str(text) for text in _as_list(run.state.get("warnings"))]
    for event in run.metrics:
        found += [str(text) for text in _as_list((event.get("values") or {}).get("warning"))]
    for report in run.data_reports:
        place = report.get("name", report.get("set"))
        found += [f"{place}: {text}" if place else str(text) for text in _as_list(report.get("warnings"))]
    for this in run.rounds:
        shares = [number(v) for v in (this.influence.get("first_position_share") or {}).values()]
        held = sum(share is not None and share > 0.5 for share in shares)
        if held:
            found.append(
                f"Round {this.number}: in {held} of {len(shares)} layers the first position alone holds more "
                "than half of the activations' second moment, so it sets the damping there."
            )
    found += [f"{name} cannot be read; what it holds is left out here." for name in run.unreadable]
    return list(dict.fromkeys(found))


def _round(run: RunFiles, this: RoundFiles) -> Json:
    """What the page shows of one round."""
    influence = this.influence
    free = tables.influence_table(run, this.number, "free")
    total = number(this.mixture.get("total_tokens"))
    return {
        "number": this.number,
        "tokens": None if total is None else tables.count(total),
        "stepped": bool(run.round(this.number + 1).mixture),
        "mixture": tables.mixture_table(run, this.number),
        "held": tables.held_in_words(this.mixture),
        "losses": tables.loss_table(run, this.number),
        "changes": tables.change_of_losses_table(run, this.number),
        "advice": tables.advice_of_round(run, this.number),
        "figure": f"influence_round_{this.number:02d}",
        "free": free,
        "errors": any("±" in cell for row in free.rows for cell in row),
        "fixed": tables.influence_table(run, this.number, "fixed"),
        "alpha": tables.alpha_table(run, this.number),
        "estimator": _estimator(influence),
        "used": _used(influence),
        "references": _references(influence),
        "seconds": _seconds(influence),
        "layers": _layers(influence),
    }


def _estimator(influence: Json) -> list[str]:
    """How the matrix was estimated, in sentences; what a run did not do or its files do not tell is left out."""
    found = []
    damping, sampling = number(influence.get("damping")), influence.get("sampling")
    if damping is not None:
        found.append(f"Relative damping {damping:g}.")
    if isinstance(sampling, str):
        found.append(f"Used: {sampling}.")
    dropped = _as_list(influence.get("dropped_layers"))
    if dropped:
        found.append(
            f"{len(dropped)} of {len(dropped) + len(influence.get('layers') or {})} layers were left out, those "
            f"whose eigenvalues vary most: {', '.join(map(str, dropped))}."
        )
    return found + _solver(influence.get("solver") or {})


def _solver(solver: Json) -> list[str]:
    """What conjugate gradients did, in one sentence; none for the direct solver."""
    iterations, residuals = number(solver.get("iterations")), _as_list(solver.get("residuals"))
    if iterations is None:
        return []
    last = [v for v in map(number, _as_list(residuals[-1] if residuals else None)) if v is not None]
    end = f"; relative residuals at the end {min(last):.1e} to {max(last):.1e} ({NO_SOLUTION})" if last else ""
    return [f"Solved jointly over all layers by conjugate gradients, {iterations:.0f} iterations{end}."]


def _used(influence: Json) -> Table:
    sequences, tokens = influence.get("sequences") or {}, influence.get("tokens") or {}
    kinds = ("factor_sequences", "of these for the covariances"), ("eigenvalue_sequences", "for the eigenvalues")
    parts = [(title, influence[key]) for key, title in kinds if influence.get(key)]
    header = ["used per domain", "sequences", "tokens", *(title for title, _ in parts)]
    rows = [
        [name, *map(tables.count, (found, tokens.get(name), *(part.get(name) for _, part in parts)))]
        for name, found in sequences.items()
    ]
    return Table("", header, rows)


def _references(influence: Json) -> Table:
    sequences, tokens = influence.get("reference_sequences") or {}, influence.get("reference_tokens") or {}
    rows = [[name, tables.count(found), tables.count(tokens.get(name))] for name, found in sequences.items()]
    return Table("", ["used per capability", "sequences", "tokens"], rows)


def _seconds(influence: Json) -> Table:
    spent = {name: number(value) for name, value in (influence.get("seconds") or {}).items()}
    rows = [[name, tables.duration(seconds)] for name, seconds in spent.items() if seconds is not None]
    return Table("", ["phase", "time"], rows)


def _layers(influence: Json) -> Table:
    """Per layer: its part of the matrix (Frobenius norm), and the first position's share of trace(A)."""
    parts, first = influence.get("layers") or {}, influence.get("first_position_share") or {}
    rows = []
    for name in dict.fromkeys([*parts, *first]):
        part = np.array(parts.get(name, np.nan), dtype=np.float64)
        norm = f"{np.linalg.norm(part):.2e}" if np.isfinite(part).all() else tables.MISSING
        rows.append([name, norm, tables.percent(first.get(name))])
    return Table("", ["layer", "size of its part of the matrix", "first position's share of trace(A)"], rows)


def _settings(run: RunFiles) -> Table:
    rows = []
    for key in SETTINGS:
        value = run.setting(key)
        entries = {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        rows += [[k, _scalar(v)] for k, v in entries.items() if v is not None and not isinstance(v, dict)]
    if run.domains:
        rows.insert(1 if rows else 0, ["domains", ", ".join(run.domains)])
    if run.capabilities:
        rows.insert(2 if len(rows) > 1 else 1, ["capabilities", ", ".join(run.capabilities)])
    state = {k: v for k, v in run.state.items() if isinstance(v, str | int | float)}
    rows += [[f"state: {k}", _scalar(v)] for k, v in state.items()]
    return Table("", ["setting", "value"], rows)


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def embedded(svg: bytes) -> str:
    """A figure as a page holds it."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def template(name: str) -> jinja2.Template:
    """A page's template."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(__file__).parent, Path(__file__).parents[1] / "compare"]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
