"""Saved under one layout, loaded under another: every bit comes back, whatever the two cuts are. Ranks are simulated one after the other."""

import json
import math
import random
import resource
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.checkpoint.folder import MANIFEST, begin, checkpoints, commit, write_rank
from autopar.checkpoint.held import Held, Place
from autopar.checkpoint.manifest import Manifest, TensorEntry
from autopar.checkpoint.part import Run, fits, num_elements, overlaps, part_shape, runs_of, stored_part, whole
from autopar.checkpoint.reader import DTYPES, Reader
from autopar.checkpoint.tree import Encoder, decode
from autopar.core.layout import I, Layout, S, shard_index
from autopar.core.mesh import Mesh
from autopar.errors import FileFormatError, LayoutError
from autopar.runtime.weights import shard
from tests.harness import mesh_of

DTYPE_LIST = sorted(DTYPES)
SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def random_layout(rng: random.Random, mesh: Mesh, shape: tuple[int, ...]) -> Layout:
    """Any cut that divides the shape, fused projections' included."""
    for _ in range(20):
        layout = tuple(rng.choice([I, *(S(d, k) for d in range(len(shape)) for k in (1, 1, 2, 3))]) for _ in mesh.axes)
        try:
            if all(len(n) for n in shard_index(layout, mesh, mesh.coordinates(0), shape)) or not shape:
                return layout
        except LayoutError:
            continue
    return (I,) * len(mesh.axes)


def random_tensor(rng: random.Random) -> torch.Tensor:
    """Random bytes of any dtype: NaNs with a payload must survive too."""
    shape = tuple(rng.choice([1, 2, 6, 12, 24]) for _ in range(rng.randrange(4)))
    dtype = DTYPES[rng.choice(DTYPE_LIST)]
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))
    return data.view(dtype).reshape(shape)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def held(x: torch.Tensor, layout: Layout, mesh: Mesh, rank: int) -> Held:
    """What a rank has of a whole tensor."""
    point = mesh.coordinates(rank)
    number = 0
    for place, size, p in zip(point, mesh.sizes, layout):
        number = number * size + place if p == I else number
    replicas = Place(number, math.prod(size for size, p in zip(mesh.sizes, layout) if p == I))
    local = shard(x.view(SAME_SIZE[x.dtype.itemsize]), layout, mesh, point).view(x.dtype)  # index_select does not know every dtype
    return Held(local, tuple(x.shape), stored_part(layout, mesh, point, tuple(x.shape)), replicas)


def save(folder: Path, tensors: list[torch.Tensor], layouts: list[Layout], mesh: Mesh) -> Path:
    stage = begin(folder)
    for rank in range(mesh.num_ranks):
        encoder = Encoder(lambda x: Held(x, tuple(x.shape), whole(x.shape), Place(0, 1)))
        values = encoder.encode([held(x, layout, mesh, rank) for x, layout in zip(tensors, layouts)], "tensors")
        write_rank(stage, rank, {"tensors": values}, encoder.tensors)
    return commit(stage, mesh.num_ranks)


def random_mesh(rng: random.Random) -> Mesh:
    return mesh_of(*rng.choice([(1,), (2,), (8,), (2, 4), (4, 2), (2, 3), (2, 2, 2)]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30))
def test_any_layout_into_any_other(seed: int) -> None:
    rng = random.Random(seed)
    tensors = [random_tensor(rng) for _ in range(4)]
    first, second = random_mesh(rng), random_mesh(rng)
    with tempfile.TemporaryDirectory() as name:
        path = save(Path(name), tensors, [random_layout(rng, first, tuple(x.shape)) for x in tensors], first)
        manifest = Manifest.load(path / MANIFEST)
        keys = [ref.key for ref in decode(manifest.values["tensors"])]
        with Reader(path, manifest.tensors) as reader:
            for key, x in zip(keys, tensors, strict=True):
                assert torch.equal(bits(reader.read(key)), bits(x))
                layout = random_layout(rng, second, tuple(x.shape))
                for rank in range(second.num_ranks):
                    want = held(x, layout, second, rank)
                    into = Held(torch.zeros_like(want.local), want.shape, want.part, want.replicas)
                    reader.read_held(key, into)
                    assert torch.equal(bits(into.local), bits(want.local))


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)))
def test_overlaps_are_the_common_indices(a: set[int], b: set[int]) -> None:
    held_part, wanted = (runs_of(sorted(a)),), (runs_of(sorted(b)),)
    assert part_shape(held_part) == (len(a),) and fits(held_part, (31,))
    found = {}
    for (source,), (target,) in overlaps(held_part, wanted):
        found |= dict(zip(sorted(a)[source], sorted(b)[target], strict=True))
    assert found == {i: i for i in a & b}


@pytest.mark.parametrize("part,shape", [(((Run(0, 3),),), (2,)), (((Run(1, 1), Run(0, 1)),), (2,)), (((Run(0, 0),),), (2,)), ((), (2,)), (((Run(0, 2), Run(1, 1)),), (4,))])
def test_parts_that_cannot_be(part: tuple, shape: tuple[int, ...]) -> None:
    assert not fits(part, shape)


def test_replicas_share_the_writing(tmp_path: Path) -> None:
    mesh = mesh_of(4)
    tensors = [torch.rand(size) for _ in range(10) for size in (1000, 10, 1000, 10)]
    path = save(tmp_path, tensors, [(I,)] * 40, mesh)
    sizes = [file.num_bytes for file in Manifest.load(path / MANIFEST).files.values()]
    assert len(sizes) == 4 and max(sizes) < 1.3 * min(sizes) and sum(sizes) < 1.2 * 20 * 4040


def test_a_missing_part_is_never_committed(tmp_path: Path) -> None:
    """A checkpoint of fewer elements than the tensors have is refused, and nothing is left that looks like one."""
    mesh, x = mesh_of(2), torch.rand(4, 2)
    stage = begin(tmp_path)
    write_rank(stage, 0, {}, {"x": held(x, (S(0),), mesh, 0)})
    with pytest.raises(FileFormatError, match="4 of the 8 elements of x"):
        commit(stage, 1)
    with pytest.raises(FileFormatError, match="rank-00001.json"):
        commit(stage, 2)
    assert checkpoints(tmp_path) == []


def test_empty_parts(tmp_path: Path) -> None:
    """A rank may hold nothing, and a tensor may have no elements."""
    stage = begin(tmp_path)
    x = torch.arange(3)
    for rank, part in enumerate([((Run(0, 2),),), ((Run(2, 1),),), ((),)]):
        local = x[[i for run in part[0] for i in range(run.start, run.start + run.length)]]
        nothing = Held(torch.zeros(0, 5), (0, 5), whole((0, 5)), Place(rank, 3))
        write_rank(stage, rank, {}, {"x": Held(local, (3,), part, Place(0, 1)), "nothing": nothing})
    path = commit(stage, 3)
    with Reader(path, Manifest.load(path / MANIFEST).tensors) as reader:
        assert torch.equal(reader.read("x"), x) and reader.read("nothing").shape == (0, 5)
        assert num_elements(((),)) == 0
        reader.read_into("x", torch.zeros(0, dtype=x.dtype), ((),))


def test_only_the_slices_that_are_wanted_are_read(tmp_path: Path) -> None:
    """A tensor of 4 GiB, on the disk a file of holes: whoever reads more of it than asked for needs the memory."""
    shape, at = (1 << 14, 1 << 16), (10_000, 50_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * math.prod(shape)]}}).encode()
    with (tmp_path / "file").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.seek(8 + len(header) + 4 * (at[0] * shape[1] + at[1]))
        stream.write(torch.arange(3.0).numpy().tobytes())
        stream.truncate(8 + len(header) + 4 * math.prod(shape))
    part = ((Run(at[0], 2), Run(shape[0] - 1, 1)), (Run(at[1] - 1, 3),))
    local = torch.ones(3, 3)
    with Reader(tmp_path, {"x": TensorEntry(shape, "float32", (("file", whole(shape)),))}) as reader:
        reader.read_into("x", local, part)
    assert local.tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB
