"""Splits the planned modules outside of MoE layers over `tp`, and says to which class each parameter belongs.

Algorithm:
  1. Each module that the plan names gets the forward of its style, and its parameters become DTensors: this rank's
     slice of the whole weight that it has. Tied weights stay tied.
  2. A parameter's class is read from where it is. The class has one reduction in the plan, which says over which axes
     its gradient is summed; FSDP shards it over these.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from moecompile.errors import PlanError
from moecompile.nn import Experts, LatentDown, LatentUp, Router, SharedExperts, routers_of
from moecompile.nn.split import split_module
from moecompile.nn.stages import Absent, passage_of
from moecompile.passes.base import op_name
from moecompile.plan import HEADS_STYLE, SLICE_OPS, Plan
from moecompile.plan.plan import DENSE, HEADS, INSIDE, ROUTER, SPLIT
from moecompile.torch_private import own_parameters


def split_dense(model: nn.Module, plan: Plan, tp: DeviceMesh) -> None:
    """Splits the modules of `plan.tensor_parallel`, in place (step 1).

    Args:
        tp: the device mesh of the axis.

    With stages, the model has the modules of some alone, and was checked before it was cut.

    Raises:
        PlanError: no module of the model has a planned path, or a weight that is split is also used whole.
    """
    if passage_of(model) is None:
        check_modules(model, plan)
    split: dict[nn.Parameter, nn.Parameter] = {}
    for entry in plan.tensor_parallel:
        for module in _modules(model, entry.modules):
            split_module(module, entry.style, tp, split)
            if entry.style == "mla_kv_a_proj":
                vars(module)["tp_rotary"] = int(model.config.qk_rope_head_dim)  # type: ignore[union-attr,arg-type]
    for module in model.modules():  # modules outside of the plan that share a split weight
        for name, parameter in list(own_parameters(module).items()):
            if parameter in split:
                rule = f"is split over tp, but {type(module).__name__} uses it whole"
                raise PlanError("tensor_parallel", name, rule, "Use mesh.tp=1, or untie the weights")


def check_modules(model: nn.Module, plan: Plan) -> None:
    """Checks that the whole model has the modules that are planned to be split.

    Raises:
        PlanError: no module of the model has a planned path.
    """
    for entry in plan.tensor_parallel:
        if next(_modules(model, entry.modules), None) is None:
            rule = "is planned to be split over tp, but no module of the model has this path"
            raise PlanError("tensor_parallel", entry.modules, rule, "Plan again for this model")


def classes_of(model: nn.Module, plan: Plan) -> dict[nn.Parameter, str]:
    """The class of every parameter that is not stacked over experts (step 2)."""
    classes = dict.fromkeys(model.parameters(), DENSE)
    for _, router in routers_of(model):
        classes |= dict.fromkeys(router.parameters(), ROUTER)
    if plan.mesh.tp == 1:
        return classes
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            classes |= dict.fromkeys(_on_slices(module), INSIDE)
    for entry in plan.tensor_parallel:
        for module in _modules(model, entry.modules):
            own = module.parameters(recurse=False)
            classes |= {p: SPLIT for p in own if isinstance(p, DTensor)}
            if entry.style == HEADS_STYLE:
                classes |= dict.fromkeys(module.parameters(), HEADS)
    return classes


def check_one_dtype(model: nn.Module, classes: Mapping[nn.Parameter, str], others: Collection[nn.Parameter]) -> None:
    """Checks that no weight of another dtype than most needs what FSDP, which does not take them, does over `tp`.

    Raises:
        PlanError: one of `others` is split over tp, or its gradient is summed over it.
    """
    for name, parameter in model.named_parameters():
        if parameter in others and classes[parameter] in (SPLIT, HEADS, INSIDE):
            rule = f"is {parameter.dtype}, unlike most of the model, and tensor parallelism needs one dtype"
            raise PlanError("mesh.tp", name, rule, "Convert the weight, or use mesh.tp=1")


def _on_slices(graph_module: fx.GraphModule) -> Iterator[nn.Parameter]:
    """Parameters of the modules between a cut of the tokens and its join: shared experts, norms and activations."""
    is_cut = False
    for node in graph_module.graph.nodes:
        if op_name(node) in SLICE_OPS:
            is_cut = op_name(node) == "cut_tokens"
        elif is_cut and node.op == "call_module":
            yield from graph_module.get_submodule(str(node.target)).parameters()


def _modules(model: nn.Module, pattern: str) -> Iterator[nn.Module]:
    """Modules with the path `pattern`, in which `*` is a number; not those of experts and routers that are ours, nor
    what stands for those of other stages.
    """
    matches = re.compile(re.escape(pattern).replace(r"\*", r"\d+")).fullmatch
    own_classes = (Experts, LatentDown, LatentUp, Router, SharedExperts)
    ours = tuple(path for path, module in model.named_modules() if isinstance(module, own_classes))
    for path, module in model.named_modules():
        is_here = not isinstance(module, Absent)
        if is_here and matches(path) and not path.startswith(tuple(f"{own}." for own in ours)):
            yield module
