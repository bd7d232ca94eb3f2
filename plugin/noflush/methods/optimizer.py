"""The torch optimizer over a method: hyper-parameters, state, and steps over flat tensors. No host.

`step` updates parameter by parameter, as any torch optimizer. `flatten` says that parameters lie one after the other in
flat tensors; from then on `step_flat` updates each of those in one pass, out of place if need be. A parameter group may
name another method than the optimizer's own (key ``method``), whose row then gives its defaults. A stage's delay, in
updates, reaches the methods through `set_stage`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from noflush.methods import look_ahead
from noflush.methods.flat import Flat, FlatGroup, Kernel, Outcome
from noflush.methods.flat_state import FlatState, dtype_of, flat_state, lay_out
from noflush.methods.matrices import piece_of, split_groups
from noflush.methods.method import Method, Place, method_of
from noflush.methods.table import METHODS

_MOMENTS = {"exp_avg", "exp_avg_sq"}
"""State that is zero before the first update, in torch's optimizers too."""


@cache
def running_product(method: Method, hyper: Any, steps: int) -> Tensor:
    """The product of the method's factors over so many updates, multiplied one by one as these do: 0-dim float32."""
    product = torch.ones(())
    for step in range(1, steps + 1):
        before = product.item()
        product *= 1.0 if method.factor is None else method.factor(hyper, float(step))
        if product == before:  # too small for float32 to fall further, as factors only grow
            break
    return product


class DelayAwareOptimizer(Optimizer):
    """An optimizer of noflush's: a method, and the stage that it serves.

    Args:
        params: parameters or groups; a group's key ``method`` names another method for it.
        given: hyper-parameters of the method; its row in `table.METHODS` has their defaults and ranges.

    Raises:
        ValueError: a value outside its range.
        TypeError: a parameter that the method does not have.
    """

    METHOD: ClassVar[Method]

    def __init__(self, params: Iterable[Any], **given: Any) -> None:
        row = self.METHOD.row
        unknown = [name for name in given if name not in row.params]
        if unknown:
            raise TypeError(f"{type(self).__name__} has no parameter {unknown[0]}: it has {', '.join(row.params)}")
        self._check(self.METHOD, given)
        self.place = Place()
        self._flat: list[FlatState] = []
        self._clocks: Tensor | None = None
        values = row.values(given)
        if row.rest is not None:
            params = split_groups(params, row.rest, {k: v for k, v in values.items() if k in METHODS[row.rest].params})
        super().__init__(params, {**values, **row.fixed})

    def _check(self, method: Method, given: Mapping[str, Any]) -> None:
        known = {name: value for name, value in given.items() if name in method.row.params}
        if faults := method.row.faults(known):
            raise ValueError(f"{method.name}: {'; '.join(faults)}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group of another method takes what it leaves out from that method's row.

        Learning rate and weight decay excepted, which schedules set for all groups: those are this optimizer's.

        Raises ValueError for a value outside its range, or a method that is none of noflush's.
        """
        name = param_group.get("method", self.METHOD.name)
        if name not in METHODS:
            raise ValueError(f"a parameter group's method is {name!r}: it must be one of {', '.join(METHODS)}")
        if name != self.METHOD.name:
            row = METHODS[name]
            shared = {key: value for key, value in self.defaults.items() if key in ("lr", "weight_decay")}
            param_group = {**row.values({**shared, **param_group}), **row.fixed, **param_group}
            self._check(method_of(name), param_group)
        else:
            self._check(self.METHOD, {**self.defaults, **param_group})
        super().add_param_group(param_group)

    def method_of_group(self, group: Mapping[str, Any]) -> Method:
        """What updates the parameters of ``group``."""
        name = group.get("method", self.METHOD.name)
        return self.METHOD if name == self.METHOD.name else method_of(name)

    def about(self, delays: Sequence[float]) -> str:
        """Its methods in words, with how many parameters each updates here, and how far each stage looks ahead.

        ``delays``: of the stages, in updates.
        """
        counts: dict[str, int] = {}
        if self._flat:
            for flat in self._flat:
                name, where = flat.method.name, flat.where
                counts[name] = counts.get(name, 0) + len(where.params if where.pieces is None else where.pieces)
        else:
            for group in self.param_groups:
                name = self.method_of_group(group).name
                counts[name] = counts.get(name, 0) + len(group["params"])
        said = ", ".join(f"{name} on {count} parameters here" for name, count in counts.items())
        ahead = [round(max(look_ahead.steps(group, d) for group in self.param_groups), 2) for d in delays]
        return f"{said}, looking ahead by stage {ahead} updates" if any(ahead) else said

    def set_stage(self, place: Place) -> None:
        """Tells the methods where they work."""
        self.place = place

    def forget_weights(self) -> None:
        """Tells the methods that the weights are about to be replaced, by a checkpoint say."""
        for flat in self._flat:
            flat.true = None
            # Hosts copy into it what a checkpoint has, and leave it as it is where that has none.
            flat.clock[1] = 1.0
        for group in self.param_groups:
            method = self.method_of_group(group)
            if method.fresh is not None or not _MOMENTS.issuperset(method.row.state):
                # The drift from the old weights to the new ones is no momentum: starts from the new ones. And tools
                # that rewrite checkpoints keep the two moments alone: what they have dropped must be missing.
                for p in group["params"]:
                    self.state.pop(p, None)

    # ---- parameter by parameter --------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update in place of every parameter that has a gradient. Raises RuntimeError after `flatten`."""
        if self._flat:
            raise RuntimeError(f"{type(self).__name__} keeps flat state now: its parameters are updated by step_flat")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            method = self.method_of_group(group)
            hyper = method.hyper(group, self.place)
            params = [p for p in group["params"] if p.grad is not None]
            if method.row.unit == "element":
                for p in params:
                    step, c = self._begin(p, method, hyper, group)
                    state = tuple(self.state[p][name] for name in method.row.state)
                    method.rule(p.grad, p, p, state, c, False, step)
            else:
                self._step_matrices(params, method, hyper, group)
        return loss

    def _begin(self, p: Tensor, method: Method, hyper: Any, group: Mapping[str, Any]) -> tuple[int, Any]:
        """The number of the next update of ``p``, and its coefficients; makes its state where there is none."""
        self._check_parameter(p)
        state, row = self.state[p], method.row
        if not state:
            state["step"] = torch.tensor(0.0)
            if row.unit == "element":
                state.update(zip(row.state, method.new_state(p, dtype_of(group)), strict=True))
            else:
                where = FlatGroup.of(0, [p], [0], p.numel())
                state.update(zip(row.state, flat_state(where, method, state["step"], group).views(0), strict=True))
        state["step"] += 1
        step, product = state["step"].item(), 1.0
        if row.product is not None:
            assert method.factor is not None
            before = state.get(row.product)
            before = running_product(method, hyper, int(step) - 1) if before is None else before
            state[row.product] = before * method.factor(hyper, step)
            product = state[row.product].item()
        return int(step), method.coefficients(hyper, step, product, 1.0)

    def _step_matrices(self, params: Sequence[Tensor], method: Method, hyper: Any, group: Mapping[str, Any]) -> None:
        """One update of parameters that are matrices, together as far as they have made as many."""
        together: dict[int, tuple[Any, list[Tensor]]] = {}
        for p in params:
            step, c = self._begin(p, method, hyper, group)
            together.setdefault(step, (c, []))[1].append(p)
        for step, (c, members) in together.items():
            gradients, weights, states, sliced = [], [], [], []
            for p in members:
                matrices = piece_of(p).matrices()
                assert p.grad is not None
                gradients += [m.of(p.grad.reshape(-1)) for m in matrices]
                weights += [m.of(p.detach().view(-1)) for m in matrices]
                flats = [self.state[p][name].view(-1) for name in method.row.state]
                laid = lay_out(method, matrices, p.numel(), group)
                states += [tuple(place.of(t) for place, t in zip(of, flats, strict=True)) for of in laid.places]
                sliced += [m.sliced for m in matrices]
            method.rule(gradients, weights, weights, states, sliced, c, False, step)

    def _check_parameter(self, p: Tensor) -> None:
        name = type(self).__name__
        if p.grad is not None and p.grad.is_sparse:
            raise RuntimeError(f"{name} does not take sparse gradients; use dense embeddings")
        if p.dtype not in (torch.float32, torch.float64):
            raise RuntimeError(
                f"{name} got a parameter of {p.dtype}: it updates float32 weights. Enable bf16 or fp16 in the "
                "DeepSpeed config, which keeps float32 master weights, in place of converting the module"
            )

    # ---- flat ---------------------------------------------------------------------------------------------

    def flatten(self, groups: Sequence[FlatGroup], kernel: Kernel) -> None:
        """Keeps state in flat tensors laid out as ``groups`` say; state there is already is carried over.

        The parameters' dtype is float32; gradients and targets of other dtypes are `step_flat`'s business.
        Raises RuntimeError for another dtype, or a matrix that a method sees whole and a shard cuts in two.
        """
        for p in (p for where in groups for p in where.params):
            self._check_parameter(p)
            if p.dtype != torch.float32:
                raise RuntimeError(f"{type(self).__name__} got a parameter of {p.dtype}: under noflush it is float32")
        device = groups[0].params[0].device if groups else torch.device("cpu")
        self._clocks = torch.zeros((len(groups), 2), device=kernel.clock_device(device))
        self._clocks[:, 1] = 1.0
        self._flat = [self._flat_state(where, clock) for where, clock in zip(groups, self._clocks, strict=True)]
        self.adopt_state()

    def _flat_state(self, where: FlatGroup, clock: Tensor) -> FlatState:
        group = self.param_groups[where.group]
        return flat_state(where, self.method_of_group(group), clock, group)

    def adopt_state(self) -> None:
        """Moves what `state` holds into the flat tensors, and makes `state` views of them.

        For after `state` or the parameters were replaced: without any, it starts from the parameters as they are. A
        running product, which no other optimizer has and tools that rewrite checkpoints drop, is worked out.

        Raises ValueError if some of a parameter's state is there and the rest is not, or is of another size.
        """
        for flat in self._flat:
            row = flat.method.row
            hyper = flat.method.hyper(self.param_groups[flat.where.group], self.place)
            for index, p in enumerate(flat.where.params):
                state, views = self.state[p], flat.views(index)
                self._check_whole(state, flat.method)
                if state:
                    for view, name in zip(views, row.state, strict=True):
                        shape = state[name].shape  # of a shard it is flat
                        if view.numel() != shape.numel() or (len(shape) > 1 and shape != view.shape):
                            raise ValueError(
                                f"the optimizer's state has {name} of shape {tuple(shape)}, and {flat.method.name} of "
                                f"this run's parameters {tuple(view.shape)}: it was saved with others; give those"
                            )
                        view.copy_(state[name].view(view.shape))
                else:
                    flat.start(index)
                self.state[p] = {"step": flat.clock[0]}
                flat.clock[0] = state.get("step", 0.0)
                if row.product is not None:
                    flat.clock[1] = state.get(row.product, 1.0)
                    if flat.clock[0] and flat.clock[1] == 1.0:  # every factor is below one
                        flat.clock[1] = running_product(flat.method, hyper, int(flat.clock[0]))
                    self.state[p][row.product] = flat.clock[1]
                self.state[p].update(zip(row.state, views, strict=True))

    def _check_whole(self, state: Mapping[str, Any], method: Method) -> None:
        missing = sorted({"step", *method.row.state} - state.keys())
        if "step" in state and not state["step"] and any(state[k].any() for k in _MOMENTS & state.keys()):
            missing.append("a step above 0")
        if state and missing:
            raise ValueError(
                f"the optimizer's state has {', '.join(sorted(state))} and lacks {', '.join(missing)}, which "
                f"{method.name} cannot go on without: it is another optimizer's, or a tool that rewrote the "
                "checkpoint has dropped it. Load the checkpoint that was saved, or its weights alone "
                "(load_module_only=True)"
            )

    @torch.no_grad()
    def step_flat(
        self,
        kernel: Kernel,
        gradients: Sequence[Tensor],
        weights: Sequence[Tensor],
        targets: Sequence[Tensor],
        master: bool,
        norm: Tensor,
        max_norm: float = 0.0,
        scale: Tensor | float = 1.0,
        whole: float = 0.0,
    ) -> Outcome:
        """One update of every flat group, in the order of `flatten`; clears the gradients.

        Args:
            kernel: that `flatten` was told of.
            gradients: flat, of any floating dtype, scaled by ``scale``.
            weights: flat float32.
            targets: flat; the next weight version: what forwards compute with.
            master: whether the weights are kept apart from the model's, and so updated in place; else only read.
            norm: of all gradients, all shards', still scaled: 0-dim float32.
            max_norm: clips the unscaled norm to so much; 0 clips nothing.
            scale: the loss scale.
            whole: what is known of a larger norm that this one is part of: clips by that, if it is above its own.

        A norm that is not finite skips the update: state and weights stay, and the targets get the same weights.
        """
        flats = []
        for g, w, t, flat in zip(gradients, weights, targets, self._flat, strict=True):
            group = self.param_groups[flat.where.group]
            ahead = look_ahead.steps(group, self.place.delay)
            if ahead and not master and flat.true is None:
                flat.true = w.clone()
            w = w if flat.true is None else flat.true
            apart = master or flat.true is not None
            flats.append(
                Flat(
                    flat.method,
                    *(g, w, t, flat.tensors, flat.clock),
                    flat.method.hyper(group, self.place),
                    apart,
                    flat.matrices if flat.laid else (),
                    flat.laid.places if flat.laid else (),
                    ahead,
                )
            )
        return kernel.update(flats, norm, max_norm, scale, whole)

    @property
    def looks_ahead(self) -> bool:
        """Whether forwards compute with other weights than the true ones (`look_ahead`)."""
        return any(group["look_ahead"] for group in self.param_groups) and self.place.delay > 0

    @torch.no_grad()
    def true_weights(self, weights: Sequence[Tensor], into: Sequence[Tensor]) -> None:
        """Writes the true weights of every flat group, in the order of `flatten`.

        Args:
            weights: flat, as `step_flat` takes them.
            into: flat tensors of the model's dtype; may be ``weights``.
        """
        for w, t, flat in zip(weights, into, self._flat, strict=True):
            t.copy_(w if flat.true is None else flat.true)

    def true_flats(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The flat tensors that hold the true weights, in the order of `flatten`; ``weights`` as `step_flat` takes."""
        return [w if flat.true is None else flat.true for w, flat in zip(weights, self._flat, strict=True)]

    def keep_true(self, weights: Sequence[Tensor]) -> None:
        """The true weights are ``weights``, and what forwards use will be put in their place: the inverse of `land`."""
        for w, flat in zip(weights, self._flat, strict=True):
            if look_ahead.steps(self.param_groups[flat.where.group], self.place.delay):
                flat.true = w.clone()

    def land(self) -> None:
        """The weights are the true ones now: `true_weights` was written into all of them."""
        for flat in self._flat:
            flat.true = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes the groups of torch's own NAdam or AdamW too: what they do not name keeps this rule's default.

        Raises ValueError if they ask for what this rule does not do.
        """
        super().__setstate__(state)
        for group in self.param_groups:
            row = self.method_of_group(group).row
            for key, value in {**row.values({}), **row.fixed}.items():
                group.setdefault(key, self.defaults.get(key, value))
            if group.get("amsgrad") or group.get("maximize"):
                raise ValueError(f"{type(self).__name__} takes no state of an optimizer with amsgrad or maximize")
            if group.get("weight_decay") and group.get("decoupled_weight_decay") is False:
                raise ValueError(
                    f"the state is of an optimizer whose weight_decay {group['weight_decay']} goes into the gradient; "
                    f"{type(self).__name__} shrinks the weights themselves: set weight_decay to 0 in it, or start anew"
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; flat state takes the loaded values over."""
        super().load_state_dict(state_dict)
        self.adopt_state()
