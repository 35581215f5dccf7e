"""What a rank computes once a step because it is the same for every microbatch: masks, tables of positions."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from autopar.runtime.built import Built


class Lasting:
    """The tensors of all stages of a rank, by what they stand for (`Program.once`): what several stages read is there once."""

    def __init__(self) -> None:
        self._found: dict[Hashable, dict[Hashable, torch.Tensor]] = {}

    def clear(self) -> None:
        """Another step begins; buffers may have been changed since the last."""
        self._found.clear()

    def of(self, built: Built, given: Sequence[Any]) -> list[torch.Tensor]:
        """What a stage computes once, from the rank and the values that it takes; computed where it is not there."""
        there = self._found.setdefault(built.once if built.once_alone else None, {})
        kept = [node.meta["same"] for node in built.once.graph.output_node().args[0]]
        if any(same not in there for same in kept):
            with torch.no_grad():
                there.update(zip(kept, _Missing(built.once, there).run(*given), strict=True))
        return [there[same] for same in kept]


class _Missing(Interpreter):
    """Runs what leads to results that are not there yet."""

    def __init__(self, once: GraphModule, there: Mapping[Hashable, torch.Tensor]) -> None:
        super().__init__(once)
        self.there, self.needed = there, set[Node]()
        for node in reversed(once.graph.nodes):
            if node.op == "output" or (node in self.needed and node.meta.get("same") not in there):
                self.needed.update(node.all_input_nodes)

    def run_node(self, n: Node) -> Any:
        if n.op in ("placeholder", "output"):
            return super().run_node(n)
        same = n.meta.get("same")
        return self.there[same] if same in self.there else super().run_node(n) if n in self.needed else None
