"""The benchmark runs, checks what it compares, and shows a peer that wins."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import __main__ as bench
from benchmarks import end_to_end, laboratory, measure, peers, reading, report
from benchmarks.cases import Case, cases

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"haar": ((2, 3, 7, 9),), "gram": ((1, 4, 6, 5), (1, 8, 3, 3))}


def small(operator, dtype=torch.float32):
    return Case(operator, "small", SMALL[operator], dtype, backward=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operator", ["haar", "gram"])
def test_eager_peers_compute_our_loss_and_gradient(operator, dtype):
    case = small(operator, dtype)
    entry = case.inputs(torch.Generator().manual_seed(0), "cpu")
    for name, loss in peers.line_up(operator, dtype, "cpu").items():
        if isinstance(loss, str) or name.startswith(("compile", "max-autotune", "ptwt", "pytorch_wavelets")):
            continue
        expected = bench.call(peers.reference(operator, name), True)(*bench.in_fp64(entry))
        assert measure.relative_error(bench.call(loss, True)(*entry), expected) < bench.TOLERANCE[dtype], name


def test_a_peer_that_disagrees_is_not_timed(monkeypatch):
    monkeypatch.setattr(peers, "avg_pool2d", lambda prediction, target: 1.1 * peers.slices(prediction, target))
    wanted = bench.re.compile("^(avg_pool2d|slices)$")
    case = bench.run_case(small("haar"), "cpu", 2, wanted, 1 << 12, (1e9, {torch.float32: 1e9}))
    rows = {row["name"]: row for row in case["rows"]}
    assert set(rows) == {"ours", "avg_pool2d", "slices"}
    assert "median" in rows["slices"] and "median" not in rows["avg_pool2d"]
    assert rows["avg_pool2d"]["note"].startswith("disagrees: relative error 1e-01")


def test_no_peer_multiplies_in_a_type_without_units():
    wanted = bench.re.compile("^bmm( fp32)?$")
    case = small("gram", torch.bfloat16)
    measured = bench.run_case(case, "cpu", 2, wanted, 1 << 12, (1e9, {case.dtype: 1e9}), [case.dtype])
    rows = {row["name"]: row for row in measured["rows"]}
    assert rows["bmm"]["note"] == "left out: no units for bfloat16 here"
    assert "median" in rows["bmm fp32"] and "median" in rows["ours"]


def test_a_peer_that_wins_is_shown():
    rows = [
        {"name": "ours", "median": 2e-3, "q20": 2e-3, "q80": 2e-3, "error": 0.0, "peak_bytes": 1 << 20},
        {"name": "quick", "median": 1e-3, "q20": 1e-3, "q80": 1e-3, "error": 0.0, "peak_bytes": 1 << 21},
        {"name": "cheat", "median": 1e-4, "q20": 1e-4, "q80": 1e-4, "error": 0.0, "other_loss": True},
        {"name": "absent", "note": "not installed"},
    ]
    case = {"title": "a case", "floor": 5e-4, "rows": rows}
    assert "| a case | 2.00 ms | quick | 1.00 ms | 0.50× | 1.0 / 2.0 | **the peer wins** |" in report.summary_lines(
        [case]
    )
    lines = report.case_lines(case)
    assert "| quick | 1.00 ms | 1.00 ms – 1.00 ms | 0.50 | 50 % | 2.0 | 0e+00 |" in lines
    assert "| absent | not installed |  |  |  |  |  |" in lines
    rows[0]["q20"] = 1e-3  # as quick as the peer now and then
    assert report.summary_lines([case])[-1].endswith("| level |")
    rows[0] |= {"median": 5e-4, "q20": 4e-4, "q80": 6e-4}
    assert report.summary_lines([case])[-1].endswith("| 2.00× | 1.0 / 2.0 |  |")


def test_the_readme_compares_the_results_that_are_there():
    results = report.read(ROOT / "benchmarks/results")
    assert "\n".join(report.comparison_lines(results)) in (ROOT / "README.md").read_text()


def test_floors_count_what_must_be_moved_and_multiplied():
    haar = Case("haar", "", ((1, 1, 100, 100),), torch.float32, backward=True)
    assert haar.floor(bandwidth=12e4, flops=1) == pytest.approx(1.0)  # 2 reads and 1 write of 40 kB
    gram = Case("gram", "", ((1, 8, 10, 10),), torch.bfloat16, backward=True)
    assert gram.floor(bandwidth=1e30, flops=4 * 64 * 100) == pytest.approx(1.0)


@pytest.mark.parametrize(("rate", "side"), [(1e15, 2048), (40e9, 1536), (0.65e9, 384), (1e6, 256)])
def test_a_floors_product_is_as_large_as_time_allows(monkeypatch, rate, side):
    """On a machine of each speed, told by a clock that counts multiplications."""
    sides, now = [], [0.0]

    def product(a, b):
        sides.append(len(a))
        now[0] += 2 * len(a) ** 3 / rate
        return a

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    assert measure.product_rate(torch.float32, "cpu", clock=lambda: now[0]) == pytest.approx(rate)
    assert sides[:2] == [256, 256] and set(sides[2:]) == {side}
    assert now[0] < 2.5 or side == 256  # ten products of at most a fifth of a second, and the first


@pytest.mark.parametrize(("half", "runs"), [(1e9, False), (50e9, True), (400e9, True)])
def test_a_half_type_without_units(monkeypatch, half, runs):
    rates = {torch.float32: 100e9, torch.bfloat16: half}
    monkeypatch.setattr(measure, "product_rate", lambda dtype, device: rates[dtype])
    assert measure.slow_dtypes("cpu", list(rates)) == ([] if runs else [torch.bfloat16])
    _, flops, source = measure.floors("cpu", list(rates), 1 << 12)
    assert flops == {torch.float32: 100e9, torch.bfloat16: max(half, 100e9)}
    assert ("no units for bfloat16" in source) == (half < 100e9)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak resident memory needs Linux")
def test_peak_memory_sees_memory_that_is_freed_again():
    def step():
        torch.ones(32 << 20, dtype=torch.uint8)

    assert 30 << 20 < measure.peak_memory(step, "cpu") < 40 << 20


def test_a_step_runs_with_a_peer_in_place_of_our_operator():
    step = end_to_end.vgg_gram_step(32, "cpu")
    seen = []

    def peer(features, targets):
        seen.append(len(features))
        return peers.bmm(features, targets)

    fitted = end_to_end.fitting("gram", peer)
    torch.testing.assert_close(end_to_end.with_loss("gram", step, fitted)(), step(), rtol=1e-4, atol=0)
    assert seen == [1] * 5
    alone = end_to_end.loss_alone("gram", step, bench.rfsr_ext.gram_loss)
    torch.testing.assert_close(alone(), step(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("window", ["structure", "reward"])
def test_an_iteration_of_the_preset_reaches_the_loss_that_is_swapped(window):
    operator, make = end_to_end.STEPS[f"RFSR iteration, {window} window"]
    step, seen = make("cpu"), []
    ours = {"haar": bench.rfsr_ext.haar_ll_l1_loss, "gram": bench.rfsr_ext.gram_loss}[operator]

    def spy(*args, **options):
        seen.append(ours(*args, **options))
        return seen[-1]

    loss = end_to_end.with_loss(operator, step, spy)()
    assert len(seen) == 1 and loss > 0
    torch.testing.assert_close(loss, seen[-1].detach().to(loss.dtype))


def test_the_command_writes_its_tables(tmp_path):
    title = next(c.title for c in cases() if c.label == "1x3x64x64" and c.dtype == torch.float32)
    options = [
        "--device",
        "cpu",
        "--match",
        f"^{title}$",
        "--peers",
        "^avg_pool2d$",
        "--rounds",
        "2",
        "--cache-mib",
        "1",
    ]
    command = [sys.executable, "-m", "benchmarks", *options, "--output", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert [case["title"] for case in result["cases"]] == [title]
    assert {"device", "versions", "floor", "started", "ended"} <= set(result["machine"])
    assert path.with_suffix(".md").read_text() == report.markdown(result)
    assert f"### {title}" in run.stdout


def test_the_orders_of_the_reward_step_are_weighed_and_must_agree(monkeypatch):
    steps = {"ours": lambda: [torch.ones(3)], "all scores, then one backward": lambda: [torch.ones(3)]}
    monkeypatch.setattr(bench.rewards, "steps", lambda device: steps)
    rows = bench.run_rewards("cpu", rounds=2)["rows"]
    assert [row["name"] for row in rows] == list(steps)
    assert all(row["median"] > 0 and row["error"] == 0 for row in rows)
    steps["ours"] = lambda: [torch.zeros(3)]
    with pytest.raises(AssertionError, match="both orders must agree"):
        bench.run_rewards("cpu", rounds=1)


@pytest.mark.parametrize("name", ["crop.png", "crop.jpg"])
def test_contestants_read_the_same_crop(tmp_path, name):
    pixels = np.random.default_rng(0).integers(0, 256, (520, 530, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / name)
    rows = {row["name"]: row for row in reading.run_file(tmp_path / name, 1)["rows"]}
    assert {key for key, row in rows.items() if not row["same"]} == ({"Pillow, draft"} if name == "crop.jpg" else set())
    assert rows["ours"]["median"] > 0 and "Pillow, rows" in rows


def test_the_blind_votes_are_counted_as_their_report_and_the_course_have_them(tmp_path, capsys):
    blind = ROOT / "benchmarks/results/blind"
    laboratory.count(blind, tmp_path)
    out = capsys.readouterr().out
    assert "base: 34 of 40, 85% (95 %: 71% to 93%)" in out and "fine-tuned: 23 of 40, 57% (95 %: 42% to 71%)" in out
    strengths = [line.removeprefix("strength of ") for line in out.splitlines() if line.startswith("strength")]
    assert len(strengths) == 3 and all(line in (blind / "README.md").read_text() for line in strengths)
    made = (tmp_path / "blind_votes.csv").read_text()
    assert made == (ROOT / "notebooks/results/blind_votes.csv").read_text()


def test_votes_without_finite_strengths_are_counted_all_the_same(tmp_path, capsys):
    (tmp_path / "key.csv").write_text("pair,crop,left,right\n0,5,a,b\n1,3,b,a\n")
    with pytest.raises(SystemExit, match="^votes.csv must hold left or right for each of the 2 pairs once"):
        (tmp_path / "votes.csv").write_text("pair,choice\n0,left\n")
        laboratory.count(tmp_path, tmp_path)
    (tmp_path / "votes.csv").write_text("pair,choice\n1,right\n0,left\n")
    laboratory.count(tmp_path, tmp_path)
    out = capsys.readouterr().out
    assert "a: 2 of 2" in out and "votes must contain a loss of a" in out
    with pytest.raises(SystemExit, match="^folder must hold key.csv"):
        laboratory.count(tmp_path / "nothing", tmp_path)
