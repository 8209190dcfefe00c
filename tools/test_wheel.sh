#!/usr/bin/env bash
# Try the built wheel as a user would: in an empty environment, from an empty folder, run the README's first fit. The
# rest of its code is run by tests/test_readme.py.
#
#   tools/test_wheel.sh dist/numpyro_score-*.whl
set -euo pipefail

wheel=$(realpath "$1")
readme=$(realpath "$(dirname "$0")/../README.md")
folder=$(mktemp --directory --tmpdir numpyro-score-wheel.XXXXXX)
trap 'rm -rf -- "$folder"' EXIT
cd "$folder"
${PYTHON:-python3} -m venv empty
empty/bin/pip install --quiet --disable-pip-version-check "$wheel"
empty/bin/python -W error::DeprecationWarning:__main__ - "$readme" <<'CODE'
import re
import sys
from pathlib import Path

import numpyro_score

assert "site-packages" in numpyro_score.__file__, numpyro_score.__file__
names = {}
for block in re.findall(r"```python\n(.*?)```", Path(sys.argv[1]).read_text(), flags=re.DOTALL)[:2]:
    exec(compile(block, "README.md", "exec"), names)
print("The wheel of", numpyro_score.__version__, "fits the README's model; a[0] is", names["fit"].estimates["a"][0])
CODE
