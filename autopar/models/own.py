"""Models in plain torch: small enough to read, shaped like the classics that each kind of parallelism was made for.

Every forward returns `{"logits": ...}`, or the scalar mean loss when `labels` are given. `example_inputs` names and
shapes one batch; `draw` decides whether the tensors hold random numbers or only a shape.
"""

from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopar.errors import UsageError

Outputs = Tensor | dict[str, Tensor]


class Draw(Protocol):
    """Where example tensors come from."""

    def integers(self, high: int, *shape: int) -> Tensor: ...

    def normal(self, *shape: int) -> Tensor: ...


class MLP(nn.Module):
    """`depth` x (Linear + ReLU) of one width, then a classifier: inputs [b, width] -> logits [b, classes]."""

    labels_kind = "class"

    def __init__(self, *, width: int = 4096, depth: int = 8, classes: int = 1000) -> None:
        super().__init__()
        self.width, self.classes = width, classes
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Outputs:
        hidden = inputs
        for layer in self.layers:
            hidden = F.relu(layer(hidden))
        logits = self.head(hidden)
        return {"logits": logits} if labels is None else F.cross_entropy(logits, labels)

    def example_inputs(self, draw: Draw, batch: int, seq: int | None) -> dict[str, Tensor]:
        return {"inputs": draw.normal(batch, self.width), "labels": draw.integers(self.classes, batch)}


class AlexNet(nn.Module):
    """Krizhevsky 2012 in torchvision's one-tower form: few weights in the convolutions, most in the linear layers.

    inputs [b, 3, image, image] -> logits [b, classes]. `channels` are the widths of the five convolutions.
    """

    labels_kind = "class"

    def __init__(
        self,
        *,
        channels: tuple[int, int, int, int, int] = (64, 192, 384, 256, 256),
        hidden: int = 4096,
        classes: int = 1000,
        image: int = 224,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.image, self.classes = image, classes
        a, b, c, d, e = channels
        self.features = nn.Sequential(
            nn.Conv2d(3, a, kernel_size=11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(a, b, kernel_size=5, padding=2), nn.ReLU(), nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(b, c, kernel_size=3, padding=1), nn.ReLU(),
            nn.Conv2d(c, d, kernel_size=3, padding=1), nn.ReLU(),
            nn.Conv2d(d, e, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(kernel_size=3, stride=2),
        )  # fmt: skip
        side = (image - 7) // 4 + 1
        for _ in range(3):
            side = (side - 3) // 2 + 1
        self.classifier = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(e * side * side, hidden), nn.ReLU(),
            nn.Dropout(dropout), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, classes),
        )  # fmt: skip

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Outputs:
        logits = self.classifier(self.features(inputs).flatten(1))
        return {"logits": logits} if labels is None else F.cross_entropy(logits, labels)

    def example_inputs(self, draw: Draw, batch: int, seq: int | None) -> dict[str, Tensor]:
        images = draw.normal(batch, 3, self.image, self.image)
        return {"inputs": images, "labels": draw.integers(self.classes, batch)}


def tower(*widths: int, last_relu: bool) -> nn.Sequential:
    """Linear layers between consecutive `widths` with a ReLU after each, or after each but the last."""
    layers: list[nn.Module] = []
    for below, above in pairwise(widths):
        layers += [nn.Linear(below, above), nn.ReLU()]
    return nn.Sequential(*(layers if last_relu else layers[:-1]))


class DLRM(nn.Module):
    """Naumov 2019: dense features through a tower, categories through tables, pairwise products, a second tower.

    dense [b, f] float, sparse [b, tables] row numbers -> logits [b]. Labels are the click, 0.0 or 1.0 [b].
    """

    labels_kind = "binary"

    def __init__(self, *, rows: tuple[int, ...], width: int, dense: int, bottom: tuple[int, ...], top: tuple[int, ...]) -> None:
        super().__init__()
        self.rows, self.dense = tuple(rows), dense
        self.tables = nn.ModuleList(nn.Embedding(count, width) for count in rows)
        self.bottom = tower(dense, *bottom, width, last_relu=True)
        vectors = len(self.rows) + 1
        self.top = tower(width + vectors * (vectors - 1) // 2, *top, 1, last_relu=False)

    def forward(self, dense: Tensor, sparse: Tensor, labels: Tensor | None = None) -> Outputs:
        below = self.bottom(dense)
        looked_up = [table(sparse[:, i]) for i, table in enumerate(self.tables)]
        vectors = torch.stack([below, *looked_up], dim=1)
        products = torch.bmm(vectors, vectors.transpose(1, 2))
        # Row i up to the diagonal: every unordered pair once, a vector with itself never.
        pairs = [products[:, i, :i] for i in range(1, vectors.shape[1])]
        logits = self.top(torch.cat([below, *pairs], dim=1)).squeeze(1)
        return {"logits": logits} if labels is None else F.binary_cross_entropy_with_logits(logits, labels)

    def example_inputs(self, draw: Draw, batch: int, seq: int | None) -> dict[str, Tensor]:
        sparse = torch.stack([draw.integers(count, batch) for count in self.rows], dim=1)
        dense = draw.normal(batch, self.dense)
        return {"dense": dense, "sparse": sparse, "labels": draw.integers(2, batch).to(dense.dtype)}


class TransformerBlock(nn.Module):
    """Pre-norm causal attention and MLP with separate q, k, v, o: x [b, s, hidden] -> [b, s, hidden]."""

    def __init__(self, *, hidden: int, heads: int, inner: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, inner), nn.Linear(inner, hidden)

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(self.attention(self.norm1(x)), self.dropout, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), self.dropout, self.training)


class Transformer(nn.Module):
    """A small GPT: inputs [b, s] token ids -> logits [b, s, vocab]. Labels [b, s] are the next tokens, -100 to skip one."""

    labels_kind = "token"

    def __init__(
        self, *, vocab: int, positions: int, hidden: int, layers: int, heads: int, inner: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.vocab, self.positions = vocab, positions
        self.token = nn.Embedding(vocab, hidden)
        self.position = nn.Embedding(positions, hidden)
        self.blocks = nn.ModuleList(
            TransformerBlock(hidden=hidden, heads=heads, inner=inner or 4 * hidden, dropout=dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocab, bias=False)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Outputs:
        x = self.token(inputs) + self.position(torch.arange(inputs.shape[1], device=inputs.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return {"logits": logits} if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def example_inputs(self, draw: Draw, batch: int, seq: int | None) -> dict[str, Tensor]:
        if seq is not None and seq > self.positions:
            raise UsageError(f"seq {seq} is longer than the {self.positions} positions of Transformer; use --seq {self.positions} or less")
        shape = batch, seq or self.positions
        return {"inputs": draw.integers(self.vocab, *shape), "labels": draw.integers(self.vocab, *shape)}
