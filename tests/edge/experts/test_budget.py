"""How much memory there is, as cgroups of both versions and the kernel tell it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from expert_files import make_index

from edge.experts.budget import available, choose, resolve
from refold.errors import UsageError

MB = 10**6


def machine(root, free, cgroup="", files=None):
    """A root folder with /proc and /sys of a machine."""
    files = {"proc/meminfo": f"MemTotal: 99999999 kB\nMemAvailable: {free // 1024} kB\n", "proc/self/cgroup": cgroup} | (
        files or {}
    )
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def v2(limit, usage, cached=0, folder="", high="max"):
    at = f"sys/fs/cgroup/{folder}".rstrip("/")
    return {
        f"{at}/memory.max": f"{limit}\n",
        f"{at}/memory.high": f"{high}\n",
        f"{at}/memory.current": f"{usage}\n",
        f"{at}/memory.stat": f"anon 5\ninactive_file {cached}\n",
    }


def v1(limit, usage, cached=0, folder=""):
    at = f"sys/fs/cgroup/memory/{folder}".rstrip("/")
    return {
        f"{at}/memory.limit_in_bytes": f"{limit}\n",
        f"{at}/memory.usage_in_bytes": f"{usage}\n",
        f"{at}/memory.stat": f"total_inactive_file {cached}\n",
    }


def test_a_size_is_taken_as_it_is_said():
    assert choose("512MB").bytes == 512 * MB
    with pytest.raises(UsageError, match="no size"):
        choose("much")


def test_without_a_group_what_the_machine_has_free_less_a_reserve(tmp_path):
    root = machine(tmp_path, 1024 * 10**6)
    told = choose("auto", root=root)
    assert told.bytes == pytest.approx(1024e6 * 0.9, rel=1e-3) and "the machine leaves 1,024 MB" in told.why
    assert choose("AUTO", 300 * MB, root).bytes == told.bytes - 300 * MB


@pytest.mark.parametrize(
    ("cgroup", "files", "free"),
    [
        ("0::/a/b\n", v2(500 * MB, 200 * MB, folder="a/b"), 300 * MB),
        ("0::/a/b\n", v2(500 * MB, 200 * MB, 100 * MB, folder="a"), 400 * MB),  # a limit above one's own group
        ("0::/a\n", v2(900 * MB, 100 * MB, folder="a", high=str(600 * MB)), 500 * MB),
        ("0::/\n", v2("max", 10), None),
        ("0::/gone/from/here\n", v2(400 * MB, 150 * MB), 250 * MB),  # in a container the mount is the group
        ("5:cpu:/x\n4:memory:/a/b\n", v1(700 * MB, 300 * MB, 50 * MB, folder="a/b"), 450 * MB),
        ("4:memory:/a\n", v1(9223372036854771712, 300 * MB, folder="a"), None),
        ("4:memory:/a\n0::/\n", v1(800 * MB, 100 * MB, folder="a") | v1(9223372036854771712, 1), 700 * MB),
        ("0::/a\n", v2(100 * MB, 200 * MB, folder="a"), 0),
    ],
)
def test_the_tightest_group_counts(tmp_path, cgroup, files, free):
    rooms = available(machine(tmp_path, 2000 * MB, cgroup, files))
    assert min(r.free for r in rooms) == (2000 * MB // 1024 * 1024 if free is None else free)


def test_nothing_left_and_nothing_known_are_said(tmp_path):
    with pytest.raises(UsageError, match=r"No memory is left .* 61 MB"):
        choose("auto", root=machine(tmp_path, 60 * 1024 * 1000))
    with pytest.raises(UsageError, match="does not tell"):
        choose("auto", root=tmp_path / "none")


def test_this_machine_tells():
    assert choose("auto").bytes > 0


def test_a_bundle_gets_no_more_than_its_experts_need():
    index, _ = make_index()
    model = SimpleNamespace(index=index, resident_places=lambda: {"w": ("F16", (10, 10), 0, 200)})
    assert resolve("auto", model) == index.total
    assert resolve(12345, model) == 12345
    assert resolve("2MB", model) == 2 * MB
