"""Tells how runs stand, from their files."""

from __future__ import annotations

from command import run


def status(*more: str, run_dir: str) -> None:
    """Print the state of a run, what went wrong if anything did, and what to do next; changes nothing.

    Examples:
        python launch/status.py --run_dir runs/demo
        python launch/status.py --run_dir runs/demo runs/other

    Args:
        more: folders of further runs
        run_dir: folder of a run that goes on or has ended
    """
    from hyperpelt_ds.report import files, terminal

    print("\n\n".join(terminal.text(files.read(folder)) for folder in (run_dir, *more)))


if __name__ == "__main__":
    run(status)
