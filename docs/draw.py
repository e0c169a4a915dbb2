"""Draws the pictures of `understand/concepts.md`, from numbers that the package computes: `assets/concepts/*.svg`.

Plain SVG whose colours are those of the page, light or dark: the page includes the files' text.
`python docs/generate.py` writes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moecompile.mesh import MeshSpec
from moecompile.planner.placement import place_experts

BLUE, ORANGE, GREEN, VIOLET = "#4c6ef5", "#e8590c", "#2f9e44", "#9c36b5"
NODES = (BLUE, ORANGE)
TEXT = "var(--md-default-fg-color)"
FAINT, LINE = "var(--md-default-fg-color--lightest)", "var(--md-default-fg-color--light)"
TOKENS, EXPERTS, TOP_K = 8, 4, 2


@dataclass
class Picture:
    """An SVG under construction. label: what it shows, for those who cannot see it."""

    width: int
    height: int
    label: str
    parts: list[str] = field(default_factory=list)

    def box(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        fill: str,
        text: str = "",
        *,
        line: str = "none",
        ink: str = "#fff",
    ) -> None:
        place = f'x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="3"'
        self.parts.append(f'<rect {place} fill="{fill}" stroke="{line}" stroke-width="2"/>')
        if text:
            self.text(x + w / 2, y + h / 2 + 4, text, ink=ink, anchor="middle")

    def text(self, x: float, y: float, text: str, *, ink: str = TEXT, anchor: str = "start", size: int = 12) -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" fill="{ink}" text-anchor="{anchor}" font-size="{size}">{text}</text>'
        )

    def line(
        self, x1: float, y1: float, x2: float, y2: float, ink: str = LINE, *, arrow: bool = True, dashed: bool = False
    ) -> None:
        end = ' marker-end="url(#tip)"' if arrow else ""
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{ink}" stroke-width="1.5"{end}{dash}/>'
        )

    def svg(self) -> str:
        tip = (
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
            '<path d="M0 0L8 4L0 8z" fill="context-stroke"/></marker></defs>'
        )
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{self.label}" style="width:{self.width}px;max-width:100%;font-family:inherit">'
        )
        return "\n".join([head, tip, *self.parts, "</svg>", ""])


def routed() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(probabilities, chosen experts) of a softmax top-2 router for the tokens of these pictures."""
    logits = np.random.RandomState(3).randn(TOKENS, EXPERTS) + np.array([0.9, 0.0, 0.3, -0.6])
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return scores, np.argsort(-scores, axis=1, kind="stable")[:, :TOP_K]


def layer() -> Picture:
    """A dense FFN, and what takes its place."""
    p = Picture(640, 190, "A dense FFN becomes a router, experts, and a weighted sum")
    p.text(20, 20, "dense")
    p.box(20, 80, 60, 30, FAINT, "tokens", ink=TEXT)
    p.line(80, 95, 108, 95)
    p.box(110, 60, 70, 70, BLUE, "FFN")
    p.line(180, 95, 208, 95)
    p.text(250, 20, "mixture of experts")
    p.box(250, 80, 60, 30, FAINT, "tokens", ink=TEXT)
    p.line(310, 95, 338, 95)
    p.box(340, 80, 60, 30, VIOLET, "router")
    for i in range(EXPERTS):
        y, used = 34 + 36 * i, i in (0, 2)
        p.line(400, 95, 448, y + 14, LINE if used else FAINT, dashed=not used)
        p.box(450, y, 70, 28, BLUE if used else FAINT, f"expert {i}", ink="#fff" if used else TEXT)
        p.line(520, y + 14, 568, 95, LINE if used else FAINT, dashed=not used)
    p.box(570, 80, 50, 30, VIOLET, "sum")
    return p


def router() -> Picture:
    """Scores of every token for every expert; the chosen ones have a frame."""
    scores, chosen = routed()
    p = Picture(560, 250, "Scores of eight tokens for four experts; each token has chosen two")
    for e in range(EXPERTS):
        p.text(150 + 62 * e, 20, f"expert {e}", anchor="middle")
    for t in range(TOKENS):
        p.text(20, 46 + 26 * t, f"token {t}")
        for e in range(EXPERTS):
            taken = e in chosen[t]
            p.parts.append(
                f'<rect x="{122 + 62 * e}" y="{30 + 26 * t}" width="56" height="22" rx="3" fill="{BLUE}" '
                f'fill-opacity="{scores[t, e]:.2f}" stroke="{ORANGE if taken else "none"}" stroke-width="2"/>'
            )
            p.text(150 + 62 * e, 45 + 26 * t, f"{scores[t, e]:.2f}", anchor="middle", size=11)
        weights = scores[t, chosen[t]] / scores[t, chosen[t]].sum()
        told = " + ".join(f"{w:.2f} e{e}" for w, e in zip(weights, chosen[t], strict=True))
        p.text(385, 45 + 26 * t, f"= {told}", size=11)
    return p


def capacity() -> Picture:
    """Rows of each expert, and what a capacity would drop."""
    _, chosen = routed()
    rows, limit = np.bincount(chosen.ravel(), minlength=EXPERTS), TOKENS * TOP_K // EXPERTS
    p = Picture(560, 190, "Rows of each expert against a capacity of four")
    for e in range(EXPERTS):
        p.text(20, 40 + 34 * e, f"expert {e}")
        for i in range(rows[e]):
            kept = i < limit
            y = 24 + 34 * e
            if kept:
                p.box(90 + 34 * i, y, 30, 24, BLUE)
            else:
                p.box(90 + 34 * i, y, 30, 24, "none", "x", line=ORANGE, ink=ORANGE)
        p.text(100 + 34 * max(rows[e], limit), 40 + 34 * e, f"{rows[e]} rows", size=11)
    x = 90 + 34 * limit - 2
    p.line(x, 12, x, 160, ORANGE, arrow=False, dashed=True)
    told = f"capacity = 1.0 x {TOKENS} x {TOP_K} / {EXPERTS} = {limit}"
    p.text(x, 178, told, anchor="middle", size=11, ink=ORANGE)
    return p


def dispatch() -> Picture:
    """Rows on their way: two ranks with four tokens and two experts each."""
    _, chosen = routed()
    p = Picture(640, 300, "Tokens of two ranks travel to the ranks of their experts and back")
    heads = ((20, "tokens"), (250, "experts"), (540, "sums"))
    for x, text in heads:
        p.text(x, 18, text)
    p.text(120, 18, "dispatch: all-to-all", size=11, ink=LINE)
    p.text(400, 18, "combine: all-to-all", size=11, ink=LINE)
    y_of_token = [40 + 30 * t + (18 if t >= TOKENS // 2 else 0) for t in range(TOKENS)]
    y_of_expert = [52 + 60 * e + (18 if e >= EXPERTS // 2 else 0) for e in range(EXPERTS)]
    for t in range(TOKENS):
        for e in chosen[t]:
            away = t // (TOKENS // 2) != e // (EXPERTS // 2)
            ink = ORANGE if away else LINE
            p.line(80, y_of_token[t] + 11, 248, y_of_expert[e] + 20, ink, arrow=False)
            p.line(330, y_of_expert[e] + 20, 538, y_of_token[t] + 11, ink, arrow=False)
    for t in range(TOKENS):
        p.box(20, y_of_token[t], 60, 22, NODES[t // (TOKENS // 2)], f"token {t}")
        p.box(540, y_of_token[t], 60, 22, NODES[t // (TOKENS // 2)], f"token {t}")
    for e in range(EXPERTS):
        p.box(250, y_of_expert[e], 80, 40, NODES[e // (EXPERTS // 2)], f"expert {e}")
    p.line(10, 165, 636, 165, LINE, arrow=False, dashed=True)
    p.text(636, 158, "rank 0", anchor="end", size=11)
    p.text(636, 182, "rank 1", anchor="end", size=11)
    return p


def mesh() -> Picture:
    """The groups of one mesh: who shares experts, who has the same ones."""
    spec = MeshSpec(num_nodes=2, ranks_per_node=4, ep=4)
    p = Picture(640, 200, "Two nodes of four ranks: EP groups of four, and pairs that hold the same experts")
    for rank in range(spec.world_size):
        node, group, place = rank // spec.ranks_per_node, rank // spec.ep, rank % spec.ep
        x, y = 110 + 130 * place, 34 + 84 * node
        p.box(x, y, 110, 48, NODES[group])
        p.text(x + 55, y + 20, f"rank {rank}", ink="#fff", anchor="middle")
        p.text(x + 55, y + 38, f"experts {2 * place}, {2 * place + 1}", ink="#fff", anchor="middle")
    for node in range(spec.num_nodes):
        p.text(14, 62 + 84 * node, f"node {node}")
    for place in range(spec.ep):
        p.line(165 + 130 * place, 84, 165 + 130 * place, 116, GREEN, arrow=False)
    p.text(110, 20, "a row is an EP group: all-to-all, each expert once", size=11, ink=BLUE)
    p.text(
        110, 192, f"a column is an EDP group of {spec.edp}: the same experts, gradients are summed", size=11, ink=GREEN
    )
    return p


def nodes() -> Picture:
    """What crosses between nodes for one token with four experts."""
    p = Picture(640, 210, "One token with four experts: without a limit two nodes, with max_nodes=1 one")
    cases = (("no limit: two nodes", (1, 3, 5, 6)), ("max_nodes=1: one node", (4, 5, 6, 7)))
    for half, (title, reached) in enumerate(cases):
        x = 20 + 320 * half
        p.text(x, 18, title)
        p.box(x, 90, 50, 26, VIOLET, "token")
        for e in range(8):
            y = 30 + 21 * e + (8 if e >= 4 else 0)
            used = e in reached
            if used:
                p.line(x + 50, 103, x + 168, y + 9, NODES[e // 4], arrow=False)
            p.box(x + 170, y, 70, 18, NODES[e // 4] if used else FAINT, f"expert {e}", ink="#fff" if used else TEXT)
        p.text(x + 250, 76, "node 0", size=11)
        p.text(x + 250, 168, "node 1", size=11)
    return p


def overlap() -> Picture:
    """A layer on two streams, whole and in two chunks."""
    p = Picture(640, 190, "Whole, experts wait for the exchange; in two chunks both are at work")
    unit = 44.0
    for row, chunks in enumerate((1, 2)):
        y, size = 34 + 80 * row, 3 / chunks
        p.text(14, y + 16, "links")
        p.text(14, y + 42, "experts")
        links = experts = 0.0
        ready = []
        for c in range(chunks):
            p.box(90 + unit * links, y, unit * size - 3, 22, ORANGE, f"dispatch {c}" if chunks > 1 else "dispatch")
            links += size
            ready.append(links)
        for c in range(chunks):
            experts = max(experts, ready[c])
            p.box(90 + unit * experts, y + 26, unit * size - 3, 22, BLUE, f"chunk {c}" if chunks > 1 else "experts")
            experts += size
            links = max(links, experts)
            p.box(90 + unit * links, y, unit * size - 3, 22, GREEN, f"combine {c}" if chunks > 1 else "combine")
            links += size
        p.line(90 + unit * links, y - 6, 90 + unit * links, y + 54, LINE, arrow=False, dashed=True)
    return p


Part = tuple[str, float, bool]
"""An expert, its rows on a rank, whether it is lent."""


def _fullest(held: list[list[Part]]) -> str:
    return f"fullest rank {max(sum(rows for _, rows, _ in rank) for rank in held):.0f} rows"


def _bars(p: Picture, x: float, title: str, held: list[list[Part]], scale: float) -> None:
    """Experts stacked on ranks, and the mean."""
    p.text(x, 18, title)
    mean = sum(rows for rank in held for _, rows, _ in rank) / len(held)
    for r, rank in enumerate(held):
        y = 180.0
        for name, rows, is_lent in rank:
            y -= rows * scale
            p.box(x + 66 * r, y, 56, rows * scale - 2, VIOLET if is_lent else BLUE, name if rows * scale > 14 else "")
        p.text(x + 28 + 66 * r, 196, f"rank {r}", anchor="middle", size=11)
    p.line(x - 6, 180 - mean * scale, x + 66 * len(held), 180 - mean * scale, LINE, arrow=False, dashed=True)


LOADS = (30.0, 26.0, 6.0, 8.0, 10.0, 4.0, 12.0, 4.0)


def placement() -> Picture:
    """Rows of each rank with experts in the order of their ids, and placed by the planner."""
    p = Picture(640, 204, "Rows of four ranks with experts by id and placed: the fullest rank has 56 rows, then 34")
    placed = place_experts(LOADS, 4)
    for x, title, order in ((20, "by id", range(8)), (350, "placed", placed)):
        ids = list(order)
        held = [[(f"e{e}", LOADS[e], False) for e in ids[2 * r : 2 * r + 2]] for r in range(4)]
        _bars(p, x, f"{title}: {_fullest(held)}", held, 2.7)
    return p


def lending() -> Picture:
    """Rows of each rank in one micro-batch, without and with loans."""
    import torch

    from moecompile.ops.lending import assign

    p = Picture(640, 204, "Rows of four ranks without loans and with them")
    counts = torch.tensor([[round(rows / 4) for rows in LOADS]] * 4)
    slots, rows, _ = assign(counts, 2, 1, 1, 1)
    left = [float(total) for total in counts.sum(0).tolist()]
    home = [[(f"e{e}", left[e], False) for e in (2 * r, 2 * r + 1)] for r in range(4)]
    lent: list[list[Part]] = [[] for _ in range(4)]
    for r in range(4):
        for expert, many in zip(slots[r].tolist(), rows[r].tolist(), strict=True):
            if many > 0:
                lent[r].append((f"e{expert}", float(many), True))
                left[expert] -= many
    after = [[(f"e{e}", left[e], False) for e in (2 * r, 2 * r + 1)] + lent[r] for r in range(4)]
    for x, title, held in ((20, "each expert on its rank", home), (350, "lent", after)):
        _bars(p, x, f"{title}: {_fullest(held)}", held, 2.7)
    return p


PICTURES = (layer, router, capacity, dispatch, mesh, nodes, overlap, placement, lending)


def draw(folder: Path) -> None:
    """Writes every picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:
        (folder / f"{picture.__name__}.svg").write_text(picture().svg(), encoding="utf-8")
