"""Make a traced graph one that compilers take: no mutation, no boolean indexing, plain inputs."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import CodeGen

from pvi.compiled.draws import is_random
from pvi.compiled.errors import NotCompilable
from pvi.engine.traces import preserved_rng

aten: Any = torch.ops.aten
SMALL = 1 << 16  # numbers in a constant that is worked out beforehand
INDEXING = ("index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put")


def functional(
    graph: fx.GraphModule, inputs: list[Tensor], changing: range
) -> tuple[fx.GraphModule, list[int]]:
    """The same graph without mutation; the new values of the inputs that it changes are further
    outputs.

    Args:
        inputs: values to trace it with; they are not changed.
        changing: which of them the graph may change, as a range of positions.

    Returns:
        The graph, and which of `changing` it does change, counted from its first.
    """

    def pure(*given: Tensor) -> list[Tensor]:
        own = [x.clone() if i in changing else x for i, x in enumerate(given)]
        return [*graph(*own), *(own[i] for i in changing)]

    plain = [x.detach() for x in inputs]
    with torch.no_grad(), preserved_rng():
        try:
            result = make_fx(functionalize(pure, remove="mutations"))(*plain)
        except RuntimeError:  # it writes to a tensor of its own
            _copy_constants(graph)
            result = make_fx(functionalize(pure, remove="mutations"))(*plain)
    changed = _drop_unchanged(result, changing)
    _fold(result)
    _index_by_numbers(result)
    _assign_by_where(result)
    _simplify(result)
    result.graph.eliminate_dead_code()
    _check(result)
    for node in result.graph.nodes:
        node.meta.clear()
    result.graph.set_codegen(CodeGen())
    result.graph.lint()
    result.recompile()
    return result, changed


def _copy_constants(module: fx.GraphModule) -> None:
    """Tensors that a program has made are new in each run."""
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and isinstance(getattr(module, str(node.target)), Tensor):
            with module.graph.inserting_after(node):
                copy = module.graph.call_function(aten.clone.default, (node,))
            node.replace_all_uses_with(copy, lambda user, copy=copy: user is not copy)
    module.recompile()


def _drop_unchanged(module: fx.GraphModule, changing: range) -> list[int]:
    """Outputs that are copies of inputs go; which of them stay, counted from the first."""
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    output = next(node for node in module.graph.nodes if node.op == "output")
    results: list[Any] = list(cast(Sequence[Any], output.args[0]))
    own, copies = results[: len(results) - len(changing)], results[len(results) - len(changing) :]
    changed = [
        i
        for i, (place, node) in enumerate(zip(changing, copies, strict=True))
        if not (node.target is aten.clone.default and node.args[0] is inputs[place])
    ]
    output.args = ([*own, *(copies[i] for i in changed)],)
    return changed


def _simplify(module: fx.GraphModule) -> None:
    """Draws without a copy, and products with one column or row as sums, which compilers fuse."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is aten.normal_functional.default and len(node.args) == 1:
            x = _value(node.args[0])
            with graph.inserting_before(node):
                kind = {"dtype": x.dtype, "device": x.device}
                new = graph.call_function(aten.randn.default, (list(x.shape),), kind)
        elif node.target is aten.mm.default and _is_narrow(node):
            a, b = cast(tuple[fx.Node, fx.Node], node.args)
            along = 1 if _value(b).shape[1] == 1 else 0
            with graph.inserting_before(node):
                turned = graph.call_function(aten.permute.default, ((a, b)[along], [1, 0]))
                pair = (a, turned) if along else (turned, b)
                product = graph.call_function(aten.mul.Tensor, pair)
                new = graph.call_function(aten.sum.dim_IntList, (product, [along], True))
        else:
            continue
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _value(node: Any) -> Tensor:
    """What a node had when it was traced."""
    if node.op == "get_attr":
        return getattr(node.graph.owning_module, node.target)
    return node.meta["val"]


def _is_narrow(node: fx.Node) -> bool:
    """Whether a small product of matrices has one column or one row."""
    a, b = map(_value, node.args)
    return (a.shape[0] == 1 or b.shape[1] == 1) and max(a.numel(), b.numel()) <= SMALL


def _fold(module: fx.GraphModule) -> None:
    """Numbers that were made in Python become part of the operations."""
    graph = module.graph
    for node in list(graph.nodes):
        value = getattr(module, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(value, Tensor) and value.numel() == 1:
            with graph.inserting_before(node):
                kind = {"dtype": value.dtype, "device": value.device}
                new = graph.call_function(
                    aten.full.default, (list(value.shape), value.item()), kind
                )
            new.meta["val"] = value
            node.replace_all_uses_with(new)
            graph.erase_node(node)
        elif node.target is aten.lift_fresh_copy.default:
            with graph.inserting_before(node):
                new = graph.call_function(aten.clone.default, (node.args[0],))
            new.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(new)
            graph.erase_node(node)


def _index_by_numbers(module: fx.GraphModule) -> None:
    """Constant truth values as an index become numbers, since their count fixes a shape."""
    known = _constants(module)
    for node in list(module.graph.nodes):
        if not _is_indexing(node):
            continue
        picked, places = [], node.args[1]
        for x in places:
            if x is None or known.get(x) is None or known[x].dtype != torch.bool:
                picked.append(x)
                continue
            for numbers in known[x].nonzero(as_tuple=True):
                name = f"_index{len(list(module.buffers()))}"
                module.register_buffer(name, numbers)
                with module.graph.inserting_before(node):
                    picked.append(module.graph.get_attr(name))
        node.args = (node.args[0], picked, *node.args[2:])


def _assign_by_where(module: fx.GraphModule) -> None:
    """`x[mask] = number` is a choice between the number and `x`."""
    for node in list(module.graph.nodes):
        if node.target is not aten.index_put.default or len(node.args) > 3:
            continue
        x, places, value = cast(tuple[fx.Node, list, fx.Node], node.args)
        mask = places[0]
        if len(places) > 1 or _value(mask).dtype != torch.bool or _value(value).numel() > 1:
            continue
        shape = list(_value(mask).shape) + [1] * (_value(x).dim() - _value(mask).dim())
        with module.graph.inserting_before(node):
            wide = module.graph.call_function(aten.reshape.default, (mask, shape))
            one = module.graph.call_function(aten.reshape.default, (value, []))
            new = module.graph.call_function(aten.where.self, (wide, one, x))
        node.replace_all_uses_with(new)
        module.graph.erase_node(node)


def _constants(module: fx.GraphModule) -> dict[fx.Node, Tensor]:
    """The values of small nodes that depend on no input and no draw."""
    known: dict[fx.Node, Tensor] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = getattr(module, str(node.target))
            if isinstance(value, Tensor):
                known[node] = value
        elif node.op == "call_function" and not is_random(node.target):
            if not all(x in known for x in node.all_input_nodes):
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            value = node.target(*args, **kwargs)
            if isinstance(value, Tensor) and value.numel() <= SMALL:
                known[node] = value
    return known


def _is_indexing(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.name.removeprefix("aten::") in INDEXING


def _check(module: fx.GraphModule) -> None:
    """Refuse results whose shape depends on values."""
    for node in module.graph.nodes:
        masked = _is_indexing(node) and any(
            isinstance(x, fx.Node)
            and x.meta.get("val") is not None
            and x.meta["val"].dtype == torch.bool
            for x in node.args[1]
        )
        tags = getattr(node.target, "tags", ())
        if (not _is_indexing(node) and torch.Tag.dynamic_output_shape in tags) or masked:
            raise NotCompilable(f"the shape of a result depends on values ({node.target})")
