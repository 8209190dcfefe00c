"""How many rows a loss takes at once: the one place that knows, for CPUs and for accelerators.

A loss over rows is a sum, and can be taken in chunks of rows. On a CPU a chunk whose intermediates fit the cache is
faster. An accelerator wants large batches, and a chunk only bounds the memory: it may take `CHUNK_BYTES`, by an
estimate of what the gradient keeps of each row. So the memory of a step does not grow with the number of rows beyond
that, but for the data themselves.

The estimate is `KEPT` of all the numbers that the operations of the density give for a row, layer by layer, for each
evaluation of the density that the loss stands for. Chunks that large are to keep a device busy: a layer of a chunk has
some 2**25 numbers, which are thousands of the tiles that the multiprocessors of a GPU take in turn, so that what is
idle in the last turn, and what starting a chunk costs, should be a few percent of it. `python -m benchmarks.gpu`
measures that for ISM. Chunks take their turn one by one there. Problems below the bound are not cut.
"""

from __future__ import annotations

from numpyro_score.energy import Energy
from numpyro_score.placement import on_cpu

__all__ = ["CHUNK_BYTES", "chunks_in_a_pass", "narrowness", "rows_at_once", "rows_in_cache"]

CHUNK_BYTES = 2**31
"""What a chunk of rows may take on an accelerator, by the estimate."""

# Of a layer with swish, which gives product, sum, σ and product again, XLA keeps three numbers of four. On a CPU a
# gradient takes 0.8 to 1.25 times the estimate for every loss here, widths of 64 to 256, 2 to 64 dimensions and two to
# six layers. A GPU works more out anew: ISM took 0.55 times the estimate on an H100, for all of 8,192 rows, D = 64 and
# three layers of 512.
KEPT = 0.75


def rows_at_once(energy: Energy, evaluations: int, in_cache: int | None) -> int | None:
    """The rows that a loss is best taken of at once; None for all of them.

    Args:
        energy: the density.
        evaluations: as how many evaluations of the density a row counts, in what the gradient of the loss keeps. The
            score at a point counts as two, a value and D derivatives as D + 2.
        in_cache: the answer on a CPU.

    The rows of a model that takes no other number of them are never cut, whatever is said here.
    """
    if on_cpu():
        return in_cache
    per_row = KEPT * evaluations * energy.numbers_per_row * energy.dtype.itemsize
    return max(int(CHUNK_BYTES / per_row), 1)


def rows_in_cache(energy: Energy, numbers_per_row: int = 1) -> int:
    """Rows whose intermediates fit the cache of a CPU, for losses that keep few numbers for each activation."""
    # At width 128, 512 rows and D = 2 to 64, chunks of 128 rows took 0.88 to 0.97 of the time of all rows at once for
    # both forms of DSM and plain SSM; chunks of 64 took more.
    return max(128 * narrowness(energy) // numbers_per_row, 4)


def narrowness(energy: Energy) -> int:
    """How many times more rows of this density fit the cache than of a network of width 128; wider ones count as 1."""
    return max(128 // energy.width, 1)


def chunks_in_a_pass() -> int:
    """How many chunks one pass of the loop over them takes."""
    # Several keep several cores busy: at D = 16, four took 0.77 of the time of two. An accelerator has one stream of
    # work, and all chunks of a pass may be in its memory at once.
    return 4 if on_cpu() else 1
