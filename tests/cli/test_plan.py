"""`relneuron plan` and --dry-run against what the commands then do: tokens, batches, files, memory.

Five kinds of models, each with a tokenizer of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from relneuron.ablation import asking
from relneuron.artifact.memory import status_bytes
from relneuron.artifact.planned import Planned
from relneuron.artifact.stage import load
from relneuron.cli import flags
from relneuron.cli.main import stages
from relneuron.cli.plan import DryOptions, report
from relneuron.methods import attributions
from relneuron.methods.counts.counter import FIRST_TIMED, next_timed
from relneuron.model.batches import Budget
from tests.conftest import ROOT, shared_folder, train_model
from tests.kit.corpus_commands import call, check_refused, written

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "gpt2": ("GPT2Config", {"n_inner": 48}),
    "phi3": ("Phi3Config", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": ("Gemma2Config", {}),
}


@pytest.fixture(scope="module", params=MODELS)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, fact_folder: Path
) -> Path:
    config, changes = MODELS[request.param]
    name = f"planned-{request.param}"
    return shared_folder(
        tmp_path_factory, name, lambda path: train_model(path, fact_folder, config, **changes)
    )


@pytest.fixture(scope="module")
def prompts(fact_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    assert call("prompts", fact_folder, "-o", path, "--eva", 8) == 0
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("texts")
    for name, n in (("en", 60), ("de", 40)):
        lines = [f"Person{i} lives in Rome and eats a plum, as {name} says" for i in range(n)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return [f"{name}={folder / f'{name}.txt'}" for name in ("en", "de")]


def planned(*words: object) -> list[Planned]:
    """What a command would take; nothing is written, no weight is read."""
    found: list[Planned] = []

    def keep(plans: list[Planned], options: Any) -> Iterator[Any]:
        found.extend(plans)
        return iter(())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags, "report", keep)
        assert call("plan", *words) == 0, words
    return found


@contextmanager
def forwarded(vocabulary: int) -> Iterator[list[tuple[int, int]]]:
    """Rows and tokens of every forward of the model within the batches of a stage."""
    seen: list[tuple[int, int]] = []
    inside, plain = [False], Budget.attempt

    def attempt(self: Budget, *args: Any) -> Any:
        inside[0] = True
        try:
            return plain(self, *args)
        finally:
            inside[0] = False

    embed = nn.Embedding.forward

    def see(module: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        if inside[0] and module.num_embeddings == vocabulary:
            seen.append((ids.shape[0], ids.shape[1]))
        return embed(module, ids)

    # No hook: a patched model refuses those that it would pass over.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Budget, "attempt", attempt)
        patch.setattr(nn.Embedding, "forward", see)
        yield seen


def vocabulary_of(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text())["vocab_size"])


def check(plan: Planned, batch_plan: dict[str, Any], folder: Path, within: float = 0.1) -> None:
    """The plan says what the manifest does, and of each file about its size."""
    told = {"batches": plan.batches, "tokens": plan.tokens, "padded_tokens": plan.padded}
    assert {name: batch_plan[name] for name in told} == told
    sizes = {name: n for name, n in plan.files.items() if n is not None}
    assert sizes
    for name, size in sizes.items():
        real = (folder / name).stat().st_size
        allowed = 0 if name.endswith((".safetensors", ".jsonl")) else within * real + 120
        assert abs(size - real) <= allowed, (name, size, real)
    real = sum((folder / name).stat().st_size for name in sizes)
    assert abs(plan.disk - real) <= within * real


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def test_record_does_what_its_plan_says(model: Path, prompts: Path, tmp_path: Path) -> None:
    words = ["record", model, prompts, "-o", tmp_path / "r", "--batch-tokens", 200]
    [plan] = planned(*words)
    assert not (tmp_path / "r").exists()
    with forwarded(vocabulary_of(model)) as seen:
        assert call(*words, "--quiet") == 0
    check(plan, manifest(tmp_path / "r")["batch_plan"], tmp_path / "r", 0.15)
    assert sum(n * t for n, t in seen if t > 1) == plan.padded
    single = sum(n for n, t in seen if t == 1)
    assert plan.steps <= single <= plan.steps + plan.more
    assert sum(n for n, *_ in plan.forwards) == 2 * plan.batches
    described = manifest(tmp_path / "r")["model"]
    assert plan.layers == described["layers"]
    responses = manifest(tmp_path / "r")["memory"]["responses_on_disk_bytes"]
    assert plan.host["responses, of the disk"] == responses
    assert responses == 4 * plan.reads["recorded"] * sum(plan.neurons.values())


def test_count_does_what_its_plan_says(model: Path, corpus: list[str], tmp_path: Path) -> None:
    words = ["count", model, *corpus, "-o", tmp_path / "c", "--window", 16, "--workers", 1]
    words += ["--batch-tokens", 100, "--moments", "--histogram"]
    [plan] = planned(*words)
    assert not (tmp_path / "c").exists()
    if "mixtral" in model.name:
        words.remove("--histogram")  # which experts have none of
        [plan] = planned(*words)
    with forwarded(vocabulary_of(model)) as seen:
        assert call(*words, "--quiet") == 0
    check(plan, manifest(tmp_path / "c")["batch_plan"], tmp_path / "c")
    timed, due = 0, FIRST_TIMED
    while due <= plan.batches:
        timed, due = timed + 1, next_timed(due)
    # Besides the batches those that are timed, and of a histogram those of a sample: here of all.
    assert len(seen) >= plan.batches + timed
    assert sum(n for n, *_ in plan.forwards) == len(seen)


def test_shards_have_their_part(model: Path, corpus: list[str], tmp_path: Path) -> None:
    words = ["count", model, *corpus, "--window", 16, "--workers", 1, "--batch-tokens", 100]
    [whole] = planned(*words, "-o", tmp_path / "c")
    parts = [planned(*words, "-o", tmp_path / "c", "--shard", f"{k}/3")[0] for k in (1, 2, 3)]
    for name in ("batches", "tokens", "padded"):
        assert sum(getattr(part, name) for part in parts) == getattr(whole, name)
    assert call(*words, "-o", tmp_path / "c", "--shard", "2/3", "--quiet") == 0
    check(parts[1], manifest(tmp_path / "c")["batch_plan"], tmp_path / "c")


def test_attribute_does_what_its_plan_says(model: Path, prompts: Path, tmp_path: Path) -> None:
    words = ["attribute", model, prompts, "-o", tmp_path / "a", "--splits", "eva"]
    words += ["--batch-tokens", 150, "--no-compare"]
    if "gpt2" in model.name or "gemma2" in model.name:
        words += ["--kinds", "ffn_layer,ffn_neuron"]
    [plan] = planned(*words)
    with forwarded(vocabulary_of(model)) as seen:
        assert call(*words, "--quiet") == 0
    stage = manifest(tmp_path / "a")["stages"]["attribute"]
    check(plan, stage["batch_plan"], tmp_path / "a", 0.15)
    assert sum(n * t for n, t in seen) == plan.padded


@pytest.mark.parametrize("method", ["ig", "relevance"])
def test_gradients_have_the_batches_of_their_plan(
    model: Path, prompts: Path, tmp_path: Path, method: str, relneuron: Any
) -> None:
    words = ["attribute", model, prompts, "-o", tmp_path / "g", "--splits", "eva"]
    words += [
        "--batch-tokens",
        300,
        "--method",
        method,
        *(["--steps", 3] if method == "ig" else []),
    ]
    if "mixtral" in model.name:
        cause = "which of them a token goes to has no gradient"
        check_refused(relneuron, tmp_path, cause, "plan", *words)
        check_refused(relneuron, tmp_path, cause, *words)
        return
    [plan] = planned(*words)
    assert call(*words, "--quiet") == 0
    stage = manifest(tmp_path / "g")["stages"][f"attribute_{method}"]
    check(plan, stage["batch_plan"], tmp_path / "g", 0.2)


@pytest.fixture(scope="module")
def recorded(model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded") / "r"
    few = ["--top", 6, "--permutations", 2, "--bootstrap", 2, "--noise", 0, "--quiet"]
    assert call("record", model, prompts, "-o", folder, "--quiet") == 0
    assert call("identify", folder, "-o", folder / "neurons.json", *few) == 0
    return folder


@pytest.mark.filterwarnings("ignore:.*its set has no neuron", "ignore:.* left out. no scores")
def test_ablate_does_what_its_plan_says(
    model: Path, recorded: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each row is computed from its tokens on, and no row of a prompt stands for others."""
    monkeypatch.setattr(asking, "find_spared", lambda *_: None)
    out = tmp_path / "e" / "effects.csv"
    words = ["ablate", model, recorded / "neurons.json", prompts, "-o", out]
    words += ["--random-seeds", 2, "--batch-tokens", 300, "--analyses", "sizes,sites,perplexity"]
    words += ["--sizes", "2,6,9"]
    [plan] = planned(*words)
    assert not out.parent.exists()
    with forwarded(vocabulary_of(model)) as seen:
        assert call(*words, "--quiet") == 0
    stage = manifest(out.parent)["stages"]["ablate"]
    check(plan, stage["batch_plan"], out.parent, 0.15)
    assert stage["conditions"] == plan.reads["conditions"]
    assert stage["answers"] == plan.reads["answers"]
    whole = sum(n * t for n, t in seen if t > 1)
    more = sum(n for n, t in seen if t == 1)
    assert plan.padded <= whole + plan.more and whole <= plan.padded + plan.more
    assert more <= plan.more


@pytest.mark.filterwarnings("ignore:.*its set has no neuron")
def test_nll_does_what_its_plan_says(
    model: Path, recorded: Path, corpus: list[str], tmp_path: Path
) -> None:
    words = ["nll", model, recorded / "neurons.json", *corpus, "-o", tmp_path / "n"]
    words += ["--window", 16, "--workers", 1, "--batch-tokens", 200, "--windows", 5]
    [plan] = planned(*words)
    assert not (tmp_path / "n").exists()
    with forwarded(vocabulary_of(model)) as seen:
        assert call(*words, "--quiet") == 0
    stage = manifest(tmp_path / "n")["stages"]["nll"]
    check(plan, stage["batch_plan"], tmp_path / "n", 0.15)
    assert plan.reads["windows"] == sum(stage["windows"].values())
    assert sum(n * t for n, t in seen) == plan.padded


@pytest.mark.parametrize("tokens", ["prompt", "completion"])
def test_contrast_does_what_its_plan_says(
    model: Path, prompts: Path, tmp_path: Path, tokens: str, relneuron: Any
) -> None:
    words = ["contrast", model, model, prompts, "-o", tmp_path / "c", "--batch-tokens", 300]
    words += ["--tokens", tokens, *(["--max-new-tokens", 3] if tokens == "completion" else [])]
    if "mixtral" in model.name:
        cause = "two models may send a token to different ones"
        check_refused(relneuron, tmp_path, cause, "plan", *words)
        return
    [plan] = planned(*words)
    assert not (tmp_path / "c").exists()
    with forwarded(vocabulary_of(model)) as seen:
        assert call(*words, "--quiet") == 0
    check(plan, manifest(tmp_path / "c")["batch_plan"], tmp_path / "c")
    if tokens == "prompt":  # a completion may end before its tokens
        assert sum(n * t for n, t in seen) == 2 * plan.padded


def test_generate_reads_what_its_plan_says(
    model: Path, recorded: Path, prompts: Path, tmp_path: Path
) -> None:
    """It writes no manifest: its forwards are what there is to compare with."""
    out = tmp_path / "g.jsonl"
    words = ["generate", model, prompts, "-o", out, "--neurons", recorded / "neurons.json"]
    words += ["--batch-tokens", 300, "--max-new-tokens", 3]
    [plan] = planned(*words)
    assert not out.exists()
    with forwarded(vocabulary_of(model)) as seen:
        assert call(*words, "--quiet") == 0
    assert sum(n * t for n, t in seen if t > 1) == plan.padded
    assert sum(1 for _, t in seen if t > 1) == plan.batches
    assert sum(n for n, t in seen if t == 1) <= plan.steps
    assert out.stat().st_size <= 1.1 * (plan.files[out.name] or 0)


def test_record_that_identifies_has_a_row_a_stage(
    model: Path, prompts: Path, tmp_path: Path
) -> None:
    words = ["record", model, prompts, "-o", tmp_path / "r", "--identify", "--top", 6]
    words += ["--permutations", 2, "--bootstrap", 2, "--noise", 0]
    record, identify = planned(*words)
    assert (record.stage, identify.stage) == ("record", "identify")
    assert "responses.safetensors" not in record.files
    assert call(*words, "--quiet") == 0
    sizes = {**record.files, **identify.files}
    for name in ("scores.safetensors", "prompts.jsonl"):
        assert sizes[name] == (tmp_path / "r" / name).stat().st_size
    for name in ("labels.csv", "neurons.json"):
        assert (tmp_path / "r" / name).stat().st_size <= 1.1 * (sizes[name] or 0) + 1500


# --- a whole study -----------------------------------------------------------------------------


def test_a_study_has_a_row_a_stage(model_folder: Path, fact_folder: Path, tmp_path: Path) -> None:
    """Each with the batches that its manifest then has; of ablate as many as there can be."""
    words = ["run", model_folder, "--facts", fact_folder, "-o", tmp_path / "s", "--eva", 8]
    words += ["--top", 6, "--random-seeds", 2, "--permutations", 2, "--bootstrap", 2]
    words += ["--noise", 0, "--analyses", "gain,sizes", "--sizes", "2,6", "--cards", 3]
    plans = {one.stage: one for one in planned(*words)}
    assert not (tmp_path / "s").exists()
    assert [*plans] == [
        *("prompts", "first answers", "record", "identify", "look"),
        *("gain, attribute", "ablate", "report"),
    ]
    assert call(*words, "--quiet") == 0
    made = manifest(tmp_path / "s")
    record = plans["record"]
    assert made["batch_plan"]["tokens"] == record.tokens
    assert made["batch_plan"]["batches"] == record.batches
    ablate = made["stages"]["ablate"]
    assert ablate["conditions"] == plans["ablate"].reads["conditions"]
    assert ablate["answers"] == plans["ablate"].reads["answers"]
    assert ablate["batch_plan"]["tokens"] == plans["ablate"].tokens
    for name in ("prompts.jsonl", "sentences.jsonl"):
        assert plans["prompts"].files[name] == (tmp_path / "s" / name).stat().st_size


# --- words -------------------------------------------------------------------------------------


def test_a_plan_is_a_dry_run_and_writes_nothing(
    relneuron: Any, model_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    fast = ["--tflops", 2, "--gbps", 100]
    words = ["record", model_folder, prompts, "-o", tmp_path / "r", *fast]
    code, out, _ = relneuron("plan", *words)
    assert code == 0 and relneuron(*words, "--dry-run")[0] == 0
    lines = out.splitlines()
    assert any("record" in line and "┃" not in line for line in lines)
    assert "2 TFLOP/s and 100 GB/s" in lines[-1]
    assert not written(tmp_path)
    again = relneuron(*words, "--dry-run")[1].splitlines()
    # The memory of this process, which planned before, may differ.
    assert [a for a in again if "neurons:" in a] == [a for a in lines if "neurons:" in a]


def test_what_a_stage_refuses_its_plan_refuses(
    relneuron: Any, model_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "validated.csv").write_text("id,prediction,correct\n")
    gone = tmp_path / "gone.jsonl"
    for words, cause in (
        (["record", model_folder, gone, "-o", tmp_path / "r"], "does not exist"),
        (["record", model_folder, prompts, "-o", there], "exists"),
        (["record", tmp_path, prompts, "-o", tmp_path / "r"], "is no model folder"),
        (["record", model_folder, prompts, "-o", tmp_path / "r", "--device", "tpu"], "no device"),
        (["attribute", model_folder, gone, "-o", tmp_path / "a"], "does not exist"),
        (
            ["attribute", model_folder, prompts, "-o", tmp_path / "a", "--steps", 3],
            "--method gain takes no --steps",
        ),
        (["count", model_folder, f"en={gone}", "-o", tmp_path / "c"], "does not exist"),
    ):
        wanted = check_refused(relneuron, tmp_path, cause, *words)
        assert check_refused(relneuron, tmp_path, cause, "plan", *words) == wanted
    cause = "nothing to plan of 'report'"
    assert "run" in check_refused(relneuron, tmp_path, cause, "plan", "report", "d")


def test_speeds_are_of_a_dry_run(
    relneuron: Any, model_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    words = ["record", model_folder, prompts, "-o", tmp_path / "r"]
    for flag in ("--tflops", "--gbps"):
        cause = f"{flag} does something only with --dry-run"
        check_refused(relneuron, tmp_path, cause, *words, flag, 3)


def test_every_stage_of_a_model_has_a_plan() -> None:
    """One more is planned as soon as it says so; `demo` is a run, and what edits is not planned."""
    asks = {stage.name: stage.plan for stage in stages() if "transformers" in stage.needs}
    without = {name for name, plan in asks.items() if not plan}
    assert without == {"demo", "edit", "eval", "import", "look", "plan", "probe"}
    for name in [*filter(None, asks.values()), *(one.plan for one in attributions().values())]:
        assert callable(load(name))


def test_time_is_what_takes_longer() -> None:
    """Operations or the weights that are read, forward by forward."""
    plan = Planned("x", {}, forwards=((2, 10**9, 10**6), (1, 10**6, 10**9)))
    assert plan.seconds(1e9, 1e9) == 2 * 1.0 + 1.0
    assert plan.flops == 2 * 10**9 + 10**6
    lines = list(report([Planned("a", {"prompts": 3}, layers=1)], DryOptions(tflops=1, gbps=1)))
    assert "a: 3 prompts" in lines


# --- memory ------------------------------------------------------------------------------------

PEAK = """
import sys
from relneuron.artifact.memory import peak_bytes
from relneuron.cli import main
sys.argv = ["relneuron", *sys.argv[1:]]
try:
    main.main()
finally:
    print("peak", peak_bytes(), file=sys.stderr)
"""


def wide_model(folder: Path, small: Path) -> Path:
    """A model of 50 million weights, with the tokenizer of a small one."""
    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=vocabulary_of(small),
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=7,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    hf.AutoTokenizer.from_pretrained(str(small)).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(status_bytes("VmHWM") is None, reason="what is told begins with who started it")
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("stage", ["record", "count", "attribute"])
def test_the_memory_of_a_process_is_within_a_tenth(
    stage: str,
    wide: bool,
    model_folder: Path,
    prompts: Path,
    corpus: list[str],
    tmp_path: Path,
) -> None:
    model = wide_model(tmp_path / "m", model_folder) if wide else model_folder
    words = {
        "record": ["record", model, prompts],
        "count": ["count", model, *corpus, "--window", 64, "--workers", 1],
        "attribute": ["attribute", model, prompts, "--splits", "eva", "--no-compare"],
    }[stage]
    words += ["-o", tmp_path / "o", "--quiet"]

    def run(*more: object) -> tuple[str, int]:
        asked = [str(word) for word in (*more, *words)]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *asked], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, int(done.stderr.split("peak ")[-1].split()[0])

    out, _ = run("plan")
    row = next(line for line in out.splitlines() if line.startswith(f"│ {stage}"))
    said = next(cell for cell in row.split("│") if "MB" in cell or "GB" in cell).split()
    told = float(said[0]) * {"MB": 1e6, "GB": 1e9}[said[1]]
    _, peak = run()
    assert abs(told - peak) <= 0.1 * peak, (told, peak)
