"""PCD killed at random moments, and gone on with: `python -m benchmarks.endurance`. Writes ENDURANCE.md.

One process takes all steps undisturbed. Then others take the same steps with one directory: each is killed by SIGKILL,
which no process sees coming, and the next goes on, until the last one ends. What both give is compared to the bit.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

from benchmarks import machine
from numpyro_score import MALA, PCD, ScoreMatching
from numpyro_score.inference import checkpoint

OUTPUT = Path(__file__).with_name("ENDURANCE.md")
DIM, ROWS, CHAINS = 8, 2000, 1024
EVERY = 0.5  # seconds between two saves, at least
OFTEN, USUAL = 0.5, 0.01  # the share of the time that saves may take: where there are kills, and as users have it
KINDS = {"anywhere": 0.5, "in a save": 0.4, "while it starts": 0.1}  # where kills fall, and how often
FLAT = 0.02


# -- the process that is killed -----------------------------------------------------------------


def quartic(x: Any) -> None:
    """Quartic tails with interactions that saturate."""
    a = numpyro.param("a", jnp.ones(DIM), constraint=constraints.positive)
    w = numpyro.param("w", jnp.zeros((DIM, DIM)))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (DIM,)), obs=x)
        t = jnp.tanh(x)
        numpyro.factor("energy", jnp.einsum("ni,ij,nj->n", t, w, t) - jnp.sum(a * x**4, -1))


def fitter() -> tuple[ScoreMatching, Any]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, DIM)) @ (0.6 * np.eye(DIM) + 0.2 * np.eye(DIM, k=1))
    loss = PCD(kernel=MALA(step_size=0.05), num_chains=CHAINS, num_steps=10)
    return ScoreMatching(quartic, loss=loss, average=0.99), jnp.asarray(x, jnp.float32)


def seconds_per_step() -> float:
    svi, x = fitter()
    for _ in range(2):  # the first compiles
        begin = time.perf_counter()
        svi.run(1, x, num_steps=1000, progress_bar=False)
    return (time.perf_counter() - begin) / 1000


def run(directory: Path, num_steps: int, share: float) -> None:
    """The fit, with all that it gives in a file beside its directory."""
    checkpoint._SHARE = share
    start = checkpoint.Checkpoint.start

    def told(self: Any, state: Any) -> Any:
        found = start(self, state)
        print(f"began {found[0]}", flush=True)
        return found

    checkpoint.Checkpoint.start = told  # type: ignore[method-assign]
    svi, x = fitter()
    fit = svi.run(1, x, num_steps=num_steps, progress_bar=False, checkpoint=directory, checkpoint_every=EVERY)
    named = jax.tree_util.tree_flatten_with_path((fit.params, fit.state, fit.losses))[0]
    found = {jax.tree_util.keystr(path): v for path, v in named}
    keys = {k: jax.dtypes.issubdtype(v.dtype, jax.dtypes.prng_key) for k, v in found.items()}
    found = {k: np.asarray(jax.random.key_data(v) if keys[k] else v) for k, v in found.items()}
    part = directory.with_suffix(".part.npz")
    np.savez(part, **found)
    part.rename(directory.with_suffix(".npz"))


# -- the process that kills ---------------------------------------------------------------------


def saves(directory: Path) -> tuple[int, list[str]]:
    """The step of the last whole save, 0 without any, and those that are being written."""
    names = os.listdir(directory) if directory.exists() else []
    return max([int(n) for n in names if n.isdigit()], default=0), [n for n in names if not n.isdigit()]


@dataclass
class Life:
    """One process.

    Attributes:
        kind: how it ends.
        began: the step that it began at, None if it never came so far.
        saved: the step of the last whole save when it ended.
        cut: saves that were being written when it ended.
        unread: saves that it could not read.
        memory: resident megabytes after its second save, with the seconds of each.
    """

    kind: str
    began: int | None = None
    saved: int = 0
    cut: int = 0
    unread: int = 0
    seconds: float = 0.0
    memory: list[tuple[float, float]] = field(default_factory=list)


def resident(pid: int) -> float:
    """Megabytes in memory."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0.0


def live(
    directory: Path, num_steps: int, kind: str, due: Callable[[float, int, bool], bool], share: float = OFTEN
) -> Life:
    """Starts a process and waits for its end, or kills it when it is due.

    Args:
        directory: of the checkpoint.
        num_steps: steps of the whole run.
        kind: how it is to end.
        due: from the seconds since its start, the last whole save, and whether one is being written.
        share: of the time that saves may take.
    """
    log, life = directory.with_suffix(".log"), Life(kind)
    command = [sys.executable, "-m", "benchmarks.endurance", "--child", str(directory), "--steps", str(num_steps)]
    command += ["--share", str(share)]
    begin, at_start, seen, looked = time.perf_counter(), saves(directory)[0], [0], 0.0
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=OUTPUT.parent.parent)
        try:
            while process.poll() is None:
                seconds = time.perf_counter() - begin
                newest, writing = saves(directory)
                if newest > max(at_start, seen[-1]):
                    seen.append(newest)
                if len(seen) > 2 and seconds - looked > 0.1 and (megabytes := resident(process.pid)):
                    looked = seconds
                    life.memory.append((seconds, megabytes))
                if due(seconds, newest, bool(writing)):
                    process.send_signal(signal.SIGKILL)
                time.sleep(0.002)
        finally:
            process.kill()
            process.wait()
    life.seconds = time.perf_counter() - begin
    life.saved, writing = saves(directory)
    life.cut = len(writing)
    printed = log.read_text()
    life.unread = printed.count("cannot be read")
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"The process ended with {process.returncode}:\n{printed}")
    life.began = next((int(line.split()[1]) for line in printed.splitlines() if line.startswith("began ")), None)
    return life


def executioner(kind: str, target: int, rng: random.Random) -> Callable[[float, int, bool], bool]:
    """When a process is due: at a random moment, after the save of a step, but in the kind that does not live so long.

    Args:
        kind: one of `KINDS`.
        target: the step.
        rng: random numbers.
    """
    reached: list[float] = []
    wait = {"anywhere": 2.0, "in a save": 0.15, "while it starts": 12.0}[kind] * rng.random()

    def due(seconds: float, newest: int, writing: bool) -> bool:
        if kind == "while it starts":
            return seconds > wait
        if not reached and newest >= target and seconds > 2.0 and (writing or kind == "anywhere"):
            reached.append(seconds)
        return bool(reached) and seconds > reached[0] + wait

    return due


def endure(directory: Path, num_steps: int, kills: int, seed: int) -> list[Life]:
    """All lives, the last of which ends by itself."""
    rng = random.Random(seed)
    targets = sorted(rng.randrange(num_steps * 9 // 10) for _ in range(kills))
    counts = {k: round(kills * share) for k, share in KINDS.items()}
    kinds = [k for k, n in counts.items() for _ in range(n)][:kills]
    kinds += ["anywhere"] * (kills - len(kinds))
    rng.shuffle(kinds)
    lives = []
    for number, (kind, target) in enumerate(zip(kinds, targets, strict=True), 1):
        lives.append(live(directory, num_steps, kind, executioner(kind, target, rng)))
        last = lives[-1]
        print(f"{number}: {kind}, began {last.began}, saved {last.saved} of {num_steps}, cut {last.cut}", flush=True)
        if directory.with_suffix(".npz").exists():
            raise RuntimeError(f"The run ended before kill {number} of {kills}.")
    return [*lives, live(directory, num_steps, "its own end", lambda *_: False)]


# -- what came of it ----------------------------------------------------------------------------


def unequal(one: Path, other: Path) -> dict[str, bool]:
    """Whether each array has other bits."""
    with np.load(one) as a, np.load(other) as b:
        assert a.files == b.files
        return {
            k: (a[k].dtype, a[k].shape, a[k].tobytes()) != (b[k].dtype, b[k].shape, b[k].tobytes()) for k in a.files
        }


def spread(memory: list[tuple[float, float]], windows: int) -> float:
    """The largest median over the smallest, less 1, of as many windows."""
    medians = [np.median(part) for part in np.array_split([m for _, m in memory], windows)]
    return float(max(medians) / min(medians) - 1)


def lost(lives: list[Life]) -> int:
    """Saves that were whole when a process was killed, and that the next one did not go on from."""
    count, before = 0, 0
    for life in lives:
        count += (life.began is not None and life.began != before) + life.unread + (life.saved < before)
        before = life.saved
    return count


def render(whole: Life, lives: list[Life], num_steps: int, wrong: dict[str, bool], minutes: float) -> tuple[str, bool]:
    """The page, and whether all held."""
    warm = [m for m in whole.memory if m[0] > 0.2 * whole.seconds]
    over_run = spread(warm, 10)
    long = [life.memory for life in lives if life.memory and life.memory[-1][0] - life.memory[0][0] > 10.0]
    of_lives = [spread(memory, 2) for memory in long]
    killed = [life for life in lives if life.kind in KINDS]
    equal, flat = not any(wrong.values()), max([over_run, *of_lives]) <= FLAT
    kinds = ", ".join(f"{sum(life.kind == k for life in killed)} {k}" for k in KINDS)
    rows = [
        ("kills by SIGKILL", f"{len(killed)}: {kinds}"),
        ("resumes", f"{len(lives) - 1}, {sum(bool(life.began) for life in lives[1:])} of which read a save"),
        ("kills that cut a save short", sum(life.cut > 0 for life in killed)),
        ("whole saves lost", lost(lives)),
        (
            f"arrays that differ, of {len(wrong)}: parameters, optimiser, average, chains, key, losses",
            sum(wrong.values()),
        ),
        ("resident memory undisturbed, largest over smallest", f"{100 * over_run:.2f}%"),
        (
            f"the same in each of {len(long)} lives, at most",
            f"{100 * max(of_lives):.2f}%" if of_lives else "none was long enough",
        ),
        ("resident memory, MB", f"{np.median([m for _, m in warm]):.0f}"),
    ]
    held = equal and flat and not lost(lives)
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    seconds = sum(life.seconds for life in lives)
    return (
        f"""# Endurance

Written by `python -m benchmarks.endurance` in {minutes:.0f} minutes. PCD with {CHAINS:,} chains on {ROWS:,} rows of
{DIM} numbers, the default optimiser and an average of the parameters, {num_steps:,} steps. One process took them
undisturbed in {whole.seconds:.0f} s; {len(lives)} others took them one after the other in {seconds:.0f} s, all but the
last killed at random. Saves are {EVERY} s apart or farther; they may take {
            USUAL:.0%} of the time of the first, as ever,
and {OFTEN:.0%} of that of the others, so that there are as many as kills.

**{"All held" if held else "Something failed"}**: {"the same numbers to the bit" if equal else "other numbers"}, {
            "memory flat" if flat else "memory not flat"
        } within {FLAT:.0%}, {"no" if not lost(lives) else lost(lives)} save lost.

| | |
|---|---|
{table}

- *Kills*: "anywhere" is up to 2 s after a save of a random step, "in a save" up to 0.15 s after a temporary item
  appeared in the directory, "while it starts" up to 12 s after the process began, as it imports, compiles and reads. A
  save was cut short if the temporary item is still there after the kill.
- *A whole save is lost* if it cannot be read, is gone, or the next process goes on from another.
- *Memory* is the resident set of the process, ten times a second. Undisturbed: after a fifth of the run, the medians of
  ten windows. In a life: after its second save, the medians of its halves, where these last for 10 s. TensorStore keeps
  some kB of each save.

{machine.describe((*machine.PACKAGES, "orbax-checkpoint"))}
- Load average: {machine.load()} at the end
""",
        held,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.endurance", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="of all, about")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help=f"a Markdown file; of a full run {OUTPUT.name}")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run(options.child, options.steps, options.share)
        return
    begin, start_up = time.perf_counter(), 14.0  # seconds until a process takes steps, and those it takes in vain
    for_steps = max(60 * options.minutes - start_up * (options.kills + 2), 20.0 * options.minutes)
    num_steps = max(int(for_steps / 2 / seconds_per_step()), 1000)
    print(f"{num_steps} steps", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        whole, parts = Path(folder) / "whole", Path(folder) / "parts"
        undisturbed = live(whole, num_steps, "its own end", lambda *_: False, USUAL)
        print(f"undisturbed: {undisturbed.seconds:.0f} s", flush=True)
        lives = endure(parts, num_steps, options.kills, options.seed)
        wrong = unequal(whole.with_suffix(".npz"), parts.with_suffix(".npz"))
        for name in (k for k, differs in wrong.items() if differs):
            print(f"{name} differs", flush=True)
    text, held = render(undisturbed, lives, num_steps, wrong, (time.perf_counter() - begin) / 60)
    print(text)
    full = options.minutes >= 30 and options.kills >= 50
    if output := options.output or (OUTPUT if full else None):
        output.write_text(text)
    sys.exit(not held)


if __name__ == "__main__":
    main()
