"""`RowBatch`: the running sequences' states, packed, so that a step costs what its rows cost."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from exporters.onnx import OnnxDecoder, OnnxState

LEAST_ROWS = 2
"""Rows of the smallest step.

A product of one row with a matrix goes another way through the CPU's kernels than that of several,
and is rounded otherwise in the last bit. Idle rows beside a single one make every answer the same,
bit for bit, whoever it runs beside.
"""


class RowBatch:
    """A constant-size row for each running sequence.

    The states lie in arrays for `capacity` rows, made once. The running ones are the first N rows
    of each, which are contiguous: a step runs over a view of them, in place. A row that joins is
    written behind them; where one leaves, the last one takes its place. So neither copies more than
    one row, and a step of few rows does not pay for the free ones.

    Parameters
    ----------
    decoder
        On the CPU, where ONNX Runtime and NumPy share memory.
    capacity
        Rows.

    Raises
    ------
    ValueError
        If the decoder runs on another device.
    """

    def __init__(self, decoder: OnnxDecoder, capacity: int) -> None:
        if decoder.placement.device != "cpu":
            raise ValueError(
                f"decoder: runs on {decoder.placement.device!r}, expected 'cpu'; load it with "
                "providers=['CPUExecutionProvider']"
            )
        self.capacity = capacity
        self.rows = 0
        self._decoder = decoder
        self._buffers = decoder.new_state(max(capacity, LEAST_ROWS)).numpy()
        self._view: OnnxState | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, free ones included."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def join(self, state: OnnxState) -> int:
        """Copy the one sequence of `state` into a row; the row's number, the highest.

        Raises
        ------
        RuntimeError
            If all rows are taken.
        """
        if self.rows == self.capacity:
            raise RuntimeError(f"state: all {self.capacity} rows are taken")
        self._settle()
        for name, value in state.arrays.items():
            self._buffers[name][self.rows] = value.numpy()[0]
        self.rows += 1
        return self.rows - 1

    def leave(self, row: int) -> None:
        """Free a row; the last running one moves to its place.

        Raises
        ------
        IndexError
            If no such row is running.
        """
        if not 0 <= row < self.rows:
            raise IndexError(f"row: got {row}, expected 0 to {self.rows - 1}")
        self._settle()
        self.rows -= 1
        if row != self.rows:
            for buffer in self._buffers.values():
                buffer[row] = buffer[self.rows]

    def step(self, tokens: list[int]) -> np.ndarray:
        """Feed each running row its token.

        Parameters
        ----------
        tokens
            One a row, in the rows' order.

        Returns
        -------
        numpy.ndarray
            Logits [N, vocabulary].
        """
        width = max(self.rows, LEAST_ROWS)
        ids = np.zeros((width, 1), np.int64)
        mask = np.zeros((width, 1), np.int64)
        ids[: self.rows, 0] = tokens
        mask[: self.rows] = 1
        if self._view is None:
            self._view = self._first(width)
        return last_logits(self._decoder.append(self._view, ids, mask))[: self.rows]

    def _first(self, width: int) -> OnnxState:
        arrays = {
            name: ort.OrtValue.ortvalue_from_numpy(buffer[:width])
            for name, buffer in self._buffers.items()
        }
        return OnnxState(self._decoder.manifest, self._decoder.placement, arrays)

    def _settle(self) -> None:
        """Give up the view, and keep what its steps did not write in place."""
        if self._view is None:
            return
        for name, value in self._view.arrays.items():
            buffer = self._buffers[name]
            if value.data_ptr() != buffer.ctypes.data:
                buffer[: self._view.batch_size] = value.numpy()
        self._view = None


def last_logits(logits: np.ndarray) -> np.ndarray:
    """[B, vocabulary] of the last token, also of a model exported with all logits."""
    return logits if logits.ndim == 2 else logits[:, -1]
