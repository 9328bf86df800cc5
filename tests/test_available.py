"""How much memory there is, where a machine, a container or a batch job says so in Linux's files."""

import pytest

from rfsr_ext import memory

MACHINE = {"proc/meminfo": "MemTotal:       64000 kB\nMemFree:  1 kB\nMemAvailable:    32000 kB\n"}
ALL = 32000 * 1024


def second(folder: str, limit: str) -> dict[str, str]:
    return {f"{folder}/memory.max": limit, f"{folder}/memory.current": "700",
            f"{folder}/memory.stat": "anon 5\ninactive_file 200\nactive_file 90"}  # fmt: skip


def first(folder: str, limit: str) -> dict[str, str]:
    return {f"{folder}/memory.limit_in_bytes": limit, f"{folder}/memory.usage_in_bytes": "700",
            f"{folder}/memory.stat": "inactive_file 1\ntotal_inactive_file 200"}  # fmt: skip


def group(line: str) -> dict[str, str]:
    return {"proc/self/cgroup": f"1:name=systemd:/\n{line}\n"}


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, None),
        (MACHINE, ALL),
        (MACHINE | group("0::/"), ALL),
        (MACHINE | group("0::/") | second("groups", "max"), ALL),
        (MACHINE | group("0::/") | second("groups", "1000"), 500),
        (MACHINE | group("0::/job/step") | second("groups/job/step", "max") | second("groups/job", "1000"), 500),
        (MACHINE | group("0::/job/step") | second("groups/job/step", "900") | second("groups/job", "1000"), 400),
        (MACHINE | group("0::/") | second("groups", "100"), 0),
        (MACHINE | group("0::/gone") | second("groups", "1000"), 500),
        (MACHINE | group("4:memory:/docker/1a") | first("groups/memory", "1000"), 500),
        (MACHINE | group("4:memory:/a") | first("groups/memory/a", "1000"), 500),
        (MACHINE | group("4:memory:/a") | first("groups/memory/a", "9223372036854771712"), ALL),
        (group("0::/") | second("groups", "1000"), None),
    ],
)
def test_what_is_left_of_the_machine_or_of_a_limit(tmp_path, monkeypatch, files, wanted):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    assert memory.available() == wanted


def test_this_machine_says_it():
    there = memory.available()
    assert there is None or 10**8 < there < 10**14
