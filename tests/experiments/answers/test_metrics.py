"""The figures of a report, on numbers worked out by hand."""

from experiments.answers import metrics
from experiments.timing import device


def test_a_questions_speed_is_all_tokens_over_all_seconds():
    assert metrics.speed([10, 30], [1.0, 4.0]) == 8.0


def test_accept_lengths_are_averaged_and_counted_over_rounds():
    assert metrics.mean_accept_length([1, 4, 4, 3]) == 3.0
    assert metrics.accept_histogram([1, 4, 4, 3]).tolist() == [1, 0, 1, 2]


def test_no_round_at_all_counts_as_plain_decoding():
    assert metrics.mean_accept_length([]) == 1.0
    assert metrics.accept_histogram([]).tolist() == [0]


def test_bandwidth_is_that_of_a_memory():
    assert 1e8 < device.device_bandwidth() < 1e14
