"""From a program (a plan bound to a graph) to fx modules over local shards with explicit collectives."""
