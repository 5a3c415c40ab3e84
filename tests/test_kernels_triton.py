"""The Triton kernels without a GPU: run in the interpreter, and compiled for GPUs that are not there."""

from __future__ import annotations

import glob
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]


def _release(package) -> tuple[int, ...]:
    return tuple(int(part) for part in package.__version__.split(".")[:2])


INTERPRETER = pytest.mark.skipif(
    _release(triton) < (3, 8) and _release(numpy) >= (2, 4),
    reason="Triton's interpreter makes a number of an array of one, which numpy allows until 2.3 (Triton 3.6 seen to)",
)


def _interpret(*arguments: str, examples: int = 8) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "tests/interpreted_adapter.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "KERNEL_EXAMPLES": str(examples)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@INTERPRETER
def test_kernels_are_right_in_the_interpreter():
    _interpret("-m", "not slow")


@INTERPRETER
@pytest.mark.slow
def test_kernels_are_right_in_the_interpreter_at_length():
    _interpret("-m", "", examples=60)


def _compile(kernel, types: dict[str, str], constants: dict[str, object], arch: int, warps: int, stages: int):
    """Registers, stack and instructions of a kernel for a GPU that need not be there; tools are in the triton wheel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, kind in signature.items() if kind.startswith("*")}
    options = {"num_warps": warps, "num_stages": stages}
    source = ASTSource(kernel, signature, values, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tools = glob.glob(os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin"))[0]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [f"{tools}/{tool[0]}", tool[1], file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    stores = re.findall(r"STG\.E\S*", code)
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": built.metadata.shared,
        "wgmma": code.count("HGMMA"),
        "mma": code.count("HMMA."),
        "stores": len(stores),
        "wide stores": sum(".128" in store for store in stores),
    }


def _entry(kind: str, tokens: int, narrow: int, branches: int, dtype: str, arch: int, size: int = 768):
    """One entry of the tables of tiles, compiled as a T5-base block would call it."""
    from hyperpelt_ds.kernels.adapter import fused

    item, pair, wide = 4 if dtype == "fp32" else 2, branches == 2, fused.padded(narrow)
    constants: dict[str, object] = {"D": size, "RAGGED": True, "ALIGNED": True, "ACT": "gelu_new"}
    if kind == "weight":
        kernel, tile, row = fused.backward_weight_kernel, fused.weight_tile(wide, item), fused.packed_row(size, narrow)
        constants |= {"R": narrow, "M": wide, "WIDE": narrow, "FROM": 0, "BIAS": row.bias, "UP": row.up}
        constants |= {"SHIFT": row.shift}
    else:
        kernel = fused.forward_kernel if kind == "forward" else fused.backward_input_kernel
        tile = fused.token_tile(tokens, wide, branches, item)
        constants |= {"R1": narrow, "R2": narrow, "M1": wide, "M2": wide if pair else 16, "PAIR": pair}
        constants |= {} if kind == "forward" else {"INPUTS": True}
    constants |= {"BT": tile.tokens, "BD": tile.columns}
    types = dict.fromkeys(kernel.arg_names, f"*{dtype}")
    types |= {name: "*i32" for name in types if re.fullmatch(r"ids\d|order|ptr|lengths", name)}
    types |= {name: "i32" for name in types if re.fullmatch(r"s[dbus]\d|ss|row_size|T", name)}
    types |= {name: "*fp32" for name in types if name.startswith("partial")}
    return tile, _compile(kernel, types, constants, arch, tile.warps, tile.stages)


# Stack bytes that ptxas 12.9 takes though registers are left, by (kind, tokens, bottleneck, branches, dtype, arch).
STACK: dict[tuple[object, ...], int] = {
    ("input", 32, 24, 2, "bf16", 80): 8,
    ("input", 32, 64, 1, "bf16", 80): 8,
}


def _check_entry(kind: str, tokens: int, narrow: int, branches: int, dtype: str, arch: int) -> None:
    tile, found = _entry(kind, tokens, narrow, branches, dtype, arch)
    assert found["stack"] <= STACK.get((kind, tokens, narrow, branches, dtype, arch), 0), found
    assert found["shared"] <= (163 if arch == 80 else 227) << 10, found
    assert found["wide stores"], found  # y, dx and the weights' gradients leave 16 bytes at a time
    if dtype != "fp32":
        long_side = tile.columns if kind == "weight" else tile.tokens
        assert found["wgmma" if arch == 90 and long_side == 64 else "mma"] > 0, found


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kind", ["forward", "input", "weight"])
def test_the_main_kernels_compile_without_spills(kind, arch):
    _check_entry(kind, 64, 64, 1, "bf16", arch)


TABLE = [
    (kind, tokens, narrow, branches)
    for kind in ("forward", "input", "weight")
    for narrow in (8, 24, 64, 128, 256)
    for branches in ((1,) if kind == "weight" else (1, 2))
    for tokens in ((64,) if kind == "weight" else (16, 32, 64))
]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_every_entry_of_the_table_compiles_without_spills(dtype, arch):
    wrong = []
    for entry in TABLE:
        try:
            _check_entry(*entry, dtype, arch)
        except AssertionError as error:
            wrong.append(f"{entry}: {error}")
    assert not wrong, "\n".join(wrong)
