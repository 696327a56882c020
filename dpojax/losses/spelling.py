"""Objectives as the command line spells them: ``sigmoid+0.2*sft``, ``ipo(beta=0.3)``, ``path/to/file.py:name``."""

import ast
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from dpojax.losses import LOSSES, WRAPPERS
from dpojax.losses.compose import at_beta, open_options, takes_beta, weighted_sum
from dpojax.losses.traits import Objective, traits_of
from dpojax.types import STATISTICS, LabelledLogps, PairLogps, Sides

IN_FILE = re.compile(r"([^\s+*(),=]+\.py):([A-Za-z_]\w*)")
CONSTANT_NAMES = {"true": True, "false": False, "True": True, "False": False}


DEFAULT_BETA = 0.1


@dataclasses.dataclass(frozen=True)
class ObjectiveSpec:
    """An objective, read from its spelling.

    Attributes:
      objective: ``(policy, ref) -> [B]``; :func:`~dpojax.losses.at_beta` gives it a beta.
      betas: of each term that has one, its beta (bound or by default), and whether it is bound.
      unused: options that were given for every term and that none has.
      files: the user's files that it comes from, as they are spelled.
    """

    objective: Objective
    betas: tuple[tuple[Any, bool], ...]
    unused: tuple[str, ...]
    files: tuple[str, ...]

    @property
    def beta(self) -> float:
        """The beta, bound or by default, of the first term that has one, else 0.1; it scales the implicit rewards."""
        first = self.betas[0][0] if self.betas else DEFAULT_BETA
        return first if _is_number(first) else DEFAULT_BETA

    @property
    def takes_beta(self) -> bool:
        """Whether a beta given to :func:`~dpojax.losses.at_beta` reaches any of its terms."""
        return takes_beta(self.objective)

    def resolved(self, beta: float | None) -> tuple[Objective, float]:
        """An objective and the one beta at which a run computes its losses and scales its rewards.

        Terms that have no beta bound are at the given one, or without one at their own defaults. Where these or the
        first term's bound beta differ, one number cannot be both, and they are bound in the objective.

        >>> objective, beta = spelled("sigmoid+0.2*sft").resolved(0.5)
        >>> beta, takes_beta(objective)
        (0.5, True)
        >>> objective, beta = spelled("ipo(beta=0.3)+sigmoid").resolved(0.5)  # rewards are at 0.3, sigmoid at 0.5
        >>> beta, takes_beta(objective)
        (0.3, False)
        """
        free = {own for own, bound in self.betas if not bound}
        if not free:
            return self.objective, self.beta
        wanted = free if beta is None else {beta}
        of_rewards = self.beta if beta is None or self.betas[0][1] else beta
        if wanted == {of_rewards}:
            return self.objective, of_rewards
        return functools.partial(self.objective, beta=beta), of_rewards


def spelled(text: str, **options: float | None) -> ObjectiveSpec:
    """The objective that a text spells.

    Args:
      text: names of :data:`~dpojax.losses.LOSSES`, calls that bind their options, wrappers around objectives, sums and
        numbers times objectives, and ``file.py:name`` for a function of the user's.
      **options: bound in every term that takes them and does not bind them itself; None binds nothing. A ``beta`` that
        is not bound here can be given later, by :func:`~dpojax.losses.at_beta`.

    Raises:
      ValueError: the text spells no objective; the message gives the reason.

    >>> spec = spelled("sigmoid+0.2*ipo(beta=0.3)")
    >>> spec.beta, spec.takes_beta, spec.betas
    (0.1, True, ((0.1, False), (0.3, True)))
    >>> spelled("sigmoid+0.2*ipo(beta=0.3)", beta=0.5).beta
    0.5
    >>> spelled("length_normalized(hinge)", label_smoothing=0.1).unused
    ('label_smoothing',)
    """
    reader = _Reader({name: value for name, value in options.items() if value is not None})
    try:
        tree = ast.parse(IN_FILE.sub(reader.keep, text.strip()), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        hint = "; a file's path may hold no spaces, brackets, commas, +, * or =" if ".py:" in text else ""
        raise ValueError(
            f"{_cut(text)} cannot be read; write for example sigmoid+0.2*sft or ipo(beta=0.3){hint}"
        ) from None
    try:
        objective = reader.objective(tree)
        _check(objective, text)
    except RecursionError:
        raise ValueError(f"{_cut(text)} is nested too deeply; write fewer terms") from None
    unused = tuple(name for name in reader.options if name not in reader.used)
    files = tuple(dict.fromkeys(path for path, _ in reader.in_files.values()))
    return ObjectiveSpec(objective, tuple(reader.betas), unused, files)


class _Reader:
    """Walks a spelling's syntax tree; keeps which options were used, the betas in order, and the files that it ran."""

    def __init__(self, options: dict[str, float]):
        self.options = options
        self.used: set[str] = set()
        self.betas: list[tuple[Any, bool]] = []  # and whether it is bound
        self.in_files: dict[str, tuple[str, str]] = {}
        self.modules: dict[Path, ModuleType] = {}

    def keep(self, match: re.Match) -> str:
        """A name that Python's grammar takes, for ``file.py:name``."""
        name = f"_in_file_{len(self.in_files)}"
        self.in_files[name] = (match[1], match[2])
        return name

    def objective(self, node: ast.expr) -> Objective:
        terms = self.terms(node)
        return terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else weighted_sum(*terms)

    def terms(self, node: ast.expr) -> list[tuple[float, Objective]]:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self.terms(node.left) + self.terms(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            number, other = (node.left, node.right) if _number(node.left) is not None else (node.right, node.left)
            weight = _number(number)
            if weight is None:
                raise ValueError(f"{self.shown(node)}: one side of * must be a number")
            return [(weight * inner, loss) for inner, loss in self.terms(other)]
        if isinstance(node, ast.Call):
            return [(1.0, self.call(node))]
        if isinstance(node, ast.Name):
            return [(1.0, self.bind(self.function(node.id), node.id, {}))]
        raise ValueError(f"{self.shown(node)} is no objective; use names, name(option=value), + and number *")

    def call(self, node: ast.Call) -> Objective:
        if not isinstance(node.func, ast.Name) or any(keyword.arg is None for keyword in node.keywords):
            raise ValueError(f"{self.shown(node)} is no objective; write name(option=value)")
        name = node.func.id
        if len({keyword.arg for keyword in node.keywords}) < len(node.keywords):
            raise ValueError(f"{self.shown(node)} gives an option twice; give it once")
        given = {str(keyword.arg): _constant(keyword.value) for keyword in node.keywords}
        if name in WRAPPERS:
            if not node.args:
                raise ValueError(f"{name} goes around an objective; write {name}(sigmoid)")
            try:
                return WRAPPERS[name](self.objective(node.args[0]), *map(_constant, node.args[1:]), **given)
            except TypeError:
                raise ValueError(f"{name} takes {_options(WRAPPERS[name])}") from None
        if node.args:
            raise ValueError(f"{self.name(name)}: give its options by name, as in ipo(beta=0.3)")
        return self.bind(self.function(name), name, given)

    def function(self, name: str) -> Callable:
        if name in self.in_files:
            return from_file(*self.in_files[name], self.modules)
        if name in WRAPPERS:
            raise ValueError(f"{name} goes around an objective; write {name}(sigmoid)")
        if name not in LOSSES:
            near = difflib.get_close_matches(name, LOSSES, n=1)
            perhaps = f"perhaps {near[0]}; " if near else ""
            raise ValueError(f"no objective {_cut(name)}; {perhaps}`dpojax losses` lists them, or give file.py:name")
        return LOSSES[name]

    def name(self, name: str) -> str:
        """A name as it was written."""
        return ":".join(self.in_files[name]) if name in self.in_files else name

    def shown(self, node: ast.expr) -> str:
        """A part of the spelling, quoted."""
        return _cut(re.sub(r"_in_file_\d+", lambda match: self.name(match[0]), ast.unparse(node)))

    def bind(self, function: Callable, name: str, given: dict[str, Any]) -> Objective:
        takes = dict(list(inspect.signature(function).parameters.items())[2:])  # without policy and ref
        for option in given:
            if option not in takes:
                raise ValueError(f"{self.name(name)} has no option {option!r}; it takes {_options(function)}")
        free = open_options(function)
        common = {option: value for option, value in self.options.items() if option in free}
        self.used |= self.options.keys() & takes.keys()
        for option, value in given.items():
            default = takes[option].default
            if isinstance(default, float) and isinstance(value, str):
                raise ValueError(f"{self.name(name)}: {option} {value!r} must be a number")
        options = {**common, **given}
        if name in LOSSES and options.get("beta", 1) <= 0:
            raise ValueError(f"{name}: beta {options['beta']} must be above 0")
        if "beta" in takes:
            self.betas.append((options.get("beta", takes["beta"].default), "beta" in options or "beta" not in free))
        return functools.partial(function, **options) if options else function


def _cut(text: str) -> str:
    return repr(text if len(text) <= 100 else f"{text[:100]}...")


def _options(function: Callable) -> str:
    names = list(inspect.signature(function).parameters)
    skipped = 1 if function in WRAPPERS.values() else 2
    return ", ".join(names[skipped:]) or "none"


def _number(node: ast.expr) -> float | None:
    value = _constant(node, strict=False)
    return float(value) if _is_number(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _constant(node: ast.expr, *, strict: bool = True) -> Any:
    """A number, a truth value or a word; words need no quotes."""
    if isinstance(node, ast.Name) and strict:
        return CONSTANT_NAMES.get(node.id, node.id)
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        value = None
    if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
        raise ValueError(f"{_cut(ast.unparse(node))} is no finite number; give a smaller one")
    if strict and not isinstance(value, int | float | str):
        raise ValueError(f"{_cut(ast.unparse(node))} is no value for an option; give a number or a word")
    return value


def from_file(path: str, name: str, modules: dict[Path, ModuleType]) -> Objective:
    """A function of a Python file of the user's.

    Args:
      path: of the file.
      name: of the function.
      modules: files that ran already, which do not run again; this one is added.

    Raises:
      ValueError: no such file or function, or the file cannot be run.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ValueError(f"{path}: no such file; give a Python file that defines {name}")
    if file not in modules:
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # it is anybody's code
            raise ValueError(f"{path}: cannot be run ({type(error).__name__}: {error})") from None
        modules[file] = module
    function = getattr(modules[file], name, None)
    if not callable(function):
        raise ValueError(f"{path}: defines no function {name}")
    return function


def probe(objective: Objective, B: int = 3, C: int = 4) -> tuple[Any, Any]:
    """Log-probabilities of policy and reference with every optional field, of B pairs of up to C tokens."""
    x, n = jnp.full((B,), -1.0), jnp.full((B,), C, jnp.int32)
    if traits_of(objective).on == "labels":
        labelled = LabelledLogps(x, n, jnp.ones((B,)), x)
        return labelled, labelled
    statistics = {name: Sides(x, x) for name in STATISTICS} | {"tokens": Sides(*(jnp.full((B, C), -1.0),) * 2)}
    ones = jnp.ones((B,))
    policy = PairLogps(x, x, n, n, jnp.float32(C), ones, ones, **statistics, key=jax.random.split(jax.random.key(0), B))  # type: ignore[arg-type]
    return policy, policy


def _check(objective: Objective, text: str) -> None:
    """Refuse, before any data is read, what does not give one loss a pair, or branches on the value of its beta."""
    policy, ref = probe(objective)
    kind = "completion" if traits_of(objective).on == "labels" else "pair"
    try:
        out = jax.eval_shape(objective, policy, ref)
    except RecursionError:
        raise
    except Exception as error:  # of anybody's code
        raise ValueError(f"{_cut(text)} fails on a batch of {kind}s ({_reason(error)})") from None
    shape = getattr(out, "shape", out)
    if shape != (3,):
        raise ValueError(f"{_cut(text)} gives {shape} for 3 {kind}s; it must give one loss a {kind}")
    if takes_beta(objective):
        try:
            jax.eval_shape(functools.partial(at_beta, objective), policy, ref, jnp.float32(DEFAULT_BETA))
        except Exception as error:  # of anybody's code
            cure = "use jnp.where in place of if, and jnp in place of math"
            raise ValueError(f"{_cut(text)} fails where beta is an array; {cure} ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__
