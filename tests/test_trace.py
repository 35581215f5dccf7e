"""Tracing, seen from outside."""

import warnings

import torch

from autopar.trace.capture import trace


def test_tracing_warns_of_nothing() -> None:
    """Advice of torch to its own developers is not passed on, that of a model's own code is."""

    class Talkative(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            warnings.warn("this model is old", FutureWarning, stacklevel=1)
            return super().forward(x)

    for model, said in ((torch.nn.Linear(3, 3), set()), (Talkative(3, 3), {"this model is old"})):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trace(model, (torch.zeros(2, 3),))
        assert {str(w.message) for w in caught} == said
