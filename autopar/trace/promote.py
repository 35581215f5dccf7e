"""Float64 copies of traced graphs: models hard-code float32 in places, which would hide small errors from a float64 oracle."""

from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node


class _Repropagate(Interpreter):
    """Recomputes `meta["val"]` of every node on the meta device."""

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function":
            n.meta["val"] = result
        return result


def promote_to_float64(gm: GraphModule) -> None:
    """Replace every float32 literal by float64 and recompute all shapes and dtypes."""

    def wider(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.args = tuple(wider(a) for a in node.args)
            node.kwargs = {k: wider(a) for k, a in node.kwargs.items()}
        elif node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor):
            val = node.meta["val"]
            dtype = torch.float64 if val.dtype == torch.float32 else val.dtype
            node.meta["val"] = torch.empty(val.shape, dtype=dtype, device="meta")
    gm.recompile()
    inputs = [n.meta.get("val") for n in gm.graph.nodes if n.op == "placeholder"]
    with torch.no_grad():
        _Repropagate(gm).run(*inputs)
