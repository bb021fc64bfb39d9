"""A whole Llama under torch.compile, gradient checkpointing, accumulation, autocast and generation.

aot_eager traces forward and backward like inductor, but runs the graphs unchanged: in fp64 its results equal
eager's up to the order in which gradients are added. One test runs inductor's own code.
"""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from relora_kernels import (
    ReLoRaConfig,
    ReLoRaSchedule,
    apply_relora,
    cosine_with_warmup,
    merge_and_reinit,
)
from relora_kernels.model import relora_layers

IDS = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def llama(dtype=torch.float32, blocks=2, **kwargs):
    """A Llama in mid-cycle: B is not zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=blocks,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False, eos_token_id=None,
    )  # fmt: skip
    model = apply_relora(LlamaForCausalLM(config).to(dtype), ReLoRaConfig(r=4, **kwargs))
    with torch.no_grad():
        for _, layer in relora_layers(model):
            layer.lora_B.normal_(0, 0.1)
    return model


def trainable(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def loss_and_gradients(model, ids=IDS, seed=0, autocast=False, call=None):
    """The loss and every gradient of one step; `call`: what computes it, `model` itself if None."""
    model.zero_grad()
    torch.manual_seed(seed)  # of the dropout masks
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = (model if call is None else call)(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainable(model).items()}
    model.zero_grad()
    return loss.detach(), gradients


def assert_same(a, b, share=0.0):
    """The same loss, and gradients that differ by at most `share` of their norm."""
    assert torch.equal(a[0], b[0])
    assert a[1].keys() == b[1].keys()
    for name, gradient in b[1].items():
        assert (a[1][name] - gradient).norm() <= share * gradient.norm(), name


@pytest.mark.parametrize(("autocast", "lora_dropout"), [(False, 0.0), (False, 0.25), (True, 0.25)])
def test_a_compiled_llama_is_one_graph_and_equals_eager(autocast, lora_dropout):
    model = llama(torch.float32 if autocast else torch.float64, lora_dropout=lora_dropout)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    step = loss_and_gradients(model, autocast=autocast, call=compiled)
    eager = loss_and_gradients(model, autocast=autocast)
    assert_same(step, eager, 2**-6 if autocast else 1e-13)
    assert step[0].dtype == eager[0].dtype
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    if lora_dropout:  # another seed gives other masks: the graph does not hold them as constants
        other = loss_and_gradients(model, autocast=autocast, call=compiled, seed=1)
        assert not torch.equal(other[0], step[0])


def test_no_recompile_over_steps_restarts_and_resets():
    model = llama(torch.float64, lora_dropout=0.1)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    runs = []
    for trained, call in ((model, compiled), (twin, twin)):
        optimizer = torch.optim.AdamW(list(trainable(trained).values()), lr=1e-2)
        schedule = ReLoRaSchedule(trained, optimizer, cosine_with_warmup(1, 20), 3, 1)
        runs.append((trained, call, optimizer, schedule))
    for step in range(8):
        for trained, call, optimizer, schedule in runs:
            torch.manual_seed(step)
            stance = "fail_on_recompile" if step and call is compiled else "default"
            with torch.compiler.set_stance(stance):
                call(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    assert runs[0][3].cycle == 2 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for (name, a), (_, b) in zip(model.state_dict().items(), twin.state_dict().items()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


def test_inductor():
    """Inductor's code sums in its own order: its error against fp64 is at most twice eager's."""
    model = llama(blocks=1)
    compiled = torch.compile(model, fullgraph=True)
    exact = loss_and_gradients(copy.deepcopy(model).double())
    for merges in range(2):
        with torch.compiler.set_stance("fail_on_recompile" if merges else "default"):
            ours = loss_and_gradients(model, call=compiled)
        eager = loss_and_gradients(model)
        a, b = (
            sum((g[1][n].double() - exact[1][n]).square().sum() for n in exact[1]) ** 0.5
            for g in (ours, eager)
        )
        assert 0 < a <= 2 * b and ours[0].dtype == eager[0].dtype
        merge_and_reinit(model)
        exact = loss_and_gradients(copy.deepcopy(model).double())


# torch.compile traces only checkpoints that are not reentrant.
@pytest.mark.parametrize(
    ("use_reentrant", "compiled"), [(True, False), (False, False), (False, True)]
)
def test_gradient_checkpointing_draws_the_same_masks_again(use_reentrant, compiled):
    model = llama(torch.float64, lora_dropout=0.5)
    plain = loss_and_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()  # reentrant checkpoints need an input that requires grad
    calls = []
    handle = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *a: calls.append(1))
    assert_same(loss_and_gradients(model), plain)
    assert len(calls) == 2, "the block was not computed again in the backward pass"
    handle.remove()
    if compiled:
        call = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_same(loss_and_gradients(model, call=call), plain, 1e-13)


def test_accumulated_gradients_equal_those_of_the_whole_batch():
    model = llama(torch.float64)
    whole = loss_and_gradients(model)[1]
    for ids in IDS.split(1):
        (model(input_ids=ids, labels=ids).loss / len(IDS)).backward()
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("weight_dtype", [None, torch.bfloat16])
def test_autocast_over_float32_models(weight_dtype):
    """Logits, gradients and dtypes are those of the same model of nn.Linear, to bf16's precision."""
    model = llama(weight_dtype=weight_dtype)
    assert model.model.layers[0].mlp.up_proj.lora_A.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        layer = model.model.layers[0].mlp.up_proj
        x = torch.randn(3, 32)
        assert layer(x).dtype == torch.nn.functional.linear(x, layer.weight.to(x)).dtype
        logits = model(input_ids=IDS).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(input_ids=IDS).logits, logits)
        assert logits.dtype == torch.bfloat16
    for parameter, gradient in zip(
        trainable(model).values(), loss_and_gradients(model, autocast=True)[1].values()
    ):
        assert gradient.dtype == parameter.dtype == torch.float32 and gradient.isfinite().all()
    if weight_dtype is None:
        torch.testing.assert_close(logits.float(), model(input_ids=IDS).logits, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("guard", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_and_then_training_goes_on_case19(guard, use_cache):
    model = llama(lora_dropout=0.5)
    reference = loss_and_gradients(model)
    states = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(2):
        model.eval()
        with guard():
            tokens = model.generate(
                IDS, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=use_cache,
                attention_mask=torch.ones_like(IDS),
            )  # fmt: skip
        # Greedy: each token is the likeliest one by a plain forward over all tokens before it.
        with torch.no_grad():
            likeliest = model(input_ids=tokens).logits.argmax(-1)
        assert torch.equal(tokens[:, 16:], likeliest[:, 15:-1])
        model.train()
        assert_same(loss_and_gradients(model), reference)
    assert all(torch.equal(v, states[k]) for k, v in model.state_dict().items())
    with guard():
        merge_and_reinit(model)  # must not leave inference tensors in the model
    optimizer = torch.optim.AdamW(list(trainable(model).values()), lr=1e-2)
    loss_and_gradients(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    merge_and_reinit(model)
    assert not any(t.is_inference() for t in model.state_dict().values())
