"""The `data.` group of the configuration."""

import difflib
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import AfterValidator, Field

from ideal.scoring.scorers import SCORERS
from ideal.settings import STRICT

NO_REFERENCE = "none"


@dataclass
class SourceConfig:
    """One source of rows, written out; the short form is a string, `PATH` or `PATH:SPLIT`."""

    __pydantic_config__ = STRICT

    path: str
    """A local file or folder, or a data set on the hub (owner/dataset)."""
    name: str | None = None
    """The hub data set's configuration, such as `main` of openai/gsm8k."""
    split: str | None = None
    """The split, slices included: `train`, `train[:500]`, `train[10%:20%]`."""


Source = str | SourceConfig


def _known_scorer(name: str) -> str:
    if name not in SCORERS:
        near = difflib.get_close_matches(name, SCORERS, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(SCORERS)}"
        raise ValueError(f"there is no scorer {name!r}{hint}")
    return name


Scorer = Annotated[str, AfterValidator(_known_scorer)]


@dataclass
class DomainConfig:
    """One domain of the mixture and the capability of the same name."""

    __pydantic_config__ = STRICT

    train: Source
    """The rows to train on: a file, a folder, or a hub data set (owner/dataset:split)."""
    reference: Source | None = None
    """The rows that measure the capability; left out: a cut of the domain is held out; the word `none`: the
    domain has no capability of its own."""
    test: Source | None = None
    """Rows that are only reported, never used for choosing."""
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """The capability's weight in the objective, relative to the others'."""
    ratio: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """The start ratio: size in the first mixture / size of the pool."""
    least_ratio: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """No mixture holds less of the domain than this ratio."""
    most_ratio: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """No mixture holds more of the domain than this ratio."""
    most_repeats: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """No example is seen more often than this in a round: ratio x epochs."""
    pinned: bool = False
    """Whether the domain keeps its start ratio."""
    format: str | None = None
    """The rows' format; left out: told from the columns."""
    columns: dict[str, str] = field(default_factory=dict)
    """The format's (and the scorer's) fields and the columns that hold them, such as {prompt: task}."""
    scorer: Scorer | None = None
    """How answers to the reference and test rows are scored (evaluation.generate); left out: they are not."""

    def __post_init__(self) -> None:
        if self.reference == NO_REFERENCE and self.test is not None:
            raise ValueError(
                "a test set needs a capability: give a reference set too, or put both under data.capabilities"
            )
        if self.least_ratio is not None and self.most_ratio is not None and self.least_ratio > self.most_ratio:
            raise ValueError(f"least_ratio ({self.least_ratio:g}) is above most_ratio ({self.most_ratio:g})")
        if self.pinned and self.limits:
            raise ValueError(f"pinned keeps the start ratio; leave out {' and '.join(self.limits)}")

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are given, by their keys; not `pinned`."""
        given = {"least_ratio": self.least_ratio, "most_ratio": self.most_ratio, "most_repeats": self.most_repeats}
        return {key: value for key, value in given.items() if value is not None}


@dataclass
class CapabilityConfig:
    """A capability without a domain of its own."""

    __pydantic_config__ = STRICT

    reference: Source
    """The rows that measure the capability."""
    test: Source | None = None
    """Rows that are only reported, never used for choosing."""
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """The capability's weight in the objective, relative to the others'."""
    domain: str | None = None
    """The domain that is known to serve it, if one is; used where given, never needed."""
    format: str | None = None
    """The rows' format; left out: told from the columns."""
    columns: dict[str, str] = field(default_factory=dict)
    """The format's (and the scorer's) fields and the columns that hold them."""
    scorer: Scorer | None = None
    """How answers to the reference and test rows are scored (evaluation.generate); left out: they are not."""


@dataclass
class DataConfig:
    """What is trained on and what it is measured by."""

    __pydantic_config__ = STRICT

    domains: dict[str, str | DomainConfig] | str | None = None
    """The domains by name: each a folder with train.*, reference.* and test.*, or a mapping with train,
    reference, test, weight, ratio, format, columns, scorer (number, option, exact, unit_tests, instructions or choice:
    see evaluation.generate), and limits: least_ratio, most_ratio (size / pool), most_repeats (how often a round may
    show an example), pinned (true: keeps its start ratio). Or one folder with a sub-folder per domain. Left out: the
    demo."""
    capabilities: dict[str, CapabilityConfig] = field(default_factory=dict)
    """Capabilities without a domain of their own, by name: reference, test, weight, domain (the one that is known to
    serve it), format, columns, scorer."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Longer examples are cut off at this many tokens."""
    max_examples: Annotated[int, Field(ge=8)] | None = None
    """At most so many examples of every pool, reference and test set, drawn at random by the seed."""
    drop_reference_copies: bool = True
    """Whether examples that also stand in a reference or test set are left out of training."""
