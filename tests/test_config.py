"""Settings: main.py's block < YAML < command line, and one line that names the key for every mistake."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ideal.config import Config, dump, flat, help_text, known_keys, read_command, validate
from ideal.data import DomainConfig
from ideal.errors import UserError
from ideal.mixers import MixingConfig
from main import ARGUMENTS

DEFAULTS = {
    **ARGUMENTS,
    "model.name_or_path": "model",
    "data.domains": {"math": "data/math", "code": "data/code"},
}


def config(*argv: str, **defaults: Any) -> Config:
    return read_command({**DEFAULTS, **defaults}, argv).config


def mistake(*argv: str, **defaults: Any) -> str:
    with pytest.raises(UserError) as caught:
        config(*argv, **defaults)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "settings.yaml"


def test_defaults_are_main_pys():
    found = flat(dump(config()))
    for key, value in DEFAULTS.items():
        if not isinstance(value, dict):
            assert found[key] == value, key


def test_the_default_step_and_the_papers():
    """The surrogate, which learns from a failed round too, by default; the paper's settings by one file."""
    found = (config().mixing, MixingConfig())
    assert [(mixing.step, mixing.patience, mixing.first) for mixing in found] == [("surrogate", 2, "given")] * 2
    paper = config("--config", str(Path(__file__).parents[1] / "configs" / "paper.yaml"))
    mixing, influence = paper.mixing, paper.influence
    assert (mixing.step, mixing.max_change, mixing.rounds, mixing.patience) == ("fixed", 0.15, 2, 1)
    assert (mixing.budget, mixing.start, influence.factors, influence.sample_fraction) == ("free", "base", "kfac", 0.5)


def test_precedence(file):
    file.write_text("train: {learning_rate: 2.0e-5, num_train_epochs: 3}\nmixing.rounds: 5\nseed: 1\n")
    found = config("--config", str(file), "--train.learning_rate", "3e-5", "--seed=2")
    assert found.train.arguments["learning_rate"] == 3e-5, "command line over YAML"
    assert found.train.arguments["num_train_epochs"] == 3 and found.mixing.rounds == 5, "YAML over main.py"
    assert found.train.arguments["lr_scheduler_type"] == DEFAULTS["train.lr_scheduler_type"], "main.py"
    assert found.seed == 2
    # The order of words does not matter.
    assert dump(config("--seed=2", "--train.learning_rate", "3e-5", "--config", str(file))) == dump(found)


def test_yaml_replaces_the_domains(file):
    file.write_text("data: {domains: {chat: data/chat, law: {train: law.jsonl, ratio: 2}}}\n")
    found = config("--config", str(file)).data.domains
    assert found == {"chat": "data/chat", "law": DomainConfig(train="law.jsonl", ratio=2)}


def test_yaml_merges_everything_else(file):
    file.write_text("data: {max_length: 99}\nmixing: {budget: fixed}\n")
    found = config("--config", str(file))
    assert found.data.domains == DEFAULTS["data.domains"] and found.data.max_length == 99
    assert found.mixing.budget == "fixed" and found.mixing.rounds == DEFAULTS["mixing.rounds"]


def test_one_key_of_a_domain_on_the_command_line(file):
    file.write_text("data: {domains: {math: {train: m.jsonl, weight: 3}, code: {train: c.jsonl}}}\n")
    found = config("--config", str(file), "--data.domains.math.ratio", "2").data.domains
    assert found == {
        "math": DomainConfig(train="m.jsonl", weight=3, ratio=2),
        "code": DomainConfig(train="c.jsonl"),
    }


def domain_folder(folder: Path) -> Path:
    for name in ("math", "code"):
        (folder / name).mkdir(parents=True)
        for role in ("train", "reference"):
            (folder / name / f"{role}.jsonl").write_text("{}\n")
    return folder


@pytest.mark.parametrize("short", ["mapping", "folder"])
def test_one_key_of_a_domain_in_short_form(tmp_path, short):
    folder = domain_folder(tmp_path / "domains")
    given: Any = str(folder)
    if short == "mapping":
        given = {"math": str(folder / "math"), "code": str(folder / "code")}
    found = config("--data.domains.math.ratio", "2", **{"data.domains": given}).data.domains
    assert isinstance(found, dict) and set(found) == {"math", "code"}
    math = found["math"]
    assert isinstance(math, DomainConfig) and math.ratio == 2
    assert math.train == math.reference == str(folder / "math") and math.test is None


def test_types_of_words():
    words = ["--train.bf16", "true", "--influence.layers", "[a, b]", "--data.max_examples", "64"]
    found = config(*words, "--mixing.ratios", "{math: 2, code: 0.5}")
    assert found.train.arguments["bf16"] is True and found.influence.layers == ["a", "b"]
    assert found.mixing.ratios == {"math": 2, "code": 0.5} and found.data.max_examples == 64
    assert config("--data.max_examples", "null").data.max_examples is None
    assert config("--output_dir", "2024").output_dir == "2024", "a folder may be named by a number"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.learning_rat", "1"], "unknown key train.learning_rat; did you mean train.learning_rate?"),
        (["--mixing.round", "1"], "unknown key mixing.round; did you mean mixing.rounds?"),
        (["--rounds", "1"], "unknown key rounds; did you mean mixing.rounds?"),
        (["--data.domains.math.ratoi", "1"], "unknown key data.domains.math.ratoi"),
        (["--mixing.rounds", "two"], "mixing.rounds: 'two': "),
        (["--mixing.rounds", "-1"], "mixing.rounds: '-1': "),
        (["--mixing.max_change", "1.5"], "mixing.max_change: '1.5': "),
        (["--mixing.budget", "large"], "mixing.budget: 'large': "),
        (["--influence.damping", "0"], "influence.damping: '0': "),
        (["--influence.sample_fraction", "1.1"], "influence.sample_fraction: '1.1': "),
        (["--train.learning_rate", "fast"], "train.learning_rate: 'fast' does not fit"),
        (["--train.global_batch_size", "0"], "train.global_batch_size: '0': "),
        (["--train.seed", "3"], "train.seed is not for the user to set: use seed"),
        (["--model.lora.rank", "-1"], "model.lora.rank: '-1': "),
        (["--seed"], "seed: no value given"),
        (["--seed", "--mixing.rounds", "1"], "seed: no value given"),
        (["seed", "1"], "seed: not understood"),
        (["--stage", "trian"], "stage: 'trian' is none of run, plan, influence, mix, compare, report"),
        (["--restart", "yes"], "restart: 'yes' is neither true nor false"),
        (["--mixing.method", "unifrom"], "mixing.method: there is no mixer 'unifrom'; did you mean uniform?"),
        (["--mixing.first", "loss", "--mixing.method", "joint"], "mixing.first: loss is for ideal, power_law"),
        (["--train.max_steps", "5"], "mixing.budget: free has no meaning where train.max_steps"),
        (["--data.domains", "null"], "data.domains: not given"),
        (["--keep_models", "some"], "keep_models: 'some': "),
        (["--mixing.budget", "fixed", "--mixing.max_total", "2"], "mixing.max_total: a fixed budget never grows"),
        (["--mixing.max_total", "0.5"], "mixing.max_total: '0.5': "),
        (["--mixing.target.math", "1"], "mixing.target: only mixing.objective worst compares"),
        (["--mixing.no_worse.math", "0"], "mixing.no_worse.math: '0': "),
        (["--mixing.no_worse", "start", "--mixing.method", "random"], "mixing.no_worse: the rounds of random are"),
    ],
)
def test_mistakes_on_the_command_line(words, message):
    assert mistake(*words).startswith(message), mistake(*words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mixing: {round: 1}", "unknown key mixing.round; did you mean mixing.rounds?"),
        ("mixnig: {rounds: 1}", "unknown key mixnig; did you mean mixing"),
        ("train: {learning_rat: 1}", "unknown key train.learning_rat; did you mean train.learning_rate?"),
        ("mixing: {rounds: two}", "mixing.rounds: 'two': "),
        ("data: {domains: {a: {ratio: 1}, b: b.jsonl}}", "data.domains.a.train: is missing"),
        ("data: {domains: {a: {train: a, ratio: -1}, b: b.jsonl}}", "data.domains.a.ratio: -1: "),
        ("data: {domains: {a: {train: a, ratoi: 1}, b: b.jsonl}}", "unknown key data.domains.a.ratoi"),
        (
            "data: {domains: {a: {train: a, least_ratio: 2, most_ratio: 1}, b: b}}",
            "data.domains.a: least_ratio (2) is above most_ratio (1)",
        ),
        (
            "data: {domains: {a: {train: a, pinned: true, most_ratio: 1}, b: b}}",
            "data.domains.a: pinned keeps the start ratio; leave out most_ratio",
        ),
        (
            "data: {domains: {a: {train: a, pinned: true}, b: b}}\nmixing: {method: odm}",
            "data.domains.a.pinned: odm cannot keep to it",
        ),
        ("- 1", "config: "),
        ("seed: [", "config: "),
    ],
)
def test_mistakes_in_a_file(file, text, message):
    file.write_text(text + "\n")
    assert mistake("--config", str(file)).startswith(message), mistake("--config", str(file))


def test_help_lists_every_key():
    text = help_text(ARGUMENTS)
    for key in known_keys():
        if not key.startswith("train.") or key == "train.global_batch_size":
            assert f"--{key}  (" in text, key
            meaning = text.split(f"--{key}  (")[1].splitlines()[1].strip()
            assert len(meaning) > 5 and not meaning.startswith("--"), f"{key} has no meaning"
    for option in ("--config", "--stage", "--restart", "--train.NAME"):
        assert option in text
    assert "--mixing.max_change  (float; default 0.15)" in text
    assert "TrainingArguments" in text


def test_the_resolved_configuration_runs_again(file):
    """config.yaml as --config, over any main.py."""
    changes = {"mixing.ratios": "{math: 2, code: 0.5}", "train.weight_decay": "0.1", "model.lora.rank": "8"}
    first = config(*[f"--{key}={value}" for key, value in changes.items()])
    file.write_text(yaml.safe_dump(dump(first)))
    again = read_command(ARGUMENTS, ["--config", str(file)]).config
    assert dump(again) == dump(first) and again == first


def test_fractions_that_are_left_out_are_decided_when_the_configuration_is_read(file):
    """So config.yaml has numbers, and earlier folders, which have the same ones, can be gone on with."""

    def fractions(*arguments: str) -> list[float]:
        influence = dump(config(*arguments))["influence"]
        return [influence[f"{name}_fraction"] for name in ("factor", "sketch", "eigenvalue")]

    assert fractions() == fractions("--influence.memory_budget=1", "--influence.fisher=sampled") == [1.0, 0.25, 0.2]
    for others in ("--influence.factors=kfac", "--influence.solver=cg", "--influence.sample_fraction=auto"):
        assert fractions(others) == [0.1, 1.0, 1.0]
    assert fractions("--influence.factor_fraction=1") == [1.0, 1.0, 1.0]
    assert fractions("--influence.eigenvalue_fraction=1") == [0.1, 1.0, 1.0]
    assert fractions("--influence.eigenvalue_fraction=0.5", "--influence.sketch_fraction=1") == [1.0, 1.0, 0.5]
    assert dump(read_command(ARGUMENTS, []).config)["influence"]["eigenvalue_fraction"] == 1.0  # the demo


def test_no_arguments_are_the_demo():
    found = read_command(ARGUMENTS, []).config
    assert found.is_demo and found.mixing.budget == "fixed" and found.data.max_length == 64
    assert not config().is_demo
    assert read_command(ARGUMENTS, ["--mixing.rounds", "1"]).config.mixing.rounds == 1


def test_dotted_domain_names(file):
    file.write_text("data: {domains: {gpt.4: a.jsonl, b: b.jsonl}}\n")
    assert config("--config", str(file)).data.domains == {"gpt.4": "a.jsonl", "b": "b.jsonl"}


def test_validate_takes_nested_values():
    tree = dump(config())
    assert dump(validate(tree)) == tree


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "configs").glob("*.yaml")), ids=lambda p: p.name
)
def test_shipped_files_are_valid(path):
    given = [] if path.name == "demo.yaml" else ["--config", str(path)]
    # Where a file names no model or data, its user does.
    absent = {"model.name_or_path": "model", "data.domains": "data"} if given else {}
    assert read_command({**ARGUMENTS, **absent}, given).config.mixing.rounds >= 1
