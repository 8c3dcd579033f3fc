"""Pipeline families: what a flow policy has to know about one architecture, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from mmgrpo.errors import ModelError, nearest
from mmgrpo.policies.flow_families.base import Family

FAMILIES: Mapping[str, str] = MappingProxyType(
    {
        "StableDiffusion3Pipeline": "mmgrpo.policies.flow_families.sd3:SD3",
        "FluxPipeline": "mmgrpo.policies.flow_families.flux:Flux",
        "StableDiffusionPipeline": "mmgrpo.policies.flow_families.sd15:SD15",
        "StableDiffusionXLPipeline": "mmgrpo.policies.flow_families.sdxl:SDXL",
        "QwenImagePipeline": "mmgrpo.policies.flow_families.qwen_image:QwenImage",
        "FluxKontextPipeline": "mmgrpo.policies.flow_families.flux_kontext:FluxKontext",
        "WanPipeline": "mmgrpo.policies.flow_families.wan:Wan",
    }
)
"""Name of the diffusers pipeline class -> ``module:class`` of its family."""


def check_family(name: str) -> None:
    """Refuse a pipeline class that has no family.

    Raises:
        ModelError: naming the ones there are.
    """
    if name not in FAMILIES:
        raise ModelError(f"A pipeline of class {name} cannot be trained{nearest(name, FAMILIES)}")


def family_class(name: str) -> type[Family]:
    """Return the family of a pipeline class.

    Raises:
        ModelError: there is none.
    """
    check_family(name)
    module, _, attribute = FAMILIES[name].partition(":")
    family: type[Family] = getattr(import_module(module), attribute)
    return family


def family_of(pipe: Any) -> Family:
    """Return the family of a diffusers pipeline.

    Raises:
        ModelError: there is none, or a component is missing or unusable.
    """
    return family_class(type(pipe).__name__)(pipe)
