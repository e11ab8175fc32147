"""Imports point down only, and only nn and models define linen modules (DESIGN: the plan)."""

import ast

from tests.helpers import ROOT

# Each room may import from the rooms after it in its set.
ALLOWED = {
    "attention": set(),
    "sharding": {"attention", "errors"},
    "nn": {"sharding", "attention"},
    "models": {"nn", "sharding", "attention", "errors"},
    "tokenization": {"errors"},
    "data": {"tokenization", "errors"},
    "training": {"models", "data", "sharding", "errors", "stop", "devices"},
    "planning": {"training", "models", "data", "sharding", "attention", "config", "errors", "devices"},
    "generation": {"models", "sharding", "errors"},
    "weights": {"models", "nn", "errors"},
    "evaluation": {"training", "generation", "models", "data", "sharding", "errors"},
    "sweeps": {"training", "config", "errors", "stop"},
    "compression": {"models", "nn", "errors"},
    "interpretability": {"models", "attention", "errors"},
}
WITHOUT_FLAX = ("attention", "tokenization", "data")


def modules():
    for path in sorted((ROOT / "llm").rglob("*.py")):
        parts = path.relative_to(ROOT / "llm").parts
        yield path, parts[0].removesuffix(".py") if len(parts) == 1 else parts[0], len(parts) > 1


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_rooms_import_only_from_rooms_below():
    rooms = set()
    for path, room, in_room in modules():
        if not in_room:
            continue
        rooms.add(room)
        for name in imported(path):
            if name.startswith("llm."):
                other = name.split(".")[1]
                assert other == room or other in ALLOWED[room], f"{path} imports {name}"
    assert rooms == set(ALLOWED)


def test_nothing_imports_a_verb():
    from llm.cli import VERBS

    for path, _, _ in modules():
        for name in imported(path):
            assert not (name.startswith("llm.") and name.split(".")[1] in VERBS and len(name.split(".")) == 2), (
                f"{path} imports the verb {name}"
            )


def test_data_tokenization_and_attention_know_no_flax():
    for path, room, _ in modules():
        if room in WITHOUT_FLAX:
            assert not any(name.split(".")[0] == "flax" for name in imported(path)), path


def test_only_nn_and_models_define_linen_modules():
    for path, room, _ in modules():
        if room not in ("nn", "models"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    assert not any(ast.unparse(base).endswith("nn.Module") for base in node.bases), path


def test_every_verb_is_listed():
    from llm.cli import VERBS

    files = {p.stem for p in (ROOT / "llm").glob("*.py") if "cli.run(main" in p.read_text(encoding="utf-8")}
    assert files - {"__main__"} == set(VERBS)


def test_files_stay_short():
    for folder in ("llm", "experiments", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 600, path
