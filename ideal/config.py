"""All settings together: main.py's block, a YAML file and the command line, in rising precedence.

pydantic checks types and limits; what no parser does alone is here: dotted keys over nested dataclasses, domains
that a YAML file replaces and the command line merges into, TrainingArguments by their own names, and one line per
mistake that names the key.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, TypeAdapter, ValidationError

from ideal.compare.config import CompareConfig
from ideal.data import DataConfig
from ideal.data.loading import resolve_capabilities, resolve_domains
from ideal.errors import UserError
from ideal.evaluation import EvaluationConfig
from ideal.influence import InfluenceConfig
from ideal.machine import PlanConfig
from ideal.mixers import MIXERS, Mixer, MixingConfig
from ideal.model import ModelConfig
from ideal.scoring.scorers import SCORERS
from ideal.settings import STRICT
from ideal.training import TRAINER_KEYS, TrainConfig

DEMO = Path(__file__).parent.parent / "configs" / "demo.yaml"
Tree = dict[str, Any]
GROUPS = ("model", "data", "train", "influence", "mixing", "evaluation", "compare")
NAMED = ("data.domains", "data.capabilities", "mixing.ratios", "mixing.target", "mixing.no_worse")
OPEN = ("train.", *(f"{key}." for key in NAMED), "compare.overrides.")
"""Beginnings of keys whose ends are names."""


def _train_config(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    arguments = {key: entry for key, entry in value.items() if key != "global_batch_size"}
    given = {"global_batch_size": value["global_batch_size"]} if "global_batch_size" in value else {}
    return {**given, "arguments": arguments}


@dataclass
class Config:
    """A run's whole configuration; each group is documented where it is used."""

    __pydantic_config__ = STRICT

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: Annotated[TrainConfig, BeforeValidator(_train_config)] = field(default_factory=TrainConfig)
    influence: InfluenceConfig = field(default_factory=InfluenceConfig)
    mixing: MixingConfig = field(default_factory=MixingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output_dir: str = "runs/ideal"
    """folder of the run's files; the same command again resumes there"""
    seed: int = 0
    """everything random follows from it"""
    keep_models: Literal["final", "all"] = "final"
    """which trained models stay on disk: the best round's alone, or every round's too"""

    @property
    def is_demo(self) -> bool:
        """Whether the embedded demo's model and data are meant."""
        return self.model.name_or_path is None and self.data.domains is None


@dataclass
class Command:
    """What the command line asks for: a configuration and what to do with it."""

    config: Config
    stage: str
    restart: bool
    plan: PlanConfig
    compare: CompareConfig


STAGES = {
    "run": "the whole loop",
    "plan": "only what the run would take: memory per process and phase, disk, passes, FLOPs, time",
    "influence": "only the influence matrix of the given model on the given data",
    "mix": "only the mixture that the given ratios give",
    "compare": "runs of many methods and seeds, each in a folder of its own in output_dir, and their leaderboard",
    "report": "only the report of output_dir again",
}
OPTIONS = {
    "config": "a YAML file of these keys",
    "stage": "; ".join(f"{name}: {text}" for name, text in STAGES.items()),
    "restart": "true: delete the run in output_dir and start over",
    "help": "this text",
}
PLAN, COMPARE = "plan.", "compare."


def read_command(defaults: Mapping[str, Any], argv: Sequence[str]) -> Command:
    """The command that main.py's block `defaults` (dotted keys) and `argv` give.

    Raises UserError with one line that names the key.
    """
    options, given = _split(argv)
    tree = _nested({key: value for key, value in defaults.items()})
    asks_for_demo = all(
        _get(t, k) is None for t in (tree, _nested(given)) for k in ("model.name_or_path", "data.domains")
    )
    if "config" in options:
        tree = _merge(tree, _read_yaml(Path(options["config"])), replace=("data.domains", "mixing.ratios"))
    elif asks_for_demo:
        tree = _merge(tree, _read_yaml(DEMO), replace=("data.domains", "mixing.ratios"))
    stage = options.get("stage", "run")
    if stage not in STAGES:
        raise UserError(f"stage: {stage!r} is none of {', '.join(STAGES)}")
    restart = options.get("restart", "false").lower()
    if restart not in ("true", "false"):
        raise UserError(f"restart: {restart!r} is neither true nor false")
    plan = _plan_config({key.removeprefix(PLAN): options[key] for key in options if key.startswith(PLAN)})
    tree = _with_command_line(tree, given)
    compare = _compare_config(tree.pop("compare", {}))
    return Command(validate(tree), stage, restart == "true", plan, compare)


def _plan_config(given: Tree) -> PlanConfig:
    """`plan.*`, which belong to the command and not to the run's configuration."""
    try:
        return TypeAdapter(PlanConfig).validate_python(given)
    except ValidationError as error:
        raise UserError(PLAN + _explain(error, given)) from None


def _compare_config(given: Tree) -> CompareConfig:
    """`compare.*`, which belong to the command too, but may stand in a file."""
    try:
        found = TypeAdapter(CompareConfig).validate_python(given)
    except ValidationError as error:
        raise UserError(_explain(error, {"compare": given}, ("compare",))) from None
    for key, names in (("methods", found.methods or []), ("overrides", found.overrides)):
        for name in names:
            _check_method(f"compare.{key}", name)
    for name, changes in found.overrides.items():
        for key in {"method", "ratios"} & changes.keys():
            raise UserError(f"compare.overrides.{name}.{key}: is the same for all that are compared; leave it out")
        try:
            TypeAdapter(MixingConfig).validate_python(changes)
        except ValidationError as error:
            text = _explain(error, {"mixing": changes}, ("mixing",))
            raise UserError(text.replace("mixing.", f"compare.overrides.{name}.")) from None
    return found


def of_method(config: Config, method: str, seed: int, output_dir: str, changes: Mapping[str, Any]) -> Config:
    """The configuration of one run of a comparison. changes: mixing keys (`compare.overrides` of the method).

    Raises UserError for a key or value that does not fit, and for what the method refuses.
    """
    tree = dump(config)
    tree |= {"seed": seed, "output_dir": output_dir, "mixing": {**tree["mixing"], **changes, "method": method}}
    return validate(tree)


def validate(tree: Tree) -> Config:
    """The checked configuration of nested keys; raises UserError with one line that names the key."""
    try:
        config = TypeAdapter(Config).validate_python(tree)
    except ValidationError as error:
        raise UserError(_explain(error, tree)) from None
    # So that config.yaml says them, and a run goes on with them whatever the defaults become.
    config.influence = replace(config.influence, **asdict(config.influence.fractions))
    _check_across_groups(config)
    return config


def _check_across_groups(config: Config) -> None:
    method = config.mixing.method
    _check_method("mixing.method", method)
    if config.train.max_steps and config.mixing.budget == "free" and MIXERS[method].has_budget:
        raise UserError(
            "mixing.budget: free has no meaning where train.max_steps fixes the volume; set mixing.budget to fixed"
        )
    if config.train.arguments.get("fsdp") and MIXERS[method].whole_gradients:
        raise UserError(f"train.fsdp: {method} compares whole gradients, which sharded weights lack; leave it out")
    if config.mixing.start == "continue" and MIXERS[method].moves() and not MIXERS[method].continues:
        raise UserError(
            f"mixing.start: the rounds of {method} are no parts of one training run; leave it at base, or use ideal or "
            "loss"
        )
    if config.mixing.start == "continue" and config.mixing.step == "surrogate" and method == "ideal":
        raise UserError(
            "mixing.start: the surrogate compares rounds that each start from the base model; leave it at base, or set "
            "mixing.step to fixed"
        )
    if config.mixing.first == "loss" and not MIXERS[method].first_by_loss:
        others = ", ".join(name for name, mixer in MIXERS.items() if mixer.first_by_loss and name != "loss")
        raise UserError(f"mixing.first: loss is for {others}; with {method} leave it at given")
    _check_demands(config, MIXERS[method])
    if (config.model.name_or_path is None) != (config.data.domains is None):
        missing = "data.domains" if config.data.domains is None else "model.name_or_path"
        raise UserError(f"{missing}: not given; give both it and the other (or neither, for the embedded demo)")
    if config.evaluation.choose_by == "score" and config.evaluation.generate != "rounds":
        raise UserError("evaluation.choose_by: score needs those of every round; set evaluation.generate to rounds")
    if config.evaluation.generate != "never" and not config.is_demo:
        check_scorers(config)


def check_scorers(config: Config) -> None:
    """Raises UserError where what is to be scored has no scorer, or one that may not run."""
    domains = resolve_domains(config.data)
    capabilities = resolve_capabilities(config.data, domains)
    keys = {name: f"data.{'domains' if name in domains else 'capabilities'}.{name}.scorer" for name in capabilities}
    if not any(given.scorer for given in capabilities.values()):
        raise UserError(f"evaluation.generate: no capability has a scorer; give one, as {next(iter(keys.values()))}")
    for name, given in capabilities.items():
        if given.scorer and SCORERS[given.scorer].needs_code and not config.evaluation.run_code:
            raise UserError(
                f"{keys[name]}: {given.scorer} runs code that the model has written, isolated from all else; set "
                "evaluation.run_code to true to allow it, or leave the scorer out"
            )
        if config.evaluation.choose_by == "score" and given.weight and not given.scorer:
            raise UserError(
                f"{keys[name]}: is missing, and evaluation.choose_by: score needs one for every capability with a "
                "weight; give one, or set the capability's weight to 0"
            )


def _check_demands(config: Config, method: type[Mixer]) -> None:
    """Raises UserError for what the method cannot keep to, or what has no meaning beside the other keys."""
    mixing, domains = config.mixing, config.data.domains
    for name, domain in domains.items() if isinstance(domains, dict) else ():
        keys = [] if isinstance(domain, str) else [*domain.limits, *["pinned"] * domain.pinned]
        if keys and not method.keeps_limits:
            raise UserError(
                f"data.domains.{name}.{keys[0]}: {mixing.method} cannot keep to it; leave it out, or choose "
                "another method"
            )
    if mixing.no_worse is not None and method.moves() and not method.successive:
        raise UserError(
            f"mixing.no_worse: the rounds of {mixing.method} are tries, which nothing keeps from getting worse; "
            "leave it out"
        )
    if mixing.max_total is not None and method.has_budget and mixing.budget == "fixed":
        raise UserError("mixing.max_total: a fixed budget never grows; leave it out, or set mixing.budget to free")
    if mixing.target is not None and mixing.objective != "worst":
        raise UserError("mixing.target: only mixing.objective worst compares with it; leave it out")


def _check_method(key: str, method: str) -> None:
    if method not in MIXERS:
        near = difflib.get_close_matches(method, MIXERS, 1)
        hint = f"; did you mean {near[0]}?" if near else f": {', '.join(MIXERS)}"
        raise UserError(f"{key}: there is no mixer {method!r}{hint}")


def _split(argv: Sequence[str]) -> tuple[dict[str, str], Tree]:
    """Options of the command itself, and dotted keys with their values."""
    options: dict[str, str] = {}
    given: Tree = {}
    words = list(argv)
    known = known_keys()
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"{word}: not understood; keys are written --group.key VALUE")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                if key != "restart":
                    raise UserError(f"{key}: no value given")
                value = "true"
            else:
                value = words.pop(0)
        if key in OPTIONS or key in plan_keys():
            options[key] = value
        elif key in known or key.startswith(OPEN):
            given[key] = _value(value)
        else:
            raise UserError(unknown_key(key))
    return options, given


def unknown_key(key: str) -> str:
    """The line for a key that does not exist, with the nearest that does."""
    near = difflib.get_close_matches(key, [*known_keys(), *OPTIONS, *plan_keys()], 1, cutoff=0.5)
    return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "; see --help")


def _value(text: str) -> Any:
    """Lists, mappings, true, false and null as in YAML; all else stays text for pydantic to read."""
    if text.startswith(("[", "{")) or text.lower() in ("true", "false", "null"):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text
    return text


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which the same key twice is a mistake, not a silent choice of the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping's keys and values; raises YAMLError at a repeated key."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"{key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> Tree:
    if not path.is_file():
        raise UserError(f"config: no file {path}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config: {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"config: {path}{place}: not YAML: {getattr(error, 'problem', error)}") from None
    if tree is not None and not isinstance(tree, dict):
        raise UserError(f"config: {path} holds no keys")
    # Dotted keys are welcome in a file too.
    nested = {key: value for key, value in _nested(tree or {}).items() if value is not None}
    for group in GROUPS:
        if not isinstance(nested.get(group, {}), dict):
            raise UserError(f"{group}: {nested[group]!r} in {path} is not a mapping of its keys")
    return nested


def _nested(flat: Mapping[Any, Any], prefix: str = "") -> Tree:
    tree: Tree = {}
    for key, value in flat.items():
        # A domain's name may hold a dot; only groups and their keys are split.
        head, _, rest = str(key).partition(".")
        if rest and not prefix.startswith((*NAMED, "train")):
            value = {rest: value}
        else:
            head = str(key)
        if isinstance(value, Mapping):
            value = _nested(value, f"{prefix}.{head}".lstrip("."))
        tree[head] = (
            _merge(tree[head], value) if isinstance(tree.get(head), dict) and isinstance(value, dict) else value
        )
    return tree


def _merge(base: Tree, over: Tree, replace: Sequence[str] = (), prefix: str = "") -> Tree:
    merged = dict(base)
    for key, value in over.items():
        path = f"{prefix}{key}"
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value, replace, f"{path}.") if both and path not in replace else value
    return merged


def _get(tree: Tree, key: str) -> Any:
    value: Any = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _with_command_line(tree: Tree, given: Tree) -> Tree:
    """The command line's keys over all else; a key of one domain merges into that domain."""
    for key, value in given.items():
        if key.startswith("data.domains.") and key.count(".") < 2:
            raise UserError(unknown_key(key))
        domains = _get(tree, "data.domains")
        if key.startswith("data.domains."):
            name = key.split(".")[2]
            if isinstance(domains, str) or isinstance(_get(tree, f"data.domains.{name}"), str):
                resolved = resolve_domains(DataConfig(domains=domains))
                # Written out, so that the one key can be put beside the others.
                tree = _merge(tree, {"data": {"domains": {n: dataclasses.asdict(d) for n, d in resolved.items()}}})
        tree = _merge(tree, _chain(key.split("."), value))
    return tree


def _chain(parts: list[str], value: Any) -> Tree:
    return {parts[0]: _chain(parts[1:], value) if len(parts) > 1 else value}


def _explain(error: ValidationError, tree: Tree, group: tuple[str, ...] = ()) -> str:
    """One line for the mistake that is named most exactly. group: where in `tree` pydantic's locations begin."""
    found = [(_path((*group, *e["loc"]), tree), e) for e in error.errors()]
    # Of a short form and a mapping both are tried: what is wrong with the mapping says more than that it is no string.
    path, detail = max(found, key=lambda pair: (len(pair[0]), pair[1]["type"] in ("missing", "value_error")))
    key = ".".join(path)
    if detail["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return unknown_key(key)
    message = detail["msg"].removeprefix("Value error, ")
    if message.startswith(("train.", "unknown key")):
        return message
    message = message[0].lower() + message[1:]
    if detail["type"] == "missing":
        return f"{key}.{detail['loc'][-1]}: is missing"
    shown = "" if isinstance(detail["input"], dict) or detail["type"] == "value_error" else f"{detail['input']!r}: "
    return f"{key}: {shown}{message}"


def _path(location: tuple[Any, ...], tree: Any) -> list[str]:
    """Those parts of pydantic's location that are keys of what was given (the rest names types)."""
    path = []
    for part in location:
        if isinstance(tree, Mapping) and part in tree:
            path.append(str(part))
            tree = tree[part]
        elif part == "arguments":
            continue
    return path


def dump(config: Config) -> Tree:
    """The configuration as plain nested values: what config.yaml holds, and what `--config` reads again."""
    tree: Tree = TypeAdapter(Config).dump_python(config, mode="json")
    train = tree["train"]
    tree["train"] = {"global_batch_size": train["global_batch_size"], **train["arguments"]}
    return tree


def flat(tree: Tree, prefix: str = "") -> Tree:
    """Dotted keys of nested values; lists and empty mappings are values."""
    out: Tree = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def known_keys() -> list[str]:
    """Every key of ours and of TrainingArguments, dotted."""
    ours = [name for name, *_ in (*_fields(Config), *_fields(CompareConfig, COMPARE))]
    return [*ours, "train.global_batch_size", *(f"train.{name}" for name in TRAINER_KEYS)]


def plan_keys() -> list[str]:
    """The keys of `--stage plan`."""
    return [name for name, *_ in _fields(PlanConfig, PLAN)]


def _fields(group: Any, prefix: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """(dotted key, type, default, meaning) of each key of ours, groups expanded."""
    schema = TypeAdapter(group).json_schema()
    hints = typing.get_type_hints(group)
    for f in dataclasses.fields(group):
        kind = hints[f.name]
        if kind is TrainConfig:
            continue
        if dataclasses.is_dataclass(kind):
            yield from _fields(kind, f"{prefix}{f.name}.")
            continue
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        meaning = schema.get("properties", {}).get(f.name, {}).get("description", "")
        yield f"{prefix}{f.name}", _type_name(kind), default, " ".join(meaning.split())


def _type_name(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(a) for a in arguments if a is not type(None))
    if origin in (list, dict):
        return f"{origin.__name__} of {' to '.join(_type_name(a) for a in arguments)}"
    return str(getattr(kind, "__name__", kind))


def help_text(defaults: Mapping[str, Any]) -> str:
    """Every key of ours with type, default (main.py's where it has one) and meaning."""
    lines = ["usage: torchrun --nproc_per_node=GPUS main.py [--config FILE] [--group.key VALUE ...]", ""]
    lines += [f"  --{name}\n      {text}" for name, text in OPTIONS.items()]
    train = next(f for f in dataclasses.fields(TrainConfig) if f.name == "global_batch_size")
    own = [*_fields(PlanConfig, PLAN), *_fields(CompareConfig, COMPARE), *_fields(Config)]
    keys = [*own, ("train.global_batch_size", "int", train.default, TRAIN_HELP)]
    for key, kind, default, meaning in keys:
        default = defaults.get(key, default)
        shown = "none" if default is None else default if default != "" else "''"
        lines.append(f"  --{key}  ({kind}; default {shown})\n      {meaning}")
    lines.append("  --train.NAME\n      any of transformers.TrainingArguments by its own name:")
    lines.append("      https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments")
    return "\n".join(lines)


TRAIN_HELP = "sequences per optimizer step over all processes; gradient accumulation follows from it"
