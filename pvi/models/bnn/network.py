"""A module run on other weights than its own, for many draws of them at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from pvi.engine.local import KINDS
from pvi.engine.traces import preserved_on_error, preserved_rng
from pvi.errors import ModelError
from pvi.models.bnn.layers import Hook, candidates, flipout, hooked, local
from pvi.models.bnn.selection import Weight
from pvi.models.bnn.trial import tried

ATTENTION = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
Tensors = dict[str, Tensor]
Dims = Mapping[str, int | None]
Run = Callable[[Tensors, tuple], Tensor]
Normals = Mapping[str, tuple[Tensor, Tensor]]


class Network:
    """Runs a module without touching it: parameters and buffers are replaced for the call alone.

    Args:
        module: the user's.
        weights: its random tensors.
        copies: the number of independent networks in the last batch dimension of every weight, or
            1 for none.

    Attributes:
        looped: why draws are taken one by one; "" while `torch.func.vmap` does.
    """

    def __init__(self, module: nn.Module, weights: Mapping[str, Weight], copies: int):
        self._module, self._weights, self._copies = (module,), weights, copies
        self._layers, self._why = candidates(module, weights)
        self._tried: dict[Any, dict[str, str]] = {}
        self._attends = any(isinstance(m, ATTENTION) for m in module.modules())
        self.looped, self._batches = "", False

    @property
    def module(self) -> nn.Module:
        return self._module[0]

    def how(self, kind: str, inputs: Sequence[Tensor]) -> dict[str, str]:
        """How the draw of each weight may be avoided for such inputs: see `tried`.

        Args:
            kind: what is wanted, "local" or "flipout".
        """
        shapes = tuple((x.shape[1:], x.dtype) for x in inputs)
        key = shapes, tuple(m.training for m in self.module.modules())
        if key not in self._tried:
            with torch.no_grad(), preserved_rng():
                self._tried[key] = tried(self._layers, partial(self._try, inputs))
        found = dict(self._why)
        for layer in self._layers:
            text = self._tried[key][layer.name]
            text = kind if text == "local" else text
            found |= {name: text for name in (layer.weight, layer.bias) if name is not None}
        return found

    def __call__(
        self, inputs: Sequence[Tensor], values: Tensors, normals: Normals, how: Mapping[str, str]
    ) -> Tensor:
        """The module's output for every draw.

        Args:
            inputs: of the module, `(N, ...)`; with copies `(N, copies, ...)`.
            values: draws of the weights, `(*draws, 1, *shape)` or `(*shape)`, with copies
                `(*draws, 1, copies, *shape)` or `(copies, *shape)`.
            normals: their distributions, where these are to be used as `how` says.

        Returns:
            `(*draws, N, ...)`, with copies `(*draws, N, copies, ...)`.
        """
        tensors, plan = self._tensors(values, normals, how)
        draws = torch.broadcast_shapes(*(self._draws(key, x) for key, x in tensors.items()))
        found = {key: self._flat(key, x, draws) for key, x in tensors.items()}
        tensors = {key: x for key, (x, _) in found.items()}
        one: Run = partial(self._one, plan)
        if self._copies > 1:
            one = partial(self._copied, one)
        if not draws:
            return one(tensors, tuple(inputs))
        dims = {key: dim for key, (_, dim) in found.items()}
        output = self._over(one, tensors, dims, tuple(inputs), draws.numel(), None)
        return output.reshape(*draws, *output.shape[1:])

    # From sites to what one run needs.

    def _tensors(
        self, values: Tensors, normals: Normals, how: Mapping[str, str]
    ) -> tuple[Tensors, dict[str, str]]:
        """All tensors by the kind and the name of what they are, and each layer's way."""
        tensors = {f"value:{name}": x for name, x in values.items()}
        plan: dict[str, str] = {}
        for layer in self._layers:
            if layer.weight not in normals or how[layer.weight] not in KINDS:
                continue
            plan[layer.name] = how[layer.weight]
            for name in (layer.weight, layer.bias):
                if name is not None and name in normals:
                    tensors[f"loc:{name}"], tensors[f"scale:{name}"] = normals[name]
            if how[layer.weight] == "local":
                del tensors[f"value:{layer.weight}"]
            if layer.bias is not None and layer.bias in normals:
                del tensors[f"value:{layer.bias}"]
        return tensors, plan

    def _depth(self, key: str) -> int:
        """Dimensions of a tensor of one run, with those of the copies."""
        name = key.split(":", 1)[1]
        return len(self._weights[name].shape) + (self._copies > 1)

    def _draws(self, key: str, x: Tensor) -> torch.Size:
        """Sizes of the draws: what is left of the dimension of the data."""
        return x.shape[: max(0, x.dim() - self._depth(key) - 1)]

    def _flat(self, key: str, x: Tensor, draws: torch.Size) -> tuple[Tensor, int | None]:
        """A tensor with all draws in one dimension in front, or one that is the same for all."""
        lead = x.dim() - self._depth(key)
        sizes = zip(x.shape[:lead], x.stride()[:lead], strict=True)
        if all(size == 1 or stride == 0 for size, stride in sizes):
            return x[(0,) * lead], None
        shape = x.shape[lead:]
        return x.squeeze(lead - 1).expand(draws + shape).reshape(draws.numel(), *shape), 0

    # Runs.

    def _over(
        self, one: Run, tensors: Tensors, dims: Dims, inputs: tuple, num: int, rows: int | None
    ) -> Tensor:
        """All runs at once, or one by one where an operation of the module can't be batched.

        Args:
            dims: the dimension of the runs in each tensor; `None` where they share it.
            rows: that in the inputs and the output, where each run has inputs of its own.
        """
        out, reason = rows or 0, ""
        if not self.looped:
            index = torch.arange(num)  # so that there is a batch where all tensors are shared
            mapped = vmap(lambda t, x, _: one(t, x), (dims, rows, 0), out, randomness="different")
            try:
                with nullcontext() if self._batches else preserved_on_error():
                    found = mapped(tensors, inputs, index)
                self._batches = True
                return found
            except Exception as error:  # whatever a module raises where it can't be batched
                reason = (str(error).splitlines() or [type(error).__name__])[0]
        outputs = []
        for k in range(num):
            part = {n: x if dims[n] is None else x[k] for n, x in tensors.items()}
            outputs.append(one(part, inputs if rows is None else _column(inputs, rows, k)))
        self.looped = self.looped or reason
        return torch.stack(outputs, out)

    def _copied(self, one: Run, tensors: Tensors, inputs: tuple) -> Tensor:
        """One draw of all copies."""
        dims = dict.fromkeys(tensors, 0)
        return self._over(one, tensors, dims, inputs, self._copies, 1)

    def _one(self, plan: Mapping[str, str], tensors: Tensors, inputs: tuple) -> Tensor:
        """The module on one draw."""
        weights = {n: tensors.get(f"value:{n}", tensors.get(f"loc:{n}")) for n in self._weights}
        hooks: dict[str, Hook] = {}
        for layer in self._layers:
            if layer.name not in plan:
                continue
            loc = tensors[f"loc:{layer.weight}"]
            bias = None if layer.bias is None else tensors.get(f"scale:{layer.bias}")
            if plan[layer.name] == "local":
                hooks[layer.name] = local(layer, tensors[f"scale:{layer.weight}"], bias)
            else:
                deviation = tensors[f"value:{layer.weight}"] - loc
                hooks[layer.name] = flipout(layer, deviation, bias)
            weights[layer.weight] = loc
        return self._run(weights, inputs, hooks)

    def _run(self, weights: Mapping[str, Any], inputs: tuple, hooks: Mapping[str, Hook]) -> Tensor:
        buffers = {n: b.clone() for n, b in self.module.named_buffers()}
        with evaluated_norms(self.module), self._slow_attention(), hooked(self._layers, hooks) as n:
            output = functional_call(self.module, {**weights, **buffers}, inputs)
        for name, count in n.items():
            if count != 1:
                raise ModelError(
                    f"layer '{name}' ran {count} times in a network that ran it once when it was "
                    "tried. Use the model without pvi.local_reparam."
                )
        return _tensor(output)

    def _try(
        self, inputs: Sequence[Tensor], rows: int, weights: Mapping[str, Tensor], hooks: Any
    ) -> Tensor:
        torch.manual_seed(0)
        inputs = _column(inputs, 1, 0) if self._copies > 1 else inputs
        index = torch.arange(rows, device=inputs[0].device) % len(inputs[0])
        buffers = {n: b.clone() for n, b in self.module.named_buffers()}
        with evaluated_norms(self.module), self._slow_attention(), hooked(self._layers, hooks):
            given = tuple(x[index] for x in inputs)
            return _tensor(functional_call(self.module, {**weights, **buffers}, given))

    @contextmanager
    def _slow_attention(self) -> Iterator[None]:
        """Run attention layer by layer, in operations that can be batched: torch's fused kernels
        read weights past the layers.
        """
        if not self._attends:
            yield
            return
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def evaluated_norms(module: nn.Module) -> Iterator[None]:
    """Let batch norms use their running statistics: those of a batch would couple its rows."""
    kinds = nn.modules.batchnorm._BatchNorm
    changed = [m for m in module.modules() if isinstance(m, kinds) and m.training]
    try:
        for m in changed:
            m.training = False
        yield
    finally:
        for m in changed:
            m.training = True


def _tensor(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise ModelError(
            f"the module gives a {type(output).__name__}, but a tensor (N, outputs) is needed: wrap"
            " it in a module that returns the part that tells of y (of nn.LSTM the last output)"
        )
    return output


def _column(inputs: Sequence[Tensor], dim: int, k: int) -> tuple[Tensor, ...]:
    return tuple(x.select(dim, k) for x in inputs)
