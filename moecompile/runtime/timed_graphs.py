"""Times the nodes of the regions' graphs, in a few steps of a run. It computes what the graph computes, node by node.

Algorithm:
  1. While installed, a region's forward interprets its graph. A node's time goes to a part: router, experts, shared
     experts; exchanges before and after the experts; copies and sums of rows; the rest.
  2. Before the first exchange of a layer, and before the first one after its experts, the ranks of the EP group wait
     for each other. The time of that is waiting, so that the exchanges themselves do not include it.
  3. What backward computes again is neither timed nor waited for.
"""

from __future__ import annotations

import inspect
import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor, fx, nn

from moecompile.ops.traffic import traffic
from moecompile.passes.base import op_name
from moecompile.plan import EXCHANGE_OPS, WAIT_OPS
from moecompile.torch_private import in_backward

PARTS = ("router", "dispatch", "experts", "combine", "waiting", "arriving", "shared", "rows", "other")


@dataclass
class Times:
    """Of one region. seconds: part -> in one micro-batch, for every one. rows: of its experts, in every one. exchanges:
    of the last micro-batch, in order: op, shapes sent and received, bytes to other ranks.
    """

    seconds: list[dict[str, float]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    exchanges: list[dict[str, Any]] = field(default_factory=list)


class TimedGraphs:
    """Times the regions of a compiled model between `install` and `remove`.

    Args:
        group: the ranks that exchange rows; None: there are none.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.times: dict[str, Times] = {}
        self._regions = {
            path: region
            for path, region in model.named_modules()
            if isinstance(region, fx.GraphModule) and _has_layer(region) and _plain_arguments(region)
        }

    def install(self) -> None:
        """The next forwards are timed."""
        for path, region in self._regions.items():
            times = self.times.setdefault(path, Times())
            region.forward = self._timed(region, region.forward, times)

    def remove(self) -> None:
        """Forwards are as before."""
        for region in self._regions.values():
            region.__dict__.pop("forward", None)

    def _timed(self, region: fx.GraphModule, forward: Callable[..., Any], times: Times) -> Callable[..., Any]:
        signature = inspect.signature(forward)

        def run(*args: Any, **kwargs: Any) -> Any:
            if in_backward():  # Step 3
                return forward(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            interpreter = _Interpreter(region, self.group)
            out = interpreter.run(*bound.arguments.values())
            times.seconds.append(dict(interpreter.seconds))
            times.rows.append(interpreter.rows)
            times.exchanges = interpreter.exchanges
            return out

        return run


class _Interpreter(fx.Interpreter):
    def __init__(self, region: fx.GraphModule, group: dist.ProcessGroup | None) -> None:
        super().__init__(region)
        self.group = group
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.rows = 0
        self.exchanges: list[dict[str, Any]] = []
        self._waited = set[str]()
        self._computed = False  # whether experts were computed already

    def run_node(self, n: fx.Node) -> Any:
        """Step 1."""
        part, start = self._part(n), time.perf_counter()
        if n.op == "call_function" and op_name(n) in EXCHANGE_OPS:
            self._wait("waiting" if self._computed else "arriving")
            start, before = time.perf_counter(), _sent()
        out = super().run_node(n)
        self.seconds[part] += time.perf_counter() - start
        if part == "experts":
            self._computed = True
            self.rows += self._rows_of(n)
        elif n.op == "call_function" and op_name(n) in EXCHANGE_OPS:
            sent = self.map_nodes_to_values(n.args[0], n)
            self.exchanges.append(
                {"op": op_name(n), "sent": _shape(sent), "received": _shape(out), "bytes": _sent() - before}
            )
        return out

    def _wait(self, part: str) -> None:
        """Step 2."""
        if self.group is None or part in self._waited:
            return
        self._waited.add(part)
        start = time.perf_counter()
        dist.barrier(group=self.group)
        self.seconds[part] += time.perf_counter() - start

    def _part(self, n: fx.Node) -> str:
        name = op_name(n)
        if n.op == "call_module":
            kind = re.sub(r"_\d+$", "", name)
            return {"router": "router", "experts": "experts", "shared_experts": "shared"}.get(kind, "other")
        if n.op == "call_function" and name in EXCHANGE_OPS | WAIT_OPS:
            return "combine" if self._computed else "dispatch"
        return "rows" if "moecompile" in str(n.target) else "other"

    def _rows_of(self, n: fx.Node) -> int:
        """Assignments that an experts call computes: the sum of its counts."""
        counts = self.map_nodes_to_values(n.args[1], n) if len(n.args) > 1 else None
        return int(counts.sum()) if isinstance(counts, Tensor) else 0


def _sent() -> int:
    """Bytes that this rank has sent to others and not yet reported."""
    return sum(sent for rank, sent in traffic.so_far().items() if rank != dist.get_rank())


def _shape(value: Any) -> str:
    first = value[0] if isinstance(value, list | tuple) and value else value
    return " x ".join(map(str, first.shape)) if isinstance(first, Tensor) else ""


def _has_layer(region: fx.GraphModule) -> bool:
    return any(n.op == "call_module" and op_name(n).startswith("experts") for n in region.graph.nodes)


def _plain_arguments(region: fx.GraphModule) -> bool:
    return not any(n.op == "placeholder" and str(n.target).startswith("*") for n in region.graph.nodes)
