import logging

from pipelines.progress import progress


def test_items_pass_and_the_log_counts_them(caplog):
    caplog.set_level(logging.INFO)
    assert list(progress(iter("abc"), 3, "letters read", seconds=0.0)) == ["a", "b", "c"]
    assert [message.partition(",")[0] for message in caplog.messages] == [f"{n} of 3 letters read" for n in (1, 2, 3)]
    assert caplog.messages[-1].endswith("about 0 s left")


def test_a_short_loop_says_nothing(caplog):
    caplog.set_level(logging.INFO)
    list(progress(range(100), 100, "numbers read"))
    assert not caplog.messages
