"""`python -m llm.plan` as a user sees it, and its parts that a page does not show."""

import importlib.util
import json
import types

import jax
import pytest

from experiments.gpt import gpt3
from llm import config, plan
from llm.devices import DEVICES, published
from llm.errors import InputError, RunFailed
from llm.planning import batch, page, program, topology
from llm.planning.collectives import Collective
from llm.planning.estimate import estimates
from llm.planning.hlo import parse
from llm.planning.roofline import Roofline, bandwidth
from llm.training import metrics
from tests.helpers import assert_refused, verb

SMALL = (
    "--config=tests/tiny.py", "--config.model.layers=1", "--config.training.microbatches=1",
    "--config.model.vocab_size=304", "--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2",
)  # fmt: skip
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no TPU compiler")


@pytest.mark.long
@needs_libtpu
def test_a_page_for_a_tpu_that_is_not_there(tmp_path):
    """Our kernel is in the program; times and days follow from the figures and the data sheet."""
    result = verb("plan", *SMALL, "--topology=v5e:2x2", "--tokens=1e9", f"--json={tmp_path / 'page.json'}")
    assert result.returncode == 0, result.stderr
    for part in ("v5e:2x2: 4 x TPU v5e", "fsdp 2, tensor 2", "mosaic_tpu is in the program", "of 16.00 GiB", "days"):
        assert part in result.stdout, result.stdout
    assert result.stderr == ""
    found = json.loads((tmp_path / "page.json").read_text())
    limits, sent = found["roofline"], found["sent_per_device"]
    assert limits["arithmetic_seconds"] == pytest.approx(found["flops"] / (4 * 197e12))
    assert limits["memory_seconds"] == pytest.approx(found["moved_per_device"] / 819e9)
    for axes, seconds in limits["network_seconds"].items():
        on_axes = [row["bytes"] for row in sent if "+".join(row["axes"]) == axes]
        assert seconds == pytest.approx(sum(on_axes) / 100e9) and seconds > 0
    assert {"fsdp", "tensor"} <= limits["network_seconds"].keys()
    step = max(limits["arithmetic_seconds"], limits["memory_seconds"], *limits["network_seconds"].values())
    assert limits["step_seconds"] == step and limits["mfu_bound"] == limits["arithmetic_seconds"] / step
    assert limits["days"] == pytest.approx(1e9 / (4 * 32) * step / 86400)
    assert limits["device_hours"] == pytest.approx(24 * 4 * limits["days"])
    # The layer's weights are read and written at least once.
    assert found["moved_per_device"] > found["memory_per_device"]["state"] and not found["loops_of_unknown_length"]


@pytest.mark.long
@needs_libtpu
def test_meshes_are_ranked_and_the_best_is_compiled(tmp_path):
    result = verb("plan", *SMALL, "--topology=v5e:2x2", "--suggest=1", f"--json={tmp_path / 'meshes.json'}")
    assert result.returncode == 0, result.stderr
    meshes = json.loads((tmp_path / "meshes.json").read_text())["meshes"]
    assert [one["compiled"] for one in meshes] == [True] + [False] * (len(meshes) - 1) and len(meshes) > 5
    for one in meshes:
        sizes = one["mesh"]
        assert sizes["data"] * sizes["fsdp"] * sizes["tensor"] * sizes["context"] == 4
        assert sizes["tensor"] <= 2  # there are two key heads
    estimated = [one["seconds"] for one in meshes[1:]]
    assert estimated == sorted(estimated)
    assert "compiled" in result.stdout and "estimated" in result.stdout


def test_a_page_for_this_machine():
    result = verb("plan", *SMALL, "--topology=cpu:1", "--config.mesh.fsdp=1", "--config.mesh.tensor=1")
    assert result.returncode == 0, result.stderr
    assert "cpu:1: 1 x cpu" in result.stdout and "blockwise, in XLA" in result.stdout
    assert "MFU" not in result.stdout  # it has no data sheet


def test_what_does_not_fit_is_refused_in_one_line():
    assert_refused(verb("plan", *SMALL, "--topology=cpu:3"), "mesh: data=1, fsdp=2, tensor=2", "does not fit 3 devices")
    assert_refused(verb("plan", *SMALL, "--topology=v5z:2x2"), "--topology=v5z:2x2", "v5e:16x16", "cpu:8")


@pytest.mark.parametrize(
    "more, says",
    [
        (["--topology=cpu:0"], "expected a number of devices"),
        (["--topology=cpu"], "expected a number of devices"),
        (["--topology=cpu:4", "--tokens=many"], "--tokens=many: expected a number"),
        (["--topology=cpu:4", "--tokens=-3"], "--tokens=-3: expected a number"),
        (["--topology=cpu:4", "--suggest=0"], "--suggest=0: expected a number"),
        (["--topology=cpu:4", "--json=no/such/folder/page.json"], "expected a file in a folder that exists"),
        (["--topology=cpu:4", "--config.mesh.fsdb=2"], "no field 'fsdb'"),
    ],
)
def test_wrong_flags_are_refused_before_any_work(more, says):
    with pytest.raises(InputError, match=says):
        plan.main([*SMALL, *more])


def test_a_compiler_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, says in (("v5p:2x2x1", "pip install libtpu"), ("h100:8", "pip install --no-deps jax-cuda12-plugin==")):
        with pytest.raises(InputError, match=says):
            topology.make(name)


def tiny(**changes):
    wanted = config.load("tests/tiny.py")
    return config.resolve(config.override(wanted, [(name.replace("__", "."), x) for name, x in changes.items()]))


def test_a_program_without_our_kernel_is_no_plan():
    there = topology.Topology("v5e:2x2", [], {}, "tpu", {})
    call = '%{0} = f32[8] custom-call(%x), custom_call_target="tpu_custom_call"'
    lines = [call.format(name) for name in ("attention_forward.2", "attention_backward")]
    whole = parse("ENTRY %main (x: f32[8]) -> f32[8] {\n  " + "\n  ".join(lines) + "\n}\n")
    assert "1 calls forward, 1 backward" in program._attention(tiny(), there, whole)
    half = parse("ENTRY %main (x: f32[8]) -> f32[8] {\n  " + lines[0] + "\n}\n")
    with pytest.raises(RunFailed, match="mosaic_tpu is not in the program"):
        program._attention(tiny(), there, half)
    place = ', metadata={{op_name="jit(step)/{}/layers/attention/attention._attend/shard_map/kernel"}}'
    gpu = [call.format(f"m.{n}") + place.format(at) for n, at in enumerate(("jvp(GPT)", "transpose(jvp(GPT))"))]
    cards = topology.Topology("h100:8", [], {}, "cuda", {})
    text = "ENTRY %main (x: f32[8]) -> f32[8] {\n  " + "\n  ".join(gpu) + "\n}\n"
    found = program._attention(tiny(), cards, parse(text.replace("tpu_custom_call", "mosaic_gpu_v2")))
    assert "mosaic_gpu is in the program: 1 calls forward, 1 backward" in found
    assert "as model.attention says" in program._attention(tiny(model__attention="reference"), there, half)


def test_what_the_compiler_refuses_for_its_memory_is_one_line():
    says = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, 32.11G exceeds available HBM (15.75G).\nmore\nlines"
    there = topology.Topology("v5e:2x2", [], {}, "tpu", {})
    refused = program._too_large(jax.errors.JaxRuntimeError(says), there)
    assert isinstance(refused, program.DoesNotFit) and "\n" not in str(refused)
    assert str(refused).startswith("it does not fit on v5e:2x2: Ran out of memory on HBM, 32.11G exceeds")
    other = jax.errors.JaxRuntimeError("INTERNAL: something else")
    assert program._too_large(other, there) is other


def test_what_is_larger_than_the_data_sheet_says_fails():
    found = {"memory_per_device": {"peak": 17 * 2**30}, "capacity_per_device": 16 * 2**30}
    with pytest.raises(RunFailed, match="17.00 GiB of 16.00 GiB"):
        page.check_fits(found)
    page.check_fits(found | {"capacity_per_device": None})


def test_links_between_nodes():
    card, tpu = DEVICES["NVIDIA H100 80GB HBM3"], DEVICES["TPU v5"]

    def of(device, *group):
        return bandwidth(Collective("all-gather", ("fsdp",), group, 1, 1.0), device)

    assert of(card, *range(8)) == 450e9
    assert of(card, 0, 8, 16) == 50e9
    assert of(card, *range(16)) == 8 * 50e9
    assert of(tpu, 0, 8, 16) == 200e9  # 1,200 GB/s both ways over three axes


def test_the_slowest_part_bounds_a_step():
    limits = Roofline(arithmetic=4.0, memory=1.0, network={"fsdp": 5.0, "tensor": 2.0}, model=3.0)
    assert limits.step == 5.0 and limits.mfu == 0.6


def test_estimates_count_the_state_and_leave_out_what_does_not_divide():
    """A device of fsdp=4, tensor=2 holds an eighth of each matrix, norms whole, and of the table an eighth."""
    found = {
        tuple(getattr(one.mesh, axis) for axis in ("data", "fsdp", "tensor", "context")): one
        for one in estimates(tiny(training__batch_size="8", model__vocab_size="304"), 8, DEVICES["TPU v5 lite"])
    }
    matrices, norms, table = 2 * 11264, 2 * 64 + 32, 304 * 32
    # Parameters, their gradients and two moments; the rope has no parameters.
    assert found[1, 4, 2, 1].known == 4 * 4 * ((matrices + table) / 8 + norms)
    assert found[1, 4, 2, 1].activations < found[1, 2, 2, 2].activations * 1.01
    assert found[4, 1, 2, 1].known == 4 * 4 * ((matrices + table) / 2 + norms)
    assert all(tensor <= 2 and data * fsdp <= 4 for data, fsdp, tensor, _ in found)  # key heads; rows of a micro-batch


ROW, PLACES = ("tokens", "targets", "segments", "positions"), ("weights",)
SOURCE = ("source_tokens", "source_segments", "source_positions")


@pytest.mark.parametrize(
    "family, changes, keys",
    [
        ("gpt", {}, {*ROW, *PLACES}),
        ("gpt", {"objective.kind": "prefix"}, {*ROW, *PLACES, "prefix_lengths"}),
        ("gpt", {"objective.kind": "chat", "data.form": "chat", "data.packing": "best_fit"}, {*ROW, *PLACES}),
        (
            "gpt",
            {
                "objective.kind": "preference",
                "data.form": "preference",
                "data.packing": "whole",
                "training.start_from": "runs/chat",
            },
            {*ROW, *PLACES, "reference"},
        ),
        ("rnn", {"objective.stream": True}, {*ROW, *PLACES, "continues"}),
        ("bert", {"objective.kind": "masked"}, {*ROW, *PLACES, "types"}),
        ("t5", {"objective.kind": "continuation"}, {*ROW, *PLACES, *SOURCE}),
        (
            "bert",
            {"objective.kind": "masked", "objective.next_sentence": True, "data.packing": "whole"},
            {*ROW, *PLACES, "types", "labels", "label_weights"},
        ),
        (
            "bert",
            {"objective.kind": "classification", "data.packing": "whole", "data.label": "label"},
            {"tokens", "segments", "positions", "types", "labels", *PLACES},
        ),
        (
            "encdec",
            {"objective.kind": "seq2seq", "data.packing": "whole", "data.fields": ("text", "target")},
            {*ROW, *PLACES, *SOURCE},
        ),
    ],
)
def test_a_batch_has_the_keys_of_its_objective(family, changes, keys):
    wanted = config.default_config(family)
    experiment = config.resolve(config.with_variant(wanted, "this", this={"objective.kind": "causal"} | changes))
    row = batch.made_up_row(experiment, 500)
    assert row.keys() == keys
    assert all(
        x.dtype == ("float32" if key in (*PLACES, "label_weights", "reference") else "int32") for key, x in row.items()
    )
    assert row["tokens"].shape == (1, 128) and row["segments"].all()


def test_span_corruption_has_the_lengths_of_t5():
    wanted = config.load("experiments/t5/eleven_billion.py")
    row = batch.made_up_row(config.resolve(wanted), 32128)
    assert row["source_tokens"].shape == (1, 512) and row["targets"].shape == (1, 114)
    assert batch.tokens_of(row) == 626


@pytest.mark.parametrize("size", gpt3.SIZES)
def test_gpt3_reads_three_hundred_billion_tokens(size):
    experiment = config.resolve(gpt3.get_config(size))
    training = experiment.training
    assert training.steps * training.batch_size * experiment.data.row_length == pytest.approx(300e9, rel=1e-4)
    assert experiment.model.vocab_size % 128 == 0 and experiment.model.context == 2048


def test_mfu_is_a_share_of_the_data_sheet_on_accelerators_alone(monkeypatch):
    assert metrics.peak_flops()[1] == metrics.MEASURED and published("cpu") is None
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="TPU v5")])
    assert metrics.peak_flops() == (459e12, "the TPU v5p's bfloat16 peak")
