"""Small deep transformers whose graphs are made without tracing."""

from collections.abc import Callable, Iterator

from autopar.core.cluster import Cluster
from autopar.core.graph import OpGraph
from autopar.core.residency import Precision
from autopar.core.unroll import Run
from autopar.forecast.transformer import Dims, transformer_graph
from autopar.joint.at_point import PointSearch
from autopar.joint.search import JointSearch
from autopar.planner.pins import parse_pins
from autopar.planner.search import Options
from autopar.program import Program

LLAMA = Dims(
    layers=7, hidden=4096, heads=32, kv_heads=8, inner=14336, vocab=32000, seq=4096, norm="rms", activation="swiglu", positions="rotary", biases=False, tied=False
)  # fmt: skip
GPT = Dims(layers=9, hidden=2048, heads=16, kv_heads=16, inner=8192, vocab=51200, seq=1024, norm="layer", activation="gelu", positions="learned", biases=True, tied=True)


def graphs(dims: Dims, layers: int = 3) -> Callable[[int], OpGraph]:
    return lambda samples: transformer_graph(dims.with_layers(layers), samples, "bfloat16")


def joint_search(dims: Dims, cluster: Cluster, batch: int, pins: tuple[str, ...] = (), memory_share: float = 0.9, **given: object) -> JointSearch:
    options = Options(precision=Precision(master="float32"), memory_share=memory_share, free_micro_batches=True)
    return JointSearch(graphs(dims), Run("blocks", 0, dims.layers), batch, cluster, options, parse_pins(pins), **given)


def programs(search: PointSearch) -> Iterator[Program]:
    """The shardings that a point's plans are made of."""
    return (search.tables.sharding(choices).cut.program for choices in search.tables.chosen(search.first()))
