"""Imports every rule family, so that importing this module registers all rules."""

from autopar.rules import attention, contraction, creation, indexing, mixture, pointwise, reduction, shape

FAMILIES = (attention, contraction, creation, indexing, mixture, pointwise, reduction, shape)
