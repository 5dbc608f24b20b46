"""The figures of a report, on numbers worked out by hand."""

import pytest

from experiments.answers import metrics
from experiments.timing import device


def test_a_questions_speed_is_all_tokens_over_all_seconds():
    assert metrics.speed([10, 30], [1.0, 4.0]) == 8.0


def test_speedup_is_a_ratio_of_means():
    assert metrics.speedup([20.0, 40.0], [10.0, 40.0]) == pytest.approx(1.2)


def test_accept_lengths_are_averaged_and_counted_over_rounds():
    assert metrics.mean_accept_length([1, 4, 4, 3]) == 3.0
    assert metrics.accept_histogram([1, 4, 4, 3]).tolist() == [1, 0, 1, 2]


def test_no_round_at_all_counts_as_plain_decoding():
    assert metrics.mean_accept_length([]) == 1.0
    assert metrics.accept_histogram([]).tolist() == [0]


def test_identical_share_compares_whole_answers():
    assert metrics.identical_share([[1, 2], [3], [4, 5]], [[1, 2], [3, 4], [4, 5]]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="2"):
        metrics.identical_share([[1]], [[1], [2]])


def test_bandwidth_is_that_of_a_memory():
    assert 1e8 < device.device_bandwidth() < 1e14
