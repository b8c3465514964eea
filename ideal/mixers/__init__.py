"""Mixers: methods that turn what is known after a round into the next ratios."""

from ideal.mixers.base import Controller, Mixer, MixingConfig, RoundResult, Setup, Step
from ideal.mixers.ideal import Ideal
from ideal.mixers.static import Joint, Uniform

MIXERS: dict[str, type[Mixer]] = {"ideal": Ideal, "joint": Joint, "uniform": Uniform}

__all__ = ["MIXERS", "Controller", "Mixer", "MixingConfig", "RoundResult", "Setup", "Step"]
