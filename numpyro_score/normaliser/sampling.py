"""Draws of the data from a fitted model."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro.infer import MCMC, NUTS
from numpyro.infer.mcmc import MCMCKernel

from numpyro_score.arviz import as_arviz, dataset, sample_stats
from numpyro_score.energy import Energy, lattice_density, num_values, rows_given
from numpyro_score.kernels import DiscreteKernel, Gibbs, GibbsWithGradients
from numpyro_score.losses.base import at_least_one
from numpyro_score.normaliser.coordinates import free_log_density, from_free, has_domain, row_to_data, to_free
from numpyro_score.normaliser.mixing import mixed, too_many_diverged
from numpyro_score.normaliser.source import Source, density_of, with_density
from numpyro_score.normaliser.tails import check_counts
from numpyro_score.placement import check_sharding
from numpyro_score.random import Key, as_key

__all__ = ["Kernel", "kernel_for", "run_chains", "sample"]

Kernel = Callable[..., Any]  # from potential_fn=... to an MCMCKernel

_FIELDS = ("potential_energy", "accept_prob", "num_steps", "diverging", "adapt_state.step_size")
_MAX_R_HAT = 1.01  # Vehtari et al. 2021


def sample(
    energy: Source,
    rng_key: Key,
    num_samples: int,
    *,
    kernel: Kernel | None = None,
    num_chains: int = 4,
    num_warmup: int = 1000,
    progress_bar: bool = False,
    sharding: jax.sharding.NamedSharding | None = None,
    given: Mapping[str, Any] | None = None,
) -> Any:
    """Draws data from an energy by MCMC, in the sites' own shapes.

    The chains run in free coordinates, without bounds: NumPyro's `biject_to` on bounded supports and simplices; on
    spheres v in R^d with x = v/‖v‖ and a density under which x has the law exp f. They start
    at rows of the data, chosen by the key. Draws are as good as the chains have mixed: look at `r_hat` and `ess`.

    Args:
        energy: an energy or a fit.
        rng_key: a key.
        num_samples: draws of each chain.
        kernel: a NumPyro kernel class such as NUTS, HMC or BarkerMH, or any function that makes a kernel from
            `potential_fn=`. A function must be the same object at the next call to be compiled only once. For discrete
            data :class:`~numpyro_score.Gibbs`, :class:`~numpyro_score.GibbsWithGradients`,
            :class:`~numpyro_score.DiscreteLangevin`, or a function that makes one from `potential_fn=`, `low=`, `high=`
            and `num_values=`. By default NUTS, Gibbs, and GibbsWithGradients for counts.
        num_chains: chains, run side by side.
        num_warmup: steps of each chain that are thrown away.
        progress_bar: show NumPyro's progress bar. Every call then compiles anew; without, calls with the same shapes
            compile once.
        sharding: over which devices to split the chains, e.g. `NamedSharding(mesh, PartitionSpec("chains"))`; of the
            data if the fit's are spread over several, one of the same devices.
        given: for a density given covariates, p(x | z), their values by the names of the model's arguments, M of each:
            `given={"z": z}`. The draws are then M rows for each, (chain, draw, given, ...), from chains of their own.

    Returns:
        ArviZ data, an `InferenceData` (ArviZ 0.23) or a `DataTree` (1.x), with the groups

        - `posterior`: the draws by site, (chain, draw, ...);
        - `sample_stats`: the kernel's, under ArviZ's names;
        - `r_hat`, `ess`: of each number of each site, rank-normalised R-hat and bulk ESS [Vehtari et al. 2021];
        - `observed_data`: the data.

    Raises:
        TypeError, ValueError: an energy without a density; rows with densities of their own; data at which the
            density is not finite; draws that are not finite; chains that `sharding` cannot split evenly, and a
            progress bar of such.

    Warns:
        UserWarning: if an R-hat is above 1.01, or what chance makes of many effective draws; if more than one in 200
            transitions diverged. It says what to try.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro.distributions import constraints
        >>> from numpyro_score import Energy, sample
        >>> def model(x):
        ...     with numpyro.plate("rows", len(x)):
        ...         x = numpyro.sample("x", dist.ImproperUniform(constraints.positive, (), ()), obs=x)
        ...         numpyro.factor("energy", -2.0 * x)
        >>> draws = sample(Energy(model, {}, jnp.array([0.5, 1.0])), jax.random.key(0), 1000)
        >>> abs(float(draws["posterior"]["x"].mean()) - 0.5) < 0.05  # an exponential law of rate 2
        True
    """
    num_samples = at_least_one("sample", "num_samples", num_samples)
    num_chains = at_least_one("sample", "num_chains", num_chains)
    if num_warmup != 0:
        num_warmup = at_least_one("sample", "num_warmup", num_warmup)
    if isinstance(kernel, MCMCKernel):
        name = type(kernel).__name__
        raise TypeError(
            f"sample needs a function that makes a kernel, got {name}(...): write e.g. "
            f"functools.partial({name}, step_size=0.1)."
        )
    key = as_key(rng_key, "write sample(fit, jax.random.key(0), 1000)")
    if given is not None:
        return _sample_given(energy, key, kernel, num_samples, num_chains, num_warmup, given)
    energy = density_of(energy)
    kernel = kernel_for(energy, kernel)
    check_counts(energy)
    check_sharding("sample", "num_chains", sharding, (num_chains, energy.dim), jax.sharding.NamedSharding)
    if sharding is not None and progress_bar:
        raise ValueError("sample has no progress bar for chains on several devices: write progress_bar=False.")
    run = run_chains if progress_bar else _compiled_chains
    x, stats = run(energy, key, kernel, num_samples, num_chains, num_warmup, progress_bar, sharding)
    return _to_arviz(energy, x, stats)


def kernel_for(energy: Energy, kernel: Kernel | None) -> Kernel:
    """The kernel, or the one for such data; raises where it is known not to move them."""
    if energy.is_mixed:
        raise NotImplementedError(
            "sample moves rows by one kernel, and these hold discrete and continuous numbers: condition on one of the "
            "sites with data='...', and draw them in turn."
        )
    discrete = bool(len(energy.discrete_columns))
    if kernel is None and discrete:
        return Gibbs if num_values(energy) is not None else GibbsWithGradients
    if kernel is None:
        return NUTS
    made = kernel.func if isinstance(kernel, partial) else kernel
    if inspect.isclass(made) and issubclass(made, DiscreteKernel) != discrete:
        kind = "discrete" if discrete else "continuous"
        instead = "Gibbs, GibbsWithGradients or DiscreteLangevin" if discrete else "NUTS"
        raise TypeError(
            f"{made.__name__} does not move the data of site '{energy.arrays[0].name}', which is {kind}: use {instead}."
        )
    return kernel


def _sample_given(
    source: Source,
    rng_key: Array,
    kernel: Kernel | None,
    num_samples: int,
    num_chains: int,
    num_warmup: int,
    given: Mapping[str, Any],
) -> Any:
    """Draws of rows with densities of their own, in chains side by side."""
    start = with_density(source)
    kernel = kernel_for(start, kernel)
    energies = rows_given(start, given)
    usable, weights = start.usable()
    start_key, run_key = jax.random.split(rng_key)
    shape = (len(energies), num_chains)
    chance = (weights != 0).astype(weights.dtype)
    rows = jax.random.choice(start_key, usable.data, shape, p=chance)  # of the data, whatever their covariates
    for energy in (energies[0], energies[-1]):
        energy.check()
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *energies)
    keys = jax.random.split(run_key, len(energies))
    x, stats = _chains_given(stacked, keys, rows, kernel, num_samples, num_chains, num_warmup)
    return _to_arviz(energies[0], jnp.moveaxis(x, 0, 2), {k: jnp.moveaxis(v, 0, 2) for k, v in stats.items()}, start)


@partial(jax.jit, static_argnames=("kernel", "num_samples", "num_chains", "num_warmup"))
def _chains_given(
    energies: Energy, keys: Array, rows: Array, kernel: Kernel, num_samples: int, num_chains: int, num_warmup: int
) -> tuple[Float[Array, "m chain draw d"], dict[str, Array]]:
    def run(energy: Energy, key: Array, rows: Array) -> tuple[Array, dict[str, Array]]:
        return run_chains(energy, key, kernel, num_samples, num_chains, num_warmup, rows=rows)

    return jax.vmap(run)(energies, keys, rows)


def run_chains(
    energy: Energy,
    rng_key: Array,
    kernel: Kernel,
    num_samples: int,
    num_chains: int,
    num_warmup: int,
    progress_bar: bool = False,
    sharding: jax.sharding.NamedSharding | None = None,
    rows: Float[Array, "chain d"] | None = None,
) -> tuple[Float[Array, "chain draw d"], dict[str, Array]]:
    """Rows that chains draw, and the kernel's statistics, (chain, draw) each; pure unless there is a bar.

    They start at `rows`, of the data if not given.
    """
    start_key, free_key, run_key = jax.random.split(rng_key, 3)
    if rows is None:
        usable, weights = energy.usable()
        rows = jax.random.choice(start_key, usable.data, (num_chains,), p=(weights != 0).astype(weights.dtype))
    u = to_free(energy, rows, rng_key=free_key)
    keys = run_key[None] if num_chains == 1 else jax.random.split(run_key, num_chains)  # as MCMC would

    def chains(energy: Energy, u: Array, keys: Array) -> tuple[Array, dict[str, Array]]:
        if len(energy.discrete_columns):
            f, (low, high) = lattice_density(energy), (bound[0] for bound in energy.bounds(1))
            settings = dict(low=low, high=high, num_values=num_values(energy))
        else:
            f, settings = partial(free_log_density, energy), {}

        def new_kernel() -> Any:
            return kernel(potential_fn=lambda u: -f(u), **settings)

        state = jax.eval_shape(lambda: new_kernel().init(keys[0], num_warmup, u[0], (), {}))
        # Of the type: a kernel's property may need values, and there are none yet.
        fields = [name for name in _FIELDS if hasattr(type(state), name.partition(".")[0])]
        mcmc = MCMC(
            new_kernel(),
            num_warmup=num_warmup,
            num_samples=num_samples,
            num_chains=len(u),
            chain_method="vectorized",
            progress_bar=progress_bar,
        )
        rng_key, start = (keys, u) if len(u) > 1 else (keys[0], u[0])
        mcmc.run(rng_key, init_params=start, extra_fields=fields)
        x, _ = from_free(energy, mcmc.get_samples(group_by_chain=True))
        return x, mcmc.get_extra_fields(group_by_chain=True)

    energy = energy.at(rows[:1])  # whose data are not needed any more, and may lie elsewhere
    if sharding is None:
        return chains(energy, u, keys)
    # Each device steps through its own chains: side by side all would wait for the longest path of any.
    split, same = jax.sharding.PartitionSpec(*sharding.spec[:1]), jax.sharding.PartitionSpec()
    run = jax.shard_map(chains, mesh=sharding.mesh, in_specs=(same, split, split), out_specs=split, check_vma=False)
    return run(energy, u, keys)


_compiled_chains = jax.jit(
    run_chains, static_argnames=("kernel", "num_samples", "num_chains", "num_warmup", "progress_bar", "sharding")
)


def _to_arviz(
    energy: Energy, x: Float[Array, "chain draw *given d"], stats: dict[str, Array], start: Energy | None = None
) -> Any:
    """As ArviZ data; `start` is the energy of the data where draws are of rows that were given covariates."""
    if not jnp.isfinite(x).all():
        raise ValueError(
            "Draws are not finite: the density is not normalisable, or the kernel's step size is too large."
        )
    axes = ("chain", "draw") if start is None else ("chain", "draw", "given")
    of_row = partial(row_to_data, energy)
    for _ in axes:
        of_row = jax.vmap(of_row)
    draws = dataset(of_row(x), axes)
    groups = {"posterior": draws, "sample_stats": dataset(sample_stats(stats), axes)}
    if x.shape[1] > 3:
        groups |= {"r_hat": az.rhat(draws), "ess": az.ess(draws)}
        if not mixed(groups["r_hat"], groups["ess"], _MAX_R_HAT, math.prod(x.shape[:2])):
            warnings.warn(
                _not_mixed(groups["r_hat"], x, bool(len(energy.discrete_columns))), stacklevel=3 if start is None else 4
            )
    # Paths that leave a domain end there, as divergences; the draws are no worse for it.
    count = int(np.sum(stats.get("diverging", 0)))
    if too_many_diverged(count, math.prod(x.shape[:-1])) and not has_domain(energy):
        warnings.warn(
            f"{count} of {math.prod(x.shape[:-1])} transitions diverged, and draws may miss narrow places: try smaller "
            "steps, kernel=functools.partial(NUTS, target_accept_prob=0.95), or look whether the density is "
            "normalisable there, by log_partition.",
            stacklevel=3 if start is None else 4,
        )
    start = energy if start is None else start
    groups["observed_data"] = dataset(start.unflatten(start.data), ())
    own_coords, own_dims = start.labels.as_coords(start.arrays)
    return as_arviz(groups, own_coords=own_coords, own_dims=own_dims)


def _not_mixed(r_hat: Any, x: Float[Array, "chain draw *given d"], discrete: bool) -> str:
    """What is seen of chains that have not mixed, and what to try."""
    worst = {str(k): float(v.max(skipna=False)) for k, v in r_hat.data_vars.items()}
    site = max(worst, key=lambda k: np.inf if np.isnan(worst[k]) else worst[k])
    found = f"The largest R-hat is {worst[site]:.3g}, in site '{site}'"
    chains = np.asarray(x, np.float64).reshape(*x.shape[:2], -1)
    if chains.shape[0] == 1:
        return f"{found}, of one chain: draw num_chains=4 to see whether they agree."
    between, within = chains.mean(1).std(0), chains.std(1).mean(0)
    if np.any(between > 1.5 * within):
        method = "ais" if discrete else "smc"
        other = "" if discrete else ", and a model of many noise levels draws from all (diffuse)"
        return (
            f"{found}, and the chains stay in places of their own, as between modes far apart: their shares cannot be "
            f"told from such draws. More warmup hardly helps; log_partition(fit, '{method}', rng_key=key) "
            f"tempers between modes{other}."
        )
    instead = (
        "take another kernel of Gibbs, GibbsWithGradients and DiscreteLangevin"
        if discrete
        else "scale the columns of the data to like spreads, or use kernel=functools.partial(NUTS, dense_mass=True) "
        "where they are correlated"
    )
    return (
        f"{found}: run longer chains, num_samples={4 * x.shape[1]}, or more warmup, num_warmup=...; "
        f"if that does not help, {instead}."
    )
