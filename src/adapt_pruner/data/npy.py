"""Write .npy files row by row."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np


class RowWriter:
    """Writes values to an .npy file of shape (N, T), N growing. Use as a context manager.

    `digest` is a hash of all rows.
    """

    def __init__(self, file: Path, length: int, dtype: Any):
        self.file, self.length, self.dtype = file, length, np.dtype(dtype)
        self.num_rows, self.digest = 0, hashlib.sha256()
        self._rest = np.empty(0, dtype=self.dtype)

    def __enter__(self) -> RowWriter:
        self._stream = self.file.open("wb")
        self._write_header()
        return self

    def __exit__(self, *exc: Any) -> None:
        with self._stream:
            if exc[0] is None:
                self._stream.seek(0)
                self._write_header()  # numpy leaves room in it for the first axis to grow

    @property
    def num_values(self) -> int:
        """Values so far, with those that do not fill a row yet and are lost if they never do."""
        return self.num_rows * self.length + len(self._rest)

    def add(self, values: np.ndarray) -> np.ndarray:
        """Append values, and return the rows (n, T) that they filled."""
        values = np.concatenate([self._rest, values.astype(self.dtype)])
        filled, self._rest = np.split(values, [len(values) // self.length * self.length])
        self._stream.write(filled.data)
        self.digest.update(filled.data)
        self.num_rows += len(filled) // self.length
        return filled.reshape(-1, self.length)

    def _write_header(self) -> None:
        np.lib.format.write_array_header_1_0(
            self._stream,
            {
                "descr": np.lib.format.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": (self.num_rows, self.length),
            },
        )
