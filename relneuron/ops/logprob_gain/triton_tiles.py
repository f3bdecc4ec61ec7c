"""What value vectors write to the logits, b = values @ unembed.T, a tile of neurons at a time.

`ops/logprob_gain/triton_launch.py` calls it. The products are torch's, with float32 sums; that they
are exact enough is a question of the dtypes, which `tiles` answers. Rows of a tile and of what goes
with it are as long as whole blocks of tokens, so that a kernel loads 16 bytes at once and needs no
masks.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from relneuron.ops.logprob_gain.base import product_units

SCRATCH_BYTES = 128 << 20  # of a tile, and of the partial sums of a kernel


def tiles(values: Tensor, unembed: Tensor, width: int) -> Iterator[tuple[slice, Tensor]]:
    """(neurons, b of them (n, width) float32, zeros behind the tokens); one memory for all."""
    # Both are parameters, often.
    values, unembed = values.detach(), _factor(values.dtype, unembed).detach()
    n_values, n_tokens = values.shape[0], unembed.shape[0]
    step = max(1, min(n_values, SCRATCH_BYTES // (4 * width)))
    make = torch.empty if width == n_tokens else torch.zeros
    scratch = make((step, width), dtype=torch.float32, device=values.device)
    for start in range(0, n_values, step):
        rows = slice(start, min(start + step, n_values))
        tile = scratch[: rows.stop - start]
        _multiply(values[rows], unembed, tile[:, :n_tokens])
        yield rows, tile


def sample_is_right(values: Tensor, unembed: Tensor, tile: Tensor) -> Tensor:
    """Whether some of a tile are within `product_units` of float64 products, a bool on the device.

    Of 32 to 63 neurons and 16 to 31 tokens, evenly spread: what large partial sums that cancel, or
    sums of less than float32, do to one token they do to most. Nothing waits for the answer.
    """
    (n_values, hidden), n_tokens = values.shape, unembed.shape[0]
    row, token = max(1, n_values // 32), max(1, n_tokens // 16)
    some, rows = values[::row].detach().double(), unembed[::token].detach().double()
    products = some @ rows.T
    norms = some.norm(dim=1)[:, None] * rows.norm(dim=1)
    bound = product_units("triton", hidden).bound(norms, products.abs())
    return ((tile[::row, :n_tokens:token] - products).abs() <= bound).all()


def padded(tensor: Tensor, block: int) -> Tensor:
    """Contiguous, zeros behind each row until whole blocks are full."""
    missing = -tensor.shape[1] % block
    if missing:
        return torch.nn.functional.pad(tensor, (0, missing))
    return tensor.contiguous()


def _factor(dtype: torch.dtype, unembed: Tensor) -> Tensor:
    """The unembedding (V, D), or (V, 3 D), as `_multiply` takes it with values of a dtype."""
    # torch has products of 16-bit matrices with float32 results on NVIDIA GPUs only.
    if torch.version.hip is not None:
        return unembed.float()
    if dtype == torch.bfloat16 and unembed.dtype == torch.float32:
        return _in_bfloat16(unembed)
    return unembed if dtype == unembed.dtype else unembed.float()


def _multiply(values: Tensor, unembed: Tensor, out: Tensor) -> None:
    if unembed.shape[1] != values.shape[1]:
        values = torch.cat([values, values, values], dim=1)
    if unembed.dtype == torch.float32 or not values.is_cuda:
        with _no_tf32():
            torch.mm(values.float(), unembed.float().T, out=out)
    else:
        torch.mm(values, unembed.T, out_dtype=torch.float32, out=out)


@contextmanager
def _no_tf32() -> Iterator[None]:
    """float32 products of matrices round nothing away, whatever is set for the process."""
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before


# The pieces of the last unembed: (its storage, its place and version there, the pieces).
_LAST: list[tuple[weakref.ref[object], tuple[object, ...], Tensor]] = []


def _in_bfloat16(unembed: Tensor) -> Tensor:
    """(V, 3 D) bfloat16: three pieces whose sum is the float32 unembed (V, D).

    With values of bfloat16 that is three fast products in place of a slow one, and as exact. The
    pieces are kept while the unembed's memory lives: every layer of a model has the same.
    """
    storage: object = unembed.untyped_storage()
    # A tensor made in inference mode does not say when it changes.
    version = None if unembed.is_inference() else unembed._version
    key = (unembed.data_ptr(), unembed.shape, unembed.stride(), version)
    # A copy, as another thread may clear it.
    for of, place, pieces in _LAST[:]:
        if version is not None and of() is storage and place == key:
            return pieces
    high = unembed.bfloat16()
    rest = unembed - high.float()
    middle = rest.bfloat16()
    pieces = torch.cat([high, middle, (rest - middle.float()).bfloat16()], dim=1)
    _LAST.clear()
    if version is not None:
        _LAST.append((weakref.ref(storage, lambda _: _LAST.clear()), key, pieces))
    return pieces
