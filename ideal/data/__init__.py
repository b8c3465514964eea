"""Data: files and hub data sets of any usual format -> encoded examples with labels, and a report on them."""

from ideal.data.config import CapabilityConfig, DataConfig, DomainConfig, SourceConfig
from ideal.data.encoding import ExampleSet, collate, ensure_chat_template
from ideal.data.loading import Data, load_data

__all__ = [
    "CapabilityConfig",
    "Data",
    "DataConfig",
    "DomainConfig",
    "ExampleSet",
    "SourceConfig",
    "collate",
    "ensure_chat_template",
    "load_data",
]
