"""Langevin dynamics on a correlated Gaussian, with noise and without, beside its exact law.

The target is N(0, Σ) with Σ = [[2, 1], [1, 2]], declared by its energy ½ xᵀAx alone, A = Σ⁻¹. With noise (temperature
1) the draws of SGLD with step size h are not N(0, Σ) but, exactly, N(0, (A − hA²/2)⁻¹): the price of leaving out a
Metropolis step, known here in closed form. Without noise (temperature 0) the chains go down the energy to the mode.

Run it with `python examples/langevin_gaussian.py`; `--quick` takes few chains. Results go to examples/results, those
of the short run to examples/output.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import MCMC

from numpyro_score import MALA, SGLD

COVARIANCE = np.array([[2.0, 1.0], [1.0, 2.0]])
PRECISION = np.linalg.inv(COVARIANCE)
STARTS = np.array([[-4.0, 4.0], [4.5, 0.0], [-3.0, -4.5], [1.0, 4.5]])


def model():
    x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)))
    numpyro.factor("energy", -0.5 * x @ PRECISION @ x)


def law_of_sgld(step_size) -> np.ndarray:
    """The covariance of the draws: Σ_h = (I − hA) Σ_h (I − hA) + 2hI, solved."""
    return np.linalg.inv(PRECISION - step_size * PRECISION @ PRECISION / 2)


def run(kernel, starts, num_warmup, num_samples, key):
    """Draws (chains, num_samples, 2) of vectorised chains from the starts (chains, 2)."""
    mcmc = MCMC(
        kernel, num_warmup=num_warmup, num_samples=num_samples, num_chains=len(starts), chain_method="vectorized",
        progress_bar=False,
    )  # fmt: skip
    mcmc.run(key, init_params={"x": jnp.asarray(starts, float)})
    return np.asarray(mcmc.get_samples(group_by_chain=True)["x"])


def last_draws(kernel, num_chains, key):
    """One draw (chains, 2) of each of many independent chains, after 200 steps."""
    return run(kernel, np.zeros((num_chains, 2)), 199, 1, key)[:, 0]


def moments(draws) -> list[tuple[str, float, float]]:
    """Mean and covariance of independent draws, with standard errors."""
    centred = draws - draws.mean(axis=0)
    found = [(f"mean of x{i + 1}", draws[:, i]) for i in range(2)]
    found += [(f"covariance of x{i + 1}, x{j + 1}", centred[:, i] * centred[:, j]) for i, j in ((0, 0), (0, 1), (1, 1))]
    return [(name, v.mean(), v.std() / len(v) ** 0.5) for name, v in found]


def table(rows) -> list[str]:
    """Lines of Markdown, from kernel names to draws and the covariance that they should have."""
    lines = ["| draws | quantity | measured | its own law | target |", "|---|---|---|---|---|"]
    for name, (draws, covariance) in rows.items():
        expected = [0.0, 0.0, *covariance[np.triu_indices(2)]]
        target = [0.0, 0.0, *COVARIANCE[np.triu_indices(2)]]
        for (quantity, value, error), e, t in zip(moments(draws), expected, target, strict=True):
            lines.append(f"| {name} | {quantity} | {value:.3f} ± {error:.3f} | {e:.3f} | {t:.0f} |")
    return lines


def ellipse(covariance, radius=2.0):
    angle = np.linspace(0, 2 * np.pi, 200)
    return radius * np.linalg.cholesky(covariance) @ np.stack([np.cos(angle), np.sin(angle)])


@matplotlib.rc_context({"font.size": 16})
def picture(warm, cold, draws, step_size, path):
    """Trajectories over contours of the density, and draws within the ellipses of two standard deviations."""
    side = np.linspace(-5.0, 5.0, 121)
    grid = np.stack(np.meshgrid(side, side), axis=-1)
    density = np.exp(-0.5 * np.einsum("...i,ij,...j", grid, PRECISION, grid))
    figure, axes = plt.subplots(1, 3, figsize=(16, 5.9), sharex=True, sharey=True, layout="constrained")
    for a, paths, title in zip(axes, (warm, cold), ("temperature 1", "temperature 0"), strict=False):
        a.contour(side, side, density, levels=8, cmap="Greys", linewidths=1)
        for start, p in zip(STARTS, paths, strict=True):
            p = np.vstack([start, p])
            a.plot(*p.T, lw=0.9, marker=".", ms=3)
            a.plot(*start, "ko", ms=6)
        a.set_title(f"SGLD, {title}, {len(paths[0])} steps")
    axes[2].scatter(*draws[:3000].T, s=4, alpha=0.3, color="tab:blue", linewidths=0, label="draws")
    axes[2].plot(*ellipse(COVARIANCE), "k", lw=2, label="target, 2 sd")
    axes[2].plot(*ellipse(law_of_sgld(step_size)), "tab:red", lw=2, ls="--", label=f"law at h = {step_size}, 2 sd")
    axes[2].legend(loc="lower right", fontsize=13, framealpha=0.9)
    axes[2].set_title("One draw of each chain")
    for a in axes:
        a.set(xlim=(-5, 5), ylim=(-5, 5), aspect="equal", xlabel="$x_1$")
    axes[0].set_ylabel("$x_2$")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(output: Path, num_chains: int) -> str:
    """Writes a table and a picture to the folder `output`, and returns the table."""
    output.mkdir(exist_ok=True)
    keys = jax.random.split(jax.random.key(0), 5)
    coarse, fine = 1.0, 0.1
    rows = {
        f"SGLD, h = {coarse}": (last_draws(SGLD(model, step_size=coarse), num_chains, keys[0]), law_of_sgld(coarse)),
        f"SGLD, h = {fine}": (last_draws(SGLD(model, step_size=fine), num_chains, keys[1]), law_of_sgld(fine)),
        f"MALA, h = {coarse}": (last_draws(MALA(model, step_size=coarse), num_chains, keys[2]), COVARIANCE),
    }
    warm = run(SGLD(model, step_size=fine), STARTS, 0, 60, keys[3])
    cold = run(SGLD(model, step_size=fine, temperature=0.0), STARTS, 0, 150, keys[4])
    picture(warm, cold, rows[f"SGLD, h = {coarse}"][0], coarse, output / "langevin_gaussian.png")
    text = "\n".join([
        "# Langevin dynamics on a correlated Gaussian", "",
        f"`examples/langevin_gaussian.py`: {num_chains} independent chains, one draw of each after 200 steps. The law "
        "of SGLD is N(0, (A − hA²/2)⁻¹) for the target N(0, A⁻¹); that of MALA is the target.", "",
        *table(rows), "",
        f"At temperature 0, 150 steps from four starts end at most {np.linalg.norm(cold[:, -1], axis=-1).max():.3f} "
        f"from the mode; each shrinks the slower direction by 1 − h/3, all by {(1 - fine / 3) ** 150:.4f}.", "",
        "![Trajectories and draws](langevin_gaussian.png)", "",
    ])  # fmt: skip
    (output / "langevin_gaussian.md").write_text(text)
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a tenth of the chains")
    quick = parser.parse_args().quick
    print(main(Path(__file__).parent / ("output" if quick else "results"), 10_000 if quick else 100_000))
