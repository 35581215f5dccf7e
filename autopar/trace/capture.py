"""`torch.export` on any model, and the errors it gives put into one line."""

import copy
import inspect
import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree  # public form exists only for optree-free trees; stable since torch 2.1
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from autopar.core.collector import collector_paused
from autopar.core.graph import OpGraph
from autopar.errors import TraceError
from autopar.trace.canonical import canonicalise
from autopar.trace.convert import merge_tied, to_op_graph
from autopar.trace.promote import promote_to_float64


class _TensorOutputs(nn.Module):
    """The model with outputs reduced to what holds tensors: caches and other objects are dropped."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _keep_tensors(self.model(*args, **kwargs))


def _keep_tensors(out: Any) -> Any:
    if isinstance(out, torch.Tensor) or out is None:
        return out
    if isinstance(out, dict):
        kept = {k: _keep_tensors(v) for k, v in out.items()}
        kept = {k: v for k, v in kept.items() if v is not None}
        return type(out)(**kept) if hasattr(out, "to_tuple") else kept
    if isinstance(out, (tuple, list)):
        items = [_keep_tensors(v) for v in out]
        return type(out)(*items) if hasattr(out, "_fields") else type(out)(items)
    return None


@dataclass(frozen=True)
class Traced:
    """A traced model: the canonical fx graph, the torch-free graph and how to call it.

    `gm` takes parameters, buffers, constants and inputs flat, in the order of `graph.values` with those roles; `flags` are
    keyword arguments that the trace added;
    `node_of[i]` is the name of the fx node that makes value i.
    """

    gm: GraphModule
    graph: OpGraph
    constants: dict[str, torch.Tensor]
    flags: dict[str, Any]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    node_of: tuple[str, ...]

    def flat_inputs(self, args: tuple, kwargs: dict) -> list[Any]:
        """The tensors of a call, in the order the model was traced; raises TraceError when the structure differs."""
        names = _kwarg_names(self.in_spec)
        given = {k: kwargs.get(k, self.flags.get(k)) for k in names if k in kwargs or k in self.flags}
        flat, spec = pytree.tree_flatten((args, given | {k: v for k, v in kwargs.items() if k not in names}))
        if spec != self.in_spec:
            raise TraceError(f"the model was traced with {self.in_spec.child(0).num_children} positional arguments and {names}, called with {len(args)} and {list(kwargs)}; use the same")
        return [x for x in flat if isinstance(x, torch.Tensor)]


def _kwarg_names(spec: pytree.TreeSpec) -> list[str]:
    return list(spec.child(1).context or [])


@collector_paused()
def trace(model: nn.Module, args: tuple = (), kwargs: dict[str, Any] | None = None, *, name: str = "", float64: bool = False) -> Traced:
    """Trace a model without running it: meta tensors do. Raises TraceError naming the operator and its source line.

    With `float64` every float32 in the graph, literals included, becomes float64.
    """
    kwargs = dict(kwargs or {})
    accepts = inspect.signature(model.forward).parameters
    flags = {"use_cache": False} if "use_cache" in accepts and "use_cache" not in kwargs else {}
    kwargs |= flags
    program = _export(*_on_meta(model, args, kwargs))
    gm = program.graph_module
    merge_tied(program, model)
    canonicalise(gm)
    if float64:
        promote_to_float64(gm)
    graph, node_of = to_op_graph(program, model, name or type(model).__name__)
    constants = {k: v for k, v in program.constants.items() if isinstance(v, torch.Tensor)}
    return Traced(gm, graph, constants, flags, program.call_spec.in_spec, program.call_spec.out_spec, node_of)


def _on_meta(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[nn.Module, tuple, dict[str, Any]]:
    """The same call on the meta device, so that the graph does not depend on where the weights are. No weight is copied."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {}
    for t in tensors:
        if not t.is_meta:
            empty = torch.empty_like(t, device="meta")
            memo[id(t)] = nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty
    shell = copy.deepcopy(model, memo) if memo else model
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda x: torch.empty_like(x, device="meta"), (args, kwargs))
    return shell, args, kwargs


def _export(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> ExportedProgram:
    try:
        with warnings.catch_warnings():
            # torch 2.13 copies the specs it made itself, whose class it calls deprecated
            warnings.filterwarnings("ignore", r".*LeafSpec", FutureWarning)
            return torch.export.export(_TensorOutputs(model), args, kwargs, strict=False).run_decompositions({})
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError, AttributeError, KeyError, IndexError) as error:
        raise TraceError(_explain(model, error)) from error


def _explain(model: nn.Module, error: BaseException) -> str:
    text = str(error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    where = _user_frame(error)
    advice = "give the model a path without data-dependent Python control flow"
    if "data-dependent" in text or "GuardOnDataDependent" in type(error).__name__:
        advice = "replace the branch on tensor values by torch.where, or for mixture-of-experts choose a batched expert implementation"
    elif "not in" in text and "signature" in text or "missing" in text:
        advice = "check the example inputs against the model's forward"
    operator = re.search(r"aten\.[\w.]+|torch\.ops\.[\w.]+", text)
    op = f" in {operator.group(0)}" if operator else ""
    return f"{type(model).__name__} cannot be traced{op}{where}: {first[:240]}; {advice}"


def _user_frame(error: BaseException) -> str:
    found = ""
    tb = error.__traceback__
    while tb is not None:
        path = tb.tb_frame.f_code.co_filename
        if "/torch/" not in path and "/autopar/" not in path and not path.startswith("<"):
            found = f" at {path}:{tb.tb_lineno}"
        tb = tb.tb_next
    return found
