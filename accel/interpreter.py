"""Running a traced program equation by equation, with some of them written out or replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex

# Calls whose body may be written out in place without changing what is computed. A body inside
# control flow (scan, while, cond) runs any number of times and is left alone.
INLINED_CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
    | {"custom_jvp_call", "custom_vjp_call"}
)

Replacement = Callable[[jex.JaxprEqn, Sequence[Any]], list[Any]]


def interpret(
    program: jex.ClosedJaxpr,
    arguments: Sequence[Any],
    wanted: Callable[[jex.JaxprEqn], bool],
    replacement: Replacement | None = None,
) -> list[Any]:
    """Runs a program with the calls that hold a wanted equation written out in place.

    Args:
        program: The program.
        arguments: What it is given.
        wanted: Tells the equations for whose sake calls are written out.
        replacement: What a wanted equation returns for its inputs; None for what it does anyway.
    """
    jaxpr = program.jaxpr
    values: dict[jex.Var, Any] = dict(
        zip((*jaxpr.constvars, *jaxpr.invars), (*program.consts, *arguments), strict=True)
    )
    for equation in jaxpr.eqns:
        inner = list(inner_programs(equation))
        inputs = [read(atom, values) for atom in equation.invars]
        if replacement is not None and wanted(equation):
            outputs = replacement(equation, inputs)
        elif (
            equation.primitive.name in INLINED_CALLS
            and len(inner) == 1
            and any(wanted(e) for e in equations_inside(inner[0]))
        ):
            outputs = interpret(inner[0], inputs, wanted, replacement)
        else:
            outputs = evaluated(jaxpr, equation, values)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom, values) for atom in jaxpr.outvars]


def read(atom: Any, values: Mapping[jex.Var, Any]) -> Any:
    """The value of a variable or of a literal."""
    return atom.val if isinstance(atom, jex.Literal) else values[atom]


def variables_of(atoms: Sequence[Any]) -> Iterator[jex.Var]:
    """Those of an equation's or a program's atoms that are variables."""
    return (atom for atom in atoms if not isinstance(atom, jex.Literal))


def specification(variable: jex.Var) -> jax.ShapeDtypeStruct:
    """Shape and type of what a variable holds."""
    value: Any = variable.aval
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def evaluated(jaxpr: jex.Jaxpr, equation: jex.JaxprEqn, values: Mapping[jex.Var, Any]) -> list[Any]:
    """What one equation of a program returns."""
    given = list(dict.fromkeys(variables_of(equation.invars)))
    single = jaxpr.replace(
        constvars=[], invars=given, outvars=list(equation.outvars), eqns=[equation]
    )
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(single, ()))(*(values[v] for v in given))


def inner_programs(equation: jex.JaxprEqn) -> Iterator[jex.ClosedJaxpr]:
    """The programs that an equation calls."""
    for value in jax.tree.leaves(
        list(equation.params.values()),
        is_leaf=lambda leaf: isinstance(leaf, (jex.Jaxpr, jex.ClosedJaxpr)),
    ):
        if isinstance(value, jex.ClosedJaxpr):
            yield value
        elif isinstance(value, jex.Jaxpr):
            yield jex.ClosedJaxpr(value, ())


def equations_inside(program: jex.ClosedJaxpr) -> Iterator[jex.JaxprEqn]:
    """All equations of a program and of the programs that it calls."""
    for equation in program.jaxpr.eqns:
        yield equation
        for inner in inner_programs(equation):
            yield from equations_inside(inner)
