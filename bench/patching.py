"""Patched text of a batch against the published way: one prompt at a time, hooks, two KV caches.

    PYTHONPATH=. python -m bench.patching [--model DIR --donor DIR] [--prompts N] [-o FILE.csv]

Every contestant continues the same prompts of different lengths, greedily, with the donor's
products of one set of neurons at every token (arXiv 2406.14144), in alternating rounds of one run:

- `relneuron`: the evaluator of `relneuron generate --mode patch`;
- `loop, batch 1`: hooks on the down maps of both models, prompt by prompt, each model with its own
  cache: what the method's published code does;
- `loop, batched`: the same hooks, all prompts padded in one batch: the strongest way that we know
  to write it with the library alone.

All must give the same tokens, or the run ends. The default models are random, of the demo's
tokenizer; the donor is the first one with other numbers added to its weights.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from bench.ablation import race
from bench.rows import add_rows
from relneuron.ablation.conditions import Ablation
from relneuron.ablation.continuer import Continuer
from relneuron.ablation.evaluate import Evaluator, How
from relneuron.ablation.exchange import PRODUCTS
from relneuron.ablation.options import GenerateOptions
from relneuron.ablation.said import Row
from relneuron.artifact.effects import Condition
from relneuron.artifact.journal import Journal
from relneuron.artifact.neurons import Shape
from relneuron.bench.machine import where
from relneuron.demo import CHECKPOINT
from relneuron.model.ask import cache_of
from relneuron.model.batches import pad
from relneuron.model.load import load_model, load_tokenizer
from relneuron.model.mlps.shape import model_shape
from relneuron.model.pair import Pair, pair_of
from relneuron.model.paired import Paired
from relneuron.model.questions import Questions

Downs = Sequence[nn.Module]  # of each layer the linear map that reads the products
Chosen = Mapping[int, Sequence[int]]  # of layers the numbers of the neurons
BATCH_TOKENS = 2**20  # as many as all prompts have: one batch
Choose = Callable[[Tensor, list[list[int]]], list[int]]


@torch.no_grad()
def patched_loop(
    a: Any,
    b: Any,
    downs: tuple[Downs, Downs],
    chosen: Chosen,
    prompts: Sequence[Sequence[int]],
    choose: Choose,
    n_tokens: int,
    ends: Sequence[int] = (),
) -> list[list[int]]:
    """The tokens that A says with B's products of the chosen neurons, up to one of `ends`.

    In each step B runs and its products are kept, then A with them in the place of its own.
    `choose` takes the logits (b, V) float32 and all tokens before. A batch of several prompts is
    padded on the left, and goes on until all have ended.
    """
    kept: dict[int, Tensor] = {}
    caches: list[dict[str, Any]] = [{}, {}]
    tokens, mask = pad(prompts, torch.device("cpu"))
    made = [list(prompt) for prompt in prompts]
    with ExitStack() as stack:
        for layer, index in chosen.items():

            def keep(_m: Any, inputs: Any, layer: int = layer, index: Any = index) -> None:
                kept[layer] = inputs[0][..., index]

            def put(_m: Any, inputs: Any, layer: int = layer, index: Any = index) -> Any:
                new = inputs[0].clone()
                new[..., index] = kept[layer]
                return (new,)

            stack.callback(downs[1][layer].register_forward_pre_hook(keep).remove)
            stack.callback(downs[0][layer].register_forward_pre_hook(put).remove)
        for _ in range(n_tokens):
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            given = {"attention_mask": mask, "position_ids": places, "use_cache": True}
            other = b(tokens, **given, **caches[1])
            own = a(tokens, **given, **caches[0])
            caches = [cache_of(own), cache_of(other)]
            next_ones = choose(own.logits[:, -1].float(), made)
            made = [[*line, token] for line, token in zip(made, next_ones, strict=True)]
            if all({*line[len(p) :]} & {*ends} for line, p in zip(made, prompts, strict=True)):
                break
            tokens = torch.tensor(next_ones)[:, None]
            mask = torch.cat([mask, torch.ones_like(tokens)], 1)
    return [_up_to(line[len(p) :], ends) for line, p in zip(made, prompts, strict=True)]


def _up_to(made: list[int], ends: Sequence[int]) -> list[int]:
    n = next((i for i, token in enumerate(made) if token in ends), len(made))
    return made[:n]


def most_probable(logits: Tensor, made: list[list[int]]) -> list[int]:
    found: list[int] = logits.argmax(-1).tolist()
    return found


def patched_together(
    pair: Pair, chosen: Chosen, prompts: Sequence[Sequence[int]], n_tokens: int
) -> list[list[int]]:
    """All prompts in one batch, by the parts that `relneuron generate` is made of."""
    decoding = GenerateOptions(
        max_new_tokens=n_tokens,
        repetition_penalty=1.0,
        stop=(),
        mode="patch",
        donor="b",
        off=("donor",),
    )
    shape = model_shape(pair.mlps[0])
    neurons = [(layer, PRODUCTS[0], i) for layer, some in chosen.items() for i in some]
    places = Shape.of(shape).places(sorted(neurons))
    plan = [Ablation(Condition("set", "set", n_neurons=len(places)), places, range(len(prompts)))]
    model, questions = Paired(pair), Questions([], [list(p) for p in prompts], [])
    continuer = Continuer(model, pair.tokenizer, decoding)

    def ask(rows: list[int], mark: Any) -> list[Any]:
        return continuer.write(questions, rows, mark)

    with tempfile.TemporaryDirectory() as folder:
        journal, how = Journal(Path(folder) / "journal", {}), How("patch", model=model)
        evaluator = Evaluator(continuer, pair.mlps[0], plan, journal, how, BATCH_TOKENS)
        rows = [Row(0, i) for i in range(len(prompts))]
        lengths = [len(ids) + n_tokens for ids in prompts]
        found = evaluator.run("texts", rows, lengths, ask, lambda n: None)
    return [found[row] for row in rows]


# --- the race --------------------------------------------------------------------------------


def make_model(tokenizer: Any, layers: int, width: int, hidden: int) -> Any:
    """A random Llama whose texts differ from prompt to prompt."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def moved(model: Any, scale: float = 0.02) -> Any:
    """A copy of a model with other weights."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    for weight in other.parameters():
        weight.data += scale * torch.randn(weight.shape, generator=generator)
    return other


def prompts_of(vocabulary: int, n: int, longest: int) -> list[list[int]]:
    """Prompts of 1 to `longest` tokens, in an order that is drawn."""
    rng = random.Random(0)
    lengths = [1 + i * longest // n for i in range(n)]
    rng.shuffle(lengths)
    return [[rng.randrange(3, vocabulary) for _ in range(length)] for length in lengths]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", help="a model folder; default: a random model")
    add("--donor", help="the folder of the model whose values it gets; default: it, moved")
    add("--layers", type=int, default=4, help="of the random model")
    add("--width", type=int, default=1024, help="its neurons in each layer")
    add("--hidden", type=int, default=256, help="its hidden size")
    add("--prompts", type=int, default=40)
    add("--longest", type=int, default=60, help="tokens of the longest prompt")
    add("--tokens", type=int, default=64, help="new tokens of each prompt")
    add("--share", type=float, default=0.05, help="of the neurons of each layer that are patched")
    add("--rounds", type=int, default=3)
    add("-o", "--output", type=Path, metavar="FILE.csv", help="add rows to this file")
    options = parser.parse_args(arguments)
    tokenizer = load_tokenizer(options.model or str(CHECKPOINT))
    sizes = (options.layers, options.width, options.hidden)
    a = load_model(options.model) if options.model else make_model(tokenizer, *sizes)
    pair = pair_of(a, load_model(options.donor) if options.donor else moved(a), tokenizer)
    shape = model_shape(pair.mlps[0])
    n_chosen, rng = round(options.share * shape["width"]), random.Random(0)
    chosen = {mlp.layer: sorted(rng.sample(range(mlp.width), n_chosen)) for mlp in pair.mlps[0]}
    prompts = prompts_of(len(tokenizer), options.prompts, options.longest)
    downs = tuple([mlp.product.module for mlp in own] for own in pair.mlps)
    # An end is what our text ends at, too.
    ends = sorted(Continuer(a, tokenizer, GenerateOptions())._ends)

    def loop(batches: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
        asked = (chosen, most_probable, options.tokens, ends)
        found = []
        for batch in batches:
            found += patched_loop(pair.a, pair.b, (downs[0], downs[1]), asked[0], batch, *asked[1:])
        return found

    n = options.tokens
    seconds = race(
        {
            "relneuron": lambda: patched_together(pair, chosen, prompts, n),
            "loop, batched": lambda: loop([prompts]),
            "loop, batch 1": lambda: loop([[prompt] for prompt in prompts]),
        },
        options.rounds,
    )
    rows = []
    for name, times in seconds.items():
        # A ratio is that of one round, so a machine that is busy for a while does not bend it.
        ratios = [t / own for t, own in zip(times, seconds["relneuron"], strict=True)]
        row = {
            "contestant": name,
            "prompts": len(prompts),
            "new_tokens": n,
            "patched": n_chosen * len(chosen),
            "median_s": round(median(times), 4),
            "ratio": round(median(ratios), 3),
        }
        rows.append({**row, **shape, **where("cpu")})
        print(f"{name:<14} {median(times):8.3f} s  {median(ratios):7.2f} x ours")
    add_rows(options.output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
