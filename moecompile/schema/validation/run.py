"""Rules of `data`, `optimizer` and `trainer`."""

from __future__ import annotations

from moecompile.errors import ConfigError
from moecompile.mesh import MeshSpec
from moecompile.ranges import Real
from moecompile.schema.config import Config
from moecompile.schema.enums import DataKind, Objective, TaskName, TokenizerSource

_ONLY_FOR = {
    "data.text_field": (DataKind.corpus,),
    "data.layout": (DataKind.sft,),
    "data.cache": (DataKind.corpus, DataKind.sft),
    "data.corpus": (DataKind.text,),
}
"""Keys that only some kinds of data read."""
_GROUPS = {DataKind.text: "moby_dick", DataKind.corpus: "corpus", DataKind.sft: "sft"}
_BETA = Real("[0, 1)", "Use [0.9, 0.95]")


def check_data(config: Config, mesh: MeshSpec) -> None:
    """Checks that the tokenizer fits the model, and the batch fits the mesh.

    Raises:
        ConfigError: the first rule that is broken.
    """
    _check_kind(config)
    _check_tokenizer(config)
    if config.task.name in (TaskName.train, TaskName.verify, TaskName.bench):
        accumulation_steps(config, mesh)


def _check_kind(config: Config) -> None:
    data = config.data
    for key, kinds in _ONLY_FOR.items():
        if key in config.given and data.kind not in kinds:
            value = getattr(data, key.removeprefix("data."))
            raise ConfigError(
                key, getattr(value, "value", value), f"data.kind={data.kind.value} does not read it",
                f"Leave it out, or use {' or '.join(f'data={_GROUPS[kind]}' for kind in kinds)}",
            )  # fmt: skip
    if data.kind is DataKind.text:
        return
    if data.path is None and config.task.name in (TaskName.train, TaskName.verify, TaskName.bench):
        raise ConfigError(
            "data.path", None, f"data.kind={data.kind.value} needs files", "Give a file, a folder or a pattern"
        )
    if data.kind is DataKind.sft and data.tokenizer is not TokenizerSource.model:
        raise ConfigError(
            "data.tokenizer",
            data.tokenizer.value,
            "chats need the chat template beside a pretrained model",
            "Use model",
        )
    if data.kind is DataKind.sft and data.objective is not Objective.causal:
        raise ConfigError(
            "data.objective", data.objective.value, "chats are learned token by token", "Use data.objective=causal"
        )


def _check_tokenizer(config: Config) -> None:
    data, model = config.data, config.model
    if data.tokenizer is TokenizerSource.train:
        if data.vocab_size is None:
            raise ConfigError(
                "data.vocab_size", None, "data.tokenizer=train needs a size", "Give a number, such as 2048"
            )
        return
    if not (model.pretrained or model.package):
        raise ConfigError(
            "data.tokenizer", "model", f"the model {model.name} is not pretrained, so it has no tokenizer",
            "Use data=moby_dick, or model.pretrained or model.package",
        )  # fmt: skip
    if data.vocab_size is not None:
        raise ConfigError("data.vocab_size", data.vocab_size, "data.tokenizer=model has a fixed vocabulary", "Use null")


def accumulation_steps(config: Config, mesh: MeshSpec) -> int:
    """Micro-batches per rank and optimizer step; ranks of one TP or CP group share them.

    Raises:
        ConfigError: the global batch is not a whole number of micro-batches on every rank.
    """
    data, world = config.data, mesh.num_batches
    ranks = " / ".join(("ranks", *mesh.sharing))
    per_step = data.micro_batch_size * world
    if data.global_batch_size % per_step:
        up = (data.global_batch_size // per_step + 1) * per_step
        raise ConfigError(
            "data.global_batch_size", data.global_batch_size,
            f"must be a multiple of data.micro_batch_size * {ranks} = {data.micro_batch_size} * {world} = {per_step}",
            f"Use {up}, or a micro_batch_size that divides {data.global_batch_size} / {world}",
        )  # fmt: skip
    return data.global_batch_size // per_step


def check_schedule(config: Config) -> None:
    """Checks the rules of `optimizer` beyond the ranges of its numbers.

    Raises:
        ConfigError: the first rule that is broken.
    """
    optimizer, max_steps = config.optimizer, config.trainer.max_steps
    if len(optimizer.betas) != 2:
        raise ConfigError("optimizer.betas", optimizer.betas, "must be two numbers", "Use [0.9, 0.95]")
    for i, beta in enumerate(optimizer.betas):
        _BETA.check(f"optimizer.betas[{i}]", beta)
    # A run that the caller shortens keeps the recipe's warm-up, and may end before it does.
    shortened = "trainer.max_steps" in config.given and "optimizer.warmup_steps" not in config.given
    if optimizer.warmup_steps > max_steps and not shortened:
        raise ConfigError(
            "optimizer.warmup_steps", optimizer.warmup_steps,
            f"the run ends after trainer.max_steps={max_steps}, before optimizer.lr is reached",
            f"Use at most {max_steps}, or raise trainer.max_steps",
        )  # fmt: skip
