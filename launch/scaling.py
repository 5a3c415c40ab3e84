"""Prints the tables of docs/scaling.md: bytes on the wire as measured, and what larger runs should take."""

from __future__ import annotations

from pathlib import Path

from command import run

_ROOT = Path(__file__).resolve().parents[1]


def scaling(*, records: str = str(_ROOT / "docs" / "results" / "wire.jsonl")) -> None:
    """Print measured bytes beside their formula, and memory and step time from 8 to 512 GPUs, as Markdown.

    Needs the demo's data (make demo), whose backbone is one of the cases. Takes a few minutes.

    Examples:
        python launch/scaling.py

    Args:
        records: lines that tests/measure_wire.py wrote
    """
    import json

    from hyperpelt_ds.forecast import tables
    from hyperpelt_ds.forecast.step_time import Machine

    if not Path(records).is_file():
        raise ValueError(f"--records {records}: no such file; tests/measure_wire.py writes it")
    print(tables.measured(map(json.loads, Path(records).read_text().splitlines())), end="\n\n")
    print(tables.scaling(tables.CASES, _ROOT / "ds_configs", Machine()))


if __name__ == "__main__":
    run(scaling)
