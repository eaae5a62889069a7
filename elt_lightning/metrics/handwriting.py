"""The 1,797 real handwritten digits that come with scikit-learn: 8×8 pixels, 17 grey levels, no download.

Source: "Optical recognition of handwritten digits", E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from elt_lightning.errors import UserError

LEVELS = 17
SIDE = 8


class Handwriting(NamedTuple):
    """Digits: images (n, 1, 8, 8) float in [0, 1], multiples of 1/16, and labels (n,) int64 in [0, 10)."""

    images: Tensor
    labels: Tensor


def load_handwriting(val: bool) -> Handwriting:
    """Load the digits that training uses (four of five), or those held out for metrics (every fifth of each class).

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the handwritten digits need scikit-learn: pip install 'elt-lightning[digits]'") from error
    images, labels = load_digits(return_X_y=True)
    place_in_class = np.empty_like(labels)
    for digit in range(10):
        place_in_class[labels == digit] = np.arange((labels == digit).sum())
    chosen = (place_in_class % 5 == 4) == val
    pixels = torch.from_numpy(images[chosen] / (LEVELS - 1)).float().view(-1, 1, SIDE, SIDE)
    return Handwriting(pixels, torch.from_numpy(labels[chosen]).long())
