"""task=verify: shrinks a config and starts the ranks that compare it (moecompile.tasks.ranks.verify).

Widths and lengths shrink so that it takes seconds. The structure stays, which determines what can go wrong: experts,
top-k, groups, scores, balance, dispatch, the axes of the mesh. Every change is returned as a line to print.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path

from moecompile.compose import RESOLVED, save_resolved
from moecompile.errors import VerificationFailed
from moecompile.mesh import Part
from moecompile.rundir import output_dir
from moecompile.schema import (
    Bf16Weights,
    Config,
    DataKind,
    ModelAttention,
    ModelDevice,
    MuonPrecision,
    StateKind,
    accumulation_steps,
    mesh_spec,
)
from moecompile.stages import schedule_of
from moecompile.tasks.launched import start_ranks

CERTIFICATE = "certificate.json"
MAX_RANKS = 8
_SEQ_LEN, _SEQUENCES, _ACCUMULATION = 32, 2, 2
_CHAT_LEN = 256  # a template and a prompt come before the first target
_EPS = 1e-5
_NO_CLIPPING = 1e30
_NARROW = 256  # a model up to this width is not changed
_SLICE = 16
# Keys of transformers configs -> largest value. Powers of two, so that heads divide widths.
_LIMITS = {
    "vocab_size": 512, "num_hidden_layers": 4, "num_layers": 4, "num_decoder_layers": 4, "first_k_dense_replace": 1,
    "hidden_size": 64, "d_model": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "num_attention_heads": 4, "num_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "d_kv": 16,
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "sliding_window": 16, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2,
}  # fmt: skip
_PLACED = ("mesh.ep:", *(f"model.config.{name}:" for name in _LIMITS if "layers" in name))
_FFN_WIDTHS = ("intermediate_size", "d_ff", "ffn_dim", "n_inner")


def run(config: Config, run_dir: Path) -> None:
    """Prints what was shrunk and runs the ranks.

    Raises:
        VerificationFailed: a check failed.
    """
    small, notes = shrink(config, config.verify.steps)
    save_resolved(small, output_dir(run_dir) / RESOLVED)
    for note in notes:
        print(f"shrunk  {note}", flush=True)
    start_ranks(small, run_dir)
    certificate = json.loads((run_dir / CERTIFICATE).read_text(encoding="utf-8"))
    failed = [check for check in certificate["checks"] if not check["passed"]]
    if failed:
        raise VerificationFailed(config.name, [check["name"] for check in failed])


@dataclass
class _Shrinking:
    config: Config
    notes: list[str] = field(default_factory=list)

    def limit(self, group: object, path: str, name: str, value: object, why: str) -> None:
        """Sets a value and notes the change, if it differs."""
        old = getattr(group, name)
        if old != value:
            setattr(group, name, value)
            before, now = (getattr(each, "value", each) for each in (old, value))
            self.notes.append(f"{path}.{name}: {before} -> {now}, {why}")


def shrink(config: Config, steps: int) -> tuple[Config, list[str]]:
    """A copy of `config` that runs `steps` optimizer steps in seconds, and one line for each change."""
    work = _Shrinking(copy.deepcopy(config))
    _shrink_mesh(work)
    _shrink_model(work)
    _shrink_run(work, steps)
    if any(note.startswith(_PLACED) for note in work.notes):
        work.limit(work.config.mesh, "mesh", "placement", None, "it is for the mesh and the layers before")
    return work.config, work.notes


def _shrink_mesh(work: _Shrinking) -> None:
    mesh = work.config.mesh
    spec = mesh_spec(mesh)
    work.limit(mesh, "mesh", "device", "cpu", "verification compares processes on a CPU")
    if spec.world_size <= MAX_RANKS:
        return
    why = f"{spec.world_size} ranks are more than {MAX_RANKS} processes of one machine"
    nodes = min(2, spec.num_nodes)
    ranks = 2 if nodes > 1 or spec.ranks_per_node < 4 else 4
    of_stage = nodes * ranks // min(spec.pp, ranks)
    all_of_stage = spec.ep == spec.ranks_per_stage or spec.nodes_per_ep_group > 1
    ep = of_stage if all_of_stage else min(spec.ep, ranks, of_stage)
    for name, value in (
        ("num_nodes", nodes),
        ("ranks_per_node", ranks),
        ("ep", ep),
        ("dp_replicate", 1),
        *((axis, min(spec.size(axis), ranks)) for axis in spec.sharing),
    ):
        work.limit(mesh, "mesh", name, value, why)
    work.limit(mesh, "mesh", "dp_shard", "auto", why)
    routing = work.config.routing
    if routing.max_nodes is not None and routing.groups == "auto" and routing.max_nodes > nodes:
        work.limit(routing, "routing", "max_nodes", nodes, "the EP group spans no more nodes")


def _shrink_model(work: _Shrinking) -> None:
    config = work.config
    model = config.model
    if model.attention.is_on_a_gpu:
        work.limit(model, "model", "attention", ModelAttention.auto, "verification runs on CPUs")
    widths = [model.config.get(name, 0) for name in ("hidden_size", "d_model")]
    if model.architecture is None or (model.device is ModelDevice.cpu and max(widths) <= _NARROW):
        return
    work.limit(model, "model", "device", ModelDevice.cpu, "verification needs values")
    why = "narrow enough for seconds"
    heads = {model.config.get(name) for name in ("num_attention_heads", "num_key_value_heads")}
    as_many = {"num_key_value_heads": _LIMITS["num_attention_heads"]} if len(heads) == 1 else {}  # latent attention
    most_split = mesh_spec(config.mesh).size(Part.HEADS)
    stages = config.mesh.pp * schedule_of(config.pipeline.schedule, config.pipeline.stages_per_rank)[1]
    layers_too = {name: max(most, stages) for name, most in _LIMITS.items() if name.endswith("_layers")}
    for name, most in {**_LIMITS, **layers_too, **as_many}.items():
        most = max(most, most_split) if name.startswith("num_") and name.endswith("_heads") else most  # it divides them
        old = model.config.get(name)
        if isinstance(old, int) and old > most:
            model.config[name] = most
            work.notes.append(f"model.config.{name}: {old} -> {most}, {why}")
    hidden = max(model.config.get(name, 0) for name in ("hidden_size", "d_model"))
    if config.experts.latent_size is not None and config.experts.latent_size > hidden > 0:
        work.limit(config.experts, "experts", "latent_size", hidden // 2, "narrower than the model")
    width = _SLICE * max(config.experts.granularity, 2)
    for name in _FFN_WIDTHS:
        old = model.config.get(name)
        if isinstance(old, int) and old > width:
            model.config[name] = width
            work.notes.append(f"model.config.{name}: {old} -> {width}, {why}")
    layers = model.config.get("num_hidden_layers", 4)
    for name, value in model.config.items():
        if name.endswith("layer_types") and isinstance(value, list) and len(value) > layers:
            model.config[name] = value[:layers]
            work.notes.append(f"model.config.{name}: the first {layers} entries")


def _shrink_run(work: _Shrinking, steps: int) -> None:
    config, data = work.config, work.config.data
    why = "seconds, not minutes"
    longest = _CHAT_LEN if data.kind is DataKind.sft else _SEQ_LEN
    work.limit(data, "data", "seq_len", min(data.seq_len, longest), why)
    work.limit(data, "data", "micro_batch_size", min(data.micro_batch_size, _SEQUENCES), why)
    batches = mesh_spec(config.mesh).num_batches
    accumulation = max(_ACCUMULATION, 2 * mesh_spec(config.mesh).pp)
    work.limit(data, "data", "global_batch_size", data.micro_batch_size * batches * accumulation, why)
    vocab = config.model.config.get("vocab_size")
    if isinstance(vocab, int) and data.vocab_size is not None and vocab < data.vocab_size:
        work.limit(data, "data", "vocab_size", vocab, "as the model's")
    assert accumulation_steps(config, mesh_spec(config.mesh)) == accumulation
    work.limit(config.trainer, "trainer", "max_steps", steps, why)
    config.given = [*config.given, "trainer.max_steps"]  # so that the warm-up is kept, as when a caller shortens a run
    work.limit(
        config.optimizer, "optimizer", "eps", max(config.optimizer.eps, _EPS),
        "Adam would turn rounding errors of tiny gradients into full steps",
    )  # fmt: skip
    work.limit(
        config.optimizer.muon, "optimizer.muon", "precision", MuonPrecision.fp32,
        "bf16 would hide what differs",
    )  # fmt: skip
    for name, value in (("state", StateKind.auto), ("bf16_weights", Bf16Weights.nearest)):
        work.limit(config.optimizer, "optimizer", name, value, "rounding would hide what differs")
    if config.optimizer.clip_norm is None:
        work.limit(config.optimizer, "optimizer", "clip_norm", _NO_CLIPPING, "the norm is known where it may clip")
    if config.routing.replay is not None:
        work.limit(config.routing, "routing", "replay", "record", "what is replayed is drawn, on both sides the same")
    # These do not affect what is verified, so they are not noted.
    trainer = config.trainer
    trainer.loggers = []
    trainer.log_interval, trainer.val_interval, trainer.progress_bar, trainer.save_checkpoint = 1, steps, False, False
    data.val_batches, data.epochs = 1, None
