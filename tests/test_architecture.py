"""The shape of the code base, read from its syntax trees: who imports whom, how files open.

DESIGN section 4: cli -> stages -> {model, facts, scores, artifact} -> ops, and nothing back.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import relneuron

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "relneuron"
STAGES = {"prompts", "record", "count", "identify", "identify_counts", "ablate", "attribute"}
STAGES |= {"nll", "report"}
# What each part may import of ours; a stage is never imported by a stage.
ALLOWED = {
    "ops": {"ops", "_cpu"},
    "testing": {"testing", "ops"},
    "artifact": {"artifact"},
    "installed": {"artifact"},
    "command": {"artifact"},
    "writing": {"artifact"},
    "manifest": {"artifact", "writing"},
    "scores": {"scores", "artifact", "ops"},
    "facts": {"artifact"},
    "hooks": set(),
    "identity": {"artifact"},
    "attention": {"artifact"},
    "concept_files": {"artifact"},
    "expertise": {"artifact", "conditions", "manifest", "writing"},
    "model": {"ops", "artifact", "attention", "hooks", "identity"},
    "patch": {"ops", "artifact", "attention", "hooks", "model"},
    "instrument": {"ops", "artifact", "model", "patch"},
    "tokens": {"artifact"},
    "predict": {"artifact", "tokens"},
    "preview": {"artifact", "effects", "predict", "results"},
    "clock": set(),
    "sentences": {"artifact"},
    "effects": {"artifact", "installed"},
    "conditions": {"artifact", "effects", "scores"},
    "evaluate": {"artifact", "conditions", "manifest", "model", "patch", "predict", "scores"},
    "ablate_options": {"artifact", "conditions", "evaluate", "expertise", "identity", "manifest"}
    | {"model"},
    "counts": {"artifact"},
    "corpus": {"artifact", "command", "installed"},
    "corpus_read": {"artifact", "corpus"},
    "corpus_windows": {"artifact", "corpus", "corpus_read", "tokens"},
    "corpus_worker": {"artifact", "corpus", "corpus_windows"},
    "corpus_feed": {"artifact", "corpus", "corpus_windows", "corpus_worker"},
    "count_batches": {"artifact", "corpus_windows"},
    "count_checkpoint": {"artifact", "counts", "manifest"},
    "count_options": {
        "artifact",
        "command",
        "corpus",
        "corpus_windows",
        "counts",
        "identity",
        "manifest",
    }
    | {"model"},
    "count_pass": {"artifact", "count_batches", "counts", "model", "ops", "patch"},
    "count_ranks": {"counts"},
    "merge": {"artifact", "command", "counts", "manifest"},
    "lape_files": {"artifact", "counts", "identity", "manifest", "writing"},
    "lape_counts": {"artifact", "command", "counts", "lape_files", "manifest", "writing"},
    "steer": {"artifact", "counts", "manifest", "model", "patch"},
    "generate": {"artifact", "conditions", "counts", "effects", "evaluate", "identity", "manifest"}
    | {"model", "patch", "predict", "steer", "tokens"},
    "residual_layers": {"artifact"},
    "trace": {"artifact", "residual_layers"},
    "residual": {"model", "residual_layers", "trace"},
    "value_scores": {"ops", "residual_layers", "trace"},
    "query_scores": {"ops", "residual_layers", "trace"},
    "attributions": {"artifact", "installed"},
    "knowledge": {"artifact", "facts"},
    "targets": {"artifact", "knowledge", "predict", "tokens"},
    "interventions": {"artifact", "manifest", "predict", "residual_layers"},
    "method_scores": {"artifact", "ops", "residual_layers", "trace"},
    "comparison": {"artifact", "interventions", "manifest", "method_scores", "ops", "query_scores"}
    | {"residual_layers", "trace", "value_scores"},
    "attribute_options": {"artifact", "identity", "installed", "model"},
    "attribute_pass": {"artifact", "attribute_options", "attributions", "comparison", "targets"}
    | {"ops", "query_scores", "residual_layers", "tokens", "trace", "value_scores"},
    "identify_gains": {"artifact", "command", "attributions", "identify", "manifest", "scores"}
    | {"writing"},
    "concepts": {"artifact", "facts", "manifest", "model", "record", "identify", "writing"},
    "tables": {"artifact"},
    "results": {"artifact", "effects"},
    "figures": {"results", "tables"},
    "figures_analyses": {"figures", "results", "tables"},
    "report_parts": {"figures", "results", "tables"},
    "report_study": {"analyses", "artifact", "effects", "manifest", "results", "scores", "tables"},
    "figures_groups": {"figures", "figures_analyses", "tables"},
    "report_groups_study": {"analyses", "artifact", "counts", "manifest", "results"},
    "report_groups_tables": {"analyses", "artifact", "report_groups_study", "results", "tables"},
    "report_groups_sections": {"analyses", "figures", "figures_analyses", "figures_groups"}
    | {"report_groups_study", "report_groups_tables", "report_parts", "tables"},
    "figures_attribution": {"figures", "figures_analyses", "results", "tables"},
    "report_attribution_study": {"artifact", "attributions", "manifest", "results"},
    "report_attribution_tables": {"report_attribution_study", "results", "tables"},
    "report_attribution_sections": {"figures", "figures_attribution", "report_attribution_study"}
    | {"report_attribution_tables", "report_parts", "tables"},
    "report_attribution": {"artifact", "report_attribution_sections", "report_attribution_study"}
    | {"report_attribution_tables", "report_parts", "tables"},
    "report_groups": {"artifact", "report_groups_sections", "report_groups_study"}
    | {"report_groups_tables", "report_parts", "tables"},
    **dict.fromkeys(
        ("report_analyses", "report_neurons"),
        {"analyses", "artifact", "figures", "figures_analyses", "figures_attribution"}
        | {"report_parts", "report_study", "results", "tables"},
    ),
    "analyses": {"analyses", "artifact", "effects", "results", "tables"},
    "doctor": {"ops", "artifact", "installed", "manifest", "model", "residual"},
    "bench_peers": set(),
    "bench_case": set(),
    "bench_ranking": {"bench_case", "ops"},
    "bench_gain": {"bench_case", "ops"},
    "bench_suite": {"bench_case", "bench_gain", "bench_peers", "bench_ranking", "ops", "testing"},
    "bench": {"bench_case", "bench_suite", "artifact", "manifest"},
    "bench_plot": {"bench", "artifact"},
    "demo": {"demo", "artifact", "facts", "predict"},
    "study": STAGES
    | {"artifact", "command", "identity", "manifest", "facts", "model", "predict", "preview"}
    | {"results", "tokens", "writing"}
    | {"ablate_options", "clock", "concepts", "conditions", "report_groups_study"}
    | {"attribute_options", "identify_gains", "report_attribution_study", "residual"},
    "cli": STAGES
    | {"study", "artifact", "manifest", "facts", "model", "doctor", "demo", "tokens"}
    | {
        "cli_attribute",
        "cli_bench",
        "cli_checks",
        "cli_corpus",
        "cli_errors",
        "cli_identify",
        "cli_options",
        "cli_print",
        "clock",
        "conditions",
        "installed",
    },
    "cli_attribute": {"artifact", "attribute", "attribute_options", "attributions", "cli_options"}
    | {"cli_print", "knowledge", "manifest", "model"},
    "cli_bench": {"artifact", "bench", "bench_plot", "cli_options", "cli_print", "installed"}
    | {"manifest", "model"},
    "cli_checks": {"artifact", "cli_options", "installed"},
    "cli_corpus": {"artifact", "cli_options", "cli_print", "corpus", "count", "count_options"}
    | {"count_ranks", "generate", "merge", "model", "nll"},
    "cli_identify": {"artifact", "cli_options", "cli_print", "identify", "identify_counts"}
    | {"expertise", "identify_gains", "lape_counts", "lape_files", "manifest", "study"},
    "cli_options": {"artifact"},
    "cli_errors": {"artifact", "cli_options", "installed"},
    "cli_print": {"artifact", "cli_options", "count", "counts", "nll"},
    **dict.fromkeys(
        STAGES,
        {
            "ops",
            "artifact",
            "command",
            "installed",
            "manifest",
            "facts",
            "model",
            "patch",
            "predict",
            "scores",
        }
        | {"identity", "results", "tables", "sentences", "writing"}
        | {"report_analyses", "report_neurons", "report_parts", "report_study"}
        | {"effects", "conditions", "evaluate", "ablate_options"}
        | {"corpus", "corpus_feed", "corpus_windows", "counts", "count_batches"}
        | {"count_checkpoint", "count_options", "count_pass", "count_ranks"}
        | {"report_groups", "report_groups_study", "report_groups_tables"}
        | {"report_attribution", "report_attribution_study", "report_attribution_tables"}
        | {"attribute_options", "attribute_pass", "attributions", "comparison", "knowledge"}
        | {
            "concept_files",
            "query_scores",
            "residual",
            "residual_layers",
            "targets",
            "tokens",
            "trace",
        },
    ),
}


def imports_of(path: Path) -> set[str]:
    """The first part below `relneuron` of everything a file imports of ours."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "relneuron":
            names = [f"relneuron.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("relneuron.")}
    return found


SOURCES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem[0] != "_"
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_in_one_direction(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert imports_of(path) <= ALLOWED[part]


def test_only_the_command_line_prints() -> None:
    for path in SOURCES:
        if path.stem in ("cli", "cli_print", "train", "world"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            assert not (called and node.func.id == "print"), path  # type: ignore[union-attr]


NO_EXTRAS = """
import sys
for name in ("transformers", "pydantic", "typer", "rich", "triton", "matplotlib", "jinja2",
             "tqdm", "filelock", "scipy", "tokenizers", "accelerate"):
    sys.modules[name] = None
import torch, numpy
"""


def test_the_package_needs_only_its_core_dependencies() -> None:
    """torch, numpy and safetensors: everything else is needed by the command line or a stage."""
    code = """
import relneuron
assert callable(relneuron.ablate) and callable(relneuron.instrument)
from relneuron import *
assert NeuronFile is relneuron.NeuronFile and set(relneuron.__all__) <= set(dir(relneuron))
"""
    subprocess.run([sys.executable, "-c", NO_EXTRAS + code], check=True, cwd=ROOT)


def test_the_ops_and_their_contract_need_only_torch_and_numpy() -> None:
    code = """
sys.modules["safetensors"] = sys.modules["pytest"] = None
import relneuron.ops
import relneuron.testing
stats = relneuron.ops.GroupStats(groups=1, width=5)
x = torch.ones(3, 5)
relneuron.ops.swiglu_stats(x, x, stats=stats)
assert stats.count["act"].tolist() == [[3] * 5]
relneuron.testing.check_backend(relneuron.ops.swiglu_stats, max_elements=0)
ours = {name for name in set(sys.modules) if name.startswith("relneuron.")}
allowed = ("relneuron.ops", "relneuron.testing", "relneuron._cpu")
assert all(name.startswith(allowed) for name in ours), ours
"""
    subprocess.run([sys.executable, "-c", NO_EXTRAS + code], check=True, cwd=ROOT)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'relneuron' has no attribute 'instument'"):
        relneuron.instument  # noqa: B018


def test_the_context_manager_keeps_its_name_beside_the_stage() -> None:
    stage = "import relneuron.cli, relneuron.ablate, relneuron"
    name = "import relneuron; first = relneuron.ablate"
    for code in (
        stage,
        f"{stage}; {name}",
        f"{name}; {stage}",
        f"from relneuron import *; {stage}",
    ):
        code += "; assert callable(relneuron.ablate) and relneuron.ablate.__name__ == 'ablate'"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "path",
    sorted(
        path
        for pattern in (
            "relneuron/**/*.py",
            "tests/*.py",
            "examples/*.py",
            "bench/**/*.py",
            "csrc/*",
            "*.toml",
            "*.txt",
        )
        for path in ROOT.glob(pattern)
    )
    + [ROOT / "Makefile"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_file_opens_with_what_it_is_for(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    opening = {".py": '"""', ".cpp": "//", ".h": "//", ".j2": "{#"}.get(path.suffix, "#")
    assert first.startswith(opening)
    assert len(first) > 30
