"""Writes the page of one or several runs."""

from __future__ import annotations

from command import run


def report(*more: str, run_dir: str, out: str | None = None) -> None:
    """Write one HTML file about a run, or about several side by side; any browser opens it, without a network.

    Examples:
        python launch/report.py --run_dir runs/demo
        python launch/report.py --run_dir runs/demo runs/other runs/third --out compared.html

    Args:
        more: folders of runs to be put beside the first
        run_dir: folder of a run, finished or not
        out: the file to write; RUN_DIR/report.html of the first run if left out
    """
    from hyperpelt_ds.report import page

    print(page.write([run_dir, *more], out))


if __name__ == "__main__":
    run(report)
