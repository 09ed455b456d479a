"""Numbers to compare models by, from the total log-likelihood of a fit; of each the lower is the better."""

from __future__ import annotations

import math


def aic(num_parameters: int, log_likelihood: float) -> float:
    """Akaike's information criterion (Akaike 1974)."""
    return 2.0 * num_parameters - 2.0 * log_likelihood


def bic(num_parameters: int, log_likelihood: float, total_weight: float) -> float:
    """Bayesian information criterion; total_weight is the number of samples where none is weighted (Schwarz 1978)."""
    return num_parameters * math.log(total_weight) - 2.0 * log_likelihood
