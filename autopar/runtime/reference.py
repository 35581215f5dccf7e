"""One process, whole tensors: the traced graph itself, with the same random draws as the sharded program."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter

from autopar.core.mesh import Mesh
from autopar.runtime import kernels
from autopar.runtime.rank import Rank, Stream


class Reference(Interpreter):
    """Runs a canonical traced graph; `stream` names the random draws."""

    def __init__(self, gm: GraphModule, stream: Stream, device: torch.device | None = None) -> None:
        super().__init__(gm)
        self.rank = Rank(Mesh(()), 0, device or torch.device("cpu"), stream=stream)

    def call_function(self, target: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if "device" in kwargs:
            kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"} | {"device": self.rank.device}
        kind = str(target)
        if kind == "autopar.dropout.default":
            x, p, site = args
            return kernels.dropout(x, self.rank, p, site, list(x.shape), "")
        if kind == "autopar.attention.default":
            q, k, v, mask, p, causal, scale, _, site = args
            return kernels.attention(q, k, v, mask, self.rank, p, causal, scale, site, [*q.shape[:3], k.shape[2]], "")
        return super().call_function(target, args, kwargs)

    def outputs(self, inputs: Sequence[Any]) -> tuple:
        return self.run(*inputs)
