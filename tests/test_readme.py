"""What the README shows runs as it stands, in this order."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Draws of fit 'quartic':")  # a few transitions diverge in tails so steep
def test_code_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = README.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 4
    seen = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), seen)
    assert abs(float(seen["fit"].estimates["w"][0])) < 1
    draws = seen["mcmc"].get_samples()["w"][:, 0]
    assert draws.std() == pytest.approx(float(seen["fit"].stderr()["w"][0]), rel=0.5)
    assert "</html>" in (tmp_path / "fit.html").read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (README.parent / link).exists(), link
