"""Every property of the registry, put to every op."""

import pytest

from liger_fn.testing.properties import NotApplicable, Trial, trials
from liger_fn.testing.specs import specs


@pytest.mark.parametrize("trial", [pytest.param(t, id=t.id()) for t in trials(specs())])
def test_op(trial: Trial, device):
    try:
        trial.check(device)
    except NotApplicable as reason:
        pytest.skip(str(reason))
