"""Measures the last steps of a training run for its report, and writes `step_profile.json` and `routes_sample.npz`.

Algorithm:
  1. In the last steps record which experts the tokens chose, up to `MAX_TOKENS` tokens.
  2. In the last three steps of them time the nodes of the graphs, on a CPU, where a clock on the host
     tells when an op is over.
  3. In the last step count what the forward keeps for backward, the gradients and the optimizer's state.
  4. At the end gather everything on rank 0, which writes the files.

Of a pipeline, whose forwards and backwards take turns, only the step's time, states and gradients are measured.

Steps before are not touched. What is computed does not change: graphs are interpreted node by node, and tensors are
counted where they are.
"""

from __future__ import annotations

import inspect
import json
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks

from moecompile.atomic import replacing, write_text
from moecompile.errors import MoecompileError
from moecompile.mesh import LinkClass, MeshSpec
from moecompile.nn.replay import ReplayLayer, Routes, record_routes, replay_layers
from moecompile.ops.traffic import lookup_traffic, optimizer_traffic, traffic
from moecompile.passes.base import op_name
from moecompile.passes.recompute import holder_of_forward
from moecompile.plan import EXCHANGE_OPS, WAIT_OPS, Plan, Traffic
from moecompile.rundir import PROFILE, ROUTES
from moecompile.runtime.gradients import local_grads
from moecompile.runtime.module import LanguageModule
from moecompile.runtime.strategy import ExpertParallelStrategy, groups_of
from moecompile.torch_private import in_backward

# -- the bytes that training forwards and the optimizer send, by link class -----------------------------------------


class TrafficMeter(Callback):
    """Counts the bytes that training forwards send, by link class, and those of the optimizer."""

    def __init__(self, mesh: MeshSpec) -> None:
        self.mesh = mesh
        self._bytes = {LinkClass.INTRA_NODE: 0, LinkClass.INTER_NODE: 0, LinkClass.SELF: 0}
        self._by_optimizer = dict.fromkeys(self._bytes, 0)
        self._by_rank = [0] * mesh.world_size
        self._first_step = 0
        self._tokens = 0  # of all ranks and layers; those of an encoder and a decoder see different numbers
        self._last_step = 0
        self.per_token_and_layer: Traffic | None = None
        self.per_rank_and_step: Traffic | None = None  # of the optimizer, as a mean over ranks and steps
        self._lookups = [0, 0, 0, 0]  # micro-batches; bytes to other ranks; rows that tokens read, different ones
        self.lookups: tuple[float, float] | None = None  # bytes per rank and micro-batch; different rows of those read

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the step at which the run starts."""
        self._last_step = self._first_step = trainer.global_step
        optimizer_traffic.take()  # of a step with zeros, which makes the state that a checkpoint fills

    def on_train_batch_start(self, *_: Any) -> None:
        """Discards bytes that were sent outside training (validation, warm-up)."""
        traffic.take()
        lookup_traffic.take()
        lookup_traffic.take_rows()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the bytes that this rank sent for one micro-batch, and the tokens of a completed step."""
        for rank, sent in traffic.take().items():
            self._bytes[self.mesh.link(trainer.global_rank, rank)] += sent
            self._by_rank[rank] += sent
        sent = sum(sent for rank, sent in lookup_traffic.take().items() if rank != trainer.global_rank)
        new = (1, sent, *lookup_traffic.take_rows())
        self._lookups = [before + more for before, more in zip(self._lookups, new, strict=True)]
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            for rank, sent in optimizer_traffic.take().items():
                self._by_optimizer[self.mesh.link(trainer.global_rank, rank)] += sent
            assert isinstance(trainer.strategy, ExpertParallelStrategy)
            self._tokens += sum(load.tokens for load in trainer.strategy.loads)

    def sent_per_step(self, rank: int) -> list[float]:
        """Bytes that this rank, `rank`, sent to each other rank in the forwards of a step, as a mean over the steps."""
        steps = max(1, self._last_step - self._first_step)
        return [0.0 if other == rank else sent / steps for other, sent in enumerate(self._by_rank)]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Computes the bytes per token and MoE layer, over all ranks."""
        links = (LinkClass.INTRA_NODE, LinkClass.INTER_NODE)
        sent = [counts[link] for counts in (self._bytes, self._by_optimizer) for link in links]
        sums = torch.tensor(sent + self._lookups, dtype=torch.int64, device=pl_module.device)
        dist.all_reduce(sums, group=groups_of(trainer).every)
        in_forward, by_optimizer, (micro_batches, of_lookups), (read, different) = sums.view(4, 2).tolist()
        if read:
            self.lookups = of_lookups / micro_batches, different / read
        steps = max(1, (self._last_step - self._first_step) * self.mesh.world_size)
        self.per_token_and_layer = _traffic(in_forward, max(1, self._tokens))
        self.per_rank_and_step = _traffic(by_optimizer, steps)


def _traffic(sums: list[int], count: int) -> Traffic:
    """The mean, of bytes within nodes and between them."""
    return Traffic(intra_node=sums[0] / count, inter_node=sums[1] / count)


# -- times the nodes of the regions' graphs: computes what the graph computes, node by node -------------------------
#
# Algorithm:
#   1. While installed, a region's forward interprets its graph. A node's time goes to a part: router, experts, shared
#      experts; exchanges before and after the experts; copies and sums of rows; the rest.
#   2. Before the first exchange of a layer, and before the first one after its experts, the ranks of the EP group wait
#      for each other. The time of that is waiting, so that the exchanges themselves do not include it.
#   3. What backward computes again is neither timed nor waited for: a region that is wrapped for that is timed within
#      the wrapper, which stays.

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
        self._before: list[tuple[Any, Any]] = []  # while installed: what has a forward, and its own before
        self._regions = {
            path: region
            for path, region in model.named_modules()
            if isinstance(region, fx.GraphModule) and _has_layer(region) and _plain_arguments(region)
        }

    def install(self) -> None:
        """The next forwards are timed."""
        self.remove()  # after a micro-batch without a loss
        for path, region in self._regions.items():
            times, holder = self.times.setdefault(path, Times()), holder_of_forward(region)
            self._before.append((holder, vars(holder).get("forward")))
            holder.forward = self._timed(region, holder.forward, times)

    def remove(self) -> None:
        """Forwards are as before."""
        for holder, own in self._before:
            if own is None:
                del holder.forward
            else:
                holder.forward = own
        self._before = []

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


# -- the last steps of a run ----------------------------------------------------------------------------------------

TIMED_STEPS, ROUTED_STEPS = 3, 8
LEAST_STEPS = 5
"""A shorter run is not measured: its steps are not yet like those of a longer one."""
MAX_TOKENS = 2**14
"""Tokens on all ranks whose routes are kept."""


class StepProfile(Callback):
    """Measures the last steps, see above.

    Args:
        plan: of the model. run_dir: where rank 0 writes. max_steps: of the run. meter: counts the bytes of all steps.
        routes: whether no other callback records or replays routes.
    """

    def __init__(self, plan: Plan, run_dir: Path, max_steps: int, meter: TrafficMeter, *, routes: bool) -> None:
        self.plan, self.run_dir, self.max_steps, self.meter, self.routes = plan, run_dir, max_steps, meter, routes
        self._layers: list[ReplayLayer] = []
        self._graphs: TimedGraphs | None = None
        self._stack = ExitStack()
        self._recorded: Routes | None = None
        self._ids: list[list[NDArray[np.int16]]] = []  # micro-batch -> layer -> (T, K)
        self._tokens: list[NDArray[np.int32]] = []
        self._phases: dict[str, list[float]] = {name: [] for name in ("forward", "backward", "rest", "step")}
        self._memory: dict[str, int] = {}
        self._kept: dict[int, Any] = {}
        self._untimed: list[float] = []
        self._clock = self._step_start = 0.0
        self._sums = [0.0, 0.0]
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds what can be measured."""
        strategy, model = _strategy(trainer), _model(pl_module)
        self._last_step = trainer.global_step
        if self.max_steps - trainer.global_step < LEAST_STEPS or not self.plan.layers:
            self.max_steps = 0  # nothing is measured
            return
        if self.plan.pipeline is not None:
            return
        if self.routes and not strategy.compile_regions:
            try:
                self._layers = replay_layers(model)
            except MoecompileError:  # they cannot be recorded
                self._layers = []
        if trainer.strategy.root_device.type == "cpu" and not strategy.compile_regions:
            group = strategy.device_mesh["ep"].get_group() if self.plan.mesh.ep > 1 else None
            self._graphs = TimedGraphs(model, group)

    def _left(self, trainer: Trainer) -> int:
        """Steps that are left, with the current one; 0: nothing is measured."""
        return max(0, self.max_steps - trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Steps 1 to 3 begin."""
        left = self._left(trainer)
        tokens = sum(map(len, self._tokens)) * self.plan.mesh.num_batches
        if self._layers and 0 < left <= ROUTED_STEPS and tokens < MAX_TOKENS:
            self._recorded = self._stack.enter_context(record_routes(_model(pl_module)))
        if self._graphs is not None and 0 < left <= TIMED_STEPS:
            self._graphs.install()
        is_in_turn = self.plan.pipeline is None and not _strategy(trainer).compile_regions
        if left == 1 and is_in_turn:  # hooks would compile the graphs again
            self._kept = {}
            self._stack.enter_context(saved_tensors_hooks(self._keep, lambda tensor: tensor))
        self._clock = time.perf_counter()
        if not any(self._sums):  # the first micro-batch of a step
            self._step_start = self._clock

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._kept[storage.data_ptr()] = storage
        return tensor

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The forward is over."""
        now = time.perf_counter()
        self._sums[0] += now - self._clock
        self._clock = now
        self._stack.close()
        if self._kept:  # weights that FSDP has gathered are empty again
            known = {
                t.untyped_storage().data_ptr() for t in (*pl_module.parameters(), *pl_module.buffers()) if _is_here(t)
            }
            kept = sum(storage.nbytes() for pointer, storage in self._kept.items() if pointer not in known)
            self._memory["activations"] = max(kept, self._memory.get("activations", 0))
            self._kept = {}
        if self._graphs is not None:
            self._graphs.remove()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The backward is over."""
        self._sums[1] += time.perf_counter() - self._clock

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Step 3: gradients."""
        if self._left(trainer) == 1:
            self._memory["grads"] = sum(grad.nbytes for _, grad in local_grads(pl_module.parameters()))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, _: int
    ) -> None:
        """Keeps the routes of the micro-batch, and the times of a step."""
        if self._recorded is not None:
            self._keep_routes(self._recorded, batch)
            self._recorded = None
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        now = time.perf_counter()
        seconds = now - self._step_start
        if self._graphs is not None and 0 <= self.max_steps - trainer.global_step < TIMED_STEPS:
            forward, backward = self._sums
            for name, value in zip(
                self._phases, (forward, backward, seconds - forward - backward, seconds), strict=True
            ):
                self._phases[name].append(value)
        else:
            self._untimed.append(seconds)
        self._sums = [0.0, 0.0]

    def _keep_routes(self, routes: Routes, batch: Mapping[str, Tensor]) -> None:
        """Those of a micro-batch in which every layer sees the tokens of `input_ids`."""
        tokens = batch["input_ids"].flatten()
        found = [routes.ids[layer.path][0].flatten(0, -2) for layer in self._layers if routes.ids[layer.path]]
        if len(found) == len(self._layers) and all(len(ids) == len(tokens) for ids in found):
            room = max(1, MAX_TOKENS // self.plan.mesh.num_batches - sum(map(len, self._tokens)))
            self._tokens.append(tokens[:room].cpu().numpy().astype(np.int32))
            self._ids.append([ids[:room].cpu().numpy().astype(np.int16) for ids in found])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step 4; all ranks call it."""
        self._stack.close()
        if not self.max_steps:
            return
        strategy, rank = _strategy(trainer), trainer.global_rank
        self._memory["weights"] = sum(map(_local_bytes, pl_module.parameters()))
        state = [v for optimizer in strategy.optimizers for values in optimizer.state.values() for v in values.values()]
        self._memory["optimizer"] = sum(
            _local_bytes(value) for value in state if isinstance(value, Tensor) and value.dim()
        )
        mine = {
            "memory": self._memory,
            "phases": {name: _median(values) for name, values in self._phases.items()},
            "times": {} if self._graphs is None else self._graphs.times,
            "traffic": self.meter.sent_per_step(rank),
            "untimed": _median(self._untimed[1:]),
            "tokens": self._tokens if self.plan.is_counted(rank) else [],
            "ids": self._ids,
        }
        everyone: list[Any] = [None] * trainer.world_size if rank == 0 else []
        dist.gather_object(mine, everyone if rank == 0 else None)
        if rank == 0:
            try:
                self._write(everyone)
            except Exception as error:  # the other ranks go on, and a report is no reason to leave them
                rank_zero_warn(f"{PROFILE} could not be written: {type(error).__name__}: {error}")

    def _write(self, ranks: list[dict[str, Any]]) -> None:
        plan, step = self.plan, _median([each["phases"]["step"] for each in ranks if each["phases"]["step"]])
        untimed = max(each["untimed"] for each in ranks)
        body: dict[str, Any] = {
            "step_seconds": untimed or step,
            "memory": {kind: [each["memory"].get(kind, 0) for each in ranks] for kind in self._memory},
            "traffic": [each["traffic"] for each in ranks],
        }
        paths = list(ranks[0]["times"])
        if paths and step:
            body |= {
                "timed_steps": list(range(self.max_steps - TIMED_STEPS + 1, self.max_steps + 1)),
                "cost": step / untimed - 1 if untimed else 0.0,
                "phases": {name: [each["phases"][name] for each in ranks] for name in self._phases},
                "layers": paths,
                "parts": {part: [[_part(each, path, part) for each in ranks] for path in paths] for part in PARTS},
                "rows": [[float(np.mean(each["times"][path].rows)) for each in ranks] for path in paths],
                "exchanges": self._exchanges(ranks[0]["times"]),
            }
        if any(each["tokens"] for each in ranks) and plan.mesh.num_nodes > 1:
            body["lower_bound"] = self._lower_bound(ranks)
        write_text(self.run_dir / PROFILE, json.dumps(body) + "\n")
        self._write_routes(ranks)

    def _exchanges(self, times: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Those of rank 0, with their logical axes, for every region with one planned layer."""
        found = []
        for layer in self.plan.layers:
            path = next((path for path in times if f".{path}".endswith(f".{layer.site.fqn}") and layer.site.fqn), None)
            steps = layer.scheduled_steps
            if path is not None and [op for op, _ in steps] == [row["op"] for row in times[path].exchanges]:
                rows = zip(times[path].exchanges, steps, strict=True)
                found += [{"layer": layer.site.fqn, **row, "axis": axis} for row, (_, axis) in rows]
        return found

    def _lower_bound(self, ranks: list[dict[str, Any]]) -> list[list[float]]:
        """(N, N) bytes of a step from node to node: a row to each other node with an expert, a sum back."""
        mesh, assumes = self.plan.mesh, self.plan.estimate and self.plan.estimate.assumes
        compute = assumes.number_bytes if assumes else 4
        bytes_, counted = np.zeros((mesh.num_nodes, mesh.num_nodes)), 0
        for rank, each in enumerate(ranks):
            counted += sum(map(len, each["tokens"]))
            for micro_batch in each["ids"] if each["tokens"] else []:
                for layer, ids in zip(self.plan.layers, micro_batch, strict=False):
                    first = rank // mesh.ep * mesh.ep
                    position = np.array(layer.placement.positions)[ids.clip(0, layer.placement.num_experts - 1)]
                    nodes = (first + position // layer.placement.experts_per_rank) // mesh.ranks_per_node
                    there, back = layer.dispatch.wire.row_bytes(layer.row_site.d_model, compute)
                    for node in range(mesh.num_nodes):
                        sent = (nodes == node) & (ids >= 0) & (ids < layer.placement.num_experts)
                        reach = int(sent.any(1).sum())
                        if node != mesh.node_of(rank):
                            bytes_[mesh.node_of(rank), node] += reach * there
                            bytes_[node, mesh.node_of(rank)] += reach * back
        per_step = assumes.tokens_per_rank * assumes.accumulation * mesh.num_batches if assumes else counted
        found: list[list[float]] = (bytes_ * per_step / max(1, counted)).tolist()
        return found

    def _write_routes(self, ranks: list[dict[str, Any]]) -> None:
        """tokens (T,), ids (T, L, K) with -1 for none, layers and their numbers of experts."""
        pairs = [
            (t, ids) for each in ranks if each["tokens"] for t, ids in zip(each["tokens"], each["ids"], strict=True)
        ]
        if not pairs:
            return
        width = max(layer.top_k for layer in self._layers)
        ids = [np.stack([np.pad(i, ((0, 0), (0, width - i.shape[1])), constant_values=-1) for i in each], 1)
               for _, each in pairs]  # fmt: skip
        with replacing(self.run_dir / ROUTES) as partial, partial.open("wb") as file:
            np.savez_compressed(
                file, tokens=np.concatenate([t for t, _ in pairs]), ids=np.concatenate(ids),
                layers=np.array([layer.path for layer in self._layers]),
                num_experts=np.array([layer.num_experts for layer in self._layers]),
            )  # fmt: skip


def _part(rank: Mapping[str, Any], path: str, part: str) -> float:
    return _median([seconds.get(part, 0.0) for seconds in rank["times"][path].seconds])


def _median(values: list[float]) -> float:
    return float(np.median(values)) if values else 0.0


def _is_here(tensor: Tensor) -> bool:
    return type(tensor).__name__ != "DTensor" and tensor.device.type != "meta"


def _local_bytes(tensor: Tensor) -> int:
    """Bytes of the part on this rank."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


def _model(module: LightningModule) -> nn.Module:
    assert isinstance(module, LanguageModule)
    return module.model


def _strategy(trainer: Trainer) -> ExpertParallelStrategy:
    assert isinstance(trainer.strategy, ExpertParallelStrategy)
    return trainer.strategy
