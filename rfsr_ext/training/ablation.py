"""The paper's ablations (Tables 2 to 5) as named variants of one configuration, run over several seeds."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from rfsr_ext.data import Sample
from rfsr_ext.evaluation.measure import Scorer, evaluate
from rfsr_ext.files import lock_folder, save_table
from rfsr_ext.models import load_model
from rfsr_ext.processes import process_state
from rfsr_ext.training.config import RFSRConfig
from rfsr_ext.training.kept import find_result, samples_digest
from rfsr_ext.training.rfsr import RFSRTrainer

__all__ = ["VARIANTS", "ablate"]

_TABLE = "ablation.csv"

# What each variant changes.  Windows are those of 50 sampling steps, see `variant`.
VARIANTS: dict[str, dict] = {
    "rfsr": {},
    # Table 2: timestep-aware training
    "structure-1-40": {"structure_window": [1, 40]},
    "reward-21-50": {"reward_window": [21, 50]},
    "everywhere": {"structure_window": [1, 50], "reward_window": [1, 50], "allow_overlap": True},
    # Table 3: rewards
    "structure-only": {"reward_window": None},
    "first-reward-only": {"rewards": 0},
    "second-reward-only": {"rewards": 1},
    # Table 4: style losses
    "no-style": {"style_loss": "none"},
    "lora": {"style_loss": "none", "lora_rank": 8},
    "kl": {"style_loss": "kl"},
    # Table 5: low-frequency constraint
    "no-structure": {"structure_loss": "none"},
    "l1": {"structure_loss": "l1"},
}


def variant(name: str, config: RFSRConfig, num_inference_steps: int) -> RFSRConfig:
    """``config`` with what a variant changes; windows keep their proportions in ``num_inference_steps`` steps.

    Raises:
        ValueError: for windows beside others that are counted in another unit than steps.
    """
    changes = dict(VARIANTS[name])
    if isinstance(changes.get("rewards"), int):
        reward, weight = list(config.rewards.items())[changes["rewards"]]
        changes["rewards"] = {reward: weight}
    for key in ("structure_window", "reward_window"):
        if changes.get(key) is None:
            continue
        if config.window_unit != "steps":
            raise ValueError(f"variant {name} needs windows counted in steps, got window_unit {config.window_unit!r}")
        first, last = (edge * num_inference_steps / 50 for edge in (changes[key][0] - 1, changes[key][1]))
        changes[key] = [round(first) + 1, round(last)]
    return config.replace(**changes)


def ablate(
    config: RFSRConfig,
    samples: Sequence[Sample],
    scorers: dict[str, Scorer],
    variants: Sequence[str] = tuple(VARIANTS),
    seeds: Sequence[int] = (0, 1, 2),
    folder: str | Path = "runs/ablation",
) -> pd.DataFrame:
    """Train every variant with every seed and measure it on held-out samples.

    Finished runs are found again by their result file and unfinished ones resumed, so the whole can be interrupted.
    The settings are kept beside each result: one that was made with others is never taken for this one.

    Args:
        config: what the variants start from.
        samples: held-out samples.
        scorers: as for `rfsr_ext.evaluation.evaluate`.
        variants: names in `VARIANTS`.
        seeds: of training; the noise of a measurement has the same seed.
        folder: receives one run folder per variant and seed, and ``ablation.csv``; nobody else may use it meanwhile.

    Returns:
        Rows of `evaluate`, with the base model as variant "base", as in the table.

    Raises:
        ValueError: for a variant nobody knows, samples that do not fit the model, or if the folder holds a result that
            was made with other settings.
        ModuleNotFoundError: before anything is trained, if a variant needs a package that is not installed.
        FileExistsError, RuntimeError: see `rfsr_ext.files.lock_folder`.
    """
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown:
        raise ValueError(f"variants must be among {', '.join(VARIANTS)}, got {unknown[0]!r}")
    base = load_model(config.model, **config.model_options)
    for side in {side for sample in samples for side in sample["gt"].shape[-2:]}:
        base.check_size(side, "size of the samples")
    common = {
        "samples": samples_digest(samples),
        "scorers": sorted(scorers),
        "base model": base.fingerprint(),
    }
    steps = config.num_inference_steps or base.recipe.num_inference_steps
    changed = {name: variant(name, config, steps) for name in variants}
    for name, own in changed.items():
        try:
            own.check_packages()
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"variant {name}: {error}, or leave it out of variants") from None
    parts = []
    with lock_folder(folder, (_TABLE,)):
        for seed, name in itertools.product(seeds, ("base", *variants)):
            run = Path(folder) / f"{name}-{seed}"
            result = run / "evaluation.csv"
            settings = common | {"seed": seed}
            if name != "base":
                trained = changed[name].replace(seed=seed, output_dir=str(run))
                settings |= {key: value for key, value in trained.to_dict().items() if key != "output_dir"}
            frame = find_result(result, settings)
            if frame is None:
                model = base if name == "base" else RFSRTrainer(trained).train().model
                model.to(process_state().device)  # where the trained ones are
                frame = evaluate(model, samples, scorers, seeds=(seed,), name=name)
                model.to("cpu")  # the next one needs its memory
                save_table(result, frame)
            parts.append(frame)
        table = pd.concat(parts, ignore_index=True)
        save_table(Path(folder) / _TABLE, table)
    return table
