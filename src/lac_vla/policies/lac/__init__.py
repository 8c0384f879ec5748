"""LAC, the learned policy (arXiv 2602.00686): :class:`LACPolicy`, its configuration and its two networks."""

from lac_vla.policies.lac.config import LACConfig
from lac_vla.policies.lac.deltas import Deltas
from lac_vla.policies.lac.networks import Predictor, Selector
from lac_vla.policies.lac.policy import POLICY_FILES, SUBFOLDER, LACPolicy

__all__ = ["POLICY_FILES", "SUBFOLDER", "Deltas", "LACConfig", "LACPolicy", "Predictor", "Selector"]
