"""From files to encoded sets: sources, errors with their place, copies, cuts, caps, reports."""

import bz2
import csv
import gzip
import json
import lzma
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
import pydantic
import pytest
from templates import CHATML, make_tokenizer

from ideal.data import CapabilityConfig, DataConfig, DomainConfig, SourceConfig, load_data
from ideal.data.inspection import decoded_runs, report_table, shorten, show_example
from ideal.errors import UserError


def rows_of(name, count, start=0):
    return [
        {"prompt": f"{name} question {number}", "completion": f"answer {number}"}
        for number in range(start, start + count)
    ]


def write(path: Path, rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two domains with 40 rows, 10 reference rows each, below the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("math", "code"):
        write(tmp_path / "data" / name / "train.jsonl", rows_of(name, 40))
        write(tmp_path / "data" / name / "reference.jsonl", rows_of(name, 10, start=100))
    return tmp_path


def load(domains="data", seed=0, **options):
    config = pydantic.TypeAdapter(DataConfig).validate_python({"domains": domains, **options})
    return load_data(config, make_tokenizer(CHATML), seed)


def refused(*words, **options):
    with pytest.raises(UserError) as error:
        load(**options)
    text = str(error.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


def prompts(examples):
    return [messages[0]["content"] for messages in examples.examples["messages"]]


def two(**math):
    """The domain `code` as it is, and `math` with something else."""
    return {"code": "data/code", "math": {"reference": "data/math/reference.jsonl", **math}}


def numbers(name, values):
    return [f"{name} question {value}" for value in values]


# What is found


def test_a_folder_of_domains(folder):
    (folder / "data" / ".hidden").mkdir()
    write(folder / "data" / "math" / "test.jsonl", rows_of("math", 5, start=200))
    data = load()
    assert list(data.pools) == list(data.references) == ["code", "math"]
    assert list(data.tests) == ["math"]
    assert prompts(data.pools["math"]) == numbers("math", range(40))
    assert data.weights == {"code": 0.5, "math": 0.5}
    assert data.ratios == {"code": 1.0, "math": 1.0}
    assert [report.label for report in data.reports] == [
        "code",
        "math",
        "code reference",
        "math reference",
        "math test",
    ]


def test_an_example_set_counts_what_it_holds(folder):
    pool = load().pools["math"]
    for row in range(len(pool)):
        labels = np.array(pool[np.int64(row)]["labels"])
        trained = np.flatnonzero(labels != -100)
        assert pool.lengths[row] == len(labels) == len(pool[row]["input_ids"])
        assert pool.trained_tokens[row] == len(trained)
        assert pool.positions[row] == trained[-1]
        assert labels[0] == -100
    assert pool.examples.column_names == ["input_ids", "labels", "messages"]


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.ndjson",
        "a.json",
        "a.parquet",
        "a.csv",
        "a.tsv",
        "a.jsonl.gz",
        "a.jsonl.bz2",
        "a.csv.xz",
        "a.csv.gz",
    ],
)
def test_kinds_of_files(folder, name):
    rows = [
        *rows_of("math", 9),
        {"prompt": "none?", "completion": "None"},
        {"prompt": "6 * 7", "completion": "42"},
    ]
    path = folder / name.removesuffix(".gz").removesuffix(".bz2").removesuffix(".xz")
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as stream:
            writer = csv.writer(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([("", "prompt", "completion"), *((3, *row.values()) for row in rows)])
    else:
        write(path, rows)
    if name != path.name:
        compressed = COMPRESS[name.rsplit(".", 1)[1]](path.read_bytes())
        path.unlink()
        (folder / name).write_bytes(compressed)
    pool = load(two(train=name)).pools["math"]
    assert [messages[1]["content"] for messages in pool.examples["messages"]] == [
        row["completion"] for row in rows
    ]


def test_slices_shards_and_folders(folder):
    write(folder / "shards" / "train-00000-of-00002.jsonl", rows_of("math", 20))
    write(folder / "shards" / "train-00001-of-00002.jsonl", rows_of("math", 20, start=20))
    write(folder / "shards" / "validation.jsonl", rows_of("math", 9, start=50))
    assert prompts(load(two(train="shards")).pools["math"]) == numbers("math", range(40))
    assert prompts(load(two(train="shards:train[5:8]")).pools["math"]) == numbers("math", range(5, 8))
    assert prompts(load(two(train="shards:validation")).pools["math"]) == numbers("math", range(50, 59))
    written_out = SourceConfig(path="data/math/train.jsonl", split="train[:25%]")
    assert prompts(load(two(train=written_out)).pools["math"]) == numbers("math", range(10))


def test_capabilities_weights_and_domains_without_capability(folder):
    domains = {
        "code": DomainConfig("data/code", reference="none", ratio=2.0),
        "math": DomainConfig("data/math", reference="data/math", weight=3.0),
    }
    extra = {"logic": CapabilityConfig("data/code/reference.jsonl", test="data/code/train.jsonl:train[:3]")}
    data = load(domains, capabilities=extra, drop_reference_copies=False)
    assert list(data.pools) == ["code", "math"]
    assert data.weights == {"math": 0.75, "logic": 0.25}
    assert data.ratios == {"code": 2.0, "math": 1.0}
    assert list(data.tests) == ["logic"]


def test_hub_data_sets_go_through_datasets(folder, monkeypatch):
    asked = []

    def answer(path, name=None, split=None, **options):
        asked.append((path, name, split))
        return datasets.Dataset.from_list(
            [{"question": f"q{n}", "answer": "a" if n else None} for n in range(20)]
        )

    local = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda path, *given, **options: (
            local(path, *given, **options) if path == "json" else answer(path, *given, **options)
        ),
    )
    sources = {"train": "owner/set:train[:20]", "test": SourceConfig("owner/set", "main", "test")}
    data = load(two(**sources), drop_reference_copies=False)
    assert asked == [("owner/set", None, "train[:20]"), ("owner/set", "main", "test")]
    report = next(report for report in data.reports if report.label == "math")
    assert [(dropped.reason, dropped.count, dropped.rows) for dropped in report.dropped] == [
        ("no 'answer'", 1, [1])
    ]
    refused(
        "data.domains.math.test: which split of owner/set", domains=two(train="owner/set", test="owner/set")
    )


# What is refused, with its place


def test_missing_files_name_the_nearest(folder):
    refused(
        "data.domains.math.train: there is no file or folder data/math/trian.jsonl",
        "did you mean data/math/train.jsonl?",
        domains=two(train="data/math/trian.jsonl"),
    )
    refused(
        "data.domains.math.train", "data/maths", "did you mean data/math?", domains=two(train="data/maths")
    )
    refused("data.domains.math.train", "./nothing", domains=two(train="./nothing/at/all.jsonl"))
    refused("data.domains: there is no folder dat", domains="dat")
    (folder / "data" / "logic").mkdir()
    refused("data.domains.logic: the folder data/logic holds no train.*", domains="data")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            datasets.exceptions.DatasetNotFoundError("no"),
            ["neither a local file or folder nor a data set on the hub"],
        ),
        (ConnectionError("no route"), ["the hub cannot be reached (no route)"]),
        (ValueError('Unknown split "x"\nmore'), ['cannot load owner/set from the hub: Unknown split "x"']),
    ],
)
def test_hub_failures(folder, monkeypatch, error, words):
    local = datasets.load_dataset

    def answer(path, *given, **options):
        if path == "owner/set":
            raise error
        return local(path, *given, **options)

    monkeypatch.setattr(datasets, "load_dataset", answer)
    refused("data.domains.math.train: ", *words, domains=two(train="owner/set"))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            ['{"prompt": "a", "completion": "b"}', "", '{"prompt": "a", "completion": "b"'],
            ["bad.jsonl, line 3: not valid JSON"],
        ),
        (
            ['{"prompt": "a", "completion": "b"}', "[1, 2]"],
            ["bad.jsonl, line 2: a list where an object is needed"],
        ),
        (
            ["", '{"prompt": "a", "completion": "b"}', '{"prompt": "a", "completion": 3}'],
            ["bad.jsonl, line 3: 'completion' is a number, but text in line 2"],
        ),
        (
            ['{"prompt": "a", "completion": 3}'],
            ["bad.jsonl, line 1: 'completion' must be text, here it is a number (format prompt); mend"],
        ),
        (
            ['{"prompt": "a", "completion": "b"}', "", '{"prompt": "a"}'],
            ["bad.jsonl, line 3", "no 'completion'"],
        ),
        (['{"q": "a"}'], ["bad.jsonl: its columns are of no known format: q", "Known are"]),
        ([""], ["bad.jsonl holds no rows"]),
        ([], ["bad.jsonl is empty"]),
        (['{"prompt": "a", "completion": ""}'], ["no usable example", "1 dropped, an empty answer"]),
    ],
)
def test_bad_json(folder, lines, words):
    path = folder / "bad.jsonl"
    path.write_text("\n".join([*lines, ""]) if lines else "")
    refused("data.domains.math.train: ", *words, domains=two(train="bad.jsonl"))


def test_bad_files_of_other_kinds(folder):
    (folder / "latin.jsonl").write_bytes('{"prompt": "é", "completion": "b"}\n'.encode("latin-1"))
    refused("latin.jsonl, line 1: not UTF-8", domains=two(train="latin.jsonl"))
    (folder / "list.json").write_text('[{"prompt": "a",\n "completion": }]')
    refused("list.json, line 2: not valid JSON", domains=two(train="list.json"))
    (folder / "head.csv").write_text("question,answer\n")
    refused("head.csv holds no rows", domains=two(train="head.csv"))
    datasets.Dataset.from_dict({"text": []}).to_parquet(folder / "none.parquet")
    refused("none.parquet", domains=two(train="none.parquet"))
    (folder / "wide.csv").write_text("question,answer\na,b\na,b,c\n")
    refused("cannot read wide.csv", "line 3", domains=two(train="wide.csv"))
    (folder / "x.parquet").write_text("no")
    refused("cannot read x.parquet", domains=two(train="x.parquet"))
    (folder / "x.docx").write_text("no")
    refused("cannot tell what x.docx is", ".jsonl", domains=two(train="x.docx"))
    write(folder / "mixed" / "a.jsonl", rows_of("math", 3))
    (folder / "mixed" / "b.csv").write_text("question,answer\n")
    refused("mixed mixes kinds of files", domains=two(train="mixed"))
    refused("is for hub data sets", domains=two(train={"path": "data/math", "name": "main"}))
    refused("data/math holds no validation.*", domains=two(train="data/math:validation"))


def test_a_bad_row_among_several_files_and_compressed(folder):
    write(folder / "many" / "a.jsonl", rows_of("math", 3))
    write(folder / "many" / "b.jsonl", ["", *rows_of("math", 2), {"prompt": 3, "completion": "x"}])
    refused("many/b.jsonl, line 4: 'prompt' is a number, but text in line 2", domains=two(train="many"))
    (folder / "bad.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a", "completion": "b"}\n{"prompt\n'))
    refused("bad.jsonl.gz, line 2: not valid JSON", domains=two(train="bad.jsonl.gz"))


def test_formats_and_columns_of_a_domain(folder):
    refused(
        "data.domains.math.train: data/math/train.jsonl: unknown format 'alpacca'",
        domains=two(train="data/math", format="alpacca"),
    )
    refused("there is no column 'q' for 'prompt'", domains=two(train="data/math", columns={"prompt": "q"}))


def test_a_single_domain_and_nothing_to_measure_by(folder):
    refused("at least two domains", "only math", domains={"math": "data/math"})
    refused("at least two domains", "there is none", domains={})
    refused("no domains given", domains=None)
    none = {name: DomainConfig(f"data/{name}", reference="none") for name in ("math", "code")}
    refused("no domain has a reference set", domains=none)
    refused(
        "weights of all capabilities are 0",
        domains={name: DomainConfig(f"data/{name}", weight=0) for name in ("math", "code")},
    )
    refused(
        "data.capabilities.math: the domain math has a capability",
        capabilities={"math": CapabilityConfig("data/math/reference.jsonl")},
    )
    with pytest.raises(ValueError, match="a test set needs a capability"):
        DomainConfig("data/math", reference="none", test="data/math")


def test_small_reference_sets(folder):
    write(folder / "small.jsonl", rows_of("math", 7, start=300))
    refused(
        "data.domains.math.reference: 7 usable examples in small.jsonl are too few to rank domains",
        domains=two(train="data/math", reference="small.jsonl"),
    )
    refused(
        "data.domains.math.reference: none is given",
        "40 examples",
        "too few to rank domains",
        domains=two(train="data/math", reference=None),
    )


def test_every_example_cut_to_nothing(folder):
    refused("data.domains.", "data.max_length = 10", "cut to nothing", max_length=10)


# What is kept


def test_truncated_and_dropped_rows_are_counted(folder):
    rows = [
        *rows_of("math", 20),
        {"prompt": "x" * 200, "completion": "late"},
        {"prompt": "short", "completion": "y z " * 200},
    ]
    write(folder / "data" / "math" / "train.jsonl", rows)
    data = load(max_length=150)
    report = next(report for report in data.reports if report.label == "math")
    assert (report.rows, report.kept, report.truncated, report.longest) == (22, 21, 1, 150)
    assert [(dropped.reason, dropped.rows) for dropped in report.dropped] == [
        ("no trained token within data.max_length", [21])
    ]
    assert report.tokens == data.pools["math"].lengths.sum()
    assert report.trained_tokens == data.pools["math"].trained_tokens.sum()


def test_copies_are_counted_and_reference_copies_dropped(folder):
    shared, measured = rows_of("shared", 2), rows_of("math", 3, start=100)
    write(folder / "data" / "math" / "train.jsonl", [*rows_of("math", 20), *rows_of("math", 4), *shared])
    write(
        folder / "data" / "code" / "train.jsonl", [*measured[:2], *shared, *rows_of("code", 20), measured[0]]
    )
    write(folder / "data" / "code" / "test.jsonl", [*rows_of("code", 1, start=5), measured[2]])
    for drop in (True, False):
        data = load(drop_reference_copies=drop)
        report = {report.label: report for report in data.reports}
        assert report["math"].copies_inside == 4
        assert report["math"].copies_across == {"code": 2}
        assert report["code"].copies_across == {"math": 2}
        assert report["code"].copies_measured == {"math reference": 3, "code test": 1}
        assert report["math reference"].copies_measured == {"code test": 1}
        left = set(prompts(data.pools["code"])) & {*numbers("math", range(100, 103)), "code question 5"}
        assert len(left) == (0 if drop else 3)
        assert len(data.references["math"]) == 10
    assert report["code"].dropped == []
    report = {report.label: report for report in load().reports}
    assert [(d.reason, d.count, d.rows) for d in report["code"].dropped] == [
        ("also in math reference", 3, [1, 2, 25]),
        ("also in code test", 1, [10]),
    ]


def test_the_held_out_cut(folder):
    rows = rows_of("math", 100)
    path = write(folder / "alone.jsonl", [*rows, *rows[:20]])
    domains = {
        "math": path,
        "code": {
            "train": write(folder / "copy.jsonl", [*rows_of("code", 20), *rows]),
            "reference": "data/code",
        },
    }
    data = load(domains)
    cut, pool = prompts(data.references["math"]), prompts(data.pools["math"])
    assert len(set(cut)) == len(cut) == 12
    assert cut == sorted(cut, key=lambda text: int(text.split()[-1]))
    assert not set(cut) & {*pool, *prompts(data.pools["code"])}
    assert {*cut, *pool} == set(numbers("math", range(100)))
    assert (
        cut == prompts(load(domains).references["math"]) != prompts(load(domains, seed=1).references["math"])
    )
    report = {report.label: report for report in data.reports}
    assert report["math"].held_out == 12
    assert "held out of the domain, 12 of 120" in report["math reference"].notes[0]
    write(folder / "large.jsonl", rows_of("math", 2000))
    assert len(load({**domains, "math": "large.jsonl"}).references["math"]) == 128


def test_copies_of_a_cut_are_counted_even_if_kept(folder):
    write(folder / "alone.jsonl", rows_of("math", 100) * 2)
    data = load({"math": "alone.jsonl", "code": "data/code"}, drop_reference_copies=False)
    assert data.reports[0].copies_measured == {"math reference": 20}
    assert len(data.pools["math"]) == 180


def test_max_examples_draws_by_the_seed(folder):
    write(folder / "data" / "math" / "test.jsonl", rows_of("math", 30, start=200))
    drawn = load(max_examples=9)
    assert [
        len(examples) for group in (drawn.pools, drawn.references, drawn.tests) for examples in group.values()
    ] == [9] * 5
    pool = prompts(drawn.pools["math"])
    assert pool == sorted(pool, key=lambda text: int(text.split()[-1])) != numbers("math", range(9))
    assert (
        pool
        == prompts(load(max_examples=9).pools["math"])
        != prompts(load(max_examples=9, seed=1).pools["math"])
    )
    assert set(pool) < set(prompts(load(max_examples=20).pools["math"]))
    assert drawn.reports[0].not_drawn == 31
    with pytest.raises(pydantic.ValidationError, match="max_examples"):
        load(max_examples=7)


def test_the_cache_is_used_and_follows_the_file(folder):
    first = load().pools["math"].examples.cache_files
    assert first
    assert load().pools["math"].examples.cache_files == first
    write(folder / "data" / "math" / "train.jsonl", rows_of("math", 41))
    assert len(load().pools["math"]) == 41


# What is shown


def test_reports_render_and_are_json(folder):
    data = load(max_examples=9)
    json.dumps([asdict(report) for report in data.reports])
    table = report_table(data.reports, ["a note"]).splitlines()
    assert table[0].split() == ["set", "rows", "kept", "tokens", "trained", "longest", "truncated", "dropped"]
    assert len({len(line) for line in table[:6]}) == 1
    assert "math: 31 rows not drawn (data.max_examples)" in table
    assert table[-1] == "a note"


def test_an_example_is_shown_with_its_mask(folder):
    pool, tokenizer = load().pools["math"], make_tokenizer(CHATML)
    runs = decoded_runs(pool, 3, tokenizer)
    assert [run.trained for run in runs] == [False, True, False]
    assert runs[1].text == "answer 3<|im_end|>"
    lines = show_example(pool, 3, tokenizer).splitlines()
    assert lines[0].startswith("math, example 4 of 40: ")
    assert "  | math question 3<|im_end|>" in lines
    assert "  > answer 3<|im_end|>" in lines
    assert shorten("a" * 50 + "b" * 50, 20) == "a" * 10 + "\n[... 80 characters ...]\n" + "b" * 10
