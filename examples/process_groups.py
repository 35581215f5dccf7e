"""Which ranks talk to each other: the process groups of two 16-GPU layouts, innermost axis on the fastest links.

    python examples/process_groups.py

Axes are written outermost first; ranks count along the last one. Tensor parallelism moves the most bytes and comes last, so that its
groups are neighbours inside a node; pipelines move the fewest and come first. Experts split the same 16 ranks a second way.
"""

from autopar.core.mesh import Mesh

DENSE = Mesh.of(pp=2, dp=2, tp=4)
EXPERTS = Mesh.of(pp=2, edp=2, ep=4, etp=1)


def groups(mesh: Mesh, axis: str) -> tuple[tuple[int, ...], ...]:
    return mesh.groups((mesh.names.index(axis),))


def main() -> None:
    for mesh in (DENSE, EXPERTS):
        print(f"{mesh}: {mesh.num_ranks} ranks")
        for axis in reversed(mesh.names):
            print(f"  {axis:4}" + " ".join("{" + ",".join(map(str, group)) + "}" for group in groups(mesh, axis)))


if __name__ == "__main__":
    main()
