"""Mixers: methods that turn what is known after a round into the next ratios."""

from ideal.mixers.aioli import Aioli
from ideal.mixers.base import Mixer, MixingConfig, RoundResult, Setup, Step
from ideal.mixers.controller import Controller
from ideal.mixers.doge import Doge
from ideal.mixers.doremi import Doremi
from ideal.mixers.ideal import Ideal
from ideal.mixers.loss import Loss
from ideal.mixers.odm import Odm
from ideal.mixers.power_law import PowerLaw
from ideal.mixers.random import Random
from ideal.mixers.regmix import RegMix
from ideal.mixers.skillit import Skillit
from ideal.mixers.specific import Specific
from ideal.mixers.static import Joint, Temperature, Uniform

MIXERS: dict[str, type[Mixer]] = {
    "ideal": Ideal,
    "joint": Joint,
    "uniform": Uniform,
    "temperature": Temperature,
    "loss": Loss,
    "power_law": PowerLaw,
    "specific": Specific,
    "random": Random,
    "regmix": RegMix,
    "doremi": Doremi,
    "doge": Doge,
    "odm": Odm,
    "skillit": Skillit,
    "aioli": Aioli,
}

__all__ = ["MIXERS", "Controller", "Mixer", "MixingConfig", "RoundResult", "Setup", "Step"]
