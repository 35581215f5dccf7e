"""autopar: how should this model be parallelized on this cluster? Plans, explains, proves and runs the answer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autopar.api import VerifyReport, parallelize, plan, verify
    from autopar.checkpoint.checkpoint import load_checkpoint, save_checkpoint
    from autopar.checkpoint.weights import load_weights, save_weights
    from autopar.core.cluster import Cluster
    from autopar.core.mixed import MixedCluster
    from autopar.core.plan import Plan
    from autopar.core.residency import Precision
    from autopar.core.schedule import Schedule

__version__ = "0.1.0"

_HOME = {
    "Cluster": "autopar.core.cluster",
    "MixedCluster": "autopar.core.mixed",
    "Plan": "autopar.core.plan",
    "Precision": "autopar.core.residency",
    "Schedule": "autopar.core.schedule",
    "plan": "autopar.api",
    "parallelize": "autopar.api",
    "verify": "autopar.api",
    "VerifyReport": "autopar.verification",
    "save_checkpoint": "autopar.checkpoint.checkpoint",
    "load_checkpoint": "autopar.checkpoint.checkpoint",
    "save_weights": "autopar.checkpoint.weights",
    "load_weights": "autopar.checkpoint.weights",
}

__all__ = ["Cluster", "MixedCluster", "Plan", "Precision", "Schedule", "VerifyReport", "load_checkpoint", "load_weights", "parallelize", "plan", "save_checkpoint", "save_weights", "verify"]


def __getattr__(name: str) -> Any:
    """Public names load what they need when first used, so that `import autopar` does not import torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'autopar' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
