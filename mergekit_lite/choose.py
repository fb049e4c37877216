"""Merges that are chosen: what a recipe leaves open is found by a score, or learned by a gradient.

search    holes of a recipe, filled by what scores a merge           evaluate/
learn     weights of its inputs, by the gradient of a loss           evaluate/, calibrate/
planner   plans of many recipes over the same models, for trials     plan/
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lite.checkpoint.meta import Checkpoint
from mergekit_lite.errors import Mark, UsageError
from mergekit_lite.merge import default_threads, open_models
from mergekit_lite.recipe.model import Recipe
from mergekit_lite.recipe.read import parse
from mergekit_lite.recipe.write import dump

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lite.calibrate.measure import Settings
    from mergekit_lite.evaluate.ingredients import Ingredients
    from mergekit_lite.evaluate.learn import Learned
    from mergekit_lite.evaluate.loss import LossFunction
    from mergekit_lite.evaluate.order import LearnedOrder
    from mergekit_lite.evaluate.search import Found
    from mergekit_lite.evaluate.study import Trial
    from mergekit_lite.evaluate.template import Template
    from mergekit_lite.evaluate.weights import Open
    from mergekit_lite.plan.model import Plan
    from mergekit_lite.recipe.model import Step

ScoreFunction = Callable[[dict[str, "Tensor"]], float]


def search(
    recipe: str | Path | Template,
    *,
    out: str | Path | None = None,
    score: ScoreFunction | Mapping[str, ScoreFunction] | None = None,
    goal: str | Mapping[str, str] = "max",
    models: Mapping[str, Mapping[str, Tensor]] | None = None,
    config: Mapping[str, Any] | None = None,
    trials: int = 50,
    jobs: int = 1,
    sampler: str | None = None,
    threads: int | None = None,
    device: str = "cpu",
    offline: bool = False,
    allow_pickle: bool = False,
    told: Callable[[Trial], None] = lambda trial: None,
) -> Found:
    """Fill the holes of a recipe by scores, those of its commands or `score`, a function of the merged state dict, or
    several by name, for which `goal` is `max` or `min`.

    With functions nothing is written: each trial overwrites the tensors of the one before. `models` are state dicts by
    the names that the recipe gives them, None: the recipe's own checkpoints; `config` is as in `merge_in_memory`. The
    folder `out` keeps the study, and the same call goes on with it until it has so many `trials`; commands need one.
    `jobs` commands are at work at a time, merges run on `device`; `told` hears of every trial that ended, from any
    thread.

    Raises RecipeError where no score is stated, UsageError where the folder holds another study or Optuna is not
    installed, InputError where a model cannot be read, StoppedError where every trial fails, InterruptedRun on Ctrl-C.
    """
    from mergekit_lite.evaluate.judge import MemoryJudge, command_judge
    from mergekit_lite.evaluate.search import check, stated
    from mergekit_lite.evaluate.search import search as go
    from mergekit_lite.evaluate.template import Template
    from mergekit_lite.run.progress import Options

    functions = None if score is None else score if isinstance(score, Mapping) else {"score": score}
    template = recipe if isinstance(recipe, Template) else Template(recipe, (), stated(functions, goal))
    check(template, sampler, functions is None)
    folder = Path(out) if out is not None else None
    make = planner(offline=offline, allow_pickle=allow_pickle, threads=threads, models=models, config=config)
    make(template.first, Path("trial"))  # so that its faults come before the first trial
    if device != "cpu":
        from mergekit_lite.run.device import find_device

        find_device(device)
    options = Options(threads or default_threads(), device=device)
    if functions is not None:
        return go(template, MemoryJudge(make, options, models, functions), folder, trials, 1, sampler, told)
    if folder is None:
        raise UsageError("a search by commands needs a folder", hint="give `out`")

    def of_store(location: str, place: Path) -> Plan:
        text = dump({"version": 1, "models": {"store": location}, "steps": {"task": {"use": "linear", "of": "store"}}})
        found, _ = parse(text, "store")
        assert found is not None
        return planner(offline=offline, threads=threads)(found, place)

    with command_judge(make, of_store, options, folder, jobs) as judge:
        return go(template, judge, folder, trials, jobs, sampler, told)


def learn(
    recipe: str | Path | Template,
    loss: LossFunction | None = None,
    *,
    batches: Sequence[Any] | None = None,
    also: Sequence[Tensor] = (),
    data: Settings | None = None,
    models: Mapping[str, Mapping[str, Tensor]] | None = None,
    config: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    threads: int | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    told: Callable[[float], None] = lambda loss: None,
) -> Learned:
    """Learn the weights that a recipe leaves open (`of: {learned: [a, b]}`), by the gradient of a loss.

    `loss` is a function of the merged state dict, in the dtype of the recipe's arithmetic, which gives a scalar of
    torch, or a number and a mapping of its gradients. With `batches` it gets one of them too, and each is a step of
    Adam; without, each call is an epoch. Tensors in `also`, such as a temperature, are learned beside the weights and
    left as they are then. In place of a loss `data` are a text or model inputs for a model of transformers. `models`
    and `config` are as in `search`. `told` hears of the mean loss of every epoch. `out` is a folder for the result.

    Raises RecipeError where the recipe leaves no weights open or something else, InputError where models or data cannot
    be read, UsageError where the loss gives no gradient, StoppedError where it is not finite.
    """
    from mergekit_lite.evaluate.learn import Learning, keep
    from mergekit_lite.evaluate.loss import FunctionLoss
    from mergekit_lite.evaluate.template import Template
    from mergekit_lite.evaluate.weights import open_step

    if (loss is None) == (data is None):
        raise UsageError("weights are learned by a loss or from data", hint="give one of `loss` and `data`")
    count = threads or default_threads()
    template = recipe if isinstance(recipe, Template) else Template(recipe)
    opened = open_step(template)
    make = planner(offline=offline, allow_pickle=allow_pickle, threads=count, models=models, config=config)
    with _ingredients(template.first, opened, make, models, count) as ingredients, ExitStack() as stack:
        if data is not None:
            from mergekit_lite.calibrate.learn import network_loss
            from mergekit_lite.calibrate.measure import device_memory, limited_threads

            stack.enter_context(limited_threads(count))
            stack.enter_context(device_memory())
            network = network_loss(ingredients, opened, data)
            learning = Learning(template, opened, ingredients, network, network.per_step)
        else:
            assert loss is not None
            function = FunctionLoss(loss, batches, ingredients.empty(), ingredients.others(), also)
            learning = Learning(template, opened, ingredients, function)
        found = learning.run(told)
    if out is not None:
        keep(Path(out), found)
    return found


def learn_order(
    template: Template,
    data: Settings,
    out: Path,
    *,
    threads: int | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    told: Callable[[], None] = lambda: None,
) -> LearnedOrder:
    """Learn the permutations that a recipe leaves open (`from: {learned: ste}`) from data for a model of transformers,
    and write them and the recipe into the folder `out`. Both networks are held in memory. `told` hears of every step.

    Raises RecipeError where the recipe's merge is not the mean of two networks, and otherwise as `learn`.
    """
    from mergekit_lite.calibrate.learn import loss_of
    from mergekit_lite.calibrate.measure import device_memory, limited_threads
    from mergekit_lite.evaluate.order import keep, learned_order, matching, open_order, unmoved

    count = threads or default_threads()
    opened = open_order(template)
    make = planner(offline=offline, allow_pickle=allow_pickle, threads=count)
    # Matched by weights the recipe is whole, and its plan knows the spaces.
    alignment = make(matching(template.first, opened), Path("trial")).alignments[opened.step.name]
    recipe, mean = unmoved(template.first, opened)
    with _inputs(recipe, mean, False, make, None, count) as ingredients, limited_threads(count), device_memory():
        loss = loss_of(ingredients, opened.learning.loss, data)
        found = learned_order(template, opened, alignment, ingredients, loss, loss.per_step, told)
    return keep(out, template, opened, found)


def _ingredients(
    recipe: Recipe,
    opened: Open,
    make: Callable[[Recipe, Path | None], Plan],
    models: Mapping[str, Mapping[str, Tensor]] | None,
    threads: int,
) -> AbstractContextManager[Ingredients]:
    """The inputs of the step that is open, ready to be read."""
    make(recipe, Path("trial"))  # for its faults, those of its save too
    return _inputs(recipe, opened.step, opened.factor is not None, make, models, threads)


@contextmanager
def _inputs(
    recipe: Recipe,
    step: Step,
    base: bool,
    make: Callable[[Recipe, Path | None], Plan],
    models: Mapping[str, Mapping[str, Tensor]] | None,
    threads: int,
) -> Iterator[Ingredients]:
    from mergekit_lite.evaluate.ingredients import Ingredients, apart, plain
    from mergekit_lite.run.inputs import inputs_of
    from mergekit_lite.run.start import check_tied

    merged = make(plain(recipe, step), None)
    each = make(apart(recipe, step), None)
    if models is not None:
        from mergekit_lite.checkpoint.memory import MemoryReader

        yield Ingredients(merged, each, base, MemoryReader(models), threads)
        return
    with inputs_of(each, threads) as reader:
        reader.check()
        check_tied(each, reader)
        yield Ingredients(merged, each, base, reader, threads)


def planner(
    *,
    offline: bool = False,
    allow_pickle: bool = False,
    threads: int | None = None,
    models: Mapping[str, Mapping[str, Tensor]] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Callable[[Recipe, Path | None], Plan]:
    """What plans recipes over the same models, one after the other: their headers are read once. With `models`, state
    dicts by name, nothing is read. Plans are for trials: nobody keeps their output, whose shards do not name the
    recipe. It raises what `plan` raises. Of a recipe for a folder the first save is planned, else all of them."""
    from mergekit_lite.plan.build import build_plan, used_models
    from mergekit_lite.plan.order import BLOCK
    from mergekit_lite.run.inputs import with_beside

    known: dict[object, Checkpoint] = {}

    def opened(recipe: Recipe, name: str) -> Checkpoint:
        model = replace(recipe.models[name], mark=Mark("", 1, 1, "", 1))
        if model not in known:
            if models is not None:
                from mergekit_lite.checkpoint.memory import memory_checkpoint

                known[model] = memory_checkpoint(name, models[name], config or {})
            else:
                known[model] = with_beside(open_models(recipe, [name], offline, allow_pickle)[name])
        return known[model]

    def make(recipe: Recipe, folder: Path | None) -> Plan:
        saves = tuple(replace(save, push=None) for save in recipe.saves)
        recipe = replace(recipe, saves=saves if folder is None else saves[:1])
        checkpoints = {name: opened(recipe, name) for name in used_models(recipe)}
        count = threads or default_threads()
        return build_plan(
            recipe, checkpoints, out=folder, threads=count, block=BLOCK, check_output=False, header="a trial"
        )

    return make
