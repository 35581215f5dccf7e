"""Imports every rule family, so that importing this module registers all rules."""

from autopar.rules import attention, contraction, creation, indexing, pointwise, reduction, shape

FAMILIES = (attention, contraction, creation, indexing, pointwise, reduction, shape)
