"""`allocate`: chooses one level for every unit, within each of the budgets.

Separable solvers minimise a sum of profile entries and need no model. Searches measure whole candidates on a pool of
replicas; their default start is the ILP solution, because on real models it reaches in one step what an evolution from
a uniform start spends millions of tokens on. Every allocation that comes out is measured on the same search data.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, WithJsonSchema, field_validator, model_validator

from layerwise.errors import InfeasibleBudget, UsageError
from layerwise.results.resources import EXPLAINED, RESOURCES
from layerwise.solvers import PRESETS, SEARCHES, SOLVERS, Problem, Solution, Stop
from layerwise.stages.allocate.allocation import Allocation, make_allocation, save_allocations
from layerwise.stages.allocate.candidates import CandidateSearch
from layerwise.stages.allocate.costs import Amount, CostTable, budget_text, load_times
from layerwise.stages.allocate.finalists import Recovery, best_recovered
from layerwise.stages.allocate.methods import find_search, find_solver, is_search, search_names, solver_names
from layerwise.stages.contract import BEFORE, Context, Params, Port, Stage, always
from layerwise.stages.data.text import Tokens, tokenized
from layerwise.stages.evaluate.scoring import Request, Score, evaluator_factory, perplexity, score
from layerwise.stages.export import HELD, held_names
from layerwise.stages.levels.database import DatabaseIndex
from layerwise.stages.models.selection import valid_patterns
from layerwise.stages.quantities import Count, parse_bytes, parse_count
from layerwise.stages.recover import RepairEntry
from layerwise.stages.recover.params import WITH_TEXT, AnyEntry, RecoverParams
from layerwise.stages.recover.params import mistakes as repair_mistakes
from layerwise.stages.recover.texts import Text
from layerwise.stages.registry import nearest

if TYPE_CHECKING:
    from layerwise.stages.export.charges import Charges


def _known_resource(name: str) -> str:
    if name not in RESOURCES:
        raise ValueError(f"'{name}' is no resource ({nearest(name, list(RESOURCES))})")
    return name


Resource = Annotated[str, AfterValidator(_known_resource), WithJsonSchema({"enum": list(RESOURCES)})]

_SHARE = r"^\d+(\.\d+)?%$"
_WRITTEN = r"^\d+(\.\d+)?(%|\s*[A-Za-z]{1,3})$"


def _check_amount(amount: Amount) -> Amount:
    """Each amount by itself, so that a mistake is told at its place."""
    if isinstance(amount, str):
        fits = re.fullmatch(_SHARE, amount) is not None and float(amount[:-1]) <= 100
    else:
        fits = math.isfinite(amount) and amount > 0
    if not fits:
        found = f"text '{amount}'" if isinstance(amount, str) else f"{amount:g}"
        raise ValueError(f"must be a number above 0, or 0% to 100%, got {found}")
    return amount


def _check_list(amounts: list[Amount]) -> list[Amount]:
    if not amounts:
        raise ValueError("must be one or more amounts, got none")
    return amounts


def _in_numbers(budgets: object) -> object:
    """`600KB` -> 600000 where it is a size, `1.5M` -> 1500000 where it is a count; what is neither stays as it is."""
    if not isinstance(budgets, dict):
        return budgets
    return {
        name: [_in_number(name, amount) for amount in amounts]
        if isinstance(amounts, list)
        else _in_number(name, amounts)
        for name, amounts in budgets.items()
    }


def _in_number(resource: object, amount: object) -> object:
    parse = {"bytes": parse_bytes, "parameters": parse_count, "flops": parse_count}.get(str(resource))
    if parse is None or not isinstance(amount, str) or not amount[-1:].isalpha():
        return amount
    return parse(amount)


Number = Annotated[float, Field(allow_inf_nan=True), AfterValidator(_check_amount)]  # which has the better words
Share = Annotated[str, AfterValidator(_check_amount), WithJsonSchema({"type": "string", "pattern": _WRITTEN})]
"""`40%`, see `layerwise.stages.allocate.allocation.Amount`."""
SETTINGS = {
    "preset": "preset",
    "generations": "generations",
    "offspring": "offspring",
    "survivors_per_selection": "survivors",
    "tokens_per_selection": "tokens",
    "batch": "batch",
    "population": "population",
    "tokens_per_ask": "tokens_per_ask",
}
"""Parameters that only some searches read, and the argument that each becomes where a search has it."""
FORMAT_SETTINGS = ("any_bits", "asymmetric", "dense_experts")
"""Parameters that say what a format may hold."""
STOP_RULES = {"evaluations": "evaluations", "patience": "patience", "max_tokens": "tokens"}
"""Parameters that end a search, and the rule of `Stop` that each becomes."""


FINALISTS = 8
TEXT = "calibration"
"""The text that a repair reads, if none is named."""

MOST = 1_000_000
"""Of generations, and of candidates at a time: a search beyond that would not end."""

MOST_BUDGETS = 10_000
"""Combinations of them: each is solved for."""


class AllocateParams(Params):
    """The solver, the budgets, and for a search how it searches."""

    solver: str = Field("evolve", description=f"{', '.join(solver_names())}; searches: {', '.join(search_names())}")
    budgets: dict[Resource, Number | Share | Annotated[list[Number | Share], AfterValidator(_check_list)]] = Field(
        min_length=1,
        description="upper limits; lists give one allocation for each combination; 40% is a share of the way from the "
        "least that is reachable to the greatest; bytes may be 600KB or 2GiB. " + EXPLAINED,
    )
    loss: Literal["kl", "output_error", "weight_nmse", "influence", "erk", "lamp", "owl"] = Field(
        "kl", description="the profile's metric that separable solvers add up"
    )
    tie: Literal["none", "fused"] = Field(
        "none", description="fused: q/k/v and gate/up share one level, as serving engines need it"
    )
    equal_width: bool = Field(
        False,
        description="half-blocks that can be narrower all share one level, those of attention and those of the mlps: a "
        "dense export is then smaller without zeros",
    )
    fixed: Annotated[dict[str, str], AfterValidator(valid_patterns)] = Field(
        {},
        description="levels that units must have, by name, kind or re:<pattern> as in `targets` ({head: dense}); they "
        "need not be offered",
    )
    format: str | None = Field(
        None,
        description="count bytes as the weight files of that format of `export` take them, headers included, and offer "
        "no level that it cannot hold; without it, as levels are encoded, which is what `native` stores",
        json_schema_extra={"examples": list(HELD)},
    )
    any_bits: bool = Field(False, description="of `format: compressed_tensors`: as of `export`")
    asymmetric: bool = Field(False, description="of `format: compressed_tensors`: as of `export`")
    dense_experts: bool = Field(False, description="of `format: compressed_tensors`: as of `export`")
    data: str = Field("calibration", description="the text to search on, by its name in the workflow's data section")
    finalists: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="of a search: how many of the best candidates of every budget are repaired with `recover`, and "
        "compared after it; other solvers have one each. 8, if `recover` is said without it",
    )
    recover: AnyEntry | None = Field(
        None,
        description="a short repair, as one of `repairs` of a `recover` stage: of every budget the candidate that is "
        "best after it is chosen. It only ranks: the repaired model itself is made by a `recover` stage behind `apply`",
    )
    repair_data: str | None = Field(
        None,
        description="the text that the repair reads, if it reads any; calibration, if left out. Candidates are "
        "compared on `data`: if that is the same text, a repair that trains looks better than it is",
    )
    seed: int = Field(0, ge=0, description="of a search")
    batch_tokens: Count = Field(2048, description="tokens that run at a time")
    start: Literal["ilp", "uniform", "random"] = Field("ilp", description="of a search: where it starts")
    fitness: Literal["kl", "perplexity"] = Field("kl", description="of a search: what is minimised")
    preset: str | None = Field(None, description=f"evolve: published settings: {', '.join(PRESETS)}")
    generations: int | None = Field(None, ge=0, le=MOST, description="evolve: overrides the preset")
    offspring: int | None = Field(None, ge=1, le=MOST, description="evolve: candidates per generation")
    survivors_per_selection: list[Annotated[int, Field(ge=1, le=MOST)]] | None = Field(
        None, min_length=1, description="evolve: left after each round"
    )
    tokens_per_selection: list[Count] | None = Field(None, min_length=1, description="evolve: tokens of each round")
    batch: int | None = Field(None, ge=1, le=MOST, description="anneal, random, tpe: candidates at a time")
    population: int | None = Field(None, ge=2, le=MOST, description="genetic, nsga2: candidates of a generation")
    tokens_per_ask: Count | None = Field(
        None, description="anneal, genetic, nsga2, random, tpe: tokens that candidates are evaluated on; all without"
    )
    evaluations: int | None = Field(None, ge=1, description="of a search: stop after so many evaluated candidates")
    patience: int | None = Field(None, ge=1, description="of a search: stop after so many rounds without progress")
    max_tokens: Count | None = Field(None, description="of a search: stop after so many evaluated tokens")

    @model_validator(mode="before")
    @classmethod
    def _as_recovery(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(entry := given.get("recover"), dict | RepairEntry):
            return given
        method = entry.get("method") if isinstance(entry, dict) else entry.method
        text = {"repair_data": TEXT} if method in WITH_TEXT and given.get("repair_data") is None else {}
        return {**given, **text, "finalists": FINALISTS if given.get("finalists") is None else given["finalists"]}

    @field_validator("solver")
    @classmethod
    def _known_solver(cls, value: str) -> str:
        known = [*solver_names(), *search_names()]
        if value not in known:
            raise ValueError(f"'{value}' is no solver ({nearest(value, known)})")
        return value

    @field_validator("budgets", mode="before")
    @classmethod
    def _read_units(cls, budgets: object) -> object:
        return _in_numbers(budgets)

    @field_validator("budgets")
    @classmethod
    def _countable(cls, budgets: dict[str, Any]) -> dict[str, Any]:
        count = math.prod(len(amounts) for amounts in budgets.values() if isinstance(amounts, list))
        if count > MOST_BUDGETS:
            raise ValueError(f"{count:,} combinations of budgets are too many: at most {MOST_BUDGETS:,}")
        return budgets

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str | None) -> str | None:
        if value is None or value == "native":
            return None
        value = value.replace("-", "_")
        if value not in held_names():
            raise ValueError(f"'{value}' is no format with known sizes ({nearest(value, held_names())})")
        return value

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, value: str | None) -> str | None:
        if value is not None and value not in PRESETS:
            raise ValueError(f"'{value}' is no preset ({nearest(value, list(PRESETS))})")
        return value

    def material(self) -> dict[str, Any]:
        """Without what the solver does not read: another seed does not change an ILP."""
        idle = set() if self.format else {"format", *FORMAT_SETTINGS}
        idle |= set(OF_RECOVERY) if self.recover is None else {"recover"}
        repair = {} if self.repairs is None else {"recover": self.repairs.material()}
        if not is_search(self.solver):
            unread = {"seed", "start", "fitness", "finalists", *SETTINGS, *STOP_RULES, *idle}
            return self.model_dump(mode="json", exclude=unread) | repair
        material = self.model_dump(mode="json", exclude={*SETTINGS, *idle} - set(read_by(self.solver)))
        preset = {"preset": asdict(PRESETS[self.preset])} if material.get("preset") and self.preset else {}
        return material | repair | preset

    def sources(self) -> Iterable[str]:
        """The module of a solver or search of another package; ours are imported, and so counted, in any case."""
        repair = () if self.repairs is None else self.repairs.sources()
        if self.solver in SOLVERS or self.solver in SEARCHES:
            return repair
        return [(find_search if is_search(self.solver) else find_solver)(self.solver).__module__, *repair]

    @property
    def repairs(self) -> RecoverParams | None:
        """What finalists are repaired by, as a `recover` stage would be told."""
        if self.recover is None:
            return None
        return RecoverParams.model_validate({"repairs": [self.recover], "data": self.repair_data})

    @property
    def needs_statistics(self) -> list[str]:
        """Statistics that the repair needs."""
        return [] if self.recover is None else sorted(self.recover.needs)

    @property
    def needs_losses(self) -> bool:
        """True if it cannot do without a profile."""
        return self.start == "ilp" if is_search(self.solver) else self.solver not in WITHOUT_LOSSES

    @property
    def combinations(self) -> list[dict[str, Amount]]:
        """Each budget to solve for: every combination of the lists."""
        lists = [amounts if isinstance(amounts, list) else [amounts] for amounts in self.budgets.values()]
        return [dict(zip(self.budgets, amounts, strict=True)) for amounts in itertools.product(*lists)]


OF_RECOVERY = ("finalists", "recover", "repair_data")
"""Parameters of the comparison after a repair."""

WITHOUT_LOSSES = ("uniform", "even")
"""Solvers that need no profile."""


def read_by(search: str) -> dict[str, str]:
    """Those of SETTINGS that the search of that name has an argument for."""
    arguments = inspect.signature(find_search(search)).parameters
    return {name: argument for name, argument in SETTINGS.items() if argument in arguments}


Mistakes = Iterator[tuple[tuple[str, ...], str]]
"""(path below `with`, text), as `contract.Check` gives them."""


def mistakes(params: AllocateParams, feeding: Mapping[str, Sequence[Any]]) -> Mistakes:
    """What can be seen to be wrong before anything runs."""
    profiles = feeding.get("profile", ())
    if params.needs_losses and not profiles:
        yield ("solver",), f"{params.solver} needs a profile: add a `profile` stage to needs{_or_another_start(params)}"
    for profile in profiles:
        if params.needs_losses and params.loss not in profile.metrics:
            yield ("loss",), f"the profile does not measure {params.loss}, only {', '.join(profile.metrics)}"
    droppable = [entry for made in feeding.get("database", ()) for entry in made.menu if entry.parents()]
    if params.equal_width and feeding.get("database"):
        if not any(entry.scope == "half" for entry in droppable):
            yield ("equal_width",), "the menu makes no half-block narrower: offer `{method: width}`, or leave this out"
        if any(entry.scope != "half" for entry in droppable):
            yield (
                ("equal_width",),
                "all half-blocks share one level, so none can be dropped: leave `drop` out of the menu",
            )
    if droppable and profiles and params.loss not in ("kl", "influence"):
        yield ("loss",), f"only kl knows what a dropped or narrower part costs: with {params.loss} there would be none"
    for budget in params.combinations:
        depth = budget.get("depth", 1.0)
        if (float(depth[:-1]) == 0) if isinstance(depth, str) else depth < 0.5:
            yield ("budgets", "depth"), f"{depth} blocks leave no half-block: every block would be dropped"
            break
    yield from _unrepaired(params, feeding)
    if "ms" in params.budgets and not feeding.get("latency"):
        yield ("budgets", "ms"), "milliseconds must have been measured: add a `latency` stage to needs"
    if params.solver == "dp" and len(params.budgets) > 1:
        yield ("budgets",), "dp takes one budget; ilp takes several"
    survivors, tokens = params.survivors_per_selection, params.tokens_per_selection
    if survivors and tokens and len(survivors) != len(tokens):
        yield ("survivors_per_selection",), f"{len(survivors)} rounds, but tokens_per_selection has {len(tokens)}"
    yield from _out_of_reach(params, feeding)


def _unrepaired(params: AllocateParams, feeding: Mapping[str, Sequence[Any]]) -> Mistakes:
    """What is wrong with the comparison after a repair."""
    if params.repairs is None:
        for name in ("finalists", "repair_data"):
            if getattr(params, name) is not None:
                yield (name,), "finalists are compared after a repair: say which, as in recover: {method: refit}"
        return
    for (_, _, *path), text in repair_mistakes(params.repairs, feeding):
        yield ("recover", *map(str, path)), text
    if params.format is not None and params.repairs.repairs[0].adds_adapters:
        yield ("recover", "method"), f"{params.format} holds no adapters: leave `format` out, or choose another method"


def _or_another_start(params: AllocateParams) -> str:
    return ", or say start: uniform" if is_search(params.solver) else ""


def _out_of_reach(params: AllocateParams, feeding: Mapping[str, Sequence[Any]]) -> Mistakes:
    """Budgets of bits that no allocation of the menu can meet."""
    menu = [entry for made in feeding.get("database", ()) for entry in made.menu]
    offers = [entry.nominal_bits() for entry in menu if not entry.offers_unchanged]
    known = [bits for offer in offers if offer is not None for bits in offer]
    if not known:
        return
    # What an earlier compression has pruned costs nothing, whatever its bits: then only a run can tell.
    compressed = any(hasattr(made, "pick") for made in feeding.get(BEFORE, ()))
    least = 0.0 if None in offers or compressed else min(known)
    for budget in params.combinations:
        amount = budget.get("bits", least)
        if isinstance(amount, str):
            continue  # a share is within reach whatever the menu has
        if amount < least:
            yield ("budgets", "bits"), f"{amount:g} bits per weight is out of reach: the menu has {least:g} or more"


def allocate(context: Context, params: AllocateParams) -> None:
    """Write `allocations.json`, one allocation per budget.

    Raises:
        InfeasibleBudget: a budget is below the least reachable.
        UsageError: the solver lacks its profile or a budget its
            latencies.
    """
    index = DatabaseIndex(context.input("database"))
    times = [load_times(folder, index) for folder in context.inputs["latency"]]
    charges = _charges(context, params, index)
    table = CostTable(index, *times, fixed=params.fixed, charges=charges, equal_width=params.equal_width)
    losses, profile_tokens = _profiled_losses(context, params, index)
    tie = params.tie == "fused"
    problems = {}
    for budget in params.combinations:
        amounts = table.amounts(budget, tie=tie, losses=losses)
        problems[budget_text(budget)] = (budget, amounts, table.problem(amounts, tie=tie, losses=losses))
    tokens = tokenized(context, params.data)
    factory = evaluator_factory(context, tokens, database=context.input("database"), batch_tokens=params.batch_tokens)
    with context.executor.replicas(factory) as pool:
        metric = "kl" if params.fitness == "kl" else "nll"
        searches = CandidateSearch(
            context, table, pool, solver=params.solver, metric=metric, searches=len(params.combinations)
        )
        found = []
        for text, (budget, amounts, problem) in problems.items():
            try:
                solution, effort = _solve(params, problem, searches, text, tokens.total)
            except InfeasibleBudget as error:
                raise table.in_words(error, amounts) from error
            own = make_allocation(table, solution.choice.tolist(), solver=params.solver, budget=budget)
            others = searches.best(problem, params.finalists) if params.finalists and is_search(params.solver) else []
            chosen = list(dict.fromkeys([own.genome, *others]))[: params.finalists or 1]
            finalists = [make_allocation(table, genome, solver=params.solver, budget=budget) for genome in chosen]
            found.append((finalists, solution, effort))
        searches.flush()
        genomes = tuple(finalist.genome for finalists, _, _ in found for finalist in finalists)
        metrics = ("kl", "nll") if tokens.labelled else ("kl",)
        scores = iter(score(pool, Request(genomes, metrics), workers=context.executor.workers, note="allocations"))
    recovery = _recovery(context, params, tokens, table)
    rows, allocations = [], []
    for number, (unmeasured, solution, effort) in enumerate(found):
        finalists = [_measured(finalist, next(scores), params.format) for finalist in unmeasured]
        allocation: Allocation = finalists[0]
        compared: dict[str, Any] = {}
        if recovery is not None:
            context.progress(number, len(found), f"budgets; {len(finalists)} finalists to be repaired")
            allocation, compared = best_recovered(finalists, recovery)
        allocations.append(allocation)
        of_solver = solution if allocation.genome == finalists[0].genome else None
        rows.append(_row(allocation, of_solver) | effort | {"profile_tokens": profile_tokens} | compared)
    save_allocations(context.out, allocations)
    context.record("allocations", rows)


def _measured(allocation: Allocation, score: Score, format_: str | None) -> Allocation:
    return replace(allocation, kl=score["kl"]["mean"], perplexity=_perplexity(score), format=format_)


def _recovery(context: Context, params: AllocateParams, tokens: Tokens, table: CostTable) -> Recovery | None:
    """What repairs finalists, if they are to be repaired."""
    repairs = params.repairs
    if repairs is None:
        return None
    text = repairs.data
    read = None if text is None else Text(text, tokens if text == params.data else tokenized(context, text))
    return Recovery(context, repairs, read, tokens, batch_tokens=params.batch_tokens, n_weights=table.n_weights)


def _charges(context: Context, params: AllocateParams, index: DatabaseIndex) -> Charges | None:
    """What the format stores, if bytes are counted in its files."""
    if params.format is None:
        return None
    from layerwise.stages.export.charges import Charges

    settings = params.model_dump(include=set(FORMAT_SETTINGS))
    return Charges(params.format, settings, index, index.model(context.model))


def _perplexity(measured: Score) -> float | None:
    """Of what can be predicted and was; None where the data does not say what is right."""
    return perplexity(measured["nll"]["mean"]) if "nll" in measured else None


def _profiled_losses(
    context: Context, params: AllocateParams, index: DatabaseIndex
) -> tuple[Sequence[Sequence[float | None]] | None, int]:
    """The profile's table of the chosen metric, and the tokens that measuring it took."""
    needed = params.needs_losses
    if not context.inputs["profile"]:
        if needed:
            raise UsageError(
                f"solver {params.solver}{' with start: ilp' if is_search(params.solver) else ''} needs a profile",
                hint="add a `profile` stage to `needs`, or use start: uniform",
            )
        return None, 0
    document = json.loads((context.inputs["profile"][0] / "profile.json").read_text(encoding="utf-8"))
    if document["database"] != index.digest:
        raise UsageError(
            "the profile is that of another database", hint="profile the `compress` stage that is used here"
        )
    if params.loss not in document["metrics"]:
        if not needed:
            return None, 0
        raise UsageError(
            f"the profile has no {params.loss}, only {', '.join(document['metrics'])}",
            hint=f"add {params.loss} to the profile's metrics, or choose another loss",
        )
    losses: list[list[float | None]] = document["metrics"][params.loss]
    return losses, document["evaluated_tokens"] if needed and params.loss == "kl" else 0


def _solve(
    params: AllocateParams, problem: Problem, searches: CandidateSearch, budget: str, total_tokens: int
) -> tuple[Solution, dict[str, Any]]:
    """The allocation of one budget, and what finding it took, as columns of `allocations`."""
    started = time.perf_counter()
    effort: dict[str, Any] = {"evaluations": 0, "tokens": 0}
    if is_search(params.solver):
        make, start = find_search(params.solver), _start(params, problem)
        search = make(problem, start, params.seed, total_tokens=total_tokens, **_settings(params))
        tokens = searches.run(search, budget)
        solution = search.best
        effort = {"seed": params.seed, "evaluations": search.evaluations, "tokens": tokens}
    else:
        solution = find_solver(params.solver)(problem)
    return solution, effort | {"seconds": time.perf_counter() - started}


def _start(params: AllocateParams, problem: Problem) -> Solution | None:
    if params.start == "random":
        return None
    return SOLVERS[params.start](problem)


def _settings(params: AllocateParams) -> dict[str, Any]:
    """The arguments of the search that the workflow sets; the preset or the search itself has the rest."""
    written = params.model_dump(include={*SETTINGS, *STOP_RULES}, exclude_none=True)
    settings = {argument: written[name] for name, argument in read_by(params.solver).items() if name in written}
    rules = {rule: written[name] for name, rule in STOP_RULES.items() if name in written}
    return settings | ({"stop": Stop(**rules)} if rules else {})


def _row(allocation: Allocation, solution: Solution | None) -> dict[str, Any]:
    """An allocation as a row; without a solution where another finalist than the solver's was best repaired."""
    claims = (
        {}
        if solution is None
        else {
            "predicted_loss": solution.loss,
            "lower_bound": solution.lower_bound,
            "gap": solution.gap,
            "solver_status": solution.status,
        }
    )
    return {
        "candidate": allocation.candidate,
        "solver": allocation.solver,
        "budget": allocation.budget,
        "genome": list(allocation.genome),
        "units": list(allocation.levels),
        "levels": list(allocation.levels.values()),
        **allocation.sizes,
        "metric": "kl",
        "kl": allocation.kl,
        "perplexity": allocation.perplexity,
        **claims,
    }


STAGE = Stage(
    "allocate",
    AllocateParams,
    allocate,
    gives="allocations",
    takes={
        "database": Port("database"),
        "profile": Port("profile", optional=True),
        "latency": Port("latency", optional=True),
        "statistics": Port("statistics", optional=True),
    },
    data=("data", "repair_data"),
    check=mistakes,
    impl=2,
    any_network=lambda params: params.recover is None,
    on_gpu=always,
)
