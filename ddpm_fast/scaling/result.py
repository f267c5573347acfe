"""A result's file: checked JSON, written whole or not at all, and its rows as CSV."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ddpm_fast.errors import UsageError
from ddpm_fast.scaling.schema import check, result_schema

SCHEMA = "ddpm_fast.scaling/1"
JSON_NAME, CSV_NAME = "result.json", "result.csv"

CSV_COLUMNS = (
    "label", "mode", "world_size", "batch_per_rank", "images_per_s", "images_per_s_low",
    "images_per_s_high", "images_per_s_per_rank", "speedup", "speedup_low", "speedup_high",
    "efficiency", "efficiency_low", "efficiency_high", "serial_fraction", "step_ms", "compute_ms",
    "exposed_communication_ms", "overlapped_communication_ms", "data_ms", "optimizer_ms", "skew",
    "peak_gib", "peak_reserved_gib", "joules_per_image", "bytes", "seconds", "bus_gbytes_per_s",
)  # fmt: skip


def read(path: Path) -> dict[str, Any]:
    """The result in a file, or in a folder that a run left; UsageError naming file and field."""
    if path.is_dir():
        path = path / JSON_NAME
    try:
        value = json.loads(path.read_text("utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}; give a {JSON_NAME}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not JSON ({error}); give a {JSON_NAME}") from None
    check(value, result_schema(), source=str(path))
    _check_topology(value["machine"], path)
    return value


def _check_topology(machine: dict[str, Any], path: Path) -> None:
    """What the schema cannot say: links and p2p are square, a row and a column for each GPU."""
    n = len(machine["devices"])
    for name in ("links", "p2p"):
        sizes = [len(row) for row in machine[name]]
        if sizes and sizes != [n] * n:
            raise UsageError(
                f"{path}: machine.{name}: has rows of {', '.join(map(str, sizes))}, must be empty "
                f"or {n} rows of {n}, as machine.devices"
            )


def write(path: Path, result: dict[str, Any]) -> None:
    """Check and write; what was in the file before stays if either fails."""
    check(result, result_schema(), source=str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", "utf-8")
    temporary.replace(path)


def write_csv(path: Path, result: dict[str, Any]) -> None:
    """Measured rows, predicted ones, all-reduces; a label in the first column tells them apart."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(_csv_rows(result))


def _csv_rows(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for row in result["rows"]:
        split = {f"{name}_ms": value for name, value in row["split_ms"].items()}
        yield {"label": "measured", **row, **split, "peak_gib": peak_gib(row),
               "peak_reserved_gib": peak_reserved_gib(row),
               "images_per_s_per_rank": row["images_per_s"] / row["world_size"]}  # fmt: skip
    for row in result["predicted"]:
        yield {**row, "images_per_s_per_rank": row["images_per_s"] / row["world_size"]}
    for row in result["all_reduce"]:
        yield {"label": "all-reduce", **row}


def memory_of(rank: dict[str, Any]) -> float | None:
    """A rank's peak: the GPU allocator's, on CPU the process's."""
    return rank["process_gib"] if rank["allocated_gib"] is None else rank["allocated_gib"]


def has_own_peaks(row: dict[str, Any]) -> bool:
    """Whether its peaks are of its own steps, and not since the ranks' start."""
    if "peak_memory_since" in row:
        return row["peak_memory_since"] == "phase"
    return all(rank["allocated_gib"] is not None for rank in row["peak_memory"])  # an older file


def peak_gib(row: dict[str, Any]) -> float | None:
    """The most of any rank."""
    return _most(memory_of(rank) for rank in row["peak_memory"])


def peak_reserved_gib(row: dict[str, Any]) -> float | None:
    """The most that the GPU allocator of any rank has taken; None on CPU."""
    return _most(rank["reserved_gib"] for rank in row["peak_memory"])


def _most(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def base_row(rows: Sequence[dict[str, Any]], mode: str, global_batch: int) -> dict[str, Any]:
    """What rows of a mode are compared with: those of its smallest world.

    A weak row whose whole batch is the strong rows' is one of theirs too.
    """
    own = [row for row in rows if row["mode"] == mode]
    if mode == "strong":
        own += [row for row in rows if row["world_size"] * row["batch_per_rank"] == global_batch]
    return min(own or rows, key=lambda row: row["world_size"])


def rank_word(result: dict[str, Any]) -> str:
    """What a rank is called: a CPU process is never a GPU."""
    return "GPU" if result["kind"] == "gpu" else "process"


def count(n: int, word: str) -> str:
    """ "1 GPU", "2 processes" """
    return f"{n} {word}{'' if n == 1 else 'es' if word.endswith('s') else 's'}"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
