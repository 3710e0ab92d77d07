"""The example ``recurrent_ppo.py``: the task, resets, advantages, the loss, its command line."""

from __future__ import annotations

import math
import signal
import warnings
from argparse import Namespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

# Before the examples: it lets them be imported.
from example_runs import assert_refused, interrupt, run_fixture, start

# isort: split
import recurrent_ppo
from recurrent_ppo_lib import training
from recurrent_ppo_lib.policy import Policy
from recurrent_ppo_lib.repeat import SYMBOLS, RepeatFirst, RepeatPrevious
from recurrent_ppo_lib.report import agreement
from recurrent_ppo_lib.rollout import Actor, Rollout, advantages
from recurrent_ppo_lib.tasks import TASKS, make_envs
from recurrent_ppo_lib.tmaze import (
    BUMP,
    CORRIDOR,
    CUE_LEFT,
    CUE_RIGHT,
    FORWARD,
    JUNCTION,
    LEFT,
    RIGHT,
    TMaze,
)

BACKENDS = ("torch", "fastbptt")
CELLS = ("lstm", "gru")
SMALL = "--envs=3 --steps=20 --hidden=8 --keep=3".split()

run = run_fixture(recurrent_ppo.main, *SMALL)


@pytest.fixture
def trainers(monkeypatch):
    """The trainers that a run of the program makes, in the order in which it makes them."""
    made = []

    class Noted(training.Trainer):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(recurrent_ppo, "Trainer", Noted)
    return made


def make_actor(backend: str, cell: str, *, envs: int = 5, length: int = 3, seed: int = 0) -> Actor:
    """One that acts in float64, with a policy that is far from uniform."""
    torch.manual_seed(seed)
    policy = Policy(4, 3, backend, cell, hidden=8).double()
    with torch.no_grad():
        policy.actor.weight *= 300
    return Actor(make_envs(envs, "tmaze", length), policy, gamma=0.9, seed=seed)


def close(ours: object, theirs: object) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


# ---- the task


@pytest.mark.parametrize("task", TASKS)
def test_env_obeys_the_checker(task):
    name = f"checked/{task}-v0"
    gymnasium.register(name, lambda: TASKS[task].make(5).unwrapped)
    env = gymnasium.make(name).unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env, skip_render_check=True)


@pytest.mark.parametrize("turn", [LEFT, RIGHT])
@pytest.mark.parametrize("seed", range(4))
def test_the_cue_is_seen_once_and_wanted_at_the_junction(seed, turn):
    env = TMaze(length=6)
    observation, _ = env.reset(seed=seed)
    cue = LEFT if observation[CUE_LEFT] else RIGHT
    assert observation[CUE_LEFT] + observation[CUE_RIGHT] == observation[CORRIDOR] == 1
    observation, reward, terminated, truncated, _ = env.step(turn)  # into the wall
    assert (reward, terminated, truncated) == (BUMP, False, False)
    walked = 0
    while not observation[JUNCTION]:
        assert observation.tolist() == [0, 0, 1, 0]
        observation, reward, terminated, truncated, _ = env.step(FORWARD)
        assert (reward, terminated, truncated) == (0, False, False)
        walked += 1
    assert 4 <= walked <= 6
    assert observation.tolist() == [0, 0, 0, 1]
    assert env.step(FORWARD)[1:4] == (BUMP, False, False)
    assert env.step(turn)[1:4] == (1 if turn == cue else -1, True, False)


def test_cues_and_corridors_are_drawn_evenly():
    env = TMaze(length=6)
    env.reset(seed=0)
    drawn = []
    for _ in range(600):
        observation, _ = env.reset()
        drawn.append((observation[CUE_LEFT], env._ahead))
    shares = [drawn.count((cue, ahead)) / 600 for cue in (0, 1) for ahead in (4, 5, 6)]
    assert shares == pytest.approx([1 / 6] * 6, abs=0.05)


@pytest.mark.parametrize("env, lag", [(RepeatPrevious(3, 10), 3), (RepeatFirst(7), None)], ids=str)
def test_what_is_to_be_repeated(env, lag):
    """The right answers are worth 1 in all, one wrong answer less; the first step is marked."""
    observation, _ = env.reset(seed=3)
    seen, total, ends = [], 0.0, False
    while not ends:
        assert observation[:SYMBOLS].sum() == 1
        assert observation[SYMBOLS] == (not seen)
        seen.append(int(observation[:SYMBOLS].argmax()))
        wanted = 0 if lag is None else len(seen) - 1 - lag
        action = seen[wanted] if wanted >= 0 else 0
        is_wrong = len(seen) == 6
        observation, reward, ends, _, _ = env.step((action + is_wrong) % SYMBOLS)
        total += reward
    assert len(seen) == env.steps and env.counted == env.steps - (lag or 0)
    assert total == pytest.approx(1 - 2 / env.counted)


@pytest.mark.parametrize("cell", CELLS)
def test_backends_cut_at_the_same_steps(cell):
    """The gradients of both, by chunks of a rollout with resets; no cut is another gradient."""
    torch.manual_seed(0)
    found = {}
    for backend in BACKENDS:
        for chunk in (None, 3):
            torch.manual_seed(1)
            policy = Policy(4, 3, backend, cell, hidden=8, chunk=chunk).double()
            observations = torch.randn(11, 2, 4, dtype=torch.float64)
            resets = torch.zeros(11, 2, dtype=torch.bool)
            resets[4, 0] = resets[9, 1] = True
            logits, values, _ = policy(observations, policy.initial_state(2), resets)
            (logits.square().sum() + values.square().sum()).backward()
            found[backend, chunk] = [parameter.grad for parameter in policy.parameters()]
    for chunk in (None, 3):
        close(found["fastbptt", chunk], found["torch", chunk])
    assert not torch.allclose(found["torch", 3][3], found["torch", None][3])


# ---- resets


@pytest.mark.parametrize("backend", BACKENDS)
def test_resets_are_where_episodes_begin(backend):
    actor = make_actor(backend, "lstm")
    assert actor.envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    first, second = actor.collect(60), actor.collect(60)
    observations = torch.cat([first.observations, second.observations])
    resets, dones = torch.cat([first.resets, second.resets]), torch.cat([first.dones, second.dones])
    begins = observations[..., [CUE_LEFT, CUE_RIGHT]].any(-1)
    assert begins[0].all() and not resets[0].any()  # from a state that is zeros as it is
    assert torch.equal(resets[1:], begins[1:]) and torch.equal(resets[1:], dones[:-1])
    assert resets[:60].sum() > 10 and resets[60].any()  # inside the rollouts, and between them
    assert len(first.returns) == first.dones.sum()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_sees_what_acting_saw(backend, cell):
    """The pass over a whole rollout gives the probabilities and values of the single steps."""
    actor = make_actor(backend, cell)
    for _ in range(3):
        rollout = actor.collect(25)
        assert rollout.resets.any()
        logits, values, state = actor.policy(rollout.observations, rollout.state, rollout.resets)
        log_probs = logits.log_softmax(-1).gather(-1, rollout.actions.unsqueeze(-1)).squeeze(-1)
        close((log_probs, values, state), (rollout.log_probs, rollout.values, actor.state))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_episode_is_as_if_it_were_alone(backend, cell):
    actor = make_actor(backend, cell, envs=2)
    rollout = actor.collect(40)
    for b in range(2):
        ends = (rollout.dones[:, b].nonzero().flatten() + 1).tolist()
        assert len(ends) >= 3
        for begin, end in zip([0, *ends], ends, strict=False):
            alone = rollout.observations[begin:end, b : b + 1]
            resets = torch.zeros(end - begin, 1, dtype=torch.bool)
            _, values, _ = actor.policy(alone, actor.policy.initial_state(1), resets)
            close(values.squeeze(1), rollout.values[begin:end, b])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_crosses_a_reset(backend):
    policy = make_actor(backend, "lstm").policy
    observations = torch.rand(6, 1, 4, dtype=torch.float64, requires_grad=True)
    resets = torch.tensor([False, False, False, True, False, False]).unsqueeze(1)
    _, values, _ = policy(observations, policy.initial_state(1), resets)
    values[4].sum().backward()
    reached = observations.grad.abs().amax((1, 2)) > 0
    assert reached.tolist() == [False, False, False, True, True, False]


# ---- advantages


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_advantages_against_a_plain_loop(lam):
    torch.manual_seed(0)
    T, B, gamma = 30, 4, 0.9
    rewards, values = torch.randn(2, T, B, dtype=torch.float64)
    last = torch.randn(B, dtype=torch.float64)
    dones = torch.rand(T, B) < 0.2
    rollout = Rollout(
        **dict.fromkeys(("state", "resets", "observations", "actions", "log_probs", "returns")),
        values=values, rewards=rewards, dones=dones, last_values=last,
    )  # fmt: skip
    expected = torch.zeros_like(rewards)
    for b in range(B):
        for t in range(T):  # the sum of (gamma lam)^k delta_{t+k} to the end of the episode
            for k in range(T - t):
                s = t + k
                following = values[s + 1, b] if s + 1 < T else last[b]
                following = 0 if dones[s, b] else gamma * following
                expected[t, b] += (gamma * lam) ** k * (rewards[s, b] + following - values[s, b])
                if dones[s, b]:
                    break
    close(advantages(rollout, gamma, lam), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_time_limit_is_bootstrapped_through(backend):
    actor = make_actor(backend, "lstm", envs=2, length=2)  # the limit is 8 steps
    with torch.no_grad():
        actor.policy.actor.bias[FORWARD] += 1000  # never turns
    rollout = actor.collect(20)
    assert rollout.dones.nonzero()[:, 0].tolist() == [7, 7, 15, 15]
    junction = torch.tensor([[0.0, 0, 0, 1]]).expand(1, 2, 4)
    for end in (8, 16):  # the episode, and what was seen when its time was up
        episode = torch.cat([rollout.observations[end - 8 : end], junction])
        resets = torch.zeros(9, 2, dtype=torch.bool)
        _, values, _ = actor.policy(episode, actor.policy.initial_state(2), resets)
        close(rollout.rewards[end - 1], BUMP + 0.9 * values[-1])
    assert rollout.returns == pytest.approx(
        [6 * BUMP] * 4  # two steps to the junction, where it bumps; the bootstrap is no return
    )


# ---- training


@pytest.mark.parametrize("cell", CELLS)
def test_backends_agree_on_loss_and_gradients(cell):
    results = []
    for backend in BACKENDS:
        actor = make_actor(backend, cell)
        actor.collect(15)
        rollout = actor.collect(40)  # begins inside episodes
        assert rollout.resets.sum() > 5
        with torch.no_grad():  # another policy than the one that acted: some ratios are clipped
            for parameter in actor.policy.parameters():
                parameter += 0.03 * torch.ones_like(parameter)
        gains = advantages(rollout, 0.9, 0.95)
        loss = training.ppo_loss(actor.policy, rollout, gains, clip=0.05, entropy_weight=0.01)
        loss.backward()
        gradients = {
            name.replace("core.layer", "core"): parameter.grad
            for name, parameter in actor.policy.named_parameters()
        }
        results.append({"loss": loss.detach(), "gains": gains, **gradients})
    theirs, ours = results
    assert theirs.keys() == ours.keys() and len(ours) == 12
    for name, value in theirs.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_clipping_stops_the_objective():
    """Where the ratio has left the interval in the advantage's direction, no gradient is left."""
    for probability, reached in ((0.62, [0, 0, 1, 0]), (0.38, [1, 0, 0, 0]), (0.55, [1, 0, 1, 0])):
        logits = torch.tensor([[[probability, 1 - probability]] * 4]).log().requires_grad_()
        rollout = Namespace(
            observations=None, state=None, resets=None, values=torch.zeros(1, 4),
            actions=torch.zeros(1, 4, dtype=torch.long), log_probs=torch.full((1, 4), 0.5).log(),
        )  # fmt: skip
        gains = torch.tensor([[1.0, 0, -1, 0]])
        policy = lambda *_, logits=logits: (logits, torch.zeros(1, 4), None)  # noqa: E731
        training.ppo_loss(policy, rollout, gains, clip=0.2, entropy_weight=0.0).backward()
        assert (logits.grad[0].abs().amax(-1) > 1e-6).tolist() == list(map(bool, reached))


LEARNING = "--updates=22 --keep=3 --envs=16 --steps=64 --hidden=32 --lr=0.01".split()


@pytest.mark.slow
def test_learns_with_memory_and_not_without(run, trainers, monkeypatch):
    assert run("--backend=fastbptt", *LEARNING)[0] == 0
    forward = Policy.forward

    def forget(policy, observations, state, resets):
        return forward(policy, observations, state, torch.ones_like(resets))

    monkeypatch.setattr(Policy, "forward", forget)
    assert run("--backend=fastbptt", *LEARNING)[0] == 0
    with_memory, without = trainers
    assert with_memory.progress.solved is not None and with_memory.mean_return > 0.95
    assert without.progress.solved is None and max(without.progress.mean_return) < 0.5


# ---- the command line


@pytest.mark.parametrize("cell", CELLS)
def test_both_backends_run_alike_to_the_end(run, trainers, tmp_path, cell):
    status, out, _ = run(f"--cell={cell}", "--updates=4")
    assert status == 0
    theirs, ours = trainers
    assert [theirs.backend, ours.backend] == ["torch", "fastbptt"]
    assert len(ours.progress.losses) == 4 and sum(map(len, ours.progress.returns)) > 3
    assert ours.progress.losses == pytest.approx(theirs.progress.losses, rel=1e-3, abs=1e-4)
    assert agreement(theirs, ours)[0] == 4
    assert "the same episodes in the first 4 of 4 updates" in out
    assert "the mean return of the last 100 episodes is at least 0.9" in out

    rows = [line.strip("| ").split("|") for line in out.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows[2:]] == ["torch", "fastbptt", "torch / fastbptt"]
    for trainer, row in zip(trainers, rows[2:4], strict=True):
        assert 0 < trainer.core_seconds < trainer.progress.seconds[-1]
        cells = [trainer.mean_return, trainer.core_seconds, trainer.progress.seconds[-1]]
        assert [float(row[i]) for i in (1, 3, 4)] == pytest.approx(cells, abs=6e-3)
        assert row[2].strip() == "not reached"
    assert rows[4][3].strip().endswith("x") and rows[4][4].strip().endswith("x")
    assert (tmp_path / "out/curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_seed_decides_on_everything(run, trainers):
    for seed in (5, 5, 6):
        assert run("--backend=fastbptt", "--updates=3", f"--seed={seed}")[0] == 0
    first, same, other = (t.progress for t in trainers)
    assert first.losses == same.losses and first.returns == same.returns
    assert first.losses != other.losses


def test_the_timer_counts_training_alone(run, trainers):
    """Acting calls the core, too, but without gradients."""
    assert run("--backend=torch", "--updates=1")[0] == 0
    (trainer,) = trainers
    before = trainer.core_seconds
    trainer.actor.collect(5)
    assert trainer.core_seconds == before > 0


@pytest.mark.slow
def test_an_interrupt_ends_cleanly_with_results(tmp_path):
    log = tmp_path / "out.log"
    process = start("recurrent_ppo.py", tmp_path / "out", *SMALL, "--updates=999999")
    # Once this line is there, the signals are looked after.
    ready = lambda: log.read_text().startswith("the task is solved when")  # noqa: E731
    status = interrupt(process, signal.SIGINT, ready)
    out = log.read_text()
    assert status == 128 + signal.SIGINT and "Traceback" not in out
    assert "interrupted after" in out and "of 999999 updates" in out
    assert (tmp_path / "out/curves.png").is_file()


OPTIONS = {
    "envs": ("--envs=0", "--envs: must be a whole number of at least 1, but was '0'"),
    "steps": ("--steps=1.5", "--steps: must be a whole number of at least 1, but was '1.5'"),
    "keep": ("--keep=-2", "--keep: must be a whole number of at least 1, but was '-2'"),
    "hidden": ("--hidden=many", "--hidden: must be a whole number of at least 1, but was 'many'"),
    "epochs": ("--epochs=0", "--epochs: must be a whole number of at least 1, but was '0'"),
    "lr": ("--lr=0", "--lr: must be a number above 0, but was '0'"),
    "lr large": ("--lr=1e38", "--lr: must be at most 1000, but was '1e38'"),
    "clip": ("--clip=inf", "--clip: must be a number above 0, but was 'inf'"),
    "gamma": ("--gamma=1.01", "--gamma: must be a number from 0 to 1, but was '1.01'"),
    "lam": ("--lam=nan", "--lam: must be a number from 0 to 1, but was 'nan'"),
    "entropy": ("--entropy=x", "--entropy: must be a number from 0 to 1, but was 'x'"),
    "seed": ("--seed=-1", "--seed: must be a whole number from 0 to 2**63 - 1, but was '-1'"),
    "cell": ("--cell=rnn", "--cell: invalid choice: 'rnn'"),
    "backend": ("--backend=jax", "--backend: invalid choice: 'jax'"),
    "no such option": ("--hiden=5", "unrecognized arguments: --hiden=5"),
    "out a file": ("--out={tmp}/file", "--out: must be a folder that can be written to, but was"),
    "out has a folder there": ("--out={tmp}/occupied", "curves.png is a folder"),
}


@pytest.mark.parametrize(("argument", "message"), OPTIONS.values(), ids=OPTIONS.keys())
def test_bad_option(run, tmp_path, argument, message):
    (tmp_path / "file").touch()
    (tmp_path / "occupied/curves.png").mkdir(parents=True)
    assert_refused(run(argument.format(tmp=tmp_path)), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [("--epochs=1", "--backend=torch"), ("--epochs=3", "--backend=fastbptt")]
)
def test_diverging_names_the_learning_rate(run, monkeypatch, arguments):
    """One pass over a rollout ends in weights that cannot act; of several, the next one fails."""
    monkeypatch.setattr(training, "MAX_GRAD_NORM", math.nan)
    status, _, err = run("--updates=9", *arguments)
    assert status == 2
    assert "--lr: must be small enough for training to stay finite, but was 0.003, and in" in err


def test_a_policy_that_is_not_finite_does_not_act():
    actor = make_actor("fastbptt", "lstm")
    with torch.no_grad():
        actor.policy.actor.bias[0] = np.inf
    with pytest.raises(FloatingPointError, match="not finite"):
        actor.collect(1)
