"""What every test shares: the Triton interpreter on a CPU, tiny models of many families, facts.

No test needs a network, a GPU or a model that is not in the repository.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Threads add in another order: what is compared bit by bit has one, here and in child processes.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from filelock import FileLock

torch.set_num_threads(1)
# Each process that a test starts would compile all of our modules again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# No test cuts the power, and waiting for the disk is a third of the time that they take.
os.fsync = lambda handle: None  # type: ignore[assignment]
# A shell has what it starts in the background deaf to Ctrl-C, and all that this starts, too.
is_deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
if is_deaf and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, later

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

_SIZE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Family -> configuration class and what it needs beside the sizes.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma2": ("Gemma2Config", {}),
    "gemma3": ("Gemma3TextConfig", {}),
    "phi3": ("Phi3Config", {}),
    "glm4": ("Glm4Config", {}),
    "olmo2": ("Olmo2Config", {}),
    "granite": ("GraniteConfig", {}),
}


# Files whose tests take more than eight seconds on one core; `make check` leaves them out.
SLOW = {
    "ablation": "evaluate expertise facts harness modes pictures sampled",
    "analyses": "beside_study page",
    "artifact": "files integrity integrity_crash",
    "bench": "offline zoo",
    "cli": "corpus corpus_input errors main",
    "methods/contrast": "contrast",
    "methods/counts": "batches count in_parts page pictured",
    "methods/gains": "attribute_resume kinds page",
    "methods/gradients": "edit page planted",
    "model": "count_experts devices find_experts gradients patch patch_experts pictures values",
    "ops/swiglu_stats": "bits cases triton",
    "ops": "average_precision average_precision_triton fallbacks launches",
    "report": "page pages",
    "study": "memory serve",
    "testing": "contract",
    "texts": "polish tokens_study",
}
# A test of these may take minutes: begun at the end, it would hold all others up.
FIRST = ("fuzz/test_fuzz.py", "ptx/test_kernels.py", "test_wheel.py", "bench/test_offline.py")
_FIRST = {f"tests/{name}" for name in FIRST}
_SLOW = {f"tests/{room}/test_{name}.py" for room, names in SLOW.items() for name in names.split()}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {item: item.path.relative_to(ROOT).as_posix() for item in items}
    for item, place in places.items():
        if place in _SLOW:
            item.add_marker("slow")
    items.sort(key=lambda item: places[item] not in _FIRST)


def tiny_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model of a family with 3 layers, F = 48, D = 32, in eval mode."""
    import transformers

    name, extra = FAMILIES[family]
    config = getattr(transformers, name)(**(_SIZE | extra | changes))
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family_model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


@pytest.fixture
def llama() -> Any:
    return tiny_model("llama")


@pytest.fixture
def relneuron(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in this process; gives its exit code, output and errors."""
    from tests.kit.corpus_commands import caller

    return caller(capsys)


@pytest.fixture(scope="session")
def fact_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_facts(tmp_path_factory.mktemp("facts"))


def write_facts(folder: Path) -> Path:
    """Three small relations over the same subjects, one with a second language."""
    subjects = [f"Person{i}" for i in range(24)]
    for number, (stem, verb, answers) in enumerate(
        [
            ("likes_fruit", "eats", ["apple", "plum", "pear"]),
            ("lives_in", "lives in", ["Rome", "Oslo", "Bern", "Lima"]),
            ("works_as", "works as a", ["baker", "pilot"]),
        ]
    ):
        data: dict[str, Any] = {
            "name": stem.replace("_", " "),
            "prompt_templates": [f"{{}} {verb}"],
            "prompt_templates_zs": [f"Everybody knows that {{}} {verb}", f"{{}} {verb}"],
            "samples": [
                {"subject": s, "object": answers[(i * (number + 2)) % len(answers)]}
                for i, s in enumerate(subjects)
            ],
        }
        if stem == "lives_in":
            data["languages"] = {
                "de": {"prompt_templates": ["{} wohnt in"], "entities": {"Rome": "Rom"}}
            }
        (folder / f"{stem}.json").write_text(json.dumps(data))
    return folder


def shared_folder(
    factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]
) -> Path:
    """A folder of the session that is made once, whichever of xdist's processes comes first."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(folder.with_suffix(".lock")):
        if not folder.with_suffix(".made").exists():
            folder.mkdir()
            make(folder)
            folder.with_suffix(".made").touch()
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, fact_folder: Path) -> Path:
    return shared_folder(tmp_path_factory, "model", lambda path: train_model(path, fact_folder))


def train_model(folder: Path, facts: Path, config: str = "LlamaConfig", **changes: Any) -> Path:
    """A tiny model with its own byte-level BPE tokenizer, trained for seconds on the facts."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from relneuron.texts.facts import read_relations

    texts = [
        f"{template.replace('{}', fact.subject)} {fact.object}"
        for relation in read_relations(facts)
        for template in (*relation.templates.main, *relation.templates.alternative)
        for fact in relation.facts
    ]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        **_SIZE,
        "vocab_size": raw.get_vocab_size(),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "num_hidden_layers": 2,
        **changes,
    }
    made = getattr(transformers, config)(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(made)
    lines = [tokenizer(text + "</s>")["input_ids"] for text in texts]
    longest = max(map(len, lines))
    labels = torch.tensor([line + [-100] * (longest - len(line)) for line in lines])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(input_ids=labels.clamp(min=0), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
