"""Print `constraints.txt` for the environment that runs this (`make constraints`).

Local version labels go (`torch==2.13.0+cpu` holds for one build only); editable installs and the
package itself stay out. A release that has dropped Python 3.10 is pinned from 3.11 on.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distribution

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

HEAD = """\
# The exact versions the tests run with, and nothing that ties them to one platform:
# torch has no local label (`+cpu`, `+cu130`), so pip takes the build its own settings lead to.
# Made by `make constraints`, which freezes .venv and .venv/zoo. To renew: upgrade there
# (.venv/bin/python -m pip install --upgrade --upgrade-strategy eager -e '.[all,dev]'),
# run `make constraints`, then `make clean test`.
"""


def pin(requirement: Requirement) -> str:
    """Write one pin, with a marker where Python 3.10 has to find an older release."""
    version = str(requirement.specifier).removeprefix("==").partition("+")[0]
    supported = SpecifierSet(distribution(requirement.name).metadata.get("Requires-Python", ""))
    marker = "" if "3.10.99" in supported else ' ; python_version >= "3.11"'
    return f"{requirement.name}=={version}{marker}"


def main() -> None:
    freeze = ["-m", "pip", "freeze", "--exclude-editable", "--exclude", "lightning_mgpu"]
    lines = subprocess.check_output([sys.executable, *freeze], text=True).splitlines()
    requirements = [Requirement(line) for line in lines if not line.startswith("#")]
    print(HEAD, *(pin(r) for r in requirements if r.specifier), sep="\n")


if __name__ == "__main__":
    main()
