"""Every CUDA kernel compiles for every architecture without a GPU: no spills, 16-byte accesses."""

import json

import cuda_table
import pytest
from simt_build import cuda_build, once

# Widest global load, copy to shared memory and store, in bits, and the tensor-core instruction. A
# kernel that is not listed here only must not spill.
EXPECTED = {
    "merge_kernel<bf16>": (128, 128, 128, "HMMA.1688.F32.TF32"),
    "merge_kernel<fp16>": (128, 128, 128, "HMMA.1688.F32.TF32"),
    "merge_kernel<float>": (128, 128, 128, "HMMA.1688.F32.TF32"),
    "restart_kernel<float>": (0, 0, 128, None),
    "restart_kernel<bf16>": (0, 0, 64, None),
    "restart_kernel<fp16>": (0, 0, 64, None),
    "zero_kernel": (0, 0, 128, None),
    "partition_kernel": (128, 0, 128, None),
    "recount_kernel": (128, 0, 0, None),
    **{
        f"{name}_kernel<unsigned {kind}>": (128, 0, store, None)
        for name, store in (
            ("sample", 128),
            ("window", 0),
            ("count", 0),
            ("counts", 0),
            ("clear", 128),
            ("finish", 128),
            ("small", 128),
            ("random", 128),
        )
        for kind in ("int", "short")
    },
}


EXPECTED_FROM_SM90 = {"held_kernel": (128, 0, 128, None)}  # empty before: it needs clusters

# sm_90a alone. lora_A may have any strides and is loaded by elements, lora_B by pairs; W is what counts.
EXPECTED_SM90A = {
    f"merge_sm90_kernel<(Rounding){rounding}, {factor}>": (
        32,
        128,
        128,
        f"HGMMA.64x64x16.F32{kind}",
    )
    for rounding in range(3)
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
    for expected, archs in (
        (EXPECTED, plain),
        (EXPECTED_FROM_SM90, newer),
        (EXPECTED_SM90A, {"90a"}),
    ):
        for name, (load, copy, store, unit) in expected.items():
            found = [row for row in rows if row["kernel"] == name and row["arch"] in archs]
            assert len(found) == len(archs), name
            for row in found:
                widths = [cuda_table.widest(row, kind) for kind in ("LDG.", "LDGSTS.", "STG.")]
                assert all(w >= least for w, least in zip(widths, (load, copy, store))), row
                assert row["tensor_core"] == ([unit] if unit else []), row


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
