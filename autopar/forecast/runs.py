"""Published runs: a row of a file of facts to a model, a cluster, a plan and what was measured.

`cost_models/README.md` has the columns. What a source does not print is filled from its
notes where they say `inferred: name=value`, and else by the rules below, the same for all sources:

    kv_heads, ffn_hidden     as many key heads as heads; four times the width
    vocab                    51,200, that of GPT-2 padded, 128,000 for Aleph Alpha's own tokenizer where the notes say so
    dp                       the devices that tp, pp and cp leave
    global_batch             the only microbatch of every replica
    micro_batch              1 in a pipeline or where the sequence is cut, else all sequences of a replica
    vpp                      1; as many stages a rank as it has blocks where the notes say "interleaved schedule"
                             where none of micro_batch, vpp and recompute is printed: the fastest plan that fits
    sp, zero_stage           as the software runs unless told otherwise (`software.py`)
    recompute                the least that fits the device: none, selective, full
"""

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from autopar.errors import UsageError

OWN_ROWS = Path(str(files("autopar"))) / "forecast" / "data" / "published_runs.csv"
"""The rows that the costs are calibrated on, with their sources and their whole notes, which name networks, kernels and schedules besides what they infer."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row, with what its notes infer. `text` gives a column, empty where the source is silent."""

    values: Mapping[str, str]
    inferred: Mapping[str, str]

    def text(self, name: str) -> str:
        return self.values.get(name) or self.inferred.get(name, "")

    def number(self, name: str) -> int | None:
        text = self.text(name)
        try:
            return round(float(text)) if text else None
        except ValueError:
            raise Unpriced(f"column {name} is {text[:40]!r}, not a number") from None

    def needed(self, name: str) -> int:
        found = self.number(name)
        if found is None or found < 1:
            raise Unpriced(f"{name} not published")
        return found

    @property
    def id(self) -> str:
        return self.text("id")

    @property
    def source(self) -> str:
        return self.text("source")

    @property
    def notes(self) -> str:
        return self.values.get("notes", "")


class Unpriced(UsageError):
    """A row that cannot be priced, and why."""


def read_rows(path: str | Path) -> tuple[Row, ...]:
    """All rows of a file. Raises UsageError where it is not such a file."""
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            found = [Row(values, dict(_inferred(values.get("notes") or ""))) for values in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"cannot read runs from {path}: {error}") from None
    missing = [name for name in ("id", "source", "kind", "metric", "value", "split_group") if found and name not in found[0].values]
    if missing or not found:
        raise UsageError(f"{path} holds no runs: {'no column ' + ', '.join(missing) if missing else 'it is empty'}")
    return tuple(found)


def _inferred(notes: str) -> Iterator[tuple[str, str]]:
    """What notes deduce, behind the word `inferred:`."""
    if match := re.search(r'"Batch size/DP" (\d+) sequences', notes):
        yield "batch_per_replica", match[1]
    _, mark, text = notes.partition("inferred:")
    text = text if mark else ""
    yield from re.findall(r"\b(dp|tp|pp|cp|micro_batch|global_batch|recompute|sp|heads)=(?:min\(8,)?(\w+)", text)
    if match := re.search(r"\b(fp8|bf16)\b", text):
        yield "precision", match[1]
    if "ZeRO-1" in text or "distributed optimizer" in text:
        yield "zero_stage", "1"
    if match := re.search(r"(\d+) GPUs per node", text):
        yield "gpus_per_node", match[1]
    if match := re.search(r"vocab(?:ulary)? (?:about )?(\d+)k?\b", text):
        yield "vocab", match[1] if len(match[1]) > 3 else match[1] + "000"
