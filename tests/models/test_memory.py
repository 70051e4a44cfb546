from __future__ import annotations

from types import SimpleNamespace

from rotmole.models import memory


def test_the_peak_is_that_of_the_process_itself(monkeypatch, tmp_path):
    """getrusage starts at the peak of the process that started this one."""
    inherited = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=700))
    monkeypatch.setattr(memory, "resource", inherited)
    monkeypatch.setattr(memory.sys, "platform", "linux")
    status = tmp_path / "status"
    status.write_text("VmPeak:\t  900 kB\nVmHWM:\t  300 kB\nVmRSS:\t  200 kB\n")
    monkeypatch.setattr(memory, "_STATUS", status)
    assert memory.peak_rss_bytes() == 300 * 1024
    status.write_text("Name:\tpython\n")
    assert memory.peak_rss_bytes() == 700 * 1024
    status.unlink()
    assert memory.peak_rss_bytes() == 700 * 1024
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.peak_rss_bytes() == 700
