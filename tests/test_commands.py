"""Every command as a user first meets it: --help, and examples that it would understand."""

from __future__ import annotations

import pytest
from conftest import ROOT

COMMANDS = sorted(
    str(file.relative_to(ROOT))
    for folder in ("launch", "data_prep")
    for file in (ROOT / folder).glob("*.py")
    if '__name__ == "__main__"' in file.read_text()
)
BY_HAND = "data_prep/refit_marian.py"
"""Its result is checked in; who makes it anew can wait for torch."""

SHOW_HELP = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
sys.path.insert(0, sys.argv[0].partition("/")[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    assert not stop.code
print("loaded:", *{"torch", "transformers", "deepspeed", "datasets"} & set(sys.modules))
"""
READ_EXAMPLES = """
import inspect, re, runpy, shlex, sys
script = sys.argv[1]
sys.path.insert(0, script.partition("/")[0])
functions = runpy.run_path(script)
if script.startswith("launch/"):
    from command import _checked as checked
else:
    from parts.command_line import _checked as checked
name = re.search(r"^    run\\((\\w+)\\)$", open(script).read(), re.MULTILINE)[1]
lines = inspect.getdoc(functions[name]).partition("Examples:")[2].partition("\\n\\n")[0]
examples = re.sub(r"\\n {8,}", " ", lines).strip().splitlines()
for example in examples:
    words = shlex.split(example.partition(" > ")[0])
    if script not in words:
        continue
    own = words[words.index(script) + 1 :]
    if own and script in ("data_prep/index.py", "data_prep/verify.py") and not own[0].startswith("-"):
        own.insert(0, "--" + next(iter(inspect.signature(functions[name]).parameters)))
    checked(functions[name], own)
    print("understood:", example)
"""


def test_there_are_commands_to_look_at():
    assert {"launch/train.py", "launch/evaluate.py", "data_prep/demo.py", "data_prep/verify.py"} <= set(COMMANDS)


@pytest.mark.parametrize("script", COMMANDS)
def test_help_shows_examples_and_loads_nothing_heavy(run_python, script):
    done = run_python("python", "-c", SHOW_HELP, script)
    shown = done.stdout + done.stderr
    assert done.returncode == 0, shown
    assert "Examples:" in shown and script in shown
    assert script == BY_HAND or done.stdout.splitlines()[-1] == "loaded:"


@pytest.mark.parametrize("script", COMMANDS)
def test_examples_are_commands_that_would_run(run_python, script):
    done = run_python("python", "-c", READ_EXAMPLES, script)
    assert done.returncode == 0, done.stderr
    assert "understood: " in done.stdout
