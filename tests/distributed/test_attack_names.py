"""The names that settings know are the attacks that there are."""

import subprocess
import sys

from hardy.distributed.attack_names import ATTACK_NAMES
from hardy.distributed.attacks import ATTACKS


def test_names_are_those_of_the_table():
    assert tuple(sorted(ATTACKS)) == ATTACK_NAMES
    for name, attack in ATTACKS.items():
        assert attack().name == name


def test_names_come_without_torch():
    script = "import sys, hardy.distributed.attack_names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
