"""Gains in models of many kinds, each neuron against the model itself with that neuron off."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from relneuron.ablation.rows import intervene, off, widths
from relneuron.artifact.files import RelneuronError
from relneuron.methods.gains.scores import query_scores
from relneuron.methods.gains.values import ValueScores, value_scores
from relneuron.model.stream.parts import ResidualModel
from relneuron.model.stream.read import read_residual_model
from relneuron.model.stream.trace import Trace, trace
from relneuron.report.page import write_report
from relneuron.study.pages import PAGES
from tests.kit.attribution_runs import OPTIONS, Attributed, rows_by
from tests.kit.darkened import log_p, state_before, written
from tests.kit.files import read_rows

_SIZES = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LATENT = {
    **{"num_key_value_heads": 4, "head_dim": 4, "first_k_dense_replace": 2, "n_routed_experts": 4},
    **{"q_lora_rank": 12, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6},
    "v_head_dim": 5,
}
_MAMBA = {
    **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1},
    "attn_layer_indices": [1],
}
# What is different in them: (configuration, what it needs beside the sizes, is_parallel).
KINDS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "norms in front and behind": ("Gemma3TextConfig", {}, False),
    "norms behind alone": ("Olmo2Config", {}, False),
    "a soft cap": ("Gemma2Config", {"final_logit_softcapping": 2.0}, False),
    "norms without weights": ("OlmoConfig", {}, False),
    "side by side, one LayerNorm, scaled logits": ("CohereConfig", {"logit_scale": 0.5}, True),
    "side by side, packed by heads, biases": ("GPTNeoXConfig", {}, True),
    "added in place": ("FalconConfig", {}, True),
    "factors": ("GraniteConfig", {"residual_multiplier": 0.3, "logits_scaling": 3.0}, False),
    "latent attention": ("DeepseekV3Config", _LATENT, False),
    "latent attention, factors": ("MiniCPM3Config", _LATENT | {"dim_model_base": 16}, False),
    "no gate, flat tokens": ("OPTConfig", {"ffn_dim": 40, "word_embed_proj_dim": 32}, False),
    "the stream is added inside": ("BloomConfig", {"n_layer": 2, "n_head": 4}, False),
    "no gate, 1 + weight in a LayerNorm": ("NemotronConfig", {}, False),
    "a recurrence, no weights": ("BambaConfig", _MAMBA, False),
    "attention whose heads are subtracted": ("DiffLlamaConfig", {}, False),
}
WITHOUT_HEADS = {"a recurrence, no weights", "attention whose heads are subtracted"}
IDS = [7, 20, 33, 41, 50]


def model_of(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    import transformers

    name, changes, _ = KINDS[kind]
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    sizes = _SIZES | changes
    if name == "FalconConfig":  # it says no head_dim, but has one
        sizes.pop("head_dim")
    config = getattr(transformers, name)(**sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.2, 0.2))
            elif parameter.dim() == 2:
                parameter.normal_(std=0.15)
    return model.to(dtype)


Scored = tuple[str, ResidualModel, Trace, torch.Tensor, ValueScores]


@pytest.fixture(scope="module", params=list(KINDS))
def scored(request: pytest.FixtureRequest) -> Scored:
    residual = read_residual_model(model_of(request.param))
    found = trace(residual, [IDS])
    target = found.logits.argsort(1, descending=True)[:, 2]
    heads = None if residual.no_heads else "exact"
    asked: dict[str, Any] = {"ffn": "exact", "attention": heads, "top": 50, "norm_bias": True}
    return request.param, residual, found, target, value_scores(residual, found, target, **asked)


def test_every_neuron_and_head_has_the_gain_of_what_the_model_adds_with_it(scored: Scored) -> None:
    kind, residual, found, target, ours = scored
    assert bool(residual.no_heads) == (kind in WITHOUT_HEADS)
    assert residual.layers[0].is_parallel == KINDS[kind][2]
    end, own = found.h[-1][0, -1], found.logits[0]
    for layer in residual.layers:
        keeps = {"ffn": 1 - torch.eye(residual.width)}
        if layer.heads is not None:
            off = torch.eye(layer.heads.n).repeat_interleave(residual.head_dim, 1)
            keeps["attention"] = 1 - off
        for part, keep in keeps.items():
            whole = torch.cat([keep, torch.ones_like(keep[:1])])
            outputs = written(residual, layer, part, IDS, whole)
            before = state_before(residual, layer, part, IDS, found.h[layer.layer][0, -1])
            after = before + outputs[-1] - outputs[:-1]
            gain, base = (log_p(residual, y, end, own, int(target)) for y in (after, before[None]))
            scores = ours.ffn_neuron if part == "ffn" else ours.head
            error = (scores[0, layer.layer] - (gain - base)).abs().max()
            # Norms round to float32 in all dtypes.
            assert float(error) < 1e-6 < 1e-2 < float((gain - base).abs().max())


def test_gains_of_layers_add_up_to_the_models_own_log_probability(scored: Scored) -> None:
    _, residual, found, target, ours = scored
    end, own = found.h[-1][0, -1], found.logits[0]
    total = float((ours.ffn_layer + ours.attention_layer).sum())
    first = log_p(residual, found.h[0][:, -1], end, own, int(target))
    last = own.double().log_softmax(0)[int(target)]
    assert abs(total - float(last - first)) < 1e-5


def test_the_largest_are_those_of_all(scored: Scored) -> None:
    _, residual, _, _, ours = scored
    pairs = [("ffn_neuron", ours.ffn_top)]
    pairs += [] if residual.no_heads else [("attention_neuron", ours.attention_top)]
    for name, top in pairs:
        scores = getattr(ours, name)[0].flatten(1)
        want = scores.flatten().sort(descending=True).values[:50]
        torch.testing.assert_close(top.gain[0], want, rtol=0, atol=1e-12)
        places = top.layer[0] * scores.shape[1] + top.index[0]
        torch.testing.assert_close(scores.flatten()[places], want, rtol=0, atol=1e-12)


def test_units_read_all_of_the_stream(scored: Scored) -> None:
    _, residual, found, _, ours = scored
    for kind in ("ffn", "attention"):
        if kind == "attention" and residual.no_heads:
            continue
        units = ours.ffn_top if kind == "ffn" else ours.attention_top
        shares = query_scores(residual, found, units, kind=kind, n_units=50)
        assert abs(float(shares.layer.sum() - units.gain.sum())) < 1e-6
        assert bool(shares.ffn_neuron.any())
        constant = [layer.ffn.constant(scale_of(found, layer.layer)) for layer in residual.layers]
        if not any(part.any() for part in constant):
            left = shares.ffn_neuron.sum(2) - shares.layer[:, 2::2]
            assert float(left.abs().max()) < 1e-6


def scale_of(found: Trace, layer: int) -> torch.Tensor:
    scale = found.ffn_scale[layer]
    return torch.ones(1, len(IDS), dtype=torch.float64) if scale is None else scale


@pytest.mark.parametrize("kind", list(KINDS))
def test_padding_changes_no_number(kind: str) -> None:
    residual = read_residual_model(model_of(kind, torch.float32))
    assert residual.pads and bool(residual.no_heads) == (kind in WITHOUT_HEADS)
    heads = None if residual.no_heads else "exact"
    asked: dict[str, Any] = {"ffn": "exact", "attention": heads}
    together = trace(residual, [IDS[:2], IDS])
    target = together.logits.argmax(1)
    both = value_scores(residual, together, target, **asked)
    alone = value_scores(residual, trace(residual, [IDS[:2]]), target[:1], **asked)
    for name in ("ffn_layer", "attention_layer", "ffn_neuron", "head"):
        if getattr(alone, name) is not None:
            ours, want = getattr(both, name)[0], getattr(alone, name)[0]
            torch.testing.assert_close(ours, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", list(KINDS))
def test_half_precision_is_proved_as_well(kind: str, dtype: torch.dtype) -> None:
    residual = read_residual_model(model_of(kind, dtype))
    assert bool(residual.no_heads) == (kind in WITHOUT_HEADS)
    found = trace(residual, [IDS])
    ours = value_scores(residual, found, found.logits.argmax(1), ffn="exact", attention=None)
    wide = read_residual_model(model_of(kind, dtype).double())
    want = value_scores(
        wide, trace(wide, [IDS]), found.logits.argmax(1), ffn="exact", attention=None
    )
    error = (ours.ffn_neuron.double() - want.ffn_neuron).abs().max()
    assert float(error) < 40 * torch.finfo(dtype).eps * float(want.ffn_neuron.abs().max())


def columns_zeroed(residual: ResidualModel, layer: int, part: str, places: list[int]) -> Any:
    """A copy of the model without these inputs of a part's last map (GPT-2's Conv1D: rows)."""
    model = copy.deepcopy(residual.model)
    names = {id(module): name for name, module in residual.model.named_modules()}
    map_ = model.get_submodule(names[id(getattr(residual.layers[layer], part).linear)])
    with torch.no_grad():
        map_.weight[:, places] = 0
    return model


@pytest.mark.parametrize("kind", list(KINDS))
def test_neurons_off_in_rows_of_a_batch_are_those_of_weights_at_zero(kind: str) -> None:
    residual = read_residual_model(model_of(kind, torch.float32))
    lines = [IDS, IDS[:3], IDS[::-1]]
    offs, models = [off()] * 3, [residual.model]
    conditions = [offs]
    for part, width in widths(residual).items():
        for layer in (0, 1):
            places = [3, 7, width - 1] if width else []
            one = {part: [layer * width + place for place in places]}
            conditions.append([off(**one)] * 3)
            models.append(columns_zeroed(residual, layer, part, places))
    found = intervene(residual, lines, [5, 6, 7], conditions, batch_tokens=200)
    for c, model in enumerate(models):
        for s, line in enumerate(lines):
            with torch.no_grad():
                logits = model(torch.tensor([line]), use_cache=False).logits[0, -1].double()
            want = float(logits.log_softmax(0)[5 + s])
            assert abs(found.logprob[c, s] - want) < 1e-5
    assert len({tuple(row) for row in found.logprob.round(6).tolist()}) >= 3


def test_a_model_without_heads_is_attributed_and_says_what_is_left_out(tmp_path: Path) -> None:
    run = Attributed("llama", tmp_path, model=model_of("attention whose heads are subtracted"))
    with pytest.raises(RelneuronError, match="no scores of head, position, attention_neu") as error:
        run.attribute(tmp_path / "out")
    assert "piece of a linear map" in error.value.cause
    words = error.value.fix.removeprefix("use ").split()
    assert (words[0], words[2], words[3]) == ("--kinds", "--query-of", "ffn")
    options = replace(OPTIONS, kinds=tuple(words[1].split(",")), query_of="ffn")
    out = run.attribute(tmp_path / "out", options)
    rows = rows_by(out / "attributions.csv", "kind")
    assert set(rows) == {(kind,) for kind in options.kinds}
    conditions = {row["condition"] for row in read_rows(out / "interventions.csv")}
    assert {"clean", "value", "query", "log_prob_gain"} <= conditions
    assert not any("head" in name for name in conditions)
    residual = read_residual_model(run.model)
    scores = value_scores(
        residual, trace(residual, run.ids), torch.tensor(run.targets), ffn="exact", attention=None
    )
    best = float(scores.ffn_neuron[0].max())
    assert abs(float(rows["ffn_neuron",][0]["score"]) - best) < 2e-5
    write_report(out, tmp_path / "report.html", PAGES)
    text = (tmp_path / "report.html").read_text()
    assert "Value neurons and query neurons off" in text and "Attention heads off" not in text
