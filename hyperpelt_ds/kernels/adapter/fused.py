"""Adapters as Triton kernels: one launch forward, and one for the inputs and one a branch for the weights backward.

    forward          y = residual + the branches' sum; x is read once for one or two branches; keeps z = x down + bias
    backward_input   dz of every branch, dx, and partial sums of the scales' gradients; dy is read once
    backward_weight  a program makes a slice of one condition's weights; it walks that condition's tokens in order

No atomics: what is summed across programs goes to a buffer that is added up in a fixed order, and every tile size
follows from shapes alone, so that results repeat bit for bit. A program of the first two kernels reads one sample, so
that a sample's y does not depend on what else is in the batch. Speed on a GPU is not measured yet; the kernels are
checked in Triton's interpreter and compiled for sm_80 and sm_90.

Only imported when a call is to run here: it is the importer of triton.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from hyperpelt_ds.kernels.dispatch import interpreted
from hyperpelt_ds.kernels.errors import KernelUnavailableError

INTERPRETED = tl.constexpr(interpreted())


class Tile(NamedTuple):
    """Tokens and model-size columns of a program's tile, and how it is run."""

    tokens: int
    columns: int
    warps: int
    stages: int


def token_tile(tokens: int, narrow: int, branches: int, item: int) -> Tile:
    """The tile of the kernels that own a sample's tokens; `narrow` is the padded bottleneck, `item` bytes a number."""
    wide = narrow * branches
    rows = 16 if tokens <= 16 else 32 if tokens <= 32 or wide >= 256 else 64
    warps = 8 if wide >= 128 and rows >= 32 else 4
    if item == 4:
        return Tile(rows, 32 if wide < 128 else 16, warps, 2)
    return Tile(rows, 64 if wide <= 128 else 32, warps, 2 if wide > 256 else 3)


def weight_tile(narrow: int, item: int) -> Tile:
    """The tile of the kernel that owns a slice of a condition's weights."""
    if item == 4:
        return Tile(32 if narrow <= 32 else 16, 32 if narrow <= 64 else 16, 8 if narrow >= 64 else 4, 2)
    if narrow > 128:
        return Tile(32, 32, 8, 2)
    return Tile(64, 64, 4, 3) if narrow <= 64 else Tile(64, 64, 8, 2)


def splits(groups: int, columns: int, tokens: int, tile: Tile) -> int:
    """Programs that share the tokens of one condition: enough to fill a GPU, by shape alone (about 264 in all), and
    none with fewer than four tiles of tokens."""
    return max(1, min(264 // (groups * columns), tokens // (4 * tile.tokens * groups), 16))


@triton.jit
def _dot(a, b):
    # the interpreter multiplies the bit patterns of bfloat16 (triton issue 11584)
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _dot_add(a, b, total):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _activate(z, ACT: tl.constexpr):
    if ACT == "relu":
        return tl.maximum(z, 0.0)
    elif ACT == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == "gelu_new":  # tanh(u) = 2 sigmoid(2 u) - 1
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACT == "silu":
        return z * tl.sigmoid(z)
    else:
        return z


@triton.jit
def _slope(z, ACT: tl.constexpr):
    if ACT == "relu":
        return tl.where(z > 0, 1.0, 0.0)
    elif ACT == "gelu":
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACT == "gelu_new":
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif ACT == "silu":
        s = tl.sigmoid(z)
        return s + z * s * (1.0 - s)
    else:
        return tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def _at(group, stride, ALIGNED: tl.constexpr):
    """Where a condition's weights begin; all are multiples of 8 numbers from each other if ALIGNED."""
    place = group * stride
    if ALIGNED:
        place = tl.multiple_of(place, 8)
    return place


@triton.jit
def _tokens(lengths, sample, T, RAGGED: tl.constexpr, BT: tl.constexpr):
    """The program's tokens, which of them exist, and which are real."""
    tokens = tl.program_id(1) * BT + tl.arange(0, BT)
    inside = tokens < T
    live = inside
    if RAGGED:
        live = inside & (tokens < tl.load(lengths + sample))
    return tokens, inside, live


@triton.jit
def _hidden(total, bias, at, scale, z, inside, live, R: tl.constexpr, M: tl.constexpr, ACT: tl.constexpr):
    """Keeps z and returns scale * act(z), 0 where nothing is to be added."""
    narrow = tl.arange(0, M)
    total += tl.load(bias + at + narrow, mask=narrow < R, other=0.0).to(tl.float32)[None, :]
    rounded = total.to(z.dtype.element_ty)  # the backward pass reads it rounded
    tl.store(z + narrow[None, :], rounded, mask=inside[:, None] & (narrow < R)[None, :])
    hidden = _activate(rounded.to(tl.float32), ACT) * scale
    return tl.where(live[:, None] & (narrow < R)[None, :], hidden, 0.0)


@triton.jit
def forward_kernel(
    x, residual, y, z, lengths,
    down1, bias1, up1, shift1, scale1, ids1, sd1, sb1, su1, ss1,
    down2, bias2, up2, shift2, scale2, ids2, sd2, sb2, su2, ss2,
    T,
    D: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr,
    PAIR: tl.constexpr, RAGGED: tl.constexpr, ALIGNED: tl.constexpr, ACT: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    tokens, inside, live = _tokens(lengths, sample, T, RAGGED, BT)
    row = sample * T + tokens
    n1 = tl.arange(0, M1)
    n2 = tl.arange(0, M2)
    group1 = tl.load(ids1 + sample).to(tl.int64)
    live1 = live & (group1 >= 0)
    group1 = tl.maximum(group1, 0)
    group2 = tl.load(ids2 + sample).to(tl.int64)
    live2 = live & (group2 >= 0)
    group2 = tl.maximum(group2, 0)
    d1 = down1 + _at(group1, sd1, ALIGNED)
    d2 = down2 + _at(group2, sd2, ALIGNED)
    total1 = tl.zeros((BT, M1), tl.float32)
    total2 = tl.zeros((BT, M2), tl.float32)
    for start in range(0, D, BD):
        column = start + tl.arange(0, BD)
        within = column < D
        xs = tl.load(x + row[:, None] * D + column[None, :], mask=live[:, None] & within[None, :], other=0.0)
        w = tl.load(d1 + column[:, None] * R1 + n1[None, :], mask=within[:, None] & (n1 < R1)[None, :], other=0.0)
        total1 = _dot_add(xs, w, total1)
        if PAIR:
            w = tl.load(d2 + column[:, None] * R2 + n2[None, :], mask=within[:, None] & (n2 < R2)[None, :], other=0.0)
            total2 = _dot_add(xs, w, total2)
    R: tl.constexpr = R1 + R2 if PAIR else R1
    factor1 = tl.load(scale1).to(tl.float32)
    factor2 = tl.load(scale2).to(tl.float32)
    h1 = _hidden(total1, bias1, group1 * sb1, factor1, z + row[:, None] * R, inside, live1, R1, M1, ACT)
    h1 = h1.to(x.dtype.element_ty)
    if PAIR:
        h2 = _hidden(total2, bias2, group2 * sb2, factor2, z + row[:, None] * R + R1, inside, live2, R2, M2, ACT)
        h2 = h2.to(x.dtype.element_ty)
    u1 = up1 + _at(group1, su1, ALIGNED)
    u2 = up2 + _at(group2, su2, ALIGNED)
    c1 = shift1 + _at(group1, ss1, ALIGNED)
    c2 = shift2 + _at(group2, ss2, ALIGNED)
    for start in range(0, D, BD):
        column = start + tl.arange(0, BD)
        within = column < D
        here = inside[:, None] & within[None, :]
        w = tl.load(u1 + n1[:, None] * D + column[None, :], mask=(n1 < R1)[:, None] & within[None, :], other=0.0)
        out = _dot(h1, w)
        c = tl.load(c1 + column, mask=within, other=0.0).to(tl.float32) * factor1
        out += tl.where(live1[:, None], c[None, :], 0.0)
        if PAIR:
            w = tl.load(u2 + n2[:, None] * D + column[None, :], mask=(n2 < R2)[:, None] & within[None, :], other=0.0)
            out = _dot_add(h2, w, out)
            c = tl.load(c2 + column, mask=within, other=0.0).to(tl.float32) * factor2
            out += tl.where(live2[:, None], c[None, :], 0.0)
        at = row[:, None] * D + column[None, :]
        out += tl.load(residual + at, mask=here, other=0.0).to(tl.float32)
        tl.store(y + at, out.to(y.dtype.element_ty), mask=here)


@triton.jit
def _gradient_of_z(total, scale, z, dz, partial, inside, live, R: tl.constexpr, M: tl.constexpr, ACT: tl.constexpr):
    """Keeps dz and the program's share of the scale's gradient; total is dy up^T."""
    narrow = tl.arange(0, M)
    real = live[:, None] & (narrow < R)[None, :]
    dh = tl.where(real, total, 0.0)
    z_here = tl.load(z + narrow[None, :], mask=real, other=0.0).to(tl.float32)
    tl.store(partial, tl.sum(tl.sum(dh * _activate(z_here, ACT), 1), 0))
    made = (dh * scale * _slope(z_here, ACT)).to(dz.dtype.element_ty)
    tl.store(dz + narrow[None, :], made, mask=inside[:, None] & (narrow < R)[None, :])
    return made


@triton.jit
def backward_input_kernel(
    dy, z, dz, dx, lengths,
    down1, up1, scale1, partial1, ids1, sd1, su1,
    down2, up2, scale2, partial2, ids2, sd2, su2,
    T,
    D: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, M1: tl.constexpr, M2: tl.constexpr,
    PAIR: tl.constexpr, RAGGED: tl.constexpr, ALIGNED: tl.constexpr, INPUTS: tl.constexpr, ACT: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    tokens, inside, live = _tokens(lengths, sample, T, RAGGED, BT)
    row = sample * T + tokens
    n1 = tl.arange(0, M1)
    n2 = tl.arange(0, M2)
    group1 = tl.load(ids1 + sample).to(tl.int64)
    live1 = live & (group1 >= 0)
    group1 = tl.maximum(group1, 0)
    group2 = tl.load(ids2 + sample).to(tl.int64)
    live2 = live & (group2 >= 0)
    group2 = tl.maximum(group2, 0)
    u1 = up1 + _at(group1, su1, ALIGNED)
    u2 = up2 + _at(group2, su2, ALIGNED)
    total1 = tl.zeros((BT, M1), tl.float32)
    total2 = tl.zeros((BT, M2), tl.float32)
    for start in range(0, D, BD):
        column = start + tl.arange(0, BD)
        within = column < D
        dys = tl.load(dy + row[:, None] * D + column[None, :], mask=live[:, None] & within[None, :], other=0.0)
        w = tl.load(u1 + n1[:, None] * D + column[None, :], mask=(n1 < R1)[:, None] & within[None, :], other=0.0)
        total1 = _dot_add(dys, tl.trans(w), total1)
        if PAIR:
            w = tl.load(u2 + n2[:, None] * D + column[None, :], mask=(n2 < R2)[:, None] & within[None, :], other=0.0)
            total2 = _dot_add(dys, tl.trans(w), total2)
    R: tl.constexpr = R1 + R2 if PAIR else R1
    share = sample * tl.num_programs(1) + tl.program_id(1)
    at = row[:, None] * R
    factor1 = tl.load(scale1).to(tl.float32)
    factor2 = tl.load(scale2).to(tl.float32)
    g1 = _gradient_of_z(total1, factor1, z + at, dz + at, partial1 + share, inside, live1, R1, M1, ACT)
    if PAIR:
        at += R1
        g2 = _gradient_of_z(total2, factor2, z + at, dz + at, partial2 + share, inside, live2, R2, M2, ACT)
    if INPUTS:
        d1 = down1 + _at(group1, sd1, ALIGNED)
        d2 = down2 + _at(group2, sd2, ALIGNED)
        for start in range(0, D, BD):
            column = start + tl.arange(0, BD)
            within = column < D
            w = tl.load(d1 + column[:, None] * R1 + n1[None, :], mask=within[:, None] & (n1 < R1)[None, :], other=0.0)
            out = _dot(g1, tl.trans(w))
            if PAIR:
                w = tl.load(
                    d2 + column[:, None] * R2 + n2[None, :], mask=within[:, None] & (n2 < R2)[None, :], other=0.0
                )
                out = _dot_add(g2, tl.trans(w), out)
            here = inside[:, None] & within[None, :]
            tl.store(dx + row[:, None] * D + column[None, :], out.to(dx.dtype.element_ty), mask=here)


@triton.jit
def backward_weight_kernel(
    x, dy, z, dz, order, ptr, lengths, shift, scale, made, partial, ss, row_size, T,
    D: tl.constexpr, R: tl.constexpr, M: tl.constexpr, WIDE: tl.constexpr, FROM: tl.constexpr,
    RAGGED: tl.constexpr, ALIGNED: tl.constexpr, ACT: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, BIAS: tl.constexpr, UP: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """z and dz are columns FROM on of rows of WIDE; `made` holds rows of down, down_bias, up and up_bias, which begin
    at 0, BIAS, UP and SHIFT."""
    group = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    within = column < D
    narrow = tl.arange(0, M)
    first = tl.load(ptr + group)
    tokens = (tl.load(ptr + group + 1) - first) * T  # of all samples of the condition, side by side
    share = tl.cdiv(tl.cdiv(tokens, BT), tl.num_programs(2)) * BT
    factor = tl.load(scale).to(tl.float32)
    down = tl.zeros((BD, M), tl.float32)
    up = tl.zeros((BD, M), tl.float32)
    down_bias = tl.zeros((M,), tl.float32)
    up_bias = tl.zeros((BD,), tl.float32)
    for start in range(split * share, tl.minimum((split + 1) * share, tokens), BT):
        flat = start + tl.arange(0, BT)
        live = flat < tokens
        sample = tl.load(order + first + flat // T, mask=live, other=0).to(tl.int64)
        token = flat % T
        if RAGGED:
            live = live & (token < tl.load(lengths + sample))
        row = sample * T + token
        here = live[:, None] & within[None, :]
        thin = live[:, None] & (narrow < R)[None, :]
        xs = tl.load(x + row[:, None] * D + column[None, :], mask=here, other=0.0)
        dys = tl.load(dy + row[:, None] * D + column[None, :], mask=here, other=0.0)
        at = row[:, None] * WIDE + FROM + narrow[None, :]
        zs = tl.load(z + at, mask=thin, other=0.0).to(tl.float32)
        dzs = tl.load(dz + at, mask=thin, other=0.0)
        hidden = tl.where(thin, _activate(zs, ACT) * factor, 0.0).to(x.dtype.element_ty)
        down = _dot_add(tl.trans(xs), dzs, down)
        up = _dot_add(tl.trans(dys), hidden, up)  # transposed, so that the model size is the side that wgmma needs long
        down_bias += tl.sum(dzs.to(tl.float32), 0)
        up_bias += tl.sum(dys.to(tl.float32), 0)
    here = within[:, None] & (narrow < R)[None, :]
    base = made + _at((split * tl.num_programs(0) + group).to(tl.int64), row_size, True)
    kind = made.dtype.element_ty
    tl.store(base + column[:, None] * R + narrow[None, :], down.to(kind), mask=here)
    turned = (narrow < R)[:, None] & within[None, :]
    tl.store(base + UP + narrow[:, None] * D + column[None, :], tl.trans(up).to(kind), mask=turned)
    tl.store(base + SHIFT + column, (up_bias * factor).to(kind), mask=within)
    if tl.program_id(1) == 0:
        tl.store(base + BIAS + narrow, down_bias.to(kind), mask=narrow < R)
    c = tl.load(shift + _at(group, ss, ALIGNED) + column, mask=within, other=0.0).to(tl.float32)
    place = (group * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + split
    tl.store(partial + place, tl.sum(up_bias * c, 0))


class Branch(NamedTuple):
    """One branch of a call as the kernels read it."""

    down: Tensor  # (C, D, R)
    down_bias: Tensor  # (C, R)
    up: Tensor  # (C, R, D)
    up_bias: Tensor  # (C, D)
    scale: Tensor  # ()
    ids: Tensor  # (B,) int32
    order: Tensor  # (B,) int32
    ptr: Tensor  # (C + 1,) int32


class Row(NamedTuple):
    """Where the gradients of one condition's weights begin in a packed row, every part on a multiple of 8 numbers."""

    bias: int
    up: int
    shift: int
    size: int


def packed_row(size: int, narrow: int) -> Row:
    bias = size * narrow
    up = bias + -(-narrow // 8) * 8
    shift = up + narrow * size
    return Row(bias, up, shift, shift + size)


def _forward(
    x: Tensor, residual: Tensor, tensors: Sequence[Tensor], lengths: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """y, and z of one or two branches side by side (B, T, R1 [+ R2])."""
    one, two, pair = _two(tensors)
    batch, tokens, _ = x.shape
    y, z = torch.empty_like(x), x.new_empty((batch, tokens, _width(one, two, pair)))
    tile, shape = _token_launch(x, one, two, pair)
    with _on(x):
        forward_kernel[batch, triton.cdiv(tokens, tile.tokens)](
            x, residual, y, z, x if lengths is None else lengths,
            *one[:6], *_strides(one), *two[:6], *_strides(two), tokens, **shape,
            RAGGED=lengths is not None, ALIGNED=_aligned(one, two), ACT=activation,
        )  # fmt: skip
    return y, z


def _backward(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    tensors: Sequence[Tensor],
    lengths: Tensor | None,
    activation: str,
    inputs: bool,
    weights: bool,
) -> list[Tensor]:
    """dx (empty unless `inputs`), then if `weights` each branch's packed gradients (C, row) and its scale's ()."""
    one, two, pair = _two(tensors)
    batch, tokens, size = x.shape
    branches = (one, two) if pair else (one,)
    tile, shape = _token_launch(x, one, two, pair)
    blocks = triton.cdiv(tokens, tile.tokens)
    dz, dx = torch.empty_like(z), torch.empty_like(x) if inputs else x.new_empty(0)
    plans = [_weight_launch(x, branch) for branch in branches]
    # both kernels leave their shares of a scale's gradient in one buffer, which is added up once
    partials = [x.new_empty(batch * blocks + plan[1], dtype=torch.float32) for plan in plans]
    with _on(x):
        backward_input_kernel[batch, blocks](
            dy, z, dz, dx, x if lengths is None else lengths,
            one.down, one.up, one.scale, partials[0], one.ids, one.down.stride(0), one.up.stride(0),
            two.down, two.up, two.scale, partials[-1], two.ids, two.down.stride(0), two.up.stride(0),
            tokens, **shape,
            RAGGED=lengths is not None, ALIGNED=_aligned(one, two), INPUTS=inputs, ACT=activation,
        )  # fmt: skip
        if not weights:
            return [dx]
        made, begin = [dx], 0
        for branch, (tile, _, parts), partial in zip(branches, plans, partials, strict=True):
            groups, _, narrow = branch.down.shape
            row = packed_row(size, narrow)
            packed = x.new_empty((parts, groups, row.size), dtype=x.dtype if parts == 1 else torch.float32)
            if row.up > row.bias + narrow:
                packed[..., row.bias + narrow : row.up] = 0
            backward_weight_kernel[groups, triton.cdiv(size, tile.columns), parts](
                x, dy, z, dz, branch.order, branch.ptr, x if lengths is None else lengths, branch.up_bias, branch.scale,
                packed, partial[batch * blocks :], branch.up_bias.stride(0), row.size, tokens,
                D=size, R=narrow, M=padded(narrow), WIDE=z.shape[2], FROM=begin,
                RAGGED=lengths is not None, ALIGNED=_aligned(branch), ACT=activation,
                BT=tile.tokens, BD=tile.columns, BIAS=row.bias, UP=row.up, SHIFT=row.shift,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            made += [packed[0] if parts == 1 else packed.sum(0).to(x.dtype), partial.sum().to(x.dtype)]
            begin += narrow
    return made


def padded(narrow: int) -> int:
    """The bottleneck as the matrix units need it."""
    return max(16, triton.next_power_of_2(narrow))


def _two(tensors: Sequence[Tensor]) -> tuple[Branch, Branch, bool]:
    """One or two branches, flat, as two; the second stands in twice if there is only one, and is not read."""
    one = Branch._make(tensors[:8])
    return one, Branch._make(tensors[8:]) if len(tensors) > 8 else one, len(tensors) > 8


def _width(one: Branch, two: Branch, pair: bool) -> int:
    return one.down.shape[2] + (two.down.shape[2] if pair else 0)


def _strides(branch: Branch) -> tuple[int, ...]:
    return tuple(tensor.stride(0) for tensor in branch[:4])


def _aligned(*branches: Branch) -> bool:
    """Whether every condition's weights begin where 16 bytes can be read at once."""
    tensors = [tensor for branch in branches for tensor in (branch.down, branch.up, branch.up_bias)]
    return all(tensor.stride(0) % 8 == 0 and tensor.data_ptr() % 16 == 0 for tensor in tensors)


def _token_launch(x: Tensor, one: Branch, two: Branch, pair: bool) -> tuple[Tile, dict[str, Any]]:
    """The tile of the kernels that own tokens, and the arguments that follow from shapes."""
    narrow = [padded(branch.down.shape[2]) for branch in (one, two)]
    tile = token_tile(x.shape[1], max(narrow), 1 + pair, x.element_size())
    shape = dict(D=x.shape[2], R1=one.down.shape[2], R2=two.down.shape[2], M1=narrow[0], M2=narrow[1] if pair else 16)
    launch = dict(BT=tile.tokens, BD=tile.columns, num_warps=tile.warps, num_stages=tile.stages)
    return tile, {**shape, "PAIR": pair, **launch}


def _weight_launch(x: Tensor, branch: Branch) -> tuple[Tile, int, int]:
    """The tile of the kernel that owns weights, the programs it takes, and how many of them share a slice."""
    groups, size, narrow = branch.down.shape
    tile = weight_tile(padded(narrow), x.element_size())
    columns = triton.cdiv(size, tile.columns)
    parts = splits(groups, columns, x.shape[0] * x.shape[1], tile)
    return tile, groups * columns * parts, parts


def _on(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _forward_fake(
    x: Tensor, residual: Tensor, tensors: Sequence[Tensor], lengths: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:2], _width(*_two(tensors))))


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    z: Tensor,
    tensors: Sequence[Tensor],
    lengths: Tensor | None,
    activation: str,
    inputs: bool,
    weights: bool,
) -> list[Tensor]:
    made = [torch.empty_like(x) if inputs else x.new_empty(0)]
    for place in range(0, len(tensors) if weights else 0, 8):
        groups, size, narrow = tensors[place].shape
        made += [x.new_empty((groups, packed_row(size, narrow).size)), x.new_empty(())]
    return made


def _not_twice(ctx: Any, *gradients: Any) -> Any:
    raise KernelUnavailableError('the fused adapter has no second derivative: use backend="reference"')


# define and impl with the autograd.Function outside: half the host time of custom_op with register_autograd
_library = library.Library("hyperpelt", "DEF")
_library.define(
    "adapter_forward(Tensor x, Tensor residual, Tensor[] tensors, Tensor? lengths, str activation) -> (Tensor, Tensor)"
)
_library.define(
    "adapter_backward(Tensor dy, Tensor x, Tensor z, Tensor[] tensors, Tensor? lengths, str activation, bool inputs, "
    "bool weights) -> Tensor[]"
)
for _device in ("CUDA", "CPU"):  # on the CPU in the interpreter
    _library.impl("adapter_forward", _forward, _device)
    _library.impl("adapter_backward", _backward, _device)
library.register_fake("hyperpelt::adapter_forward", _forward_fake, lib=_library)
library.register_fake("hyperpelt::adapter_backward", _backward_fake, lib=_library)
library.register_autograd("hyperpelt::adapter_backward", _not_twice, lib=_library)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, lengths: Tensor | None, activation: str, *tensors: Tensor
    ) -> Tensor:
        y, z = torch.ops.hyperpelt.adapter_forward(x, residual, tensors, lengths, activation)
        ctx.save_for_backward(x, z, lengths, *tensors)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, z, lengths, *tensors = ctx.saved_tensors
        inputs, weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[4:])
        dx, *made = torch.ops.hyperpelt.adapter_backward(
            dy.contiguous(), x, z, tensors, lengths, ctx.activation, inputs, weights
        )
        gradients: list[Tensor | None] = []
        for branch in range(len(tensors) // 8):
            groups, size, narrow = tensors[8 * branch].shape
            gradients += [None] * 8 if not weights else [
                *_unpacked(made[2 * branch], groups, size, narrow), made[2 * branch + 1], None, None, None
            ]  # fmt: skip
        return dx if inputs else None, dy if ctx.needs_input_grad[1] else None, None, None, *gradients


def _unpacked(packed: Tensor, groups: int, size: int, narrow: int) -> list[Tensor]:
    row = packed_row(size, narrow)
    return [
        packed[:, : row.bias].view(groups, size, narrow),
        packed[:, row.bias : row.bias + narrow],
        packed[:, row.up : row.shift].view(groups, narrow, size),
        packed[:, row.shift :],
    ]


def apply(
    x: Tensor, residual: Tensor, branches: Sequence[Branch], lengths: Sequence[Tensor | None], activation: str
) -> Tensor:
    """residual (B, T, D) + what the branches make of x (B, T, D); two share a launch if they share their lengths."""
    x = x.contiguous()
    place = 0
    while place < len(branches):
        pair = place + 1 < len(branches) and lengths[place] is lengths[place + 1]
        taken = branches[place : place + 1 + pair]
        tensors = [tensor for branch in taken for tensor in _plain(branch)]
        residual = _Fused.apply(x, residual.contiguous(), lengths[place], activation, *tensors)
        place += 1 + pair
    return residual


def _plain(branch: Branch) -> Branch:
    """The branch with every condition's weights contiguous; those that one product made for all sites already are."""
    return Branch._make(
        tensor if tensor.ndim < 2 or _rows_are_plain(tensor) else tensor.contiguous() for tensor in branch
    )


def _rows_are_plain(tensor: Tensor) -> bool:
    return tensor.stride(-1) == 1 and (tensor.ndim < 3 or tensor.stride(1) == tensor.shape[2])
