"""Executes emitted programs: on `torch.distributed`, or on a simulated mesh inside one process."""
