"""A prefix as rows I and a map W, b, absorbed into query and output: forward and backward of this part alone.

All of a sample's heads look at the same rows, so that they are so many more queries of one head: scores and their
gradients are products of whole matrices. q . b_k is the same for every row and only moves the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hyperpelt_ds.kernels.prefix_attention.flash import Flash


def forward(
    flash: Flash, query: Tensor, hyper: Tensor, weight: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """query (B, H, T, d), hyper (C, P, E) each for B / C samples in order, weight (2K, E), bias (2K,).

    Output (B, T, H, d) and log of the sum (B, T, H) of attention to these rows alone.
    """
    maps, key_bias, value_bias = _by_head(weight, bias, query)
    each = query.transpose(1, 2)
    turned = _by(each, maps[0])
    rows = hyper.unsqueeze(1)
    mean, sums = flash.forward(_rows(turned, hyper).unsqueeze(1), rows, rows, None, scale)
    output = _by(mean.reshape(turned.shape), maps[1].mT) + value_bias
    return output, sums.reshape(turned.shape[:3]) + scale * _wide(each * key_bias).sum(-1)


def backward(
    gradient: Tensor,
    query: Tensor,
    hyper: Tensor,
    weight: Tensor,
    bias: Tensor,
    delta: Tensor,
    logs: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of query (B, T, H, d), hyper, weight, bias, and the sum over rows of the scores' gradients (B, T, H).

    gradient (B, T, H, d) is that of the joint output, delta (B, T, H) its product with that output, logs (B, T, H) the
    log of the joint sum on the scale of this part's scores.
    """
    maps, key_bias, value_bias = _by_head(weight, bias, query)
    each = query.transpose(1, 2)
    turned, sent = _by(each, maps[0]), _by(gradient, maps[1])  # query and gradient as the rows see them (B, T, H, E)
    q, g = _rows(turned, hyper), _rows(sent, hyper)
    own_logs = logs - scale * _wide(each * key_bias).sum(-1)
    shares = _wide(torch.bmm(q, hyper.mT)).mul_(scale).sub_(own_logs.reshape(*q.shape[:2], 1)).exp_()
    pull = _wide(gradient * value_bias).sum(-1) - delta
    scores = _wide(torch.bmm(g, hyper.mT)).add_(pull.reshape(*q.shape[:2], 1)).mul_(shares)
    pulled, total = (part.sum(-1).view(logs.shape) for part in (scores, shares))
    scores, shares = scores.to(hyper.dtype), shares.to(hyper.dtype)
    dhyper = torch.baddbmm(torch.bmm(shares.mT, g), scores.mT, q, alpha=scale)
    dturned = torch.bmm(scores, hyper).mul_(scale).view(turned.shape)
    mean = torch.bmm(shares, hyper).view(turned.shape)
    each_pull, each_total = (part.to(hyper.dtype).unsqueeze(-1) for part in (pulled, total))
    dquery = _by(dturned, maps[0].mT) + scale * each_pull * key_bias
    dweight = torch.stack([_outer(each, dturned), _outer(gradient, mean)]).view(weight.shape)
    dkey_bias = scale * (each * each_pull).sum((0, 1))
    dvalue_bias = (gradient * each_total).sum((0, 1))
    return dquery, dhyper, dweight, torch.stack([dkey_bias, dvalue_bias]).view(bias.shape), pulled


def _by_head(weight: Tensor, bias: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The maps of keys and values (2, H, d, E), and their biases (H, d)."""
    heads, size = query.shape[1], query.shape[3]
    key_bias, value_bias = bias.view(2, heads, size)
    return weight.view(2, heads, size, -1), key_bias, value_bias


def _by(each: Tensor, maps: Tensor) -> Tensor:
    """(B, T, H, x) by (H, x, y) -> (B, T, H, y), head by head."""
    batch, length, heads, size = each.shape
    made = torch.bmm(each.reshape(batch * length, heads, size).transpose(0, 1), maps)
    return made.transpose(0, 1).reshape(batch, length, heads, -1)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """sum over samples and tokens: (B, T, H, x), (B, T, H, y) -> (H, x, y)."""
    one, two = (each.reshape(-1, *each.shape[2:]).transpose(0, 1) for each in (left, right))
    return torch.bmm(one.mT, two)


def _rows(each: Tensor, hyper: Tensor) -> Tensor:
    """(B, T, H, E) -> (C, B / C x T x H, E)."""
    return each.reshape(len(hyper), -1, each.shape[-1])


def _wide(each: Tensor) -> Tensor:
    """Sums of exponentials are kept in at least 32 bits, as torch's attention keeps them."""
    return each.to(torch.promote_types(each.dtype, torch.float32))
