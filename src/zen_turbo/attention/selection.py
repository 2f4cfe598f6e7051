"""Policies by name, as a configuration asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zen_turbo.attention.fidelity import Select
from zen_turbo.attention.policies import adaptive, flexprefill, minference, tri_shape, xattention
from zen_turbo.attention.policies.adaptive import AdaptiveSettings


def policy_of(
    name: str, *, preset: str, mass: float | None, sparse_attention: Mapping[str, Any] | None
) -> AdaptiveSettings | Select:
    """What ``Fidelity`` takes. preset and mass are for the adaptive policy, sparse_attention (a checkpoint's own section) for minference.
    Raises KeyError for a policy that is not sparse or not known, UnsupportedModelError for a section that minference cannot read."""
    if name == "adaptive":
        return adaptive.settings_of(preset, mass)
    budgets = minference.budgets_of((sparse_attention or {}).get("sparse_attention_config")) if name == "minference" else {}
    policies: dict[str, Select] = {
        "minference": lambda chunk, layer: minference.select(chunk, layer, minference.MinferenceSettings(budgets=budgets)),
        "flexprefill": lambda chunk, layer: flexprefill.select(chunk, flexprefill.FlexPrefillSettings()),
        "xattention": lambda chunk, layer: xattention.select(chunk, xattention.XAttentionSettings()),
        "tri_shape": lambda chunk, layer: tri_shape.select(chunk, tri_shape.TriShapeSettings()),
    }
    return policies[name]
