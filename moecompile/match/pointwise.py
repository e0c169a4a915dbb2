"""Which operations are pointwise: they map each entry independently, so they can run on rows in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx, nn

# Names of torch functions and methods; names from the model play no role.
ACTIVATIONS = frozenset(
    (
        *("celu", "elu", "erf", "exp", "expm1", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu"),
        *(
            "log_sigmoid",
            "logsigmoid",
            "mish",
            "pow",
            "relu",
            "relu6",
            "rrelu",
            "selu",
            "sigmoid",
            "silu",
            "softplus",
            "softsign",
        ),
        *("square", "tanh", "tanhshrink"),
    )
)
ARITHMETIC = frozenset(
    (
        *("add", "sub", "rsub", "mul", "div", "truediv", "neg", "abs", "clamp", "clip", "minimum", "maximum"),
        *("dropout", "alpha_dropout", "float", "half", "bfloat16", "double", "to", "type_as", "contiguous"),
        *("sqrt", "rsqrt", "reciprocal", "where", "gt", "ge", "lt", "le"),
    )
)
_MODULES: dict[type[nn.Module], str] = {
    nn.CELU: "celu", nn.ELU: "elu", nn.GELU: "gelu", nn.Hardsigmoid: "hardsigmoid", nn.Hardswish: "hardswish",
    nn.Hardtanh: "hardtanh", nn.LeakyReLU: "leaky_relu", nn.LogSigmoid: "logsigmoid", nn.Mish: "mish",
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SELU: "selu", nn.Sigmoid: "sigmoid", nn.SiLU: "silu",
    nn.Softplus: "softplus", nn.Softsign: "softsign", nn.Tanh: "tanh", nn.Dropout: "dropout", nn.Identity: "contiguous",
    nn.LayerNorm: "layer_norm", nn.RMSNorm: "rms_norm", nn.Softmax: "softmax",
}  # fmt: skip

GetModule = Callable[[str], nn.Module]


def torch_name(node: fx.Node, module: GetModule) -> str:
    """The torch name of a node's op, without the underscores of dunder and in-place methods."""
    if node.op == "call_module":
        return _MODULES.get(type(module(str(node.target))), "")
    if node.target is getattr:
        return str(node.args[1])
    if getattr(node.target, "__name__", "") == "__get__":  # how a recorded forward reads a property of a tensor
        return str(getattr(getattr(node.target, "__self__", None), "__name__", ""))
    if node.op in ("call_function", "call_method"):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        return name.strip("_")
    return ""


def is_pointwise(node: fx.Node, module: GetModule) -> bool:
    """Whether the node maps each entry independently, or reads the dtype of a value."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] == "dtype"
    name = torch_name(node, module)
    if name in ("min", "max"):  # with one argument it is a reduction
        return len(node.args) == 2 and isinstance(node.args[1], fx.Node)
    return name in ACTIVATIONS or name in ARITHMETIC


def is_activation(node: fx.Node, module: GetModule) -> bool:
    """Whether the node is a nonlinear function of one value, or multiplies a value by itself."""
    name = torch_name(node, module)
    return name in ACTIVATIONS or (
        name == "mul" and len(node.all_input_nodes) == 1 and len(node.args) == 2 and node.args[0] is node.args[1]
    )


def is_norm(node: fx.Node, module: GetModule) -> bool:
    """Whether the node is a norm or part of one: it maps each token independently, but needs all entries of it."""
    name = torch_name(node, module)
    if name == "mean":
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return dims in (-1, (-1,)) and bool(node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False))
    return name in ("layer_norm", "rms_norm")


def is_activation_beside_norms(node: fx.Node, module: GetModule) -> bool:
    """Whether the node is an activation where there are norms, whose own squares and roots are not activations."""
    return is_activation(node, module) and torch_name(node, module) not in ("pow", "square", "mul", "rsqrt")


def describe(nodes: Iterable[fx.Node]) -> str:
    """Names of the operations without repeats: `silu, mul`."""
    names = (str(getattr(n.target, "__name__", n.target)).rsplit(".", 1)[-1].strip("_") for n in nodes)
    return ", ".join(dict.fromkeys(names))
