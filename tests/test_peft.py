"""Adapters to and from PEFT, and merged models out as ordinary checkpoints. No network.

test_reliability.py explains the numbers of cases and faults in test names.
"""

import copy
import json

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import transformers
from oracle import error
from safetensors.torch import load_file, save_file

from relora_kernels import (
    FusedReLoRaLinear,
    ReLoRaConfig,
    apply_relora,
    merge_and_reinit,
    merge_and_unload,
)
from relora_kernels.model import relora_layers
from relora_kernels.peft import load_adapter, save_adapter

IDS = torch.arange(24).reshape(2, 12)


def llama(dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attention_bias=True, **kwargs,
    )  # fmt: skip
    # not .to(dtype), which would round the rotary frequencies too
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def wrapped(model=None, frozen=True, **kwargs):
    """A model in mid-cycle; `frozen`: only the factors are trainable, as in fine-tuning."""
    model = llama() if model is None else model
    apply_relora(model, ReLoRaConfig(**{"r": 4, "lora_alpha": 6, **kwargs}))
    trained(model)
    factors = {id(p) for _, m in relora_layers(model) for p in (m.lora_A, m.lora_B)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in factors or not frozen)
    return model


def trained(model):
    with torch.no_grad():
        for _, layer in relora_layers(model):
            layer.lora_B.normal_(0, 0.1)
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def as_good_as_each_other(ours, theirs, exact):
    """One model in two orders of summation: neither strays from fp64 more than twice as far as the other."""
    a, b = error(ours, exact), error(theirs, exact)
    assert a <= 2 * b and b <= 2 * a and a < 1e-5


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1}],
)
def test_ours_loads_in_peft_with_difference_0(kwargs, tmp_path):
    model = wrapped(**kwargs)
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    state = theirs.state_dict()
    layers = relora_layers(model)
    assert sum("lora_A" in key for key in state) == len(layers)
    for path, layer in layers:
        module = theirs.get_submodule(f"base_model.model.{path}")
        assert torch.equal(module.lora_A["default"].weight, layer.lora_A)
        assert torch.equal(module.lora_B["default"].weight, layer.lora_B)
        assert torch.equal(module.base_layer.weight, layer.weight)
        assert module.scaling["default"] == layer.scaling
    as_good_as_each_other(logits(model), logits(theirs), logits(copy.deepcopy(model).double()))
    assert (logits(model.double()) - logits(theirs.double())).abs().max() < 1e-14
    merged, unloaded = merge_and_unload(model), theirs.merge_and_unload()
    assert (logits(merged) - logits(unloaded)).abs().max() < 1e-13


def peft_adapter(folder, base=None, **kwargs):
    """A PEFT checkpoint with factors that are not zero; returns PEFT's model."""
    base = llama() if base is None else base
    kwargs = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], **kwargs}
    model = peft.get_peft_model(base, peft.LoraConfig(**kwargs))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"use_rslora": True, "task_type": "CAUSAL_LM"},
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1\..*(q|down)_proj"},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"up_proj": 3}},
        {"modules_to_save": ["lm_head", "norm"]},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"layers_to_transform": [1], "exclude_modules": ["up_proj"]},
    ],
)
def test_a_peft_checkpoint_loads_with_difference_0_and_goes_back(kwargs, tmp_path):
    theirs = peft_adapter(tmp_path / "peft", **kwargs)
    model = load_adapter(llama(), tmp_path / "peft", ReLoRaConfig(seed=7))
    assert model.relora_config.seed == 7 and model.relora_config.r == 4
    for path, layer in relora_layers(model):
        module = theirs.get_submodule(f"base_model.model.{path}")
        assert torch.equal(module.lora_A["default"].weight, layer.lora_A)
        assert torch.equal(module.lora_B["default"].weight, layer.lora_B)
        assert module.scaling["default"] == layer.scaling and layer.r == len(layer.lora_A)
    as_good_as_each_other(logits(model), logits(theirs), logits(copy.deepcopy(model).double()))
    model.requires_grad_(False)  # so that only what the adapter brought matters
    if kwargs.keys() & {"modules_to_save", "bias"}:
        with pytest.raises(
            ValueError, match="parameters that load_adapter replaced .*; give base_folder"
        ):
            save_adapter(model, tmp_path / "back")
    else:
        save_adapter(model, tmp_path / "alone")
        again = peft.PeftModel.from_pretrained(llama(), tmp_path / "alone")
        assert torch.equal(logits(again), logits(theirs))
    save_adapter(model, tmp_path / "back", tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "back")
    assert torch.equal(logits(again), logits(theirs))
    merge_and_reinit(model)  # the layers are full ReLoRA layers
    assert all(layer.merge_count == 1 for _, layer in relora_layers(model))


def test_after_a_merge_the_base_is_saved_too_fault_10(tmp_path):
    model = wrapped(frozen=False)
    with pytest.raises(ValueError, match=r"other parameters that train \(model.embed.*base_folder"):
        save_adapter(model, tmp_path / "adapter")
    merge_and_reinit(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="got 1 merges into it.*give base_folder"):
        save_adapter(model, tmp_path / "adapter")
    assert not any(tmp_path.iterdir())
    with torch.no_grad():
        trained(model).model.embed_tokens.weight.mul_(1.5)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
    # PEFT finds the base by itself: its folder is in the adapter's config.
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    as_good_as_each_other(logits(model), logits(theirs), logits(copy.deepcopy(model).double()))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(load_adapter(base, tmp_path / "adapter")), logits(model))
    lost = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    assert (logits(lost) - logits(model)).abs().max() > 1e-2  # what the refusal is for


def test_what_16_bit_weights_could_not_store(tmp_path):
    """If W was made from float32, the residual goes into the base. If the model itself is 16-bit, the base is W."""
    model = trained(apply_relora(llama(), ReLoRaConfig(r=4, weight_dtype=torch.bfloat16)))
    merge_and_reinit(model)
    trained(model)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    layer = model.model.layers[0].mlp.up_proj
    exact = layer.weight.float() + layer.weight_residual.float()
    assert torch.equal(base.model.layers[0].mlp.up_proj.weight, exact)
    again = load_adapter(base, tmp_path / "adapter")
    assert torch.equal(logits(merge_and_unload(again)), logits(merge_and_unload(model)))

    narrow = trained(apply_relora(llama(torch.bfloat16), ReLoRaConfig(r=4)))
    merge_and_reinit(narrow)
    trained(narrow)
    save_adapter(narrow, tmp_path / "adapter16", tmp_path / "base16")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base16")
    assert base.dtype == torch.bfloat16
    again = load_adapter(base, tmp_path / "adapter16")
    assert again.model.layers[0].mlp.up_proj.lora_A.dtype == torch.float32
    assert torch.equal(logits(again), logits(narrow))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base16")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter16").eval()
    exact = logits(copy.deepcopy(narrow).double())
    # Over all logits together, because the largest error of a 16-bit model is down to a single rounding.
    a, b = ((logits(m).double() - exact).norm().item() for m in (narrow, theirs))
    assert a <= 2 * b and b <= 2 * a


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_trained_scale_becomes_alpha(use_rslora, tmp_path):
    model = wrapped(trainable_scaling=True, use_rslora=use_rslora)
    with torch.no_grad():
        for i, (_, layer) in enumerate(relora_layers(model)):
            layer.lora_scaling.fill_(0.1 + 0.05 * i)
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    as_good_as_each_other(logits(model), logits(theirs), logits(copy.deepcopy(model).double()))
    as_good_as_each_other(
        logits(load_adapter(llama(), tmp_path / "adapter")), logits(theirs), logits(model.double())
    )


class Tied(nn.Module):
    """Not a Hugging Face model; embedding and head share one matrix."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight
        self.mlp = nn.Linear(16, 16)
        self.mlp.weight.data = self.mlp.weight.data.T.contiguous().T

    def forward(self, ids):
        return self.head(torch.tanh(self.mlp(self.embed(ids))))


def test_plain_modules_with_tied_and_transposed_weights_cases_36_37(tmp_path):
    model = apply_relora(Tied(), ReLoRaConfig(r=2))
    merge_and_reinit(trained(model))
    trained(model).mlp.lora_A.data = model.mlp.lora_A.data.T.contiguous().T
    assert not model.mlp.weight.is_contiguous() and not model.mlp.lora_A.is_contiguous()
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    plain = Tied()
    plain.load_state_dict(load_file(tmp_path / "base" / "model.safetensors"))
    assert plain.head.weight is plain.embed.weight
    ids = torch.arange(6)[None]
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapter")
    torch.testing.assert_close(theirs(ids), model(ids))
    load_adapter(plain, tmp_path / "adapter")
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in model.mlp.named_parameters("mlp"))
    torch.testing.assert_close(plain(ids), model(ids))  # A's strides differ


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_modules": ["embed_tokens"]}, "lora_embedding_A"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_other_kinds_of_lora_are_refused_by_name(kwargs, says, tmp_path):
    peft_adapter(tmp_path / "peft", **kwargs)
    model = llama()
    with pytest.raises(ValueError, match=f"expected a plain LoRA.*{says}.*PeftModel.merge_and_un"):
        load_adapter(model, tmp_path / "peft")
    assert not relora_layers(model, required=False)
    assert all(p.requires_grad for p in model.parameters())


def edited(folder, weights=None, **settings):
    """The adapter in `folder` with other entries in its config, and its tensors changed."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    if weights is not None:
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file(weights(tensors), folder / "adapter_model.safetensors")


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"peft_type": "IA3"}, 'peft_type "LORA", got IA3'),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True"),
        ({"a_later_variant": {"x": 1}}, "a_later_variant"),
        ({"weights": lambda t: {k: v for k, v in t.items() if k != f"{Q0}.lora_B.weight"}},
         "lora_A and lora_B of model.layers.0.self_attn.q_proj"),
        ({"weights": lambda t: {**t, f"{Q0}.lora_B.weight": torch.zeros(5, 4)}},
         r"factors of model.layers.0.self_attn.q_proj.weight \(32, 32\), got \(4, 32\) and \(5, 4\)"),
        ({"weights": lambda t: {k.replace("layers.1", "layers.9"): v for k, v in t.items()}},
         "layers.9.*which it does not have"),
        ({"weights": lambda t: {k.replace("self_attn.q_proj", "self_attn"): v for k, v in t.items()}},
         "self_attn, a LlamaAttention"),
        ({"weights": lambda t: {k.removeprefix("base_model."): v for k, v in t.items()}},
         "keys that begin with base_model.model., got model.model"),
        ({"weights": lambda t: {**t, "base_model.model.lm_head.weight": torch.zeros(3, 3)}},
         r"lm_head.weight \(3, 3\) for \(64, 32\)"),
        ({"weights": lambda t: {"base_model.model.lm_head.weight": torch.zeros(64, 32)}},
         "LoRA factors, got none among 1"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_changes_nothing(change, says, tmp_path):
    peft_adapter(tmp_path)
    edited(tmp_path, **change)
    model = llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=says):
        load_adapter(model, tmp_path)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_own_values_for_a_tied_parameter_are_refused(tmp_path):
    peft_adapter(tmp_path, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="a model that ties it to model.embed_tokens.weight"):
        load_adapter(llama(tie_word_embeddings=True), tmp_path)


def test_missing_files_and_pickles_case35(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json, got none"):
        load_adapter(llama(), tmp_path)
    peft_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="adapter_model.bin is a pickle, which is not read"):
        load_adapter(llama(), tmp_path)


def test_a_wrapped_model_takes_no_adapter_case45(tmp_path):
    peft_adapter(tmp_path)
    with pytest.raises(ValueError, match="merge_and_unload"):
        load_adapter(wrapped(), tmp_path)


@pytest.mark.parametrize("there", ["adapter", "base"])
def test_nothing_is_overwritten(there, tmp_path):
    model = wrapped()
    (tmp_path / there).mkdir()
    (tmp_path / there / "precious").write_text("x")
    with pytest.raises(FileExistsError, match=f"{there}, which exists"):
        save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    assert [p.name for p in tmp_path.rglob("*")] == [there, "precious"]


@pytest.mark.parametrize("base", ["adapter", "adapter/base", "."])
def test_one_folder_in_the_other_is_refused(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        (ValueError, FileExistsError), match="expected two folders beside|a new folder"
    ):
        save_adapter(wrapped(), "adapter", base)
    assert not any(tmp_path.iterdir())


def test_sharded_parameters_are_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    model = wrapped()
    layer = model.model.layers[1].mlp.up_proj
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layer.lora_A = nn.Parameter(distribute_tensor(layer.lora_A.detach(), mesh))
        with pytest.raises(TypeError, match="got a DTensor in model.layers.1.mlp.up_proj"):
            save_adapter(model, tmp_path / "adapter")
    finally:
        dist.destroy_process_group()
    assert not (tmp_path / "adapter").exists()


def test_a_failed_save_leaves_nothing_behind_case32(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    model = wrapped()
    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    assert not any(tmp_path.iterdir())


def test_what_a_killed_save_left_does_not_hinder_the_next(tmp_path, monkeypatch):
    model = wrapped()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *args, **kwargs: None)  # as if killed before
        patch.setattr(type(model), "save_pretrained", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_adapter(model, tmp_path / "adapter", tmp_path / "base")
    left = set(tmp_path.iterdir())
    assert len(left) == 2 and all(path.name.startswith((".adapter.", ".base.")) for path in left)
    save_adapter(model, tmp_path / "adapter", tmp_path / "base")  # by a process of the same number
    assert set(tmp_path.iterdir()) - left == {tmp_path / "adapter", tmp_path / "base"}


def test_names_that_other_modules_share_are_written_in_full(tmp_path):
    model = wrapped(target_modules=r".*layers\.1\..*q_proj")
    save_adapter(model, tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert sum("lora_A" in key for key in theirs.state_dict()) == 1


def test_a_wrapped_and_compiled_model_saves_as_itself(tmp_path):
    model = wrapped()
    save_adapter(model, tmp_path / "plain")
    save_adapter(torch.compile(nn.DataParallel(model)), tmp_path / "compiled", tmp_path / "base")
    config = json.loads((tmp_path / "compiled" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("plain", "compiled"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(base), logits(llama()))


# --- merged models out ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_model_is_an_ordinary_checkpoint(dtype, tmp_path):
    model = wrapped(llama(dtype), frozen=False)
    merge_and_reinit(model)
    trained(model)
    merge_and_unload(model)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again.model.layers[0].mlp.up_proj) is nn.Linear and again.dtype == dtype
    assert again.state_dict().keys() == llama().state_dict().keys()
    assert torch.equal(logits(again), logits(model))
    fresh = llama(dtype)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(fresh), logits(model))
    linear = nn.Linear(32, 32, dtype=dtype)
    linear.load_state_dict(model.model.layers[0].self_attn.q_proj.state_dict(), strict=True)


def test_a_layers_state_dict_is_a_linears_but_for_its_own_keys():
    """weight and bias keep nn.Linear's names: without the factors it is the frozen nn.Linear."""
    layer = FusedReLoRaLinear(8, 6, r=2)
    linear = nn.Linear(8, 6)
    missing, unexpected = linear.load_state_dict(layer.state_dict(), strict=False)
    assert not missing and set(unexpected) == {"lora_A", "lora_B", "merge_count"}
    x = torch.randn(3, 8)
    assert torch.equal(linear(x), layer(x))


def test_a_base_too_large_for_the_dtype_to_go_back_to_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4)).half()
    config = ReLoRaConfig(r=2, target_modules="all-linear", weight_dtype=torch.float32)
    apply_relora(model, config)
    with torch.no_grad():
        model[0].weight[1, 2] = 7e4
    with pytest.raises(
        FloatingPointError, match=r"0: expected a weight in the range of torch.float16, .* 7e\+04"
    ):
        save_adapter(model, tmp_path / "adapter", base_folder=tmp_path / "base")
    assert not list(tmp_path.iterdir())
    save_adapter(model.float(), tmp_path / "adapter", base_folder=tmp_path / "base")
