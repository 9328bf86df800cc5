"""Results as text: a table on screen and in Markdown, from the same dictionary that goes to JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path

from rfsr_ext.evaluation.ways import markdown_rows

ABOUT = """\
Written by `python -m benchmarks`; do not edit. All contestants of a case took turns in one run; times are medians over
rounds, with 20 % and 80 % quantiles; inputs rotate through a pool larger than the last-level cache. The floor is the
time to move or multiply what the loss must, at the rates below; a pass that only reads can beat it, as a copy's writes
cost more than they count. Peak is the memory one call adds, gradients included; the summary has in brackets what the
gradient alone takes, which everybody returns. Error is the largest difference of loss and gradient from our operator in
fp64, relative to the largest entry; a contestant beyond the tolerance of its dtype is not timed. The released RFSR form
normalizes its features first and so computes another loss: it is checked against ours on normalized features, and is
never the best peer. Where the spreads of ours and the best peer overlap, the summary says level."""


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("(r)", "")).strip("-")


def _time(seconds: float) -> str:
    return (
        f"{seconds * 1e6:.1f} µs"
        if seconds < 1e-3
        else f"{seconds * 1e3:.2f} ms"
        if seconds < 1
        else f"{seconds:.3f} s"
    )


def best_peer(case: dict) -> dict | None:
    """The fastest contestant that is not ours and computes the same loss."""
    others = [r for r in case["rows"] if "median" in r and r["name"] != "ours" and not r.get("other_loss")]
    return min(others, key=lambda row: row["median"], default=None)


def ours(case: dict) -> dict | None:
    return next((row for row in case["rows"] if row["name"] == "ours" and "median" in row), None)


def case_lines(case: dict) -> list[str]:
    """One case: ours first, then by time, then those that have none."""
    base = ours(case)
    rows = sorted(case["rows"], key=lambda r: (r["name"] != "ours", r.get("median", float("inf"))))
    body = []
    for row in rows:
        if "median" not in row:
            body.append([row["name"], row["note"], "", "", "", "", ""])
            continue
        ratio = f"{row['median'] / base['median']:.2f}" if base else ""
        floor = f"{100 * case['floor'] / row['median']:.0f} %" if case.get("floor") else ""
        memory = "n/a" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 2**20:.1f}"
        spread = f"{_time(row['q20'])} – {_time(row['q80'])}"
        body.append([row["name"], _time(row["median"]), spread, ratio, floor, memory, f"{row['error']:.0e}"])
    header = ["", "median", "20 % – 80 %", "time / ours", "of the floor", "peak MiB", "error"]
    return [f"### {case['title']}", "", *markdown_rows(header, body), ""]


def summary_lines(cases: list[dict]) -> list[str]:
    body = []
    for case in cases:
        base, peer = ours(case), best_peer(case)
        if base is None or peer is None:
            continue
        ratio = peer["median"] / base["median"]
        level = max(base["q20"], peer["q20"]) <= min(base["q80"], peer["q80"])
        winner = "level" if level else "" if ratio > 1 else "**the peer wins**"
        both = (base.get("peak_bytes"), peer.get("peak_bytes"))
        memory = "n/a" if None in both else " / ".join(f"{b / 2**20:.1f}" for b in both)
        if case.get("gradient_bytes") and None not in both:
            memory += f" ({case['gradient_bytes'] / 2**20:.1f})"
        body.append(
            [case["title"], _time(base["median"]), peer["name"], _time(peer["median"]), f"{ratio:.2f}×", memory, winner]
        )
    header = ["case", "ours", "best peer", "its time", "we are faster by", "peak MiB, ours / its (the gradient)", ""]
    return markdown_rows(header, body)


# Of a result what the README repeats: the losses as they are trained with, what a step gains, and where a peer wins.
COMPARED = re.compile(
    r"fwd\+bwd, 8x3x512x512, (float32|bfloat16)|fwd, 1x3x64x64, float32|5 layers, (float32|bfloat16)|iteration|Reward"
)


def comparison_lines(results: list[dict]) -> list[str]:
    """Results of several machines side by side: how much faster ours is than the best peer."""
    found = [
        {
            case["title"]: (peer["median"] / base["median"], peer["name"])
            for case in result["cases"]
            if COMPARED.search(case["title"]) and (base := ours(case)) and (peer := best_peer(case))
        }
        for result in results
    ]
    rows = [
        [title, *(f"{row[title][0]:.2f}× {row[title][1]}" if title in row else "not run" for row in found)]
        for title in dict.fromkeys(title for row in found for title in row)
    ]
    return markdown_rows(["", *(result["machine"]["device"] for result in results)], rows)


def read(folder: Path) -> list[dict]:
    """The results of the losses in a folder, by name; other benchmarks have theirs there too, without ``cases``."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [result for result in results if "cases" in result]


def markdown(result: dict) -> str:
    lines = [
        f"# {result['machine']['device']}",
        "",
        *ABOUT.splitlines(),
        "",
        *markdown_rows(["", ""], [[key.replace("_", " "), str(value)] for key, value in result["machine"].items()]),
        "",
        "## Summary",
        "",
        *summary_lines(result["cases"]),
        "",
        "## Every case",
        "",
    ]
    for case in result["cases"]:
        lines += case_lines(case)
    return "\n".join(lines).rstrip() + "\n"


def write(result: dict, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug(result['machine']['device'])}.md"
    path.write_text(markdown(result))
    path.with_suffix(".json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return path
