"""What a start costs: the modules that a verb imports are kept from the garbage collector, and nothing else is."""

import subprocess
import sys

import pytest
from test_cli import SENTENCE

VERBS = {"generate": ["generate", "bundled:text", SENTENCE, "-o"], "demo": ["demo", "-o"]}


def collected(before, arguments):
    """`gc.isenabled()`, and the number of frozen objects, after a verb in a Python of its own."""
    code = (
        f"{before}\nimport gc\nfrom peft_icm.cli import main\nassert main({arguments!r}) == 0\nprint(gc.isenabled(), gc.get_freeze_count())"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-2000:]
    enabled, frozen = finished.stdout.split()[-2:]
    return enabled == "True", int(frozen)


@pytest.mark.parametrize("verb", VERBS)
def test_what_was_imported_is_frozen_and_garbage_is_collected_again(verb, tmp_path):
    enabled, frozen = collected("", [*VERBS[verb], str(tmp_path / "out")])
    assert enabled and frozen > 500_000


@pytest.mark.parametrize(("before", "enabled"), [("import torch", True), ("import gc; gc.disable()", False)])
def test_a_program_that_calls_main_keeps_its_own_collector(before, enabled, tmp_path):
    assert collected(before, [*VERBS["generate"], str(tmp_path / "out")]) == (enabled, 0)
