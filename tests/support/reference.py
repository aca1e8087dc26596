"""What the package must agree with, written naively from the definitions, importing nothing of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T * scale + bias) in float64, one row at a time, over the keys the mask leaves open."""
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    bias = torch.zeros(batch, heads, queries, keys) if bias is None else bias.expand(batch, heads, queries, keys)
    open_keys = torch.ones(batch, heads, queries, keys, dtype=torch.bool) if mask is None else mask.expand_as(bias)
    out = torch.zeros(batch, heads, queries, keys, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                score = (k[b, h].double() @ q[b, h, i].double()) * scale + bias[b, h, i].double()
                weight = torch.where(open_keys[b, h, i], (score - score.max()).exp(), 0.0)
                out[b, h, i] = weight / weight.sum() if weight.sum() > 0 else 0.0
    return out


def rollout(maps: list[Tensor], residual: float = 0.5) -> Tensor:
    """Abnar and Zuidema 2020, equations 1 and 2, image by image in float64; maps are (batch, heads, tokens, tokens)."""
    images = []
    for b in range(len(maps[0])):
        joint = torch.eye(maps[0].shape[-1], dtype=torch.float64)
        for attention in maps:
            mean = attention[b].double().mean(0)
            joint = ((1 - residual) * mean + residual * torch.eye(len(mean), dtype=torch.float64)) @ joint
        images.append(joint)
    return torch.stack(images)


def positive_contributions(attention: Tensor, gradient: Tensor) -> Tensor:
    """Chefer, Gur and Wolf 2021 (bi-modal), equation 5, of one image: (heads, tokens, tokens) each, entry by entry."""
    heads, tokens, _ = attention.shape
    out = torch.zeros(tokens, tokens, dtype=torch.float64)
    for h in range(heads):
        for i in range(tokens):
            for j in range(tokens):
                out[i, j] += max(0.0, float(gradient[h, i, j]) * float(attention[h, i, j])) / heads
    return out


def relevance(maps: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """The same, equations 5 and 6, image by image in float64."""
    images = []
    for b in range(len(maps[0])):
        relevant = torch.eye(maps[0].shape[-1], dtype=torch.float64)
        for attention, gradient in zip(maps, gradients):
            relevant = relevant + positive_contributions(attention[b], gradient[b]) @ relevant
        images.append(relevant)
    return torch.stack(images)


def grad_rollout(maps: list[Tensor], gradients: list[Tensor], residual: float) -> Tensor:
    """Rollout of positive contributions, each row divided by its sum, image by image in float64."""
    images = []
    for b in range(len(maps[0])):
        joint = torch.eye(maps[0].shape[-1], dtype=torch.float64)
        for attention, gradient in zip(maps, gradients):
            layer = positive_contributions(attention[b], gradient[b])
            for i in range(len(layer)):
                total = layer[i].sum()
                layer[i] = layer[i] / total if total > 0 else torch.eye(len(layer), dtype=torch.float64)[i]
            joint = ((1 - residual) * layer + residual * torch.eye(len(layer), dtype=torch.float64)) @ joint
        images.append(joint)
    return torch.stack(images)


def entropy(attention: Tensor) -> Tensor:
    """-sum_k p log p of each row of (batch, heads, queries, keys), number by number, 0 log 0 = 0."""
    rows = [sum(-p * math.log(p) for p in row if p > 0) for row in attention.flatten(0, 2).tolist()]
    return torch.tensor(rows, dtype=torch.float64).reshape(attention.shape[:3])


def divergence(p: list[float], q: list[float]) -> float:
    """Jensen-Shannon divergence of two rows in nats, by the two Kullback-Leibler divergences from their mean, 0 log 0 = 0."""
    pairs = [(a, b, (a + b) / 2) for a, b in zip(p, q)]
    return sum((a * math.log(a / mean) if a else 0.0) + (b * math.log(b / mean) if b else 0.0) for a, b, mean in pairs) / 2


def divergences(heads: list[Tensor]) -> Tensor:
    """(heads, heads), mean over the rows of (batch, queries, keys) of each."""
    rows = [head.double().flatten(0, 1).tolist() for head in heads]
    of = [[sum(map(divergence, ours, theirs)) / len(ours) for theirs in rows] for ours in rows]
    return torch.tensor(of, dtype=torch.float64)


def received(attention: Tensor) -> Tensor:
    """What each key of (batch, heads, queries, keys) gets from the queries on average."""
    return sum(attention[:, :, i].double() for i in range(attention.shape[2])) / attention.shape[2]


def head_mean(attention: Tensor) -> Tensor:
    """The mean of (batch, heads, queries, keys) over heads."""
    return sum(attention[:, i].double() for i in range(attention.shape[1])) / attention.shape[1]


Point = tuple[float, float]


def attention_distance(attention: Tensor, queries: list[Point | None], keys: list[Point | None]) -> list[float]:
    """Of the rows of one head, (queries, keys), that give something to a place: how far that is on average.

    Dosovitskiy et al. 2021, appendix D.7; points are (y, x), None is nowhere.
    """
    found = []
    for row, start in zip(attention.tolist(), queries):
        weights = [(p, end) for p, end in zip(row, keys) if end is not None]
        if start is not None and sum(p for p, _ in weights) > 0:
            reach = sum(p * math.dist(start, end) for p, end in weights)
            found.append(reach / sum(p for p, _ in weights))
    return found


def centres(rows: int, columns: int, height: float, width: float) -> list[Point]:
    """(y, x) of the middle of each cell of a grid, row by row, where a cell has this height and width."""
    return [((i + 0.5) * height, (j + 0.5) * width) for i in range(rows) for j in range(columns)]
