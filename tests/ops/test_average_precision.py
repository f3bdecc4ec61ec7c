"""`ops.average_precision` against the test vectors, scikit-learn and itself in every backend.

Counts are integers and their sum has no order, so backends, instruction sets, threads and splits
agree bit for bit, and with scikit-learn to one float32 ulp. Triton has its own file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torch import Tensor

from relneuron.ops import available_backends, average_precision, backends
from relneuron.ops import average_precision as public_function
from tests.conftest import SHARED

op: Any = __import__("relneuron.ops.average_precision.op", fromlist=["x"])

VECTORS = SHARED / "methods" / "vectors.json"
STATUS = available_backends()
ISAS = backends.cpu_module().isa_levels() if STATUS["cpu"].works else []
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# "cpu-<instruction set>" and the reference, with threads of their own.
VARIANTS = ["reference", *(f"cpu-{isa}" for isa in ISAS)]


def run(
    variant: str, values: Tensor, labels: Tensor, weights: Tensor | None = None, threads: int = 1
) -> Tensor:
    """The op with one backend and instruction set, checked as the public function checks."""
    backend, _, isa = variant.partition("-")
    kernel = op.average_precision_cpu

    def forced(*tensors: Tensor | None) -> Tensor | None:
        return kernel(*tensors, isa=isa, n_threads=threads)

    with mock.patch.object(op, "average_precision_cpu", forced):
        return average_precision(values, labels, weights=weights, backend=backend)


def oracle(values: Any, labels: Any, weights: Any = None) -> float:
    """scikit-learn's AP of one column and relation."""
    inside = labels >= 0
    if np.abs(values).max() > 1e300:  # it would add them up to see whether all are finite
        values = np.unique(values, return_inverse=True)[1]
    if weights is not None:
        weights = weights[inside]
    return float(average_precision_score(labels[inside], values[inside], sample_weight=weights))


def assert_close_to_sklearn(
    ours: Tensor, values: Tensor, labels: Tensor, weights: Tensor | None = None
) -> None:
    """At most one float32 ulp, for every column and relation."""
    columns = values.double().numpy()
    for r in range(labels.shape[0]):
        row = labels[r].numpy()
        weight = None if weights is None else weights[r].numpy()
        for m in range(columns.shape[1]):
            truth = np.float32(oracle(columns[:, m], row, weight))
            got = np.float32(ours[r, m])
            assert abs(got - truth) <= np.spacing(truth), (r, m, got, truth)


def random_labels(r: int, n: int, generator: torch.Generator, share: float = 0.3) -> Tensor:
    """Every relation has a positive and a negative; a third of the rows are not in its set."""
    labels = torch.randint(-1, 1, (r, n), generator=generator, dtype=torch.int8)
    labels[torch.rand(r, n, generator=generator) < share] = 1
    labels[:, 0], labels[:, -1] = 1, 0
    return labels


# name -> (n, m) float64 of another shape each: what sorts by value find hard.
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "two digits": lambda x: (x * 100).round() / 100,
    "few values": lambda x: x.sign() * (x.abs() > 0.5),
    "zeros of both signs": lambda x: torch.where(x > 0, 0.0, -0.0),
    "constant": lambda x: torch.full_like(x, -2.5),
    "far outliers": lambda x: x**5,
    "one far outlier": lambda x: torch.cat([torch.full_like(x[:1], 6e4), 1 + x[1:] * 1e-3]),
    "lognormal": lambda x: (2 * x).exp().clamp(max=6e4),
    "subnormal in float32": lambda x: (x * 100).round() * 2.0**-149,
    "subnormal in float64": lambda x: (x * 100).round() * 2.0**-1074,
    "the whole range of float32": lambda x: x.clamp(-3, 3) / 3 * 3.4e38,
    "the whole range of float64": lambda x: x.clamp(-3, 3) / 3 * 1.79e308,
    "ascending": lambda x: x.sort(0).values,
    "descending": lambda x: x.sort(0, descending=True).values,
    "close to one": lambda x: 1 + x * 1e-12,
}


@pytest.mark.skipif(not VECTORS.is_file(), reason="the test vectors are not beside the project")
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_published_vectors(variant: str) -> None:
    def ap(values: Any, labels: Any, dtype: torch.dtype = torch.float64) -> Tensor:
        return run(
            variant,
            torch.as_tensor(values, dtype=dtype),
            torch.as_tensor(labels, dtype=torch.int8),
        )

    vectors = json.loads(VECTORS.read_text())
    for case in vectors["ap"]:
        ours = ap(np.array(case["scores"])[:, None], [case["labels"]])
        assert float(ours) == np.float32(case["ap"]), case["name"]
    tie = vectors["ap_float32_tie"]
    scores = np.array(tie["scores_f64"])[:, None]
    for dtype, key in ((torch.float32, "32"), (torch.float64, "64")):
        wanted = np.float32(tie[f"ap_if_scores_float{key}"])
        assert float(ap(scores, [tie["labels"]], dtype)) == wanted
    case = vectors["ap_randomstate_1234"]
    state = np.random.RandomState(1234)
    for key in ("ap_a", "ap_b"):
        ours = ap(state.rand(10, 6).T, [case["labels"]])[0]
        np.testing.assert_allclose(ours, case[key], rtol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_to_scikit_learn(shape: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    for n in (2, 3, 64, 65, 500):
        values = SHAPES[shape](torch.randn(n, 3, generator=generator, dtype=torch.float64))
        values = values.to(dtype).nan_to_num()
        labels = random_labels(3, n, generator)
        assert_close_to_sklearn(average_precision(values, labels), values, labels)


@pytest.mark.parametrize("n", [20_000, 70_000])
def test_equal_to_scikit_learn_with_many_rows(n: int) -> None:
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(n, 3, generator=generator)
    values[:, 1] = (values[:, 1] * 1000).round() / 1000
    labels = random_labels(2, n, generator)
    labels[1] = (torch.arange(n) == 77).to(torch.int8)  # one positive
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        typed = values.to(dtype)
        assert_close_to_sklearn(average_precision(typed, labels), typed, labels)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(2, 200), st.integers(1, 40), st.integers(1, 20), st.integers(0, 2**31),
    st.sampled_from(sorted(SHAPES)), st.sampled_from(DTYPES), st.booleans(), st.booleans(),
)  # fmt: skip
def test_backends_agree_bit_for_bit(
    n: int,
    m: int,
    r: int,
    seed: int,
    shape: str,
    dtype: torch.dtype,
    is_weighted: bool,
    neuron_major: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = SHAPES[shape](torch.randn(n, m, generator=generator, dtype=torch.float64)).to(dtype)
    values = values.nan_to_num()
    if neuron_major:
        values = values.T.contiguous().T
    labels = random_labels(r, n, generator)
    weights = None
    if is_weighted:
        high = 3 if seed % 2 else 256
        weights = torch.randint(0, high, (r, n), generator=generator, dtype=torch.uint8)
        weights[:, 0] = weights[:, -1] = 1
    right = run("reference", values, labels, weights)
    for variant in VARIANTS[1:]:
        for threads in (1, 3):
            assert torch.equal(run(variant, values, labels, weights, threads), right)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_long_columns_agree_bit_for_bit(variant: str, shape: str) -> None:
    """Beyond 16,384 rows another sort takes float32, beyond 65,536 another one bfloat16."""
    generator = torch.Generator().manual_seed(5)
    for n, dtype in ((5000, torch.float32), (17_000, torch.float32), (66_000, torch.bfloat16)):
        x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        values = SHAPES[shape](x).to(dtype).nan_to_num()
        labels = random_labels(2, n, generator, share=0.1)
        # The dtype is no matter: in float64 another way leads to the same ranks.
        assert torch.equal(run(variant, values, labels), run("reference", values.double(), labels))


@pytest.mark.parametrize("variant", VARIANTS)
def test_order_of_rows_splits_and_layouts_change_nothing(variant: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(300, 70, generator=generator).round(decimals=1)
    labels = random_labels(5, 300, generator)
    whole = run(variant, values, labels)
    order = torch.randperm(300, generator=generator)
    assert torch.equal(run(variant, values[order], labels[:, order]), whole)
    for threads in (2, 7, 200):
        assert torch.equal(run(variant, values, labels, threads=threads), whole)
    for begin, end in ((0, 1), (1, 33), (33, 70)):
        assert torch.equal(run(variant, values[:, begin:end], labels), whole[:, begin:end])
    assert torch.equal(run(variant, values.T.contiguous().T, labels), whole)
    padded = torch.full((600, 210), float("nan"))
    padded[::2, ::3] = values
    assert torch.equal(run(variant, padded[::2, ::3], labels), whole)
    column = values[:, :1]
    repeated = run(variant, column.expand(-1, 40), labels)
    assert torch.equal(repeated, whole[:, :1].expand(-1, 40))
    if variant == "reference":
        with mock.patch.object(op, "_CHUNK", 1):
            assert torch.equal(run(variant, values, labels), whole)


@pytest.mark.parametrize("variant", VARIANTS)
def test_many_relations_are_counted_in_batches_of_columns(variant: str) -> None:
    """Labels larger than a cache (half a MiB): every group of relations serves several columns."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(1500, 37, generator=generator).round(decimals=2)
    labels = random_labels(1500, 1500, generator)[:1500:7].repeat(7, 1)
    part = run("reference", values, labels[:215])
    assert torch.equal(run(variant, values, labels), part.repeat(7, 1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_repeated_rows(variant: str) -> None:
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(90, 6, generator=generator).round(decimals=1)
    labels = random_labels(4, 90, generator)
    weights = torch.randint(0, 4, (4, 90), generator=generator, dtype=torch.uint8)
    weights[:, 0] = weights[:, -1] = 1
    weighted = run(variant, values, labels, weights)
    for r in range(4):
        rows = torch.arange(90).repeat_interleave(weights[r].long())
        repeated = run(variant, values[rows], labels[r : r + 1, rows])
        assert torch.equal(weighted[r : r + 1], repeated)
    assert_close_to_sklearn(weighted, values, labels, weights)
    ones = torch.ones_like(weights)
    assert torch.equal(run(variant, values, labels, ones), run(variant, values, labels))


@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_is_not_narrowed(variant: str) -> None:
    """Equal in float32, different in float64."""
    values = 1 + torch.arange(8, dtype=torch.float64).unsqueeze(1) * 2.0**-50
    labels = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1]], dtype=torch.int8)
    assert float(run(variant, values, labels)) == 1
    assert float(run(variant, values.float(), labels)) == 1 / 8


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_subnormal_numbers_differ_when_torch_flushes_them(variant: str) -> None:
    values = (torch.arange(1, 5, dtype=torch.int32) * 3).view(torch.float32).unsqueeze(1)
    labels = torch.tensor([[0, 0, 0, 1]], dtype=torch.int8)
    assert torch.set_flush_denormal(True)
    try:
        assert float(run(variant, values, labels)) == 1
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.skipif(not ISAS, reason=STATUS["cpu"].detail)
def test_offsets_beyond_32_bits() -> None:
    """Only the pages of the few values are ever touched."""
    memory = torch.empty(2**31 + 2**21 + 1, dtype=torch.bfloat16)
    values = memory.as_strided((3, 2), (2**20, 2**31))
    values.copy_(torch.tensor([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]]))
    labels = torch.tensor([[1, 0, 0]], dtype=torch.int8)
    assert torch.equal(average_precision(values, labels), torch.tensor([[1 / 3, 1.0]]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_positive_and_empty(variant: str) -> None:
    ones = torch.ones(1, 2, dtype=torch.int8)
    assert run(variant, torch.tensor([[1.0], [2.0]]), ones).tolist() == [[1.0]]
    assert run(variant, torch.tensor([[5.0]]), ones[:, :1]).tolist() == [[1.0]]
    assert run(variant, torch.zeros(2, 0), ones).shape == (1, 0)
    assert run(variant, torch.zeros(2, 3), ones[:0]).shape == (0, 3)


GOOD = torch.arange(6.0).view(3, 2)
LABELS = torch.tensor([[1, 0, -1], [0, 1, 1]], dtype=torch.int8)


def changed(tensor: Tensor, at: tuple[int, int], value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("values", "labels", "weights", "message"),
    [
        (changed(GOOD, (2, 1), float("nan")), LABELS, None,
         r"values must be finite, got nan at \(2, 1\)"),
        (changed(GOOD, (0, 1), float("inf")), LABELS, None,
         r"values must be finite, got inf at \(0, 1\)"),
        (changed(GOOD, (1, 0), -float("inf")).half(), LABELS, None, r"got -inf at \(1, 0\)"),
        (changed(GOOD, (1, 0), float("nan")).double(), LABELS, None, r"got nan at \(1, 0\)"),
        (torch.zeros(3), LABELS, None,
         r"values must be \(N, M\) float32\|bfloat16\|float16\|float64, got \(3,\) torch.float32"),
        (torch.zeros(3, 2, dtype=torch.int64), LABELS, None, r"got \(3, 2\) torch.int64"),
        (torch.zeros(4, 2), LABELS, None,
         r"labels must be \(R, N\) int8 with N=4 \(from values\), got \(2, 3\) torch.int8"),
        (GOOD, LABELS.long(), None, r"labels must be .* int8 .*, got \(2, 3\) torch.int64"),
        (GOOD, LABELS[0], None, r"labels must be \(R, N\)"),
        (GOOD, LABELS * 2, None, r"labels must be 1, 0 or -1, got 2 at \(0, 0\)"),
        (GOOD, LABELS - 1, None, r"labels must be 1, 0 or -1, got -2 at \(0, 2\)"),
        (GOOD, LABELS.clamp(max=0), None,
         "labels must have a positive in every relation, got none in row 0, 1"),
        (GOOD[:0], LABELS[:, :0], None, "labels must have a positive .* got none in row 0, 1"),
        (GOOD, changed(LABELS, (0, 1), -1), None,
         "labels must have a negative in every relation, got none in row 0"),
        (GOOD, LABELS, LABELS[:1].to(torch.uint8),
         r"weights must be \(R, N\) uint8 with R=2 \(from labels\), N=3 \(from values\)"),
        (GOOD, LABELS, LABELS, r"weights must be .* uint8 .*, got \(2, 3\) torch.int8"),
        (GOOD, LABELS, torch.tensor([[0, 1, 1], [1, 1, 1]], dtype=torch.uint8),
         "labels must have a positive of weight > 0 in every relation, got none in row 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_ranked_is_refused(
    variant: str, values: Tensor, labels: Tensor, weights: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=f"average_precision: .*{message}"):
        run(variant, values, labels, weights)


def test_what_is_no_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="values must be a tensor, got ndarray"):
        public_function(np.zeros((3, 2)), LABELS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="labels must be a tensor, got list"):
        public_function(GOOD, [[1, 0, 0]])  # type: ignore[arg-type]


@pytest.mark.skipif(not ISAS, reason=STATUS["cpu"].detail)
def test_an_unknown_isa_is_refused() -> None:
    with pytest.raises(ValueError, match=r"isa must be one of isa_levels\(\), got mmx"):
        run("cpu-mmx", GOOD, LABELS)
