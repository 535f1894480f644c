"""Random walks on a small directed graph, and the shortest way to the goal: trlx's task (CarperAI, randomwalks).

A random graph of `nodes` nodes, each a letter, has an edge between two nodes with probability `edge`; every node has a
way out, and node 0, the goal, is left no more. A training text is one random walk from any other node, at most
`longest` nodes long, which ends at the goal if it comes there. A prompt is a first node. The score of a walk is its
optimality as trlx defines it:

    (longest - n) / (longest - n_shortest)

where n counts the nodes up to and with the goal, both ends included, and is `longest` for a walk that takes an edge
that is not there, leaves the nodes, or does not come to the goal. So 1 is a shortest path and 0 a failure. Other than
in trlx, a graph from some of whose nodes no walk can come to the goal is drawn again: optimality is then defined for
every node. What is learned is one graph: its held-out prompts are the training prompts.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from jaxlm.config import UserError
from jaxlm.data.tasks.prompt import Prompt, Split

VERSION = 1  # of what is written
GOAL = 0


@dataclasses.dataclass(frozen=True)
class Walks:
    name: str = "walks"
    weight: float = 1.0
    nodes: int = 21
    edge: float = 0.1
    longest: int = 10  # nodes of a walk
    count: int = 1000  # walks to read
    seed: int = 1002  # trlx's graph


@functools.lru_cache(maxsize=16)
def graph(cfg: Walks) -> tuple[np.ndarray, np.ndarray]:
    """(bool [nodes, nodes]: an edge from row to column; int [nodes]: nodes of the shortest path to the goal)."""
    if not 2 <= cfg.nodes <= 26 or not 0 < cfg.edge < 1 or cfg.longest < 2 or cfg.count < 1:
        raise UserError(f"walks: 2 to 26 nodes, an edge probability between 0 and 1, longest >= 2, count >= 1: {cfg}")
    rng = np.random.RandomState(cfg.seed)  # as trlx draws it, so that its seed gives its graph
    for _ in range(10_000):
        edges = rng.rand(cfg.nodes, cfg.nodes) > 1 - cfg.edge
        np.fill_diagonal(edges, False)
        leaves = edges.any(axis=1).all()
        edges[GOAL] = False
        shortest = _distances(edges)
        if leaves and shortest.max() < cfg.longest:
            return edges, shortest
    raise UserError(
        f"walks: no graph of {cfg.nodes} nodes with edge probability {cfg.edge} leads to the goal; raise it"
    )


def _distances(edges: np.ndarray) -> np.ndarray:
    """Nodes of the shortest path from each node to the goal, both included; more than there are nodes without one."""
    distance = np.full(len(edges), len(edges) + 1)
    distance[GOAL] = 1
    for n in range(2, len(edges) + 1):
        nearer = edges[:, distance == n - 1].any(axis=1)
        distance[nearer & (distance > n)] = n
    return distance


def letter(node: int) -> str:
    return chr(ord("a") + node)


def walk(cfg: Walks, index: int) -> str:
    """Random walk `index`."""
    edges, _ = graph(cfg)
    rng = np.random.default_rng([cfg.seed, index])
    nodes = [int(rng.integers(1, cfg.nodes))]
    while len(nodes) < cfg.longest and nodes[-1] != GOAL:
        nodes.append(int(rng.choice(np.flatnonzero(edges[nodes[-1]]))))
    return "".join(map(letter, nodes))


def optimality(cfg: Walks, text: str) -> float:
    """The score of a walk, from its first node on. `UserError` where that is none, or the goal."""
    edges, shortest = graph(cfg)
    nodes = [ord(c) - ord("a") for c in text]
    if not nodes or not GOAL < nodes[0] < cfg.nodes:
        raise UserError(f"a walk begins at a node other than the goal, got {text[:20]!r}")
    n = cfg.longest
    for i in range(1, len(nodes)):
        if not 0 <= nodes[i] < cfg.nodes or not edges[nodes[i - 1], nodes[i]]:
            break
        if nodes[i] == GOAL:
            n = min(i + 1, cfg.longest)
            break
    return float(cfg.longest - n) / float(cfg.longest - shortest[nodes[0]])


# ------------------------------------------------------------------------------------------------------- as a task
def size(cfg: Walks, split: Split) -> int:
    return cfg.nodes - 1


def prompt(cfg: Walks, split: Split, index: int, tools: tuple[str, ...] = ()) -> Prompt:
    return Prompt(letter(1 + index), {}, f"{split}/{index}")


def texts(cfg: Walks) -> Iterator[tuple[str, str]]:
    """(id, text) of what is read before the reinforcement learning."""
    return ((f"train/{i}", walk(cfg, i)) for i in range(cfg.count))
