"""How soon a training schedule reaches the reward that the paper's loop reaches, and at what fidelity.

``python -m benchmarks.reward_per_second train`` fine-tunes the mini model by every schedule of `SCHEDULES` from every
seed, each measured on the same held-out crops; what is finished is kept in the results' JSON and not done again.
``profile`` says what one iteration's time goes into, ``rollouts`` what compiling or half precision makes of a rollout,
``solvers`` how far from it fewer evaluations end, ``report`` writes the table and the picture beside the JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler

from benchmarks import measure
from rfsr_ext.data import evaluation_crops, photographs
from rfsr_ext.evaluation.ways import markdown_rows
from rfsr_ext.models import Condition, ControlNetISRModel, ISRModel, load_model
from rfsr_ext.rewards import reward_loss
from rfsr_ext.sampling import Rollout, generators, rollout
from rfsr_ext.training import RFSRConfig, RFSRTrainer, build_objective, setup
from rfsr_ext.training.held_out import HeldOut
from rfsr_ext.training.rfsr import RFSR

CLOCKS = ("evaluations", "processor_seconds")
ABOUT = """\
Written by `python -m benchmarks.reward_per_second report`; do not edit. The mini model by the preset `mini`, with
{batch_size} images per iteration and learning rate {learning_rate:g}, on one thread; schedules took turns, seed by
seed. "plain" is the paper's loop: 50 sampling steps, a fresh rollout for every iteration. 10-step rollouts are the
preset's. Held out are {crops} crops, sampled in {steps} steps with the same noise for all. The reward is the training's
own sum, the judge is never trained on, and neither measuring nor its evaluations count. An evaluation is one call of
the network for one image, of the trained model or its reference, with gradient or without. Changes are those from the
base model to the run's last iteration. Medians over seeds (range)."""
RESULTS = Path(__file__).parent / "results" / "reward-per-second.json"
PLAIN, PRESET = "plain", "10-step rollouts"
_PAPER = {"num_inference_steps": 50, "structure_window": [1, 20], "reward_window": [41, 50]}
SCHEDULES: dict[str, dict[str, Any]] = {
    PLAIN: {**_PAPER, "iterations": 60, "validate_every": 10},
    PRESET: {"iterations": 60, "validate_every": 10},
    "10-step rollouts, 3 points": {"points_per_rollout": 3, "iterations": 90, "validate_every": 15},
    "10 points": {**_PAPER, "points_per_rollout": 10, "iterations": 80, "validate_every": 20},
    "5 points averaged": {**_PAPER, "points_per_rollout": 5, "iterations": 20, "validate_every": 5, "averaged": True},
}
SETTING = {"batch_size": 2, "learning_rate": 1e-4, "checkpoint_every": 30}
# How the network may compute in a rollout, which needs no gradient: compiled or not, and in which precision.
COMPUTING = {"as it is": (False, False), "bfloat16": (False, True), "torch.compile": (True, False),
             "torch.compile, bfloat16": (True, True)}  # fmt: skip
# Orders of DPM-Solver++, of which the first is DDIM, the plain loop's own; and how many evaluations each may make.
SOLVERS = {"DDIM": 1, "DPM-Solver++, 2nd order": 2, "DPM-Solver++, 3rd order": 3}
FEWER = (2, 3, 4, 5, 8, 16)
_PROFILED = {PLAIN: (10, 45), PRESET: (2, 9)}  # a step in the middle of either window


class Averaged(RFSR):
    """Every iteration begins a trajectory, and takes the mean loss at as many of its steps as the schedule says."""

    def loss(self, player: str, batch: dict[str, Any], iteration: int, samples: Sequence[int]):
        run = self.objective.begin(batch["lr"], batch["prompt"], generators(self.seed, samples))
        steps = [self.draw_step(iteration * self.points + point) for point in range(self.points)]
        losses = [self.objective(batch["lr"], batch["gt"], batch["prompt"], step, rollout=run)[0] for step in steps]
        loss = torch.stack(losses).mean()
        return loss, {"loss": loss.detach()}


class Clocked:
    """A held-out monitor that stops the clock while it measures, and counts the network evaluations between."""

    def __init__(self, held_out: HeldOut):
        self.held_out, self.evaluations, self.counting = held_out, 0, True
        self.spent = 0.0
        self.started = time.process_time()

    @property
    def measured(self) -> list[dict[str, Any]]:
        return self.held_out.measured

    def measure(self, iteration: int, log_images) -> bool:
        self.spent += time.process_time() - self.started
        self.counting = False
        best = self.held_out.measure(iteration, log_images)
        self.measured[-1].update(processor_seconds=self.spent, evaluations=self.evaluations)
        self.counting = True
        self.started = time.process_time()
        return best

    def state_dict(self) -> dict[str, Any]:
        return self.held_out.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held_out.load_state_dict(state)


@contextlib.contextmanager
def counted(monitor: Clocked) -> Iterator[None]:
    """Every call of a network on every image counts, trained or reference, with gradient or without."""
    predict = ControlNetISRModel.predict

    def counting(model, latents, timestep, condition):
        monitor.evaluations += monitor.counting * len(latents)
        return predict(model, latents, timestep, condition)

    with mock.patch.object(ControlNetISRModel, "predict", counting):
        yield


def train(name: str, seed: int, base: dict[str, Any] | None, crops: int, steps: int) -> tuple[list[dict], dict]:
    """The held-out rows of one run, the first that of the base model, and the base model's state for other runs."""
    changes = dict(SCHEDULES[name])
    averaged = changes.pop("averaged", False)
    with tempfile.TemporaryDirectory() as folder:
        config = RFSRConfig.load("mini", SETTING | changes | {"seed": seed, "output_dir": folder})
        model = load_model(config.model)
        validation = evaluation_crops(photographs("validation"), config.validation_size, crops)
        trainer = RFSRTrainer(config, model, validation=validation)
        held_out = HeldOut(
            model, validation, trainer.objective.rewards, trainer.held_out.judges, batch_size=crops,
            num_inference_steps=steps,
        )  # fmt: skip
        if averaged:
            trainer.method.__class__ = Averaged
            trainer.loop.dataset = setup.build_dataset(config)
        if base is not None:
            held_out.load_state_dict(json.loads(json.dumps(base)))
        trainer.loop.held_out = monitor = Clocked(held_out)
        with counted(monitor):
            trainer.loop.train()
    state = held_out.state_dict()
    first = {"measured": state["measured"][:1], "best_iteration": 0, "scales": {}, "base_scores": state["base_scores"]}
    return state["measured"], first


def profile(name: str, step: int, repeats: int = 3) -> dict[str, float]:
    """Processor seconds of the parts of one iteration that trains at a sampling step, medians over repeats."""
    config = RFSRConfig.load("mini", SETTING | SCHEDULES[name])
    batch = config.batch_size
    model = load_model(config.model)
    objective = build_objective(config, model)
    parameters = list(model.unfreeze().trained_parameters().values())
    optimizer = torch.optim.Adam(parameters, 1e-9)
    dataset, decode, found = setup.build_dataset(config), model.decode, []
    for repeat in range(repeats + 1):  # the first is slower
        marks = {"": time.process_time()}

        def mark(part: str, marks=marks) -> None:
            marks[part] = time.process_time()

        samples = [dataset[repeat * batch + i] for i in range(batch)]
        lr, gt = (torch.stack([sample[key] for sample in samples]) for key in ("lr", "gt"))
        mark("data")
        condition = model.condition(lr, [sample["prompt"] for sample in samples])
        mark("condition")
        state = rollout(model, condition, step, generators(0, range(batch)), config.num_inference_steps)
        mark("rollout")
        with mock.patch.object(model, "decode", side_effect=lambda z, mark=mark: (mark("network"), decode(z))[1]):
            prediction = objective.predict(model, state, condition)
        mark("decode")
        if objective.windows.in_structure(step):
            loss = objective.lambda_structure * objective.structure_loss(prediction.images, gt)
            mark("structure loss")
        else:
            images = prediction.images.clamp(0, 1)
            loss, _ = reward_loss(objective.rewards, images, condition.prompts, step, None)
            mark("rewards")
            before = objective.predict_reference(state, condition)
            mark("reference")
            loss = loss + objective.lambda_style * objective.style_loss(images, before.images.clamp(0, 1))
            mark("style loss")
        prediction.images.register_hook(lambda _, mark=mark: mark("losses, backward"))
        prediction.pred_original_sample.register_hook(lambda _, mark=mark: mark("decode, backward"))
        loss.backward()
        mark("network, backward")
        optimizer.step()
        optimizer.zero_grad()
        mark("optimizer")
        times = list(marks.items())
        found.append({part: end - start for (_, start), (part, end) in zip(times, times[1:], strict=False)})
    return {part: float(np.median([row[part] for row in found[1:]])) for part in found[0]}


def rollouts(name: str, repeats: int = 5) -> dict[str, dict[str, float]]:
    """A schedule's whole rollout, with the network computing in every way; they take turns.

    ``processor_seconds`` is the median over repeats, ``first`` the seconds of the first call, which compiles, ``error``
    the largest difference of the last latents from those of "as it is", relative to their largest entry.
    """
    config = RFSRConfig.load("mini", SETTING | SCHEDULES[name])
    dataset, batch = setup.build_dataset(config), config.batch_size
    samples = [dataset[i] for i in range(batch)]
    lr, prompts = torch.stack([sample["lr"] for sample in samples]), [sample["prompt"] for sample in samples]
    steps = config.num_inference_steps

    def run(model: ISRModel, half: bool) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            condition = model.condition(lr, prompts)
            return rollout(model, condition, steps, generators(0, range(batch)), steps).latents.double()

    models = {way: load_model(config.model) for way in COMPUTING}
    wanted = run(models["as it is"], False)
    rows: dict[str, dict[str, float]] = {}
    for way, (compiled, half) in COMPUTING.items():
        for network in ("unet", "controlnet") if compiled else ():
            models[way].networks[network].compile()
        started = time.perf_counter()
        error = (run(models[way], half) - wanted).abs().max() / wanted.abs().max()
        rows[way] = {"first": time.perf_counter() - started, "error": error.item()}
    seconds: dict[str, list[float]] = {way: [] for way in COMPUTING}
    for _ in range(repeats):
        for way, (_, half) in COMPUTING.items():
            started = time.process_time()
            run(models[way], half)
            seconds[way].append(time.process_time() - started)
    return {way: row | {"processor_seconds": float(np.median(seconds[way]))} for way, row in rows.items()}


def solve(
    model: ISRModel, condition: Condition, latents: torch.Tensor, timesteps: np.ndarray, order: int
) -> torch.Tensor:
    """The latents at the last timestep, from those at the first by an evaluation at each but the last."""
    solver = DPMSolverMultistepScheduler.from_config(model.scheduler.config, solver_order=order)
    solver.set_timesteps(timesteps=[int(t) for t in timesteps])
    for timestep in solver.timesteps[:-1]:
        latents = solver.step(model.predict(latents, timestep, condition), timestep, latents).prev_sample
    return latents


@torch.no_grad()
def solvers(crops: int = 8, steps: tuple[int, ...] = (10, 41, 50)) -> list[dict[str, Any]]:
    """How far from the plain loop's state before a sampling step other solvers end, by few evaluations.

    A solver's error stands under its name: the RMS difference of the latents, relative to that between two seeds'
    states. ``own_error`` is the plain loop's own, from the state to which many evaluations of second order lead.
    """
    model = load_model("mini")
    samples = evaluation_crops(photographs("validation"), 64, crops)
    condition = model.condition(torch.stack([s["lr"] for s in samples]), [s["prompt"] for s in samples])
    rows = []
    for step in steps:
        plain, other = (rollout(model, condition, step, generators(seed, range(crops)), 50) for seed in (0, 1))
        spread = (plain.latents - other.latents).square().mean().sqrt()
        start = Rollout(model, condition, generators(0, range(crops)), 50).state
        first, last = int(start.timestep), int(plain.timestep)

        def error(count: int, order: int, start=start, goal=plain.latents, spread=spread, ends=(first, last)) -> float:
            found = solve(model, condition, start.latents, np.linspace(*ends, count + 1).round(), order)
            return ((found - goal).square().mean().sqrt() / spread).item()

        own = error((first - last) // 2, 2)
        for count in (count for count in FEWER if count < step - 1):
            rows.append({"step": step, "plain": step - 1, "own_error": own, "evaluations": count}
                        | {name: error(count, order) for name, order in SOLVERS.items()})  # fmt: skip
    return rows


def reached(rows: list[dict], reward: float, clock: str) -> float:
    """When a run's held-out reward, taken as straight between measurements, first has this value; infinity if never."""
    for before, after in zip(rows, rows[1:], strict=False):
        if before["reward"] < reward <= after["reward"]:
            share = (reward - before["reward"]) / (after["reward"] - before["reward"])
            return before[clock] + share * (after[clock] - before[clock])
    return float("inf")


def compare(runs: dict[str, list[dict]]) -> list[dict[str, Any]]:
    """One row per schedule that was run, over the seeds that both it and the plain loop have."""
    by_schedule: dict[str, dict[int, list[dict]]] = {}
    for key, rows in runs.items():
        name, _, seed = key.rpartition(", seed ")
        by_schedule.setdefault(name, {})[int(seed)] = rows
    plain, table = by_schedule[PLAIN], []
    for name in SCHEDULES:
        seeds = sorted(by_schedule.get(name, {}).keys() & plain.keys())
        if not seeds:
            continue
        own = [by_schedule[name][seed] for seed in seeds]
        ends = [(rows[0], rows[-1]) for rows in own]
        row: dict[str, Any] = {"schedule": name, "seeds": len(seeds)}
        for column in ("reward", "psnr", "ssim", "judge"):
            row[f"{column}_change"] = [end[column] - first[column] for first, end in ends]
        for clock in CLOCKS:
            row[f"{clock}_per_iteration"] = [end[clock] / end["iteration"] for _, end in ends]
            row[f"gain_per_{clock}"] = [(end["reward"] - first["reward"]) / end[clock] for first, end in ends]
            goals = [plain[seed][-1] for seed in seeds]
            times = [reached(rows, goal["reward"], clock) for rows, goal in zip(own, goals, strict=True)]
            row[f"{clock}_speedup"] = [goal[clock] / spent for goal, spent in zip(goals, times, strict=True)]
        # fidelity where the plain loop's last reward is reached, against the plain loop's own there
        for column in ("psnr", "ssim"):
            row[f"{column}_at_goal"] = [
                _at(rows, reached(rows, plain[seed][-1]["reward"], "evaluations"), column) - plain[seed][-1][column]
                for rows, seed in zip(own, seeds, strict=True)
            ]
        table.append(row)
    return table


def _at(rows: list[dict], evaluations: float, column: str) -> float:
    if not np.isfinite(evaluations):
        return float("nan")
    return float(np.interp(evaluations, [row["evaluations"] for row in rows], [row[column] for row in rows]))


def lines(found: dict[str, Any]) -> list[str]:
    """The report, as Markdown."""
    table, about = compare(found["runs"]), ABOUT.format(**found["held_out"], **SETTING)
    text = ["# Reward gained per second", "", about, "", *_gain_lines(table), "", *_speedup_lines(table[1:])]
    for name, part in (("profile", _profile_lines), ("rollouts", _rollout_lines), ("solvers", _solver_lines)):
        if name in found:
            text += ["", *part(found[name])]
    return [*text, "", f"{found['device']}, {found['written']}."]


def _shown(values: list[float], form: str) -> str:
    middle, low, high = np.median(values), min(values), max(values)
    return f"{middle:{form}}" if low == high else f"{middle:{form}} ({low:{form}} … {high:{form}})"


def _gain_lines(table: list[dict[str, Any]]) -> list[str]:
    header = ["schedule", "seeds", "evaluations per iteration", "processor s per iteration", "reward gained",
              "PSNR, dB", "judge", "gain per 1000 evaluations", "per 100 processor s"]  # fmt: skip
    body = [
        [
            row["schedule"], str(row["seeds"]), _shown(row["evaluations_per_iteration"], ".1f"),
            _shown(row["processor_seconds_per_iteration"], ".2f"), _shown(row["reward_change"], "+.4f"),
            _shown(row["psnr_change"], "+.2f"), _shown(row["judge_change"], "+.2f"),
            _shown([1000 * gain for gain in row["gain_per_evaluations"]], "+.4f"),
            _shown([100 * gain for gain in row["gain_per_processor_seconds"]], "+.4f"),
        ]
        for row in table
    ]  # fmt: skip
    return markdown_rows(header, body)


def _speedup_lines(table: list[dict[str, Any]]) -> list[str]:
    header = ["schedule", "by evaluations", "by processor time", "PSNR there, dB", "SSIM there"]
    body = []
    for row in table:
        cells = [row["schedule"], *(f"{_shown(row[f'{clock}_speedup'], '.2f')}×" for clock in CLOCKS)]
        cells += [_shown(row["psnr_at_goal"], "+.2f"), _shown(row["ssim_at_goal"], "+.4f")]
        if missed := row["evaluations_speedup"].count(0):
            cells[1:] = [f"not reached in {missed} of {row['seeds']} seeds", *["–"] * 3]
        body.append(cells)
    return [
        "How much sooner the plain loop's last reward is reached, by two clocks, and the fidelity there against "
        "the plain loop's.", "", *markdown_rows(header, body),
    ]  # fmt: skip


def _profile_lines(found: dict[str, dict[str, float]]) -> list[str]:
    body = []
    for part in [*dict.fromkeys(part for step in found.values() for part in step), "sum"]:
        cells = []
        for step in found.values():
            total = sum(step.values())
            value = total if part == "sum" else step.get(part)
            cells.append("" if value is None else f"{value:.3f} ({value / total:.0%})")
        body.append([part, *cells])
    return ["One iteration, processor seconds (share):", "", *markdown_rows(["", *found], body)]


def _rollout_lines(found: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    header = ["rollout of", "network", "processor s", "faster by", "first call, s", "error"]
    body = [
        [name, way, f"{row['processor_seconds']:.3f}",
         f"{ways['as it is']['processor_seconds'] / row['processor_seconds']:.2f}×", f"{row['first']:.1f}",
         f"{row['error']:.0e}"]
        for name, ways in found.items() for way, row in ways.items()
    ]  # fmt: skip
    return [
        "A whole rollout of one batch, the condition included, with the network computing in other ways, which "
        "took turns. A first call compiles, once for all schedules. Error is the largest difference of the last "
        "latents, relative to their largest entry. No preset uses another way than the first.",
        "", *markdown_rows(header, body),
    ]  # fmt: skip


def _solver_lines(found: list[dict[str, Any]]) -> list[str]:
    header = ["state before step", "evaluations of plain (its own error)", "evaluations", *SOLVERS]
    body = [
        [str(row["step"]), f"{row['plain']} ({row['own_error']:.3f})", str(row["evaluations"]),
         *(f"{row[name]:.3f}" for name in SOLVERS)]
        for row in found
    ]  # fmt: skip
    return [
        "How far from the plain loop's state other solvers end that make fewer evaluations over the same "
        "noise levels: RMS difference of the latents, relative to that between two seeds. In brackets how far the "
        "plain loop itself is from where many steps of second order lead. Nothing was trained so.",
        "", *markdown_rows(header, body),
    ]  # fmt: skip


def picture(found: dict[str, Any], path: Path) -> None:
    """Held-out reward and PSNR against evaluations and processor time: mean over seeds, and the range as a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    grid = figure.subplots(2, 2, sharex="col", sharey="row")
    names = [name for name in SCHEDULES if any(key.startswith(f"{name}, seed") for key in found["runs"])]
    for name, color in zip(names, ("#222222", "#d1662b", "#2a6fb0", "#3c8d5a", "#8a5fa8"), strict=False):
        runs = [rows for key, rows in found["runs"].items() if key.startswith(f"{name}, seed")]
        for axes, (column, clock) in zip(grid.flat, [(c, k) for c in ("reward", "psnr") for k in CLOCKS], strict=True):
            values = np.array([[row[column] - rows[0][column] for row in rows] for rows in runs])
            times = np.mean([[row[clock] for row in rows] for rows in runs], axis=0)
            axes.plot(times, values.mean(0), "o-", color=color, ms=3, label=f"{name}, seeds: {len(runs)}")
            axes.fill_between(times, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
            axes.axhline(0, color="#8a8a8a", lw=0.6)
    grid[0, 0].set_ylabel("held-out reward, change")
    grid[1, 0].set_ylabel("held-out PSNR, change in dB")
    grid[1, 0].set_xlabel("evaluations of the network, times images")
    grid[1, 1].set_xlabel("processor seconds of training")
    grid[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("train", "profile", "rollouts", "solvers", "report"))
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--crops", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="of the held-out sampling")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(options.results.read_text()) if options.results.is_file() else {"runs": {}}

    def keep() -> None:
        found.update(written=measure.now(), device=measure.processor())
        options.results.write_text(json.dumps(found, indent=1) + "\n")

    if options.what == "profile":
        found["profile"] = {
            f"{name}, step {step}": profile(name, step) for name, steps in _PROFILED.items() for step in steps
        }
        keep()
    if options.what == "rollouts":
        found["rollouts"] = {name: rollouts(name) for name in (PLAIN, PRESET)}
        keep()
    if options.what == "solvers":
        found["solvers"] = solvers()
        keep()
    if options.what == "train":
        measured = {"crops": options.crops, "steps": options.steps}
        if found.setdefault("held_out", measured) != measured:
            raise SystemExit(f"--crops and --steps must be those of {options.results}, {found['held_out']}")
        for seed in options.seeds:  # seeds outside: every schedule meets the same neighbors
            for name in options.schedules:
                key = f"{name}, seed {seed}"
                if key not in found["runs"]:
                    rows, found["base"] = train(name, seed, found.get("base"), options.crops, options.steps)
                    found["runs"][key] = rows
                    keep()
    if options.what == "report":
        options.results.with_suffix(".md").write_text("\n".join(lines(found)) + "\n")
        picture(found, options.results.with_suffix(".png"))


if __name__ == "__main__":
    main()
