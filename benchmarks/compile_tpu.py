"""Static figures of our TPU attention kernels beside jax's bundled flash and splash, without a TPU.

    python -m benchmarks.compile_tpu [--topologies=v5e:2x2,...] [--length=2048] [--heads=8] [--width=128] [--out=FILE]

Needs libtpu (tests/requirements.txt). Compiles each kernel ahead of time and reads the compiler's dump: instruction
bundles of the whole kernel and of its largest straight piece, which is one grid step; stores of vector registers
spilled in the whole kernel; bytes of VMEM. It compares schedules; it does not tell time: of a kernel that runs
several matrix products the longer schedule may still be the faster.
"""

import argparse
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

TOPOLOGIES = "v5e:2x2,v5p:2x2x1,v6e:2x2,tpu7x:2x2x1"
KERNELS = ("ours", "flash", "splash")
# Parts of the kernels' names in the dump. Of the bundled ones only these have their own.
PASS_NAMES = {
    "attention_backward": "dq, dk, dv", "bwd_dkv": "dk, dv", "bwd_dq": "dq", "mha_dkv": "dq, dk, dv",
    "mha_fwd": "forward", "attention": "forward",
}  # fmt: skip
COLUMNS = ("bundles", "step", "spills", "vmem")


def main() -> int:
    """Compiles in one process a topology and kernel and prints the table; exit code 1 if ours does not compile."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_tpu", description=__doc__)
    parser.add_argument("--topologies", default=TOPOLOGIES)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--block", type=int, default=512, help="queries and keys of a block, of all kernels")
    parser.add_argument("--out", help="also write the figures to this JSON file")
    parser.add_argument("--child", nargs=2, metavar=("TOPOLOGY", "KERNEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        compile_kernel(args.child[0], args.child[1], args)
        return 0
    rows, failed = [], False
    print(f"causal, bfloat16, B {args.batch} T {args.length} N {args.heads} H {args.width}, blocks of {args.block}")
    print(f"{'topology':13}{'kernel':8}{'pass':12}" + "".join(f"{c:>10}" for c in COLUMNS))
    for topology in args.topologies.split(","):
        for kernel in KERNELS:
            figures, error = figures_of(topology, kernel, args)
            failed |= kernel == "ours" and not figures
            for name, figure in figures.items():
                print(f"{topology:13}{kernel:8}{name:12}" + "".join(f"{figure[c]:>10,}" for c in COLUMNS))
                rows.append({"topology": topology, "kernel": kernel, "pass": name, **figure})
            if error:
                print(f"{topology:13}{kernel:8}does not compile: {error}")
                rows.append({"topology": topology, "kernel": kernel, "error": error})
    shown = {name: value for name, value in vars(args).items() if name not in ("out", "child")}
    if args.out:
        pathlib.Path(args.out).write_text(json.dumps({"arguments": shown, "rows": rows}, indent=1) + "\n")
    return 1 if failed else 0


def figures_of(topology: str, kernel: str, args) -> tuple[dict, str]:
    """{pass: figures} and the compiler's complaint, or ''."""
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(
            os.environ, JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1",
            LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        )  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.compile_tpu", "--child", topology, kernel]
        command += [f"--{name}={getattr(args, name)}" for name in ("batch", "length", "heads", "width", "block")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        error = ""
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "Error" in line or "VMEM" in line or "vmem" in line]
            error = (lines or done.stderr.splitlines() or ["?"])[-1][:200]
        return read_dump(pathlib.Path(folder)), error


def read_dump(folder: pathlib.Path) -> dict[str, dict[str, int]]:
    """The figures of every Pallas kernel in a dump folder, by its name."""
    result = {}
    for path in sorted(folder.glob("*-final_bundles.txt")):
        text = path.read_text()
        stamp, name = path.name.rsplit("-", 2)[0].split("-", 1)
        pass_name = next((says for part, says in PASS_NAMES.items() if part in name), None)
        if "schedule-analysis" in path.name or pass_name is None:
            continue
        address = step = spills = 0
        open_regions: list[list] = []  # [name, first bundle, whether it holds others]
        for line in text.splitlines():
            found = re.match(r"\s*(0x[0-9a-f]+|0)\s+(?:\w\w)?\s*:", line)
            if not found:
                continue
            address = int(found[1], 16)
            spills += len(re.findall(r"vst[^;]*_spill", line))
            for mark, region in re.findall(r"(Start|End) region (\d+)", line):
                if mark == "Start":
                    for outer in open_regions:
                        outer[2] = True
                    open_regions.append([region, address, False])
                elif any(r[0] == region for r in open_regions):
                    _, start, holds_others = open_regions.pop(
                        next(n for n in reversed(range(len(open_regions))) if open_regions[n][0] == region)
                    )
                    if not holds_others:
                        step = max(step, address - start + 1)
        allocations = next(folder.glob(f"{stamp}-{name}-*-pre-finalize-registers-and-allocations.txt")).read_text()
        sizes = re.findall(r"space=vmem, size = (0x[0-9a-f]+)", allocations)
        result[pass_name] = {
            "bundles": address + 1, "step": step, "spills": spills, "vmem": sum(int(size, 16) for size in sizes)
        }  # fmt: skip
    return result


def compile_kernel(topology: str, kernel: str, args) -> None:
    """Compiles the forward and backward pass of one kernel for one topology in this process."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from llm.attention.target import compiling_for

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    B, T, N, H = args.batch, args.length, args.heads, args.width
    loss: Any = {"ours": ours, "flash": flash, "splash": splash}[kernel](args)
    shape = (B, T, N, H) if kernel == "ours" else (B, N, T, H)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device))
    # The sum of squares keeps the output, and with it the forward pass, in the program.
    grad = jax.grad(lambda q, k, v: jnp.square(loss(q, k, v).astype(jnp.float32)).sum(), (0, 1, 2))
    with compiling_for("tpu", device.device_kind):
        lowered = jax.jit(grad).trace(x, x, x).lower(lowering_platforms=("tpu",))
    lowered.compile()


def ours(args):
    """llm.attention with mosaic_tpu, (B, T, N, H)."""
    from llm.attention import Mask, attention
    from llm.attention.block_sizes import Blocks, using

    def call(q, k, v) -> Any:
        sizes = Blocks(args.block, args.block)
        with using("mosaic_tpu", forward=sizes, backward=sizes):
            return attention(q, k, v, mask=Mask(causal=True), implementation="mosaic_tpu")

    return call


def flash(args):
    """jax.experimental.pallas.ops.tpu.flash_attention, (B, N, T, H)."""
    from jax.experimental.pallas.ops.tpu import flash_attention as module

    names = [field.name for field in module.BlockSizes.__dataclass_fields__.values() if field.name != "block_b"]
    chosen: dict[str, Any] = dict.fromkeys(names, args.block)
    sizes = module.BlockSizes(block_b=1, **chosen)
    return functools.partial(module.flash_attention, causal=True, sm_scale=args.width**-0.5, block_sizes=sizes)


def splash(args):
    """jax.experimental.pallas.ops.tpu.splash_attention with its fused backward pass, (B, N, T, H)."""
    import jax
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as module
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    mask = masks.MultiHeadMask([masks.CausalMask((args.length, args.length))] * args.heads)
    names = [name for name in module.BlockSizes.__dataclass_fields__ if name.startswith("block_") and "dq" not in name]
    chosen: dict[str, Any] = dict.fromkeys(names, args.block)
    sizes = module.BlockSizes(**chosen, use_fused_bwd_kernel=True)
    kernel = module.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    return jax.vmap(kernel)


if __name__ == "__main__":
    sys.exit(main())
