"""A plan: every decision, as a value that can be compared, printed, saved as JSON and read back."""

import json
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from autopar.core.layout import Layout, parse_placement
from autopar.core.memory import MemoryUse
from autopar.core.mesh import Mesh, MeshAxis
from autopar.core.pipeline import PP, Pipeline, StagePrediction
from autopar.core.residency import Precision, Residency
from autopar.core.units import size
from autopar.core.zero import Zero
from autopar.errors import FileFormatError, LayoutError, PlanMismatchError, UsageError

SCHEMA_VERSION = 4
MAX_FILE_BYTES = 64 << 20
MAX_RANKS = 1 << 24


@dataclass(frozen=True)
class Prediction:
    """What the cost model expects of one training step on one rank. `recomputed_flops`: of contractions done a second time;
    `peak_memory_bytes`: the upper end of `memory`, which is what a device must have. Of a pipeline: the rank that computes longest, the
    memory of the fullest, the bytes of that which receives most; `bubble`: share of the step that a rank is idle, all ranks together."""

    step_time_s: float
    compute_s: float
    communication_s: float
    peak_memory_bytes: int
    communicated_bytes: int
    recomputed_flops: float = 0.0
    tokens_per_s: float = 0.0
    mfu: float = 0.0
    memory: MemoryUse = MemoryUse(moment="unknown")
    bubble: float = 0.0
    stages: tuple[StagePrediction, ...] = ()


@dataclass(frozen=True)
class Proof:
    """How good the plan is within the space that was searched: no plan costs less than `bound` seconds."""

    objective: float
    bound: float
    gap: float
    solver: str
    status: str


@dataclass(frozen=True)
class Plan:
    """Decisions by name: strategies of ops, storage layouts of parameters, routes of values.

    `ops`: (op name, strategy); `params`: (parameter name, layout); `relays` and `routes`: the layouts a value passes
    through, written `dp=S0,tp=P > dp=S0,tp=I`. Layouts are tuples of placements, one per mesh axis.
    """

    graph_digest: str
    model: str
    cluster: str
    mesh: Mesh
    ops: tuple[tuple[str, str], ...]
    params: tuple[tuple[str, Layout], ...]
    relays: tuple[tuple[str, tuple[Layout, ...]], ...]
    routes: tuple[tuple[str, tuple[Layout, ...]], ...]
    predicted: Prediction
    proof: Proof
    residency: Residency[str] = Residency()
    pipeline: Pipeline | None = None
    notes: tuple[str, ...] = ()
    schema_version: int = field(default=SCHEMA_VERSION)

    def to_json(self) -> str:
        """Canonical JSON: the same plan gives the same bytes."""
        data = {
            "schema_version": self.schema_version,
            "model": self.model,
            "graph_digest": self.graph_digest,
            "cluster": self.cluster,
            "mesh": [[axis.name, axis.size] for axis in self.mesh.axes],
            "predicted": asdict(self.predicted),
            "proof": asdict(self.proof),
            "notes": list(self.notes),
            "residency": _residency_data(self.residency, self.mesh),
            "pipeline": None if self.pipeline is None else _pipeline_data(self.pipeline),
            "params": {name: _text(layout) for name, layout in self.params},
            "ops": dict(self.ops),
            "relays": {name: _route_text(route) for name, route in self.relays},
            "routes": {name: _route_text(route) for name, route in self.routes},
        }
        return json.dumps(data, indent=1)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan file; raises FileFormatError with what is wrong and where."""
        file = Path(path)
        try:
            if file.stat().st_size > MAX_FILE_BYTES:
                raise FileFormatError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB; this is not a plan")
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise FileFormatError(f"{path}: {error.strerror or error}; give the path of a plan written by `autopar plan -o`") from error
        except UnicodeDecodeError as error:
            raise FileFormatError(f"{path}: not UTF-8 text; give a plan written by `autopar plan -o`") from error
        return cls.from_json(text, str(path))

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> "Plan":
        try:
            data = json.loads(text, parse_constant=_refuse_constant)
        except (json.JSONDecodeError, RecursionError, ValueError) as error:
            raise FileFormatError(f"{where}: not JSON ({str(error)[:120]}); write plans with `autopar plan -o`") from error
        if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
            found = data.get("schema_version") if isinstance(data, dict) else None
            raise FileFormatError(f"{where}: schema_version {found!r}, this autopar reads {SCHEMA_VERSION}; plan again with `autopar plan`")
        try:
            return cls._from_dict(data)
        except (KeyError, TypeError, ValueError, AttributeError, LayoutError, UsageError) as error:
            what = f"missing {error}" if isinstance(error, KeyError) else str(error)[:160]
            raise FileFormatError(f"{where}: not a valid plan ({what}); plan again with `autopar plan`") from error

    @classmethod
    def _from_dict(cls, data: dict[str, Any]) -> "Plan":
        mesh = Mesh(tuple(MeshAxis(_str(name), _count(size)) for name, size in data["mesh"]))
        n = len(mesh.axes)
        plan = cls(
            graph_digest=_str(data["graph_digest"]),
            model=_str(data["model"]),
            cluster=_str(data["cluster"]),
            mesh=mesh,
            ops=tuple((_str(k), _str(v)) for k, v in data["ops"].items()),
            params=tuple((_str(k), _layout(v, n)) for k, v in data["params"].items()),
            relays=tuple((_str(k), _route(v, n)) for k, v in data["relays"].items()),
            routes=tuple((_str(k), _route(v, n)) for k, v in data["routes"].items()),
            predicted=_prediction(data["predicted"]),
            proof=Proof(**_numbers(data["proof"], Proof)),
            residency=_residency(data["residency"], mesh),
            pipeline=_pipeline(data["pipeline"], n),
            notes=tuple(_str(x) for x in data["notes"]),
        )
        if plan.num_ranks > MAX_RANKS:
            raise ValueError(f"{plan.num_ranks} ranks; at most {MAX_RANKS}")
        return plan

    @property
    def whole_mesh(self) -> Mesh:
        """The mesh of all ranks."""
        return self.mesh if self.pipeline is None else self.pipeline.whole_mesh(self.mesh)

    @property
    def num_ranks(self) -> int:
        return self.whole_mesh.num_ranks

    def check_graph(self, digest: str, model: str) -> None:
        """Raise PlanMismatchError unless the plan was made for the graph with this digest."""
        if digest != self.graph_digest:
            raise PlanMismatchError(
                f"the plan was made for {self.model} (graph {self.graph_digest}), not for {model} (graph {digest}) at these input shapes and dtypes; "
                "plan again with the same model, batch, sequence length and dtype"
            )

    def summary(self) -> str:
        """The layout as people say it: `dp4(zero3) x tp2, recompute 8/32, 2 microbatches`."""
        stages = {a: max(z.stage for z in self.residency.zero.values() if a in z.axes) for z in self.residency.zero.values() for a in z.axes}
        axes = [f"{axis.name}{axis.size}" + (f"(zero{stages[a]})" if a in stages else "") for a, axis in enumerate(self.mesh.axes)]
        if self.pipeline is not None:
            axes = [text if axis.size > 1 else "" for text, axis in zip(axes, self.mesh.axes)]
            axes.insert(self.pipeline.position, _axis(self.pipeline))
        extras = [f"recompute {list(self.residency.recompute.values()).count(mode)} {mode}" for mode in sorted(set(self.residency.recompute.values()))]
        if self.residency.micro_batches > 1:
            extras.append(f"{self.residency.micro_batches} microbatches")
        if self.residency.offload:
            extras.append("optimizer state on the host")
        return ", ".join([" x ".join(filter(None, axes)) or "1", *extras])

    def __str__(self) -> str:
        p = self.predicted
        return (
            f"{self.model} on {self.cluster}: {self.summary()}, predicted {p.step_time_s * 1e3:.1f} ms/step, "
            f"{size(p.peak_memory_bytes)}, gap {self.proof.gap:.2%} ({self.proof.status})"
        )


def _axis(pipeline: Pipeline) -> str:
    """`pp4(1f1b)`, `pp2(interleaved v2)`; of copies of the model their shares of the microbatches, `shares(5+11)`, `shares(2x5+2x11)`."""
    if pipeline.shares:
        runs = [(share, len(list(run))) for share, run in groupby(pipeline.shares)]
        return f"shares({'+'.join(f'{count}x{share}' if count > 1 else str(share) for share, count in runs)})"
    return f"{PP}{pipeline.num_ranks}({pipeline.schedule}{f' v{pipeline.virtual_stages}' if pipeline.virtual_stages > 1 else ''})"


def _pipeline_data(pipeline: Pipeline) -> dict[str, Any]:
    data = asdict(pipeline)
    return {name: value for name, value in data.items() if name not in ("places", "shares") or value}


def _pipeline(data: Any, num_axes: int) -> Pipeline | None:
    if data is None:
        return None
    position = data["position"]
    if not isinstance(position, int) or isinstance(position, bool) or not 0 <= position <= num_axes:
        raise ValueError(f"position {str(position)[:60]!r} of the pipeline's axis")
    places = tuple(_str(x) for x in data.get("places", ()))
    shares = tuple(_count(x) for x in data.get("shares", ()))
    return Pipeline(_count(data["num_ranks"]), tuple(_str(x) for x in data["starts"]), _str(data["schedule"]), position, places, shares)


def _residency_data(residency: Residency[str], mesh: Mesh) -> dict[str, Any]:
    return {
        "zero": {name: f"{z.stage} {'+'.join(mesh.names[a] for a in z.axes)}" for name, z in residency.zero.items()},
        "recompute": dict(residency.recompute),
        "micro_batches": residency.micro_batches,
        "precision": asdict(residency.precision),
        "offload": residency.offload,
    }


def _residency(data: dict[str, Any], mesh: Mesh) -> Residency[str]:
    zero = {}
    for name, text in data["zero"].items():
        stage, _, axes = _str(text).partition(" ")
        if stage not in ("1", "2", "3") or any(a not in mesh.names for a in axes.split("+")):
            raise ValueError(f"zero {text!r} of {name!r} is not STAGE AXIS+AXIS")
        zero[_str(name)] = Zero(int(stage), tuple(sorted(mesh.names.index(a) for a in axes.split("+"))))
    if not isinstance(data["offload"], bool):
        raise ValueError(f"offload is {str(data['offload'])[:60]!r}")
    precision = Precision(**{_str(k): None if v is None else _str(v) for k, v in data["precision"].items()})
    recompute = {_str(k): _str(v) for k, v in data["recompute"].items()}
    return Residency(zero=zero, recompute=recompute, micro_batches=_count(data["micro_batches"]), precision=precision, offload=data["offload"])


def _prediction(data: Any) -> Prediction:
    numbers = {name: value for name, value in data.items() if name not in ("memory", "stages")}
    stages = tuple(StagePrediction(**_numbers(stage, StagePrediction)) for stage in data.get("stages", ()))
    return Prediction(**_numbers(numbers, Prediction), memory=MemoryUse(**_numbers(data["memory"], MemoryUse)), stages=stages)


def _text(layout: Layout) -> str:
    return ",".join(str(p) for p in layout)


def _route_text(route: tuple[Layout, ...]) -> str:
    return " > ".join(_text(layout) for layout in route)


def _layout(text: str, num_axes: int) -> Layout:
    layout = tuple(parse_placement(item) for item in _str(text).split(",")) if text else ()
    if len(layout) != num_axes:
        raise ValueError(f"layout {text!r} has {len(layout)} placements, the mesh {num_axes} axes")
    return layout


def _route(text: str, num_axes: int) -> tuple[Layout, ...]:
    return tuple(_layout(item, num_axes) for item in _str(text).split(" > "))


def _str(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 100_000:
        raise ValueError(f"expected text, found {str(value)[:60]!r}")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_RANKS:
        raise ValueError(f"expected a positive number, found {str(value)[:60]!r}")
    return value


def _numbers(data: Any, kind: type) -> dict[str, Any]:
    fields = kind.__dataclass_fields__
    unknown = set(data) - set(fields)
    if unknown:
        raise ValueError(f"unknown key {sorted(unknown)[0]!r} in {kind.__name__.lower()}")
    for name, value in data.items():
        wanted = (str,) if fields[name].type in (str, "str") else (int, float)
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise ValueError(f"{kind.__name__.lower()}.{name} is {str(value)[:60]!r}")
    return dict(data)


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a finite number")
