"""The experiments: the parts of each, how a part is run, and what is made of the records.

Two are those of ``examples/``. Each is cut into parts that take seconds, so that a run that
is ended goes on where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.files import ROOT, Record

sys.path.insert(0, str(ROOT / "examples"))

from adaptive_truncation_lib import training as adaptive  # noqa: E402
from influence_balancing_lib import chain  # noqa: E402
from shared_lib.output import save_picture  # noqa: E402

from . import characters, oracle, ppo  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Part = dict[str, Any]  # what tells one part from the others


@dataclass(frozen=True)
class Experiment:
    """One figure and its tables."""

    name: str
    parts: Callable[[bool], list[Part]]  # of a quick run or a whole one
    run: Callable[[Part], Record]  # what a part gives, beside itself
    draw: Callable[[Sequence[Record]], Figure]

    def save_picture(self, records: Sequence[Record], path: Path) -> None:
        """Draws it, and writes it whole or not at all."""
        save_picture(self.draw(records), path)


def _thin(losses: Sequence[float], points: int = 150) -> list[list[float]]:
    """[update, loss] at about so many places, the first and the last among them."""
    every = max(1, len(losses) // points)
    places = sorted({*range(0, len(losses), every), len(losses) - 1})
    return [[place + 1, float(f"{losses[place]:.4g}")] for place in places]


def _influence_parts(quick: bool) -> list[Part]:
    windows, segments, seeds = (200, 20, 2) if quick else (3000, 300, 10)
    parts: list[Part] = [{"kind": "influence", "up_to": 100}]
    parts += [{"kind": "windows", "K": K, "updates": windows} for K in chain.WINDOWS]
    for rate in chain.RATES:
        for name in chain.truncations(0):
            for seed in range(seeds if name == chain.RANDOM else 1):
                part = {"kind": "segments", "truncation": name, "rate": rate, "seed": seed}
                parts.append({**part, "updates": segments})
    return parts


def _run_influence(part: Part) -> Record:
    if part["kind"] == "influence":
        values = [chain.influence(k) for k in range(1, part["up_to"] + 1)]
        return {"influences": [round(value, 6) for value in values]}
    if part["kind"] == "windows":
        run = chain.learn_by_windows(part["K"], part["updates"])
    else:
        run = chain.learn_by_segments(
            part["truncation"], part["rate"], part["updates"], part["seed"]
        )
    return {
        "outcome": run.outcome,
        "diverged": run.diverged,
        "final": run.losses[-1],
        "theta": run.theta,
        "curve": _thin(run.losses),
    }


def _draw_influence(records: Sequence[Record]) -> Figure:
    from influence_balancing_lib import picture

    (influences,) = (r["influences"] for r in records if r["kind"] == "influence")
    windows = {f"K = {r['K']}": r["curve"] for r in records if r["kind"] == "windows"}
    segments = {
        f"{rate:g}": {
            f"{r['truncation']}#{r['seed']}": r["curve"]
            for r in records
            if r["kind"] == "segments" and r["rate"] == rate
        }
        for rate in chain.RATES
    }
    return picture.draw(influences, windows, segments)


def _adaptive_parts(quick: bool) -> list[Part]:
    updates, every, seeds = (6, 2, (1, 1)) if quick else (1000, 25, (4, 1))
    return [
        {"task": task, "setting": setting, "seed": seed, "updates": updates, "every": every}
        for task, many in zip(adaptive.TASKS, seeds, strict=True)
        for seed in range(many)
        for setting in adaptive.SETTINGS
    ]


def _run_adaptive(part: Part) -> Record:
    record = adaptive.train(**part).record()
    record["losses"] = [round(loss, 4) for loss in record["losses"]]
    record["checks"] = [[update, round(bias, 4)] for update, bias in record["checks"]]
    return record


def _draw_adaptive(records: Sequence[Record]) -> Figure:
    from adaptive_truncation_lib import picture

    return picture.draw(_runs_of(records))


def adaptive_rows(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """The table's."""
    from adaptive_truncation_lib import report

    return report.rows(_runs_of(records))


def _runs_of(records: Sequence[Record]) -> list[adaptive.Run]:
    """Records of the adaptive truncation as the runs that they were."""
    fields = ("task", "setting", "seed", "losses", "chosen", "checks", "cost")
    return [adaptive.Run(**{name: record[name] for name in fields}) for record in records]


def _characters_parts(quick: bool) -> list[Part]:
    updates, seeds = (2, 2) if quick else (400, 4)
    return [
        {"mode": mode, "seed": seed, "updates": updates}
        for seed in range(seeds)
        for mode in characters.MODES
    ]


def _run_characters(part: Part) -> Record:
    run = characters.train(part["mode"], part["seed"], part["updates"])
    return {"bits": run.final, "curve": run.curve}


def _draw_characters(records: Sequence[Record]) -> Figure:
    from . import pictures

    return pictures.characters(records)


def _oracle_parts(quick: bool) -> list[Part]:
    updates, every, seeds = (2, 2, 1) if quick else (300, 50, 1)
    return [
        {"mode": mode, "seed": seed, "updates": updates, "every": every}
        for mode in oracle.MODES
        for seed in range(seeds)
    ]


def _run_oracle(part: Part) -> Record:
    return {"checks": oracle.train(part["mode"], part["seed"], part["updates"], part["every"])}


def _draw_oracle(records: Sequence[Record]) -> Figure:
    from . import pictures

    return pictures.oracle(records)


def _ppo_parts(quick: bool) -> list[Part]:
    updates = dict.fromkeys(ppo.TASKS, 1) if quick else ppo.UPDATES
    times = [
        {"kind": "times", "cell": cell, "chunk": chunk, "updates": 2 if quick else 12}
        for cell in ppo.CELLS
        for chunk in (4, None)
    ]
    return times + [
        {"kind": "returns", "task": task, "cell": cell, "chunk": chunk, "seed": seed}
        | {"updates": updates[task]}
        for seed in range(1 if quick else 2)
        for task in ppo.TASKS
        for cell in ppo.CELLS
        for chunk in ppo.CHUNKS
    ]


def _run_ppo(part: Part) -> Record:
    arguments = {name: value for name, value in part.items() if name != "kind"}
    if part["kind"] == "times":
        return ppo.times(**arguments)
    return {"returns": ppo.train(**arguments)}


def _draw_ppo(records: Sequence[Record]) -> Figure:
    from . import pictures

    return pictures.ppo(records)


EXPERIMENTS = (
    Experiment("influence", _influence_parts, _run_influence, _draw_influence),
    Experiment("adaptive", _adaptive_parts, _run_adaptive, _draw_adaptive),
    Experiment("characters", _characters_parts, _run_characters, _draw_characters),
    Experiment("oracle", _oracle_parts, _run_oracle, _draw_oracle),
    Experiment("ppo", _ppo_parts, _run_ppo, _draw_ppo),
)
