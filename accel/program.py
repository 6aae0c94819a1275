"""A network as a program: where its layers stand in true execution order, and its pieces.

Every layer of interest is made to mark its input and its output with ``checkpoint_name``; the
network is then traced once. The marks are equations of the jaxpr, so they give the order of
execution whatever the network's graph (chain, residual, concatenation), ask nothing of its author,
and cut it into segments, each of which runs as one jitted function.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from accel.compiler import Options, network_options
from accel.interpreter import (
    INLINED_CALLS,
    equations_inside,
    evaluated,
    inner_programs,
    interpret,
    read,
    specification,
    variables_of,
)
from accel.solvers.activations import ACTIVATIONS, IDENTITY, RELU, Activation

Path = str
Segment = Callable[[Sequence[jax.Array], Sequence[jax.Array]], list[jax.Array]]


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One call of one layer in the traced program.

    Attributes:
        path: Path of the layer in the module tree, its parts joined by ``/``.
        layer: The layer itself (of the traced copy, with the original's weights).
        input: What the layer is given.
        output: What the layer returns.
        rows_per_image: Size of the input's first axis for each image: above 1 where the network
            merges other axes, such as time, into the batch.
        start: Index of the first equation of the call.
        stop: Index after the last equation of the call.
        activation: Its name, where the output goes through one of ``ACTIVATIONS`` and nowhere else,
            otherwise ``"identity"``.
        activated: What the activation returns.
    """

    path: Path
    layer: Any
    input: jex.Var
    output: jex.Var
    rows_per_image: int
    start: int
    stop: int
    activation: Activation
    activated: jex.Var


@dataclasses.dataclass(frozen=True)
class Program:
    """A network traced for one shape of images.

    Attributes:
        jaxpr: The program; its inputs are the parameters, then the images.
        parameters: The values of the network's parameters and other state.
        calls: Calls of the layers of interest in execution order.
        left_out: Layers of interest that have no place of their own in the program, and why.
        options: What the compiler is told where the program or a part of it is jitted.
    """

    jaxpr: jex.Jaxpr
    parameters: tuple[jax.Array, ...]
    calls: tuple[LayerCall, ...]
    left_out: dict[Path, str]
    options: Options | None

    @property
    def images(self) -> jex.Var:
        """The variable that holds the images."""
        return self.jaxpr.invars[-1]

    def live(self, call: LayerCall) -> tuple[jex.Var, ...]:
        """What must be known to run on from ``call``: its input, and all that is used after it."""
        parameters = set(self.jaxpr.invars[:-1])
        before = {self.images}.union(*(eqn.outvars for eqn in self.jaxpr.eqns[: call.start]))
        after = {v: None for eqn in self.jaxpr.eqns[call.stop :] for v in variables_of(eqn.invars)}
        after |= dict.fromkeys(variables_of(self.jaxpr.outvars))
        kept = (v for v in after if v in before and v not in parameters and v is not call.input)
        return (call.input, *kept)

    def with_added(
        self, variables: Sequence[jex.Var]
    ) -> Callable[[Any, Any, Sequence[Any]], list[Any]]:
        """The program with something added to what some of its variables hold.

        Returns:
            A pure function ``(parameters, images, an array a variable) -> the program's outputs``.
        """

        def run(parameters, images, added):
            places = dict(zip(variables, added, strict=True))
            values = dict(zip(self.jaxpr.invars, (*parameters, images), strict=True))
            for equation in self.jaxpr.eqns:
                for variable, value in zip(
                    equation.outvars, evaluated(self.jaxpr, equation, values), strict=True
                ):
                    known = variable in places
                    values[variable] = value + places[variable] if known else value
            return [read(atom, values) for atom in self.jaxpr.outvars]

        return run

    def reaches_outputs(self, variable: jex.Var) -> bool:
        """Whether the program's outputs are computed from a variable."""
        reached = {variable}
        for equation in self.jaxpr.eqns:
            if not reached.isdisjoint(variables_of(equation.invars)):
                reached.update(equation.outvars)
        return not reached.isdisjoint(variables_of(self.jaxpr.outvars))

    def segment(
        self, given: Sequence[jex.Var], wanted: Sequence[jex.Var]
    ) -> tuple[Segment, tuple[jax.Array, ...]]:
        """The part of the program that computes ``wanted`` from ``given``.

        Returns:
            A pure function ``(parameters, values of given) -> values of wanted``, and the
            parameters to call it with.
        """
        needed = set(wanted) - set(given)
        equations = []
        for equation in reversed(self.jaxpr.eqns):
            if needed.intersection(equation.outvars):
                equations.append(equation)
                needed.difference_update(equation.outvars)
                needed.update(set(variables_of(equation.invars)) - set(given))
        indices = [i for i, v in enumerate(self.jaxpr.invars[:-1]) if v in needed]
        inputs = [self.jaxpr.invars[i] for i in indices]
        if unknown := needed - set(inputs):
            raise ValueError(f"cannot be computed from the given variables: {unknown}")
        jaxpr = self.jaxpr.replace(
            constvars=[],
            invars=[*inputs, *given],
            outvars=list(wanted),
            eqns=equations[::-1],
        )
        run = jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))
        return (lambda parameters, values: run(*parameters, *values)), tuple(
            self.parameters[i] for i in indices
        )


def path_name(parts: Sequence[Any]) -> Path:
    """A path in a module tree as text: ``("blocks", 0, "conv")`` is ``blocks/0/conv``."""
    return "/".join(map(str, parts))


def named_layers(model: nnx.Module, kinds: tuple[type, ...]) -> Iterator[tuple[Path, nnx.Module]]:
    """The layers of ``model`` whose type is exactly one of ``kinds``, with their paths."""
    for parts, node in nnx.iter_graph(model):
        if type(node) in kinds:
            yield path_name(parts), node


def trace(model: nnx.Module, images: Any, kinds: tuple[type, ...] = (nnx.Conv,)) -> Program:
    """Traces ``model`` in evaluation mode and finds the calls of its layers of the given kinds.

    Args:
        model: The network, called as ``model(images)``; it is not changed.
        images: Images ``[batch, …]``, or anything with their ``shape`` and ``dtype``.
        kinds: Layer types to find. Subclasses may compute something else and are not found.

    Raises:
        ValueError: If the network cannot be called with such images.
    """
    tapped = nnx.clone(model)
    tapped.eval()
    layers = dict(named_layers(tapped, kinds))
    for path, layer in layers.items():
        object.__setattr__(layer, "tap_path", path)
        object.__setattr__(layer, "__class__", _tapped(type(layer)))
    graphdef, state = nnx.split(tapped)
    values, structure = jax.tree.flatten(state)
    numbered = nnx.to_flat_state(jax.tree.unflatten(structure, range(len(values))))
    places = {
        path_name(parts): leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        for parts, leaf in numbered
    }
    specified = jax.ShapeDtypeStruct(images.shape, images.dtype)

    def run(*arguments):
        state = jax.tree.unflatten(structure, arguments[:-1])
        return nnx.merge(graphdef, state)(arguments[-1])

    try:
        traced = jax.make_jaxpr(run)(*values, specified)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot be called with images of shape {images.shape} and type"
            f" {images.dtype}: {error}"
        ) from error
    flat = jax.make_jaxpr(lambda *arguments: interpret(traced, arguments, _is_mark))(
        *values, specified
    )
    # Constants of the trace (arrays that the author closed over) become parameters like others.
    jaxpr = flat.jaxpr.replace(
        constvars=[],
        invars=[*flat.jaxpr.constvars, *flat.jaxpr.invars],
    )
    own = {path: jaxpr.invars[len(flat.consts) + place] for path, place in places.items()}
    calls, left_out = _find_calls(jaxpr, layers, own)
    return Program(jaxpr, (*flat.consts, *values), calls, left_out, network_options(tapped))


@cache
def _tapped(kind: type) -> type:
    """A subclass of a layer type that marks the input and the output of each call."""

    def call(self, inputs, *args, **kwargs):
        inputs = checkpoint_name(inputs, f"in:{self.tap_path}")
        outputs = kind.__call__(self, inputs, *args, **kwargs)
        return checkpoint_name(outputs, f"out:{self.tap_path}")

    return type(f"Tapped{kind.__name__}", (kind,), {"__call__": call})


def _mark(equation: jex.JaxprEqn) -> str | None:
    name = equation.params.get("name", "") if equation.primitive.name == "name" else ""
    return name if name.startswith(("in:", "out:")) else None


def _is_mark(equation: jex.JaxprEqn) -> bool:
    return _mark(equation) is not None


def _find_calls(
    jaxpr: jex.Jaxpr, layers: dict[Path, nnx.Module], parameters: Mapping[Path, jex.Var]
) -> tuple[tuple[LayerCall, ...], dict[Path, str]]:
    """The calls of layers, and the layers left out; ``parameters`` are the model's, by path."""
    images = specification(jaxpr.invars[-1]).shape[0]
    positions: dict[str, list[int]] = {}
    hidden: Counter[str] = Counter()
    for index, equation in enumerate(jaxpr.eqns):
        if (mark := _mark(equation)) is not None:
            positions.setdefault(mark, []).append(index)
        else:
            inside = (e for inner in inner_programs(equation) for e in equations_inside(inner))
            hidden.update(filter(None, map(_mark, inside)))

    calls: list[LayerCall] = []
    left_out: dict[Path, str] = {}
    for path, layer in layers.items():
        starts, stops = positions.get(f"in:{path}", []), positions.get(f"out:{path}", [])
        if hidden[f"in:{path}"]:
            left_out[path] = "called inside control flow (scan, while or cond)"
        elif not starts:
            left_out[path] = "not called"
        elif len(starts) > 1:
            left_out[path] = f"called {len(starts)} times with the same weights"
        else:
            (start,), (stop,) = starts, stops
            (given,) = variables_of(jaxpr.eqns[start].invars)
            output = jaxpr.eqns[stop].outvars[0]
            reason = (
                _shape_fault(layer, given, output, images)
                or _kernel_fault(jaxpr, layer, start, stop, parameters.get(f"{path}/kernel"))
                or _bias_fault(jaxpr, start, stop, parameters.get(f"{path}/bias"))
            )
            if reason is not None:
                left_out[path] = reason
                continue
            activation, activated = _activation(jaxpr, output, stop + 1)
            rows = specification(given).shape[0] // images
            calls.append(
                LayerCall(path, layer, given, output, rows, start, stop + 1, activation, activated)
            )
    calls.sort(key=lambda call: call.start)
    return tuple(calls), left_out


def _shape_fault(layer: Any, given: jex.Var, output: jex.Var, images: int) -> str | None:
    """Why the call is not one of the layer as it is, for each image by itself."""
    try:
        expected = jax.eval_shape(layer, specification(given))
    except Exception:
        return "called under vmap with weights of its own for each"
    if expected.shape != specification(output).shape:
        return "called under vmap with the batch axis not in front"
    rows = specification(given).shape[0]
    if isinstance(layer, nnx.Conv) and rows % images:
        return f"its input has {rows} rows for a batch of {images} images"
    return None


def _kernel_fault(
    jaxpr: jex.Jaxpr, layer: Any, start: int, stop: int, kernel: jex.Var | None
) -> str | None:
    """Why other factors cannot stand in for the kernel that the layer holds.

    The convolution may take it in another type, but not, say, normalised; and nothing else may take
    it, which would miss it in the module that replaces the layer.
    """
    if not isinstance(layer, nnx.Conv | nnx.Linear):
        return None
    # Masked kernels are told of as such; what other products than the plain one compute, likewise.
    if getattr(layer, "mask", None) is not None:
        return None
    if isinstance(layer, nnx.Linear) and layer.dot_general is not jax.lax.dot_general:
        return None
    if kernel is None:
        return "its kernel is shared with another layer"
    primitive = "conv_general_dilated" if isinstance(layer, nnx.Conv) else "dot_general"
    products = [e for e in jaxpr.eqns[start:stop] if e.primitive.name == primitive]
    if len(products) != 1:
        return f"it computes {len(products)} products, not one"
    same, (used,) = {kernel}, list(variables_of(products[0].invars[1:2]))
    casts = []
    for equation in jaxpr.eqns[:stop]:
        given = variables_of(equation.invars)
        if equation.primitive.name == "convert_element_type" and not same.isdisjoint(given):
            same.update(equation.outvars)
            casts.append(equation)
    if used not in same:
        return "its kernel is computed from the one that it holds"
    inside = [*jaxpr.eqns[start:stop], *casts]
    return "its kernel is used elsewhere, too" if _leave(jaxpr, inside, same) else None


def _bias_fault(jaxpr: jex.Jaxpr, start: int, stop: int, bias: jex.Var | None) -> str | None:
    if bias is None or not _leave(jaxpr, jaxpr.eqns[start:stop], {bias}):
        return None
    return "its bias is used elsewhere, too"


def _activation(jaxpr: jex.Jaxpr, output: jex.Var, stop: int) -> tuple[Activation, jex.Var]:
    """The activation that an output goes through, if it is all that becomes of it, and its result.

    Looked for in the equations that compute from the output alone, up to each after which nothing
    else needs what lies between.
    """
    aval = specification(output)
    known = _traced_activations(aval.shape, aval.dtype, jax.config.read("jax_enable_x64"))
    inside = {output}
    region: list[jex.JaxprEqn] = []
    for equation in jaxpr.eqns[stop:]:
        given = list(variables_of(equation.invars))
        # What is given nothing, such as a constant, is no part of it.
        if not given or not inside.issuperset(given):
            continue
        region.append(equation)
        inside.update(equation.outvars)
        if len(region) > max(known):
            break
        if len(equation.outvars) != 1 or _leave(jaxpr, region, inside - {*equation.outvars}):
            continue
        (activated,) = equation.outvars
        if len(region) == 1 and _is_relu(equation):
            return RELU, activated
        # Printed, variables are named by their order: what is equal was traced from the same code.
        text = str(jaxpr.replace(constvars=[], invars=[output], outvars=[activated], eqns=region))
        if (name := known.get(len(region), {}).get(text)) is not None:
            return name, activated
    return IDENTITY, output


def _leave(jaxpr: jex.Jaxpr, region: Sequence[jex.JaxprEqn], variables: set[jex.Var]) -> bool:
    """Whether anything but the region needs one of the variables."""
    own = {id(equation) for equation in region}
    others = (equation for equation in jaxpr.eqns if id(equation) not in own)
    return any(
        v in variables
        for atoms in (jaxpr.outvars, *(equation.invars for equation in others))
        for v in variables_of(atoms)
    )


@cache
def _traced_activations(
    shape: tuple[int, ...], dtype: Any, x64: bool
) -> dict[int, dict[str, Activation]]:
    """Names of activations by how many equations they take, and by these as text.

    ``x64`` is JAX's mode, which constants in them may hang on.
    """
    del x64
    found: dict[int, dict[str, Activation]] = {}
    for name, function in ACTIVATIONS.items():
        traced = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, dtype)).jaxpr
        if traced.eqns:
            found.setdefault(len(traced.eqns), {})[str(traced)] = name
    return found


def _is_relu(equation: jex.JaxprEqn) -> bool:
    """Whether an equation is max(x, 0), written out or as a call of nothing else."""
    if equation.primitive.name == "max":
        constants = [atom.val for atom in equation.invars if isinstance(atom, jex.Literal)]
        return len(constants) == 1 and not np.any(constants[0])
    inner = list(inner_programs(equation))
    if equation.primitive.name not in INLINED_CALLS or len(inner) != 1:
        return False
    body = inner[0].jaxpr
    return (
        len(body.eqns) == 1
        and list(body.outvars) == list(body.eqns[0].outvars)
        and _is_relu(body.eqns[0])
    )
