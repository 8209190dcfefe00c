"""The values of all steps of a run, in a file that is only ever appended to."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from jaxtyping import Float

__all__ = ["Record"]


class Record:
    """Rows of numbers, one for each step, after each other in a file without a header.

    A save of the states would otherwise hold the values of all steps before it, and take longer the longer a run is.

    Args:
        path: of the file.
        width: numbers in a row.
        dtype: of each.
    """

    def __init__(self, path: Path, width: int, dtype: np.dtype) -> None:
        self.path, self.width, self.dtype = path, width, np.dtype(dtype).newbyteorder("<")

    def read(self, num_rows: int) -> Float[np.ndarray, "n w"]:
        """The first rows.

        Raises:
            OSError, ValueError: if they are not there.
        """
        found = np.fromfile(self.path, self.dtype, num_rows * self.width) if num_rows else np.zeros(0, self.dtype)
        if len(found) < num_rows * self.width:
            raise ValueError(f"{self.path.name} holds {len(found) // self.width} of {num_rows} steps")
        return found.reshape(num_rows, self.width).astype(self.dtype.newbyteorder("="))

    def append(self, num_rows: int, rows: Float[np.ndarray, "n w"]) -> None:
        """Writes rows behind the first `num_rows`, in the place of what is there; they are on disk when it returns."""
        with open(self.path, "r+b" if self.path.exists() else "w+b") as file:
            file.seek(num_rows * self.width * self.dtype.itemsize)
            file.write(np.ascontiguousarray(rows, self.dtype).tobytes())
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
