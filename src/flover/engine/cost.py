"""What a step costs, learned from the steps: seconds ~ a + b x decode rows + c x prefill tokens.

Least squares over the recent past (older steps count exponentially less), no coefficient below zero. It bounds the
prefill of a step, so that no decode row waits longer than its budget for its next token.
"""

from __future__ import annotations

import numpy as np

FORGET = 0.98  # weight of the past, per step
MARGIN = 0.9  # of the budget: steps scatter
PROBE = 64  # prefill tokens of a step before any has been seen
SCALE = np.array([1.0, 32.0, 256.0])  # of the features, so that the equations are well conditioned


class StepCost:
    """budget: seconds that a step with decode rows may take."""

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self._xx, self._xy = np.zeros((3, 3)), np.zeros(3)
        self._num_prefills = 0

    def observe(self, num_decode: int, num_prefill: int, seconds: float) -> None:
        """A step has taken that long."""
        x = np.array([1.0, num_decode, num_prefill]) / SCALE
        self._xx = FORGET * self._xx + np.outer(x, x)
        self._xy = FORGET * self._xy + x * seconds
        self._num_prefills += num_prefill > 0

    def coefficients(self) -> tuple[float, float, float]:
        """a, b, c: seconds, per row, per token."""
        used = [0, 1, 2]
        while True:  # a coefficient below zero is left out, and the others fitted again
            xx = self._xx[np.ix_(used, used)]
            fit = np.linalg.solve(xx + 1e-6 * np.eye(len(used)) * max(np.trace(xx), 1e-12), self._xy[used])
            if len(used) == 1 or fit.min() >= 0:
                break
            del used[int(fit.argmin())]
        result = np.zeros(3)
        result[used] = np.maximum(fit, 0.0)
        a, b, c = (result / SCALE).tolist()
        return a, b, c

    def prefill_tokens(self, num_decode: int) -> int:
        """How many may be computed beside so many decode rows; 0 if those alone fill the budget."""
        if not self._num_prefills:
            return PROBE
        a, b, c = self.coefficients()
        left = MARGIN * self.budget - a - b * num_decode
        return max(0, int(left / c)) if c > 0 else PROBE
