"""A router score, a pass that limits the output of every MoE layer, and a reader of files: `plugins=[my_plugin.py]`."""

import mailbox

import torch
from torch import fx
from torch.nn import functional as F

import moecompile
from moecompile.errors import PassError


class ClampRows:
    """unflatten_tokens -> clamp"""

    name = "clamp_rows"
    detail = "outputs in [-1, 1]"

    def requires(self, region, layers):
        pass

    def run(self, region, layers):
        graph = fx.Graph()
        graph.output(graph.graph_copy(region.graph.graph, {}))
        for node in graph.find_nodes(op="call_function", target=torch.ops.moecompile.unflatten_tokens):
            with graph.inserting_after(node):
                clamped = graph.call_function(torch.clamp, (node, -1.0, 1.0))
            node.replace_all_uses_with(clamped, lambda user, own=clamped: user is not own)
        return region.with_graph(fx.GraphModule(region.graph, graph))

    def ensures(self, before, after, layers):
        found = len(after.graph.graph.find_nodes(op="call_function", target=torch.clamp))
        if found != len(layers):
            raise PassError(self.name, layers[0].site.fqn, f"{found} clamps for {len(layers)} layers")


def read_mbox(path):
    """Mails as records with one field."""
    for number, mail in enumerate(mailbox.mbox(path, create=False)):
        if not mail.is_multipart():
            yield {"text": mail.get_payload(), "number": number}


moecompile.register_score("softplus", F.softplus)
moecompile.register_reader(".mbox", read_mbox)
moecompile.register_pass(ClampRows(), after="rewrite")
