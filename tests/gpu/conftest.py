"""Memory that nobody wrote to holds NaN in the tests' own process; runs that they start are not touched."""

from poison import poisoned_memory as poisoned_memory
