"""What the accept lengths of a hierarchy's rounds tell of its passes."""

import types

from specmq_jax.decoding.costs.traffic import rounds_ahead


def test_the_passes_ahead_follow_from_the_accept_lengths():
    drafter = types.SimpleNamespace(min_draft_length=3, draft_model_start=False)
    # drafts 2 + 2, keeps 2; drafts 2 + 3, all right, so one ahead; drafts 1 + 2, all right
    assert rounds_ahead(drafter, [3, 6, 4], [2, 2, 2, 3, 2]) == 2
    drafter.draft_model_start = True
    assert rounds_ahead(drafter, [3, 2, 1], [2, 2, 2, 1, 1]) == 3
