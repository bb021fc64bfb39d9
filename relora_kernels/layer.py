"""FusedReLoRaLinear: a drop-in for nn.Linear that trains A and B and keeps W frozen."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torch._subclasses import FakeTensor

from relora_kernels import sharding
from relora_kernels.ops import checks
from relora_kernels.ops.lora_linear import lora_linear
from relora_kernels.ops.merge import (
    Restart,
    check_backend,
    check_finite,
    merge_and_restart,
    merge_checked,
)
from relora_kernels.reference import philox

_NARROW = (torch.bfloat16, torch.float16)
STAGED_BYTES = 256 * 2**20  # a batch of merges ends when its copies on the device reach this


class FusedReLoRaLinear(nn.Linear):
    """y = x W^T + bias + s * (dropout(x) A^T) B^T, with W frozen and A, B trained.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        r: rank, >= 1.
        lora_alpha: s = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.
        lora_dropout: probability of dropping an element of x on the low-rank branch in training.
        lora_dtype: of A and B; default float32 for a 16-bit W (master copies, computed in W's
            dtype), else W's dtype.
        trainable_scaling: s = tanh(lora_scaling) with one trained parameter, which starts at 1
            (s = 0.76) and is set back to 1 after each merge: with B = 0 a scale of 0 would leave every
            gradient 0. lora_alpha and use_rslora have no effect then.
        merge_rounding: how a merge rounds W: "nearest", "stochastic" or "compensated" (see `merge_`).
            Default: compensated for a 16-bit W, nearest otherwise.
        seed, name: A is drawn from (seed, name, merge_count) alone. Without a name the first draw is
            from torch's generator, and later ones use the module path that `merge_and_reinit` fills in;
            `merge()` alone uses "", so that unnamed layers of one shape draw the same A.

    Parameters: ``weight`` (out, in), frozen; ``bias`` (out,), trained; ``lora_A`` (r, in), starts as
    U(-1/sqrt(in), 1/sqrt(in)); ``lora_B`` (out, r), starts as 0. Buffer: ``merge_count`` (int64).
    ``weight_residual`` (out, in): what compensated merges could not store in a 16-bit W. It is kept in
    host memory and is part of the state_dict; None until a merge or a state_dict needs it. Casts
    (``.half()``, ``.to(dtype)``) round W and its residual together and keep what the new W drops, if there is
    or was a residual; without one they round as those of ``nn.Linear`` (see `weight_dtype`). After
    ``to_empty`` call ``reset_parameters``, because a state_dict of the base model does not set the factors
    and the count.

    Raises ValueError or TypeError for r < 1, lora_alpha <= 0, a dropout outside [0, 1], an unknown
    rounding or a non-floating dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        r: int = 128,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        device=None,
        dtype: torch.dtype | None = None,
        lora_dtype: torch.dtype | None = None,
        *,
        trainable_scaling: bool = False,
        merge_rounding: str | None = None,
        seed: int = 0,
        name: str = "",
    ) -> None:
        checks.lora_options(
            "FusedReLoRaLinear", r, lora_alpha, lora_dropout, merge_rounding, seed,
            {"dtype": dtype, "lora_dtype": lora_dtype},
        )  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        self.weight.requires_grad_(False)
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.lora_dropout, self.merge_rounding = lora_dropout, merge_rounding
        self.seed, self.name = seed, name
        if lora_dtype is None:
            lora_dtype = torch.float32 if self.weight.dtype in _NARROW else self.weight.dtype
        factory = {"device": device, "dtype": lora_dtype}
        self.lora_A = nn.Parameter(torch.empty(r, in_features, **factory))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, **factory))
        self.lora_scaling = nn.Parameter(torch.empty(1, **factory)) if trainable_scaling else None
        self.register_buffer("merge_count", torch.zeros((), dtype=torch.int64, device=device))
        self.weight_residual: torch.Tensor | None = None
        # True if the last load_state_dict brought a residual, sharded or not all 0. Ranks compare it.
        self.residual_loaded = False
        self.residual_folded = False  # True while W is wide and has had a residual added to it
        self.unloaded_dtype = self.weight.dtype  # dtype of the nn.Linear that to_linear returns
        self.reset_lora_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 128,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        lora_dtype: torch.dtype | None = None,
        *,
        weight_dtype: torch.dtype | None = None,
        trainable_scaling: bool = False,
        merge_rounding: str | None = None,
        seed: int = 0,
        name: str = "",
    ) -> FusedReLoRaLinear:
        """A layer around `linear`'s own weight and bias, which are shared, not copied.

        The bias keeps its requires_grad. The weight's gradient is dropped, because no optimizer would
        clear it any more. `weight_dtype` stores W in another dtype, which `to_linear` undoes; if it is
        narrower and merges are compensated, what the cast drops becomes the first residual. The other
        arguments are the constructor's. Hooks stay with `linear` (apply_relora carries them over).
        Raises TypeError for anything but a plain ``nn.Linear`` with a plain weight.
        """
        if type(linear) is not nn.Linear or not isinstance(linear.weight, nn.Parameter):
            got = type(linear).__name__
            if type(linear) is nn.Linear:
                got = "one whose weight is computed (weight_norm, pruning); remove that first"
            raise TypeError(
                f"FusedReLoRaLinear.from_linear: expected a plain torch.nn.Linear, got {got}"
            )
        checks.plain_tensors("FusedReLoRaLinear.from_linear", weight=linear.weight)
        checks.no_subclass("FusedReLoRaLinear.from_linear", weight=linear.weight)
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None, r, lora_alpha,
            lora_dropout, use_rslora, "meta", weight_dtype or linear.weight.dtype, lora_dtype,
            trainable_scaling=trainable_scaling, merge_rounding=merge_rounding, seed=seed, name=name,
        )  # fmt: skip
        weight, device = linear.weight, linear.weight.device
        for key in ("lora_A", "lora_B", "lora_scaling"):
            parameter = getattr(layer, key)
            if parameter is not None:
                setattr(layer, key, nn.Parameter(torch.empty_like(parameter, device=device)))
        layer.merge_count = torch.zeros((), dtype=torch.int64, device=device)
        layer.weight, layer.bias, layer.unloaded_dtype = weight, linear.bias, weight.dtype
        if weight_dtype not in (None, weight.dtype):
            layer.weight = nn.Parameter(weight.detach().to(weight_dtype), requires_grad=False)
            layer._keep_cast(weight.detach(), layer._keeps_residual and weight.dtype not in _NARROW)
        layer.weight.requires_grad_(False)
        layer.weight.grad = None
        layer.train(linear.training)
        layer.reset_lora_parameters()
        return layer

    @property
    def scaling(self) -> float:
        """s as a number; with `trainable_scaling` it is read from the parameter."""
        if self.lora_scaling is not None:
            return torch.tanh(sharding.whole(self.lora_scaling.detach()).float()).item()
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def rounding(self) -> str:
        """merge_rounding, with None resolved for W's dtype."""
        default = "compensated" if self.weight.dtype in _NARROW else "nearest"
        return self.merge_rounding or default

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lora_B, scaling = self.lora_B, 1.0
        if self.lora_scaling is None:
            scaling = self.scaling
        else:
            lora_B = lora_B * torch.tanh(self.lora_scaling)
        dropout_p = self.lora_dropout if self.training else 0.0
        return lora_linear(x, self.weight, self.lora_A, lora_B, scaling, self.bias, dropout_p)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make the layer new: draw W and bias as nn.Linear does, A and B as the constructor does."""
        super().reset_parameters()
        if hasattr(self, "lora_A"):  # nn.Linear's constructor calls this before lora_A exists
            self.merge_count.zero_()
            self.weight_residual = None
            self.reset_lora_parameters()

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Draw A anew, zero B, set the trained scale to 1. W is left alone."""
        if self.lora_A.device.type == "meta":
            return
        bound = self._bound
        if self.name or int(self.merge_count) > 0:
            seed = philox.derive_seed("A", self.seed, self.name, int(self.merge_count))
            philox.uniform_(*sharding.local_rows(self.lora_A), bound, seed)
        else:
            self.lora_A.uniform_(-bound, bound)
        self.lora_B.zero_()
        if self.lora_scaling is not None:
            self.lora_scaling.fill_(1.0)

    def update_to_check(self) -> tuple:
        """(weight, lora_A, lora_B, scaling, residual, name) as `check_finite` takes them.

        The tensors are whole, so that all ranks of a sharded model reach the same verdict. The weight is
        gathered only in float16: in other dtypes its values do not matter.
        """
        weight, residual = self.weight.detach(), self.weight_residual
        if sharding.is_sharded(weight):
            residual = None  # each rank's own; less than one rounding step at float16's maximum
            if weight.dtype == torch.float16:
                weight = sharding.whole(weight)
            else:
                weight = weight.new_empty(weight.shape, device="meta")
        lora_A, lora_B = sharding.whole(self.lora_A.detach()), sharding.whole(self.lora_B.detach())
        return weight, lora_A, lora_B, self.scaling, residual, self.name or "FusedReLoRaLinear"

    def check_placement(self) -> None:
        """Raise ValueError unless parameters are whole or sharded by rows, W and lora_B in the same way."""
        sharding.row_dimension(self.lora_A)
        weight, lora_B = (sharding.local_rows(p.detach()) for p in (self.weight, self.lora_B))
        cut = [sharding.is_cut(p) for p in (self.weight, self.lora_B)]  # the same on all ranks
        if cut[0] != cut[1] or weight[1] != lora_B[1] or len(weight[0]) != len(lora_B[0]):
            raise ValueError(
                f"{self.name or type(self).__name__}: expected weight and lora_B of the same rows on a "
                f"rank, got {len(weight[0])} of weight from row {weight[1]} on and {len(lora_B[0])} of "
                f"lora_B from row {lora_B[1]} on; shard both, or neither (fully_shard's ignored_params)"
            )

    def check_merge(self) -> None:
        """Raise if a merge is refused: parameters are computed or sharded otherwise than by rows, gradients
        are pending, or the backend in force cannot merge."""
        for key in ("weight", "lora_A", "lora_B", "lora_scaling"):
            parameter = getattr(self, key)
            if parameter is not None and not isinstance(parameter, nn.Parameter):
                raise ValueError(
                    f"merge: expected plain parameters, got {self.name or type(self).__name__}.{key}, "
                    f"which is computed (a parametrization, weight_norm): what a merge wrote to it "
                    f"would be lost; remove that first"
                )
        for key in ("lora_A", "lora_B", "lora_scaling"):
            parameter = getattr(self, key)
            gradient = None if parameter is None else parameter.grad
            if gradient is not None and not gradient.is_meta and sharding.whole(gradient).any():
                raise RuntimeError(
                    f"merge: expected no pending gradients, got {self.name or type(self).__name__}."
                    f"{key}.grad, a gradient of factors that the merge replaces; call "
                    f"optimizer.step() and optimizer.zero_grad() first"
                )
        self.check_placement()
        weight, lora_A, lora_B = (
            sharding.local_rows(p.detach())[0] for p in (self.weight, self.lora_A, self.lora_B)
        )
        check_backend(weight, lora_A, lora_B, self.rounding)

    @torch.no_grad()
    def merge(self) -> None:
        """Merge and restart: W <- round(W + s B A), A drawn anew, B zeroed, a trained scaling back to 1,
        merge_count + 1.

        The function that the layer computes stays the same up to the rounding of W. Raises
        RuntimeError while gradients of A or B are pending, ValueError for parametrized parameters,
        FloatingPointError if the update is not finite, and BackendUnavailable if a named backend cannot
        merge; nothing is changed then. For a model sharded by fully_shard call merge_and_reinit instead:
        after a forward pass this layer may hold unsharded parameters, and writes to those are lost.
        """
        merge_layers([self])

    def check_unload(self) -> None:
        """Raise if no nn.Linear can be made: parameters are sharded, or the backend in force cannot merge."""
        if sharding.is_sharded(self.weight):
            raise TypeError(
                f"{self.name or 'FusedReLoRaLinear'}: expected unsharded parameters, got a DTensor; "
                f"load the full state_dict into an unsharded model and merge that"
            )
        if not self.weight.is_meta:
            merged = self.weight.new_empty((0, 0), dtype=self._merging_dtype)  # a stand-in
            check_backend(merged, self.lora_A.detach(), self.lora_B.detach(), "nearest")

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A plain trainable nn.Linear holding round(W + residual + s B A); this layer is left alone.

        Its dtype is that of the weight which the layer was made from or last cast to. Raises
        FloatingPointError if the update is not finite or the result leaves that dtype's range, TypeError for
        sharded parameters, BackendUnavailable if a named backend cannot merge.
        """
        self.check_unload()
        merged = self.weight.detach().to(self._merging_dtype, copy=True)
        residual = self.weight_residual
        residual = None if residual is None else residual.to(merged.device, merged.dtype, copy=True)
        if residual is not None and merged.dtype not in _NARROW:
            merged += residual
            residual = None
        rounding = "nearest" if residual is None else "compensated"
        factors = self.lora_A.detach(), self.lora_B.detach()
        check_finite([(merged, *factors, self.scaling, residual, self.name or "FusedReLoRaLinear")])
        merge_checked(merged, *factors, self.scaling, rounding, residual, 0)
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta"
        )
        linear.weight, linear.bias = nn.Parameter(self._unloaded(merged)), self.bias
        return linear.train(self.training)

    def frozen_weight(self) -> torch.Tensor:
        """W as the nn.Linear has it that the factors were added to: in its dtype, which takes in the residual if
        it is another than W's. Raises FloatingPointError if W leaves that dtype's range."""
        weight = self.weight.detach()
        if weight.dtype == self.unloaded_dtype:
            return weight
        exact = weight.to(self._merging_dtype, copy=True)
        if self.weight_residual is not None:
            exact += self.weight_residual.to(exact)
        return self._unloaded(exact)

    @property
    def _merging_dtype(self) -> torch.dtype:
        """Of sums that are to be rounded to unloaded_dtype: as wide as that and as W's."""
        return torch.promote_types(self.weight.dtype, self.unloaded_dtype)

    def _unloaded(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` in unloaded_dtype."""
        result = weight.to(self.unloaded_dtype)
        if weight.dtype == result.dtype or weight.is_meta:
            return result
        if (result.isinf() & weight.isfinite()).any():
            raise FloatingPointError(
                f"{self.name or 'FusedReLoRaLinear'}: expected a weight in the range of {result.dtype}, which it "
                f"goes back to, got up to {weight.abs().amax():.4g}; cast the model to a wider dtype first, e.g. "
                f"model.float()"
            )
        return result

    def _restart(self) -> tuple[Restart, torch.Tensor | None]:
        """This rank's part of the merge, and the residual in host memory that will receive the new values.

        Allocates what the merge needs. The layer is not changed.
        """
        rounding = self.rounding
        weight, first_row = sharding.local_rows(self.weight.detach())
        residual = None
        if self._keeps_residual:
            residual = self.weight_residual
            if residual is None:
                residual = self._host_residual()
            elif len(residual) != len(weight):  # made before W was sharded
                residual = residual[first_row : first_row + len(weight)].clone()
        count = int(self.merge_count)
        restart_A, restart_row = sharding.local_rows(self.lora_A.detach())
        return Restart(
            weight=weight,
            lora_A=sharding.whole(self.lora_A.detach()),
            lora_B=sharding.local_rows(self.lora_B.detach())[0],
            scaling=self.scaling,
            rounding=rounding,
            residual=None if residual is None else residual.to(weight.device, non_blocking=True),
            seed=philox.derive_seed("W", self.seed, self.name, count),
            first_row=first_row,
            restart_A=restart_A,
            merge_count=self.merge_count,
            bound=self._bound,
            restart_seed=philox.derive_seed("A", self.seed, self.name, count + 1),
            restart_row=restart_row,
        ), residual

    @property
    def _keeps_residual(self) -> bool:
        return self.rounding == "compensated" and self.weight.dtype in _NARROW

    @property
    def _bound(self) -> float:
        """A is drawn from U(-bound, bound)."""
        return 1.0 / math.sqrt(self.in_features) if self.in_features > 0 else 0.0

    def _merged(self, restart: Restart, residual: torch.Tensor | None) -> None:
        """Do what remains once the layer's merge is enqueued."""
        if residual is not None:
            if restart.residual is not residual:
                residual.copy_(restart.residual)
            self.weight_residual = residual
        if self.lora_scaling is not None:
            self.lora_scaling.fill_(1.0)

    def _host_residual(self) -> torch.Tensor:
        """Zeros like W, or this rank's rows of it, in host memory because only merges read them; pinned if
        W is on a GPU."""
        weight, _ = sharding.local_rows(self.weight)
        with torch.inference_mode(False):  # later merges outside of inference mode write to it
            return torch.zeros(
                weight.shape, dtype=weight.dtype, device="cpu", pin_memory=weight.is_cuda
            )

    def _apply(self, fn, recurse=True):
        weight = self.weight.data
        stand_in = torch.empty(0, dtype=self.unloaded_dtype, device=weight.device)
        super()._apply(fn, recurse)
        self.unloaded_dtype = fn(stand_in).dtype
        if self.weight.dtype != weight.dtype:
            self._keep_cast(weight, self.residual_folded)
        return self

    def _keep_cast(self, before: torch.Tensor, keep: bool = False) -> None:
        """After a cast of W from `before`: set W to round(before + residual). If W is 16-bit and there was a
        residual, or `keep` is set, the rounding error becomes the new residual."""
        residual, kept = self.weight_residual, None
        narrow = self.weight.dtype in _NARROW
        if not self.weight.is_meta and (residual is not None or keep):
            if narrow:
                kept = self._host_residual()
            weight, first_row = sharding.local_rows(self.weight.data)
            wide = torch.promote_types(before.dtype, weight.dtype)
            wide = torch.promote_types(wide, torch.float32)
            exact = sharding.local_rows(before)[0].to(weight.device, wide)
            if residual is not None:
                if len(residual) != len(weight):  # made before W was sharded
                    residual = residual[first_row : first_row + len(weight)]
                exact = exact + residual.to(exact)
                weight.copy_(exact)
            if narrow:  # 0 where the value is beyond W's range
                kept.copy_((exact - weight.to(exact)).nan_to_num_(0.0, 0.0, 0.0))
        self.residual_folded = not narrow and (residual is not None or self.residual_folded)
        self.weight_residual = kept

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Also before the first merge, because some loaders fill in only the names that a new model's
        # state_dict already has.
        residual = self.weight_residual
        if residual is None and self._keeps_residual and not self.weight.is_meta:
            residual = self._host_residual()
            if type(residual) is torch.Tensor:  # not a FakeTensor
                self.weight_residual = residual
        if residual is not None:
            residual = sharding.like(self.weight, residual)
            destination[prefix + "weight_residual"] = residual

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, *rest):
        residual = state_dict.pop(prefix + "weight_residual", None)
        self._warn_of_lost_merges(state_dict, prefix)
        error_messages = rest[-1]
        before = len(error_messages)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *rest)
        if any(prefix + "weight" in message for message in error_messages[before:]):
            return  # W is as it was, and so its residual
        if prefix + "weight" in state_dict:
            self.weight_residual = None
        if residual is not None and residual.is_meta:  # nothing to load
            self.residual_loaded = False
            return
        self.residual_loaded = residual is not None and (
            sharding.is_sharded(residual) or bool(residual.any())
        )
        if residual is None:
            self._warn_of_lost_residual(
                *map(state_dict.get, (prefix + "weight", prefix + "merge_count"))
            )
            return
        if residual.shape != self.weight.shape:
            error_messages.append(
                f"{prefix}weight_residual: expected shape {tuple(self.weight.shape)}, "
                f"got {tuple(residual.shape)}"
            )
            return
        _, first_row = sharding.local_rows(self.weight)
        residual, _ = sharding.local_rows(residual)
        self.weight_residual = self._host_residual().to(residual.dtype)
        if len(residual) != len(self.weight_residual):  # all rows, for a sharded W
            residual = residual[first_row : first_row + len(self.weight_residual)]
        self.weight_residual.copy_(residual)
        if self.weight.dtype not in _NARROW:
            self._keep_cast(self.weight.data)  # no cast, but adds the residual to W

    def _warn_of_lost_merges(self, state_dict, prefix) -> None:
        """Factors that come without the weight they belong to. Every layer has the same message, so that Python
        shows it once."""
        count = state_dict.get(prefix + "merge_count")
        if prefix + "weight" in state_dict or not _is_count(count):
            return
        if _is_count(self.merge_count) and int(count) > int(self.merge_count):
            warnings.warn(
                "lora_A and lora_B of merged layers are loaded without the weights that they were merged into: "
                "unless those have been or will be loaded, too, all merges are lost. Save frozen parameters, too",
                UserWarning,
                stacklevel=2,
            )

    def _warn_of_lost_residual(self, weight, merge_count) -> None:
        """The message is the same for every layer, so that Python shows it once."""
        if weight is None or not _is_count(merge_count) or not merge_count > 0:
            return
        if self._keeps_residual and weight.dtype in _NARROW:
            warnings.warn(
                f"weights in {weight.dtype} are loaded without their weight_residual: what merges could not "
                f"store in them is lost. torch.distributed.checkpoint.state_dict needs the model itself, not "
                f"what DistributedDataParallel or torch.compile has made of it",
                UserWarning,
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha}, "
            f"lora_dropout={self.lora_dropout}, merge_rounding={self.rounding}"
        )


def _is_count(value) -> bool:
    is_tensor = torch.is_tensor(value) and not isinstance(value, FakeTensor)
    return is_tensor and value.numel() == 1 and not value.is_meta


@torch.no_grad()
def merge_layers(layers: Sequence[FusedReLoRaLinear]) -> None:
    """FusedReLoRaLinear.merge for many layers. Checks all layers first, then merges them in batches. A batch
    ends when its gathered factors and the residuals copied from host memory reach STAGED_BYTES.

    If a check fails (one of them refuses layers that share parameters), nothing is changed. After any other
    error, such as out of memory or Ctrl-C, each layer is either merged, restarted and counted, or untouched:
    a second call does not add an update twice.
    """
    layers = list(dict.fromkeys(layers))
    for layer in layers:
        layer.check_merge()
    factors = [p for layer in layers for p in (layer.weight, layer.lora_A, layer.lora_B)]
    checks.apart("merge", [sharding.local_rows(p.detach())[0] for p in factors])
    check_finite([layer.update_to_check() for layer in layers])
    waiting, staged = [], 0
    for layer in layers:
        waiting.append((layer, int(layer.merge_count), *layer._restart()))
        staged += _staged_bytes(*waiting[-1][2:])
        if staged >= STAGED_BYTES:
            _merge_waiting(waiting)
            waiting, staged = [], 0
    if waiting:
        _merge_waiting(waiting)


def _staged_bytes(restart: Restart, residual: torch.Tensor | None) -> int:
    staged = 0 if restart.residual is residual else restart.residual.nbytes
    gathered = restart.lora_A.data_ptr() != restart.restart_A.data_ptr()
    return staged + (restart.lora_A.nbytes if gathered else 0)


def _merge_waiting(waiting) -> None:
    with _keyboard_interrupt_later():
        try:
            merge_and_restart([restart for _, _, restart, _ in waiting])
        except BaseException:
            waiting = [entry for entry in waiting if int(entry[0].merge_count) != entry[1]]
            raise
        finally:
            for layer, _, restart, residual in waiting:
                layer._merged(restart, residual)


@contextlib.contextmanager
def _keyboard_interrupt_later():
    """Defer Ctrl-C to the end of the block: in between it would leave a layer half merged."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield  # Python runs signal handlers in the main thread only
        return
    received = []
    signal.signal(signal.SIGINT, lambda *args: received.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            handler(*received[-1])
