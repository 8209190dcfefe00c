"""`examples/langevin_gaussian.py` in a short setting."""

import numpy as np
import pytest
from models import load_script


@pytest.mark.slow
def test_the_gaussian_has_the_law_that_the_example_says(tmp_path):
    """Every moment within 5 standard errors of its closed form, and the law far from the target at the large step."""
    example = load_script("langevin_gaussian")
    rows = [line.split("|")[1:6] for line in example.main(tmp_path, 10_000).splitlines() if "±" in line]
    assert len(rows) == 15
    for _, _, measured, law, _ in rows:
        value, error = map(float, measured.split("±"))
        assert abs(value - float(law)) < 5 * error + 1e-3  # they are printed with three digits
    assert any(abs(float(r[2].split("±")[0]) - float(r[4])) > 10 * float(r[2].split("±")[1]) for r in rows)
    step, a = 1.0, example.PRECISION
    shrink = np.eye(2) - step * a
    law = example.law_of_sgld(step)
    np.testing.assert_allclose(shrink @ law @ shrink + 2 * step * np.eye(2), law)
    assert (tmp_path / "langevin_gaussian.png").stat().st_size > 10_000
