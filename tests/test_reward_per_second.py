"""What the benchmark of training schedules reports, from runs whose numbers are known."""

import math

import torch

from benchmarks import reward_per_second as bench
from rfsr_ext.models import Condition
from rfsr_ext.sampling import TimestepWindows, generators
from rfsr_ext.training import RFSRConfig, RFSRObjective
from tests import tiny


def run(*points):
    """Rows of (iteration, evaluations, reward, PSNR)."""
    names = ("iteration", "evaluations", "reward", "psnr")
    return [dict(zip(names, p, strict=True)) | {"ssim": 0.5, "judge": 60.0, "seconds": 2.0 * p[1],
            "processor_seconds": p[1]} for p in points]  # fmt: skip


def test_speed_is_read_where_the_plain_loops_last_reward_is_reached():
    runs = {
        "plain, seed 0": run((0, 0, 1.0, 20.0), (10, 300, 1.2, 19.0)),
        "plain, seed 1": run((0, 0, 1.0, 20.0), (10, 300, 1.4, 19.0)),
        "10 points, seed 0": run((0, 0, 1.0, 20.0), (10, 50, 1.1, 19.5), (20, 150, 1.3, 18.5)),
        "10 points, seed 1": run((0, 0, 1.0, 20.0), (10, 50, 1.1, 19.5), (20, 150, 1.3, 18.5)),
        "10 points, seed 7": run((0, 0, 1.0, 20.0), (10, 50, 9.0, 19.5)),  # the plain loop has no such seed
    }
    plain, shared = bench.compare(runs)
    assert plain["evaluations_speedup"] == [1, 1] and plain["evaluations_per_iteration"] == [30, 30]
    first, second = shared["evaluations_speedup"]
    assert math.isclose(first, 3) and second == 0  # 1.2 at 100 evaluations; 1.4 never
    assert math.isclose(shared["psnr_at_goal"][0], 0) and math.isnan(shared["psnr_at_goal"][1])
    assert shared["seeds"] == 2
    found = {"runs": runs, "held_out": {"crops": 1, "steps": 2}, "device": "x", "written": "y"}
    ways = {"as it is": {"processor_seconds": 3.0, "first": 4.0, "error": 0.0},
            "bfloat16": {"processor_seconds": 2.0, "first": 5.0, "error": 0.02}}  # fmt: skip
    text = "\n".join(bench.lines(found | {"rollouts": {"plain": ways}}))
    assert "| 10 points | 2 | 7.5 |" in text
    assert "| plain | bfloat16 | 2.000 | 1.50× | 5.0 | 2e-02 |" in text


def test_evaluations_count_images_but_not_while_measuring():
    class Measures:
        measured = ({},)

        def measure(self, iteration, log_images):
            model.predict(latents, torch.tensor(500), condition)

    model = tiny.tiny_model()
    monitor = bench.Clocked(Measures())
    lr = torch.rand(3, 3, 8, 8)
    condition: Condition = model.condition(lr, [""] * 3)
    latents = torch.randn(3, 4, 16, 16)
    with bench.counted(monitor), torch.no_grad():
        model.predict(latents, torch.tensor(500), condition)
        monitor.measure(1, None)
        model.reference().predict(latents, torch.tensor(500), condition)
    assert (monitor.measured[-1]["evaluations"], monitor.evaluations) == (3, 6)


def test_averaged_points_are_the_mean_of_their_losses():
    model = tiny.tiny_model(num_inference_steps=5)
    objective = RFSRObjective(model, TimestepWindows((1, 4), None, 5), structure_loss=torch.nn.L1Loss())
    config = RFSRConfig(iterations=2, checkpoint_every=2, points_per_rollout=2, batch_size=2)
    method = bench.Averaged(config, objective)
    batch = {"lr": torch.rand(2, 3, 8, 8), "gt": torch.rand(2, 3, 32, 32), "prompt": ["cat", "dog"]}
    loss, _ = method.loss("model", batch, 3, range(2))
    noise = [generators(config.seed, range(2)) for _ in range(2)]
    steps = [method.draw_step(6), method.draw_step(7)]
    assert steps[0] < steps[1]
    each = [objective(batch["lr"], batch["gt"], batch["prompt"], s, g)[0] for s, g in zip(steps, noise, strict=True)]
    torch.testing.assert_close(loss, torch.stack(each).mean())
