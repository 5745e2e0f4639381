"""Adam by optim.backend: torch's fused kernel, ours or NVIDIA apex's, behind the same face.

Whichever it is, the step may set `found_inf` and `grad_scale` on it, and an update whose gradients are not finite is
left out on the device; and its state_dict() is laid out as torch's Adam lays it out, so that checkpoints fit all.

apex's FusedAdam as of commit 6424da3b (2026-07).  Its kernel walks a parameter, its gradient and its two moments as
flat memory and looks at no strides: with channels-last weights and a gradient that lies otherwise it would add up
numbers that do not belong together, without an error.  So strides are compared at every step.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kernels import language
from kernels.adam_ema import FusedAdamEma
from pipeline.config import ConfigError, OptimConfig
from pipeline.errors import SettingsError, StorageError

_HOW = "docs/performance.md says how to build it"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def make_adam(parameters: Iterable[Tensor], cfg: OptimConfig, lr: float, averages: Sequence[Tensor] = ()) -> Optimizer:
    """Adam over parameters that already lie on their device in their memory format.

    Args:
        averages: of each parameter, in order, which an optimiser that can do so moves itself.

    Raises:
        ConfigError: optim.backend cannot be had here.
    """
    parameters = list(parameters)
    betas = (cfg.beta1, cfg.beta2)
    require_backend(cfg.backend, parameters[0].device)
    if cfg.backend == "apex":
        from apex.optimizers import FusedAdam

        return fit_in(FusedAdam)(parameters, lr=lr, betas=betas, adam_w_mode=False, capturable=True)
    if cfg.backend == "triton":
        return FusedAdamEma(parameters, lr, betas, averages=averages)
    return torch.optim.Adam(parameters, lr=lr, betas=betas, fused=True)


def that_averages(optimizer: Optimizer) -> FusedAdamEma | None:
    """The optimiser where its update moves averages as well: by its `ema_weight`, which the caller sets before."""
    return optimizer if isinstance(optimizer, FusedAdamEma) and optimizer.has_averages else None


def require_backend(backend: str, device: torch.device) -> None:
    """
    Raises:
        ConfigError: this machine lacks what optim.backend asks for; found out without importing any of it.
    """
    if backend == "triton" and device.type == "cuda" and not language.AVAILABLE:
        raise ConfigError(
            "optim.backend triton needs Triton, which comes with torch for CUDA and is not installed here"
        )
    if backend != "apex":
        return
    if device.type == "cpu":
        raise ConfigError("optim.backend must be torch or triton on a CPU, got 'apex'")
    found = importlib.util.find_spec("apex")
    if found is None:
        raise ConfigError(f"optim.backend apex needs NVIDIA's apex, which is not installed; {_HOW}")
    folders = [Path(each) for each in found.submodule_search_locations or ()]
    if not any((folder / "optimizers" / "fused_adam.py").exists() for folder in folders):
        raise ConfigError(
            "optim.backend apex needs NVIDIA's apex, but what is installed is another project of that name, which is "
            f"what `pip install apex` fetches: pip uninstall apex; {_HOW}"
        )
    if importlib.util.find_spec("amp_C") is None:
        raise ConfigError(f"optim.backend apex needs apex's CUDA kernels, and this one is built without them; {_HOW}")


class _Found:
    """What apex asks a GradScaler for, of gradients that are unscaled already."""

    def __init__(self, found_inf: Tensor) -> None:
        self.found_inf = found_inf

    def _check_inf_per_device(self, _optimizer: Optimizer) -> dict[torch.device, Tensor]:
        return {self.found_inf.device: self.found_inf}

    def _get_scale_async(self) -> Tensor:
        return torch.ones((), device=self.found_inf.device)


def fit_in(fused_adam: type[Optimizer]) -> Callable[..., Optimizer]:
    """apex's FusedAdam as a class that behaves here as torch's fused Adam does.

    Args:
        fused_adam: apex.optimizers.FusedAdam; made with capturable=True, since only then it leaves out an update
            without the host having to look.
    """

    class ApexAdam(fused_adam):  # type: ignore[misc, valid-type]
        found_inf: Tensor | None = None
        grad_scale: Tensor | None = None

        # Without apex's own argument `grad_scaler`: torch's GradScaler would fill it, and apex unscale a second time.
        def step(self, closure: Callable[[], float] | None = None) -> Any:
            assert self.grad_scale is None, "gradients are unscaled before"
            check_strides(self)
            scaler = _Found(self.found_inf) if self.found_inf is not None else None
            return super().step(closure, grad_scaler=scaler)

        def state_dict(self) -> dict[str, Any]:
            """As torch's Adam: a step count with each parameter, the learning rate a number."""
            state: dict[str, Any] = super().state_dict()
            for group in state["param_groups"]:
                count = group.pop("step", None)
                group["lr"] = float(group["lr"])
                if count is not None:  # apex takes an update that was left out back only when the next one begins
                    count = count - (self._dummy_overflow_buf == 1).to(count.dtype)
                for number in group["params"]:
                    if number in state["state"]:
                        moments = {key: state["state"][number][key] for key in _MOMENTS}
                        state["state"][number] = {"step": count.float().reshape(()).clone(), **moments}
            return state

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """From what `state_dict` of any backend gave; learning rate and betas stay this optimiser's.

            Raises:
                StorageError: its parameters have taken different numbers of steps, and apex counts one for all.
            """
            counts = {float(each["step"]) for each in state_dict["state"].values()}
            if len(counts) > 1:
                raise StorageError(
                    f"the checkpoint's optimiser has taken {min(counts):g} to {max(counts):g} steps, from which "
                    "optim.backend apex cannot go on; torch can"
                )
            mine = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
            moments = {n: {key: each[key] for key in _MOMENTS} for n, each in state_dict["state"].items()}
            groups = [
                {**own, "params": theirs["params"]}
                for own, theirs in zip(mine, state_dict["param_groups"], strict=True)
            ]
            super().load_state_dict({"state": moments, "param_groups": groups})
            for group in self.param_groups:
                group.pop("step", None)
                if counts:
                    device = group["params"][0].device
                    group["step"] = torch.tensor([int(next(iter(counts)))], dtype=torch.int, device=device)

    return ApexAdam


def _steps(tensor: Tensor) -> tuple[int, ...]:
    """Strides that say where numbers lie: those of sides longer than 1."""
    return tuple(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)


def check_strides(optimizer: Optimizer) -> None:
    """
    Raises:
        SettingsError: a gradient or a moment does not lie in memory as its parameter does; the same on every rank.
    """
    for group in optimizer.param_groups:
        for number, parameter in enumerate(group["params"]):
            state = optimizer.state.get(parameter, {})
            for name, other in (("grad", parameter.grad), *((key, state.get(key)) for key in _MOMENTS)):
                if other is not None and _steps(other) != _steps(parameter):
                    raise SettingsError(
                        f"optim.backend must be torch where memory lies differently: parameter {number} has strides "
                        f"{parameter.stride()}, its {name} {other.stride()}; got 'apex'"
                    ).on_every_rank()
