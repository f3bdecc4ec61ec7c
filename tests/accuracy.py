"""The accuracy rule of the tests is the one that ships: `relneuron.testing.assert_accurate`.

`test_accuracy.py` checks that it rejects known-wrong results.
"""

from relneuron.testing import assert_accurate, assert_same_bits

__all__ = ["assert_accurate", "assert_same_bits"]
