"""How an operation ties the axes of its inputs and outputs: one rule for each of PyTorch's core operations.

A rule gives the axes of every output. It unifies the axes that the operation ties to each other, so that what is the
same permutation of an input becomes a permutation of the output, and fixes those whose order the operation sees. An
operation without a rule fixes all axes of its inputs: a wrong space is worse than a missing one.
"""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_lite.align.axis import UNIT, atoms, fix, fresh, product, resolve, unify
from mergekit_lite.align.node import Axes, Call, Rule, Shape, Value, broadcast, dims_of, fix_all, fixed
from mergekit_lite.align.views import VIEWS


def apply(call: Call, pointwise: bool) -> list[Value]:
    """The outputs of an operation. `pointwise`: it works on each element for itself, its operands broadcast."""
    rule = RULES.get(call.name) or (_pointwise if pointwise else None)
    made = rule(call) if rule is not None else ()
    data = any(value.data for value in call.values)
    if [tuple(axis.size for axis in axes) for axes in made] != list(call.shapes):
        for value in call.values:
            fix_all(value.axes)
        made = [fixed(shape) for shape in call.shapes]
    return [Value(axes, data) for axes in made]


def _unknown(shape: Shape) -> Axes:
    return tuple(map(fresh, shape))


def _pointwise(call: Call) -> list[Axes]:
    values, shape = call.values, call.shapes[0]
    terms = [value.axes for value in values if value.data]
    if call.name in ("add", "sub") and len(terms) == 2:
        for a, b in zip(reversed(terms[0]), reversed(terms[1]), strict=False):
            if a.size == b.size and resolve(a) != resolve(b) and not any(atom.fixed for atom in (*atoms(a), *atoms(b))):
                call.notes.axes["added"].append(a)
    return [broadcast([value.axes for value in values], shape)]


def _same(call: Call) -> list[Axes]:
    return [call.first.axes]


def _constant(call: Call) -> list[Axes]:
    return [_unknown(call.shapes[0])]


def _along(call: Call) -> list[Axes]:
    """The operation sees the order along its dimensions and keeps the shape."""
    axes = call.first.axes
    for d in dims_of(call, "dim" if "dim" in call.given else "dims"):
        fix(axes[d])
    return [axes]


def _reduce(call: Call) -> list[Axes]:
    axes, dims = call.first.axes, dims_of(call)
    if (len(call.shapes) > 1 and call.name in ("max", "min")) or call.name in ("argmax", "argmin"):
        for d in dims:
            fix(axes[d])  # the index of the greatest is a place on the axis
    if call.given.get("keepdim"):
        left: Axes = tuple(UNIT if d in dims else axis for d, axis in enumerate(axes))
    else:
        left = tuple(axis for d, axis in enumerate(axes) if d not in dims)
    return [left] * len(call.shapes)


def _multiply(call: Call) -> list[Axes]:
    """mm, bmm, mv, dot and the same with a summand."""
    *summand, a, b = call.values
    left, right = a.axes, b.axes
    inner = right[-2] if len(right) > 1 else right[-1]
    unify(left[-1], inner)
    if not (a.data and b.data):
        call.notes.axes["contracted"].append(inner)
    outer = left[:-1] + (right[-1:] if len(right) > 1 else ())
    if len(right) == 3:
        unify(left[0], right[0])
    return [broadcast([outer, *(value.axes for value in summand)], call.shapes[0])]


def _convolution(call: Call) -> list[Axes]:
    x, weight, shape = call["input"].axes, call["weight"].axes, call.shapes[0]
    if len(x) != len(weight):
        return []
    groups = fresh(call["groups"])
    per_group = fresh(weight[1].size)
    channels_in, channels_out = fresh(x[1].size), fresh(shape[1])
    near, far = (channels_in, channels_out) if call["transposed"] else (channels_out, channels_in)
    # (in, out / groups) where the convolution is transposed, else (out, in / groups).
    unify(weight[0], near)
    unify(weight[1], per_group)
    unify(far, product([groups, per_group]))
    unify(near, product([groups, fresh(near.size // call["groups"])]))
    unify(x[1], channels_in)
    for axis in (*x[2:], *weight[2:]):
        fix(axis)
    if call["bias"] is not None:
        unify(call["bias"].axes[0], channels_out)
    call.notes.axes["channels"] += [channels_in, channels_out]
    return [(x[0], resolve(channels_out), *fixed(shape[2:]))]


def _batch_norm(call: Call) -> list[Axes]:
    axes = call["input"].axes
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = call.given.get(name)
        if value is not None:
            unify(value.axes[0], axes[1])
            if name.startswith("running") and value.stored is not None:
                call.notes.statistics.add(value.stored)
    rest = [(axes[1],) if shape == (axes[1].size,) else fixed(shape) for shape in call.shapes[1:]]
    return [axes, *rest]


def _layer_norm(call: Call) -> list[Axes]:
    axes, rank = call["input"].axes, len(call["normalized_shape"])
    for name in ("weight", "bias"):
        if call[name] is not None:
            for own, axis in zip(call[name].axes, axes[-rank:], strict=True):
                unify(own, axis)
    return [axes, *[(*axes[:-rank], *[UNIT] * rank)] * (len(call.shapes) - 1)]


def _group_norm(call: Call) -> list[Axes]:
    axes, count = call["input"].axes, call["group"]
    groups = fresh(count)
    unify(axes[1], product([groups, fresh(axes[1].size // count)]))
    for name in ("weight", "bias"):
        if call[name] is not None:
            unify(call[name].axes[0], axes[1])
    return [axes, *[(axes[0], resolve(groups))] * 2]


def _spatial(call: Call) -> list[Axes]:
    """Pooling and resampling: the last axes are fixed, channels pass."""
    axes, rank = call.first.axes, SPATIAL[call.name]
    for axis in axes[-rank:]:
        fix(axis)
    return [(*axes[:-rank], *fixed(shape[-rank:])) for shape in call.shapes]


def _embedding(call: Call) -> list[Axes]:
    rows, width = call["weight"].axes
    fix(rows)
    return [(*call["indices"].axes, width)]


SPATIAL = {
    "max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3, "avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3,
    "_adaptive_avg_pool2d": 2, "_adaptive_avg_pool3d": 3, "adaptive_max_pool2d": 2, "adaptive_max_pool3d": 3,
    "upsample_nearest1d": 1, "upsample_nearest2d": 2, "upsample_nearest3d": 3, "upsample_linear1d": 1,
    "upsample_bilinear2d": 2, "upsample_bicubic2d": 2, "reflection_pad1d": 1, "reflection_pad2d": 2,
    "replication_pad2d": 2,
}  # fmt: skip
_REDUCTIONS = ("sum", "mean", "amax", "amin", "max", "min", "var", "var_mean", "std", "any", "all", "prod", "argmax",
               "argmin", "logsumexp", "linalg_vector_norm")  # fmt: skip
_CONSTANTS = ("full", "zeros", "ones", "full_like", "zeros_like", "ones_like", "new_full", "new_zeros", "new_ones",
              "scalar_tensor")  # fmt: skip
# A permutation along the axis of a softmax passes through it.
_SAME = ("_softmax", "_log_softmax", "_safe_softmax", "_to_copy", "clone", "alias", "detach", "contiguous",
         "lift_fresh_copy")  # fmt: skip

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_SAME, _same),
    **dict.fromkeys(_CONSTANTS, _constant),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **VIEWS,
    **dict.fromkeys(SPATIAL, _spatial),
    **dict.fromkeys(("cumsum", "cumprod", "flip", "roll"), _along),
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"), _multiply),
    "convolution": _convolution,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "_native_batch_norm_legit": _batch_norm,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "embedding": _embedding,
}  # fmt: skip
