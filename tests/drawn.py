"""hypothesis; on a machine that lacks it (a bare GPU box) the tests that draw are skipped by name.

The other tests of a file, those for the GPU among them, still run there.
"""

import pytest

try:
    from hypothesis import HealthCheck, assume, given, settings
    from hypothesis import strategies as st
except ImportError:

    class _Absent:
        """Takes any attribute and any call."""

        def __getattr__(self, name):
            return self

        def __call__(self, *arguments, **options):
            return self

    HealthCheck = assume = st = _Absent()

    def settings(**_options):
        return lambda test: test

    def given(*_strategies, **_named):
        def skipping(test):
            @pytest.mark.skip(reason="needs hypothesis: pip install hypothesis")
            def test_skipped():
                pass

            test_skipped.__name__ = test.__name__
            return test_skipped

        return skipping


__all__ = ["HealthCheck", "assume", "given", "settings", "st"]
