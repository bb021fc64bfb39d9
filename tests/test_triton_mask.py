"""The reference's plan with its dropout mask in Triton: equal to the reference bit for bit; when `auto` takes it."""

import mmap
import types

import pytest
import torch
from oracle import operands
from simt_build import bits_of

from relora_kernels import backend, lora_linear, use_backend
from relora_kernels.ops import lora_linear as linear_op
from relora_kernels.reference import lora_linear as reference
from relora_kernels.reference import philox

if backend.triton_missing() is not None:
    pytest.skip(backend.triton_missing(), allow_module_level=True)

from relora_kernels._triton import lora_linear_mask as ours  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEAR_ONE = 1 - 2.0**-16
PITCH = 5461  # the odd width of the 1.3B model


def seed_of(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64, device=DEVICE)


def special(rows, cols, dtype):
    """Normal numbers, with NaN, both infinities and -0 among them."""
    x = torch.randn(rows, cols, device=DEVICE)
    some = torch.rand(rows, cols, device=DEVICE)
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf, -0.0)):
        x[(some > i / 10) & (some < (i + 1) / 10)] = value
    return x.to(dtype)


def assert_same(got, expected):
    assert torch.equal(bits_of(got), bits_of(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [2.0**-16, 0.1, 0.5, NEAR_ONE, 1.0])
def test_the_masked_x_is_the_references_bit_for_bit(dtype, p):
    seed = seed_of(-77)
    for rows, cols in ((1, 1), (17, 8), (35, 519), (3, 1031)):
        x = special(rows, cols, dtype)
        expected = reference.zero_dropped(x, p, seed)
        before = x.clone()
        buffer = torch.full((rows + 2, cols), 7.0, dtype=dtype, device=DEVICE)
        assert ours.zero_dropped(x, p, seed, out=buffer[1:-1]).data_ptr() == buffer[1].data_ptr()
        assert_same(buffer[1:-1], expected)
        assert (buffer[0] == 7).all() and (buffer[-1] == 7).all()
        assert_same(x, before)
        got = ours.zero_dropped(x, p, seed, out=x)  # in place
        assert got is x
        assert_same(x, expected)


def test_the_threshold_itself_is_kept():
    x, seed = torch.ones(3, 9, device=DEVICE), seed_of(4)
    bits = philox.bits16(seed, philox.STREAM_DROPOUT, (3, 9), device=DEVICE)
    for row, col in ((0, 0), (1, 5), (2, 8)):
        below = bits[row, col].item() / 65536
        for zero_dropped in (ours.zero_dropped, reference.zero_dropped):
            assert zero_dropped(x, below, seed)[row, col] == 1
            assert zero_dropped(x, below + 2.0**-16, seed)[row, col] == 0


def test_p_below_the_grid_drops_nothing():
    x = torch.randn(3, 5, device=DEVICE)
    for p in (0.0, 2.0**-18):
        assert ours.zero_dropped(x, p, seed_of(1)) is x
        assert reference.zero_dropped(x, p, seed_of(1)) is x


LAYOUTS = {
    "rows of an odd pitch": lambda t: t[:, :PITCH],
    "starts at an odd element": lambda t: t.flatten()[1 : 1 + 4 * PITCH].view(4, PITCH),
    "transposed": lambda t: t[:, :7].T,
    "every other column": lambda t: t[:, ::2],
    "expanded": lambda t: t[:1, :40].expand(9, 40),
    "a single column": lambda t: t[:, 3:4],
    "backwards in memory": lambda t: t.as_strided((3, 40), (50, 2), 11),
    "overlapping rows": lambda t: t.as_strided((9, 40), (8, 1)),
    "no rows": lambda t: t[:0],
    "no columns": lambda t: t[:, :0],
}


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(dtype, layout):
    x = LAYOUTS[layout](special(4, PITCH + 3, dtype))
    got = ours.zero_dropped(x, 0.3, seed_of(2**62 + 5))
    assert got.is_contiguous() and got.data_ptr() != x.data_ptr() or x.numel() == 0
    assert_same(got, reference.zero_dropped(x, 0.3, seed_of(2**62 + 5)))


@pytest.mark.skipif(DEVICE != "cpu", reason="reserves memory that a GPU would have to commit")
@pytest.mark.parametrize("strides", [(2**30 + 8, 1), (1, 2**30 + 8)])
def test_elements_more_than_two_to_the_31_apart(strides):
    """Strides that fit in 32 bits, and offsets that do not."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, unnamed until 3.12
    memory = mmap.mmap(-1, 8 * (2**30 + 8 + 64), flags=flags)
    shape = (4, 40) if strides[1] == 1 else (40, 4)
    far = torch.frombuffer(memory, dtype=torch.float16).as_strided(shape, strides)
    near, seed = torch.randn(shape).half(), seed_of(3)
    far.copy_(near)
    expected = reference.zero_dropped(near, 0.5, seed)
    assert_same(ours.zero_dropped(far, 0.5, seed), expected)
    if strides[1] == 1:  # in place, as for dx
        assert_same(ours.zero_dropped(far, 0.5, seed, out=far), expected)


def results(name, tensors, dy, p):
    """y and the gradients on backend `name`; lora_linear draws nothing but the mask."""
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    with use_backend(name):
        x, weight, lora_A, lora_B, bias = tensors
        y = lora_linear(x, weight, lora_A, lora_B, 0.5, bias, p, 9)
        return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 2.0**-18, 0.1, NEAR_ONE, 1.0])
@pytest.mark.parametrize("rows", [0, 33])
def test_forward_and_gradients_equal_the_named_reference(dtype, p, rows):
    tensors = operands(rows, 43, 24, 5, dtype, device=DEVICE)
    dy = torch.randn(rows, 24, device=DEVICE).to(dtype)
    launched = []

    def counted(*args, **kwargs):
        launched.append(args)
        return zero_dropped(*args, **kwargs)

    zero_dropped, ours.zero_dropped = ours.zero_dropped, counted
    try:
        got = results("triton_mask", tensors, dy, p)
    finally:
        ours.zero_dropped = zero_dropped
    assert len(launched) == 3  # of x forward, of dx, of x for dA
    expected = results("reference", tensors, dy, p)
    assert len(launched) == 3  # by name, the reference is PyTorch alone
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_the_references_dropout_ignores_what_it_drops():
    """An inf or a NaN of x that is dropped leaves no NaN in the low-rank branch."""
    x = torch.full((1, 64), torch.inf, device=DEVICE, dtype=torch.float64)
    kept = reference.dropout_mask(torch.ones_like(x), 0.5, 1) > 0
    x[kept] = 1.0
    assert torch.equal(reference.zero_dropped(x, 0.5, 1), kept.double())


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_opcheck(p):
    x, weight, lora_A, lora_B, bias = (
        None if t is None else t.detach()
        for t in operands(6, 16, 24, 4, torch.float32, device=DEVICE)
    )
    seed = seed_of(3) if p else None
    ops = torch.ops.relora_kernels
    with use_backend("triton_mask"):
        call = (x, weight, lora_A, lora_B, 0.5, bias, p, seed)
        torch.library.opcheck(ops._lora_linear_forward.default, call)
        y, low = ops._lora_linear_forward(*call)
        call = (torch.ones_like(y), x, weight, lora_A, lora_B, low, 0.5, p, seed, *[True] * 4)
        torch.library.opcheck(ops._lora_linear_backward.default, call)


def test_compiled_equals_eager():
    tensors = operands(12, 24, 20, 4, torch.float32, device=DEVICE)

    def step(x, weight, lora_A, lora_B, bias):
        return lora_linear(x, weight, lora_A, lora_B, 0.5, bias, 0.4, 5).square().sum()

    wanted = [t for t in tensors if t.requires_grad]
    with use_backend("triton_mask"):
        compiled = torch.autograd.grad(torch.compile(step, fullgraph=True)(*tensors), wanted)
        for a, b in zip(compiled, torch.autograd.grad(step(*tensors), wanted), strict=True):
            torch.testing.assert_close(a, b)


class TestAuto:
    """What `auto` takes for tensors on a GPU, without a record of that device."""

    @staticmethod
    def chosen(p, is_cuda=True):
        x, dy = (types.SimpleNamespace(is_cuda=is_cuda) for _ in range(2))
        weight = lora_A = lora_B = low = None
        forward = (x, weight, lora_A, lora_B, 1.0, None, p, None)
        backward = (dy, x, weight, lora_A, lora_B, low, 1.0, p, None, *[True] * 4)
        modules = linear_op.IMPLEMENTATIONS
        found = {
            backend.resolve("an op without records", modules, f"why_not_{direction}", *args)
            for direction, args in (("forward", forward), ("backward", backward))
        }
        assert len(found) == 1
        return found.pop()

    @pytest.fixture(autouse=True)
    def _auto(self, monkeypatch):
        monkeypatch.setattr(backend, "triton_cannot_start", lambda: None)
        with use_backend("auto"):
            yield

    def test_the_fast_mask_where_there_is_dropout(self):
        assert self.chosen(0.1) is ours
        assert self.chosen(0.0) is reference
        assert self.chosen(0.1, is_cuda=False) is reference
        with use_backend("reference"):
            assert self.chosen(0.1) is reference
        with use_backend("triton_mask"):
            assert self.chosen(0.0) is ours

    def test_where_triton_could_not_start_a_kernel_the_reference(self, monkeypatch):
        monkeypatch.setattr(backend, "triton_cannot_start", lambda: "no compiler")
        assert self.chosen(0.1) is reference
        with use_backend("triton_mask"):  # a kernel may be in Triton's cache: named, it is tried
            assert self.chosen(0.1) is ours


def test_what_triton_needs_to_start_a_kernel(monkeypatch, tmp_path):
    why = backend.triton_cannot_start.__wrapped__
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no CC, gcc or clang" in why()
    (tmp_path / "gcc").touch(0o755)
    monkeypatch.setattr(backend.sysconfig, "get_config_var", lambda name: str(tmp_path))
    assert f"no {tmp_path}/Python.h" in why()
    (tmp_path / "Python.h").touch()
    assert why() is None


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_gpu_graph_capture_and_replay():
    """A replay draws the mask from the seed tensor's current value."""
    seed, x = seed_of(1), torch.randn(70, 300, device="cuda").bfloat16()
    ours.zero_dropped(x, 0.5, seed)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ours.zero_dropped(x, 0.5, seed)
    for value in (5, -6):
        seed.fill_(value)
        graph.replay()
        assert_same(got, reference.zero_dropped(x, 0.5, seed))
