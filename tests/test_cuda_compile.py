"""Every CUDA kernel compiles for every architecture without a GPU: no spills, 16-byte accesses."""

import json

import cuda_table
import pytest
from cuda_table import KINDS
from simt_build import cuda_build, once

# How many 16-byte global loads, copies to shared memory and stores the machine code has at least, and the
# tensor-core instruction. Tails and tensors that are not aligned take narrower ones besides, so a main path that
# has become narrower shows in the count alone. A kernel that is not listed here only must not spill.
EXPECTED = {
    "merge_kernel<bf16>": (58, 8, 64, "HMMA.1688.F32.TF32"),
    "merge_kernel<fp16>": (58, 8, 64, "HMMA.1688.F32.TF32"),
    "merge_kernel<float>": (96, 8, 96, "HMMA.1688.F32.TF32"),
    "restart_kernel<float>": (0, 0, 2, None),
    "zero_kernel": (0, 0, 1, None),
    "partition_kernel": (8, 0, 8, None),
    "recount_kernel": (8, 0, 0, None),
    **{
        f"{name}_kernel<unsigned {kind}>": (loads, 0, stores, None)
        for name, loads, stores in (
            ("sample", 6, 4),
            ("window", 8, 0),
            ("count", 8, 0),
            ("counts", 8, 0),
            ("clear", 2, 2),
            ("finish", 8, 8),
            ("small", 16, 8),
            ("random", 4, 4),
        )
        for kind in ("int", "short")
    },
}
# The same of 8-byte accesses: these store four numbers at a time.
EXPECTED_8_BYTES = {f"restart_kernel<{kind}>": (0, 0, 2, None) for kind in ("bf16", "fp16")}
EXPECTED_FROM_SM90 = {"held_kernel": (60, 0, 20, None)}  # empty before: it needs clusters

# sm_90a alone. lora_A may have any strides and is loaded by elements, lora_B by pairs; W is what counts.
EXPECTED_SM90A = {
    f"merge_sm90_kernel<(Rounding){rounding}, {factor}>": (
        0,
        copies,
        stores,
        f"HGMMA.64x64x16.F32{kind}",
    )
    for rounding, copies, stores in ((0, 60, 16), (1, 60, 16), (2, 120, 32))
    for factor, kind in (("float", ""), ("bf16", ".BF16"))
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    nvcc = cuda_build.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    if cuda_table.find_tools(nvcc) is None:
        pytest.skip("no cuobjdump and nvdisasm on this machine")
    table = once(
        tmp_path_factory,
        "cuda_table.json",
        lambda path: path.write_text(json.dumps(cuda_table.all_kernels())),
    )
    found = json.loads(table.read_text())
    # All architectures: an nvcc that lacks one must not make the tests pass.
    assert {row["arch"] for row in found} == set(cuda_table.ARCHS)
    return found


def test_no_kernel_spills(rows):
    spilling = [row for row in rows if row["spills"]]
    assert not spilling


def test_main_paths_move_16_bytes_at_a_time(rows):
    plain = {row["arch"] for row in rows} - {"90a"}
    newer = {arch for arch in plain if int(arch) >= 90}
    for bits, expected, archs in (
        (128, EXPECTED, plain),
        (64, EXPECTED_8_BYTES, plain),
        (128, EXPECTED_FROM_SM90, newer),
        (128, EXPECTED_SM90A, {"90a"}),
    ):
        for name, (*least, unit) in expected.items():
            found = [row for row in rows if row["kernel"] == name and row["arch"] in archs]
            assert len(found) == len(archs), name
            for row in found:
                counts = [cuda_table.accesses(row, kind).get(bits, 0) for kind in KINDS]
                assert all(n >= m for n, m in zip(counts, least)), (least, row)
                assert row["tensor_core"] == ([unit] if unit else []), row
                if archs == {"90a"}:  # at least 32 bits, too, in what is loaded by elements
                    assert max(cuda_table.accesses(row, "LDG")) >= 32, row


def test_launches_of_a_chain_overlap_from_sm_90_on(rows):
    """Each launch waits for the one before it. The last lets none start early, the first waits for none."""
    expected = {
        **dict.fromkeys(("sample", "window", "count", "partition", "recount"), [True, True]),
        **dict.fromkeys(("clear", "finish"), [False, True]),
        "zero": [True, False],
    }
    for row in rows:
        name = row["kernel"].split("_kernel")[0]
        newer = int(row["arch"].rstrip("a")) >= 90
        assert row["overlaps"] == (
            expected.get(name, [False, False]) if newer else [False, False]
        ), row
    assert expected.keys() <= {row["kernel"].split("_kernel")[0] for row in rows}


def test_sm_86_serves_sm_89(rows):
    """sm_86's machine code runs on sm_89 and equals what nvcc makes for it, so the build leaves sm_89 out."""
    code = {
        arch: {row["kernel"]: row["code"] for row in rows if row["arch"] == arch}
        for arch in ("86", "89")
    }
    assert code["86"] == code["89"]
