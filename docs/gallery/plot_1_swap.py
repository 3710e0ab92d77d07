"""The same network, faster
========================

A character model of the size that *Dive into Deep Learning* trains, once with ``torch.nn.RNN``
and once with ``fastbptt.RNN``, from the same weights: the same losses, in another time.
"""

import os
import time

import matplotlib.pyplot as plt
import torch

import fastbptt

# %%
# A text to learn: a sentence that repeats, with a number that changes.

torch.set_num_threads(1)  # whoever builds these pages does something else beside it
T, B, H = 35, 32, 256
text = "".join(f"the machine had gone {i % 97} steps into the future. " for i in range(900))
letters = sorted(set(text))
codes = torch.tensor([letters.index(letter) for letter in text])
streams = codes[: len(codes) // B * B].view(B, -1).t()  # [time, B]: B places in the text at once
segments = streams[: (len(streams) - 1) // T * T + 1].unfold(0, T + 1, T).movedim(-1, 1)
print(f"{len(text)} characters, {len(letters)} of them different, {len(segments)} segments")


# %%
# The training, for either layer. The state is carried from segment to segment and detached.


def train(layer, weights=None):
    torch.manual_seed(0)
    recurrent, readout = layer(len(letters), H), torch.nn.Linear(H, len(letters))
    if weights is not None:
        recurrent.load_state_dict(weights)
    begin = {name: weight.clone() for name, weight in recurrent.state_dict().items()}
    parameters = [*recurrent.parameters(), *readout.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    losses, state, started = [], None, time.perf_counter()
    for segment in segments[: int(os.environ.get("GALLERY_STEPS", len(segments)))]:
        inputs = torch.nn.functional.one_hot(segment[:-1], len(letters)).float()
        output, state = recurrent(inputs, state)
        state = state.detach()
        loss = torch.nn.functional.cross_entropy(
            readout(output.flatten(0, 1)), segment[1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
    tokens = len(losses) * T * B / (time.perf_counter() - started)
    print(f"{layer.__module__}: {tokens:,.0f} tokens a second, loss {losses[-1]:.4f}")
    return losses, begin


theirs, weights = train(torch.nn.RNN)
ours, _ = train(fastbptt.RNN, weights)

# %%
# The curves lie on each other: sums are taken in another order, nothing else differs.

figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
axes.plot(theirs, linewidth=5, color="#b0c4de", label="torch.nn.RNN")
axes.plot(ours, linewidth=1.2, color="black", label="fastbptt.RNN")
axes.set(xlabel="segment", ylabel="loss", title="the same training")
axes.legend()
plt.show()
assert abs(ours[2] - theirs[2]) < 1e-4
