"""`relneuron --version`, and the list of commands that `relneuron --help` prints."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import relneuron as package
from relneuron.artifact.stage import load
from relneuron.cli.main import stages


def test_the_version_is_said_and_nothing_else(relneuron: Any) -> None:
    assert relneuron("--version") == (0, f"relneuron {package.__version__}\n", "")
    assert relneuron("--version", "no-such-command")[0] == 0
    assert relneuron("--version=3")[0] == 2


def test_it_needs_no_torch() -> None:
    words = "import sys\nsys.argv = ['relneuron', '--version']\n"
    words += "from relneuron.cli.main import main\n"
    words += "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules\n"
    assert subprocess.run([sys.executable, "-c", words], capture_output=True).returncode == 0


def test_no_summary_of_a_command_is_cut_off(relneuron: Any) -> None:
    code, out, _ = relneuron("--help")
    told = " ".join(out.split())
    assert code == 0
    for stage in stages():
        first = " ".join((load(stage.run).__doc__ or "").split("\n\n")[0].split())
        sentence = first.split(". ")[0].removesuffix(".")
        assert f" {stage.name} {sentence}" in told
