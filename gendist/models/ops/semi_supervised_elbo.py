"""A class y beside the latents z, which is known of some rows and not of others: M2 of Kingma, Rezende, Mohamed & Welling 2014,
"Semi-supervised learning with deep generative models".

    p(x, y, z) = p(y) p(z) p(x | y, z), where p(y) is uniform over C classes,  q(y, z | x) = q(y | x) q(z | x, y)

With ELBO(x | y) a lower bound of log p(x | y), the bounds of a row are

    labelled      log p(x, y) >= ELBO(x | y) + log p(y)                                               (their eq. 6)
    unlabelled    log p(x)    >= sum over y of q(y | x) (ELBO(x | y) + log p(y)) + H(q(y | x))        (eq. 7)

So all that a network must compute is ELBO(x | y) of the pairs of a row and a class that it may have: one of a labelled row, C
of any other. A row whose label is soft has the bound of each class it may have, weighed by the label's p(class).
Legend: B rows of a micro-batch, C classes, P pairs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gendist.cost import has_values
from gendist.protocols import UserError, is_labelled


class Pairs(NamedTuple):
    """rows (P,) the places of the rows in the micro-batch, ascending; classes (P,), both int64."""

    rows: Tensor
    classes: Tensor


def pairs_of(evidence_BC: Tensor) -> Pairs:
    """Each row with each class that its evidence does not exclude; with every one where a cost is counted."""
    if not has_values(evidence_BC):
        num_rows, num_classes = evidence_BC.shape
        rows_P = torch.arange(num_rows).repeat_interleave(num_classes)
        return Pairs(rows_P, torch.arange(num_classes).repeat(num_rows))
    rows_P, classes_P = (evidence_BC > -torch.inf).nonzero(as_tuple=True)
    return Pairs(rows_P, classes_P)


def class_weights(evidence_BC: Tensor, log_q_BC: Tensor | None, weights_B: Tensor | None = None) -> Tensor:
    """(B, C) p(y) of a labelled row's label, and q(y | x) of any other; UserError where there is no q for a row that has any
    weight."""
    labelled_B = is_labelled(evidence_BC)
    label_BC = torch.softmax(evidence_BC.float(), 1)
    if log_q_BC is None:
        lacking_B = ~labelled_B if weights_B is None else ~labelled_B & (weights_B > 0)
        if has_values(lacking_B):
            check_all_are_labelled(int(lacking_B.sum()), len(lacking_B))
        return label_BC
    return torch.where(labelled_B[:, None], label_BC, log_q_BC.exp())


def over_classes(values_P: Tensor, pairs: Pairs, weights_BC: Tensor) -> Tensor:
    """(B,) the sum over each row's pairs of weight times value."""
    values_BC = torch.zeros_like(weights_BC).index_put((pairs.rows, pairs.classes), values_P)
    return (weights_BC * values_BC).sum(1)


def class_kl(evidence_BC: Tensor, log_q_BC: Tensor) -> Tensor:
    """(B,) what the class adds to the negative bound: KL(q(y | x) || p(y)) = log C - H(q(y | x)), and of a labelled row
    -log p(y) = log C."""
    entropy_B = -(log_q_BC.exp() * log_q_BC).sum(1)
    return math.log(log_q_BC.shape[1]) - torch.where(is_labelled(evidence_BC), 0.0, entropy_B)


def cross_entropy(evidence_BC: Tensor, log_q_BC: Tensor) -> Tensor:
    """(B,) -log q(y | x) of a row's label (eq. 9), in nats; of a soft one its mean; 0 where there is none."""
    label_BC = torch.softmax(evidence_BC.float(), 1)
    return torch.where(is_labelled(evidence_BC), -(label_BC * log_q_BC).sum(1), 0.0)


def check_all_are_labelled(num_unlabelled: int, num_rows: int) -> None:
    """UserError where a row has no label and nothing would guess it."""
    if num_unlabelled:
        raise UserError(
            f"data.label: {num_unlabelled} of {num_rows} rows have no label, and nothing would guess it: give a network that "
            "does, such as model.classifier: {hidden_sizes: [256, 256]}, or leave these rows out"
        )


def check_classes_are_seen(weight_C: Tensor, labels: tuple[object, ...]) -> None:
    """UserError where a class has no labelled row to be learned from. weight_C: the weight of each class's rows."""
    unseen = [str(label) for label, weight in zip(labels, weight_C.tolist(), strict=True) if weight == 0.0]
    if unseen:
        raise UserError(
            f"data.label: no row that is trained on has the label {', '.join(unseen[:8])}{', ...' * (len(unseen) > 8)}, and "
            "nothing else tells what it looks like: label some, or declare data.labels without it"
        )
