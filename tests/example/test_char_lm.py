"""The example ``char_lm.py``: its parts, its command line, interruption, and two processes."""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_pre_hook

# Before the examples: it lets them be imported.
from example_runs import assert_refused, finish, interrupt, run_fixture, start, wait_until

# isort: split
import char_lm
from char_lm_lib import training
from char_lm_lib.model import CharLM, DetachLoop, generate
from char_lm_lib.parallel import Team
from char_lm_lib.text import (
    UNKNOWN,
    Corpus,
    Segments,
    Vocabulary,
    read_text,
    streams,
    unigram_perplexity,
)
from shared_lib import timing
from shared_lib.interruption import StopSignal
from shared_lib.layers import CELLS

# One thread: on a busy machine, threads that wait for each other are slow. With this text, an
# epoch is 56 segments.
SMALL = (
    "--threads=1 --hidden=16 --embedding=8 --batch=4 --steps=16 --truncation=5 --lr=0.01 "
    "--sample-length=20"
).split()
EPOCH = 56


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(read_text(None)[:4000], encoding="utf-8")
    return path


run_small = run_fixture(char_lm.main, *SMALL)


@pytest.fixture
def run(run_small, text):
    return partial(run_small, f"--text={text}")


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory) -> Path:
    """The checkpoint of a short run with torch; not to be changed."""
    out = tmp_path_factory.mktemp("trained")
    threads = torch.get_num_threads()
    arguments = [f"--text={text}", f"--out={out}", *SMALL, "--backend=torch", "--max-steps=3"]
    assert char_lm.main(arguments) == 0
    torch.set_num_threads(threads)
    return out / "checkpoint-torch.pt"


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same_model(a: dict, b: dict, **tolerance: float) -> None:
    assert a["model"].keys() == b["model"].keys()
    for name, value in a["model"].items():
        torch.testing.assert_close(value, b["model"][name], **(tolerance or dict(rtol=0, atol=0)))


# ---- text


def test_vocabulary_is_of_the_training_part():
    corpus = Corpus.of("abcab" * 18 + "abcabzzcab")  # the last ten of a hundred are held out
    assert corpus.vocabulary == Vocabulary("abc")
    assert corpus.vocabulary.decode(corpus.train.tolist()) == "abcab" * 18
    assert corpus.held_out.tolist() == [1, 2, 3, 1, 2, UNKNOWN, UNKNOWN, 3, 1, 2]


def test_default_text_is_in_one_order_and_long():
    assert read_text(None) == read_text(None)
    assert len(read_text(None)) > 100_000


@pytest.mark.parametrize("offset", [0, 3, 6])
@pytest.mark.parametrize(("length", "batch", "steps"), [(500, 4, 7), (100, 1, 7), (36, 4, 7)])
def test_sequential_segments_continue_each_row(length, batch, steps, offset):
    segments = Segments(torch.arange(length), batch, steps, "sequential")
    inputs, targets = segments.cut(offset, None)
    assert inputs.shape == targets.shape == (len(segments), steps, batch)
    assert len(segments) >= 1 and torch.equal(targets, inputs + 1)
    rows = inputs.flatten(0, 1).T
    assert torch.equal(rows, rows[:, :1] + torch.arange(rows.size(1)))
    assert rows[0, 0] == offset and (rows[1:, 0] > rows[:-1, -1]).all()


@pytest.mark.parametrize("offset", [0, 3, 6])
def test_random_segments_are_disjoint_subsequences_in_random_order(offset):
    segments = Segments(torch.arange(500), batch=4, steps=7, sampling="random")
    _, order = segments.draw(torch.Generator().manual_seed(0))
    inputs, targets = segments.cut(offset, order)
    assert inputs.shape == (len(segments), 7, 4) and torch.equal(targets, inputs + 1)
    starts = inputs[:, 0]
    assert torch.equal(inputs, starts.unsqueeze(1) + torch.arange(7).view(7, 1))
    assert ((starts - offset) % 7 == 0).all() and starts.unique().numel() == starts.numel()
    assert not torch.equal(starts.flatten(), starts.flatten().sort().values)


def test_offsets_are_drawn_from_all_below_steps():
    segments = Segments(torch.arange(500), batch=4, steps=7, sampling="sequential")
    generator = torch.Generator().manual_seed(0)
    assert {segments.draw(generator)[0] for _ in range(200)} == set(range(7))


def test_unigram_perplexity_is_that_of_smoothed_frequencies():
    corpus = Corpus.of("aaabbc" * 15 + "abcabcabcz")
    counts = Counter("aaabbc" * 15)
    probability = {c: (counts[c] + 1) / (90 + 4) for c in "abcz"}  # 4: a, b, c and unknown
    loss = -sum(math.log(probability[c]) for c in "abcabcabcz") / 10
    assert unigram_perplexity(corpus) == pytest.approx(math.exp(loss), rel=1e-12)


# ---- model


@pytest.mark.parametrize("make", [torch.nn.RNN, torch.nn.LSTM])
def test_detach_loop_cuts_at_every_chunk(make):
    torch.manual_seed(0)
    layer = make(3, 4)
    x = torch.randn(12, 2, 3, requires_grad=True)
    output, state = DetachLoop(layer, 5)(x)
    expected, expected_state = layer(x)
    torch.testing.assert_close((output, state), (expected, expected_state))
    output[9].sum().backward()  # the last step of the second chunk
    reached = x.grad.abs().amax((1, 2)) > 0
    assert reached.nonzero().flatten().tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("truncation", [None, 1, 5, 16, 40])
@pytest.mark.parametrize("cell", CELLS)
def test_backends_agree_from_the_same_seed(cell, truncation):
    results = []
    for backend in ("torch", "fastbptt"):
        torch.manual_seed(0)
        model = CharLM(20, backend, cell, 8, 16, truncation).double()
        codes = torch.randint(20, (17, 4), generator=torch.Generator().manual_seed(1))
        h = torch.full((1, 4, 16), 0.1, dtype=torch.float64)
        logits, state = model(codes[:-1], (h, -h) if cell == "lstm" else h)
        loss = cross_entropy(logits.flatten(0, 1), codes[1:].flatten())
        loss.backward()
        states = state if cell == "lstm" else (state,)
        results.append([loss, logits, *states, *(p.grad for p in model.parameters())])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_generate_follows_seed_and_temperature():
    torch.manual_seed(0)
    vocabulary = Vocabulary("abcd")
    model = CharLM(len(vocabulary), "fastbptt", "rnn", 8, 16, None)
    with torch.no_grad():
        model.decoder.bias[UNKNOWN] = 100.0  # likely, but not a character
        model.decoder.weight *= 3
    texts = {seed: generate(model, vocabulary, "ab", 50, 1.0, seed) for seed in (0, 1)}
    assert texts[0] == generate(model, vocabulary, "ab", 50, 1.0, seed=0) != texts[1]
    assert len(texts[0]) == 52 and texts[0].startswith("ab") and set(texts[0]) <= set("abcd")
    coldest = [generate(model, vocabulary, "ab", 50, 1e-30, seed) for seed in (0, 1)]
    with torch.no_grad():
        logits, _ = model(vocabulary.encode(coldest[0][:-1]).unsqueeze(1))
    logits[..., UNKNOWN] = -torch.inf
    likeliest = vocabulary.decode(logits[1:, 0].argmax(1).tolist())
    assert coldest[0] == coldest[1] == "ab" + likeliest


# ---- training


def test_held_out_perplexity_is_that_of_whole_streams():
    torch.manual_seed(0)
    model = CharLM(20, "fastbptt", "rnn", 8, 16, None)
    codes = torch.randint(20, (400,))
    inputs, targets = streams(codes, 3)
    assert inputs.shape == (133, 3) and torch.equal(inputs[1:], targets[:-1])
    with torch.no_grad():
        logits, _ = model(inputs)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
    result = training.held_out_perplexity(model, codes, 3, 16, Team())
    assert result == pytest.approx(math.exp(loss), rel=1e-5)


def test_layer_timer_counts_the_layer_alone(monkeypatch):
    clock = Namespace(now=0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)

    class Takes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, forward, backward):
            ctx.seconds = backward
            clock.now += forward
            return x * weight

        @staticmethod
        def backward(ctx, grad):
            clock.now += ctx.seconds
            return grad, grad.sum(), None, None

    class Layer(torch.nn.Module):
        def __init__(self, forward: float, backward: float) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))
            self.seconds = forward, backward

        def forward(self, x, state):
            # The gradient of the weight is known before that of the input.
            x = Takes.apply(x, torch.ones(()), *self.seconds)
            return Takes.apply(x, self.weight, *self.seconds), state

    before, layer, after = Layer(100, 1000), Layer(1, 2), Layer(10_000, 100_000)
    timer = timing.LayerTimer(layer)
    for _ in range(3):
        x = torch.ones(4, requires_grad=True)
        after(*layer(*before(x, None)))[0].sum().backward()
    assert (timer.forward, timer.backward) == (3 * 2, 3 * 4)


def test_second_interrupt_does_not_wait():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        assert stop.number is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_both_backends_end_alike_and_learn(run, tmp_path):
    status, out, _ = run("--backend=both", "--epochs=3")
    assert status == 0
    theirs, ours = (load(tmp_path / f"out/checkpoint-{b}.pt") for b in ("torch", "fastbptt"))
    theirs, ours = theirs["progress"], ours["progress"]
    assert len(theirs["losses"]) == len(ours["losses"]) == 3 * EPOCH
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3)
    assert [step for step, _ in ours["held_out"]] == [EPOCH, 2 * EPOCH, 3 * EPOCH]
    assert ours["held_out"][-1][1] == pytest.approx(theirs["held_out"][-1][1], rel=0.01)
    assert ours["held_out"][-1][1] < ours["held_out"][0][1]

    rows = [line.strip("| ").split("|") for line in out.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows] == [
        "backend", rows[1][0].strip(), "torch", "fastbptt", "torch / fastbptt",
    ]  # fmt: skip
    for progress, row in ((theirs, rows[2]), (ours, rows[3])):
        layer = progress["forward_seconds"] + progress["backward_seconds"]
        assert 0 < layer < progress["seconds"]
        assert float(row[1]) == pytest.approx(progress["held_out"][-1][1], abs=6e-4)
        assert [float(cell) for cell in row[4:]] == pytest.approx(
            [layer, progress["seconds"]], abs=6e-3
        )
    assert float(rows[4][1]) == pytest.approx(1, abs=0.01) and rows[4][-1].endswith("x")
    unigram = float(out.split("unigram model: held-out perplexity ")[1].split()[0])
    assert ours["held_out"][-1][1] < unigram
    assert (tmp_path / "out/curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_backends_learn_alike_with_every_cell(run, tmp_path, cell):
    status, out, _ = run("--backend=both", f"--cell={cell}", f"--max-steps={EPOCH}")
    assert status == 0 and "fastbptt continues" in out
    theirs, ours = (
        load(tmp_path / f"out/checkpoint-{b}.pt")["progress"]["losses"]
        for b in ("torch", "fastbptt")
    )
    assert len(ours) == EPOCH and ours == pytest.approx(theirs, rel=1e-3)
    assert sum(ours[-5:]) < 0.9 * sum(ours[:5])


def test_learns_a_text_that_can_be_predicted(run, tmp_path):
    text = tmp_path / "fox.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 100)
    status, out, _ = run(f"--text={text}", "--epochs=4", "--prompt=the qu", "--temperature=0.01")
    assert status == 0 and "the quick brown fox jumps" in out
    assert load(tmp_path / "out/checkpoint-fastbptt.pt")["progress"]["held_out"][-1][1] < 1.5


# ---- checkpoints


@pytest.mark.slow(2)
@pytest.mark.parametrize(
    ("cell", "sampling", "cut"),
    [
        *(("rnn", s, cut) for s in ("sequential", "random") for cut in (17, EPOCH, EPOCH + 4)),
        ("gru", "sequential", 17),
        ("lstm", "sequential", 17),
    ],
)
def test_resumed_equals_uninterrupted(run, tmp_path, cell, sampling, cut):
    last = EPOCH + 9
    arguments = ("--backend=fastbptt", f"--cell={cell}", f"--sampling={sampling}")
    assert run(*arguments, f"--max-steps={cut}", "--save-every=5")[0] == 0
    assert run(*arguments, f"--max-steps={last}", "--resume")[0] == 0
    assert run(*arguments, f"--max-steps={last}", out="whole")[0] == 0
    resumed, whole = (load(tmp_path / f"{o}/checkpoint-fastbptt.pt") for o in ("out", "whole"))
    assert resumed["progress"]["losses"] == whole["progress"]["losses"]
    assert resumed["progress"]["held_out"][-1] == whole["progress"]["held_out"][-1]
    assert_same_model(resumed, whole)


def test_both_resumes_the_one_and_begins_the_other(run, tmp_path):
    assert run("--backend=torch", "--max-steps=5")[0] == 0
    assert run("--backend=both", "--max-steps=8", "--resume")[0] == 0
    assert run("--backend=both", "--max-steps=8", out="whole")[0] == 0
    for backend in ("torch", "fastbptt"):
        name = f"checkpoint-{backend}.pt"
        assert_same_model(load(tmp_path / "out" / name), load(tmp_path / "whole" / name))


def test_finished_run_resumes_to_the_same_results(run):
    _, first, _ = run("--max-steps=5")
    status, again, _ = run("--max-steps=5", "--resume")
    assert status == 0 and again.split("continues")[1] == first.split("continues")[1]


def test_new_run_sets_the_earlier_checkpoint_aside(run, tmp_path):
    assert run("--max-steps=3")[0] == 0
    earlier = (tmp_path / "out/checkpoint-fastbptt.pt").read_bytes()
    status, out, _ = run("--max-steps=2")
    assert status == 0 and "checkpoint-fastbptt.previous.pt" in out
    assert (tmp_path / "out/checkpoint-fastbptt.previous.pt").read_bytes() == earlier


def test_failed_save_keeps_the_last_checkpoint(run, tmp_path, monkeypatch):
    assert run("--max-steps=3")[0] == 0
    path = tmp_path / "out/checkpoint-fastbptt.pt"
    before = path.read_bytes()

    def disk_full(contents, file):
        file.write(before[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", disk_full)
    status, _, err = run("--max-steps=4", "--resume")
    assert status == 2 and "--out" in err and "No space left" in err
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.tmp"))


# ---- bad input

OPTIONS = {
    "text missing": ("--text={tmp}/none.txt", "--text: must be a readable file, but was {tmp}"),
    "text a folder": ("--text={tmp}", "--text: must be a readable file, but was {tmp}"),
    "text not UTF-8": ("--text={tmp}/latin1.txt", "--text: must be UTF-8 text, but {tmp}"),
    "text empty": ("--text={tmp}/empty.txt", "--text: must hold at least 80 characters"),
    "text short": ("--text={tmp}/short.txt", "{tmp}/short.txt was 79 and 8 long"),
    "held out short": ("--steps=1 --batch=400", "and 401 held out"),
    "prompt unknown": ("--prompt=a\u20acb", "--prompt: must be one or more characters"),
    "prompt empty": ("--prompt=", "--prompt: must be one or more characters"),
    "out a file": ("--out={tmp}/empty.txt", "--out: must be a folder that can be written to, but"),
    "out below a file": ("--out={tmp}/empty.txt/a/b", "but was {tmp}/empty.txt/a/b (Not a dir"),
    "out cannot be named": ("--out={tmp}/a/b/" + 300 * "x", "(File name too long)"),
    "out has a folder there": ("--out={tmp}/occupied", "checkpoint-fastbptt.pt is a folder"),
    "nothing to resume": ("--resume", "--resume: must find {tmp}/out/checkpoint-fastbptt.pt, but"),
    "nowhere to resume": ("--resume --out={tmp}/" + 300 * "x", "but there is no such file"),
    "batch": ("--batch=0", "--batch: must be a whole number of at least 1, but was '0'"),
    "steps": ("--steps=1.5", "--steps: must be a whole number of at least 1, but was '1.5'"),
    "hidden": ("--hidden=-4", "--hidden: must be a whole number of at least 1, but was '-4'"),
    "truncation": ("--truncation=-1", "or 0 or none for no truncation, but was '-1'"),
    "lr": ("--lr=nan", "--lr: must be a number above 0, but was 'nan'"),
    "temperature": ("--temperature=0", "--temperature: must be a number above 0, but was '0'"),
    "seed": ("--seed=-1", "--seed: must be a whole number from 0 to 2**63 - 1, but was '-1'"),
    "cell": ("--cell=elman", "--cell: invalid choice: 'elman'"),
    "sampling": ("--sampling=shuffled", "--sampling: invalid choice: 'shuffled'"),
    "no such option": ("--hiden=5", "unrecognized arguments: --hiden=5"),
}


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize(("arguments", "message"), OPTIONS.values(), ids=OPTIONS.keys())
def test_bad_option(run, tmp_path, arguments, message):
    (tmp_path / "latin1.txt").write_bytes("caf\u00e9 ".encode("latin-1") * 100)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("a" * 87)
    (tmp_path / "occupied/checkpoint-fastbptt.pt").mkdir(parents=True)
    before = contents(tmp_path)
    result = run(*arguments.format(tmp=tmp_path).split(" "))
    assert_refused(result, message.format(tmp=tmp_path))
    assert contents(tmp_path) == before


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that none can write")
def test_out_that_even_root_cannot_write(run):
    assert_refused(run("--out=/proc/char_lm"), "--out: must be a folder that can be written to")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--hidden=17", "--hidden: must be 16, as in {path}, but was 17"),
        ("--truncation=none", "--truncation: must be 5, as in {path}, but was None"),
        ("--seed=1", "--seed: must be 0, as in {path}, but was 1"),
        ("--text={text}", "--text: must be the text that {path} was trained on, but was not"),
    ],
)
def test_resume_with_another_configuration(run, trained, tmp_path, option, message):
    text = tmp_path / "other.txt"
    text.write_text(read_text(None)[:4001])
    path = tmp_path / "out/checkpoint-torch.pt"
    path.parent.mkdir()
    shutil.copy(trained, path)
    before = contents(tmp_path)
    result = run("--backend=torch", "--resume", option.format(text=text))
    assert_refused(result, message.format(path=path))
    assert contents(tmp_path) == before


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("exploited",)


def flipped(data: bytes) -> bytes:
    middle = data.index(b"rnn") + 200  # inside the first record, which no header describes
    return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"not a checkpoint"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1000]),
        lambda path: path.write_bytes(flipped(path.read_bytes())),
        lambda path: torch.save({"model": {}}, path),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save({**load(path), "model": Exploit()}, path),
        lambda path: torch.save({**load(path), "model": {}}, path),
        lambda path: torch.save({k: v for k, v in load(path).items() if k != "rng"}, path),
        lambda path: torch.save({**load(path), "progress": {"pages": 3}}, path),
        lambda path: torch.save({**load(path), "vocabulary": "abc"}, path),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=(
        "text,empty,cut off,bit flipped,foreign,foreign list,code,no weights,no rng,"
        "other progress,other vocabulary,folder"
    ).split(","),
)
def test_resume_from_a_damaged_or_foreign_checkpoint(run, trained, tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "out/checkpoint-torch.pt"
    path.parent.mkdir()
    shutil.copy(trained, path)
    damage(path)
    before = contents(tmp_path)
    assert_refused(run("--backend=torch", "--resume"), "--resume: must find a")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("cell", "sampling"), [("rnn", "sequential"), ("rnn", "random"), ("lstm", "sequential")]
)
def test_state_is_carried_in_sequential_sampling_alone(run, monkeypatch, cell, sampling):
    forward, begins, ends = CharLM.forward, [], []

    def note(model, codes, state=None):
        logits, after = forward(model, codes, state)
        if torch.is_grad_enabled():  # not in evaluation
            begins.append(state)
            ends.append(after)
        return logits, after

    monkeypatch.setattr(CharLM, "forward", note)
    assert run(f"--cell={cell}", f"--sampling={sampling}", "--epochs=2")[0] == 0
    assert len(begins) == 2 * EPOCH
    for step, begin in enumerate(begins):
        if sampling == "random" or step % EPOCH == 0:
            assert begin is None
        else:
            pairs = [(begin, ends[step - 1])]
            if cell == "lstm":
                pairs = list(zip(begin, ends[step - 1], strict=True))
            assert len(pairs) == (2 if cell == "lstm" else 1)
            assert all(torch.equal(a, b) and not a.requires_grad for a, b in pairs)


def test_gradient_norm_is_clipped_at_one(run):
    norms = []

    def note(optimizer, *_):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.cat([p.grad.flatten() for p in parameters]).norm().item())

    handle = register_optimizer_step_pre_hook(note)
    try:
        assert run("--epochs=2")[0] == 0
    finally:
        handle.remove()
    assert len(norms) == 2 * EPOCH
    assert max(norms) == pytest.approx(1, abs=1e-5)  # some are as large as allowed, none larger


def test_diverging_loss_names_the_learning_rate(run, monkeypatch):
    monkeypatch.setattr(training.Trainer, "_step", lambda *_: math.nan)
    status, _, err = run()
    assert status == 2
    assert "--lr: must be small enough for the loss to stay finite, but was 0.01" in err


# ---- processes


def start_small(text: Path, out: Path, *arguments: str, launcher: tuple[str, ...] = ()):
    return start("char_lm.py", out, f"--text={text}", *SMALL, *arguments, launcher=launcher)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_resume_continues_exactly(run, text, tmp_path, number):
    path = tmp_path / "out/checkpoint-torch.pt"
    process = start_small(
        text, tmp_path / "out", "--backend=torch", "--epochs=9999", "--save-every=3"
    )
    status = interrupt(process, number, path.exists)
    log = (tmp_path / "out.log").read_text()
    assert status == 128 + number and "Traceback" not in log
    assert f"interrupted: saved {path}; --resume continues from it" in log
    step = len(load(path)["progress"]["losses"])
    arguments = ("--backend=torch", "--epochs=9999", f"--max-steps={step + 5}")
    assert run(*arguments, "--resume")[0] == 0
    assert run(*arguments, out="whole")[0] == 0
    assert_same_model(load(path), load(tmp_path / "whole/checkpoint-torch.pt"))


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.slow
def test_two_processes_train_as_one(run, text, tmp_path):
    last = EPOCH + 4
    arguments = ("--cell=lstm", "--backend=both")  # a state of two parts
    assert run(*arguments, "--max-steps=10", out="two")[0] == 0  # by one, then by two
    process = start_small(text, tmp_path / "two", *arguments, f"--max-steps={last}",
                          "--save-every=10", "--resume", launcher=TORCHRUN)  # fmt: skip
    assert finish(process) == 0, (tmp_path / "two.log").read_text()
    _, one, _ = run(*arguments, f"--max-steps={last}", out="one")
    log = (tmp_path / "two.log").read_text()
    for line in ("loss curves:", "unigram model:", "torch / fastbptt"):
        assert log.count(line) == one.count(line) == 1
    for backend in ("torch", "fastbptt"):
        two, one = (load(tmp_path / f"{o}/checkpoint-{backend}.pt") for o in ("two", "one"))
        assert [part.shape for part in two["state"]] == 2 * [(1, 4, 16)]
        torch.testing.assert_close(two["state"], one["state"], rtol=0, atol=1e-3)
        assert_same_model(two, one, rtol=0, atol=1e-3)
        for (step, ours), (expected_step, expected) in zip(
            two["progress"]["held_out"][1:], one["progress"]["held_out"], strict=True
        ):
            assert step == expected_step and ours == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_signal_to_one_of_two_processes_stops_both(run, text, tmp_path):
    path = tmp_path / "out/checkpoint-fastbptt.pt"
    process = start_small(
        text, tmp_path / "out", "--epochs=9999", "--save-every=3", launcher=TORCHRUN
    )
    try:
        wait_until(path.exists, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGTERM)
    finally:
        finish(process)
    assert len(children) == 2 and not any(Path(f"/proc/{child}").exists() for child in children)
    log = (tmp_path / "out.log").read_text()
    assert log.count(f"interrupted: saved {path}; --resume continues from it") == 1
    saved = load(path)
    assert saved["state"].shape == (1, 4, 16)
    # One process takes over the batch of two.
    last = len(saved["progress"]["losses"]) + 3
    assert run("--epochs=9999", f"--max-steps={last}", "--resume")[0] == 0
    assert len(load(path)["progress"]["losses"]) == last


def test_batch_must_be_a_multiple_of_the_processes(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert_refused(run(), "--batch: must be a multiple of the 3 processes, but was 4")
