"""Data: files and hub data sets of any usual format -> encoded examples with labels, and a report on them."""

from ideal.data.config import CapabilityConfig, DataConfig, DomainConfig, SourceConfig
from ideal.data.encoding import ExampleSet, collate, ensure_chat_template
from ideal.data.loading import Data, load_data
from ideal.data.tasks import ScoredRow, ScoredSet

__all__ = [
    "CapabilityConfig",
    "Data",
    "DataConfig",
    "DomainConfig",
    "ExampleSet",
    "ScoredRow",
    "ScoredSet",
    "SourceConfig",
    "collate",
    "ensure_chat_template",
    "load_data",
]
