"""The influence of the domains' volumes on the reference losses: model and sequences in, M out.

Knows nothing of training, mixtures or files, so any training script can call it.
"""

from ideal.influence.api import influence_of
from ideal.influence.config import InfluenceConfig
from ideal.influence.engine import compute_influence
from ideal.influence.matrix import fixed_form, objective
from ideal.influence.result import Influence
from ideal.influence.samples import DomainSample, Examples

__all__ = [
    "DomainSample",
    "Examples",
    "Influence",
    "InfluenceConfig",
    "compute_influence",
    "fixed_form",
    "influence_of",
    "objective",
]
