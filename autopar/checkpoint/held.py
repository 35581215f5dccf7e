"""A tensor of the state as one rank has it: its own memory, its part of the whole, its number among the ranks with the same part."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autopar.checkpoint.part import Part, Run, part_shape, stored_part, whole
from autopar.core.layout import Layout
from autopar.core.mesh import Mesh, MeshAxis
from autopar.errors import LayoutError
from autopar.runtime.store import layout_of


@dataclass(frozen=True)
class Place:
    """Position `number` among `count` ranks."""

    number: int
    count: int


@dataclass(frozen=True)
class Held:
    """`local` is the part `part` of a tensor of `shape`; `replicas` hold the same part, and one of them writes it, unless the tensor is
    written `elsewhere`: by another stage of a pipeline that has it too."""

    local: torch.Tensor
    shape: tuple[int, ...]
    part: Part
    replicas: Place
    elsewhere: bool = False


def hold(x: torch.Tensor, replicas: Place) -> Held:
    """A DTensor by its own mesh; a plain tensor is whole on each of `replicas`."""
    if isinstance(x, DTensor):
        return hold_local(x.to_local().detach(), x.shape, layout_of(x), x.device_mesh)
    return Held(x.detach(), tuple(x.shape), whole(x.shape), replicas)


def hold_local(local: torch.Tensor, shape: Sequence[int], layout: Layout, mesh: DeviceMesh) -> Held:
    """This rank's part of a tensor that lies over a mesh."""
    part = stored_part(layout, mesh_of(mesh), coordinates(mesh), tuple(shape))
    if part_shape(part) != tuple(local.shape):
        raise LayoutError(f"a rank holds {tuple(local.shape)} of a tensor of shape {tuple(shape)} in {layout}, where {part_shape(part)} was expected")
    return Held(local, tuple(shape), part, place(mesh, [a for a, p in enumerate(layout) if p.kind == "I"]))


def hold_addend(local: torch.Tensor, shape: Sequence[int], layout: Layout, mesh: DeviceMesh, axes: Sequence[int]) -> Held:
    """This rank's part of one of the addends along `axes` that sum to a tensor of `shape`.

    The whole has them along a new first dimension: shape (number of addends, *shape).
    """
    like, addends = hold_local(local, shape, layout, mesh), place(mesh, axes)
    others = [a for a, p in enumerate(layout) if p.kind == "I" and a not in axes]
    return Held(local.detach().unsqueeze(0), (addends.count, *like.shape), ((Run(addends.number, 1),), *like.part), place(mesh, others))


def place(mesh: DeviceMesh, axes: Sequence[int]) -> Place:
    """This rank's position along some axes of a mesh, row-major."""
    number, point = 0, coordinates(mesh)
    for axis in axes:
        number = number * mesh.shape[axis] + point[axis]
    return Place(number, math.prod(mesh.shape[axis] for axis in axes))


def coordinates(mesh: DeviceMesh) -> tuple[int, ...]:
    point = mesh.get_coordinate()
    if point is None:
        raise LayoutError("this rank is not on the mesh of a tensor that it has; save and load on the ranks of the mesh")
    return tuple(point)


def mesh_of(mesh: DeviceMesh) -> Mesh:
    """A mesh of torch as ours; axes without a name are numbered."""
    names = mesh.mesh_dim_names or tuple(map(str, range(mesh.ndim)))
    return Mesh(tuple(MeshAxis(name, size) for name, size in zip(names, mesh.shape)))
