"""A schedule's lists, run by real torch stages in one process: the smallest thing that can prove what a schedule computes.

Every rank of every replica walks its own list; they take turns, and share nothing but mailboxes. Counted are the bytes each
rank receives from other stages and the microbatches it has in flight. The stages must form a chain.
Imported by the pipeline examples beside it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from autopar.core.schedule import Action, Kind, Schedule, chain

Loss = Callable[[Tensor, int, int], Tensor]
"""(output of the last stage, replica, microbatch) -> its share of the global loss: a sum divided by the *global* count."""


class Lockstep:
    """`replicas[r][s]` is stage s of replica r; the stages of a replica hold its parameters."""

    def __init__(self, replicas: Sequence[Sequence[nn.Module]], schedule: Schedule) -> None:
        assert schedule.edges == chain(schedule.num_stages), "stages that skip need a real runtime"
        self.replicas, self.schedule = replicas, schedule
        ranks = [(replica, rank) for replica in range(len(replicas)) for rank in range(schedule.num_ranks)]
        self.received_bytes = dict.fromkeys(ranks, 0)
        self.peak_in_flight = dict.fromkeys(ranks, 0)

    def step(self, microbatches: Sequence[Sequence[Tensor]], loss: Loss) -> float:
        """Run the lists once on `microbatches[replica][m]`: adds to the parameters' gradients, returns the global loss."""
        self.microbatches, self.loss = microbatches, loss
        self.mailbox: dict[tuple[int, Action], Tensor] = {}
        self.saved: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self.incoming: dict[tuple[int, int, int], Tensor] = {}
        self.gradients: dict[tuple[int, int, int], Tensor] = {}
        self.arrived: dict[int, set[int]] = {}
        self.reduced: set[int] = set()
        self.total = 0.0
        position = dict.fromkeys(self.received_bytes, 0)
        while any(position[replica, rank] < len(self.schedule.ranks[rank]) for replica, rank in position):
            moved = False
            for replica, rank in position:
                actions = self.schedule.ranks[rank]
                while position[replica, rank] < len(actions) and self.run(replica, rank, actions[position[replica, rank]]):
                    position[replica, rank] += 1
                    moved = True
            assert moved, "no rank can go on; `autopar.schedules.check` says why"
        return self.total

    def run(self, replica: int, rank: int, action: Action) -> bool:
        """Do one action; False where what it receives, or another replica, is not there yet."""
        key = replica, action.stage, action.microbatch if action.microbatch is not None else -1
        match action.kind:
            case Kind.SEND_F:
                self.mailbox[replica, action.partner] = self.saved[key][1].detach()
            case Kind.SEND_B:
                self.mailbox[replica, action.partner] = self.gradients.pop(key)
            case Kind.RECV_F | Kind.RECV_B:
                if (replica, action) not in self.mailbox:
                    return False
                value = self.mailbox.pop((replica, action))
                self.received_bytes[replica, rank] += value.numel() * value.element_size()
                if action.kind is Kind.RECV_F:
                    self.incoming[key] = value
                else:
                    self.gradients[replica, action.stage + 1, key[2]] = value
            case Kind.REDUCE:
                return self.reduce(replica, action.stage)
            case Kind.F:
                self.forward(key)
                held = sum(r == replica and self.schedule.placement[s] == rank for r, s, _ in self.saved)
                self.peak_in_flight[replica, rank] = max(self.peak_in_flight[replica, rank], held)
            case Kind.B | Kind.I | Kind.W:
                self.backward(key, action.kind)
            case _:
                raise NotImplementedError(f"{action} has no place in these examples")
        return True

    def forward(self, key: tuple[int, int, int]) -> None:
        replica, stage, m = key
        if stage == 0:
            x = self.microbatches[replica][m]
        elif key in self.incoming:
            x = self.incoming.pop(key).requires_grad_()
        else:
            assert self.schedule.placement[stage - 1] == self.schedule.placement[stage], "received, or from a stage of the same rank"
            x = self.saved[replica, stage - 1, m][1].detach().requires_grad_()
        y = self.replicas[replica][stage](x)
        if stage == self.schedule.num_stages - 1:
            y = self.loss(y, replica, m)
            self.total += float(y.detach())
        self.saved[key] = x, y

    def backward(self, key: tuple[int, int, int], kind: Kind) -> None:
        """I leaves the gradient of the output for W; each differentiates only what it is asked for."""
        replica, stage, m = key
        x, y = self.saved[key]
        behind = replica, stage + 1, m
        output_gradient = self.gradients[behind] if stage < self.schedule.num_stages - 1 else None
        params = [p for p in self.replicas[replica][stage].parameters()] if kind in (Kind.B, Kind.W) else []
        inputs = [x] if stage and kind in (Kind.B, Kind.I) else []
        if params or inputs:
            found = torch.autograd.grad(y, inputs + params, output_gradient, retain_graph=kind is Kind.I)
            if inputs:
                self.gradients[key] = found[0]
            for p, g in zip(params, found[len(inputs) :], strict=True):
                p.grad = g if p.grad is None else p.grad + g
        if kind in (Kind.B, Kind.W):
            del self.saved[key]
            self.gradients.pop(behind, None)

    def reduce(self, replica: int, stage: int) -> bool:
        """Sum the stage's gradients over the replicas once all of them are there."""
        arrived = self.arrived.setdefault(stage, set())
        arrived.add(replica)
        if len(arrived) < len(self.replicas):
            return False
        if stage not in self.reduced:
            self.reduced.add(stage)
            for copies in zip(*(stages[stage].parameters() for stages in self.replicas), strict=True):
                total = torch.stack([p.grad for p in copies]).sum(dim=0)
                for p in copies:
                    p.grad = total.clone()
        return True
