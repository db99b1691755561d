import logging

from vitcls.core.progress import show_progress


def test_progress_without_a_terminal_is_a_line_now_and_then(caplog):
    caplog.set_level(logging.INFO, "vitcls")
    assert list(show_progress(iter("abc"), 3, "reading")) == ["a", "b", "c"]
    assert not caplog.messages  # it took no ten seconds
    assert list(show_progress(range(1000), 1000, "reading", every=0.0)) == list(range(1000))
    assert caplog.messages[999].startswith("reading: 999 of 1,000, ") and len(caplog.messages) == 1000
