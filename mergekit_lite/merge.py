"""START HERE: a recipe is read, planned and run.

load_recipe   text -> Recipe                         recipe/
plan          Recipe + checkpoint headers -> Plan    plan/
run           Plan -> shards on disk                 run/
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergekit_lite import sandbox
from mergekit_lite.checkpoint.adapter import open_adapter, with_adapter
from mergekit_lite.checkpoint.find import open_checkpoint
from mergekit_lite.checkpoint.meta import Checkpoint
from mergekit_lite.errors import InputError, Mark, MergeError, Problem, RecipeError, UsageError
from mergekit_lite.recipe.model import Recipe
from mergekit_lite.recipe.read import parse, read_file
from mergekit_lite.recipe.write import dump
from mergekit_lite.run.result import Result as Result

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lite.calibrate.measure import Settings
    from mergekit_lite.evaluate.ingredients import Ingredients
    from mergekit_lite.evaluate.learn import Learned
    from mergekit_lite.evaluate.loss import LossFunction
    from mergekit_lite.evaluate.search import Found
    from mergekit_lite.evaluate.study import Trial
    from mergekit_lite.evaluate.template import Template
    from mergekit_lite.evaluate.weights import Open
    from mergekit_lite.plan.model import Plan
    from mergekit_lite.run.progress import Progress
    from mergekit_lite.run.ranks import Ranks


Fetch = Literal["cache", "stream"]
ScoreFunction = Callable[[dict[str, "Tensor"]], float]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe. `overrides` are `--set` texts such as `steps.mixed.with.t=0.4`.

    Raises InputError where there is no such file and RecipeError with all faults at once: those of the language and
    those of the methods' settings; within `sandbox.confined` also where the file lies outside.
    """
    box = sandbox.current()
    refused = None if box is None else box.refusal(path)
    if refused is not None:
        raise RecipeError(refused)
    recipe, problems = parse(read_file(str(path)), str(path), overrides)
    if recipe is not None:
        from mergekit_lite.methods.registry import all_methods
        from mergekit_lite.plan.settings import check_steps

        problems = [*problems, *check_steps(recipe, all_methods())]
    if problems or recipe is None:
        raise RecipeError(sorted(problems, key=lambda p: (p.mark.line, p.mark.column) if p.mark else (0, 0)))
    return recipe


def plan(
    recipe: Recipe,
    *,
    out: str | Path | None = None,
    threads: int | None = None,
    block: int | None = None,
    memory: int | str | None = None,
    offline: bool = False,
    allow_pickle: bool = False,
    check_output: bool = True,
    fetch: Fetch = "cache",
) -> Plan:
    """Plan `recipe` from the headers of its checkpoints. Nothing is written.

    `out` replaces the output folder of the recipe's only save. `threads` (default: the cores of this process) and
    `block` (elements) change memory and speed, never a byte of the result. `memory` (bytes, or a text such as `300MB`)
    is what this process may take of anonymous memory, Python and torch included: the plan chooses what of the two was
    not given so that it is kept, and raises RecipeError with the smallest figure that would do where it cannot be.
    `allow_pickle` reads checkpoints of `torch.save` too, as plain data, never as code. `check_output` False leaves out
    whether the output folders are free, for looking at a plan whose result exists. `fetch` says what becomes of models
    on the Hub: `cache` downloads them whole into the Hub's cache; `stream` reads their headers alone, and `run` then
    reads their tensors by ranges. Raises RecipeError and InputError,
    each with all faults that were found, within `sandbox.confined` first of all those places that lie outside, and
    UsageError where `memory` is no size.
    """
    from mergekit_lite.plan.budget import memory_bytes, with_buffers, within
    from mergekit_lite.plan.build import build_plan, no_collection, used_models
    from mergekit_lite.plan.confine import no_pushes, outside
    from mergekit_lite.plan.order import BLOCK

    if out is not None and len(recipe.saves) > 1:
        hint = "remove `--out`, or change one with `--set save.0.to=DIR`"
        raise RecipeError(Problem(f"`--out` names one folder, the recipe saves {len(recipe.saves)}", None, hint))
    if (box := sandbox.current()) is not None:
        from mergekit_lite.methods.registry import all_methods

        problems = outside(recipe, all_methods(), Path(out) if out is not None else None, box)
        if problems:
            raise RecipeError(problems)
    if offline and (problems := no_pushes(recipe, "the run is offline")):
        raise RecipeError(problems)
    budget = None if memory is None else memory_bytes(memory)
    with no_collection():
        checkpoints = open_models(
            recipe, used_models(recipe), offline or box is not None, allow_pickle, fetch == "stream"
        )
        if _reads_tokenizers(recipe):
            from mergekit_lite.run.inputs import with_beside

            checkpoints = {name: with_beside(checkpoint) for name, checkpoint in checkpoints.items()}
        made = build_plan(
            recipe,
            checkpoints,
            out=Path(out) if out is not None else None,
            threads=threads or default_threads(),
            block=block or BLOCK,
            check_output=check_output,
        )
        made = with_buffers(made)
        if budget is None:
            return made
        from mergekit_lite.run.standing import standing

        return within(made, budget, standing(made), threads, block, default_threads())


def _reads_tokenizers(recipe: Recipe) -> bool:
    """Whether the plan needs more of a model than its headers and config.json."""
    steps = recipe.steps.values()
    texts = any("prompts" in given for step in steps for given in (step.params, *(item.params for item in step.of)))
    return texts or any(s.use == "transplant" for s in steps) or any(s.tokenizer is not None for s in recipe.saves)


def default_threads() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_models(
    recipe: Recipe, names: Sequence[str], offline: bool, allow_pickle: bool = False, stream: bool = False
) -> dict[str, Checkpoint]:
    """The checkpoints of the models of these names; with `stream` those on the Hub by their headers alone. Raises
    InputError with the faults of all of them."""
    found: dict[str, Checkpoint] = {}
    known: dict[tuple[str, str | None], Checkpoint] = {}  # a base of several adapters is looked at once
    problems: list[Problem] = []
    fault: MergeError | None = None
    for name in names:
        model = recipe.models[name]
        try:
            if model.absent is not None and not os.path.lexists(model.location):
                raise InputError(model.absent)
            opened = Checkpoint("", None, None, {}, {}, ())
            if (model.location, model.revision) in known:
                opened = known[model.location, model.revision]
            elif model.location:
                opened = known[model.location, model.revision] = open_checkpoint(
                    model.location,
                    model.revision,
                    mark=model.mark,
                    offline=offline,
                    pickled=allow_pickle,
                    stream=stream,
                )
            if model.adapter is not None:
                adapter = open_adapter(
                    model.adapter,
                    model.adapter_revision,
                    mark=model.mark,
                    offline=offline,
                    pickled=allow_pickle,
                    stream=stream,
                )
                opened = with_adapter(opened, adapter, model.mark)
            found[name] = opened
        except MergeError as error:
            fault = error
            problems += [problem for problem in error.problems if problem not in problems]
    if fault is not None:
        raise type(fault)(problems)
    return found


def run(
    plan: Plan,
    *,
    threads: int | None = None,
    block: int | None = None,
    resume: bool = False,
    strict: bool = False,
    device: str = "cpu",
    keep_auto_map: bool = False,
    progress: Callable[[Progress], None] = lambda progress: None,
    ranks: Ranks | None = None,
) -> Result:
    """Carry out `plan`: write every output folder whole, or leave what is finished in `OUT.partial` for `resume`.

    `keep_auto_map` leaves entries that have transformers import an input's code in the outputs' configurations.
    `strict` stops at the first non-finite number of an input or of what is made of them. `device` is where kernels run:
    `cpu`, `cuda`, `cuda:1`, or with `auto` the first GPU if there is one. `ranks` are the processes that share the
    merge, each of which calls this with the plan that they agreed on (`Ranks.agree`); rank 0 gives the result of all,
    the others that of their share. A plan with a budget of memory says itself how many threads and how large blocks.
    Raises UsageError where there is no such device or the plan's budget is not for it, or for these threads and blocks;
    StoppedError where the run cannot go on (the disk is full, another run writes there, another rank failed, `strict`
    found a number that the merge made), InputError where an input has changed or cannot be read, InterruptedRun on
    Ctrl-C.
    """
    from mergekit_lite.plan.budget import check_budget
    from mergekit_lite.plan.order import BLOCK
    from mergekit_lite.run.perform import perform
    from mergekit_lite.run.ranks import ALONE

    ranks = ranks or ALONE
    count = threads or max(1, default_threads() // len(ranks.here))
    if plan.memory is not None:
        check_budget(plan, threads, block, device)
        count, block = min(count, plan.threads), block or plan.block
    return perform(
        plan,
        ranks,
        threads=count,
        block=block or BLOCK,
        resume=resume,
        strict=strict,
        device=device,
        keep_auto_map=keep_auto_map,
        progress=progress,
        card=_card,
    )


def _card(folder: Path, lock: str, number: int) -> str:
    """The model card of the output in `folder`, number `number` of those that the text of its lock tells of."""
    from mergekit_lite.publish.card import render

    recipe, _ = parse(lock, "recipe.lock.yaml")
    assert recipe is not None
    return render(folder, recipe, number)


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


@contextmanager
def _ingredients(
    recipe: Recipe,
    opened: Open,
    make: Callable[[Recipe, Path | None], Plan],
    models: Mapping[str, Mapping[str, Tensor]] | None,
    threads: int,
) -> Iterator[Ingredients]:
    """The inputs of the step that is open, ready to be read."""
    from mergekit_lite.evaluate.ingredients import Ingredients, apart, plain
    from mergekit_lite.run.inputs import inputs_of
    from mergekit_lite.run.start import check_tied

    make(recipe, Path("trial"))  # for its faults, those of its save too
    merged = make(plain(recipe, opened.step), None)
    each = make(apart(recipe, opened.step), None)
    base = opened.factor is not None
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


def merge_in_memory(
    recipe: Recipe,
    models: Mapping[str, Mapping[str, Tensor]],
    *,
    config: Mapping[str, Any] | None = None,
    threads: int | None = None,
    block: int | None = None,
) -> dict[str, Tensor]:
    """Merge state dicts without touching a disk: the recipe's only save, as a state dict on the CPU.

    `models` gives a state dict for every model that the recipe uses, whatever location it names; `config` is a
    config.json that tells the family, where layer depth or tied tensors matter. Same arithmetic, same bytes as `run`.
    """
    from mergekit_lite.plan.order import BLOCK
    from mergekit_lite.run.in_memory import in_memory

    return in_memory(recipe, models, config or {}, threads or default_threads(), block or BLOCK)
