"""The fast path: caches that change no bit, packed weights, graphs that are used only when they equal eager."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch
from conftest import contract_of, diffusion_config, embodiment_dict, field, make_history, make_policy, policy_config

from dita.checkpoint import load_policy, save_policy
from dita.embodiment import embodiment_from_dict
from dita.policy.fast import CudaGraphs, PackedLinear, PolicySession, Runner, inference_twin, judge, record
from dita.policy.policy import DitaPolicy


class FakeGraphs:
    """Replays by running the captured function again into its outputs; can fail or lie, as a driver may."""

    def __init__(self, fail_at: str | None = None, off_by: float = 0.0, after: int = 0) -> None:
        self.fail_at, self.off_by, self.after = fail_at, off_by, after
        self.captures = self.replays = 0

    def warm_up(self, run) -> None:
        if self.fail_at == "warm_up":
            raise RuntimeError("no stream")
        run()

    def capture(self, run):
        if self.fail_at == "capture":
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captures += 1
        outputs = tuple(x.clone() for x in run())

        def replay() -> None:
            self.replays += 1
            if self.fail_at == "replay" and self.replays > self.after:
                raise RuntimeError("an illegal memory access")
            with torch.no_grad():
                for buffer, value in zip(outputs, run(), strict=True):
                    buffer.copy_(value + self.off_by)

        return outputs, replay


def session(spec, graphs=None, path="auto", policy=None, **changes) -> PolicySession:
    return PolicySession(policy or make_policy(spec, **changes), path="graph" if graphs else path, graphs=graphs)


def ticks(spec, count: int, instruction: str = "press the button") -> list:
    """Histories of a camera that moves on by one frame per tick."""
    frames = make_history(spec, 5, count + 1)
    frames = [dataclasses.replace(f, instruction=instruction) for f in frames]
    return [frames[i : i + 2] for i in range(count)]


def count_frames(s: PolicySession) -> list[int]:
    seen = []
    eager = s._see

    def counted(*inputs):
        seen.append(1)
        return eager(*inputs)

    s._see = counted  # pyright: ignore
    return seen


@pytest.mark.parametrize("cameras", [1, 2])
def test_a_session_predicts_what_the_policy_predicts(cameras) -> None:
    spec = embodiment_from_dict(embodiment_dict(cameras=cameras))
    policy = make_policy(spec, cameras=3, embodiment_token=True).eval()
    s = session(spec, policy=policy)
    for i, history in enumerate([make_history(spec, 0, 1), *ticks(spec, 4)]):
        expected, got = policy.predict(history, seed=i), s.predict(history, seed=i)
        np.testing.assert_allclose(got.values, expected.values, atol=2e-7, rtol=0)  # of actions within 0.01
        assert (got.stamp, got.action_dt, got.embodiment) == (expected.stamp, expected.action_dt, expected.embodiment)
    assert s.path == "eager" and not s.refused


def test_the_frame_cache_changes_no_bit_and_saves_every_second_frame(spec) -> None:
    policy = make_policy(spec)
    cached, fresh = session(spec, policy=policy), session(spec, policy=policy)
    seen = count_frames(cached)
    for i, history in enumerate(ticks(spec, 6)):
        fresh.reset()
        assert np.array_equal(cached.predict(history, seed=i).values, fresh.predict(history, seed=i).values)
    assert len(seen) == 7  # two at first, then one a tick


def test_a_frame_that_was_looked_at_beforehand_changes_no_bit_and_is_not_encoded_again(spec) -> None:
    policy = make_policy(spec)
    ahead, fresh = session(spec, policy=policy), session(spec, policy=policy)
    seen = count_frames(ahead)
    for i, history in enumerate(ticks(spec, 6)[::2]):  # every second frame is acted on
        ahead.look(history[0])
        looked = len(seen)
        fresh.reset()
        assert np.array_equal(ahead.predict(history, seed=i).values, fresh.predict(history, seed=i).values)
        assert len(seen) == looked + 1 == 2 * (i + 1)
    for frame in make_history(spec, 7, 9):  # nobody acts: what is kept stays bounded
        ahead.look(frame)
    assert len(ahead._frames) == 4
    other = [dataclasses.replace(f, instruction="open the drawer") for f in ticks(spec, 1)[0]]
    ahead.look(other[0])
    fresh.reset()
    assert np.array_equal(ahead.predict(other, seed=1).values, fresh.predict(other, seed=1).values)


def test_frames_are_forgotten_with_the_instruction_the_episode_and_other_pixels(spec) -> None:
    policy = make_policy(spec)
    s, fresh = session(spec, policy=policy), session(spec, policy=policy)
    seen = count_frames(s)
    history = ticks(spec, 1)[0]
    other = [dataclasses.replace(f, instruction="open the drawer") for f in history]
    jumped = make_history(spec, 6)  # the same stamps, as after a clock that went back
    for given, new in ((history, 2), (history, 0), (other, 2), (history, 2), (jumped, 2)):
        del seen[:]
        fresh.reset()
        assert np.array_equal(s.predict(given, seed=1).values, fresh.predict(given, seed=1).values)
        assert len(seen) == new
    s.reset()
    del seen[:]
    s.predict(jumped, seed=1)
    assert len(seen) == 2
    pixels = jumped[1].images["cam0"]
    pixels[:] = 0  # a driver that reuses its buffer
    del seen[:]
    s.predict(jumped, seed=1)
    assert len(seen) == 1


def test_a_graph_that_equals_eager_is_used_and_keyed_by_shape(spec, caplog) -> None:
    policy = make_policy(spec)
    graphs = FakeGraphs()
    s, eager = session(spec, graphs, policy=policy), session(spec, policy=policy)
    for i, history in enumerate(ticks(spec, 5)):
        got, expected = s.predict(history, seed=i), eager.predict(history, seed=i)
        np.testing.assert_array_equal(got.values, expected.values)
        assert s.path == "graph"
    assert graphs.captures == 2 and not s.refused  # see and act
    other = dataclasses.replace(history[1], instruction="open the drawer", stamp=9.0)
    np.testing.assert_array_equal(s.predict([other], seed=0).values, eager.predict([other], seed=0).values)
    assert graphs.captures == 2  # another instruction is another input, not another shape
    committed = got.values[:2]
    s.predict(history, seed=0, committed=committed)
    assert graphs.captures == 3 and s.path == "graph"
    assert not caplog.records


@pytest.mark.parametrize(
    ("graphs", "why"),
    [
        (FakeGraphs("warm_up"), "no stream"),
        (FakeGraphs("capture"), "not permitted"),
        (FakeGraphs(off_by=1e-2), "differs from eager"),
        (FakeGraphs(off_by=float("nan")), "differs from eager"),
    ],
)
def test_a_graph_that_fails_or_lies_is_not_used_and_said_once(spec, caplog, monkeypatch, graphs, why) -> None:
    def no_compiler(*args, **kwargs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch.nn.Module, "compile", no_compiler)
    policy = make_policy(spec)
    s = session(spec, graphs, policy=policy)
    with caplog.at_level(logging.WARNING):
        for i, history in enumerate(ticks(spec, 3)):
            expected = session(spec, policy=policy).predict(history, seed=i)
            np.testing.assert_array_equal(s.predict(history, seed=i).values, expected.values)
    assert s.path == "eager" and why in s.refused["graph"] and "no C++ compiler" in s.refused["compiled"]
    assert len(caplog.records) == 4  # see and act, graph and compiled, once each


def test_a_replay_that_fails_later_falls_back_within_the_tick(spec, monkeypatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)  # compiles to itself
    policy = make_policy(spec)
    graphs = FakeGraphs("replay", after=9)
    s, eager = session(spec, graphs, policy=policy), session(spec, policy=policy)
    paths = []
    for i, history in enumerate(ticks(spec, 5)):
        np.testing.assert_allclose(
            s.predict(history, seed=i).values, eager.predict(history, seed=i).values, atol=1e-7, rtol=0
        )
        paths.append(s.path)
    assert paths[0] == "graph" and paths[-1] == "compiled" and "illegal memory" in s.refused["graph"]


def test_a_path_that_ignores_its_inputs_is_found_out() -> None:
    frozen = torch.ones(3)
    runner = Runner("f", lambda x: (x * 2,), [("graph", lambda inputs: lambda x: (frozen * 2,))],
                    lambda a, b: judge(a, b, 1e-5))  # fmt: skip
    assert runner(torch.ones(3))[0].tolist() == [2, 2, 2]
    assert runner.path == "eager" and "call 2" in runner.refused["graph"]


def test_recorded_inputs_are_copied_when_they_change() -> None:
    function = record(lambda x, y: (x + y,), [torch.zeros(2), torch.zeros(2)], FakeGraphs())
    x, y = torch.ones(2), torch.full((2,), 5.0)
    assert function(x, y)[0].tolist() == [6, 6]
    x += 1  # the same tensor with other content
    assert function(x, y)[0].tolist() == [7, 7]
    assert function(torch.zeros(2), y)[0].tolist() == [5, 5]


def test_compiled_is_a_path_too(spec) -> None:
    """Traced for real, without a C++ compiler: the graph that a compiler would get runs, and equals eager."""
    policy = make_policy(spec)
    s = session(spec, path="compiled", policy=policy)
    trunk_compile = torch.nn.Module.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", lambda self, **o: trunk_compile(self, backend="eager", **o))
        history = ticks(spec, 1)[0]
        got = s.predict(history, seed=0)
    assert s.path == "compiled", s.refused
    np.testing.assert_allclose(got.values, session(spec, policy=policy).predict(history, seed=0).values, atol=1e-7)


def test_packed_weights_give_the_same_products(spec) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    policy = make_policy(spec, dim=256, heads=4, ffn_dim=512).eval()
    twin = inference_twin(policy, pack=True)
    assert sum(isinstance(m, PackedLinear) for m in twin.modules()) >= 8
    assert not any(isinstance(m, PackedLinear) for m in policy.modules())
    block, other = policy.model.trunk.blocks[0], twin.model.trunk.blocks[0]
    x = torch.randn(2, 17, 256)
    torch.testing.assert_close(other.qkv(x), block.qkv(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other.down(x.repeat(1, 1, 2)), block.down(x.repeat(1, 1, 2)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trained", [0, 4])
def test_committed_actions_come_back_unchanged_and_move_the_rest(spec, trained) -> None:
    policy = make_policy(spec, max_committed_slots=trained).eval()
    s, history = session(spec, policy=policy), make_history(spec, 0)
    free = policy.predict(history, seed=3)
    committed = np.array([[0.004, -0.003, 0.002, 0.9], [0.001, 0.009, -0.008, -0.7]], np.float32)
    for predict in (policy.predict, s.predict):
        chunk = predict(history, seed=3, committed=committed)
        np.testing.assert_array_equal(chunk.values[:2], committed)
        assert np.abs(chunk.values[2:] - free.values[2:]).max() > 1e-6
        np.testing.assert_array_equal(predict(history, seed=3, committed=committed).values, chunk.values)
    other = policy.predict(history, seed=3, committed=-committed)
    assert np.abs(other.values[2:] - chunk.values[2:]).max() > 1e-6
    batch = policy.predict_batch([history, history], [3, 3], committed=[committed, committed[:1]])
    np.testing.assert_allclose(batch[0].values, chunk.values, atol=1e-6)
    most = trained or 5
    for bad in (np.zeros((most + 1, 4), np.float32), np.zeros((0, 4), np.float32), np.zeros(4, np.float32)):
        with pytest.raises(ValueError, match=rf"1\.\.{most} rows"):
            policy.predict(history, seed=0, committed=bad)
    with pytest.raises(ValueError, match="3 values"):
        policy.predict(history, seed=0, committed=np.zeros((1, 3), np.float32))
    with pytest.raises(ValueError, match="not finite"):
        policy.predict(history, seed=0, committed=np.full((1, 4), np.nan, np.float32))


def test_an_executed_action_clamps_the_past_slot(spec) -> None:
    policy = make_policy(spec, past_action_slots=1).eval()
    history, executed = make_history(spec, 0), np.full((1, 4), 0.005, np.float32)
    free, clamped = policy.predict(history, seed=0), policy.predict(history, seed=0, committed=executed)
    assert free.values.shape == clamped.values.shape == (6, 4)
    assert np.abs(free.values - clamped.values).max() > 1e-6  # causal attention: the past reaches the chunk
    two = policy.predict(history, seed=0, committed=np.concatenate([executed, executed * 0.5]))
    np.testing.assert_array_equal(two.values[0], executed[0] * 0.5)


def test_bf16_stays_near_fp32_per_step(spec, tmp_path) -> None:
    save_policy(make_policy(spec, dim=128, heads=2), tmp_path / "policy")
    full, half = (PolicySession(load_policy(tmp_path, precision=p)) for p in ("fp32", "bf16"))
    assert half.policy.model.dtype == torch.bfloat16
    assert half.policy.diffusion.alphas_cumprod.dtype == half.policy.model.vision.mean.dtype == torch.float32
    history, outputs = make_history(spec, 0), []
    for s in (full, half):
        act = s._act

        def spy(*inputs, act=act):
            result = act(*inputs)
            outputs.append(result[1][0].float())  # at the first step both start from the same noise
            return result

        s._act = spy  # pyright: ignore
        s.predict(history, seed=0)
    scale = float(outputs[0].abs().max())
    assert 0 < float((outputs[0] - outputs[1]).abs().max()) < 0.03 * scale


def test_a_policy_of_several_embodiments_needs_a_name(spec) -> None:
    values = embodiment_dict("other") | {"action": [field("joints", "joint_position", 2, 3)]}
    config = policy_config()
    both = [spec, embodiment_from_dict(values)]
    policy = DitaPolicy(config, diffusion_config(), contract_of(both, config))
    with pytest.raises(ValueError, match="several embodiments"):
        PolicySession(policy)
    assert PolicySession(policy, embodiment="other").predict(make_history(both[1], 0), seed=0).values.shape == (6, 2)


@pytest.mark.gpu
def test_cuda_graphs_equal_eager(spec) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    policy = make_policy(spec, dim=128, heads=2).to("cuda")
    s, eager = session(spec, CudaGraphs(), policy=policy), session(spec, path="eager", policy=policy)
    for i, history in enumerate(ticks(spec, 5)):
        np.testing.assert_allclose(s.predict(history, seed=i).values, eager.predict(history, seed=i).values, atol=1e-6)
    assert s.path == "graph", s.refused
