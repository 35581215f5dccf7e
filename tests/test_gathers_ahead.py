"""A rank of several stages computes the first while the parameters of the others are still on their way, and no stage computes before its own are there."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import autopar
from autopar.runtime.distributed import GroupExchange
from autopar.runtime.launch import Worker, launch
from autopar.runtime.pipeline_module import ShareEngine
from tests.test_distributed_pipelines import WIDE, Case

PATIENCE_S = 30.0
PRELOAD = ("autopar.api", "transformers.modeling_utils")
INTERLEAVED = Case(model="gpt2-tiny", schedule="interleaved", ranks=2, micro_batches=2, pins=("dp=2", "zero=1"))
CASES = (INTERLEAVED, replace(INTERLEAVED, pins=("dp=2", "zero=2"), overrides=WIDE), replace(INTERLEAVED, overrides=WIDE, offload=True))


def computes_first(worker: Worker, path: str) -> None:
    """The second replica of the first rank holds its part of stage 2 back until the first has computed stage 0."""
    loaded = INTERLEAVED.load()
    model = autopar.parallelize(loaded.module, autopar.Cluster.local(4), loaded.kwargs, plan=INTERLEAVED.plan(loaded, 4))
    done, start, compute = Path(path), ShareEngine.start, ShareEngine.compute
    begun: list[ShareEngine] = []

    def hold_back(engine: ShareEngine) -> None:
        end = time.monotonic() + PATIENCE_S
        while worker.rank == 1 and begun and not done.exists():
            assert time.monotonic() < end, "the first stage waits for the parameters of a later one"
            time.sleep(0.01)
        begun.append(engine)
        start(engine)

    def tell(engine: ShareEngine, *given: Any) -> Any:
        found = compute(engine, *given)
        if worker.rank == 0:
            done.touch()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShareEngine, "start", hold_back)
        patch.setattr(ShareEngine, "compute", tell)
        loss = float(model.train_step(loaded.kwargs))
    worker.send((loss, float(loaded.module(**loaded.kwargs).loss)))


@pytest.mark.gloo
def test_the_first_stage_does_not_wait_for_the_parameters_of_a_later_one(tmp_path: Path) -> None:
    received: list[tuple[float, float]] = []
    launch(computes_first, 4, str(tmp_path / "done"), on_message=received.append, preload=PRELOAD)
    assert len(received) == 4 and all(loss == pytest.approx(plain, rel=1e-5) for loss, plain in received)


class Late:
    """A gather that brings nothing before it is waited for; until then other rows are no numbers."""

    def __init__(self, rows: torch.Tensor, mine: torch.Tensor, exchange: GroupExchange, fill: Any) -> None:
        self.rows, self.mine, self.exchange, self.fill = rows, mine.clone(), exchange, fill
        self.place = torch.distributed.get_rank(exchange.group)
        rows.fill_(float("nan"))

    def wait(self) -> None:
        self.rows[self.place].copy_(self.mine)
        self.fill(self.exchange, self.rows).wait()


def waits_for_its_own(worker: Worker, cases: tuple[Case, ...]) -> None:
    for case in cases:
        loaded = case.load()
        model = autopar.parallelize(loaded.module, autopar.Cluster.local(4), loaded.kwargs, plan=case.plan(loaded, 4))
        want = (float(model.train_step(loaded.kwargs)), float(model.evaluate(loaded.kwargs)))
        fill = GroupExchange.start_filling

        def late(exchange: GroupExchange, rows: torch.Tensor) -> Late:
            return Late(rows, rows[torch.distributed.get_rank(exchange.group)], exchange, fill)  # noqa: B023

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GroupExchange, "start_filling", late)
            assert (float(model.train_step(loaded.kwargs)), float(model.evaluate(loaded.kwargs))) == want
        worker.send(want)


@pytest.mark.gloo
def test_no_stage_computes_before_its_parameters_are_there() -> None:
    received: list[tuple[float, float]] = []
    launch(waits_for_its_own, 4, CASES, on_message=received.append, preload=PRELOAD)
    assert len(received) == 4 * len(CASES)
