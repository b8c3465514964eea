"""The report reads a run in any state, shows its numbers, and lets no name break out of its text."""

import csv
import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from ideal.report import final_summary, load_run, render_report, round_table, tables
from ideal.report.figures import influence_figure, ratios_figure
from ideal.report.tables import WIDTH, alpha_table, as_text, duration, influence_table, overview_table, shorten

FIVE = ["math", "coding", "reasoning", "instruction", "trust"]
NASTY = '<b>&"$x$'
SOURCES = {"training": 3, "reference": 4}
"""Where errors come from, and their relative sizes in made-up runs."""


def write_run(
    folder: Path,
    domains: list[str],
    capabilities: list[str],
    rounds: int,
    *,
    budget: str = "free",
    tests: bool = True,
    influence: bool = True,
    scale: float = 0.01,
) -> Path:
    """A run's folder as the loop leaves it, with made-up numbers; every round lowers Q."""
    random = np.random.default_rng(0)
    pool = random.integers(500, 5000, len(domains))
    ratios = np.ones(len(domains))
    beta = np.zeros(len(domains))

    def evaluation(factor: float) -> dict[str, Any]:
        reference = {name: factor * (2 + 0.1 * i) for i, name in enumerate(capabilities)}
        test = {name: 1.03 * value for name, value in reference.items()} if tests else {}
        q_test = float(np.mean(list(test.values()))) if tests else None
        q = float(np.mean(list(reference.values())))
        return {"reference_loss": reference, "test_loss": test, "Q": q, "Q_test": q_test}

    config = {
        "model": {"name_or_path": "some/model"},
        "train": {"learning_rate": 2e-5, "seed": 42},
        "mixing": {"budget": budget, "rounds": rounds - 1, "method": "ideal"},
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    write(folder / "base" / "evaluation.json", evaluation(1.0))
    events = []
    for index in range(rounds):
        this = folder / f"round_{index:02d}"
        tokens = pool * ratios * 50
        shares = tokens / tokens.sum()
        columns = zip(domains, pool.tolist(), ratios.tolist(), shares.tolist(), beta.tolist(), strict=True)
        entries = {
            name: {"pool": p, "size": round(p * r), "ratio": r, "share": s, "beta": b} for name, p, r, s, b in columns
        }
        mixture = {"round": index, "total_tokens": int(tokens.sum()), "domains": entries}
        write(this / "mixture.json", mixture)
        write(this / "evaluation.json", evaluation(0.5 * 0.97**index))
        matrix = scale * random.normal(size=(len(capabilities), len(domains)))
        fixed = matrix - shares * matrix.sum(1, keepdims=True)
        alpha = (fixed if budget == "fixed" else matrix).mean(0)
        beta = -0.15 * alpha / np.abs(alpha).max()
        if influence and index < rounds - 1:
            names = {"domains": domains, "capabilities": capabilities}
            forms = {"matrix": matrix, "matrix_fixed": fixed, "objective_free": matrix.mean(0)}
            forms |= {"objective_fixed": fixed.mean(0), "alpha": alpha}
            # 3 : 4 : 5, so that both together are half of the value, or nine tenths for the last domain.
            part = np.where(np.arange(len(domains)) == len(domains) - 1, 0.18, 0.1)
            errors = {
                name: {source: (times * part * np.abs(values)).tolist() for source, times in SOURCES.items()}
                for name, values in forms.items()
            }
            numbers = {
                "matrix": matrix.tolist(),
                "matrix_fixed": fixed.tolist(),
                "alpha": alpha.tolist(),
                "standard_errors": errors,
                "shares": shares.tolist(),
                "layers": {"layers.0.mlp.down_proj": matrix.tolist()},
                "first_position_share": {"layers.0.mlp.down_proj": 0.9},
                "sequences": dict.fromkeys(domains, 100),
                "factor_sequences": dict.fromkeys(domains, 37),
                "eigenvalue_sequences": dict.fromkeys(domains, 53),
                "tokens": dict.fromkeys(domains, 4321),
                "reference_sequences": dict.fromkeys(capabilities, 64),
                "reference_tokens": dict.fromkeys(capabilities, 2345),
                "dropped_layers": ["layers.1.mlp.down_proj"],
                "solver": {"iterations": 2, "residuals": [[0.5, 0.25], [0.03, 0.002]]},
                "damping": 0.1,
                "sampling": "500 sequences, added until it was enough",
                "seconds": {"covariances": 12.3},
            }
            write(this / "influence.json", {**names, **numbers})
            with (this / "influence.csv").open("w", newline="") as file:
                lines = csv.writer(file)
                lines.writerow(["capability", *domains])
                lines.writerows([name, *row] for name, row in zip(capabilities, matrix.tolist(), strict=True))
                lines.writerow(["objective", *matrix.mean(0).tolist()])
        events.append({"time": 1e9, "round": index, "phase": "train", "step": 9, "values": {"seconds": 75.0}})
        ratios = ratios * (1 + beta)
    write(folder / "mixture.json", mixture)
    write(folder / "state.json", {"finished": True})
    write(folder / "data.json", [{"name": n, "rows": 12345, "first_reasons": ["empty"]} for n in domains])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events) + '{"time": 1')
    return folder


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _nulls(values: Any) -> Any:
    return [_nulls(value) for value in values] if isinstance(values, list) else None


class Page(HTMLParser):
    """The page's text, tags, and everything that points somewhere."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "data")]
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())
            if self.rows:
                self.rows[-1].append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def assert_png(path: Path) -> None:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width > 500 and height > 300
    # An empty canvas of this size compresses to a few kilobytes.
    assert len(content) > 10_000


def test_a_whole_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", FIVE, [*FIVE, "summaries"], 3)
    page = Page(render_report(folder).read_text())
    run = load_run(folder)
    for kind in ("reference_loss", "test_loss"):
        for evaluation in [run.base, *(r.evaluation for r in run.rounds)]:
            for value in evaluation[kind].values():
                assert f"{value:.4f}" in page.text
    for this in run.rounds:
        assert f"{this.mixture['total_tokens']:,}" in page.text
        for name, entry in this.mixture["domains"].items():
            expected = [name, f"{entry['pool']:,}", f"{entry['size']:,}", f"{entry['ratio']:.3f}"]
            assert any(row[:4] == expected for row in page.rows)
        for key in ("matrix", "matrix_fixed"):
            for value in np.ravel(this.influence.get(key, [])):
                assert f"{value:+.2e}" in page.text
    assert "Best round: 2" in page.text and "one seed" in page.text and "volume" in page.text
    assert "1 min 15 s" in page.text  # the training phase's own seconds
    assert "the first position alone" in page.text and "12,345" in page.text
    names = ["ratios", "losses", "influence_round_00", "influence_round_01"]
    for name in names:
        assert_png(folder / "figures" / f"{name}.png")
    assert page.tags.count("img") == len(names)
    assert not list(folder.rglob("*.tmp"))


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    html = render_report(write_run(tmp_path / "run", FIVE, FIVE, 2)).read_text()
    page = Page(html)
    assert page.links and all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"@import|url\(|https?://", html)


def test_names_are_escaped(tmp_path: Path) -> None:
    names = [f"a{NASTY}", f"_{NASTY}", "objective", "{{ 1 + 1 }}"]
    page = Page(render_report(write_run(tmp_path / "run", names, names, 2)).read_text())
    assert page.tags.count("b") == 1  # the template's own
    assert all(name in page.text for name in names)


@pytest.mark.parametrize("budget", ["free", "fixed"])
def test_both_forms_have_their_objective(tmp_path: Path, budget: str) -> None:
    run = load_run(write_run(tmp_path / "run", FIVE, FIVE, 2, budget=budget))
    influence = run.round(0).influence
    for form, key in [("free", "matrix"), ("fixed", "matrix_fixed")]:
        *rows, objective = influence_table(run, 0, form).rows
        assert [row[0] for row in rows] == FIVE
        values = np.mean(influence[key], axis=0)
        assert [cell.split(" ± ")[0] for cell in objective] == ["objective", *(f"{v:+.2e}" for v in values)]


@pytest.mark.parametrize("budget", ["free", "fixed"])
def test_errors_by_source_and_uncertain_signs(tmp_path: Path, budget: str) -> None:
    """Errors are half of each value, so that signs are certain, but for the last domain's."""
    folder = write_run(tmp_path / "run", FIVE, FIVE, 2, budget=budget)
    run = load_run(folder)
    influence = run.round(0).influence
    for form, key in [("free", "matrix"), ("fixed", "matrix_fixed")]:
        *rows, objective = influence_table(run, 0, form).rows
        for cells, values in zip(rows, influence[key], strict=True):
            for number, part, mark in [(0, 0.1, ""), (4, 0.18, " ?")]:
                value = values[number]
                by_source = [f"{times * part * abs(value):.1e}" for times in (3, 4)]
                assert cells[number + 1] == " ± ".join([f"{value:+.2e}", *by_source]) + mark
        assert [" ?" in cell for cell in objective] == [False] * 5 + [True]
    alpha = alpha_table(run, 0)
    for (name, *cells), value in zip(alpha.rows, influence["alpha"], strict=True):
        part = 0.18 if name == "trust" else 0.1
        expected = [f"{value:+.2e}", *(f"{times * part * abs(value):.1e}" for times in (3, 4, 5))]
        assert cells == [*expected, "uncertain" if name == "trust" else "certain"]
    text = round_table(run, 0)
    assert [name for name in FIVE if re.search(rf"^{name} .*e[+-]\d\d \?", text, re.MULTILINE)] == ["trust"]
    assert "the sign is uncertain" in text
    page = Page(render_report(folder).read_text())
    assert "± reference rows" in page.text and alpha.rows[4] in [row[:6] for row in page.rows]


def test_errors_in_the_figure(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", FIVE, FIVE, 2, scale=1.0))
    figure = influence_figure(run, 0)
    assert figure is not None
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    value, last = np.array(run.round(0).influence["matrix"])[0, [0, 4]]
    shown = [f"{value:+.2f}\n±{0.5 * abs(value):.2f}", f"{last:+.2f} ?\n±{0.9 * abs(last):.2f}"]
    assert [texts[0], texts[4]] == [text.replace("-", "\u2212") for text in shown]
    assert len(texts) == 30 and sum("?" in text for text in texts) == 6


def test_how_the_matrix_was_estimated(tmp_path: Path) -> None:
    page = Page(render_report(write_run(tmp_path / "run", FIVE, ["a"], 2)).read_text())
    assert ["math", "100", "4,321", "37", "53"] in page.rows and ["a", "64", "2,345"] in page.rows
    assert "Used: 500 sequences, added until it was enough." in page.text and "damping 0.1." in page.text
    assert "1 of 2 layers were left out" in page.text and "layers.1.mlp.down_proj" in page.text
    residuals = "relative residuals at the end 2.0e-03 to 3.0e-02 (near or above 1 is no solution)"
    assert f"2 iterations; {residuals}" in page.text


def test_free_budget_alone_speaks_of_volume(tmp_path: Path) -> None:
    free = load_run(write_run(tmp_path / "free", FIVE, FIVE, 2))
    fixed = load_run(write_run(tmp_path / "fixed", FIVE, FIVE, 2, budget="fixed"))
    start, best = (r.mixture["total_tokens"] for r in free.rounds)
    assert f"changed by {100 * (best / start - 1):+.1f}%" in final_summary(free).replace("\n", " ")
    assert "volume" not in final_summary(fixed)


def test_round_table(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", FIVE, FIVE, 3))
    text = round_table(run, 1)
    entry, then = (run.round(i).mixture["domains"]["math"] for i in (1, 2))
    line = next(line for line in text.splitlines() if line.startswith("math"))
    assert line.split()[-2:] == [f"{100 * then['beta']:+.1f}%", f"{then['ratio']:.3f}"]
    assert f"{entry['ratio']:.3f}" in line and f"{100 * entry['share']:.1f}%" in line
    before, now = (run.round(i).evaluation["Q"] for i in (0, 1))
    line = next(line for line in text.splitlines() if line.startswith("Q"))
    assert f"{run.base['Q']:.4f}  {before:>7.4f}" in line and f"{100 * (now / before - 1):+.1f}%" in line


def test_the_next_mixture_can_be_given_before_its_round_exists(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", FIVE, FIVE, 2))
    given = {"domains": {name: {"ratio": 1.234, "beta": 0.056} for name in FIVE}}
    assert "next ratio" not in round_table(run, 1)
    assert round_table(run, 1, given).count("+5.6%       1.234") == len(FIVE)


def test_tables_fit_the_console(tmp_path: Path) -> None:
    names = [f"a_domain_with_a_very_long_name_that_goes_on_for_ever_{i}" for i in range(12)]
    run = load_run(write_run(tmp_path / "run", names, names, 3))
    for text in (round_table(run, 1), final_summary(run)):
        tables, _, _ = text.partition("Files in")
        assert max(map(len, tables.splitlines())) <= WIDTH
        # Shortened names still differ.
        assert all(re.search(rf"^a_domain\S*_{i} ", tables, re.MULTILINE) for i in range(12))


def test_shorten_keeps_both_ends() -> None:
    assert shorten("short", 10) == "short"
    assert shorten("abcdefghijkl", 8) == "abc..jkl"
    assert shorten("two\nlines", 20) == "two lines"


def test_a_stopped_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", FIVE, FIVE, 3)
    (folder / "mixture.json").unlink()
    (folder / "round_02" / "evaluation.json").unlink()
    (folder / "round_01" / "influence.json").write_text('{"matrix": [[1')
    (folder / "round_03.tmp").mkdir()
    write(folder / "state.json", {"finished": False, "warnings": [f"beware of {NASTY}"]})
    page = Page(render_report(folder).read_text())
    assert "not finished" in page.text and "Best round: 1 of rounds 0 to 1" in page.text
    assert "round_01/influence.json cannot be read" in page.text and f"beware of {NASTY}" in page.text
    assert [r.number for r in load_run(folder).rounds] == [0, 1, 2]


@pytest.mark.parametrize("kept", ["", "config.yaml", "base/evaluation.json", "round_00/mixture.json"])
def test_hardly_anything(tmp_path: Path, kept: str) -> None:
    whole = write_run(tmp_path / "whole", FIVE, FIVE, 1)
    folder = tmp_path / "run"
    folder.mkdir()
    if kept:
        (folder / kept).parent.mkdir(exist_ok=True)
        (folder / kept).write_text((whole / kept).read_text())
    page = Page(render_report(folder).read_text())
    assert "No round has been evaluated yet." in page.text
    run = load_run(folder)
    assert round_table(run, 0) and final_summary(run)


def test_only_an_influence_matrix(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", FIVE, FIVE, 2)
    for name in ("mixture.json", "base/evaluation.json", "round_00/mixture.json", "round_00/evaluation.json"):
        (folder / name).unlink()
    for path in sorted((folder / "round_01").iterdir()):
        path.unlink()
    (folder / "round_01").rmdir()
    page = Page(render_report(folder).read_text())
    assert "influence_round_00.png" in {p.name for p in (folder / "figures").iterdir()}
    assert "lowers this capability's loss" in page.text


def test_one_round_without_tests_or_influence(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ["a", "b"], ["a"], 1, tests=False, influence=False)
    page = Page(render_report(folder).read_text())
    assert "One round was evaluated" in page.text and "nan" not in page.text.lower().split()
    assert "Q (test)" not in page.text and "one seed" not in page.text
    assert {p.stem for p in (folder / "figures").iterdir()} == {"ratios", "losses"}


def test_no_step_improved(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", FIVE, FIVE, 2)
    worse = json.loads((folder / "round_01" / "evaluation.json").read_text())
    write(folder / "round_01" / "evaluation.json", {**worse, "Q": 9.0})
    write(folder / "mixture.json", json.loads((folder / "round_00" / "mixture.json").read_text()))
    run = load_run(folder)
    assert "no step improved it" in final_summary(run)
    assert "round 0 (start) (best)" in as_text(overview_table(run))


def test_numbers_that_are_none(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ["a", "b"], ["a", "b"], 2)
    path = folder / "round_00" / "influence.json"
    influence = json.loads(path.read_text())
    errors, nan = influence["standard_errors"], float("nan")
    # error_sequences 0: null, as the loop writes what is not a number.
    unknown = {name: {source: _nulls(entry[source]) for source in SOURCES} for name, entry in errors.items()}
    write(path, {**influence, "standard_errors": unknown})
    page = Page(render_report(folder).read_text())
    assert "±" not in page.text and "?" not in page.text and f"{influence['matrix'][0][0]:+.2e}" in page.text
    write(path, {**influence, "standard_errors": unknown, "alpha": [nan, nan]})
    assert "±" not in Page(render_report(folder).read_text()).text
    # Of reference rows alone: no error together, and nothing said about signs.
    half = {name: {**entry, "reference": errors[name]["reference"]} for name, entry in unknown.items()}
    write(path, {**influence, "standard_errors": half})
    rows = alpha_table(load_run(folder), 0).rows
    assert [(row[2], row[4], row[5]) for row in rows] == [("-", "-", "-")] * 2 and rows[0][3] != "-"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (119.7, "2 min 00 s"), (3599.4, "59 min 59 s"), (3599.6, "1 h 00 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_errors_of_an_older_run(tmp_path: Path) -> None:
    """Before errors were told apart by source there was one table of them, for the free form."""
    folder = write_run(tmp_path / "run", ["a", "b"], ["a", "b"], 2)
    path = folder / "round_00" / "influence.json"
    influence = json.loads(path.read_text())
    newer = ("sampling", "factor_sequences", "eigenvalue_sequences", "reference_sequences", "reference_tokens")
    for key in (*newer, "dropped_layers", "solver"):
        del influence[key]
    write(path, {**influence, "standard_errors": [[0.5, 0.25], [0.125, 1.0]]})
    page, run = Page(render_report(folder).read_text()), load_run(folder)
    assert "± 2.5e-01" in influence_table(run, 0, "free").rows[0][2] and "± 2.5e-01" in page.text
    assert "±" not in str(influence_table(run, 0, "fixed")) and not alpha_table(run, 0)
    assert "conjugate" not in page.text and "left out, those" not in page.text


@pytest.mark.parametrize(("count", "rounds", "scale"), [(2, 1, 1.0), (12, 12, 1e-9), (3, 2, 0.0)])
def test_figures_of_every_size(tmp_path: Path, count: int, rounds: int, scale: float) -> None:
    names = [f"domain {i} {NASTY}" for i in range(count)]
    folder = write_run(tmp_path / "run", names, names[:2], rounds, scale=max(scale, 1e-300))
    render_report(folder)
    figures = list((folder / "figures").glob("*.png"))
    assert len(figures) == 2 + rounds - 1
    for figure in figures:
        assert_png(figure)


def set_method(folder: Path, method: str, results: set[int]) -> None:
    """Makes a run one of `method`, whose rounds but `results` were too short to be kept."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["mixing"]["method"] = method
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for path in folder.glob("round_*"):
        number = int(path.name.removeprefix("round_"))
        write(path / "training.json", {"steps": 3, "is_result": number in results})


def test_tries_are_reported_with_their_mean(tmp_path: Path) -> None:
    """Q of the made-up rounds of one capability: 1, 0.97 and 0.97^2; their mean is 0.9703, times 1.03 on the tests."""
    folder = write_run(tmp_path / "run", ["x", "y"], ["a"], 3, influence=False)
    set_method(folder, "random", {0, 1, 2})
    run = load_run(folder)
    lines = tables.outcome(run)
    assert lines[0] == "Best of 3 results: round 2, by Q on the reference sets."
    assert lines[1] == "Mean Q of all 3 on the reference sets: 0.9703 (0.9409 to 1.0000)"
    assert lines[2] == "Mean Q of all 3 on the test sets: 0.9994 (0.9691 to 1.0300)"
    assert "start" not in " ".join([*lines, tables.as_text(tables.overview_table(run)), tables.final_summary(run)])
    assert not any("budget" in text for text in tables.caveats(run)), "random has none"


def test_rounds_that_may_not_be_the_result_are_not_the_best(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ["x", "y"], ["a"], 4, influence=False)
    set_method(folder, "regmix", {1})
    (folder / "mixture.json").unlink()  # as in a run that is still going on
    run = load_run(folder)
    assert run.best is not None and run.best.number == 1
    assert tables.outcome(run)[0] == "Result: round 1."
    set_method(folder, "regmix", set())
    assert load_run(folder).best is None and "may be the result" in tables.outcome(load_run(folder))[0]


def test_domains_that_are_left_out_stay_inside_the_figure(tmp_path: Path) -> None:
    """A ratio of 0 beside one of 30 has no place on a logarithmic axis."""
    folder = write_run(tmp_path / "run", ["x", "y"], ["a"], 3, influence=False)
    set_method(folder, "specific", {0, 1, 2})
    for index, values in enumerate([(30.0, 0.0), (0.0, 30.0), (1.0, 1.0)]):
        path = folder / f"round_{index:02d}" / "mixture.json"
        mixture = json.loads(path.read_text())
        for entry, value in zip(mixture["domains"].values(), values, strict=True):
            entry["ratio"] = value
        write(path, mixture)
    left = ratios_figure(load_run(folder)).axes[0]
    assert left.get_yscale() == "log"
    drawn = [line for line in left.get_lines() if len(line.get_xdata()) == 3]
    np.testing.assert_array_equal([line.get_ydata() for line in drawn], [[30, np.nan, 1], [np.nan, 30, 1]])
    assert not any(line.get_linewidth() for line in drawn), "tries are points: nothing leads from one to the next"


# Scores


def add_scores(folder: Path, by: str) -> None:
    """Scores of two capabilities that fall from round to round, while Q falls too."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "evaluation": {"choose_by": by}}))
    (folder / "mixture.json").unlink()
    for number, this in enumerate([folder / "base", *sorted(folder.glob("round_*"))]):
        values = {"math": 0.9 - 0.1 * number, "coding": 0.5}
        scores = {"reference_score": values, "reference_score_error": dict.fromkeys(values, 0.0123)}
        scores |= {"test_score": {"math": 0.25}, "test_score_error": {"math": None}}
        content = json.loads((this / "evaluation.json").read_text())
        write(this / "evaluation.json", {**content, **scores, "score": values["math"], "score_test": None})
        line = {"set": "test", "capability": "math", "prompt": "2+2?", "expected": "4", "detail": "found"}
        lines = [{**line, "row": row, "score": row % 2, "answer": f"answer {row} {NASTY}"} for row in range(8)]
        lines.append({**lines[0], "set": "reference", "answer": "not shown"})
        (this / "answers.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))


@pytest.mark.parametrize(("by", "best"), [("loss", 2), ("score", 0)])
def test_scores_and_answers(tmp_path: Path, by: str, best: int) -> None:
    folder = write_run(tmp_path / "run", FIVE, FIVE, 3)
    add_scores(folder, by)
    run = load_run(folder)
    assert run.best is not None and run.best.number == best
    page = Page(render_report(folder).read_text())
    assert any(row[:3] == ["math", "0.900 ± 0.012", "0.800 ± 0.012"] for row in page.rows)
    assert "math, test row 1" in page.text and "math, test row 2" in page.text and "math, test row 5" not in page.text
    assert "not shown" not in page.text and page.tags.count("b") == 2, "the template's own"
    measure = {"loss": "Q on the reference sets", "score": "the score on the reference sets"}[by]
    assert f"The best round is chosen by {measure} alone" in page.text
    summary = " ".join(final_summary(run).split())
    assert ("no step improved it, by the score on the reference sets" in summary) == (by == "score")
    assert "Score on the reference sets: base model 0.9000 -> start 0.8000" in summary
    console = round_table(run, 1)
    assert re.search(r"math +0.900 ± 0.012 +0.800 ± 0.012 +0.700 ± 0.012 +0.250 +0.250", console)
    assert max(map(len, console.splitlines())) <= WIDTH + 20


def test_a_run_without_scores_says_nothing_of_them(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", FIVE, FIVE, 2)
    page, run = Page(render_report(folder).read_text()), load_run(folder)
    assert "Scores" not in page.text and "score, 0 to 1" not in round_table(run, 1) + final_summary(run)
    (folder / "round_01" / "answers.jsonl").write_text("broken")
    assert not tables.answers_table(run, 1)


def test_predictions_and_limits_are_shown(tmp_path):
    folder = write_run(tmp_path / "run", FIVE, FIVE, 2)
    losses = dict.fromkeys(FIVE, -0.05)
    changes = {kind: {"reference_loss": losses, "Q": q} for kind, q in (("predicted", -0.0421), ("observed", -0.0345))}
    write(folder / "round_01" / "change.json", {"from_round": 0, **changes})
    mixture = json.loads((folder / "round_01" / "mixture.json").read_text())
    write(folder / "round_01" / "mixture.json", {**mixture, "held": {"math": "most_ratio"}})
    write(folder / "round_01" / "step.json", {"advice": "another run: worth it"})
    write(folder / "state.json", {"finished": True, "advice": "another run: little is left"})
    run = load_run(folder)
    table = tables.change_of_losses_table(run, 1)
    assert table.header == ["change of loss since round 0", "predicted", "observed"]
    assert table.rows[-1] == ["Q", "-0.0421", "-0.0345"] and len(table.rows) == 6
    assert not tables.change_of_losses_table(run, 0)
    text = round_table(run, 1)
    assert "At a limit: math (most_ratio)" in text and "-0.0345" in text
    page = render_report(folder).read_text()
    assert "Outlook: another run: worth it." in text and "Outlook: another run: worth it." in page
    assert not tables.advice_of_round(run, 0)
    assert "Outlook: another run: little is left (more rounds" in final_summary(run) and "little is left" in page
    assert "Predicted and observed" in page and "At a limit: math (most_ratio)." in page
