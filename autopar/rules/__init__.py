"""Sharding rules of ATen operators. `registry.rule_of` is the only entry; the families register on import."""
