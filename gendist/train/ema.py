"""The power-function profile of an exponential moving average (Karras et al. 2024, "Analyzing and improving the training
dynamics of diffusion models", section 3.1 and appendix C): its width grows with training, so one number fits any length.
"""

from __future__ import annotations

import numpy as np

MAX_WIDTH = 12.0**-0.5  # of the uniform average over all steps, gamma 0


def gamma_of_width(width: float) -> float:
    """The exponent of the profile whose standard deviation is this share of the steps taken, more than 0 and up to 0.288.

    The positive root of (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = width^2, as in edm2's `phema.std_to_exp`.
    """
    assert 0.0 < width <= MAX_WIDTH, width
    t = width**-2
    return float(np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max())


def decay(gamma: float, step: int) -> float:
    """What the average keeps of itself at the network's step-th optimizer step, counted from 1: (1 - 1/step)^(gamma + 1).

    average <- decay * average + (1 - decay) * parameters; at the first step the average becomes the parameters.
    """
    return float((1.0 - 1.0 / step) ** (gamma + 1.0))
