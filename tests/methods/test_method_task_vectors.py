"""Methods on task vectors, against plain loops in NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from method_cases import BOTH, ORACLES, around_base, cases, close, tensor
from numpy.typing import NDArray
from torch import Tensor

from mergekit_lite.methods import Call, Slot, get
from mergekit_lite.methods.random import uniform_words
from mergekit_lite.methods.spec import Block, keywords
from mergekit_lite.methods.whole import apply, evaluate

Array = NDArray[np.float64]
F64 = torch.float64


def draw(seed: int, count: int, shape: tuple[int, ...] = (6, 10), share: float = 1.0) -> list[Tensor]:
    """Deltas of which a share of the entries is not 0."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        kept = torch.rand(shape, generator=generator) < share
        found.append(torch.randn(shape, generator=generator, dtype=F64) * kept)
    return found


def same(got: Tensor, expected: Array, rtol: float = 1e-11) -> None:
    torch.testing.assert_close(got, torch.from_numpy(np.asarray(expected)), rtol=rtol, atol=1e-13)


def run(name: str, xs: Sequence[Tensor], **params: Any) -> Tensor:
    return apply(get(name), xs, params, compute=F64, grain=7)


@pytest.mark.parametrize(
    "case", [c for c in ORACLES if c.startswith("tall_masks/") and "deltas" in ORACLES[c].get("inputs", {})]
)
def test_tall_masks(case: str) -> None:
    given, params, expected = ORACLES[case]["inputs"], ORACLES[case]["params"], ORACLES[case]["expected"]
    deltas, base = [tensor(d) for d in given["deltas"]], tensor(given["base"])
    count = len(deltas)
    slots = [Slot(i) for i in range(count)]
    if params["multi_task"] == "ties":
        multi = get("ties")(*slots, density=params["density"], aggregate=params["agg"], scope="tensor")
    else:
        multi = get("linear")(*slots, normalize=False)
    if "multi_task_vector" in expected:
        close(evaluate(multi, [deltas], compute=F64)[0], case, "multi_task_vector", F64)
    thresholds = params["lambda"] if isinstance(params["lambda"], list) else [params["lambda"]] * count
    for task, threshold in enumerate(thresholds):
        part = get("tall_masks")(Slot(task), multi, threshold=threshold)
        got = evaluate(get("add")(part, Slot(count)), [[*deltas, base]], compute=F64)[0]
        torch.testing.assert_close(got, tensor(expected["reconstructed"][task]), rtol=0, atol=ORACLES[case]["atol"])
        mask = evaluate(
            get("tall_masks")(Slot(task), multi, threshold=threshold, output="mask"), [deltas], compute=F64
        )[0]
        assert torch.equal(mask.bool(), tensor(expected["masks"][task])) and set(mask.tolist()) <= {0.0, 1.0}
        if "packbits_big_endian" in expected:
            assert np.packbits(mask.bool().numpy()).tolist() == expected["packbits_big_endian"][task]
            assert float(mask.mean()) == expected["mask_density"][task]


@BOTH
@cases("consensus/", "consensus/census")
def test_consensus_of_given_masks(case: str, compute: torch.dtype) -> None:
    given, params = ORACLES[case]["inputs"], ORACLES[case]["params"]
    count = len(given["deltas"])
    multi = get("linear")(*map(Slot, range(count)), normalize=False)
    kept = get("keep_shared")(multi, *(Slot(count + 1 + i) for i in range(count)), k=params["k"])
    call = get("add")(get("linear")(kept, weight=params["alpha"], normalize=False), Slot(count))
    inputs = [tensor(x) for x in (*given["deltas"], given["base"], *given["masks"])]
    close(evaluate(call, [inputs], compute=compute)[0], case, "theta", compute)


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("multi_task", ["sum", "ties"])
def test_consensus_is_its_formula(multi_task: str, k: int) -> None:
    *models, base = draw(1, 4, share=0.7)
    thresholds = (0.2, 0.4, 0.6)
    settings = {"k": k, "threshold": thresholds, "lambda": 0.7, "multi_task": multi_task, "density": 0.5}
    (got,) = evaluate(around_base(get("consensus"), 3, **settings), [[*models, base]], compute=F64)
    deltas = [(x - base).numpy() for x in models]
    multi = sum(deltas)
    if multi_task == "ties":
        multi = run("ties", [torch.from_numpy(d) for d in deltas], density=0.5, aggregate="sum").numpy()
    count = sum((np.abs(d) > t * np.abs(multi - d)).astype(int) for d, t in zip(deltas, thresholds, strict=True))
    same(got, base.numpy() + 0.7 * (count >= k) * multi)


@pytest.mark.parametrize("multi_task, like", [("sum", "task_arithmetic"), ("ties", "ties")])
def test_consensus_that_keeps_all_has_the_bits_of_its_sum(multi_task: str, like: str) -> None:
    *models, base = (x.float() for x in draw(2, 6, share=0.7))
    shared = {"lambda": 0.3}
    other = shared if like == "task_arithmetic" else {**shared, "density": 0.5, "aggregate": "sum", "scope": "global"}
    settings = {**shared, "k": 0, "multi_task": multi_task, "density": 0.5}
    got, wanted = (
        evaluate(around_base(get(name), 5, **chosen), [[*models, base]], compute=torch.float32)[0]
        for name, chosen in (("consensus", settings), (like, other))
    )
    assert torch.equal(got.view(torch.int32), wanted.view(torch.int32))


def test_consensus_warns_of_masks_that_keep_little() -> None:
    remark = get("consensus").remark
    assert remark is not None
    assert "the base" in (remark({"k": 4}, 3) or "") and "all 3 tasks" in (remark({"k": 3}, 3) or "")
    assert remark({"k": 2}, 3) is None


def bang(**settings: Any) -> Call:
    """As the plan makes it, which reads the file that `confidence` names."""
    return Call(get("bang"), (Slot(0), Slot(1)), tuple(settings.items()))


@BOTH
def test_bang(compute: torch.dtype) -> None:
    case = "bang/head_temperature"
    given, params = ORACLES[case]["inputs"], ORACLES[case]["params"]
    hot = {"t": params["alpha"], "temperature": [params["temperature0"], params["temperature1"]]}
    for name in given["zeroshot"]:
        call = bang(head="linear" if name in params["head"] else "none", **hot)
        ends = [tensor(given["zeroshot"][name]), tensor(given["finetuned"][name])]
        close(evaluate(call, [ends], compute=compute)[0], case, name, compute)


def test_bang_divides_the_scale_of_logits_by_its_logarithm() -> None:
    ends = [torch.tensor([math.log(scale)], dtype=torch.float64) for scale in (100.0, 60.0)]
    call = bang(t=0.25, head="logit_scale", temperature=(2.0, 3.0))
    got = float(evaluate(call, [ends], compute=torch.float64)[0].exp())
    assert got == pytest.approx((100 / 2) ** 0.75 * (60 / 3) ** 0.25)


@pytest.mark.parametrize("head", ["none", "linear", "logit_scale"])
@pytest.mark.parametrize("end", [0, 1])
def test_ends_of_bang_are_the_models_divided_by_their_temperatures(head: str, end: int) -> None:
    ends = [torch.tensor([1.0, -torch.inf]), torch.tensor([3.0, torch.nan])]
    plain = bang(t=end, head=head, temperature=(1.0, 1.0))
    assert torch.equal(evaluate(plain, [ends])[0].nan_to_num(7), ends[end].nan_to_num(7))
    hot = evaluate(bang(t=end, head=head, temperature=(2.0, 2.0)), [ends])[0]
    x = float(ends[end][0])
    assert float(hot[0]) == pytest.approx({"none": x, "linear": x / 2, "logit_scale": x - math.log(2)}[head])


@BOTH
def test_straggler_layers_as_densities_by_name(compute: torch.dtype) -> None:
    """As the recipe has it: a density below 1 for the stragglers, 1 elsewhere, then a part of the delta added."""
    case = "straggler/sparse_interpolation"
    given, params = ORACLES[case]["inputs"], ORACLES[case]["params"]
    for name in given["zeroshot"]:
        density = 1 - params["sparsity"] if name in params["stragglers"] else 1.0
        thin = get("sparsify")(get("delta")(Slot(0), Slot(1)), density=density)
        ends = [tensor(given["finetuned"][name]), tensor(given["zeroshot"][name])]
        got = evaluate(get("add")(thin, Slot(1), weight=params["alpha"]), [ends], compute=compute)[0]
        close(got, case, name, compute)


def chances(row: Array, density: float, epsilon: float) -> Array:
    if len(row) == 1:
        return np.array([density])
    found = np.empty(len(row))
    for place, i in enumerate(sorted(range(len(row)), key=lambda i: (-abs(row[i]), i))):
        found[i] = density + epsilon - 2 * epsilon * place / (len(row) - 1)
    return found


@pytest.mark.parametrize("shape, start", [((5, 8), 0), ((4, 1), 3), ((3, 7), 14)], ids=str)
def test_magprune_is_its_formula(shape: tuple[int, int], start: int) -> None:
    x = draw(2, 1, shape)[0].round(decimals=1)
    words = uniform_words(99, start, x.numel()).reshape(shape) / 2**32
    expected = np.zeros(shape)
    for i, row in enumerate(x.numpy()):
        p = chances(row, 0.5, 0.3)
        expected[i] = np.where(words[i] < p, row / p, 0)
    got = get("magprune").fn([x], density=0.5, epsilon=0.3, rescale=True, block=Block(start, 99))
    same(got, expected)


def test_magprune_keeps_the_mean_and_the_shares() -> None:
    row = torch.linspace(-1, 1, 40, dtype=F64).repeat(20_000, 1)
    kept = run("magprune", [row], density=0.4, epsilon=0.2)
    share = (kept != 0).double().mean(dim=0).numpy()
    p = chances(row[0].numpy(), 0.4, 0.2)
    assert np.all(np.abs(share - p) < 5 * np.sqrt(p * (1 - p) / len(row)))
    assert abs(p.mean() - 0.4) < 1e-12 and p.max() == pytest.approx(0.6) and p.min() == pytest.approx(0.2)
    spread = np.abs(row[0].numpy()) * np.sqrt((1 - p) / p / len(row))
    assert np.all(np.abs(kept.mean(dim=0).numpy() - row[0].numpy()) <= 5 * spread)


def test_della_is_magprune_and_a_merge() -> None:
    *models, base = draw(3, 4)
    for name in ("della", "della_linear"):
        whole = around_base(get(name), 3, density=1.0, epsilon=0.0, weight=(0.5, 1.0, 2.0))
        plain = {"della": "ties", "della_linear": "task_arithmetic"}[name]
        keep = {"density": 1.0, "scope": "tensor"} if plain == "ties" else {}
        other = around_base(get(plain), 3, **keep, weight=(0.5, 1.0, 2.0), **{"lambda": 1.0})
        one, two = (evaluate(call, [[*models, base]], compute=F64)[0] for call in (whole, other))
        assert torch.equal(one, two)


def test_della_refuses_what_is_no_probability() -> None:
    for name, many in (("della", True), ("della_linear", True), ("magprune", False)):
        method = get(name)
        assert method.check is not None
        params = {p.name: p.default for p in method.params} | {"weight": (1.0, 1.0)}
        for density, epsilon, fine in ((0.5, 0.15, True), (0.9, 0.15, False), (0.1, 0.15, False), (0.15, 0.15, False)):
            given = (
                {"density": (0.5, density), "epsilon": (0.1, epsilon)}
                if many
                else {"density": density, "epsilon": epsilon}
            )
            assert (method.check({**params, **given}, 2) is None) == fine


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-9], ids=str)
@pytest.mark.parametrize("topk", [1.0, 0.5, 0.03])
def test_sce_is_its_formula_whatever_the_size(topk: float, size: float) -> None:
    deltas = [d * size for d in draw(4, 3, share=0.6)]
    deltas[1] *= 3
    deltas[0][:2] = deltas[1][:2] = deltas[2][:2]  # no variance
    stack = np.stack([d.numpy() for d in deltas])
    if topk < 1:
        variance = stack.var(axis=0)
        variance[:2] = 0
        count = max(1, math.floor(topk * np.count_nonzero(variance)))
        order = np.argsort(-variance.ravel(), kind="stable")[:count]
        keep = np.zeros(variance.size)
        keep[order] = 1
        stack = stack * keep.reshape(variance.shape)
    weights = (stack**2).sum(axis=(1, 2))
    weights /= weights.sum()
    expected = np.zeros(stack.shape[1:])
    for at in np.ndindex(*expected.shape):
        sign = 1 if stack[(slice(None), *at)].sum() >= 0 else -1
        agreed = [(w, d) for w, d in zip(weights, stack[(slice(None), *at)], strict=True) if d * sign > 0]
        if agreed:
            expected[at] = sum(w * d for w, d in agreed) / sum(w for w, _ in agreed)
    same(run("sce", deltas, select_topk=topk) / size, expected / size)


def test_sce_cuts_equal_variances_by_index_in_any_block() -> None:
    deltas = [torch.tensor([1.0, -1.0] * 8), torch.tensor([-0.5, 0.5] * 8)]
    got = run("sce", deltas, select_topk=0.25)
    assert (got != 0).tolist() == [True] * 4 + [False] * 12
    method = get("sce")
    params = {"select_topk": 0.25, "compat": False}
    measure = method.measure(params, 2, [16])
    while True:
        part = measure.part(0)
        for start in range(0, 16, 5):
            if part.add([d[start : start + 5] for d in deltas], start):
                break
        if not measure.close([part]):
            break
    stat = measure.result(0)
    pieces = [
        method.fn([d[a : a + 3] for d in deltas], **keywords(params), block=Block(a, 0), stat=stat)
        for a in range(0, 16, 3)
    ]
    assert torch.equal(torch.cat(pieces).double(), got)


def test_emr_is_its_formula() -> None:
    shapes = [(4, 5), (7,)]
    models = [draw(5 + i, 3, shape, 0.8) for i, shape in enumerate(shapes)]
    deltas = [[d.numpy() for d in xs] for xs in models]
    unified = []
    for xs in deltas:
        sign = np.sign(sum(xs))
        unified.append(sign * np.max([np.where(d * sign > 0, np.abs(d), 0) for d in xs], axis=0))
    elected = get("elect")(*map(Slot, range(3)), aggregate="max", zero_sign="drop")
    for got, expected in zip(evaluate(elected, models, compute=F64), unified, strict=True):
        same(got, expected)
    for task in range(3):
        masked = [np.where(xs[task] * d > 0, d, 0) for xs, d in zip(deltas, unified, strict=True)]
        own = [np.abs(xs[task]).sum() for xs in deltas]
        kept = [np.abs(m).sum() for m in masked]
        for scope in ("global", "tensor"):
            call = get("emr")(Slot(task), elected, scope=scope)
            for i, got in enumerate(evaluate(call, models, compute=F64, grain=3)):
                factor = sum(own) / sum(kept) if scope == "global" else own[i] / kept[i]
                same(got, factor * masked[i])


def test_emr_of_one_task_is_that_task() -> None:
    x = draw(6, 1)[0]
    call = get("emr")(Slot(0), get("elect")(Slot(0), aggregate="max"))
    torch.testing.assert_close(evaluate(call, [[x]], compute=F64)[0], x, rtol=1e-12, atol=0)
    assert not run("emr", [x, torch.zeros_like(x)]).any()


def balanced(stack: Array, ratio: float) -> Array:
    """PCB-Merging on a (models, entries) matrix, sorted as a whole."""
    count, size = stack.shape
    magnitude = np.abs(stack)
    rising = np.sort(magnitude, axis=1)
    low, high = rising[:, [int(size * 1e-4)]], rising[:, [max(0, int(size * (1 - 1e-4) - 1))]]
    magnitude = np.clip(magnitude, low, high)
    salience = (magnitude - low) / (high - low)
    score = np.exp(count * salience**2) * np.tanh(stack * stack.sum(axis=0))
    score = np.maximum(score, 0)
    floor = np.sort(score, axis=1)[:, [int(size * (1 - ratio))]]
    top = score.max(axis=1, keepdims=True)
    scale = (np.maximum(score, floor) - floor) / (top - floor)
    merged: Array = (np.sign(stack) * magnitude * scale).sum(axis=0) / np.maximum(scale.sum(axis=0), 1e-300)
    return merged


@pytest.mark.parametrize("ratio", [0.1, 0.37])
def test_pcb_is_its_formula(ratio: float) -> None:
    deltas = draw(7, 3, (30_000,))
    expected = 0.8 * balanced(np.stack([d.numpy() for d in deltas]), ratio)
    got = apply(get("pcb"), deltas, {"ratio": ratio, "lambda": 0.8}, compute=F64, grain=4096)
    same(got, expected, rtol=1e-9)
    cuts = [[d[:100] for d in deltas], [d[100:] for d in deltas]]
    call = get("pcb")(*map(Slot, range(3)), ratio=ratio, **{"lambda": 0.8})
    assert torch.equal(torch.cat(evaluate(call, cuts, compute=F64)), got)
    first = evaluate(get("pcb")(*map(Slot, range(3)), ratio=ratio, scope="tensor"), cuts, compute=F64)[0]
    same(first, balanced(np.stack([d[:100].numpy() for d in deltas]), ratio), rtol=1e-9)


def test_pcb_of_a_single_entry_is_the_mean_of_those_that_agree() -> None:
    values = [torch.tensor([3.0], dtype=F64), torch.tensor([1.0], dtype=F64), torch.tensor([-2.0], dtype=F64)]
    assert run("pcb", values, scope="tensor").tolist() == [2.0]


def test_magmax_is_its_formula() -> None:
    deltas = [d.round(decimals=1) for d in draw(8, 4)]
    stack = np.stack([d.numpy() for d in deltas])
    first = np.abs(stack).argmax(axis=0)
    same(run("magmax", deltas, **{"lambda": 0.5}), 0.5 * np.take_along_axis(stack, first[None], axis=0)[0])
    bad = torch.tensor([float("nan")])
    for xs in ([bad, torch.ones(1)], [torch.ones(1), bad], [torch.ones(1), bad, torch.ones(1)]):
        assert run("magmax", xs).isnan().all()


@pytest.mark.parametrize("n, m", [(1, 4), (3, 4), (2, 5), (2, 100)])
def test_cabs_is_its_formula(n: int, m: int) -> None:
    deltas = [d.round(decimals=1) for d in draw(9, 3, (4, 11), 0.8)]
    weight = (0.5, 1.0, 2.0)
    expected = np.zeros((4, 11))
    for i in range(4):
        for start in range(0, 11, m):
            places = list(range(start, min(start + m, 11)))
            quota = n if len(places) == m else max(1, math.floor(len(places) * n / m + 1e-9))
            free = set(places)
            for w, d in zip(weight, deltas, strict=True):
                ranked = sorted((p for p in free if d[i, p] != 0), key=lambda p: (-abs(float(d[i, p])), p))
                for p in ranked[:quota]:
                    expected[i, p] = w * float(d[i, p])
                    free.discard(p)
    same(run("cabs", deltas, weight=weight, n=n, m=m), expected)


def test_cabs_refuses_and_warns() -> None:
    method = get("cabs")
    assert method.check is not None and method.remark is not None
    assert "more than" in (method.check({"n": 5, "m": 4}, 2) or "") and method.check({"n": 4, "m": 4}, 2) is None
    assert "what is left" in (method.remark({"n": 2, "m": 4}, 3) or "") and method.remark({"n": 2, "m": 4}, 2) is None


def test_ram_is_its_formula() -> None:
    deltas = [torch.where(d.abs() > 0.2, d, d * 1e-6) for d in draw(10, 3, (40, 25), 0.3)]
    stack = np.stack([d.numpy() for d in deltas])
    changed = np.abs(stack) > 1e-5
    count = changed.sum(axis=0)
    plain = (stack * changed).sum(axis=0) / np.maximum(count, 1)
    same(run("ram", deltas), plain)
    expected = np.zeros_like(plain)
    for d, mask in zip(stack, changed, strict=True):
        shared, alone = (mask & (count > 1)).sum(), (mask & (count == 1)).sum()
        factor = np.where(count == 1, 1 + 0.5 * min(0.9, shared / alone), 1)
        expected += d * mask * factor / np.maximum(count, 1)
    same(run("ramplus_tl", deltas, r=0.5, alpha=0.9), expected)
    halves = [[d[:15] for d in deltas], [d[15:] for d in deltas]]
    call = get("ramplus_tl")(*map(Slot, range(3)), r=0.5, alpha=0.9, scope="global")
    same(torch.cat(evaluate(call, halves, compute=F64)), expected)


def test_ram_shows_nan() -> None:
    for name in ("ram", "ramplus_tl"):
        assert run(name, [torch.tensor([float("nan"), 1.0]), torch.zeros(2)]).isnan().tolist() == [True, False]


@BOTH
@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_a_row_of_one_entry_is_kept_with_its_density(name: str, compute: torch.dtype) -> None:
    xs = [torch.ones(4000, 1), torch.zeros(4000, 1)]
    call: Call = around_base(get(name), 1, density=0.3, rescale=False)
    share = float(evaluate(call, [xs], compute=compute)[0].mean())
    assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 4000)


@BOTH
def test_scaling_by_depth_is_a_curve_of_factors(compute: torch.dtype) -> None:
    """LiNeS needs no code of its own: task arithmetic with one factor a layer is its formula."""
    *models, base = draw(11, 3)
    for depth in (0.0, 0.5, 1.0):
        factor = 0.2 + depth * 0.6
        call = around_base(get("task_arithmetic"), 2, **{"lambda": factor})
        expected = base + factor * ((models[0] - base) + (models[1] - base))
        torch.testing.assert_close(
            evaluate(call, [[*models, base]], compute=compute)[0].double(), expected, rtol=1e-5, atol=1e-6
        )
