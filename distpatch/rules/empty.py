"""Tensors of no elements at all: there is nothing to move, so torch itself says what becomes of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from distpatch.rules.fallback import computed_on_all
from distpatch.rules.registry import named, of_linalg
from distpatch.tensor import RULES, PatchTensor, Rule

# They count the elements, or say of none what their rules, which ask only for a rank's rows, do not.
_NAMES = """
    group_norm layer_norm instance_norm rms_norm batch_norm logsumexp vector_norm norm matrix_norm
    max min amax amin aminmax argmax argmin median nanmedian mode kthvalue topk sort
    index_select reshape view flatten softmax log_softmax pad pixel_shuffle pixel_unshuffle unfold fold
    cross_entropy nll_loss
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices
    adaptive_max_pool3d_with_indices
""".split()


def _unless_empty(rule: Rule) -> Rule:
    """The rule; torch's own function, on all ranks, where the tensor has no elements."""

    @functools.wraps(rule)
    def checked(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], PatchTensor) and 0 in args[0].shape:
            return computed_on_all(func, args, kwargs)
        return rule(func, *args, **kwargs)

    return checked


def wrap_rules() -> None:
    """Once all rules are registered."""
    for func in (*named(*_NAMES), *of_linalg(*_NAMES)):
        if func in RULES:
            RULES[func] = _unless_empty(RULES[func])
