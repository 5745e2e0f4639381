"""optim.backend: apex's FusedAdam behind the face of torch's, by a stand-in with its signature, and by apex itself."""

import sys

import pytest
import torch

from kernels import language
from pipeline import checkpoint as checkpoints
from pipeline.assembly import make_plan
from pipeline.config import Config, ConfigError, DistributedConfig, LossConfig, OptimConfig
from pipeline.distributed import Ranks
from pipeline.errors import SettingsError, StorageError
from pipeline.optimisers import check_strides, fit_in, make_adam, require_backend
from pipeline.step import FastStep
from tests.players import BATCH, NZ, SIDE, assert_same, snapshot, tiny_players, train_some

CUDA = torch.device("cuda", 0)
ROUNDING = 2.0**-22
"""Adam's update in float32 in another order of operations: a few roundings of 2^-24, relative."""


class StandIn(torch.optim.Optimizer):
    """apex.optimizers.FusedAdam as of commit 6424da3b, capturable: its arguments, its state, its counting of steps.

    An update that is to be left out is counted, and not counted at the next one; its kernel then does nothing.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-8,
        adam_w_mode=True,
        weight_decay=0.0,
        amsgrad=False,
        set_grad_none=True,
        capturable=False,
        master_weights=False,
    ):
        assert capturable
        assert (amsgrad, master_weights, adam_w_mode) == (False, False, False)
        defaults = {"lr": torch.tensor(lr), "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, defaults | {"weight_decay": weight_decay})
        self._step_supports_amp_scaling = True
        self._dummy_overflow_buf = torch.tensor([0], dtype=torch.int)

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self, closure=None, grads=None, output_params=None, scale=None, grad_norms=None, grad_scaler=None):
        for group in self.param_groups:
            if "step" in group:
                group["step"] += (self._dummy_overflow_buf != 1).to(torch.int)
            else:
                group["step"] = torch.tensor([1], dtype=torch.int)
            found = torch.zeros(1)
            if grad_scaler is not None:
                device = group["params"][0].device
                found = grad_scaler._check_inf_per_device(self)[device]
                assert grad_scaler._get_scale_async() == 1, "gradients would be unscaled a second time"
            self._dummy_overflow_buf.copy_(found)
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                if self._dummy_overflow_buf == 1:
                    continue
                state["exp_avg"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                first = state["exp_avg"] / (1 - beta1 ** int(group["step"]))
                second = state["exp_avg_sq"] / (1 - beta2 ** int(group["step"]))
                p -= group["lr"] * first / (second.sqrt() + group["eps"])


def players_of(backend: str, lr: float = 2e-4, precision="fp32"):
    players = tiny_players(lr=lr, precision=precision)
    if backend == "apex":
        for name, network in (("optimizer_g", players.generator), ("optimizer_d", players.discriminator)):
            made = fit_in(StandIn)(network.parameters(), lr=lr, betas=(0.5, 0.999), adam_w_mode=False, capturable=True)
            setattr(players, name, made)
    return players


def assert_near(one, other) -> None:
    for name, value in one.state_dict().items():
        assert torch.allclose(value.float(), other.state_dict()[name].float(), rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_apex_trains_as_torch_does(precision):
    ours, theirs = (players_of(backend, precision=precision) for backend in ("apex", "torch"))
    for players in (ours, theirs):
        for scaler in (players.scaler_g, players.scaler_d):
            if scaler.is_enabled():
                scaler.load_state_dict(scaler.state_dict() | {"scale": 256.0})
        train_some(players, 3, precision)
    assert_near(ours.generator, theirs.generator)
    assert_near(ours.discriminator, theirs.discriminator)


def test_an_update_that_is_left_out_moves_nothing_and_does_not_count():
    weight = torch.nn.Parameter(torch.ones(3))
    apex = fit_in(StandIn)([weight], lr=0.1, adam_w_mode=False, capturable=True)
    counts = []
    for found in (0.0, 1.0, 1.0, 0.0):
        before = weight.detach().clone()
        weight.grad = torch.full((3,), torch.nan if found else 1.0)
        apex.grad_scale, apex.found_inf = None, torch.tensor(found)
        apex.step()
        assert torch.equal(before, weight) == bool(found)
        counts.append(float(apex.state_dict()["state"][0]["step"]))
    assert counts == [1, 1, 1, 2]
    # The bias of two good updates, not of four: Adam of a constant gradient moves by the learning rate each time.
    assert torch.allclose(weight, torch.full((3,), 1 - 2 * 0.1), rtol=0, atol=4 * ROUNDING)


@pytest.mark.parametrize(("first", "second"), [("apex", "torch"), ("torch", "apex"), ("apex", "apex")])
def test_a_checkpoint_of_one_backend_goes_on_with_another(first, second):
    whole, begun = players_of("torch"), players_of(first)
    for players in (whole, begun):
        train_some(players, 2)
    state = snapshot(begun)
    gone_on = players_of(second)
    train_some(gone_on, 1)  # what it has learned and counted is replaced
    checkpoints.restore(gone_on, state, 0, 1)
    assert_same(snapshot(gone_on)["optimizer_g"]["state"], state["optimizer_g"]["state"])
    assert gone_on.learning_rates() == {"learning_rate": pytest.approx(2e-4)}
    for players in (whole, gone_on):
        train_some(players, 3)
    assert_near(gone_on.generator, whole.generator)
    assert_near(gone_on.discriminator, whole.discriminator)


def test_a_checkpoint_holds_plain_values_whichever_backend_wrote_it(tmp_path):
    players = players_of("apex")
    train_some(players, 2)
    torch.save(snapshot(players), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    theirs = players_of("torch")
    train_some(theirs, 2)
    expected = snapshot(theirs)["optimizer_d"]["state"]
    found = state["optimizer_d"]["state"]
    assert found.keys() == expected.keys()
    for number, entry in found.items():
        assert {k: (v.shape, v.dtype) for k, v in entry.items()} == {
            k: (v.shape, v.dtype) for k, v in expected[number].items()
        }
        assert entry["step"] == expected[number]["step"] == 2


def test_a_checkpoint_whose_parameters_count_differently_is_refused():
    state = players_of("torch")
    train_some(state, 2)
    saved = state.optimizer_d.state_dict()
    saved["state"][1]["step"] = saved["state"][1]["step"] + 1
    with pytest.raises(StorageError, match=r"has taken 2 to 3 steps, from which optim\.backend apex cannot go on"):
        players_of("apex").optimizer_d.load_state_dict(saved)


def test_a_falling_learning_rate_reaches_apex():
    from pipeline.schedule import Schedule

    players = players_of("apex")
    schedule = Schedule("linear", 0.0, 4 * BATCH)
    step = FastStep(players, "fp32", channels_last=False, ema_half_life_images=0, schedule=schedule)
    images = torch.randint(0, 256, (BATCH, SIDE, SIDE, 3), dtype=torch.uint8)
    step(images, torch.randn(BATCH, NZ), 2 * BATCH, BATCH)
    assert players.learning_rates() == {"learning_rate": pytest.approx(1e-4)}


def test_memory_that_lies_differently_is_refused_in_one_line():
    weight = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    apex = fit_in(StandIn)([weight], adam_w_mode=False, capturable=True)
    weight.grad = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    apex.step()
    weight.grad = weight.grad.contiguous()
    with pytest.raises(SettingsError, match=r"^optim\.backend must be .*\(12, 1, 6, 3\), its grad \(12, 4, 2") as error:
        apex.step()
    assert error.value.shared
    weight.grad = torch.zeros_like(weight)
    apex.state[weight]["exp_avg_sq"] = apex.state[weight]["exp_avg_sq"].contiguous()
    with pytest.raises(SettingsError, match="its exp_avg_sq"):
        apex.step()
    narrow = torch.nn.Parameter(torch.randn(4, 1, 2, 2))  # the stride of a side of one says nothing
    narrow.grad = torch.randn(4, 1, 2, 2).as_strided((4, 1, 2, 2), (4, 1, 2, 1))
    check_strides(torch.optim.SGD([narrow]))


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Writes empty modules that stand before all others on the path."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(*names: str) -> None:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("raise ImportError('imported')\n")

    yield write
    for name in ("apex", "amp_C"):
        assert name not in sys.modules, "found without importing it"


def test_what_is_missing_is_told_in_one_line_without_importing_it(packages, monkeypatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "site-packages" not in p])
    require_backend("torch", CUDA)
    for device, files, message in [
        (torch.device("cpu"), (), "optim.backend must be torch or triton on a CPU, got 'apex'"),
        (CUDA, (), "which is not installed; docs/performance.md says how to build it"),
        (CUDA, ("apex/__init__.py",), "another project of that name, which is what `pip install apex` fetches"),
        (CUDA, ("apex/optimizers/fused_adam.py",), "this one is built without them"),
    ]:
        packages(*files)
        with pytest.raises(ConfigError) as error:
            require_backend("apex", device)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    packages("amp_C.py")
    require_backend("apex", CUDA)


def test_ours_needs_triton_on_a_gpu_only(monkeypatch):
    monkeypatch.setattr(language, "AVAILABLE", False)
    require_backend("triton", torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"optim\.backend triton needs Triton"):
        require_backend("triton", CUDA)


# --- with apex itself ------------------------------------------------------------------------------------------------


def apex_or_skip() -> OptimConfig:
    cfg = OptimConfig(backend="apex")
    try:
        require_backend("apex", CUDA)
    except ConfigError as missing:
        pytest.skip(str(missing))
    return cfg


@pytest.mark.gpu
def test_apexs_own_adam_equals_torchs_on_channels_last_weights():
    cfg = apex_or_skip()
    start = torch.randn(64, 32, 4, 4, device="cuda").to(memory_format=torch.channels_last)
    weights = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    pair = [make_adam([weights[0]], cfg, 2e-4), make_adam([weights[1]], OptimConfig(), 2e-4)]
    for found in (0.0, 1.0, 0.0, 0.0):
        gradient = torch.randn_like(start)
        for weight, optimizer in zip(weights, pair, strict=True):
            weight.grad = gradient.clone()
            optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(found, device="cuda")
            optimizer.step()
        assert torch.allclose(*weights, rtol=0, atol=2e-4 * 2.0**-16 + 2.0**-22)
    states = [optimizer.state_dict()["state"][0] for optimizer in pair]
    assert states[0]["step"] == states[1]["step"] == 3
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.allclose(states[0][key], states[1][key], rtol=2.0**-20, atol=2.0**-22)


@pytest.mark.gpu
def test_apexs_own_adam_waits_for_nothing():
    cfg = apex_or_skip()
    weight = torch.nn.Parameter(torch.randn(64, 64, device="cuda"))
    optimizer = make_adam([weight], cfg, 2e-4)
    for _ in range(2):
        weight.grad = torch.randn_like(weight)
        optimizer.grad_scale, optimizer.found_inf = None, torch.zeros((), device="cuda")
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_our_adam_moves_the_average_and_leaves_the_same_bits_on_a_cpu(backend):
    """As torch's Adam and then lerp do: through steps in which G does not learn and one that is left out."""
    players = tiny_players(backend=backend, memory_format=torch.channels_last)
    step = FastStep(players, "fp32", channels_last=False, ema_half_life_images=100, loss=LossConfig(d_steps=2))
    expected, before = {k: v.clone() for k, v in players.ema.items()}, None
    random = torch.Generator().manual_seed(3)
    for number in range(6):
        images = torch.rand(BATCH, 3, SIDE, SIDE, generator=random) * 2 - 1
        if number == 3:
            images[0, 0, 0, 0] = torch.nan
        seen = 1000 + number * BATCH
        step(images, torch.randn(BATCH, NZ, generator=random), seen, BATCH)
        live = dict(players.generator.named_parameters())
        if number == 3:
            assert step.skipped.tolist() == [1, 1]
            assert_same({k: p.detach() for k, p in live.items()}, before)
        before = {k: p.detach().clone() for k, p in live.items()}
        for name, average in expected.items():
            torch._foreach_lerp_([average], [before[name]], step.ema_weight(seen, BATCH))
        assert_same(players.ema, expected)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_our_adam_goes_on_from_torchs_checkpoint_to_the_bit_on_a_cpu(precision):
    plain, ours = tiny_players(precision=precision), tiny_players(precision=precision, seed=1, backend="triton")
    train_some(plain, 3, precision)
    checkpoints.restore(ours, snapshot(plain), 0, 1)
    assert_same(snapshot(ours), snapshot(plain))
    train_some(plain, 2, precision)
    train_some(ours, 2, precision)
    assert_same(snapshot(ours), snapshot(plain))


def test_our_adam_is_refused_where_gs_update_waits_for_the_other_ranks():
    cfg = Config(distributed=DistributedConfig(overlap_g=True), optim=OptimConfig(backend="triton"))
    with pytest.raises(ConfigError, match=r"optim\.backend must be torch or apex with distributed\.overlap_g"):
        make_plan(cfg, None, Ranks(0, 1, 0, 1, torch.device("cpu")))
