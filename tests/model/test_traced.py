"""What a model without numbers says of itself: the same as the model with its weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from relneuron.model.ask import cache_of
from relneuron.model.batches import takes_keep
from relneuron.model.mlps.find import find_mlps
from relneuron.model.mlps.shape import model_shape
from relneuron.model.plan import meta_model
from relneuron.model.traced import Costs, traced
from relneuron.model.widths import told_shape
from tests.conftest import FAMILIES, ROOT, tiny_model
from tests.kit import experts

MIXTURES = ("deepseek", "gpt_oss", "mixtral", "qwen3")
NAMES = (*FAMILIES, *(f"{name} experts" for name in MIXTURES), "gpt2", "neox")


def model_of(name: str) -> Any:
    import transformers as hf

    family, _, kind = name.partition(" ")
    if kind:
        return experts.expert_model(family)
    if family == "gpt2":
        config: Any = hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=96, n_positions=64)
    elif family == "neox":
        config = hf.GPTNeoXConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=96,
        )
    else:
        return tiny_model(family)
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", NAMES)
def test_operations_are_those_that_torch_counts(name: str, tmp_path: Path) -> None:
    """Of a forward with its weights, eager attention; of the shape all that a file says."""
    model = model_of(name)
    model.config.save_pretrained(tmp_path)
    model.set_attn_implementation("eager")
    if name.endswith("experts"):  # torch does not count grouped products
        model.set_experts_implementation("batched_mm")
    ids = torch.ones(3, 11, dtype=torch.int64)
    keep: Any = {"logits_to_keep": 2} if takes_keep(model) else {}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=ids, **keep)
    dry = meta_model(str(tmp_path), None, "float32")
    n = 2 if keep else 11
    assert Costs.of(dry).flops(3, 11, logits=n) == counter.get_total_flops() > 0
    assert told_shape(dry) == model_shape(find_mlps(model))


def test_a_step_with_a_cache_costs_what_torch_counts(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    model.set_attn_implementation("eager")
    ids, mask = torch.ones(2, 9, dtype=torch.int64), torch.ones(2, 10, dtype=torch.int64)
    with torch.no_grad():
        cache = cache_of(model(input_ids=ids, attention_mask=mask[:, :9], use_cache=True))
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids[:, :1], attention_mask=mask, **cache)
    costs = Costs.of(meta_model(str(tmp_path), None, "float32"))
    assert costs.flops(2, 1, keys=10) == counter.get_total_flops()


def test_linear_maps_are_two_operations_a_weight_and_token(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    costs = Costs.of(meta_model(str(tmp_path), None, "float32"))
    layers = model.model.layers
    weights = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
    heads = model.config.num_attention_heads * model.config.head_dim
    assert costs.token == 2 * weights and costs.pair == 4 * heads * len(layers)
    assert costs.logit == 2 * model.lm_head.weight.numel()


def test_held_bytes_are_those_that_the_allocator_sees(tmp_path: Path) -> None:
    """Of a chain of maps: an input, an output, and what stands between, as long as it is needed."""
    from torch import nn

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(8, 64, bias=False), nn.Linear(64, 8, bias=False)
            self.embed = nn.Embedding(10, 8)

        def forward(self, input_ids: Any, use_cache: bool, **_: Any) -> Any:
            x = self.embed(input_ids)  # (2, 5, 8)
            y = self.wide(x)  # (2, 5, 64)
            z = torch.relu(y)  # the most: x, y, z
            del y
            return self.narrow(z)

    with torch.device("meta"):
        chain = Chain()
    # The ids, the mask and the places are int64, and the sum of the mask that these are made of.
    ids = 3 * 8 * 10
    found = traced(chain, 2, 5, cache=False)
    assert found.peak_bytes == ids + 4 * 10 * (8 + 64 + 64)
    # Malloc holds as much, but for the pages that it takes at a time.
    assert 0 <= found.kept_bytes - found.peak_bytes < 1 << 16
    # What a patch looks at stays beside the input of a map: two more as large as z.
    more = traced(chain, 2, 5, cache=False, held={chain.narrow: 2})
    assert more.peak_bytes == ids + 4 * 10 * (8 + 3 * 64 + 8)


def test_answers_are_chosen_from_probabilities_and_one_more_token(tmp_path: Path) -> None:
    """Of a wide vocabulary: the logits, the log-probabilities; of what is read those of all."""
    model = tiny_model("gemma2", vocab_size=4096)
    model.config.save_pretrained(tmp_path)
    dry = meta_model(str(tmp_path), None, "float32")
    plain = traced(dry, 8, 6).peak_bytes
    logits = 4 * 8 * 4096  # of a column
    assert plain == pytest.approx(2 * logits, rel=0.3)  # with a cap, which is a copy
    assert traced(dry, 8, 6, then="answers").peak_bytes == pytest.approx(3 * logits, rel=0.3)
    assert traced(dry, 8, 6, n_logits=0, then="scores").peak_bytes >= 2 * 5 * logits


PLAN = """
import sys
from relneuron.artifact.memory import peak_bytes
from relneuron.model.plan import meta_model
from relneuron.model.traced import Costs, traced
from relneuron.model.widths import told_shape
model = meta_model(sys.argv[1], None, "bfloat16")
costs, shape, found = Costs.of(model), told_shape(model), traced(model, 64, 64)
print(costs.flops(1, 1, logits=0), shape["width"], found.peak_bytes, peak_bytes())
"""


def test_70b_is_planned_within_2_gib(tmp_path: Path) -> None:
    import transformers

    transformers.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    ).save_pretrained(tmp_path)

    done = subprocess.run(
        [sys.executable, "-c", PLAN, str(tmp_path)], check=True, capture_output=True, cwd=ROOT
    )
    n_flops, width, peak, most = map(int, done.stdout.split())
    layers = 80 * (8192 * (8192 + 2 * 1024 + 8192) + 3 * 8192 * 28672)
    assert n_flops == 2 * layers + 4 * 8192 * 80
    assert width == 28672 and peak > 2 * 64 * 64 * 28672 * 3
    assert most < 2 << 30
