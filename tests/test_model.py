"""apply_relora, merge_and_reinit and merge_and_unload on whole models."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from relora_kernels import (
    BackendUnavailable,
    FusedReLoRaLinear,
    ReLoRaConfig,
    apply_relora,
    lora_parameters,
    merge_and_reinit,
    merge_and_unload,
    use_backend,
)
from relora_kernels.model import relora_layers
from relora_kernels.reference import merge as reference_merge


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.attn = nn.ModuleDict({k: nn.Linear(width, width) for k in ("q_proj", "k_proj")})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(width, 2 * width)})
        self.mlp["down_proj"] = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        x = x + self.attn["k_proj"](torch.tanh(self.attn["q_proj"](self.norm(x))))
        return x + self.mlp["down_proj"](torch.relu(self.mlp["up_proj"](x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 32)

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


PROJECTIONS = [f"blocks.{i}.{m}" for i in range(2) for m in
               ("attn.q_proj", "attn.k_proj", "mlp.up_proj", "mlp.down_proj")]  # fmt: skip


def paths(model):
    return [path for path, _ in relora_layers(model)]


def train(model, steps=3):
    """A few steps so that B is no longer zero; gradients cleared."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(0, 32, (4, 8))
    for _ in range(steps):
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_default_targets_are_attention_and_mlp_projections():
    model = Model()
    before = model(torch.arange(8)[None])
    assert apply_relora(model, ReLoRaConfig(r=4)) is model
    assert paths(model) == PROJECTIONS
    torch.testing.assert_close(model(torch.arange(8)[None]), before)
    for name, parameter in model.named_parameters():
        frozen = any(name == f"{p}.weight" for p in PROJECTIONS)
        assert parameter.requires_grad != frozen, name


@pytest.mark.parametrize(
    ("target", "exclude", "expected"),
    [
        (["q_proj"], None, [p for p in PROJECTIONS if p.endswith("q_proj")]),
        (["q_proj", "blocks.1.mlp.up_proj"], None,
         ["blocks.0.attn.q_proj", "blocks.1.attn.q_proj", "blocks.1.mlp.up_proj"]),
        (r".*1\.mlp\..*", None, ["blocks.1.mlp.up_proj", "blocks.1.mlp.down_proj"]),
        ("all-linear", None, PROJECTIONS),
        (None, ["down_proj"], [p for p in PROJECTIONS if not p.endswith("down_proj")]),
        (None, r"blocks\.0\..*", [p for p in PROJECTIONS if p.startswith("blocks.1")]),
        (["head"], None, ["head"]),
    ],
)  # fmt: skip
def test_targets(target, exclude, expected):
    model = apply_relora(Model(), ReLoRaConfig(r=2, target_modules=target, exclude_modules=exclude))
    assert paths(model) == expected


def test_targets_that_match_nothing_list_candidates_case44():
    with pytest.raises(ValueError, match=r"\['queries'\].*none of 9.*blocks.0.attn.q_proj"):
        apply_relora(Model(), ReLoRaConfig(target_modules=["queries"]))


def test_a_wrapped_model_is_refused_case45():
    model = apply_relora(Model(), ReLoRaConfig(r=2))
    with pytest.raises(ValueError, match="got 8 .*merge_and_unload"):
        apply_relora(model, ReLoRaConfig(r=2))


def test_a_tied_weight_is_refused_case36():
    model = Model()
    model.blocks[1].attn["q_proj"].weight = model.blocks[0].attn["q_proj"].weight
    with pytest.raises(
        ValueError, match="blocks.0.attn.q_proj.weight, blocks.1.attn.q_proj.weight"
    ):
        apply_relora(model, ReLoRaConfig(r=2))
    assert not relora_layers(model, required=False)
    model.head.weight = nn.Parameter(model.embed.weight)  # tied head and embedding are not targets
    apply_relora(model, ReLoRaConfig(r=2, exclude_modules=["q_proj"]))


def test_a_single_linear_is_pointed_to_from_linear():
    with pytest.raises(ValueError, match="from_linear"):
        apply_relora(nn.Linear(4, 4), ReLoRaConfig(r=2))


def test_config_reaches_the_layers():
    config = ReLoRaConfig(r=4, lora_alpha=8, lora_dropout=0.1, use_rslora=True, trainable_scaling=True,
                          lora_dtype=torch.float32, weight_dtype=torch.bfloat16,
                          merge_rounding="stochastic", seed=5)  # fmt: skip
    model = apply_relora(Model(), config)
    assert model.relora_config is config
    layer = model.blocks[1].mlp["up_proj"]
    assert isinstance(layer, FusedReLoRaLinear)
    assert (layer.r, layer.lora_dropout, layer.use_rslora, layer.seed) == (4, 0.1, True, 5)
    assert layer.weight.dtype == torch.bfloat16 and layer.lora_B.dtype == torch.float32
    assert layer.rounding == "stochastic" and layer.name == "blocks.1.mlp.up_proj"
    assert layer.lora_scaling.item() == 1.0 and len(list(lora_parameters(model))) == 3 * 8


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"r": 0}, "r >= 1, got 0"),
        ({"lora_dropout": -1}, "lora_dropout"),
        ({"merge_rounding": "floor"}, "merge_rounding.*got 'floor'"),
        ({"lora_dtype": torch.int8}, "lora_dtype to be a floating"),
        ({"weight_dtype": "bfloat16"}, "weight_dtype to be a floating.*'bfloat16'"),
    ],
)
def test_bad_configs_are_refused(kwargs, says):
    with pytest.raises(ValueError, match=says):
        ReLoRaConfig(**kwargs)


def test_merge_and_reinit_keeps_the_function_and_restarts_every_layer():
    model = apply_relora(Model(), ReLoRaConfig(r=4))
    ids = torch.randint(0, 32, (2, 8))
    for count in range(1, 4):
        train(model)
        frozen = {p: m.weight.clone() for p, m in relora_layers(model)}
        before = model(ids)
        assert merge_and_reinit(model) == 8
        torch.testing.assert_close(model(ids), before)
        for path, layer in relora_layers(model):
            assert not torch.equal(layer.weight, frozen[path])
            assert not layer.lora_B.any() and layer.lora_A.any() and layer.merge_count == count


def test_weights_are_bitwise_frozen_between_merges():
    model = apply_relora(Model(), ReLoRaConfig(r=4))
    before = {p: m.weight.clone() for p, m in relora_layers(model)}
    train(model, steps=5)
    assert all(torch.equal(m.weight, before[p]) for p, m in relora_layers(model))


def test_layers_of_one_shape_draw_different_factors():
    model = apply_relora(Model(), ReLoRaConfig(r=4))
    q0, q1 = (model.blocks[i].attn["q_proj"] for i in range(2))
    assert not torch.equal(q0.lora_A, q1.lora_A)
    merge_and_reinit(model)
    assert not torch.equal(q0.lora_A, q1.lora_A)


def test_draws_do_not_depend_on_wrappers_or_torch_generator_fault_7():
    plain, wrapped = Model(), Model()
    torch.manual_seed(1)
    apply_relora(plain, ReLoRaConfig(r=4, seed=3))
    torch.manual_seed(2)
    apply_relora(wrapped, ReLoRaConfig(r=4, seed=3))
    merge_and_reinit(plain)
    merge_and_reinit(nn.Sequential(wrapped)[0])
    compiled = torch.compile(wrapped)
    merge_and_reinit(plain)
    merge_and_reinit(compiled)
    for (_, a), (_, b) in zip(relora_layers(plain), relora_layers(wrapped)):
        assert torch.equal(a.lora_A, b.lora_A)


def test_hand_built_layers_get_their_path_as_name():
    model = nn.Sequential(FusedReLoRaLinear(8, 8, r=2), FusedReLoRaLinear(8, 8, r=2))
    assert not torch.equal(model[0].lora_A, model[1].lora_A)
    merge_and_reinit(model)
    assert [m.name for m in model] == ["0", "1"]
    assert not torch.equal(model[0].lora_A, model[1].lora_A)


def test_one_bad_layer_refuses_the_whole_merge_case43():
    model = apply_relora(Model(), ReLoRaConfig(r=4))
    train(model)
    model.blocks[1].mlp["down_proj"].lora_A.data[0, 0] = torch.inf
    before = copy.deepcopy(model.state_dict())
    for function in (merge_and_reinit, merge_and_unload):
        with pytest.raises(FloatingPointError, match="blocks.1.mlp.down_proj"):
            function(model)
    assert len(relora_layers(model)) == 8
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k])


def test_pending_gradients_refuse_the_merge_case50():
    model = apply_relora(Model(), ReLoRaConfig(r=4))
    model(torch.arange(4)[None]).sum().backward()
    with pytest.raises(RuntimeError, match=r"pending.*blocks.0.attn.q_proj.lora_B.grad.*zero_grad"):
        merge_and_reinit(model)
    assert all(layer.merge_count == 0 for _, layer in relora_layers(model))
    model.zero_grad()
    merge_and_reinit(model)
    model.zero_grad(set_to_none=False)
    merge_and_reinit(model)


def test_gradients_from_a_full_rank_phase_move_no_weight_and_clip_nothing(monkeypatch):
    model, ids = Model(), torch.arange(4)[None]
    model(ids).sum().backward()  # a loop that zeroes gradients before the next backward
    weight = model.blocks[0].mlp["up_proj"].weight
    gradient, from_linear = weight.grad, FusedReLoRaLinear.from_linear

    def fails_later(linear, *args, **kwargs):
        if linear is model.blocks[1].mlp["up_proj"]:
            raise torch.OutOfMemoryError("injected")
        return from_linear(linear, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(FusedReLoRaLinear, "from_linear", fails_later)
        with pytest.raises(torch.OutOfMemoryError):
            apply_relora(model, ReLoRaConfig(r=4))
    assert weight.grad is gradient and weight.requires_grad

    apply_relora(model, ReLoRaConfig(r=4))
    before = weight.clone()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    trained = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.requires_grad
                                             and p.grad is not None])  # fmt: skip
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) == trained
    assert torch.equal(weight, before) and weight not in optimizer.state


def test_models_without_layers_are_refused():
    for function in (merge_and_reinit, merge_and_unload, lambda m: list(lora_parameters(m))):
        with pytest.raises(ValueError, match="apply_relora"):
            function(Model())


def test_merge_and_unload_gives_plain_linears_fault_10():
    model = apply_relora(Model(), ReLoRaConfig(r=4))
    ids = torch.randint(0, 32, (2, 8))
    train(model)
    merge_and_reinit(model)  # after a merge the adapter alone is not the model
    train(model)
    before = model(ids)
    assert merge_and_unload(model) is model
    assert not relora_layers(model, required=False) and not hasattr(model, "relora_config")
    torch.testing.assert_close(model(ids), before)
    plain = Model()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(ids), model(ids))
    assert all(p.requires_grad for p in model.parameters())
    layer = FusedReLoRaLinear(4, 4, r=1)
    assert type(merge_and_unload(layer)) is nn.Linear


def test_there_is_one_merge_fault_9(monkeypatch):
    """Every way to merge goes through the same op: without it, none changes a weight."""
    from relora_kernels import layer as layers

    model = apply_relora(Model(), ReLoRaConfig(r=4))
    train(model)
    before = {p: m.weight.clone() for p, m in relora_layers(model)}
    calls = []
    monkeypatch.setattr(layers, "merge_and_restart", lambda restarts: calls.extend(restarts))
    monkeypatch.setattr(layers, "merge_checked", lambda *args, **kwargs: calls.append(args))
    relora_layers(model)[0][1].merge()
    merge_and_reinit(model)
    assert all(torch.equal(m.weight, before[p]) for p, m in relora_layers(model))
    merge_and_unload(model)
    assert all(torch.equal(model.get_submodule(p).weight, w) for p, w in before.items())
    assert len(calls) == 1 + 8 + 8


def test_whole_model_compiles_without_breaks_or_recompiles_after_a_merge():
    model = apply_relora(Model(), ReLoRaConfig(r=4))
    compiled = torch.compile(model, fullgraph=True)
    ids = torch.randint(0, 32, (4, 8))
    compiled(ids).square().sum().backward()
    model.zero_grad()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(2):
            merge_and_reinit(model)
            y = compiled(ids)
            y.square().sum().backward()
            model.zero_grad()
    torch.testing.assert_close(y, model(ids))


def test_hugging_face_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(0, 64, (2, 12))
    before = model(ids).logits
    apply_relora(model, ReLoRaConfig(r=8))
    assert len(relora_layers(model)) == 2 * 7
    assert model.lm_head.weight.requires_grad and model.model.embed_tokens.weight.requires_grad
    torch.testing.assert_close(model(ids).logits, before)
    model(ids, labels=ids).loss.backward()
    assert all(layer.lora_B.grad.any() for _, layer in relora_layers(model))


def test_a_refused_wrap_leaves_the_model_as_it_was():
    model = nn.ModuleDict({"mlp": nn.Linear(4, 4), "mlp2": nn.utils.weight_norm(nn.Linear(4, 4))})
    with pytest.raises(ValueError, match="mlp2.weight to be a Parameter.*weight_norm"):
        apply_relora(model, ReLoRaConfig(r=2))
    assert type(model["mlp"]) is nn.Linear and model["mlp"].weight.requires_grad
    apply_relora(model, ReLoRaConfig(r=2, exclude_modules=["mlp2"]))
    with pytest.raises(TypeError, match="complex64"):
        apply_relora(
            nn.ModuleDict({"mlp": nn.Linear(4, 4, dtype=torch.complex64)}), ReLoRaConfig(r=2)
        )


def test_a_backend_that_cannot_serve_one_layer_stops_the_merge_of_all():
    model = nn.Sequential(
        FusedReLoRaLinear(8, 8, r=2),
        # With another rounding, so that the two do not share a launch.
        FusedReLoRaLinear(8, 8, r=2, dtype=torch.float64, merge_rounding="stochastic"),
    )
    for layer in model:
        layer.lora_B.data.normal_()
    before = copy.deepcopy(model.state_dict())
    for change in (merge_and_reinit, merge_and_unload):
        for name in ("triton", "cuda"):
            with use_backend(name), pytest.raises(BackendUnavailable):
                change(model)
    assert len(relora_layers(model)) == 2
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_transformer_encoder_layers_are_refused_by_name():
    """In eval mode, torch reads their weights without calling the layer's forward, so B A would be left out."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    with pytest.raises(ValueError, match="layers.0.linear1 of an nn.TransformerEncoderLayer"):
        apply_relora(model, ReLoRaConfig(r=2, target_modules="all-linear"))


def test_attributes_that_the_layer_has_itself_are_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].scaling, model[0].merge, model[0].other = 3.0, "now", 7
    config = ReLoRaConfig(r=2, target_modules="all-linear")
    with pytest.raises(
        ValueError, match="FusedReLoRaLinear has, got 0 with merge, scaling; rename"
    ):
        apply_relora(model, config)
    del model[0].scaling, model[0].merge
    for key, value in (
        ("merge_count", nn.Buffer(torch.tensor(7))),
        ("lora_scaling", nn.Parameter(torch.ones(1))),
        ("lora_A", nn.Linear(2, 2)),
    ):
        setattr(model[0], key, value)
        with pytest.raises(ValueError, match=f"got 0 with {key}; rename"):
            apply_relora(model, config)
        delattr(model[0], key)
    model[0].name = "0"  # a label as many put on modules, and what the layer's own will be
    assert apply_relora(model, config)[0].other == 7


class Dequantizing(torch.Tensor):
    """Integers with a scale that operations see as float32, as quantized weights mostly do."""

    @staticmethod
    def __new__(cls, integers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, integers.shape, dtype=torch.float32)

    def __init__(self, integers, scale):
        self.integers, self.scale = integers, scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].integers, args[0].scale)
        plain = [a.integers * a.scale if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))


def test_weights_that_take_no_merge_are_refused_by_name():
    """A merge would write to the temporary that such a weight is computed into."""
    linear = nn.Linear(4, 4)
    weight = Dequantizing(torch.ones(4, 4, dtype=torch.int8), 0.5)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    assert torch.equal(linear(torch.ones(4)), 2 + linear.bias)
    with pytest.raises(TypeError, match="0.weight to be an ordinary tensor, got a Dequantizing"):
        apply_relora(nn.Sequential(linear), ReLoRaConfig(r=2, target_modules="all-linear"))
    with pytest.raises(TypeError, match="dequantize it first"):
        FusedReLoRaLinear.from_linear(linear, r=2)


def test_targets_of_hugging_face_architectures():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}

    def wrapped(model, **kwargs):
        return paths(apply_relora(model, ReLoRaConfig(r=2, **kwargs)))

    bert = transformers.BertConfig(vocab_size=50, intermediate_size=32, **small)
    assert len(wrapped(transformers.BertModel(bert))) == 2 * 6
    t5 = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    assert len(wrapped(transformers.T5ForConditionalGeneration(t5))) == (4 + 2) + (4 + 4 + 2)
    opt = transformers.OPTConfig(vocab_size=50, ffn_dim=32, word_embed_proj_dim=16, **small)
    assert len(wrapped(transformers.OPTForCausalLM(opt))) == 2 * 6
    llama = transformers.LlamaConfig(vocab_size=50, intermediate_size=32, **small)
    for model in (
        transformers.LlamaForSequenceClassification(llama),
        nn.Sequential(transformers.LlamaForCausalLM(llama)),
    ):
        found = wrapped(model, target_modules="all-linear")
        assert len(found) == 2 * 7 and not any("score" in p or "head" in p for p in found)
    roberta = transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(vocab_size=50, intermediate_size=32, **small)
    )
    found = wrapped(nn.Sequential(roberta), target_modules="all-linear")
    assert len(found) == 2 * 6 and not any("classifier" in path for path in found)
    gpt2 = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match="4 Conv1D modules are no nn.Linear"):
        wrapped(transformers.GPT2LMHeadModel(gpt2))


def test_a_model_of_nothing_else_is_told_what_it_is_of():
    with pytest.raises(
        ValueError, match="1 nn.MultiheadAttention modules, 1 modules of nn.Linear's"
    ):
        apply_relora(
            nn.Sequential(nn.MultiheadAttention(8, 2), type("Own", (nn.Linear,), {})(8, 8))
        )


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 8))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.conv = nn.Conv1d(8, 8, 3)


@pytest.mark.parametrize(
    "config, told",
    [
        ({}, ["2 Conv1D modules stay at full rank (blocks.0.attn.c_attn, blocks.1.attn.c_attn)",
              "1 nn.MultiheadAttention modules stay at full rank (blocks.0.attn.heads)",
              "1 modules of nn.Linear's subclasses stay at full rank (blocks.1.mlp.own)",
              "1 3-D parameters stay at full rank (blocks.1.mlp.experts.gate_up_proj)"]),
        ({"target_modules": "all-linear", "exclude_modules": "blocks.*"}, []),
        ({"target_modules": ["up_proj", "gate_up_proj", "c_attn"]},
         ["of target_modules gate_up_proj, c_attn match no nn.Linear"]),
        ({"exclude_modules": ["blocks.0", "experts"]},
         ["exclude_modules=['blocks.0', 'experts'] matches no nn.Linear"]),
        ({"target_modules": ["up_proj"], "exclude_modules": ["head", "nothing"]}, []),
        ({"target_modules": ["up_proj"], "exclude_modules": []}, []),
    ],
)  # fmt: skip
def test_what_seems_targeted_and_is_left_out_is_told(config, told):
    transformers = pytest.importorskip("transformers")
    model = Model()
    for block in model.blocks:
        block.attn.c_attn = transformers.pytorch_utils.Conv1D(8, 8)
    model.blocks[0].attn.heads = nn.MultiheadAttention(8, 2)
    model.blocks[1].mlp.own = type("Own", (nn.Linear,), {})(8, 8)
    model.blocks[1].mlp.experts = Experts()
    model.extra = nn.Linear(8, 8)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        apply_relora(model, ReLoRaConfig(r=2, **config))
    assert len(found) == bool(told)
    for text in told:
        assert text in str(found[0].message)
    assert not found or found[0].filename == __file__


@pytest.mark.parametrize("pattern", [3, "[", [0]])
def test_bad_patterns_are_refused(pattern):
    with pytest.raises((TypeError, ValueError), match="target_modules to be a"):
        ReLoRaConfig(target_modules=pattern)
    with pytest.raises(TypeError, match="ReLoRaConfig, got Model and dict"):
        apply_relora(Model(), {"r": 4})


def states(model):
    return {path: copy.deepcopy(layer.state_dict()) for path, layer in relora_layers(model)}


def assert_states(model, expected: dict):
    for path, layer in relora_layers(model):
        got = layer.state_dict()
        assert got.keys() == expected[path].keys(), path
        for key, value in got.items():
            assert torch.equal(value, expected[path][key]), (path, key)


@pytest.mark.parametrize("stage", ["before the third write", "in the third draw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_failure_half_way_leaves_each_layer_merged_or_untouched(monkeypatch, stage, dtype):
    """For example, out of memory at the third layer. The next call adds no layer's update a second time."""
    config = ReLoRaConfig(r=4, weight_dtype=dtype)
    model = apply_relora(Model(), config)
    for _, layer in relora_layers(model):
        layer.lora_B.data.normal_()
    twin = copy.deepcopy(model)
    before = states(model)
    merge_and_reinit(twin)
    once = states(twin)

    module, name = {
        "before the third write": (reference_merge, "merge_"),
        "in the third draw": (reference_merge.philox, "uniform_"),
    }[stage]
    original, calls = getattr(module, name), []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("injected")
        return original(*args)

    monkeypatch.setattr(module, name, failing)
    with use_backend("reference"), pytest.raises(torch.OutOfMemoryError, match="injected"):
        merge_and_reinit(model)
    paths_ = [path for path, _ in relora_layers(model)]
    assert_states(model, {p: (once if i < 2 else before)[p] for i, p in enumerate(paths_)})
    monkeypatch.undo()

    def total(layer):
        residual = layer.weight_residual
        return layer.weight.double() + (0 if residual is None else residual.double())

    # The two finished layers have B = 0 now: merging them again does not change W plus residual.
    merge_and_reinit(model)
    for path, layer in relora_layers(model):
        assert layer.merge_count == (2 if path in paths_[:2] else 1)
        twin_layer = twin.get_submodule(path)
        torch.testing.assert_close(total(layer), total(twin_layer), rtol=1e-6, atol=1e-7)


def test_residuals_are_staged_in_chunks(monkeypatch):
    from relora_kernels import layer as layers

    model = apply_relora(Model(), ReLoRaConfig(r=4, weight_dtype=torch.bfloat16))
    for _, layer in relora_layers(model):
        layer.lora_B.data.normal_()
    twin = copy.deepcopy(model)
    merge_and_reinit(twin)
    chunks = []

    def counted(restarts):
        chunks.append(len(restarts))
        merge_and_restart(restarts)

    merge_and_restart = layers.merge_and_restart
    monkeypatch.setattr(layers, "merge_and_restart", counted)
    monkeypatch.setattr(layers, "_staged_bytes", lambda restart, residual: residual.nbytes)
    monkeypatch.setattr(layers, "STAGED_BYTES", 1500)  # 512, 512, 1024 and 1024 bytes a block
    merge_and_reinit(model)
    assert chunks == [3, 2, 2, 1]
    assert_states(model, states(twin))


class Hooks:
    """Every kind of hook on one module. Records the calls and the modules that the hooks are called with."""

    def __init__(self, module):
        self.calls, self.modules = [], set()
        full = {"with_kwargs": True}
        self.handles = [
            module.register_forward_pre_hook(self.seen("pre")),
            module.register_forward_pre_hook(self.seen("pre kwargs"), **full),
            module.register_forward_hook(self.seen("forward")),
            module.register_forward_hook(self.seen("forward kwargs"), **full, always_call=True),
            module.register_full_backward_pre_hook(self.seen("backward pre")),
            module.register_full_backward_hook(self.seen("backward")),
            module.register_state_dict_pre_hook(self.seen("state_dict pre")),
            module.register_state_dict_post_hook(self.seen("state_dict")),
            module.register_load_state_dict_pre_hook(self.seen("load pre")),
            module.register_load_state_dict_post_hook(self.seen("load")),
        ]

    def seen(self, kind):
        def hook(module, *args):
            self.calls.append((kind, len(args)))
            self.modules.add(module)

        return hook

    def check(self, model, module):
        """Each is called with `module`, once."""
        self.calls, self.modules = [], set()
        y = model(torch.randn(3, 4, requires_grad=True))
        y.sum().backward()
        model.load_state_dict(model.state_dict())
        model.zero_grad()
        kinds = [("backward", 2), ("backward pre", 1), ("forward", 2), ("forward kwargs", 3),
                 ("load", 1), ("load pre", 7), ("pre", 1), ("pre kwargs", 2), ("state_dict", 3),
                 ("state_dict pre", 2)]  # fmt: skip
        assert sorted(self.calls) == kinds and self.modules == {module}


@pytest.mark.parametrize("removed", ["wrapped", "unloaded"])
def test_hooks_go_over_and_handles_still_remove_them(removed, monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    config = ReLoRaConfig(r=2, target_modules="all-linear")
    hooks = Hooks(model[0])
    hooks.check(model, model[0])
    from_linear = FusedReLoRaLinear.from_linear

    def fails_at_the_last(linear, *args, **kwargs):
        if linear is model[1]:
            raise torch.OutOfMemoryError("injected")
        return from_linear(linear, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(FusedReLoRaLinear, "from_linear", fails_at_the_last)
        with pytest.raises(torch.OutOfMemoryError):
            apply_relora(model, config)
    hooks.check(model, model[0])
    assert type(model[0]) is nn.Linear

    apply_relora(model, config)
    assert type(model[0]) is FusedReLoRaLinear
    hooks.check(model, model[0])
    merge_and_reinit(model)
    hooks.check(model, model[0])
    late = Hooks(model[1])
    if removed == "unloaded":
        merge_and_unload(model)
        hooks.check(model, model[0])
        late.check(model, model[1])
    for handle in hooks.handles:
        handle.remove()
    with pytest.raises(AssertionError):
        hooks.check(model, model[0])
    assert hooks.calls == []
    kept = vars(model[0])["_forward_hooks_always_called"]
    assert not kept and not vars(model[0])["_forward_hooks_with_kwargs"]


def test_what_users_put_on_a_linear_goes_over():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    linear = model[0]
    linear.note = "kept"
    linear.register_buffer("mask", torch.ones(4))
    linear.register_buffer("scratch", torch.ones(4), persistent=False)
    linear.gain, linear.child = nn.Parameter(torch.ones(4)), nn.Linear(2, 2)
    before = model.state_dict().keys()
    apply_relora(model, ReLoRaConfig(r=2, target_modules=["0"]))
    layer = model[0]
    assert layer.mask is linear.mask and layer.gain is linear.gain and layer.child is linear.child
    assert layer.note == "kept" and layer.name == "0"
    added = {f"0.{key}" for key in ("lora_A", "lora_B", "merge_count")}
    assert model.state_dict().keys() == before | added
    layer.later = "too"
    merge_and_unload(model)
    assert type(model[0]) is nn.Linear and model.state_dict().keys() == before
    assert model[0].note == "kept" and model[0].later == "too"
    assert not hasattr(model[0], "lora_alpha") and not hasattr(model[0], "merge_count")
    copy.deepcopy(model)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda m: nn.utils.parametrizations.weight_norm(m), "mlp2.weight to be a Param.*parametriz"),
        (lambda m: nn.utils.parametrize.register_parametrization(m, "bias", nn.Identity()),
         "mlp2.bias to be a Parameter"),
        (lambda m: prune.identity(m, "bias"), "mlp2.bias to be a Parameter"),
        (lambda m: setattr(m, "forward", lambda x: x), "mlp2 whose forward is replaced"),
    ],
)  # fmt: skip
def test_targets_that_cannot_be_wrapped_are_named_before_anything_changes(spoil, says):
    model = nn.ModuleDict({"mlp": nn.Linear(4, 4), "mlp2": nn.Linear(4, 4)})
    spoil(model["mlp2"])
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=says):
        apply_relora(model, ReLoRaConfig(r=2))
    assert dict(model.named_modules()) == before and model["mlp"].weight.requires_grad
    apply_relora(model, ReLoRaConfig(r=2, exclude_modules=["mlp2"]))
    assert paths(model) == ["mlp"]


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (lambda m: setattr(m, "forward", lambda x: x), ValueError, "1 whose forward is replaced"),
        (lambda m: setattr(m.weight, "device_mesh", ()), TypeError, "1: expected unsharded"),
    ],
)
def test_a_layer_that_cannot_be_unloaded_refuses_all(spoil, error, says):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    apply_relora(model, ReLoRaConfig(r=2, target_modules="all-linear"))
    spoil(model[1])
    with pytest.raises(error, match=says):
        merge_and_unload(model)
    assert len(relora_layers(model)) == 2


def test_an_update_too_large_for_the_dtype_to_go_back_to_refuses_all():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    config = ReLoRaConfig(r=2, target_modules="all-linear", weight_dtype=torch.float32)
    apply_relora(model, config)
    nn.init.constant_(model[1].lora_B, 1e5)
    nn.init.ones_(model[1].lora_A)
    for _ in range(2):  # by the update, then by W itself
        with pytest.raises(
            FloatingPointError, match=r"1: expected .* torch.float16, .* got up to 3.2e\+06"
        ):
            merge_and_unload(model)
        assert len(relora_layers(model)) == 2
        merge_and_reinit(model)
    nn.init.constant_(model[1].lora_B, -1e5)  # W goes back into the range
    nn.init.ones_(model[1].lora_A)
    merge_and_unload(model)
    assert {type(m) for m in model} == {nn.Linear} and model[1].weight.dtype == torch.float16
    assert model[1].weight.isfinite().all()
    with torch.device("meta"):  # values are not known, nothing is refused
        model = apply_relora(nn.Sequential(nn.Linear(4, 4)).half(), config)
    assert merge_and_unload(model)[0].weight.dtype == torch.float16


def test_a_cast_of_the_model_sets_the_dtype_to_go_back_to():
    model = nn.Sequential(nn.Linear(4, 4)).half()
    config = ReLoRaConfig(r=2, target_modules="all-linear", weight_dtype=torch.float32)
    merge_and_unload(apply_relora(model, config).float())  # W is float32 before and after
    assert model[0].weight.dtype == model[0].bias.dtype == torch.float32


def test_accelerates_hooks_are_refused_until_they_are_removed():
    hooks = pytest.importorskip("accelerate.hooks")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    config = ReLoRaConfig(r=2, target_modules="all-linear")
    for change in (lambda: apply_relora(model, config), lambda: merge_and_unload(model)):
        hooks.add_hook_to_module(model[1], hooks.ModelHook())
        with pytest.raises(ValueError, match=r"1 whose forward .*remove_hook_from_module\(model"):
            change()
        hooks.remove_hook_from_module(model, recurse=True)
        assert "forward" in vars(model[1])  # it is put back, not deleted
        change()
        assert "forward" not in vars(model[1])
    assert type(model[1]) is nn.Linear


def test_a_layer_under_several_names_is_unloaded_under_all():
    layer = FusedReLoRaLinear(4, 4, r=2)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer), "c": layer})
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 4)
    before = layer(x)
    assert merge_and_reinit(model) == 1 and layer.merge_count == 1
    merge_and_unload(model)
    assert type(model["a"]) is nn.Linear and model["a"] is model["b"][0] is model["c"]
    torch.testing.assert_close(model["a"](x), before)
