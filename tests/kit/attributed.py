"""Tiny models and the plain float64 computation that the tests of attribution compare with.

`naive_value_scores` and `naive_query_scores` are loops written from the formulas, with all logits
at hand; they read the weights by the families' own names, not through relneuron.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from relneuron.model.stream.linear import Read, Rows
from relneuron.model.stream.norms import Norm
from relneuron.model.stream.parts import Heads, ResidualLayer, ResidualModel, Write
from relneuron.model.stream.trace import Trace

FAMILIES = ("llama", "gpt2")
N_LAYERS, WIDTH, HIDDEN, N_HEADS, N_KV_HEADS, HEAD_DIM, VOCABULARY = 3, 128, 32, 4, 2, 8, 90


def attributed_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A Llama with grouped heads or a GPT-2, its gains, biases and writes of a telling size."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "initializer_range": 0.25,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "llama":
        config = transformers.LlamaConfig(
            **sizes,
            hidden_size=HIDDEN,
            intermediate_size=WIDTH,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=N_HEADS,
            num_key_value_heads=N_KV_HEADS,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
        )
    else:
        config = transformers.GPT2Config(
            **sizes,
            n_embd=HIDDEN,
            n_inner=WIDTH,
            n_layer=N_LAYERS,
            n_head=N_HEADS,
            n_positions=64,
        )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            elif "c_proj" in name:  # GPT-2 makes these small
                parameter.mul_(2.5)
    return model


def sentences(lengths: Sequence[int] = (7, 3, 1, 5), seed: int = 1) -> list[list[int]]:
    """Random token ids of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def targets_of(found: Trace) -> Tensor:
    """A target for each sentence: the model's third choice."""
    return found.logits.argsort(dim=1, descending=True)[:, 2]


# --- the weights, by each family's own names -------------------------------------------------


@dataclass
class Weights:
    """Weights of one layer in float64: rows (.., D) are value vectors and keys."""

    w_down: Tensor  # (F, D)
    w_out: Tensor  # (H * d_h, D)
    gate: Tensor  # (F, D)
    up: Tensor  # (F, D)
    w_value: Tensor  # (H * d_h, D), value heads repeated
    attention_gain: Tensor  # (D,)
    ffn_gain: Tensor  # (D,)


def weights_of(model: Any) -> list[Weights]:
    """Every layer's weights."""
    found = []
    if hasattr(model, "transformer"):
        for block in model.transformer.h:
            found.append(
                Weights(
                    block.mlp.c_proj.weight,
                    block.attn.c_proj.weight,
                    block.mlp.c_fc.weight.T,
                    block.mlp.c_fc.weight.T,
                    block.attn.c_attn.weight.T[-HIDDEN:],
                    block.ln_1.weight,
                    block.ln_2.weight,
                )
            )
    else:
        for layer in model.model.layers:
            value = layer.self_attn.v_proj.weight
            heads = [value[j // 2 * HEAD_DIM :][:HEAD_DIM] for j in range(N_HEADS)]
            found.append(
                Weights(
                    layer.mlp.down_proj.weight.T,
                    layer.self_attn.o_proj.weight.T,
                    layer.mlp.gate_proj.weight,
                    layer.mlp.up_proj.weight,
                    torch.cat(heads),
                    layer.input_layernorm.weight,
                    layer.post_attention_layernorm.weight,
                )
            )
    return [Weights(*(part.detach().double() for part in vars(x).values())) for x in found]


def scale_of(model: Any, y: Tensor) -> Tensor:
    """The final norm's scale of states y (.., D), float64."""
    y = y.double()
    if hasattr(model, "transformer"):
        variance = y.var(-1, correction=0)
        return 1 / (variance + model.config.layer_norm_epsilon).sqrt()
    return 1 / ((y * y).mean(-1) + model.config.rms_norm_eps).sqrt()


def log_p(model: Any, y: Tensor, scale: Tensor, target: int, norm_bias: bool) -> Tensor:
    """log p(target) of states y (M, D) with scales (M,) or (): the logits of all, float64."""
    y = y.double()
    is_gpt2 = hasattr(model, "transformer")
    norm = model.transformer.ln_f if is_gpt2 else model.model.norm
    if is_gpt2:
        y = y - y.mean(-1, keepdim=True)
    normed = y * scale.expand(len(y))[:, None] * norm.weight.detach().double()
    if norm_bias and is_gpt2:
        normed = normed + norm.bias.detach().double()
    logits = normed @ model.lm_head.weight.detach().double().T
    return logits.log_softmax(-1)[:, target]


# --- the scores, in loops --------------------------------------------------------------------


def naive_value_scores(
    model: Any, found: Trace, targets: Tensor, *, own_norm: bool = False, norm_bias: bool = False
) -> dict[str, Tensor]:
    """Imp of every unit by its definition, float64; kinds as in `ValueScores`, NaN at padding."""
    n_sentences, n_tokens = found.mask.shape
    shapes = {
        "ffn_layer": (),
        "attention_layer": (),
        "head": (N_HEADS,),
        "position": (N_HEADS, n_tokens),
        "ffn_neuron": (WIDTH,),
        "attention_neuron": (n_tokens, HIDDEN),
    }
    scores = {
        kind: torch.full((n_sentences, N_LAYERS, *shape), torch.nan, dtype=torch.float64)
        for kind, shape in shapes.items()
    }
    for e in range(n_sentences):
        frozen = scale_of(model, found.h[-1][e, -1])

        def gain(
            x: Tensor, vectors: Tensor, frozen: Tensor = frozen, target: int = int(targets[e])
        ) -> Tensor:
            x, after = x.double()[None], x.double() + vectors.double()
            scales = (scale_of(model, x), scale_of(model, after)) if own_norm else (frozen, frozen)
            before = log_p(model, x, scales[0], target, norm_bias)
            return log_p(model, after, scales[1], target, norm_bias) - before

        for i, weights in enumerate(weights_of(model)):
            h, r = found.h[i][e, -1], found.r[i][e, -1]
            scores["ffn_layer"][e, i] = gain(r, found.ffn[i][e, -1:])
            scores["attention_layer"][e, i] = gain(h, found.attention[i][e, -1:])
            m = found.neurons[i][e, -1].double()
            scores["ffn_neuron"][e, i] = gain(r, m[:, None] * weights.w_down)
            heads = [torch.zeros(HIDDEN, dtype=torch.float64) for _ in range(N_HEADS)]
            for p in range(int(found.n_pad[e]), n_tokens):
                for j in range(N_HEADS):
                    part = slice(j * HEAD_DIM, (j + 1) * HEAD_DIM)
                    alpha = found.weights[i][e, j, p].double()
                    val = found.values[i][e, p, j].double()
                    vectors = alpha * val[:, None] * weights.w_out[part]
                    scores["attention_neuron"][e, i, p, part] = gain(h, vectors)
                    scores["position"][e, i, j, p] = gain(h, vectors.sum(0)[None])
                    heads[j] += vectors.sum(0)
            scores["head"][e, i] = gain(h, torch.stack(heads))
    return scores


def published_top(scores: Tensor, n_pad: Tensor, top: int) -> list[list[tuple[int, int]]]:
    """The best (layer, index) a sentence of scores (E, L, K) or (E, L, T, K), best first.

    As the authors' notebook ranks: enumerated by layer, position and coordinate, sorted ascending
    by a stable sort, reversed. Positions are counted without padding.
    """
    found = []
    for e in range(len(scores)):
        own = scores[e, :, int(n_pad[e]) :] if scores.dim() == 4 else scores[e]
        items = [
            (layer, index) for layer in range(own.shape[0]) for index in range(own[layer].numel())
        ]
        flat = own.reshape(own.shape[0], -1).tolist()
        ranked = sorted(items, key=lambda item: flat[item[0]][item[1]])[::-1]
        found.append(ranked[:top])
    return found


def naive_query_scores(
    model: Any,
    found: Trace,
    units: Any,
    *,
    kind: str,
    n_units: int,
    key: str,
    center: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Q of the components (E, 2 L + 1) and of the FFN neurons (E, L, F), float64, unit by unit.

    The last are the neurons' activations, mean over the units that read them.
    """
    everything = weights_of(model)
    n_sentences = len(found.mask)
    layers = torch.zeros(n_sentences, 2 * N_LAYERS + 1, dtype=torch.float64)
    neurons = torch.zeros(n_sentences, N_LAYERS, WIDTH, dtype=torch.float64)
    centre: Callable[[Tensor], Tensor] = lambda x: x  # noqa: E731
    read: dict[tuple[int, int, int], list[float]] = {}
    if hasattr(model, "transformer") and center:
        centre = lambda x: x - x.mean(-1, keepdim=True)  # noqa: E731
    for e in range(n_sentences):
        for u in range(n_units):
            layer, index = int(units.layer[e, u]), int(units.index[e, u])
            if layer < 0:
                continue
            imp, own = float(units.gain[e, u]), everything[layer]
            if kind == "attention":
                p = int(found.n_pad[e]) + index // HIDDEN
                q = own.w_value[index % HIDDEN] * own.attention_gain
                h = found.h[layer][e, p].double()
            else:
                p = -1
                rows = {"gate": own.gate, "up": own.up, "down": own.w_down}[key]
                q, h = rows[index] * own.ffn_gain, found.r[layer][e, p].double()
            total = float(centre(h) @ q)
            layers[e, 0] += imp * float(centre(found.h[0][e, p].double()) @ q) / total
            for i in range(layer + (kind == "ffn")):
                a = centre(found.attention[i][e, p].double())
                layers[e, 2 * i + 1] += imp * float(a @ q) / total
            for i in range(layer):
                f = centre(found.ffn[i][e, p].double())
                layers[e, 2 * i + 2] += imp * float(f @ q) / total
                for n in range(WIDTH):
                    v = found.neurons[i][e, p, n].double() * everything[i].w_down[n]
                    neurons[e, i, n] += imp * float(centre(v) @ q) / total
                    read.setdefault((e, i, n), []).append(float(found.neurons[i][e, p, n]))
    coefficients = torch.zeros_like(neurons)
    for place, values in read.items():
        coefficients[place] = sum(values) / len(values)
    return layers, neurons, coefficients


# --- a residual stream without a model -------------------------------------------------------


def stream_of_vectors(
    unembed: Tensor,
    gain: Tensor,
    ffn_values: Tensor,
    attention_values: Tensor,
    *,
    n_layers: int = 1,
    key: Tensor | None = None,
    key_gain: Tensor | None = None,
) -> ResidualModel:
    """A float64 residual model of one head with given value vectors (F, D) and (d_h, D).

    All layers are the same; `key` (D,) is the first row of their gate and value maps, read behind
    a norm of `key_gain`. It cannot run, only be scored.
    """
    width, hidden = ffn_values.shape
    head_dim = len(attention_values)

    def linear(rows: Tensor) -> nn.Linear:
        module = nn.Linear(rows.shape[1], rows.shape[0], bias=False, dtype=torch.float64)
        module.weight.data = rows
        return module

    def keys(n: int) -> Read:
        rows = torch.ones(n, hidden, dtype=torch.float64)
        if key is not None:
            rows[0] = key
        return Read(((norm, Rows(linear(rows), (0,), n)),))

    def write(values: Tensor) -> Write:
        module = linear(values.T)
        return Write(module, module, None, 1.0)

    ones = torch.ones(hidden, dtype=torch.float64)
    none = nn.Identity()
    norm = Norm(none, ones if key_gain is None else key_gain, None, False, 1e-6)
    layers = [
        ResidualLayer(
            layer=i,
            path=f"layers.{i}",
            module=none,
            attention=write(attention_values),
            heads=Heads(none, 1, keys(head_dim)),
            ffn=write(ffn_values),
            gate=keys(width),
            up=keys(width),
            mlp=none,
            is_parallel=False,
            order=0,
        )
        for i in range(n_layers)
    ]
    return ResidualModel(
        model=None,
        layers=layers,
        final_norm=Norm(none, gain, None, False, 1e-6),
        n_heads=1,
        head_dim=head_dim,
        no_heads=None,
        width=width,
        hidden=hidden,
        vocabulary=len(unembed),
        is_gated=True,
        centred=False,
        eps=1e-6,
        unembed=unembed * gain,
        offset=None,
    )
