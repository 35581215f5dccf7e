"""A program as modules that run: what a step computes once, and what it computes for every microbatch."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import GraphModule


@dataclass(frozen=True)
class Built:
    """`module`: what a microbatch runs; its placeholders are `mesh`, the values `inputs`, and what `once` returns, which is computed from the values
    `once_inputs` before the first microbatch of a step. `once_alone`: no other stage has any of that from here.
    `positions`: by segment those of gathered parameters."""

    module: GraphModule
    inputs: tuple[int, ...]
    positions: Mapping[int, Mapping[int, int]]
    once: GraphModule
    once_inputs: tuple[int, ...]
    once_alone: bool = False

    @property
    def code(self) -> str:
        """As text: what is computed once, the top level and every distinct block."""
        once = [self.once] if any(node.op == "call_function" for node in self.once.graph.nodes) else []
        return "\n".join(part.code.strip() for part in (*once, self.module, *self.module.children()))
