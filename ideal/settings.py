"""How the configuration dataclasses of all groups are checked."""

from pydantic import ConfigDict

# Unknown keys are refused, and the docstring under a field is its text in --help. Set as
# `__pydantic_config__` on a standard dataclass; ideal/config.py validates all groups at once.
STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True, allow_inf_nan=False)
