"""The network and its objective: causality, masks, packing, caching, parity with diffusers, learning, saving."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import (
    contract_of,
    diffusion_config,
    embodiment_dict,
    make_history,
    make_policy,
    make_stats,
    make_window,
    policy_config,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dita.batch import Batch
from dita.checkpoint import load_policy, save_policy
from dita.cli import compose
from dita.config import TrainConfig
from dita.embodiment import embodiment_from_dict
from dita.policy.diffusion import Diffusion
from dita.policy.model import DitaModel, timestep_embedding
from dita.policy.policy import Committed
from dita.policy.transformer import Trunk, block_mask, causal_mask
from dita.preprocess import Contract


def batch_of(policy, windows) -> Batch:
    return policy.preprocessor.batch(windows)


def run_trunk(trunk: Trunk, x: torch.Tensor, positions: torch.Tensor, prefix=None) -> torch.Tensor:
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    return trunk(x, trunk.layout(positions, valid, causal_mask(x.shape[1], x.device), prefix), prefix)


def extend_trunk(trunk: Trunk, x: torch.Tensor, positions: torch.Tensor, prefix=None):
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    return trunk.extend(x, trunk.layout(positions, valid, causal_mask(x.shape[1], x.device), prefix), prefix)


def test_prefix_then_suffix_equals_one_pass() -> None:
    torch.manual_seed(0)
    trunk = Trunk(32, 3, 2, 48)
    x = torch.randn(2, 9, 32)
    whole = run_trunk(trunk, x, torch.arange(9))
    prefix = extend_trunk(trunk, x[:, :3], torch.arange(3))
    prefix = extend_trunk(trunk, x[:, 3:5], torch.arange(3, 5), prefix)
    rest = run_trunk(trunk, x[:, 5:], torch.arange(5, 9), prefix)
    torch.testing.assert_close(rest, whole[:, 5:], atol=1e-5, rtol=0)
    with torch.no_grad():  # keys and values in place, twice: the second pass must not see the first
        room = prefix.with_room(4)
        assert not torch.equal(run_trunk(trunk, x[:, 1:5], torch.arange(5, 9), room), rest)
        assert torch.equal(run_trunk(trunk, x[:, 5:], torch.arange(5, 9), room), rest)


def test_rope_depends_on_differences_only() -> None:
    torch.manual_seed(0)
    trunk, x = Trunk(32, 2, 2, 48), torch.randn(2, 4, 32)
    a = run_trunk(trunk, x, torch.arange(4) * 0.5)
    torch.testing.assert_close(run_trunk(trunk, x, torch.arange(4) * 0.5 + 7.25), a, atol=1e-5, rtol=0)
    each = torch.arange(4) * 0.5 + torch.tensor([[0.0], [3.5]])  # a row of the batch may have its own positions
    torch.testing.assert_close(run_trunk(trunk, x, each), a, atol=1e-5, rtol=0)
    assert not torch.allclose(run_trunk(trunk, x, torch.arange(4) * 0.75), a, atol=1e-3)


def denoise(policy, context, x, t, slots) -> torch.Tensor:
    suffix = policy.model.suffix(context, slots, x.shape[1])
    return policy.model.denoise(x, policy.model.time_tokens(t), suffix)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("committed", [0, 2])
def test_packed_noise_samples_equal_separate_passes(spec, attention, committed) -> None:
    policy = make_policy(spec, action_attention=attention, max_committed_slots=committed)
    batch = batch_of(policy, [make_window(spec, 0), make_window(spec, 1)])
    slots = batch.action_valid.any(-1)
    x, t = torch.randn(2, 3, 6, 7), torch.tensor([[5, 50, 99], [0, 1, 2]])

    def gradient(packed: bool):
        policy.zero_grad()
        context = policy.model.context(batch.observation)
        if committed:
            actions = batch.actions[:, :committed]
            context = policy.model.commit(context, actions, slots[:, :committed], torch.tensor([1, 2]))
        if packed:
            out = denoise(policy, context, x, t, slots)
        else:
            parts = [denoise(policy, context, x[:, i : i + 1], t[:, i : i + 1], slots) for i in range(3)]
            out = torch.cat(parts, dim=1)
        out.square().mean().backward()
        return out.detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}

    (out_a, grad_a), (out_b, grad_b) = gradient(True), gradient(False)
    torch.testing.assert_close(out_a, out_b, atol=2e-6, rtol=0)
    assert grad_a.keys() == grad_b.keys() and len(grad_a) > 20
    scale = max(g.abs().max() for g in grad_a.values())
    assert max((grad_a[n] - grad_b[n]).abs().max() for n in grad_a) <= 1e-6 * scale


def test_action_slots_are_causal_or_not(spec) -> None:
    for attention, reaches_back in (("causal", False), ("bidirectional", True)):
        policy = make_policy(spec, action_attention=attention)
        observation = batch_of(policy, [make_window(spec, 0)]).observation
        context = policy.model.context(observation)
        x, t, slots = torch.randn(1, 1, 6, 7), torch.tensor([[10]]), torch.ones(1, 6, dtype=torch.bool)
        changed = x.clone()
        changed[0, 0, -1] += 1
        a, b = (denoise(policy, context, y, t, slots) for y in (x, changed))
        assert (not torch.equal(a[:, :, :-1], b[:, :, :-1])) == reaches_back


def test_committed_actions_stand_where_the_sequence_says(spec) -> None:
    """[context; tau(0); 2 clean; tau(t); 4 noisy] by hand, in one pass, equals the padded form of `commit`."""
    policy = make_policy(spec, max_committed_slots=3).eval()
    model = policy.model
    batch = batch_of(policy, [make_window(spec, 0), make_window(spec, 1)])
    slots, x, t = torch.ones(2, 6, dtype=torch.bool), torch.randn(2, 1, 6, 7), torch.tensor([[40], [40]])
    context = model.context(batch.observation)
    committed = model.commit(context, batch.actions[:, :3], slots[:, :3], torch.tensor([2, 0]))
    out = denoise(policy, committed, x, t, slots)
    clean = torch.cat([model.time_tokens(torch.zeros(2, 1)), model.action(batch.actions[:, :2])], dim=1)
    noisy = torch.cat([model.time_tokens(t), model.action(x[:, 0, 2:])], dim=1)
    positions = context.observed + torch.arange(3 + 5)
    hidden = run_trunk(model.trunk, torch.cat([clean, noisy], dim=1), positions, context.prefix)
    torch.testing.assert_close(out[0, 0, 2:], model.head(hidden)[0, 4:], atol=2e-6, rtol=0)
    # a row with nothing committed is the published sequence
    torch.testing.assert_close(out[1], denoise(policy, context, x, t, slots)[1], atol=2e-6, rtol=0)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("count", [[2, 2], [3, 1], [2, 0]])
def test_trimmed_inference_equals_the_padded_one(spec, attention, count) -> None:
    policy = make_policy(spec, action_attention=attention, max_committed_slots=3).eval()
    batch = batch_of(policy, [make_window(spec, 0), make_window(spec, 1)])
    context, plan = policy.model.context(batch.observation), policy.diffusion.plan(4, policy.device)
    decided = Committed(batch.actions, torch.tensor(count), torch.zeros(4, *batch.actions.shape))
    noise, traces = torch.randn(2, 3, 6, 7), ([], [])
    full, trimmed = (
        policy.act(context, batch.observation.embodiment, noise, plan, decided, trace, trim)
        for trace, trim in zip(traces, (False, True), strict=True)
    )
    torch.testing.assert_close(trimmed, full, atol=1e-5, rtol=0)
    assert [t.shape[2] for t in traces[1]] == [6 - min(count)] * 4 and traces[0][0].shape[2] == 6


def test_committed_slots_are_shown_clean_and_not_learned(spec, monkeypatch) -> None:
    """Whatever the network says at slots that are decided already, the loss does not change; at free ones it does."""
    policy = make_policy(spec, max_committed_slots=3)
    batch = batch_of(policy, [make_window(spec, i) for i in range(16)])
    count = policy.draw(16, 2, torch.Generator().manual_seed(5)).committed  # what `loss` draws
    assert set(count.tolist()) == {0, 1, 2, 3}
    committed = torch.arange(6) < count[:, None]  # [b n]
    denoise, losses = policy.model.denoise, []
    for wrong in (torch.zeros_like(committed), committed, ~committed):
        monkeypatch.setattr(
            policy.model, "denoise", lambda *a, w=wrong: denoise(*a) + 1000 * w[:, None, :, None].float()
        )
        losses.append(policy.loss(batch, 2, torch.Generator().manual_seed(5)).item())
    assert losses[0] == losses[1] and losses[2] > 1e5


def test_half_of_the_rows_have_nothing_committed_and_the_others_any_number(spec) -> None:
    policy = make_policy(spec, max_committed_slots=3)
    counts = torch.bincount(policy.draw(7000, 1, torch.Generator().manual_seed(5)).committed) / 7000
    np.testing.assert_allclose(counts, [4 / 7, 1 / 7, 1 / 7, 1 / 7], atol=0.02)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_masked_entries_have_no_influence(attention, data) -> None:
    """Any values in masked dims, padded slots, hidden frames and padded state change neither loss nor real outputs."""
    spec = embodiment_from_dict(embodiment_dict())
    policy = make_policy(spec, action_attention=attention, max_committed_slots=2, cameras=2).eval()
    real = data.draw(st.integers(1, 6), "real steps")
    window = make_window(spec, 0, step_valid=np.arange(6) < real)
    first = data.draw(st.booleans(), "first frame is real")
    batch = batch_of(policy, [dataclasses.replace(window, frame_valid=np.array([first, True])), make_window(spec, 1)])
    garbage = data.draw(st.floats(-50, 50), "garbage")
    o = batch.observation
    hidden = ~o.image_valid[..., None, None, None].expand_as(o.images)
    changed = Batch(
        dataclasses.replace(
            o,
            images=torch.where(hidden, torch.full_like(o.images, int(abs(garbage))), o.images),
            state=torch.where(o.state_valid[:, None], o.state, torch.full_like(o.state, garbage)),
            language=torch.where(o.language_valid, o.language, torch.full_like(o.language, 7)),
        ),
        torch.where(batch.action_valid, batch.actions, torch.full_like(batch.actions, garbage)),
        batch.action_valid,
    )
    for k in (1, 3):
        a, b = (policy.loss(x, k, torch.Generator().manual_seed(k)).item() for x in (batch, changed))
        assert a == b
    noise = torch.randn(2, 1, 6, 7, generator=torch.Generator().manual_seed(0))
    dims = policy.dim_valid[o.embodiment][:, None, None]
    loud = torch.where(dims, noise, torch.full_like(noise, garbage))
    assert torch.equal(policy.sample(o, noise, 3), policy.sample(changed.observation, loud, 3))


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_masked_values_move_neither_loss_nor_outputs(spec, attention) -> None:
    policy = make_policy(spec, action_attention=attention)
    steps = np.array([True, True, True, True, False, False])
    window = make_window(spec, 0, step_valid=steps)
    batch = batch_of(policy, [window])

    def loss_of(b: Batch) -> float:
        return policy.loss(b, 2, torch.Generator().manual_seed(1)).item()

    garbage = torch.where(batch.action_valid, batch.actions, torch.full_like(batch.actions, 77.0))
    assert loss_of(dataclasses.replace(batch, actions=garbage)) == loss_of(batch)
    # an invalid first frame: its pixels must not matter
    hidden = dataclasses.replace(window, frame_valid=np.array([False, True]))
    dark = dataclasses.replace(
        hidden, images={"cam0": hidden.images["cam0"] * np.array([0, 1], np.uint8)[:, None, None, None]}
    )
    assert loss_of(batch_of(policy, [hidden])) == loss_of(batch_of(policy, [dark]))
    assert loss_of(batch_of(policy, [hidden])) != loss_of(batch)


def test_a_batch_row_does_not_see_another_row(spec) -> None:
    policy = make_policy(spec).eval()
    windows = [make_window(spec, 0), make_window(spec, 1, instruction="open the drawer"), make_window(spec, 2)]
    noise = torch.randn(3, 1, 6, 7)
    together = policy.sample(policy.preprocessor.observe(windows), noise, 4)
    alone = [policy.sample(policy.preprocessor.observe([w]), noise[i : i + 1], 4) for i, w in enumerate(windows)]
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-4, rtol=0)


def wavy(x: torch.Tensor, t: float) -> torch.Tensor:
    return torch.tanh(x * 1.3 + t / 100)  # any smooth function will do


def sample_ours(ours: Diffusion, noise: torch.Tensor, steps: int) -> torch.Tensor:
    plan = ours.plan(steps)
    return ours.sample(lambda x, i: wavy(x, float(plan.times[i])), noise, torch.ones(2, 7, dtype=torch.bool), plan)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_ddim_equals_diffusers(kind, spacing, schedule) -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    config = diffusion_config(prediction_type=kind, timestep_spacing=spacing, beta_schedule=schedule)
    peer = DDIMScheduler(
        num_train_timesteps=100, beta_start=1e-4, beta_end=0.02, beta_schedule=schedule, prediction_type=kind,
        timestep_spacing=spacing, clip_sample=True, clip_sample_range=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    noise = torch.randn(2, 1, 5, 7)
    for steps in (1, 5, 10, 7):
        peer.set_timesteps(steps)
        y = noise
        for t in peer.timesteps:
            y = peer.step(wavy(y, float(t)), t, y).prev_sample
        torch.testing.assert_close(sample_ours(Diffusion(config), noise, steps), y, atol=2e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_dpm_solver_equals_diffusers(kind, spacing, schedule) -> None:
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    config = diffusion_config(
        prediction_type=kind, timestep_spacing=spacing, beta_schedule=schedule, solver="dpm_solver++", clip_sample=None
    )
    peer = DPMSolverMultistepScheduler(
        num_train_timesteps=100, beta_start=1e-4, beta_end=0.02, beta_schedule=schedule, prediction_type=kind,
        timestep_spacing=spacing, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero",
    )  # fmt: skip
    torch.manual_seed(0)
    noise = torch.randn(2, 1, 5, 7)
    for steps in (1, 2, 5, 10, 7):
        peer.set_timesteps(steps)
        y = noise
        for t in peer.timesteps:
            y = peer.step(wavy(y, float(t)), t, y).prev_sample
        torch.testing.assert_close(sample_ours(Diffusion(config), noise, steps), y, atol=2e-4, rtol=1e-4)


def test_zero_terminal_snr_samples_are_finite() -> None:
    for solver in ("ddim", "dpm_solver++"):
        config = diffusion_config(
            prediction_type="v_prediction", zero_terminal_snr=True, timestep_spacing="trailing", solver=solver
        )
        assert torch.isfinite(sample_ours(Diffusion(config), torch.randn(2, 1, 5, 7), 5)).all()


FLOW = {"objective": "flow", "prediction_type": "velocity", "solver": "euler", "clip_sample": None}


def test_flow_follows_straight_lines() -> None:
    flow = Diffusion(diffusion_config(**FLOW))
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 1, 5, 7), torch.randn(2, 1, 5, 7)
    t = torch.tensor([[25.0], [80.0]])
    torch.testing.assert_close(flow.add_noise(x0, noise, t)[1], 0.2 * x0[1] + 0.8 * noise[1])
    torch.testing.assert_close(flow.target(x0, noise, t), noise - x0)
    plan = flow.plan(4)
    assert plan.times.tolist() == [100.0, 75.0, 50.0, 25.0]
    dims = torch.ones(2, 7, dtype=torch.bool)
    # the true velocity of a single target leads to it in one step; the Euler steps are those of the definition
    torch.testing.assert_close(flow.sample(lambda x, i: noise - x0, noise, dims, flow.plan(1)), x0, atol=1e-5, rtol=0)
    y = noise
    for s in (1.0, 0.75, 0.5, 0.25):
        y = y - 0.25 * wavy(y, 100 * s)
    torch.testing.assert_close(sample_ours(flow, noise, 4), y, atol=1e-5, rtol=0)


def test_objectives_that_do_not_go_together_are_refused() -> None:
    for wrong in ({"objective": "flow"}, {"solver": "euler"}, {"prediction_type": "velocity"}):
        with pytest.raises(ValueError, match=r"goes with prediction_type=velocity and solver=euler"):
            diffusion_config(**wrong)


def test_noising_equals_diffusers() -> None:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    ours = Diffusion(diffusion_config(prediction_type="v_prediction"))
    peer = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    x0, noise, t = torch.randn(4, 3, 5, 7), torch.randn(4, 3, 5, 7), torch.randint(100, (4, 3))
    flat = (x0.flatten(0, 1), noise.flatten(0, 1), t.flatten())
    torch.testing.assert_close(ours.add_noise(x0, noise, t).flatten(0, 1), peer.add_noise(*flat))
    torch.testing.assert_close(ours.target(x0, noise, t).flatten(0, 1), peer.get_velocity(*flat))


def test_zero_terminal_snr_needs_another_prediction() -> None:
    with pytest.raises(ValueError, match="zero_terminal_snr"):
        diffusion_config(zero_terminal_snr=True)
    table = Diffusion(diffusion_config(zero_terminal_snr=True, prediction_type="v_prediction")).alphas_cumprod
    assert float(table[-1]) == pytest.approx(0.0, abs=1e-12)


def test_timestep_embedding_values() -> None:
    tau = timestep_embedding(torch.tensor([0, 3]), 8)
    w = 10000.0 ** (-np.arange(4) / 3)
    np.testing.assert_allclose(tau[0], [0, 0, 0, 0, 1, 1, 1, 1])
    np.testing.assert_allclose(tau[1], np.concatenate([np.sin(3 * w), np.cos(3 * w)]), rtol=1e-6)


def test_errors_are_sums_over_true_entries_of_each_window() -> None:
    diffusion = Diffusion(diffusion_config(objective="behaviour_cloning"))
    actions, mask = torch.zeros(2, 1, 3), torch.tensor([[[True, False, True]], [[False, True, False]]])
    out = torch.tensor([1.0, 9.0, 3.0]).expand(2, 1, 1, 3)
    nothing = torch.zeros(2, 1)
    assert diffusion.errors(lambda x, t: out, actions, mask, nothing, out).tolist() == [10.0, 81.0]


def test_block_mask_keeps_copies_apart() -> None:
    mask = block_mask(causal_mask(2, torch.device("cpu")), 2)
    assert mask.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize(
    "objective", [{}, {"objective": "behaviour_cloning"}, FLOW, {"prediction_type": "sample", "solver": "dpm_solver++"}]
)
def test_overfits_one_batch(spec, objective) -> None:
    policy = make_policy(spec, diffusion=objective)
    windows = [make_window(spec, i, instruction=s) for i, s in enumerate(["press the button", "open the drawer"])]
    batch = batch_of(policy, windows)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(150):
        loss = policy.loss(batch, 8, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy.eval()
    noise = torch.randn(2, 1, 6, 7, generator=torch.Generator().manual_seed(0))
    actions = policy.sample(batch.observation, noise, 10)[:, 0]
    error = (actions - batch.actions).abs()[batch.action_valid]
    assert float(error.mean()) < 0.15
    assert torch.all(actions[~batch.action_valid] == 0)


def test_recomputed_activations_give_the_same_gradients(spec) -> None:
    def gradients(checkpointing: bool) -> dict:
        policy = make_policy(spec, max_committed_slots=2)
        if checkpointing:
            policy.model.checkpoint_activations()
        batch = batch_of(policy, [make_window(spec, 0), make_window(spec, 1)])
        policy.loss(batch, 2, torch.Generator().manual_seed(0)).backward()
        return {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}

    kept, recomputed = gradients(False), gradients(True)
    assert kept.keys() == recomputed.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-7, rtol=1e-5)


def test_shipped_sizes() -> None:
    sizes = {}
    for name in ("dita_tiny", "dita_small"):
        config = compose("train", [f"policy={name}"], TrainConfig).policy
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in DitaModel(config, embodiments=3).parameters())
    assert 1e6 < sizes["dita_tiny"] < 3e6 and 27e6 < sizes["dita_small"] < 33e6, sizes


def test_predict_is_a_function_of_history_and_seed(spec) -> None:
    policy = make_policy(spec).eval()
    history = make_history(spec, 0)
    a, b, c = (policy.predict(history, seed=s) for s in (3, 3, 4))
    assert a.values.shape == (6, 4) and a.values.dtype == np.float32
    assert (a.stamp, a.action_dt, a.embodiment) == (0.05, 0.0125, "arm")
    np.testing.assert_array_equal(a.values, b.values)
    assert not np.array_equal(a.values, c.values)
    again = policy.predict_batch([history, make_history(spec, 1)], [3, 4], batch_size=4)
    padded = policy.predict_batch([history], [3], batch_size=4)
    np.testing.assert_array_equal(again[0].values, padded[0].values)  # one batch size: bit-equal whatever else is in it


def test_predict_refuses_what_does_not_fit(spec) -> None:
    policy = make_policy(spec)
    history = make_history(spec, 0)
    wrong_camera = [dataclasses.replace(history[0], images={"front": history[0].images["cam0"]})]
    wrong_size = [dataclasses.replace(history[0], images={"cam0": np.zeros((16, 16, 3), np.uint8)})]
    wrong_state = [dataclasses.replace(history[0], state=np.zeros(3, np.float32))]
    nan_state = [dataclasses.replace(history[0], state=np.full(4, np.nan, np.float32))]
    wrong_dtype = [dataclasses.replace(history[0], images={"cam0": np.zeros((32, 32, 3), np.float32)})]
    for bad, message in (
        (wrong_dtype, "got float32"), (wrong_camera, "front"),
        (wrong_size, "needs uint8"), (wrong_state, "got 3 values"), (nan_state, "not finite"),
        ([], "0 observations"), (history[::-1], "stamps"), (history * 2, "4 observations"),
        ([dataclasses.replace(history[0], instruction="x" * 99)], "99 bytes"),
        ([dataclasses.replace(history[0], instruction="")], "0 bytes"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            policy.predict(bad, seed=0)
    with pytest.raises(ValueError, match="knows"):
        policy.predict(history, seed=0, embodiment="other")
    with torch.no_grad():
        policy.model.head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        policy.predict(history, seed=0)


def test_two_embodiments_in_one_batch(spec) -> None:
    from conftest import embodiment_dict, field

    values = embodiment_dict("other", cameras=2, size=48) | {"action": [field("joints", "joint_position", 2, 3)]}
    other = embodiment_from_dict(values)
    config = policy_config(cameras=2, embodiment_token=True)
    from dita.policy.policy import DitaPolicy

    policy = DitaPolicy(config, diffusion_config(), contract_of([spec, other], config))
    batch = batch_of(policy, [make_window(spec, 0), make_window(other, 1)])
    assert batch.observation.images.shape == (2, 2, 2, 3, 32, 32)
    assert batch.observation.image_valid[:, 0].tolist() == [[True, False], [True, True]]
    assert batch.action_valid[:, 0].int().tolist() == [[1, 1, 1, 0, 0, 0, 1], [0, 0, 0, 1, 1, 0, 0]]
    assert torch.isfinite(policy.loss(batch, 2, torch.Generator().manual_seed(0)))
    chunk = policy.predict(make_history(other, 0), seed=0, embodiment="other")
    assert chunk.values.shape == (6, 2)
    with pytest.raises(ValueError, match="several embodiments"):
        policy.predict(make_history(other, 0), seed=0)


def test_save_and_load_are_equal(spec, tmp_path) -> None:
    policy = make_policy(spec).eval()
    save_policy(policy, tmp_path / "policy")
    loaded = load_policy(tmp_path)
    history = make_history(spec, 0)
    np.testing.assert_array_equal(policy.predict(history, seed=1).values, loaded.predict(history, seed=1).values)
    assert loaded.contract.root_hash == policy.contract.root_hash


def test_damaged_checkpoints_are_refused_by_file(spec, tmp_path) -> None:
    policy = make_policy(spec)
    folder = tmp_path / "policy"

    def fresh():
        save_policy(policy, folder)
        return folder

    weights = fresh() / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"model.safetensors does not fit its SHA-256"):
        load_policy(folder)
    weights.write_bytes(data[:-10])
    with pytest.raises(ValueError, match="truncated"):
        load_policy(folder)
    (fresh() / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json is missing"):
        load_policy(folder)
    (fresh() / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no manifest"):
        load_policy(folder)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no CUDA device"):
        load_policy(fresh(), "cuda") if not torch.cuda.is_available() else load_policy(fresh(), "cuda:99")


def test_edited_contract_is_refused(spec, tmp_path) -> None:
    contract = make_policy(spec).contract.to_dict()
    assert Contract.from_dict(json.loads(json.dumps(contract))).root_hash == contract["hash"]
    contract["embodiments"]["arm"]["stats"]["fields"]["action/delta"]["max"][0] *= 2
    with pytest.raises(ValueError, match="edited"):
        Contract.from_dict(contract)


def test_contract_names_the_field_that_differs(spec) -> None:
    from conftest import embodiment_dict

    contract = make_policy(spec).contract
    contract.check_embodiment(spec)
    values = embodiment_dict()
    values["action"][0]["reference"] = "measured"
    with pytest.raises(ValueError, match=r"action\[0\].reference: checkpoint 'commanded', here 'measured'"):
        contract.check_embodiment(embodiment_from_dict(values))
    renamed = dataclasses.replace(spec, robot="other words", limits=None)
    assert dataclasses.replace(contract, specs={"arm": renamed}).root_hash == contract.root_hash


def test_weights_that_are_not_finite_are_never_written(spec, tmp_path) -> None:
    policy = make_policy(spec)
    with torch.no_grad():
        policy.model.head.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"head\.weight"):
        save_policy(policy, tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


def test_mean_std_with_clipping_is_refused(spec) -> None:
    from dita.policy.policy import DitaPolicy

    config = policy_config()
    with pytest.raises(ValueError, match="clip_sample"):
        DitaPolicy(config, diffusion_config(), contract_of([spec], config, "mean_std"))
    DitaPolicy(config, diffusion_config(clip_sample=None), contract_of([spec], config, "mean_std"))


def test_stats_are_needed_for_every_field(spec) -> None:
    stats = make_stats(spec)
    fields = {k: v for k, v in stats.fields.items() if k != "action/grip"}
    contract = contract_of([spec], policy_config())
    from dita.preprocess import Preprocessor

    with pytest.raises(KeyError, match="action/grip"):
        Preprocessor(dataclasses.replace(contract, stats={"arm": dataclasses.replace(stats, fields=fields)}))
