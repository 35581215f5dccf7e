"""One search over everything for deep models: stages, meshes, sharding, state sharding, recomputation, microbatches and schedules together, with a bound."""
