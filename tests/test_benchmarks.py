"""benchmarks.attention: launched as a user does; it refuses to time wrong numbers, and its results have every field."""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import attention, attention_cases, attention_report, attention_tune
from llm.attention import api
from llm.attention.block_sizes import Blocks
from llm.attention.target import compiling_for
from llm.errors import RunFailed
from tests import helpers
from tests.attention import oracle as definition
from tests.helpers import assert_refused

block_sizes = importlib.import_module("llm.attention.block_sizes")

FIELDS = {
    "shape", "dtype", "implementation", "pass", "ours", "length", "median_ms", "spread_ms", "rounds", "tflops",
    "of_matrix_ceiling", "least_bytes", "gb_s", "of_read_ceiling", "peak_bytes", "time_to_baseline", "largest_error",
    "run",
}  # fmt: skip


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.attention", *arguments],
        cwd=helpers.ROOT, env=helpers.environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_check_only_holds_everything_against_the_oracle_and_says_who_is_missing():
    result = launch("--check-only", "--shapes=2,24,24,4,2,8,causal;1,3,40,2,1,8,causal,lengths")
    assert result.returncode == 0, result.stderr
    for name in ("reference", "blockwise", "jax.nn xla"):
        assert f"forward: {name} agrees with the oracle: out" in result.stdout
        assert re.search(rf"forward \+ backward: {name} agrees .*dq .*dk .*dv", result.stdout), result.stdout
    assert "left out: pallas tpu flash runs on tpu, the platform here is cpu" in result.stdout
    for module, name in (("torch", "torch sdpa"), ("tokamax", "tokamax xla")):
        if importlib.util.find_spec(module) is None:
            assert f"left out: {name} not installed" in result.stdout
    assert "TFLOP/s" not in result.stdout


@pytest.mark.long
def test_a_timed_run_writes_rows_and_picture_and_a_second_one_adds_to_them(tmp_path):
    ours = "--implementations=blockwise,jax.nn-xla"
    result = launch(ours, "--repeats=3", f"--out={tmp_path}", "--shapes=1,32,32,8,8,64,causal;1,64,64,8,8,64,causal")
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob("attention-*.json")
    saved = json.loads(path.read_text())
    assert len(saved["rows"]) == 2 * 2 * 2  # shapes, passes, implementations
    (run,) = saved["runs"].values()
    assert run["jax"] and run["python"] and run["matrix_tflops"] > 0 and run["read_gb_s"] > 0
    assert str(tmp_path) not in path.read_text()
    for row in saved["rows"].values():
        assert row.keys() == FIELDS
        assert row["median_ms"] > 0 and row["peak_bytes"] > 0 and row["rounds"] == 3
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("no matplotlib: the picture is not drawn")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    result = launch(ours, "--repeats=3", f"--out={tmp_path}", "--shapes=1,1,64,2,2,8,lengths;1,64,64,8,8,64,causal")
    assert result.returncode == 0, result.stderr
    saved = json.loads(path.read_text())
    assert len(saved["rows"]) == 2 * 2 * 2 + 2 and len(saved["runs"]) == 2
    decode = saved["rows"]["B1 T1 S64 N2 K2 H8 lengths | float32 | blockwise | forward"]
    assert decode["of_read_ceiling"] > 0


def test_wrong_numbers_are_not_timed(tmp_path, monkeypatch, capsys):
    right = api.IMPLEMENTATIONS["blockwise"]

    def broken(q, k, v, **rest):  # one head of one row is a little off
        out, lse = right(q, k, v, **rest)
        return out.at[1, :, 0].multiply(1.001), lse

    monkeypatch.setitem(api.IMPLEMENTATIONS, "blockwise", broken)
    names = "--implementations=blockwise,reference"
    with pytest.raises(RunFailed, match="wrong numbers, not timed: blockwise in forward of B2 T16"):
        attention.main([names, "--repeats=3", f"--out={tmp_path}", "--shapes=2,16,16,2,1,8,causal"])
    (path,) = tmp_path.glob("attention-*.json")
    assert {row["implementation"] for row in json.loads(path.read_text())["rows"].values()} == {"reference"}
    assert "forward: blockwise WRONG: out 1.0e-03" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["dq", "dk", "dv"])
def test_a_wrong_or_missing_gradient_is_seen(broken):
    case = attention_cases.parse_case("1,16,16,2,1,8,causal")
    pieces = attention_cases.oracle(case, attention_cases.make_inputs(case, "float32"))
    results = {}
    for piece in pieces:
        shape = (1, 16, 2, 8) if piece.name in ("out", "dq") else (1, 16, 1, 8)
        results.setdefault(piece.name, np.zeros(shape))[piece.index] = piece.value
    assert max(attention_cases.check(results, pieces).values()) == 0
    results[broken][0, 9] *= 1.01
    assert attention_cases.check(results, pieces)[broken] > attention_cases.tolerance("float32", True)
    results[broken][0, 9] = np.nan
    assert np.isnan(attention_cases.check(results, pieces)[broken])


@pytest.mark.parametrize("shape", ["2,9,9,4,2,8,causal", "2,12,12,2,2,8,bias,lengths", "1,3,11,2,1,8,causal,lengths"])
def test_its_oracle_says_what_the_definition_says(shape):
    """Two oracles, written apart: blocks of rows against the whole."""
    from llm.attention import Mask

    case = attention_cases.parse_case(shape)
    x = attention_cases.make_inputs(case, "float32")
    mask = Mask(causal=case.hides, kv_lengths_B=x.lengths, q_positions_BT=case.q_positions())  # pyright: ignore
    want = definition.attention(x.q, x.k, x.v, mask, bias=x.bias)
    want = {"out": want["out"], **want["gradients"](x.dout)}
    pieces = attention_cases.oracle(case, x)
    assert {p.name for p in pieces} == ({"out", "dq", "dk", "dv"} if case.backward else {"out"})
    for piece in pieces:
        np.testing.assert_allclose(piece.value, want[piece.name][piece.index], rtol=1e-9, atol=1e-12)


def test_work_is_counted_over_what_is_seen():
    full, causal = (attention_cases.parse_case(f"2,64,64,4,2,8{word}") for word in ("", ",causal"))
    assert full.flops(False) == 4 * 2 * 4 * 64 * 64 * 8 and full.flops(True) == 3.5 * full.flops(False)
    assert causal.flops(False) == full.flops(False) * 65 / 128
    assert full.least_bytes(False, "float32") == 4 * 2 * 64 * 8 * (2 * 4 + 2 * 2)
    decode = attention_cases.parse_case("3,1,64,4,2,8,lengths")
    keys = decode.length_of_rows().sum()
    assert decode.least_bytes(False, "bfloat16") == 2 * 8 * (2 * 3 * 4 + 2 * keys * 2)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--preset=gpt"], ["--preset=gpt", "llama, bert"]),
        (["--shapes=1,2,x,4,2,8"], ["'1,2,x,4,2,8'", "six positive integers"]),
        (["--shapes=1,8,8,4,2,8,windowed"], ["'windowed'"]),
        (["--shapes=1,8,8,3,2,8"], ["3 query heads", "2 key heads"]),
        (["--implementations=blockwise,flash"], ["'flash'", "jax.nn-xla"]),
    ],
)
def test_bad_input_is_one_line(arguments, parts):
    assert_refused(launch(*arguments), *parts)


def test_readme_section_is_made_from_the_results(tmp_path):
    row = {"dtype": "float32", "pass": "forward", "of_matrix_ceiling": 0.25, "run": "2020-01-01 00:00:00 UTC"}
    rows = [
        {**row, "shape": shape, "implementation": name, "ours": name == "blockwise", "median_ms": ms}
        for shape, name, ms in (("a", "blockwise", 3.0), ("a", "torch sdpa", 2.0), ("a", "jax.nn xla", 9.0),
                                ("b", "blockwise", 3.1), ("b", "torch sdpa", 3.0))
    ]  # fmt: skip
    run = {"date": row["run"], "command": "python -m benchmarks.attention --shapes=a", "dtype": "float32",
           "python": "3", "jax": "1", "torch": None, "matrix_tflops": 1.0, "read_gb_s": 2.0}  # fmt: skip
    attention_report.merge(tmp_path / "attention-x.json", "X, 2 cores", run, rows)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- attention -->\nold\n<!-- end attention -->\nafter\n")
    attention_report.write_readme(readme, tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| a | float32 | forward | 3 | 25% | torch sdpa | 2 | **1.50** |" in text
    assert "| b | float32 | forward | 3.1 | 25% | torch sdpa | 3 | 1.03 |" in text
    assert text.count("x the time of") == 1 and "- a, float32, forward: 1.50x the time of torch sdpa" in text


def test_tune_writes_the_fastest_sizes_and_attention_then_uses_them(tmp_path, monkeypatch, capsys):
    """In the interpreter, on sizes that it can do; the time there means nothing, the table that is written does."""
    table = tmp_path / "block_sizes.json"
    table.write_text('{"another card": {"x": [1, 2, 3]}}')
    monkeypatch.setattr(block_sizes, "TABLE", table)
    candidates = [Blocks(16, 16), Blocks(32, 16)]
    monkeypatch.setattr(
        block_sizes, "CANDIDATES", {("mosaic_tpu", "forward"): candidates, ("mosaic_tpu", "backward"): candidates}
    )
    monkeypatch.setattr(attention_tune, "CANDIDATES", block_sizes.CANDIDATES)
    block_sizes.measured.cache_clear()
    with compiling_for("tpu", "a test's TPU", interpret=True):
        attention_tune.tune("float32", [128], 3, shape=(1, 48, 48, 2, 1))
        written = json.loads(table.read_text())
        assert written["another card"] == {"x": [1, 2, 3]}
        entries = written["a test's TPU"]
        assert set(entries) == {"mosaic_tpu forward 128 32 bit", "mosaic_tpu backward 128 32 bit"}
        block_sizes.measured.cache_clear()
        for which in ("forward", "backward"):
            sizes = block_sizes.block_sizes("mosaic_tpu", which, "a test's TPU", 128, "float32")
            assert [sizes.q_block, sizes.k_block, sizes.stages] == entries[f"mosaic_tpu {which} 128 32 bit"]
            other = block_sizes.block_sizes("mosaic_tpu", which, "another card", 128, "float32")
            assert other == block_sizes.DEFAULTS["mosaic_tpu", which][128]
    block_sizes.measured.cache_clear()
    shown = capsys.readouterr().out
    assert "forward 128: 512 x 512" in shown and "the default" in shown and "backward 128: 32 x 16" in shown


def test_tune_refuses_a_platform_without_a_kernel_of_ours():
    assert_refused(launch("--tune"), "--tune: there is no attention kernel of ours for the platform cpu to tune")
    assert_refused(launch("--tune", "--widths=64,x"), "--widths: 'x' is no head width from 1 to 256")


def test_compile_gpu_says_when_the_packages_cannot_be_had(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_gpu", f"--env={tmp_path / 'env'}"], cwd=helpers.ROOT,
        env=helpers.environment(PIP_NO_INDEX="1", PIP_FIND_LINKS=""), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    (line,) = result.stdout.splitlines()
    assert line.startswith("packages cannot be had: ") and line.endswith(": not run")
    assert "Traceback" not in result.stderr


@pytest.mark.long
def test_compile_tpu_reads_the_figures_of_each_kernel(tmp_path):
    out = tmp_path / "figures.json"
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_tpu", "--topologies=v5e:2x2", "--length=256", "--block=128",
         "--batch=1", "--heads=2", f"--out={out}"],
        cwd=helpers.ROOT, env=helpers.environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {(row["kernel"], row.get("pass")): row for row in json.loads(out.read_text())["rows"]}
    assert {("ours", "forward"), ("ours", "dq, dk, dv"), ("flash", "forward"), ("splash", "dq, dk, dv")} <= rows.keys()
    for row in rows.values():
        assert 0 < row["step"] < row["bundles"] and 2**16 < row["vmem"] < 2**24, row
    # dk and dv of 256 keys, float32, stay on the chip.
    assert rows["ours", "dq, dk, dv"]["vmem"] > 2 * 4 * 256 * 128


def test_data_is_measured_on_the_same_text_every_time():
    from benchmarks import data

    texts = list(data.documents(0.2))
    assert texts == list(data.documents(0.2)) and 150_000 < sum(map(len, texts)) < 260_000
    assert len(set(texts)) == len(texts) and any(" somewhere " in text for text in texts)
    found = data.measure_stages(0.1)
    assert {"read jsonl", "clean", "gopher_quality", "MinHash", "encode (bpe, all cores)"} <= set(found)
    assert all(rate > 0 for rate in found.values())
    assert 30 < data.resident_megabytes(os.getpid()) < 20_000
