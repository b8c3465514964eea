"""`compare.*`: which runs a comparison is made of. They belong to the command and not to a run's configuration."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from ideal.settings import STRICT


@dataclass
class CompareConfig:
    """`compare.*`: what `--stage compare` runs besides joint, which is always run."""

    __pydantic_config__ = STRICT

    methods: Annotated[list[str], Field(min_length=1)] | None = None
    """names of mixing methods; none: every one that the data and the other keys allow"""
    seeds: Annotated[int, Field(ge=1)] | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = 3
    """a list of seeds, or how many, counted from seed on"""
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    """mixing keys of single methods, {regmix: {rounds: 40}}; all else is the same for all"""

    def seed_list(self, first: int) -> list[int]:
        """The seeds, each once; a count begins at `first`."""
        if isinstance(self.seeds, int):
            return list(range(first, first + self.seeds))
        return list(dict.fromkeys(self.seeds))
